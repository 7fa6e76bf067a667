//! Upstream listeners: one connection from the local app.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::balance::{Balancer, Clock, InFlight, Instance};
use super::listener::{Accepted, Live};
use super::record::{Direction, Record};
use super::relay::{self, Relay};
use super::socket::Socket;
use crate::drain::Stage;
use crate::snapshot::{Target, Upstream};
use crate::tls::{HandshakeError, SpiffeId, Stream};

/// An upstream with what is remembered of its instances.
#[derive(Debug)]
pub struct Plan {
    pub upstream: Arc<Upstream>,
    /// By the target's id.
    balancers: HashMap<String, Arc<Balancer>>,
}

impl Plan {
    /// Takes over what `previous` remembers.
    #[must_use]
    pub fn new(upstream: Arc<Upstream>, previous: Option<&Self>) -> Self {
        let known = |target: &Target| previous.and_then(|plan| plan.balancers.get(&target.id));
        let balancers = upstream.chain.targets();
        let balancers =
            balancers.map(|target| (target.id.clone(), Balancer::new(&target.endpoints, known(target)))).collect();
        Self { upstream, balancers }
    }
}

/// Serves one connection: choose the target, connect to an instance of it, relay, record.
pub async fn serve(accepted: Accepted<Plan>, clock: Clock) {
    let Accepted { socket: mut app, remote, mut live, drain: _drain } = accepted;
    let mut record = Record::new(Direction::Outbound, remote);
    let plan = Arc::clone(&live.borrow_and_update().part);
    let Connected { mut mesh, peer, in_flight: _in_flight } = match connect(&plan, clock).await {
        Ok(connected) => connected,
        Err(reason) => {
            tracing::warn!(target: "proxy.upstream", upstream = plan.upstream.name, reason, "failed to dial the upstream");
            app.close().await;
            return record.finish(&reason);
        }
    };
    record.peer(&peer);
    drop(plan);

    let mut copy = Relay::new();
    let ended = tokio::select! {
        biased;
        ended = copy.run(&mut app, &mut mesh) => Some(ended),
        () = closing(&mut live) => None,
    };
    record.bytes(copy.opened, copy.sealed);
    match ended {
        Some(Ok(())) => record.finish("ended"),
        Some(Err(broken)) => {
            record.finish(&broken.to_string());
            relay::abort(&broken, app, mesh);
        }
        None => {
            record.finish("closed at the end of the drain time");
            relay::close(app, mesh).await;
        }
    }
}

/// Ends when open connections must be closed.
async fn closing(live: &mut watch::Receiver<Live<Plan>>) {
    let _ = live.wait_for(|live| live.stage >= Stage::Closing).await;
}

/// A connection to an instance that has proved to be what was meant.
struct Connected {
    mesh: Stream<Socket>,
    peer: SpiffeId,
    in_flight: InFlight,
}

/// Connects to an instance of the first target of the chain that has one, each target within its connect
/// timeout.
///
/// # Errors
/// Why there is none, for the log.
async fn connect(plan: &Plan, clock: Clock) -> Result<Connected, String> {
    let targets = plan
        .upstream
        .chain
        .connection_targets()
        .iter()
        .filter_map(|target| Some((target, plan.balancers.get(&target.id)?)));
    let now = clock.now();
    // A target whose instances are all put aside waits behind those that have one, and is tried at last.
    let (up, down): (Vec<_>, Vec<_>) = targets.partition(|(_, balancer)| balancer.is_up(now));
    let mut reasons = Vec::new();
    for (target, balancer) in up.into_iter().chain(down) {
        if plan.upstream.limits.max_connections.is_some_and(|limit| balancer.in_flight() >= limit) {
            reasons.push(format!("{}: overflow, max_connections are open", described(target)));
            continue;
        }
        match connect_target(target, balancer, clock).await {
            Ok(connected) => return Ok(connected),
            Err(reason) => reasons.push(format!("{}: {reason}", described(target))),
        }
    }
    Err(reasons.join("; "))
}

fn described(target: &Target) -> String {
    format!("service {:?} in {}", target.service, target.datacenter)
}

/// Tries instances of one target until one is connected.
async fn connect_target(target: &Target, balancer: &Balancer, clock: Clock) -> Result<Connected, String> {
    if balancer.is_empty() {
        return Err(match balancer.registered {
            0 => "no instance is registered with a sidecar (or the token may not see it: node:read and service:read)"
                .into(),
            count => format!("none of {count} registered instances is passing its checks"),
        });
    }
    let deadline = Instant::now() + target.connect_timeout;
    let mut tried: Vec<Arc<Instance>> = Vec::new();
    let mut reasons = Vec::new();
    while tried.len() < ATTEMPTS && Instant::now() < deadline {
        let Some(instance) = balancer.pick(clock.now(), &tried, |below| fastrand::u64(..below)) else {
            break;
        };
        let in_flight = instance.enter();
        let others = balancer.len() - tried.len() > 1;
        let until = if others { deadline.min(Instant::now() + target.connect_timeout / SHARE) } else { deadline };
        match attempt(target, instance, until).await {
            Ok((mesh, peer)) => {
                instance.succeeded();
                return Ok(Connected { mesh, peer, in_flight });
            }
            Err(reason) => {
                instance.failed(clock.now());
                reasons.push(format!("{} {reason}", instance.address));
            }
        }
        tried.push(Arc::clone(instance));
    }
    Err(format!("no instance could be used: {}", reasons.join(", ")))
}

/// One connect and handshake with one instance.
async fn attempt(target: &Target, instance: &Instance, until: Instant) -> Result<(Stream<Socket>, SpiffeId), String> {
    let socket = match timeout_at(until, Socket::connect(&instance.address)).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(e)) => return Err(e.to_string()),
        Err(_) => return Err("did not answer in time".into()),
    };
    let problem = match timeout_at(until, Stream::connect(socket, &target.tls)).await {
        Ok(Ok(mesh)) => match target.tls.authenticate(mesh.peer_certificates(), SystemTime::now()) {
            Ok(peer) => return Ok((mesh, peer)),
            Err(e) => e.to_string(),
        },
        Ok(Err(HandshakeError::Io(e))) => return Err(format!("broke off the TLS handshake: {e}")),
        Ok(Err(e)) => e.to_string(),
        Err(_) => return Err("did not finish the TLS handshake in time".into()),
    };
    // Not a matter of reaching it: something there is not what the catalog says.
    tracing::warn!(target: "proxy.upstream", service = target.service, instance = %instance.address, problem, "An instance was refused");
    Err(format!("was refused: {problem}"))
}

/// Instances of one target that one connection tries at most.
const ATTEMPTS: usize = 16;
/// Part of the connect timeout that an instance gets while there are others to try.
const SHARE: u32 = 3;
