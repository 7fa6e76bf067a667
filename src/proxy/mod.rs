//! The data plane: makes the running listeners match the snapshot.
//!
//! [`listeners`] starts and stops them. A connection is served on the thread that accepted it, from its first byte to its last:
//! [`listener`] accepts, [`inbound`] or [`outbound`] serves, and [`relay`] copies bytes or [`http`] carries
//! requests. Between two of ours [`tunnel`] lets a session carry one connection after another.

mod authorization;
pub mod balance;
mod codec;
mod denial;
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
mod listeners;
mod local_app;
mod log_limit;
mod memory;
mod outbound;
mod outcome;
mod places;
mod probe;
mod record;
mod rehearsal;
mod relay;
mod relayed;
mod socket;
mod tunnel;
mod workers;

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::drain::{self, Stage};
use crate::observe::{Observer, listener_name};
use crate::snapshot::{Bind, Exposed, InboundListener, OutboundKey, OutboundListener, Protocol, Snapshot};
use crate::stats::scope;
use balance::{Clock, OutboundRuntime};
use listeners::{ListenerConfig, Set, Starter};
use log_limit::LogLimits;
use memory::Memory;
use places::Places;

pub use rehearsal::{Rehearsed, rehearse};
pub use workers::Workers;

/// Runs the data plane until every listener and connection is done after a drain.
pub async fn run(
    mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    workers: &Workers,
    observer: Observer,
    drain: drain::Watch,
) {
    let (mut stage, mut inbound_stage) = (drain.observer(), drain.observer());
    let mut proxy = Proxy::new(workers, observer, drain);
    let mut tidy = tokio::time::interval(TIDY);
    tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut retry = proxy.reconcile(snapshots.borrow_and_update().as_deref());
    loop {
        // A drain that has begun is not put off by whatever else there is to do.
        tokio::select! {
            biased;
            () = stage.reached(Stage::Draining) => break,
            () = inbound_stage.reached(Stage::DrainingInbound), if !proxy.listeners.inbound_drains => {
                proxy.listeners.drain_inbound();
            }
            changed = snapshots.changed() => if changed.is_err() { break },
            () = tokio::time::sleep_until(retry) => {}
            _ = tidy.tick() => {
                let version = snapshots.borrow().as_ref().map_or(0, |snapshot| snapshot.version);
                proxy.memory.look(proxy.listeners.users(), version);
                proxy.log_limits.write_counts();
                proxy.listeners.forget_retired();
                continue;
            }
        }
        retry = proxy.reconcile(snapshots.borrow_and_update().as_deref());
    }
    let Proxy { listeners, log_limits, starter, .. } = proxy;
    // Only connections are waited for from here on.
    drop(starter);
    listeners.drain(snapshots, stage, &log_limits).await;
}

struct Proxy<'a> {
    starter: Starter<'a>,
    clock: Clock,
    observer: Observer,
    inbound: Arc<inbound::Shared>,
    listeners: Listeners,
    log_limits: LogLimits,
    memory: Memory,
}

/// All listeners, by what leads to them in the snapshot.
#[derive(Default)]
struct Listeners {
    inbound: Set<Bind, InboundListener>,
    outbound: Set<OutboundKey, OutboundRuntime>,
    exposed: Set<Bind, http::expose::Plan>,
    /// What is reached from outside is started no more.
    inbound_drains: bool,
}

impl<'a> Proxy<'a> {
    fn new(workers: &'a Workers, observer: Observer, drain: drain::Watch) -> Self {
        let log_limits = LogLimits::default();
        Self {
            starter: Starter::new(workers, observer.clone(), drain),
            clock: observer.clock(),
            inbound: Arc::new(inbound::Shared::new(observer.clone(), &log_limits)),
            log_limits,
            observer,
            listeners: Listeners::default(),
            memory: Memory::default(),
        }
    }

    /// Makes the running listeners match `snapshot`, and returns when to bind failed ones again.
    fn reconcile(&mut self, snapshot: Option<&Snapshot>) -> Instant {
        let Some(snapshot) = snapshot else {
            return Instant::now() + NOTHING_FAILED;
        };
        let (clock, observer) = (self.clock, &self.observer);
        observer.access_log().set(snapshot.access_log.as_ref());
        if let Some(credentials) = &snapshot.credentials {
            self.starter.set_datacenter(&credentials.id().datacenter);
        }
        // First, so that another may bind where one was.
        self.listeners.retire(snapshot);
        let inbound_drains = self.listeners.inbound_drains;
        self.starter.forget_all_but(|bind| is_bound(snapshot, bind, inbound_drains));
        let Listeners { inbound, outbound, exposed, .. } = &mut self.listeners;
        // What others wait for comes before hundreds of upstreams.
        if !inbound_drains {
            inbound.run(&snapshot.inbound, &mut self.starter, || {
                let shared = Arc::clone(&self.inbound);
                move |accepted| inbound::serve(accepted, Arc::clone(&shared))
            });
            exposed.run(&snapshot.exposed, &mut self.starter, || {
                let (observer, log_limit) = (observer.clone(), self.log_limits.inbound.clone());
                let places = Places::new(expose::CONNECTIONS);
                move |accepted| expose::serve(accepted, observer.clone(), Arc::clone(&places), log_limit.clone())
            });
        }
        outbound.run(&snapshot.outbound, &mut self.starter, || {
            let (observer, log_limit) = (observer.clone(), self.log_limits.upstream.clone());
            move |accepted| outbound::serve(accepted, clock, observer.clone(), log_limit.clone())
        });
        self.starter.next_try().unwrap_or_else(|| Instant::now() + NOTHING_FAILED)
    }
}

