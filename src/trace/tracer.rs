//! The data plane's entry to tracing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::HeaderMap;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::active::Active;
use super::environment::Environment;
use super::exporter::Exporter;
use super::settings::{Collector, Settings};
use super::span::{Ids, Kind, Span};
use super::traced::{Traced, new_span_id};
use crate::stats::SpanCounts;

/// Decides what is traced, and takes spans. Clones are the same one, whose settings may be replaced at any time.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    environment: Environment,
    counts: Arc<SpanCounts>,
    /// Whether `active` is something: what every request looks at.
    is_on: AtomicBool,
    active: ArcSwapOption<Active>,
    /// The settings that `active` was made from.
    followed: Mutex<Option<Arc<Settings>>>,
    exporters: Mutex<Vec<Running>>,
}

/// A task that sends spans, and the signal for its end.
#[derive(Debug)]
struct Running {
    ends: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Tracer {
    /// One that counts in `counts`, and does as `environment` says before any registration.
    #[must_use]
    pub fn new(environment: Environment, counts: Arc<SpanCounts>) -> Self {
        Self(Arc::new(Shared { environment, counts, ..Shared::default() }))
    }

    /// Does as the registration says from now on, beside the environment. Spans are sent by a task of this runtime;
    /// those that an earlier one has are still sent.
    pub fn follow(&self, settings: &Arc<Settings>) {
        let mut followed = self.0.followed.lock().unwrap_or_else(PoisonError::into_inner);
        if followed.as_deref() == Some(settings) {
            return;
        }
        *followed = Some(Arc::clone(settings));
        let active = self.0.environment.collector(settings).map(|collector| Arc::new(self.start(settings, collector)));
        // A request in between finds no tracer, or the one before: either is right for a request of that moment.
        self.0.is_on.store(active.is_some(), Ordering::Relaxed);
        self.0.active.store(active);
    }

    /// The trace context of a new request; `None` if it is not traced.
    #[must_use]
    pub fn begin(&self, kind: Kind, headers: &HeaderMap) -> Option<Box<Traced>> {
        Traced::begin(&self.active()?, kind, headers)
    }

    /// Hands over the span of a connection, made by `span` where connections are traced. It is a trace of its own.
    pub fn connection(&self, span: impl FnOnce() -> Span) {
        let Some(active) = self.active().filter(|active| active.connections) else { return };
        let mut span = span();
        span.ids = Ids { trace_id: active.new_trace_id(), span_id: new_span_id(), ..Ids::default() };
        active.submit(span);
    }

    /// Traces no more, and waits until what there is is sent, for `limit` at most.
    pub async fn close(&self, limit: Duration) {
        self.0.is_on.store(false, Ordering::Relaxed);
        self.0.active.store(None);
        let running = std::mem::take(&mut *self.exporters());
        running.iter().for_each(|exporter| exporter.ends.notify_one());
        let all_sent = async {
            for Running { task, .. } in running {
                let _ = task.await;
            }
        };
        let _ = timeout(limit, all_sent).await;
    }

    fn active(&self) -> Option<Arc<Active>> {
        if self.0.is_on.load(Ordering::Relaxed) { self.0.active.load_full() } else { None }
    }

    fn start(&self, settings: &Arc<Settings>, collector: Collector) -> Active {
        let Shared { environment, counts, .. } = &*self.0;
        let (queue, spans) = mpsc::channel(environment.batches.queue);
        let (full, ends) = <(Arc<Notify>, Arc<Notify>)>::default();
        let (shared, short_ids) = match &collector {
            Collector::Zipkin(zipkin) => (zipkin.shared, !zipkin.long_ids),
            Collector::Otlp(_) => (false, false),
        };
        let active = Active {
            sampler: environment.sampler(settings),
            shared,
            short_ids,
            connections: settings.connections,
            queue,
            batch: environment.batches.size,
            full: Arc::clone(&full),
            counts: Arc::clone(counts),
        };
        tracing::info!(target: "proxy", %collector, "Tracing: spans are sent to a collector");
        let exporter = Exporter::new(environment, settings, collector, Arc::clone(counts));
        let task = tokio::spawn(exporter.run(spans, full, Arc::clone(&ends)));
        let mut exporters = self.exporters();
        exporters.retain(|exporter| !exporter.task.is_finished());
        exporters.push(Running { ends, task });
        active
    }

    fn exporters(&self) -> MutexGuard<'_, Vec<Running>> {
        self.0.exporters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
