//! The data plane: makes the running listeners match the snapshot.
//!
//! A connection is served on the thread that accepted it, from its first byte to its last:
//! [`listener`] accepts, [`inbound`] or [`outbound`] serves, and [`relay`] copies bytes or [`http`] carries
//! requests. Between two of ours [`tunnel`] lets a session carry one connection after another.

mod authorization;
pub mod balance;
mod codec;
mod dial;
mod expose;
#[cfg(test)]
mod fixture;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod http;
mod inbound;
pub mod limits;
mod listener;
mod local_app;
mod log_limit;
mod memory;
mod outbound;
mod outcome;
mod places;
mod probe;
mod record;
mod relay;
mod socket;
mod tunnel;
mod workers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::drain::{self, Stage};
use crate::observe::Observer;
use crate::snapshot::{Bind, Exposed, Protocol, PublicListener, Snapshot, Upstream, UpstreamKey};
use balance::{Clock, UpstreamRuntime};
use listener::ListenerState;
use log_limit::LogLimits;
use memory::Memory;
use places::Places;

pub use workers::Workers;

/// Runs the data plane until every listener and connection is done after a drain.
pub async fn run(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    workers: &Workers,
    observer: Observer,
    drain: drain::Watch,
) {
    let mut stage = drain.observer();
    let mut proxy = Proxy::new(workers, observer, drain);
    let mut tidy = tokio::time::interval(TIDY);
    tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let retry = proxy.reconcile(snapshots.borrow_and_update().as_deref());
        // A drain that has begun is not put off by whatever else there is to do.
        tokio::select! {
            biased;
            () = stage.reached(Stage::Draining) => break,
            changed = snapshots.changed() => if changed.is_err() { break },
            () = tokio::time::sleep_until(retry) => {}
            _ = tidy.tick() => {
                let version = snapshots.borrow().as_ref().map_or(0, |snapshot| snapshot.version);
                proxy.memory.look(proxy.listeners.users(), version);
                proxy.log_limits.tell();
                continue;
            }
        }
    }
    let Proxy { listeners, log_limits, drain, .. } = proxy;
    // Only connections are waited for from here on.
    drop(drain);
    listeners.drain(snapshots, stage, &log_limits).await;
}

struct Proxy<'a> {
    workers: &'a Workers,
    drain: drain::Watch,
    clock: Clock,
    observer: Observer,
    inbound: inbound::Shared,
    listeners: Listeners,
    /// Binds that failed and are tried again.
    failed: BTreeMap<Bind, Failed>,
    log_limits: LogLimits,
    memory: Memory,
}

#[derive(Default)]
struct Listeners {
    public: Option<Running<PublicListener>>,
    upstreams: BTreeMap<UpstreamKey, Running<UpstreamRuntime>>,
    exposed: BTreeMap<Bind, Running<http::expose::Plan>>,
    /// No longer wanted, while their connections go on.
    retired_public: Vec<Running<PublicListener>>,
    retired_upstreams: Vec<Running<UpstreamRuntime>>,
    retired_exposed: Vec<Running<http::expose::Plan>>,
}

/// A listener that accepts, or did and still has connections.
struct Running<P> {
    bind: Bind,
    live: watch::Sender<ListenerState<P>>,
    /// Removed when the listener stops.
    socket_file: Option<SocketFile>,
}

/// The file of a Unix socket, removed with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A bind that is tried again.
struct Failed {
    attempts: u32,
    next: Instant,
}

impl<'a> Proxy<'a> {
    fn new(workers: &'a Workers, observer: Observer, drain: drain::Watch) -> Self {
        let log_limits = LogLimits::default();
        Self {
            workers,
            drain,
            clock: Clock::start(),
            inbound: inbound::Shared::new(observer.clone(), log_limits.inbound.clone()),
            log_limits,
            observer,
            listeners: Listeners::default(),
            failed: BTreeMap::new(),
            memory: Memory::default(),
        }
    }

    /// Makes what runs match `snapshot`, and tells when to try again what could not be bound.
    fn reconcile(&mut self, snapshot: Option<&Snapshot>) -> Instant {
        let Some(snapshot) = snapshot else {
            return Instant::now() + NOTHING_FAILED;
        };
        self.observer.access_log().set(snapshot.access_log.as_ref());
        self.retire(snapshot);
        self.listeners.update_retired(snapshot);
        if let Some(public) = &snapshot.public {
            self.run_public(public);
        }
        for (key, upstream) in &snapshot.upstreams {
            self.run_upstream(key, upstream);
        }
        for (bind, exposed) in &snapshot.exposed {
            self.run_exposed(bind, exposed);
        }
        self.failed.values().map(|failed| failed.next).min().unwrap_or_else(|| Instant::now() + NOTHING_FAILED)
    }

