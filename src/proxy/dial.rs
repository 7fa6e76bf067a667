//! How an instance is connected to: TCP, a handshake as us, and the proof that it is what was meant; and how long that
//! may take while there are other instances, for connections and for requests alike.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};

use super::balance::{Balancer, Instance};
use super::socket::Socket;
use super::tunnel::{MeshStream, Refusal, Role};
use crate::snapshot::Target;
use crate::tls::{HandshakeError, SpiffeId, Stream};

/// The application protocols that a handshake is to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// What the target's credentials were made for.
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

/// Instances of one target that one connection, or one try of a request, connects to at most.
const ATTEMPTS: usize = 16;
/// Part of the connect timeout that an instance gets while there are others to try.
const SHARE: u32 = 3;
/// As long as browsers wait for an address before they try the next one (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// One connect and handshake with one instance.
///
/// # Errors
/// Why there is no connection, for the log.
pub(super) async fn attempt(
    target: &Target,
    instance: &Instance,
    until: Instant,
    offer: Offer,
) -> Result<(Stream<Socket>, Arc<SpiffeId>), String> {
    let socket = match timeout_at(until, Socket::connect(&instance.address)).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(e)) => return Err(e.to_string()),
        Err(_) => return Err("did not answer in time".into()),
    };
    let bare = offer == Offer::Tunnel && instance.sessions().are_refused();
    let handshake = async {
        match offer {
            Offer::Tunnel if bare => Stream::connect_without_alpn(socket, &target.tls).await,
            Offer::All | Offer::Tunnel => Stream::connect(socket, &target.tls).await,
            Offer::Http1 => Stream::connect(socket, &target.tls.offering(&[b"http/1.1"])).await,
        }
    };
    let problem = match timeout_at(until, handshake).await {
        Ok(Ok(mesh)) => match target.tls.authenticate(mesh.peer_certificates(), SystemTime::now()) {
            Ok(peer) => return Ok((mesh, peer.id)),
            Err(e) => e.to_string(),
        },
        Ok(Err(e)) if e.is_lack_of_protocol() && offer == Offer::Tunnel && !bare => {
            instance.sessions().refuse();
            return Box::pin(attempt(target, instance, until, offer)).await;
        }
        Ok(Err(HandshakeError::Io(e))) => return Err(format!("broke off the TLS handshake: {e}")),
        Ok(Err(e)) => e.to_string(),
        Err(_) => return Err("did not finish the TLS handshake in time".into()),
    };
    // Not a matter of reaching it: something there is not what the catalog says.
    if let Some(before) = instance.refusals().due() {
        tracing::warn!(target: "proxy.upstream", service = target.service, instance = %instance.address, problem, before, "An instance was refused");
    }
    Err(format!("was refused: {problem}"))
}

/// A connection to an instance's app for bytes: on a free session with the instance, or on a new one.
///
/// # Errors
/// Why there is none.
pub(super) async fn connect(
    target: &Target,
    instance: &Instance,
    until: Instant,
) -> Result<(MeshStream<Socket>, Arc<SpiffeId>), Unconnected> {
    if let Some(begun) = instance.sessions().start(&target.tls, until).await {
        return begun.map_err(Unconnected::Refused);
    }
    let (tls, peer) = attempt(target, instance, until, Offer::Tunnel).await.map_err(Unconnected::Unreachable)?;
    let mut mesh = MeshStream::new(tls, Role::Client);
    if mesh.is_free() {
        match timeout_at(until, mesh.start()).await {
            Ok(Ok(answer)) => answer.map_err(Unconnected::Refused)?,
            Ok(Err(e)) => return Err(Unconnected::Unreachable(format!("broke off before it had connected: {e}"))),
            Err(_) => return Err(Unconnected::Unreachable("did not connect to its local app in time".into())),
        }
    }
    Ok((mesh, peer))
}

/// Why an instance gave no connection.
#[derive(Debug)]
pub(super) enum Unconnected {
    /// In words.
    Unreachable(String),
    Refused(Refusal),
}

/// For the log, after the address of the instance.
impl fmt::Display for Unconnected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(reason) => f.write_str(reason),
            Self::Refused(refusal) => refusal.fmt(f),
        }
    }
}
