//! Upstream listeners: one connection from the local app.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::authorization;
use super::balance::{Balancer, Clock, InFlight, Instance, OutboundRuntime, Picked, Report, UpstreamRuntime};
use super::denial;
use super::dial::{self, Pace, Unconnected};
use super::http::outbound::Outbound;
use super::http::request_record::RequestObserver;
use super::limits::{Limit, Permit};
use super::listener::{Accepted, ListenerState};
use super::log_limit::LogLimit;
use super::outcome::{Fault, Outcome};
use super::probe;
use super::record::Record;
use super::relay::{self, Broken, Relay, Side};
use super::socket::Socket;
use super::tunnel::MeshStream;
use crate::drain::{self, Stage};
use crate::observe::{Attempt, AttemptResult, ConnectionInfo, Event, Listener, Observer};
use crate::race::{Next, Race};
use crate::snapshot::Target;
use crate::tls::{self, SpiffeId};

/// Serves one connection: choose the target, connect to an instance of it, relay, record.
pub(super) async fn serve(accepted: Accepted<OutboundRuntime>, clock: Clock, observer: Observer, log_limit: LogLimit) {
    if let Some(connection) = establish(accepted, clock, observer, log_limit).await {
        // In a task of its own: an open connection keeps none of the memory that opening it took.
        tokio::spawn(connection.relay());
    }
}

/// A connection of the local app, and the one to an instance that has proved to be what was meant.
struct Connection {
    app: Socket,
    mesh: MeshStream<Socket>,
    copy: Relay,
    /// The TLS client that `mesh` was made with.
    tls: Arc<tls::Client>,
    state: watch::Receiver<ListenerState<OutboundRuntime>>,
    record: Record,
    instance: Reached,
    log_limit: LogLimit,
    /// Why the instance's sidecar ended it without a byte.
    refused: Option<Box<Fault>>,
    _permit: Permit,
    _open: drain::Open,
}

/// `None` also for a connection of requests, which has a task of its own by then.
async fn establish(
    accepted: Accepted<OutboundRuntime>,
    clock: Clock,
    observer: Observer,
    log_limit: LogLimit,
) -> Option<Connection> {
    let Accepted { socket: app, remote, mut state, drain, stats } = accepted;
    let local = if observer.access_log().is_on() { app.local_address().map(Box::new) } else { None };
    let listener = Listener::Upstream(Arc::clone(&state.borrow().config.listener));
    let mut record =
        Record::accepted(&observer, ConnectionInfo { listener, stats, remote, local, peer: None, caller: None });
    let now = known(&mut state).await;
    let plan = &now.upstream;
    record.accepted_by(Listener::Upstream(Arc::clone(&now.listener)));
    if plan.upstream.chain.protocol.is_http() {
        let requests = RequestObserver { observer, connection: Arc::new(record.info().clone()) };
        let upgrades = plan.upstream.requests.upgrades.clone();
        let connection = Outbound { remote, state, drain, clock, upgrades, requests, log_limit };
        tokio::spawn(async move {
            let ended = connection.serve(app).await;
            record.result(ended);
        });
        return None;
    }
    record.carries_bytes();
    match connect(plan, clock, &state, &mut record).await {
        Ok(Connected { mesh, tls, peer, instance, permit }) => {
            record.connected(Some(peer));
            let copy = Relay::new(&record.info().stats, instance.get().stats());
            let (refused, _permit, _open) = (None, permit, drain.into_open());
            Some(Connection { app, mesh, copy, tls, state, record, instance, log_limit, refused, _permit, _open })
        }
        Err(fault) => {
            let source = plan.upstream.chain.targets().next().map(|target| target.tls().id());
            denial::log(&plan.upstream.name, source, &fault, &log_limit);
            record.failed(fault);
            app.close().await;
            None
        }
    }
}

/// The plan, once it is known where the upstream leads; what there is when that takes too long, or at the end of a
/// drain.
async fn known(state: &mut watch::Receiver<ListenerState<OutboundRuntime>>) -> Arc<OutboundRuntime> {
    let known = state.wait_for(|state| {
        let request = state.config.listener.upstream.awaited.as_ref().filter(|_| state.stage < Stage::Closing);
        request.map(|request| request.request()).is_none()
    });
    let _ = timeout(AWAITED, known).await;
    Arc::clone(&state.borrow_and_update().config)
}

