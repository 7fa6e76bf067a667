//! The state that the admin server reads and sets, handed to it by `app`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::{Semaphore, mpsc, watch};

use crate::config::Prometheus;
use crate::drain::Stage;
use crate::observe::Observer;
use crate::snapshot::Snapshot;
use crate::stats::Registry;
use crate::stats::agent::AgentNow;
use crate::telemetry::LevelHandle;

/// A command of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Stop accepting and let open connections go on; the process does not end by it.
    Drain,
    /// The same for what comes from the mesh and to exposed paths; the local app may go on connecting.
    DrainInbound,
    /// As the first SIGTERM does.
    Quit,
}

/// How the process was started.
pub struct Started {
    /// The id or name that says which proxy to run.
    pub of: String,
    /// Threads of the data plane.
    pub workers: usize,
    pub prometheus: Prometheus,
}

/// Tells what the agent is asked at this moment.
pub(super) type AgentLook = Box<dyn Fn() -> AgentNow + Send + Sync>;

/// The read-only part of [`State`].
pub struct Watched {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub stage: watch::Receiver<Stage>,
    pub observer: Observer,
    pub agent: AgentLook,
}

/// Concurrent `/events` streams.
const STREAMS: usize = 16;

/// The state that the admin server reads and sets.
pub struct State {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub stage: watch::Receiver<Stage>,
    pub stats: Arc<Registry>,
    pub observer: Observer,
    pub level: LevelHandle,
    pub commands: mpsc::Sender<Command>,
    pub prometheus: Prometheus,
    /// The id or name that the process was started with.
    pub started_for: String,
    /// Threads of the data plane.
    pub workers: usize,
    /// Tells what the agent is asked.
    pub agent: AgentLook,
    pub started: Instant,
    pub started_at: SystemTime,
    /// Cleared by `POST /healthcheck/fail`.
    healthy: AtomicBool,
    /// Places for `/events`, fewer than connections: probes are answered however many streams are open.
    pub(super) streams: Arc<Semaphore>,
    address: OnceLock<String>,
    /// When the newest snapshot was seen.
    published: Mutex<SystemTime>,
}

/// Whether the sidecar serves, in Envoy's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Serving {
    Live,
    /// Also after `POST /healthcheck/fail`.
    Draining,
    /// No complete configuration received from the agent yet.
    Initializing,
}

impl Serving {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Live => "LIVE",
            Self::Draining => "DRAINING",
            Self::Initializing => "INITIALIZING",
        }
    }
}

impl State {
    #[must_use]
    pub fn new(watched: Watched, level: LevelHandle, commands: mpsc::Sender<Command>, started: Started) -> Self {
        let Watched { snapshots, stage, observer, agent } = watched;
        Self {
            snapshots,
            stage,
            stats: Arc::clone(observer.stats()),
            observer,
            level,
            commands,
            prometheus: started.prometheus,
            started_for: started.of,
            workers: started.workers,
            agent,
            started: Instant::now(),
            started_at: SystemTime::now(),
            healthy: AtomicBool::new(true),
            streams: Arc::new(Semaphore::new(STREAMS)),
            address: OnceLock::new(),
            published: Mutex::new(SystemTime::now()),
        }
    }

    pub(super) fn serving(&self) -> Serving {
        if self.snapshots.borrow().is_none() {
            Serving::Initializing
        } else if *self.stage.borrow() > Stage::Running || !self.healthy.load(Ordering::Relaxed) {
            Serving::Draining
        } else {
            Serving::Live
        }
    }

    pub(super) fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    /// There is a newer snapshot.
    pub(super) fn note_published(&self) {
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = SystemTime::now();
    }

    pub(super) fn published_at(&self) -> SystemTime {
        *self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of the admin server.
    pub(super) fn admin_address(&self) -> Option<&str> {
        self.address.get().map(String::as_str)
    }

    pub(super) fn set_admin_address(&self, address: String) {
        let _ = self.address.set(address);
    }
}