    /// Stops what is bound where the snapshot has no listener any more. First, so that another may bind there.
    fn retire(&mut self, snapshot: &Snapshot) {
        let wanted = snapshot.public.as_ref().map(|public| &public.bind);
        let listeners = &mut self.listeners;
        if let Some(mut public) = listeners.public.take_if(|running| Some(&running.bind) != wanted) {
            public.stop("public listener");
            listeners.retired_public.push(public);
        }
        for (key, mut running) in listeners.upstreams.extract_if(.., |key, _| !snapshot.upstreams.contains_key(key)) {
            running.stop(&key.destination);
            listeners.retired_upstreams.push(running);
        }
        for (_, mut running) in listeners.exposed.extract_if(.., |bind, _| !snapshot.exposed.contains_key(bind)) {
            running.stop("exposed paths");
            listeners.retired_exposed.push(running);
        }
        listeners.retired_public.retain(Running::is_in_use);
        listeners.retired_upstreams.retain(Running::is_in_use);
        listeners.retired_exposed.retain(Running::is_in_use);
        let is_upstream = |bind: &Bind| snapshot.upstreams.keys().any(|key| key.bind == *bind);
        let is_wanted = |bind: &Bind| Some(bind) == wanted || is_upstream(bind) || snapshot.exposed.contains_key(bind);
        self.failed.retain(|bind, _| is_wanted(bind));
    }

    fn run_public(&mut self, public: &Arc<PublicListener>) {
        if let Some(running) = &self.listeners.public {
            let before = running.live.borrow().config.protocol;
            tell_of_protocol("public listener", before, public.protocol);
            return running.update(public);
        }
        let shared = self.inbound.clone();
        let serve = move |accepted| inbound::serve(accepted, shared.clone());
        self.listeners.public = self.start("public listener", &public.bind, public, serve);
    }

    fn run_upstream(&mut self, key: &UpstreamKey, upstream: &Arc<Upstream>) {
        if let Some(running) = self.listeners.upstreams.get(key) {
            let previous = Arc::clone(&running.live.borrow().config);
            if !Arc::ptr_eq(&previous.upstream, upstream) {
                tell_of_protocol(&key.destination, previous.upstream.chain.protocol, upstream.chain.protocol);
                running.update(&Arc::new(UpstreamRuntime::new(Arc::clone(upstream), Some(&previous), &self.observer)));
            }
            return;
        }
        let plan = Arc::new(UpstreamRuntime::new(Arc::clone(upstream), None, &self.observer));
        let (clock, observer, log_limit) = (self.clock, self.observer.clone(), self.log_limits.upstream.clone());
        let serve = move |accepted| outbound::serve(accepted, clock, observer.clone(), log_limit.clone());
        if let Some(running) = self.start(&key.destination, &key.bind, &plan, serve) {
            self.listeners.upstreams.insert(key.clone(), running);
        }
    }

    fn run_exposed(&mut self, bind: &Bind, exposed: &Arc<Exposed>) {
        let plan = || Arc::new(http::expose::Plan::new(Arc::clone(exposed)));
        if let Some(running) = self.listeners.exposed.get(bind) {
            let changed = !Arc::ptr_eq(&running.live.borrow().config.exposed, exposed);
            if changed {
                running.update(&plan());
            }
            return;
        }
        let (observer, log_limit) = (self.observer.clone(), self.log_limits.inbound.clone());
        let places = Places::new(expose::CONNECTIONS);
        let serve = move |accepted| expose::serve(accepted, observer.clone(), Arc::clone(&places), log_limit.clone());
        if let Some(running) = self.start("exposed paths", bind, &plan(), serve) {
            self.listeners.exposed.insert(bind.clone(), running);
        }
    }