impl Connection {
    /// Copies both ways until the connection ends or the drain time is over.
    #[expect(clippy::manual_async_fn, reason = "the future of an async fn has room for `self` twice")]
    fn relay(mut self) -> impl Future<Output = ()> {
        async move {
            let mut ended = None;
            if let Reached::Sidecar(_) = &self.instance {
                (self, ended) = Box::pin(self.begin()).await;
            }
            if ended.is_none() {
                ended = tokio::select! {
                    biased;
                    ended = self.copy.run(&mut self.app, &mut self.mesh) => Some(ended),
                    () = closing(&mut self.state) => None,
                };
            }
            if ended.is_none() {
                ended = Box::pin(self.rest()).await;
            }
            self.record.bytes(self.copy.received(), self.copy.sent());
            // Boxed, for an open connection is to keep none of the memory that this takes.
            Box::pin(self.end(ended)).await;
        }
    }

    /// The first moment of a connection whose instance has yet to show that there is an app: from there on it counts as
    /// connected, or as failed. A connection that nobody has said anything on by then has another such moment when its
    /// first bytes come, as Envoy applies the intentions to those.
    async fn begin(mut self) -> (Self, Option<Result<(), Broken>>) {
        let mut ended = timeout(MOMENT, self.copy.run(&mut self.app, &mut self.mesh)).await.ok();
        let silent = self.copy.sent() == 0;
        let broken = matches!(&ended, Some(Err(Broken { side: Side::Upstream, .. }))) && silent;
        if let Reached::Sidecar(unconfirmed) = self.instance {
            let (picked, now) = (unconfirmed.picked, unconfirmed.clock.now());
            self.instance = Reached::App(match &ended {
                Some(_) if broken || self.copy.was_left_unanswered => picked.closed_unanswered(now),
                // The app on our side has left before there was anything to see.
                Some(_) if silent => picked.without_result(),
                _ => picked.connected(now),
            });
        }
        let mut is_early = true;
        if ended.is_none() && !self.copy.has_spoken() && !self.copy.was_left_unanswered {
            (ended, is_early) = self.first_bytes().await;
        }
        if is_early {
            self.explain(ended.as_ref());
        }
        (self, ended)
    }

    /// Copies until a moment after the first bytes, and says whether that moment came.
    async fn first_bytes(&mut self) -> (Option<Result<(), Broken>>, bool) {
        let Self { app, mesh, copy, state, .. } = self;
        let copied = async {
            match copy.run_until_spoken(app, mesh).await {
                None => (timeout(MOMENT, copy.run(app, mesh)).await.ok(), true),
                ended => (ended, false),
            }
        };
        tokio::select! {
            biased;
            copied = copied => copied,
            () = closing(state) => (None, false),
        }
    }

    /// Logs a connection that the instance's sidecar has ended without a byte.
    fn explain(&mut self, ended: Option<&Result<(), Broken>>) {
        let broken = match ended {
            Some(Err(broken)) if broken.side == Side::Upstream && self.copy.sent() == 0 => Some(broken),
            _ if self.copy.was_left_unanswered => None,
            _ => return,
        };
        let fault = denial::unanswered(&self.instance.get().address, broken.map(|broken| &broken.error));
        self.log(&fault);
        self.refused = Some(Box::new(fault));
    }

    fn log(&self, fault: &Fault) {
        denial::log(self.record.info().listener.name(), Some(self.tls.id()), fault, &self.log_limit);
    }

    /// What it carries may be requests: the one that is under way gets its answer, unless the drain time is over.
    async fn rest(&mut self) -> Option<Result<(), Broken>> {
        let Self { app, mesh, copy, state, .. } = self;
        tokio::select! {
            biased;
            _ = state.wait_for(|state| state.stage >= Stage::Closing) => None,
            ended = copy.run_to_rest(app, mesh) => ended,
        }
    }