/// Whether a listener is to be bound there.
fn is_bound(snapshot: &Snapshot, bind: &Bind, inbound_drains: bool) -> bool {
    let is_inbound = snapshot.inbound.contains_key(bind) || snapshot.exposed.contains_key(bind);
    (is_inbound && !inbound_drains) || snapshot.outbound.keys().any(|key| key.bind == *bind)
}

impl Listeners {
    fn retire(&mut self, snapshot: &Snapshot) {
        self.inbound.retire(&snapshot.inbound);
        self.outbound.retire(&snapshot.outbound);
        self.exposed.retire(&snapshot.exposed);
        self.update_retired(snapshot);
    }

    /// Forgets what is no longer wanted and has no connection left.
    fn forget_retired(&mut self) {
        self.inbound.forget_retired();
        self.outbound.forget_retired();
        self.exposed.forget_retired();
    }

    /// Lets what came from the mesh and to exposed paths finish, and accepts no more of it.
    fn drain_inbound(&mut self) {
        tracing::info!(target: "proxy", "Draining inbound listeners: no new connection is accepted and open ones may finish");
        self.inbound_drains = true;
        self.inbound.retire(&BTreeMap::new());
        self.exposed.retire(&BTreeMap::new());
    }

    /// Connections of an inbound listener that is no longer wanted go by what holds now: intentions, and whom the roots
    /// vouch for.
    fn update_retired(&self, snapshot: &Snapshot) {
        self.inbound.update_retired(|retired| snapshot.successor(retired));
    }

    /// Lets open connections finish until the drain time is over. They go by each newer snapshot meanwhile, so that what
    /// is denied then ends then; nothing is started any more.
    async fn drain(
        mut self,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut stage: drain::Observer,
        log_limits: &LogLimits,
    ) {
        self.advance(Stage::Draining);
        self.inbound.retire_all();
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
                _ = tidy.tick() => log_limits.write_counts(),
            }
        }
        self.advance(Stage::Closing);
    }

    fn advance(&self, stage: Stage) {
        self.inbound.advance(stage);
        self.outbound.advance(stage);
        self.exposed.advance(stage);
    }

    fn users(&self) -> usize {
        self.inbound.users() + self.outbound.users() + self.exposed.users()
    }
}

impl ListenerConfig for InboundListener {
    type Part = Self;

    fn name(_part: &Self) -> &str {
        "public listener"
    }

    fn scope(_part: &Self::Part, _datacenter: &str) -> scope::Listener {
        scope::Listener::Public
    }

    fn bind(part: &Self) -> &Bind {
        &part.bind
    }

    fn new(part: &Arc<Self>, _previous: Option<&Self>, _observer: &Observer) -> Arc<Self> {
        Arc::clone(part)
    }

    fn is_made_of(&self, part: &Arc<Self>) -> bool {
        std::ptr::eq(self, &raw const **part)
    }

    fn protocol(&self) -> Protocol {
        self.service.protocol
    }
}

impl ListenerConfig for OutboundRuntime {
    type Part = OutboundListener;

    fn scope(part: &OutboundListener, datacenter: &str) -> scope::Listener {
        scope::Listener::Upstream(Arc::new(listener_name(&part.key.destination, datacenter)))
    }

    fn name(part: &OutboundListener) -> &str {
        &part.key.destination
    }

    fn bind(part: &OutboundListener) -> &Bind {
        &part.key.bind
    }

    fn new(part: &Arc<OutboundListener>, previous: Option<&Self>, observer: &Observer) -> Arc<Self> {
        Arc::new(Self::new(Arc::clone(part), previous, observer))
    }

    fn is_made_of(&self, part: &Arc<OutboundListener>) -> bool {
        Arc::ptr_eq(&self.listener, part)
    }

    fn protocol(&self) -> Protocol {
        self.listener.upstream.chain.protocol
    }
}

impl ListenerConfig for http::expose::Plan {
    type Part = Exposed;

    fn name(_part: &Exposed) -> &str {
        "exposed paths"
    }

    fn scope(part: &Exposed, _datacenter: &str) -> scope::Listener {
        scope::Listener::Exposed(match &part.bind {
            Bind::Tcp(address) => address.port(),
            Bind::Unix { .. } => 0,
        })
    }

    fn bind(part: &Exposed) -> &Bind {
        &part.bind
    }

    fn new(part: &Arc<Exposed>, _previous: Option<&Self>, _observer: &Observer) -> Arc<Self> {
        Arc::new(Self::new(Arc::clone(part)))
    }

    fn is_made_of(&self, part: &Arc<Exposed>) -> bool {
        Arc::ptr_eq(&self.exposed, part)
    }

    /// Each path has its own; all are of HTTP.
    fn protocol(&self) -> Protocol {
        Protocol::Http
    }
}

/// Interval between two checks for memory to give back.
const TIDY: Duration = Duration::from_secs(1);
/// Wait while no listener has failed to bind.
const NOTHING_FAILED: Duration = Duration::from_secs(3600);
