//! The public listener: one connection from the mesh.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::timeout;

use super::http::certificate;
use super::http::inbound::Inbound;
use super::http::note::Caller;
use super::http::pool::Pool;
use super::listener::{Accepted, Live};
use super::record::{Direction, Record, Shown};
use super::relay::{self, Broken, Relay};
use super::socket::Socket;
use crate::access_log::AccessLog;
use crate::drain::{self, Stage};
use crate::snapshot::{Decision, PublicListener};
use crate::tls::{HandshakeError, SpiffeId, Stream};

/// What the connections of the public listener share.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    open: Arc<AtomicUsize>,
    /// To the local app, for HTTP requests.
    app: Arc<Pool>,
    access_log: AccessLog,
}

impl Shared {
    #[must_use]
    pub fn new(access_log: AccessLog) -> Self {
        Self { access_log, ..Self::default() }
    }

    /// Counts one connection more until the guard is dropped, unless `limit` are open.
    fn enter(&self, limit: Option<usize>) -> Option<OpenGuard> {
        let guard = OpenGuard(Arc::clone(&self.open));
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        limit.is_none_or(|limit| before < limit).then_some(guard)
    }
}

struct OpenGuard(Arc<AtomicUsize>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection: learn who it is, decide, connect to the local app, relay, record.
pub async fn serve(accepted: Accepted<PublicListener>, shared: Shared) {
    if let Some(connection) = establish(accepted, &shared).await {
        // In a task of its own: an open connection keeps none of the memory that opening it took.
        tokio::spawn(connection.relay());
    }
}

/// An allowed peer with a connection to the local app.
struct Connection {
    app: Socket,
    mesh: Stream<Socket>,
    peer: Arc<SpiffeId>,
    remote: Option<SocketAddr>,
    live: watch::Receiver<Live<PublicListener>>,
    record: Record,
    _open: OpenGuard,
    _drain: drain::Watch,
}

/// `None` also for a connection of requests, which has a task of its own by then.
async fn establish(accepted: Accepted<PublicListener>, shared: &Shared) -> Option<Connection> {
    let Accepted { socket, remote, mut live, drain } = accepted;
    let local = if shared.access_log.is_on() { socket.local_address() } else { None };
    let mut record = Record::new(Direction::Inbound, remote);
    let listener = Arc::clone(&live.borrow().part);
    let Some(open) = shared.enter(listener.max_connections) else {
        tracing::info!(
            target: "proxy.inbound",
            limit = listener.max_connections,
            src = %Shown(remote),
            "Connection closed: max_inbound_connections are open"
        );
        record.finish("limit reached");
        return None;
    };

    let Some((mesh, peer)) = shake(socket, remote, &listener).await else {
        record.finish("no handshake");
        return None;
    };
    record.peer(&peer);
    if listener.protocol.is_http() {
        // Each request is judged, so that a refused one gets an answer.
        let certificate = certificate::element(listener.tls.id(), mesh.peer_certificates().unwrap_or_default());
        let caller = Caller { access_log: shared.access_log.clone(), remote, local, peer: Some(Arc::clone(&peer)) };
        let connection = Inbound { peer, remote, live, drain, app: Arc::clone(&shared.app), certificate, caller };
        tokio::spawn(async move {
            let ended = connection.serve(mesh).await;
            record.finish(ended.as_ref().map_or_else(String::as_str, |()| "ended"));
            drop(open);
        });
        return None;
    }

    record.log_to(&shared.access_log, local, Some(&peer));
    // From here on changes are noticed, so that none slips between the decision and the relay.
    let listener = Arc::clone(&live.borrow_and_update().part);
    if let Some(reason) = denial(&listener, &peer) {
        log_denial("Connection denied", remote, &peer, &listener, &reason);
        record.finish("denied");
        relay::close_tls(mesh).await;
        return None;
    }

    match connect_app(&listener).await {
        Ok(app) => {
            record.leads_to("local_app", &listener.local_app);
            Some(Connection { app, mesh, peer, remote, live, record, _open: open, _drain: drain })
        }
        Err(error) => {
            tracing::warn!(
                target: "proxy.inbound",
                app = %listener.local_app,
                error,
                "failed to dial the local app: is it listening there? (LocalServiceAddress and LocalServicePort of the registration)"
            );
            record.finish("no local app");
            relay::close_tls(mesh).await;
            None
        }
    }
}

async fn connect_app(listener: &PublicListener) -> Result<Socket, String> {
    match timeout(listener.local_connect_timeout, Socket::connect_app(&listener.local_app)).await {
        Ok(connected) => connected.map_err(|e| e.to_string()),
        Err(_) => Err(format!("no answer within {:?}", listener.local_connect_timeout)),
    }
}

/// The TLS handshake, under its time limit, and the identity that it shows.
async fn shake(
    socket: Socket,
    remote: Option<SocketAddr>,
    listener: &PublicListener,
) -> Option<(Stream<Socket>, Arc<SpiffeId>)> {
    let handshake = async {
        if listener.protocol.is_http() {
            Stream::accept_offer(socket, &listener.tls).await
        } else {
            // Raw bytes have no application protocol to agree on, whatever the client offers.
            Stream::accept(socket, listener.tls.config([])).await
        }
    };
    let problem = match timeout(listener.handshake_timeout, handshake).await {
        Ok(Ok(mesh)) => match listener.tls.authenticate(mesh.peer_certificates(), SystemTime::now()) {
            Ok(peer) => return Some((mesh, peer)),
            Err(e) => {
                relay::close_tls(mesh).await;
                e.to_string()
            }
        },
        // Consul's own check of the port connects and leaves every 10 s.
        Ok(Err(HandshakeError::Silent)) => return None,
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("no TLS handshake within {:?}", listener.handshake_timeout),
    };
    tracing::info!(target: "proxy.inbound", src = %Shown(remote), problem, "Connection refused: the peer did not prove a mesh identity");
    None
}

impl Connection {
    /// Copies both ways until the connection ends, a newer state of the intentions denies it, or the drain
    /// time is over.
    async fn relay(mut self) {
        let mut copy = Relay::new();
        let end = tokio::select! {
            biased;
            ended = copy.run(&mut self.app, &mut self.mesh) => End::Relayed(ended),
            cut = cut(&mut self.live, &self.peer) => cut,
        };
        self.record.bytes(copy.opened, copy.sealed);
        match end {
            End::Relayed(Ok(())) => self.record.finish("ended"),
            End::Relayed(Err(broken)) => {
                self.record.finish(&broken.to_string());
                relay::abort(&broken, self.app, self.mesh);
            }
            End::Denied(listener, reason) => {
                log_denial("Open connection closed, it is denied now", self.remote, &self.peer, &listener, &reason);
                self.record.finish("denied while open");
                Box::pin(relay::close(self.app, self.mesh)).await;
            }
            End::Drained => {
                self.record.finish("closed at the end of the drain time");
                Box::pin(relay::close(self.app, self.mesh)).await;
            }
        }
    }
}

enum End {
    Relayed(Result<(), Broken>),
    Denied(Arc<PublicListener>, String),
    Drained,
}

/// Ends when the connection must.
async fn cut(live: &mut watch::Receiver<Live<PublicListener>>, peer: &SpiffeId) -> End {
    loop {
        if live.changed().await.is_err() {
            return End::Drained;
        }
        let (listener, stage) = {
            let now = live.borrow_and_update();
            (Arc::clone(&now.part), now.stage)
        };
        if stage >= Stage::Closing {
            return End::Drained;
        }
        if let Some(reason) = denial(&listener, peer) {
            return End::Denied(listener, reason);
        }
    }
}

/// Why the peer may not have a connection, if it may not.
fn denial(listener: &PublicListener, peer: &SpiffeId) -> Option<String> {
    match listener.intentions.decide(peer) {
        Decision::Allow(_) => None,
        Decision::Deny(decider) => Some(decider.to_string()),
        // Only requests can be judged by permissions; a TCP listener sees none.
        Decision::EachRequest(intention) => {
            Some(format!("{intention} has L7 permissions, which deny everything on a tcp service"))
        }
    }
}

fn log_denial(what: &str, remote: Option<SocketAddr>, peer: &SpiffeId, listener: &PublicListener, reason: &str) {
    tracing::info!(
        target: "proxy.inbound",
        source = %peer,
        destination = listener.service,
        src = %Shown(remote),
        reason,
        "{what}"
    );
}