    /// Ends the connection; `None` where it must not go on.
    async fn end(mut self, ended: Option<Result<(), Broken>>) {
        let refused = self.refusal();
        match ended {
            Some(Ok(())) => {
                self.record.result(refused.map_or(Ok(()), Err));
                if self.state.borrow().stage == Stage::Running {
                    self.instance.get().sessions().keep(self.mesh, &self.tls);
                }
            }
            Some(Err(broken)) => {
                self.record.failed(refused.unwrap_or_else(|| (&broken).into()));
                relay::abort(&broken, self.app, self.mesh.tls.io);
            }
            None => {
                let drained = self.state.borrow().stage >= Stage::Closing;
                self.record.failed(if drained { authorization::drained() } else { authorization::carries_requests() });
                relay::close(self.app, self.mesh.tls).await;
            }
        }
    }
}

impl Connection {
    /// Why the instance's sidecar ended the connection, if it did. What it said itself is logged here.
    fn refusal(&mut self) -> Option<Fault> {
        let Some(refusal) = self.mesh.refusal() else { return self.refused.take().map(|fault| *fault) };
        let fault = refusal.fault(&self.instance.get().address);
        if fault.outcome == Outcome::DeniedByDestination {
            self.log(&fault);
        }
        Some(fault)
    }
}

impl Reached {
    fn get(&self) -> &Arc<Instance> {
        match self {
            Self::App(in_flight) => in_flight.instance(),
            Self::Sidecar(unconfirmed) => unconfirmed.picked.instance(),
        }
    }
}

/// Ends when open connections must be closed: at the end of a drain, and when they may carry requests that are to be
/// routed one by one.
async fn closing(state: &mut watch::Receiver<ListenerState<OutboundRuntime>>) {
    let must = |state: &ListenerState<OutboundRuntime>| {
        state.stage >= Stage::Closing || state.config.listener.upstream.chain.protocol.is_http()
    };
    let _ = state.wait_for(must).await;
}

/// A connection to an instance.
struct Connected {
    mesh: MeshStream<Socket>,
    tls: Arc<tls::Client>,
    peer: Arc<SpiffeId>,
    instance: Reached,
    permit: Permit,
}

/// An instance that was connected to.
enum Reached {
    /// Its app has the connection.
    App(InFlight),
    /// Its sidecar has it. Whether there is an app behind is seen from what comes back.
    Sidecar(Box<Unconfirmed>),
}

struct Unconfirmed {
    picked: Picked,
    clock: Clock,
}

/// An instance that gave no connection.
struct Failure {
    instance: Arc<Instance>,
    attempt: Attempt,
    why: Unconnected,
}

/// Connects to an instance of the first target of the chain that has one, each target within its connect
/// timeout.
///
/// # Errors
/// Why there is none, for the log.
async fn connect(
    plan: &UpstreamRuntime,
    clock: Clock,
    state: &watch::Receiver<ListenerState<OutboundRuntime>>,
    record: &mut Record,
) -> Result<Connected, Fault> {
    let (mut reasons, mut outcome) = (Vec::new(), Outcome::NoInstance);
    for (target, balancer) in plan.balancers.in_order(plan.upstream.chain.connection_targets(), clock.now()) {
        match connect_target(target, balancer, clock, state, record).await {
            Ok(connected) => return Ok(connected),
            Err(Unusable { fault, denied }) => {
                reasons.push(format!("{target}: {fault}"));
                outcome = fault.outcome;
                if denied {
                    break;
                }
            }
        }
    }
    Err(match reasons[..] {
        [] => Fault::new(outcome, "no discovery chain received yet: the log has the last error of the agent"),
        _ => Fault::new(outcome, reasons.join("; ")),
    })
}

/// Why a target can't be used, and whether that is because it does not allow us: then no other is tried either.
struct Unusable {
    fault: Fault,
    denied: bool,
}

