//! Builds, wires, waits and drains. Only `main` and tests know it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::admin::{self, Command, Started};
use crate::config::{Config, Mode};
use crate::consul::watches::Watches;
use crate::consul::{self, Client};
use crate::control::Sources;
use crate::drain::{self, Stage};
use crate::observe::Observer;
use crate::proxy::Workers;
use crate::registration::Registration;
use crate::snapshot::Snapshot;
use crate::stats::Registry;
use crate::telemetry::LevelHandle;
use crate::trace::{self, Tracer};
use crate::{control, proxy};

/// Runs the proxy until it is stopped: the first SIGINT or SIGTERM drains it, the second ends it at once.
///
/// # Errors
/// When the proxy can't start: settings that can't be used, or a refusal of the agent that is final.
pub async fn run(config: Config, level: LevelHandle) -> anyhow::Result<()> {
    let Config { mode, agent, drain_time, workers, aead, tunnel, admin, traces, .. } = config;
    tracing::info!(target: "proxy", aead = %aead, "TLS record encryption chosen for this processor");
    let mut signals = Signals::new().context("can't listen for signals")?;
    let Host { workers, sources, observer } = Host::start(&agent, workers, traces)?;
    let registration = match &mode {
        Mode::AdHoc(flags) => Registration::new(sources.client().clone(), flags).map(Arc::new),
        Mode::ProxyId(_) | Mode::SidecarFor(_) => None,
    };
    let (publish, snapshots) = watch::channel(None);
    let (trigger, drained) = drain::channel();

    let observed = observer.clone();

    let (commands, mut commanded) = mpsc::channel(COMMANDS);
    let progress = sources.clone();
    let watched = admin::Watched {
        snapshots: snapshots.clone(),
        stage: trigger.stage(),
        observer: observer.clone(),
        agent: Box::new(move || progress.look()),
    };
    let started = Started { of: mode.id().to_owned(), workers: workers.count(), prometheus: admin.prometheus.clone() };
    let state = admin::State::new(watched, level, commands, started);
    let state = Arc::new(state);

    let mut tasks = JoinSet::new();
    tasks.spawn(async move { admin::run(&admin, state).await });
    tasks.spawn(report_ready(snapshots.clone()));
    tasks.spawn(async move {
        proxy::run(snapshots, &workers, observed, drained).await;
        Ok(())
    });
    let counted = Arc::clone(observer.stats());
    tasks.spawn(async move { control::run(sources, &mode, aead, tunnel, counted, publish).await });
    if let Some(registration) = registration.clone() {
        tasks.spawn(async move {
            registration.keep().await;
            Ok(())
        });
    }

    let result = tokio::select! {
        () = ended_on_request(&mut signals, &mut commanded, &trigger) => {
            drain(trigger, drain_time, &mut signals).await;
            Ok(())
        }
        error = first_error(&mut tasks) => Err(error),
    };
    drop(tasks);
    tokio::join!(observer.access_log().close(CLOSE_TIME), observer.tracer().close(CLOSE_TIME));
    if let Some(registration) = registration {
        registration.end().await;
    }
    result
}

/// Parts that a process has once, however many sidecars it serves.
struct Host {
    /// The data plane's threads.
    workers: Arc<Workers>,
    /// The connections to the agent, and everything that is asked over them.
    sources: Sources,
    /// The observer of connections and requests, with the access log.
    observer: Observer,
}

impl Host {
    fn start(agent: &consul::Settings, workers: usize, traces: trace::Environment) -> anyhow::Result<Self> {
        let client = Client::new(agent)?;
        let workers = Arc::new(Workers::start(workers).context("can't start the data plane's threads")?);
        let sources = Sources::new(Watches::new(client));
        let stats = Arc::<Registry>::default();
        let tracer = Tracer::new(traces, Arc::clone(&stats.spans));
        Ok(Self { workers, sources, observer: Observer::new(stats, tracer) })
    }
}

/// Ends with the first signal, or with `/quitquitquit` of the admin server.
async fn ended_on_request(signals: &mut Signals, commands: &mut mpsc::Receiver<Command>, trigger: &drain::Trigger) {
    loop {
        tokio::select! {
            () = signals.next() => return,
            Some(command) = commands.recv() => match command {
                Command::Quit => return,
                Command::Drain => trigger.advance(Stage::Draining),
                Command::DrainInbound => trigger.advance(Stage::DrainingInbound),
            },
        }
    }
}

/// Capacity of the channel for commands of the admin server.
const COMMANDS: usize = 8;

/// Lets open connections finish, up to the drain time or a second signal. Control goes on meanwhile, so that a new deny
/// closes connections during the drain too.
async fn drain(trigger: drain::Trigger, time: Duration, signals: &mut Signals) {
    tracing::info!(
        target: "proxy",
        drain_time = ?time,
        "Draining: no new connection is accepted and open ones may finish; a second signal ends the process at once"
    );
    trigger.advance(Stage::Draining);
    tokio::select! {
        () = trigger.drained() => return,
        () = sleep(time) => {}
        () = signals.next() => return,
    }
    tracing::info!(target: "proxy", "The drain time is over: closing open connections");
    trigger.advance(Stage::Closing);
    let _ = timeout(CLOSE_TIME, trigger.drained()).await;
}

/// Time at the end of the process for connections to close, for the access log to be written and for spans to be sent.
const CLOSE_TIME: Duration = Duration::from_millis(1500);

/// Waits for the first task that fails; one that ends well leaves the others to go on.
async fn first_error(tasks: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    loop {
        match tasks.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return error,
            Some(Err(error)) => return anyhow::Error::new(error).context("a part of the proxy ended by itself"),
            None => return std::future::pending().await,
        }
    }
}

/// Logs once that the first snapshot is complete, in the words of Consul's proxy, which scripts wait for.
async fn report_ready(mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>) -> anyhow::Result<()> {
    if snapshots.wait_for(Option::is_some).await.is_ok() {
        tracing::info!(target: "proxy", "Proxy loaded config and ready to serve");
    }
    Ok(())
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
