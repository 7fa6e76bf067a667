//! Listeners for metrics, packets to statsd, and spans, as the newest registration configures them.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::listen::Listener;
use super::scrape::Tls;
use super::state::State;
use super::{Scope, listen, statsd};
use crate::snapshot::MetricsSettings;
use crate::stats::statsd::Dialect;

/// Pause between two attempts to bind a listener.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Runs what the newest snapshot asks for, until the snapshots end.
pub(super) async fn follow(state: &Arc<State>) {
    let mut snapshots = state.snapshots.clone();
    let mut sinks = Sinks::default();
    loop {
        // Before the first one nothing listens, as with Envoy: a refused scrape means that it is not ready.
        let snapshot = snapshots.borrow_and_update().clone();
        if let Some(snapshot) = snapshot {
            state.note_published();
            sinks.apply(&snapshot.metrics, state);
            state.observer.tracer().follow(&snapshot.traces);
        }
        if snapshots.changed().await.is_err() {
            // The sidecar drains; what runs goes on until the process ends.
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Default)]
struct Sinks {
    prometheus: Sink<SocketAddr>,
    stats: Sink<SocketAddr>,
    statsd: Sink<(String, Duration)>,
    dogstatsd: Sink<(String, Duration)>,
}

/// Something that runs for as long as its settings are the same.
struct Sink<T> {
    settings: Option<T>,
    task: Option<JoinHandle<()>>,
}

impl<T> Default for Sink<T> {
    fn default() -> Self {
        Self { settings: None, task: None }
    }
}

impl<T: Clone + PartialEq> Sink<T> {
    fn apply<F>(&mut self, settings: Option<T>, run: impl FnOnce(T) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.settings == settings {
            return;
        }
        if let Some(task) = self.task.take() {
            task.abort();
        }
        self.task = settings.clone().map(|settings| tokio::spawn(run(settings)));
        self.settings = settings;
    }
}

impl<T> Drop for Sink<T> {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Sinks {
    fn apply(&mut self, settings: &MetricsSettings, state: &Arc<State>) {
        let listen = |scope| {
            let state = Arc::clone(state);
            move |address| listener(address, scope, state)
        };
        self.prometheus.apply(settings.prometheus, listen(Scope::Prometheus));
        self.stats.apply(settings.stats, listen(Scope::Stats));
        let send = |dialect| {
            let state = Arc::clone(state);
            move |(url, interval): (String, Duration)| async move { statsd::send(&url, dialect, interval, &state).await }
        };
        let with_interval = |url: &Option<String>| url.clone().map(|url| (url, settings.flush_interval));
        self.statsd.apply(with_interval(&settings.statsd), send(Dialect::Statsd));
        self.dogstatsd.apply(with_interval(&settings.dogstatsd), send(Dialect::Dogstatsd));
    }
}

async fn listener(address: SocketAddr, scope: Scope, state: Arc<State>) {
    let mut reported = false;
    loop {
        match prepare(address, scope, &state) {
            Ok((listener, tls)) => {
                tracing::info!(target: "admin", %address, "Listening for scrapes of metrics");
                super::serve(listener, scope, tls, Arc::clone(&state)).await;
            }
            Err(error) if !reported => {
                tracing::error!(target: "admin", %address, error = format!("{error:#}"), "The listener for metrics cannot be started; trying again");
                reported = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}

fn prepare(address: SocketAddr, scope: Scope, state: &State) -> anyhow::Result<(Listener, Option<Tls>)> {
    // Only the listener for Prometheus has settings for TLS.
    let settings = state.prometheus.tls.as_ref().filter(|_| scope == Scope::Prometheus);
    let tls = settings.map(Tls::new).transpose()?;
    Ok((listen::tcp(address)?, tls))
}
