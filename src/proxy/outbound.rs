//! Upstream listeners: one connection from the local app.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::balance::{Balancer, Clock, InFlight, Instance, Outcome, Plan};
use super::dial::{Offer, attempt};
use super::http::note::Caller;
use super::http::outbound::Outbound;
use super::limits::{Limit, Permit};
use super::listener::{Accepted, Live};
use super::record::{Direction, Record};
use super::relay::{self, Broken, Relay};
use super::socket::Socket;
use super::tunnel::{Carrier, Role};
use crate::access_log::AccessLog;
use crate::drain::{self, Stage};
use crate::snapshot::Target;
use crate::tls::{self, SpiffeId};

/// Serves one connection: choose the target, connect to an instance of it, relay, record.
pub async fn serve(accepted: Accepted<Plan>, clock: Clock, access_log: AccessLog) {
    if let Some(connection) = establish(accepted, clock, access_log).await {
        // In a task of its own: an open connection keeps none of the memory that opening it took.
        tokio::spawn(connection.relay());
    }
}

/// A connection of the local app, and the one to an instance that has proved to be what was meant.
struct Connection {
    app: Socket,
    mesh: Carrier<Socket>,
    /// What `mesh` was made with.
    tls: Arc<tls::Client>,
    live: watch::Receiver<Live<Plan>>,
    record: Record,
    in_flight: InFlight,
    _permit: Permit,
    _drain: drain::Watch,
}

/// `None` also for a connection of requests, which has a task of its own by then.
async fn establish(accepted: Accepted<Plan>, clock: Clock, access_log: AccessLog) -> Option<Connection> {
    let Accepted { socket: app, remote, mut live, drain } = accepted;
    let mut record = Record::new(Direction::Outbound, remote);
    let local = if access_log.is_on() { app.local_address() } else { None };
    let plan = known(&mut live).await;
    if plan.upstream.chain.protocol.is_http() {
        let caller = Caller { access_log, remote, local, ..Caller::default() };
        let upgrades = plan.upstream.requests.upgrades.clone();
        let connection = Outbound { remote, live, drain, clock, upgrades, caller };
        tokio::spawn(async move {
            let ended = connection.serve(app).await;
            record.finish(ended.as_ref().map_or_else(String::as_str, |()| "ended"));
        });
        return None;
    }
    record.log_to(&access_log, local, None);
    match connect(&plan, clock).await {
        Ok(Connected { mesh, tls, peer, in_flight, permit }) => {
            record.peer(&peer);
            record.leads_to(&plan.upstream.name, &in_flight.instance().address);
            Some(Connection { app, mesh, tls, live, record, in_flight, _permit: permit, _drain: drain })
        }
        Err(reason) => {
            tracing::warn!(target: "proxy.upstream", upstream = plan.upstream.name, reason, "failed to dial the upstream");
            record.finish(&reason);
            app.close().await;
            None
        }
    }
}

/// The plan, once it is known where the upstream leads; what there is when that takes too long, or at the end of a
/// drain.
async fn known(live: &mut watch::Receiver<Live<Plan>>) -> Arc<Plan> {
    let known = live.wait_for(|live| {
        let demand = live.part.upstream.awaited.as_ref().filter(|_| live.stage < Stage::Closing);
        demand.map(|demand| demand.call()).is_none()
    });
    let _ = timeout(AWAITED, known).await;
    Arc::clone(&live.borrow_and_update().part)
}

impl Connection {
    /// Copies both ways until the connection ends or the drain time is over.
    #[expect(clippy::manual_async_fn, reason = "the future of an async fn has room for `self` twice")]
    fn relay(mut self) -> impl Future<Output = ()> {
        async move {
            let mut copy = Relay::new();
            let ended = tokio::select! {
                biased;
                ended = copy.run(&mut self.app, &mut self.mesh) => Some(ended),
                () = closing(&mut self.live) => None,
            };
            self.record.bytes(copy.opened, copy.sealed);
            // Boxed, for an open connection is to keep none of the memory that this takes.
            Box::pin(self.end(ended)).await;
        }
    }

