//! The task that sends spans, many at a time.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Duration, sleep, timeout};

use super::client::{Client, Problem};
use super::environment::{Batches, Environment};
use super::settings::{Collector, Origin, Settings};
use super::span::Span;
use super::{otlp, zipkin};
use crate::stats::SpanCounts;

/// Attempts to send one batch at most.
const TRIES: u32 = 3;
/// Pause before the second attempt; twice as long before the third.
const PAUSE: Duration = Duration::from_millis(500);

/// Sends to one collector.
pub(super) struct Exporter {
    collector: Collector,
    origin: Origin,
    batches: Batches,
    counts: Arc<SpanCounts>,
    client: Option<Client>,
    /// The last batch was not taken, which was logged.
    is_failing: bool,
    /// The queue had no room of late, which was logged.
    was_full: bool,
    /// Spans that were dropped up to the last batch.
    dropped: u64,
}

impl Exporter {
    pub(super) fn new(
        environment: &Environment,
        settings: &Settings,
        collector: Collector,
        counts: Arc<SpanCounts>,
    ) -> Self {
        let own = match &collector {
            Collector::Otlp(otlp) => otlp.service.clone(),
            Collector::Zipkin(_) => None,
        };
        let service = environment.service.clone().or(own).unwrap_or_else(|| settings.service.clone());
        let origin = Origin { service, node: settings.node.clone(), attributes: environment.attributes.clone() };
        let (batches, dropped) = (environment.batches, counts.dropped.get());
        Self { collector, origin, batches, counts, client: None, is_failing: false, was_full: false, dropped }
    }

    /// Sends until `ends`, or until nobody can make spans any more.
    pub(super) async fn run(mut self, mut spans: mpsc::Receiver<Span>, full: Arc<Notify>, ends: Arc<Notify>) {
        let mut is_last = false;
        while !is_last {
            tokio::select! {
                // The end goes first: what waits then is sent once, without retries.
                biased;
                () = ends.notified() => is_last = true,
                () = full.notified() => {}
                () = sleep(self.batches.delay) => is_last = spans.is_closed(),
            }
            loop {
                let batch: Vec<Span> = std::iter::from_fn(|| spans.try_recv().ok()).take(self.batches.size).collect();
                if batch.is_empty() {
                    break;
                }
                let sent = tokio::select! {
                    sent = self.send(&batch) => sent,
                    () = ends.notified(), if !is_last => {
                        is_last = true;
                        self.send_once(&batch).await.map_err(|problem| problem.text)
                    }
                };
                self.count(batch.len() as u64, sent);
            }
        }
    }

    /// Tries again what may get through a little later, within the time that a batch may take.
    async fn send(&mut self, batch: &[Span]) -> Result<u64, String> {
        let limit = self.batches.timeout;
        let tries = async {
            let mut tries = 1;
            loop {
                match self.send_once(batch).await {
                    Err(problem) if problem.is_passing && tries < TRIES => sleep(PAUSE * tries).await,
                    result => return result.map_err(|problem| problem.text),
                }
                tries += 1;
            }
        };
        timeout(limit, tries).await.unwrap_or_else(|_| Err(format!("the collector took longer than {limit:?}")))
    }

    /// How many of them the collector refused.
    async fn send_once(&mut self, batch: &[Span]) -> Result<u64, Problem> {
        let client = match self.client.take() {
            Some(client) => client,
            None => Client::new(&self.collector).await?,
        };
        let client = self.client.insert(client);
        match &self.collector {
            Collector::Zipkin(_) => client.post(zipkin::encode(&self.origin, batch)).await.map(|_| 0),
            Collector::Otlp(_) => client.post(otlp::encode(&self.origin, batch)).await.map(|body| otlp::refused(&body)),
        }
    }

    fn count(&mut self, spans: u64, sent: Result<u64, String>) {
        let collector = &self.collector;
        let is_full = self.counts.dropped.get() > self.dropped;
        if is_full && !self.is_failing && !self.was_full {
            tracing::warn!(
                target: "proxy", %collector,
                "Spans come faster than the collector takes them and some are dropped; traffic goes on. OTEL_BSP_MAX_QUEUE_SIZE lets more of them wait"
            );
        }
        self.was_full = is_full;
        match sent {
            Ok(refused) => {
                let refused = refused.min(spans);
                self.counts.sent.add(spans - refused);
                self.counts.dropped.add(refused);
                if std::mem::take(&mut self.is_failing) {
                    let dropped = self.counts.dropped.get();
                    tracing::info!(target: "proxy", %collector, dropped, "The collector takes spans again");
                }
            }
            Err(error) => {
                self.counts.dropped.add(spans);
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::warn!(
                        target: "proxy", %collector, error,
                        "Spans can't be sent and are dropped until they can; traffic goes on. See whether the collector runs and takes this protocol"
                    );
                }
            }
        }
        self.dropped = self.counts.dropped.get();
    }
}
