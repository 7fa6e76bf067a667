//! How an instance is connected to: TCP, a handshake as us, and the proof that it is what was meant; and how long that
//! may take while there are other instances, for connections and for requests alike.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};

use super::balance::{Balancer, Instance};
use super::denial;
use super::socket::Socket;
use super::tunnel::{MeshStream, Reason, Refusal, Role};
use crate::observe::{ConnectError, Event, Observer, Outcome};
use crate::snapshot::{Target, Transport};
use crate::tls::{self, HandshakeError, SpiffeId, Stream};

/// The application protocols that a handshake is to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// The protocols that the target's credentials were made for.
    All,
    /// For what HTTP/2 can't carry.
    Http1,
    /// The tunnel, but to an instance that refused us for it.
    Tunnel,
}

/// The time for the instances of a target, for one connection or one try of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    timeout: Duration,
    deadline: Instant,
}

impl Pace {
    #[must_use]
    pub(super) fn new(target: &Target) -> Self {
        Self { timeout: target.connect_timeout, deadline: Instant::now() + target.connect_timeout }
    }

    /// How long one instance is waited for before the next is tried beside it.
    #[must_use]
    pub(super) fn stagger(&self) -> Duration {
        STAGGER.min(self.timeout / SHARE)
    }

    /// Until when an instance may take if it is tried now; `None`: the time is over, or enough were `tried`.
    #[must_use]
    pub(super) fn until(&self, balancer: &Balancer, tried: usize) -> Option<Instant> {
        let now = Instant::now();
        if tried >= ATTEMPTS || now >= self.deadline {
            return None;
        }
        let others = balancer.len() > tried + 1;
        Some(if others { self.deadline.min(now + self.timeout / SHARE) } else { self.deadline })
    }
}

/// Instances of one target that are tried for one connection, or for one try of a request.
const ATTEMPTS: usize = 16;
/// Part of the connect timeout (one third) that an instance gets while there are others to try.
const SHARE: u32 = 3;
/// Time after which the next instance is tried beside one that is slow, as browsers do with addresses (RFC 8305,
/// section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// One connect and handshake with one instance.
///
/// # Errors
/// Why there is no connection.
pub(super) async fn attempt(
    target: &Arc<Target>,
    instance: &Instance,
    until: Instant,
    offer: Offer,
    observer: &Observer,
) -> Result<(Stream<Socket>, Arc<SpiffeId>), ConnectError> {
    let destination = instance.destination(target);
    observer.observe(Event::ConnectStarted(&destination));
    let started = Instant::now();
    let result = match &target.transport {
        Transport::Mesh(tls) => shake_hands(target, tls, instance, until, offer).await,
    };
    let (took, connected) = (started.elapsed(), result.as_ref().map(|(mesh, _)| Some(mesh.handshake())));
    observer.observe(Event::ConnectEnded { destination: &destination, took, result: connected });
    result
}

async fn shake_hands(
    target: &Target,
    tls: &tls::Client,
    instance: &Instance,
    until: Instant,
    offer: Offer,
) -> Result<(Stream<Socket>, Arc<SpiffeId>), ConnectError> {
    let socket = match timeout_at(until, Socket::connect(&instance.address)).await {
        Ok(connected) => {
            let socket = connected.map_err(|error| ConnectError::Io(Arc::new(error)))?;
            socket.counted(instance.stats())
        }
        Err(_) => return Err(ConnectError::TimedOut),
    };
    let bare = offer == Offer::Tunnel && instance.sessions().are_refused();
    let handshake = async {
        match offer {
            Offer::Tunnel if bare => Stream::connect_without_alpn(socket, tls).await,
            Offer::All | Offer::Tunnel => Stream::connect(socket, tls).await,
            Offer::Http1 => Stream::connect(socket, &tls.offering(&[b"http/1.1"])).await,
        }
    };
    let error = match timeout_at(until, handshake).await {
        Ok(Ok(mesh)) => match tls.authenticate(mesh.peer_certificates(), SystemTime::now()) {
            Ok(peer) => return Ok((mesh, peer.id)),
            Err(error) => ConnectError::Peer(Arc::new(error)),
        },
        Ok(Err(error)) if error.is_lack_of_protocol() && offer == Offer::Tunnel && !bare => {
            instance.sessions().refuse();
            return Box::pin(shake_hands(target, tls, instance, until, offer)).await;
        }
        Ok(Err(HandshakeError::Io(error))) => return Err(ConnectError::HandshakeBroken(Arc::new(error))),
        Ok(Err(error)) => ConnectError::Handshake(Arc::new(error)),
        Err(_) => return Err(ConnectError::HandshakeTimedOut),
    };
    // Not a matter of reaching it: something there is not what the catalog says.
    if let Some(before) = instance.refusals().due() {
        let problem = error.problem();
        tracing::warn!(target: "proxy.upstream", service = target.service, instance = %instance.address, problem, before, "An instance was refused");
    }
    Err(error)
}

/// A connection to an instance's app for bytes: on a free session with the instance, or on a new one.
///
/// # Errors
/// Why there is none.
pub(super) async fn connect(
    target: &Arc<Target>,
    instance: &Instance,
    until: Instant,
    observer: &Observer,
) -> Result<(MeshStream<Socket>, Arc<SpiffeId>), Unconnected> {
    if let Some(begun) = instance.sessions().start(target.tls(), until).await {
        // One more for those who count connections of apps, as Consul's UI does, though none is made.
        instance.stats().connections.increment();
        return begun.map_err(Unconnected::Refused);
    }
    let (tls, peer) = attempt(target, instance, until, Offer::Tunnel, observer).await?;
    let mut mesh = MeshStream::new(tls, Role::Client);
    if mesh.is_free() {
        match timeout_at(until, mesh.start()).await {
            Ok(Ok(answer)) => answer.map_err(Unconnected::Refused)?,
            Ok(Err(error)) => return Err(ConnectError::TunnelBroken(Arc::new(error)).into()),
            Err(_) => return Err(ConnectError::TunnelTimedOut.into()),
        }
    }
    Ok((mesh, peer))
}

/// Why an instance gave no connection. For the log, it stands after the address of the instance.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unconnected {
    #[error("{0}")]
    Unreachable(#[from] ConnectError),
    /// Its sidecar said why.
    #[error("{0}")]
    Refused(Refusal),
}

impl Unconnected {
    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Self::Refused(refusal) => refusal.outcome(),
            Self::Unreachable(error) => error.alert().map_or(Outcome::Unreachable, denial::outcome),
        }
    }

    /// The intentions of the destination deny us, which says nothing of the instance.
    pub(super) fn is_denial(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.reason == Reason::Denied)
    }
}