/// Tries instances of one target, each beside those that are slow, until one is connected.
async fn connect_target(
    target: &Arc<Target>,
    balancer: &Arc<Balancer>,
    clock: Clock,
    state: &watch::Receiver<ListenerState<OutboundRuntime>>,
    record: &mut Record,
) -> Result<Connected, Unusable> {
    let unusable = |fault| Unusable { fault, denied: false };
    let permit = balancer.admit(Limit::Connections).map_err(|overflow| unusable(overflow.into()))?;
    let pace = Pace::new(target);
    let (mut tried, mut reasons) = (Vec::new(), Vec::new());
    // What all attempts came to, if it is the same.
    let (mut outcome, mut denied) = (None, false);
    let mut race: Race<Won, Failure> = Race::new();
    let next = |failed: Option<Failure>| {
        if let Some(Failure { instance, attempt, why }) = failed {
            record.attempt(attempt);
            reasons.push(format!("{} {why}", instance.address));
            outcome = match outcome {
                Some(before) if before != why.outcome() => Some(Outcome::Unreachable),
                _ => Some(why.outcome()),
            };
            denied = why.is_denial();
            if denied {
                return Next::Stop;
            }
            probe::begin(state, target, &instance, clock);
        }
        let Some(until) = pace.until(balancer, tried.len()) else { return Next::Wait };
        let picked = balancer.pick(clock.now(), None, &tried, |below| fastrand::u64(..below));
        let Some(picked) = picked else { return Next::Wait };
        tried.push(Arc::clone(picked.instance()));
        let observer = balancer.observer().clone();
        Next::Begin(Box::pin(reach(Arc::clone(target), picked, until, clock, observer)), pace.stagger())
    };
    let won = race.run(next).await;
    if race.is_on() {
        let (state, target) = (state.clone(), Arc::clone(target));
        race.finish(move |ended| match ended {
            Ok(Won { mesh, instance, .. }) => probe::spare(mesh, target.tls(), instance.get()),
            Err(Failure { instance, .. }) => probe::begin(&state, &target, &instance, clock),
        });
    }
    match (won, &reasons[..]) {
        (Some(Won { mesh, peer, instance, attempt }), _) => {
            record.attempt(attempt);
            Ok(Connected { mesh, tls: Arc::clone(target.tls()), peer, instance, permit })
        }
        (None, []) => {
            balancer.observer().observe(Event::NoInstance(balancer.stats()));
            Err(unusable(Fault::new(Outcome::NoInstance, balancer.no_endpoint_reason())))
        }
        (None, _) => {
            let cause = format!("no instance could be used: {}", reasons.join(", "));
            let outcome = if denied { Some(Outcome::DeniedByDestination) } else { outcome };
            Err(Unusable { fault: Fault::new(outcome.unwrap_or(Outcome::Unreachable), cause), denied })
        }
    }
}

/// Of the attempts at instances, what the first success gives.
struct Won {
    mesh: MeshStream<Socket>,
    peer: Arc<SpiffeId>,
    instance: Reached,
    attempt: Attempt,
}

/// Connects to one instance, and reports how that went.
async fn reach(
    target: Arc<Target>,
    picked: Picked,
    until: Instant,
    clock: Clock,
    observer: Observer,
) -> Result<Won, Failure> {
    let mut attempt = Attempt::new(picked.instance().destination(&target));
    match dial::connect(&target, picked.instance(), until, &observer).await {
        Ok((mesh, peer)) => {
            attempt.end(AttemptResult::Connected);
            let instance = if mesh.answers_for_app() {
                Reached::App(picked.connected(clock.now()))
            } else {
                Reached::Sidecar(Box::new(Unconfirmed { picked, clock }))
            };
            Ok(Won { mesh, peer, instance, attempt })
        }
        Err(why) => {
            attempt.end(AttemptResult::Failed { outcome: why.outcome(), cause: why.to_string() });
            let instance = Arc::clone(picked.instance());
            // A denial says nothing of the instance.
            if !why.is_denial() {
                picked.report(Report::Unreachable, Duration::ZERO, clock.now());
            }
            Err(Failure { instance, attempt, why })
        }
    }
}

/// Time that a connection waits for the discovery chain of its upstream, as long as Consul's default connect timeout.
const AWAITED: Duration = Duration::from_secs(5);
/// A connection that the far sidecar closes within this time and without a byte counts as failed: its app did not take
/// it.
const MOMENT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_connection_keeps_little_memory() {
        fn size<F>(_: impl Fn(Connection) -> F) -> usize {
            size_of::<F>()
        }
        // Tasks take multiples of 128 bytes, of which 104 are tokio's. It is 768 now; another compiler may lay it out worse.
        assert!(size(Connection::relay) <= 896 - 104, "{} bytes", size(Connection::relay));
    }
}