    /// Binds and starts a listener on every worker. A failure is logged and tried again later.
    fn start<P, S, F>(&mut self, name: &str, bind: &Bind, part: &Arc<P>, serve: S) -> Option<Running<P>>
    where
        P: Send + Sync + 'static,
        S: Fn(listener::Accepted<P>) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        if self.failed.get(bind).is_some_and(|failed| Instant::now() < failed.next) {
            return None;
        }
        let bound = match listener::bind(bind, self.workers.count()) {
            Ok(bound) => bound,
            Err(error) => {
                self.bind_failed(name, bind, &error);
                return None;
            }
        };
        self.failed.remove(bind);
        tracing::info!(target: "proxy", listener = name, bind_addr = %bind, "Starting listener");
        let (live, watched) = watch::channel(ListenerState { config: Arc::clone(part), stage: Stage::Running });
        for (worker, bound) in bound.into_iter().enumerate() {
            self.workers.spawn(worker, listener::run(bound, watched.clone(), self.drain.clone(), serve.clone()));
        }
        let socket_file = match bind {
            Bind::Unix { path, .. } => Some(SocketFile(path.clone())),
            Bind::Tcp(_) => None,
        };
        Some(Running { bind: bind.clone(), live, socket_file })
    }

    fn bind_failed(&mut self, name: &str, bind: &Bind, error: &std::io::Error) {
        let failed = self.failed.entry(bind.clone()).or_insert(Failed { attempts: 0, next: Instant::now() });
        let wait = (RETRY_FIRST * 2_u32.pow(failed.attempts.min(16))).min(RETRY_LAST);
        failed.next = Instant::now() + wait;
        failed.attempts += 1;
        // A listener of ours that has just moved away may need a moment to close.
        if failed.attempts == QUIET_ATTEMPTS {
            tracing::error!(
                target: "proxy",
                listener = name,
                bind_addr = %bind,
                %error,
                "Listener could not be started; trying again. If the address is taken, stop the program that has it or change the registration"
            );
        }
    }
}

fn tell_of_protocol(name: &str, before: Protocol, now: Protocol) {
    if before.is_http() != now.is_http() {
        tracing::info!(target: "proxy", listener = name, ?before, ?now, "The protocol has changed; open connections are ended, each after its answer");
    }
}

impl Listeners {
    /// Lets open connections finish until the drain time is over. They go by each newer snapshot meanwhile, so that what
    /// is denied then ends then; nothing is started any more.
    async fn drain(
        mut self,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut stage: drain::Observer,
        log_limits: &LogLimits,
    ) {
        self.advance(Stage::Draining);
        self.retired_public.extend(self.public.take());
        let mut closing = pin!(stage.reached(Stage::Closing));
        let mut tidy = tokio::time::interval(TIDY);
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            if let Some(snapshot) = snapshot.as_deref() {
                self.update_retired(snapshot);
            }
            tokio::select! {
                biased;
                () = &mut closing => break,
                Ok(()) = snapshots.changed() => {}
                _ = tidy.tick() => log_limits.tell(),
            }
        }
        self.advance(Stage::Closing);
    }

    /// Connections of a public listener that is no longer wanted go by what holds now: intentions, and whom the roots
    /// vouch for.
    fn update_retired(&self, snapshot: &Snapshot) {
        let Some(public) = snapshot.public.as_ref().or(snapshot.former_public.as_ref()) else { return };
        for running in &self.retired_public {
            running.update(public);
        }
    }

    fn users(&self) -> usize {
        let public = self.public.iter().chain(&self.retired_public).map(Running::users);
        let upstreams = self.upstreams.values().chain(&self.retired_upstreams).map(Running::users);
        let exposed = self.exposed.values().chain(&self.retired_exposed).map(Running::users);
        public.chain(upstreams).chain(exposed).sum()
    }

    fn advance(&self, stage: Stage) {
        for running in self.public.iter().chain(&self.retired_public) {
            running.advance(stage);
        }
        for running in self.upstreams.values().chain(&self.retired_upstreams) {
            running.advance(stage);
        }
        for running in self.exposed.values().chain(&self.retired_exposed) {
            running.advance(stage);
        }
    }
}

impl<P> Running<P> {
    /// Publishes a changed part; the same one again concerns nobody.
    fn update(&self, part: &Arc<P>) {
        self.live.send_if_modified(|live| {
            let changed = !Arc::ptr_eq(&live.config, part);
            live.config = Arc::clone(part);
            changed
        });
    }

    fn advance(&self, stage: Stage) {
        self.live.send_modify(|live| live.stage = live.stage.max(stage));
    }

    fn stop(&mut self, name: &str) {
        tracing::info!(target: "proxy", listener = name, bind_addr = %self.bind, "Stopping listener; its open connections go on");
        self.advance(Stage::Draining);
        self.socket_file = None;
    }

    /// How many connections, and threads that accept, go by it.
    fn users(&self) -> usize {
        self.live.receiver_count()
    }

    fn is_in_use(&self) -> bool {
        self.users() > 0
    }
}

/// Time between looks at what could be given back.
const TIDY: Duration = Duration::from_secs(1);
/// An hour: nothing is waited for.
const NOTHING_FAILED: Duration = Duration::from_secs(3600);
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_LAST: Duration = Duration::from_secs(5);
/// Together some 150 ms.
const QUIET_ATTEMPTS: u32 = 5;