    /// Ends the connection; `None` where the drain time is over.
    async fn end(mut self, ended: Option<Result<(), Broken>>) {
        match ended {
            Some(Ok(())) => {
                self.record.finish("ended");
                if self.live.borrow().stage == Stage::Running {
                    self.in_flight.instance().sessions().keep(self.mesh, &self.tls);
                }
            }
            Some(Err(broken)) => {
                self.record.finish(&broken.to_string());
                relay::abort(&broken, self.app, self.mesh.tls);
            }
            None => {
                self.record.finish("closed at the end of the drain time");
                relay::close(self.app, self.mesh.tls).await;
            }
        }
    }
}

/// Ends when open connections must be closed.
async fn closing(live: &mut watch::Receiver<Live<Plan>>) {
    let _ = live.wait_for(|live| live.stage >= Stage::Closing).await;
}

/// What connecting gives.
struct Connected {
    mesh: Carrier<Socket>,
    tls: Arc<tls::Client>,
    peer: Arc<SpiffeId>,
    in_flight: InFlight,
    permit: Permit,
}

/// Connects to an instance of the first target of the chain that has one, each target within its connect
/// timeout.
///
/// # Errors
/// Why there is none, for the log.
async fn connect(plan: &Plan, clock: Clock) -> Result<Connected, String> {
    let mut reasons = Vec::new();
    for (target, balancer) in plan.balancers.in_order(plan.upstream.chain.connection_targets(), clock.now()) {
        match connect_target(target, balancer, clock).await {
            Ok(connected) => return Ok(connected),
            Err(reason) => reasons.push(format!("{}: {reason}", target)),
        }
    }
    Err(match reasons[..] {
        [] => "the agent has not told where it leads: see what it answered above".into(),
        _ => reasons.join("; "),
    })
}

/// Tries instances of one target until one is connected.
async fn connect_target(target: &Target, balancer: &Arc<Balancer>, clock: Clock) -> Result<Connected, String> {
    let permit = balancer.admit(Limit::Connections).map_err(|overflow| overflow.to_string())?;
    let deadline = Instant::now() + target.connect_timeout;
    let mut tried: Vec<Arc<Instance>> = Vec::new();
    let mut reasons = Vec::new();
    while tried.len() < ATTEMPTS && Instant::now() < deadline {
        let Some(picked) = balancer.pick(clock.now(), None, &tried, |below| fastrand::u64(..below)) else {
            break;
        };
        let instance = Arc::clone(picked.instance());
        let others = balancer.len() - tried.len() > 1;
        let until = if others { deadline.min(Instant::now() + target.connect_timeout / SHARE) } else { deadline };
        match reach(target, &instance, until).await {
            Ok((mesh, peer)) => {
                let (tls, in_flight) = (Arc::clone(&target.tls), picked.connected(clock.now()));
                return Ok(Connected { mesh, tls, peer, in_flight, permit });
            }
            Err(reason) => {
                picked.report(Outcome::Unreachable, Duration::ZERO, clock.now());
                reasons.push(format!("{} {reason}", instance.address));
            }
        }
        tried.push(instance);
    }
    Err(match reasons[..] {
        [] => balancer.absence(),
        _ => format!("no instance could be used: {}", reasons.join(", ")),
    })
}

/// A free session with the instance, or a new one.
async fn reach(
    target: &Target,
    instance: &Instance,
    until: Instant,
) -> Result<(Carrier<Socket>, Arc<SpiffeId>), String> {
    if let Some(reached) = instance.sessions().start(&target.tls, until).await {
        return Ok(reached);
    }
    let (tls, peer) = attempt(target, instance, until, Offer::Tunnel).await?;
    Ok((Carrier::new(tls, Role::Client), peer))
}

/// How long a connection waits for the agent to tell where its upstream leads, as long as Consul's default for a
/// connection to an instance.
const AWAITED: Duration = Duration::from_secs(5);
/// Instances of one target that one connection tries at most.
const ATTEMPTS: usize = 16;
/// Part of the connect timeout that an instance gets while there are others to try.
const SHARE: u32 = 3;
