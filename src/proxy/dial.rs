//! How an instance is connected to: TCP, a handshake as us, and the proof that it is what was meant.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, timeout_at};

use super::balance::Instance;
use super::socket::Socket;
use crate::snapshot::Target;
use crate::tls::{HandshakeError, SpiffeId, Stream};

/// The application protocols that a handshake is to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// What the target's credentials were made for.
    All,
    /// For what HTTP/2 can't carry.
    Http1,
    /// The tunnel, but to an instance that refused us for it.
    Tunnel,
}

/// One connect and handshake with one instance.
///
/// # Errors
/// Why there is no connection, for the log.
pub async fn attempt(
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
    tracing::warn!(target: "proxy.upstream", service = target.service, instance = %instance.address, problem, "An instance was refused");
    Err(format!("was refused: {problem}"))
}
