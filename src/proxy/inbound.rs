//! Inbound listeners: one connection from the mesh.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::authorization::{self, Peer, Revoked, Verdict, denial};
use super::codec::pool::Pool;
use super::http::certificate;
use super::http::inbound::Inbound;
use super::http::ongoing::Open;
use super::http::request_record::RequestObserver;
use super::listener::{Accepted, ListenerState};
use super::local_app::connect_app;
use super::log_limit::{Audited, LogLimit, LogLimits};
use super::outcome::Outcome;
use super::places::{Counted, Places};
use super::record::{Host, Record, Shown};
use super::relay::{self, Broken, Relay};
use super::socket::Socket;
use super::tunnel::{self, MeshStream, Reason, Refusal, Role};
use crate::drain::{self, Stage};
use crate::observe::{Attempt, AttemptResult, ConnectionInfo, Destination, Event, Listener, Observer, Overflowed};
use crate::snapshot::{InboundListener, Service};
use crate::tls::{HandshakeError, Refused, Stream};

/// State that the connections of all inbound listeners of a service share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Connections before the end of the handshake. They count towards no other limit.
    handshakes: Arc<Places>,
    /// Connections. A session that waits for its next one is none.
    open: Arc<AtomicUsize>,
    /// Sessions that wait.
    waiting: Arc<AtomicUsize>,
    /// To the local app, for HTTP requests.
    app: Arc<Pool>,
    observer: Observer,
    log_limit: LogLimit,
    /// Logs connections and requests that audit mode lets through.
    audited: Audited,
}

impl Shared {
    #[must_use]
    pub(super) fn new(observer: Observer, limits: &LogLimits) -> Self {
        Self {
            handshakes: Places::new(HANDSHAKES),
            open: Arc::default(),
            waiting: Arc::default(),
            app: Arc::default(),
            observer,
            log_limit: limits.inbound.clone(),
            audited: limits.audited.clone(),
        }
    }

    /// Whether `limit` connections are open.
    fn is_full(&self, limit: Option<usize>) -> bool {
        limit.is_some_and(|limit| self.open.load(Ordering::Relaxed) >= limit)
    }

    /// Counts one connection more until the guard is dropped, unless `limit` are open.
    fn enter(&self, limit: Option<usize>) -> Option<Counted> {
        Counted::one(&self.open, limit.unwrap_or(usize::MAX))
    }

    /// Counts one session more that waits for its next connection. There may be as many as there may be connections,
    /// within reason.
    fn wait(&self, limit: Option<usize>) -> Option<Counted> {
        Counted::one(&self.waiting, limit.unwrap_or(usize::MAX).min(WAITING))
    }
}

/// Concurrent handshakes. A new one replaces the oldest.
const HANDSHAKES: usize = 4096;
/// Idle sessions that are kept.
const WAITING: usize = 1024;
/// Time for which a new session without a connection does not count as idle.
const FIRST_TIME: Duration = Duration::from_secs(1);

/// Serves one TLS session: learn who it is, then for each connection decide, connect to the local app, relay, record.
pub(super) async fn serve(accepted: Accepted<InboundListener>, shared: Arc<Shared>) {
    if let Some(connection) = establish(accepted, shared).await {
        // In a task of its own: an open connection keeps none of the memory that opening it took.
        tokio::spawn(connection.relay());
    }
}

/// A session with a peer that has proved who it is.
struct Session {
    mesh: MeshStream<Socket>,
    peer: Peer,
    state: watch::Receiver<ListenerState<InboundListener>>,
    shared: Arc<Shared>,
    _open: drain::Open,
}

/// An allowed peer with a connection to the local app.
struct Connection {
    session: Session,
    app: Socket,
    copy: Relay,
    record: Record,
    open: Counted,
}

/// `None` also for a connection of requests, which has a task of its own by then.
async fn establish(accepted: Accepted<InboundListener>, shared: Arc<Shared>) -> Option<Connection> {
    let Accepted { socket, remote, state, drain, stats } = accepted;
    let local = if shared.observer.access_log().is_on() { socket.local_address().map(Box::new) } else { None };
    let listener = Arc::clone(&state.borrow().config);
    let info = ConnectionInfo {
        listener: Listener::Public(Arc::clone(&listener)),
        stats,
        remote,
        local,
        peer: None,
        caller: None,
    };
    let mut record = Record::accepted(&shared.observer, info);
    if shared.is_full(listener.max_connections) {
        too_many(&listener, remote, record, &shared.log_limit);
        return None;
    }

    let Some((mesh, peer)) = shake(socket, &record, &listener, &shared).await else {
        record.finish(Outcome::Unproved, "no handshake");
        return None;
    };
    record.handshake_finished(&peer.id, mesh.handshake());
    if listener.service.protocol.is_http() {
        let Some(open) = shared.enter(listener.max_connections) else {
            too_many(&listener, remote, record, &shared.log_limit);
            relay::close_tls(mesh).await;
            return None;
        };
        // Each request is judged, so that a refused one gets an answer.
        let certificate = certificate::element(listener.service.tls.id(), mesh.peer_certificates().unwrap_or_default());
        let requests =
            RequestObserver { observer: shared.observer.clone(), connection: Arc::new(record.info().clone()) };
        let (app, upgrades) = (Arc::clone(&shared.app), listener.service.upgrades.clone());
        let connection = Inbound {
            peer,
            remote,
            state,
            drain,
            app,
            certificate,
            upgrades,
            requests,
            log_limit: shared.log_limit.clone(),
            audited: shared.audited.clone(),
            open: Open::default(),
            _counted: open,
        };
        tokio::spawn(async move {
            let ended = connection.serve(mesh).await;
            record.result(ended);
        });
        return None;
    }
    let mesh = MeshStream::new(mesh, Role::Server);
    Session { mesh, peer, state, shared, _open: drain.into_open() }.first(record).await
}

fn too_many(listener: &InboundListener, remote: Option<SocketAddr>, mut record: Record, log_limit: &LogLimit) {
    const PROBLEM: &str = "max_inbound_connections are open";
    if log_limit.is_first(Host(remote), PROBLEM) {
        let limit = listener.max_connections;
        tracing::info!(target: "proxy.inbound", limit, src = %Shown(remote), "Connection closed: {PROBLEM}");
    }
    record.observer().observe(Event::Overflowed(Overflowed::Inbound(record.info())));
    record.finish(Outcome::Overflow, "limit reached");
}

impl Session {
    /// Opens the connection that a new session was made for.
    async fn first(mut self, mut record: Record) -> Option<Connection> {
        if self.mesh.is_free() {
            // As a rule it is asked for together with the end of the handshake.
            match timeout(FIRST_TIME, self.mesh.requested()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => {
                    record.finish(Outcome::Unused, "no connection was requested");
                    return None;
                }
                Err(_) => {
                    record.finish(Outcome::Unused, "no connection was requested yet");
                    return self.next(record.info().clone()).await;
                }
            }
        }
        self.admit(record).await
    }

    /// Opens the connection that the peer asks for, unless there are too many.
    async fn admit(self, record: Record) -> Option<Connection> {
        let listener = Arc::clone(&self.state.borrow().config);
        let Some(open) = self.shared.enter(listener.max_connections) else {
            too_many(&listener, record.info().remote, record, &self.shared.log_limit);
            return self.refuse(&Reason::Full.into()).await;
        };
        self.open(record, open).await
    }

    /// Opens the connection that the peer asks for, if it may have it. It begins when the local app has taken it, so that
    /// a client of ours goes to another instance otherwise.
    async fn open(mut self, mut record: Record, open: Counted) -> Option<Connection> {
        record.carries_bytes();
        // From here on changes are noticed, so that none slips between the decision and the relay.
        let listener = Arc::clone(&self.state.borrow_and_update().config);
        if listener.service.protocol.is_http() {
            // A client of ours makes another session, for requests or for bytes.
            record.failed(authorization::carries_requests());
            self.mesh.part();
            return None;
        }
        match authorization::decide(&listener.service, &self.peer.id, record.info(), record.observer()) {
            Verdict::Allowed => {}
            Verdict::WouldDeny(reason) => {
                self.shared.audited.log(&self.peer.id, &listener.service.name, "connection", &reason);
                record.audited(reason);
            }
            Verdict::Denied(reason) => {
                self.log_denial("Connection denied", record.info(), &listener.service, &reason);
                record.denied(&reason, "denied");
                return self.refuse(&denied(&listener.service, &reason)).await;
            }
        }
        let mut attempt = Attempt::new(Destination::LocalApp(listener.service.local_app.clone()));
        let connected =
            connect_app(&listener.service.local_app, listener.service.local_connect_timeout, record.observer()).await;
        let app = match connected {
            Ok(app) => app,
            Err(problem) => {
                attempt.end(AttemptResult::Failed { outcome: Outcome::Unreachable, cause: problem.to_string() });
                record.attempt(attempt);
                if self.shared.log_limit.is_first(&self.peer.id, &format!("no local app: {problem}")) {
                    tracing::warn!(
                        target: "proxy.inbound",
                        app = %listener.service.local_app,
                        error = %problem,
                        "failed to dial the local app: is it listening there? (LocalServiceAddress and LocalServicePort of the registration)"
                    );
                }
                record.finish(Outcome::Unreachable, "no local app");
                return self.refuse(&Reason::NoApp.into()).await;
            }
        };
        attempt.end(AttemptResult::Connected);
        record.attempt(attempt);
        record.connected(None);
        if let Err(error) = self.mesh.accept().await {
            record.finish(Outcome::ClientReset, error.to_string());
            return None;
        }
        let copy = Relay::new(&record.info().stats, record.observer().local_app());
        Some(Connection { session: self, app, copy, record, open })
    }

    async fn refuse(mut self, refusal: &Refusal) -> Option<Connection> {
        self.mesh.refuse(refusal).await;
        relay::close_tls(self.mesh.tls).await;
        None
    }

    /// Waits for the peer to want another connection on its session, and opens it. All that was true of the peer when
    /// the session began has to be true again. `before` is of the connection that it had last.
    async fn next(mut self, before: ConnectionInfo) -> Option<Connection> {
        if !self.wait().await {
            self.mesh.part();
            return None;
        }
        let listener = Arc::clone(&self.state.borrow().config);
        if !self.mesh.answers_for_app() && denial(&listener.service, &self.peer.id).is_some() {
            // The client makes another session for the same connection, which is denied there and reported once.
            self.mesh.part();
            return None;
        }
        let mut record = Record::accepted(
            &self.shared.observer,
            ConnectionInfo { listener: Listener::Public(Arc::clone(&listener)), ..before },
        );
        if let Err(problem) = self.peer.check(&listener.service, |act| act(self.mesh.tls.peer_certificates())) {
            refuse(&record, problem.refused(), &problem.to_string(), &self.shared.log_limit);
            record.finish(Outcome::Unproved, "no longer proved");
            self.mesh.part();
            return None;
        }
        self.admit(record).await
    }

    fn log_denial(&self, what: &str, connection: &ConnectionInfo, service: &Service, reason: &str) {
        if self.shared.log_limit.is_first(&self.peer.id, reason) {
            tracing::info!(
                target: "proxy.inbound",
                source = %self.peer.id,
                destination = service.name,
                src = %Shown(connection.remote),
                reason,
                "{what}"
            );
        }
    }

    /// Whether the peer has asked for another connection while the session could carry one.
    async fn wait(&mut self) -> bool {
        let limit = self.state.borrow().config.max_connections;
        let Some(_waiting) = self.shared.wait(limit) else { return false };
        let Self { mesh, state, peer, .. } = self;
        tokio::select! {
            biased;
            () = unfit(state, peer) => false,
            requested = timeout(tunnel::SERVER_IDLE_TIME, mesh.requested()) => matches!(requested, Ok(Ok(()))),
        }
    }
}

/// Ends when a session is to carry nothing any more: the drain has begun, its credentials were replaced, the peer is
/// denied, or the listener carries requests now.
async fn unfit(state: &mut watch::Receiver<ListenerState<InboundListener>>, peer: &Peer) {
    let unfit = |state: &ListenerState<InboundListener>| {
        let service = &state.config.service;
        state.stage >= Stage::Draining
            || service.protocol.is_http()
            || !peer.is_proved_to(service)
            || denial(service, &peer.id).is_some()
    };
    let _ = state.wait_for(unfit).await;
}

/// The TLS handshake, under its time limit, and the identity that it shows.
async fn shake(
    socket: Socket,
    record: &Record,
    listener: &InboundListener,
    shared: &Shared,
) -> Option<(Stream<Socket>, Peer)> {
    let mut place = shared.handshakes.take();
    let handshake = Stream::accept_offer(socket, &listener.service.tls);
    let shaken = tokio::select! {
        biased;
        shaken = timeout(listener.handshake_timeout, handshake) => shaken,
        () = place.lost() => {
            let problem = format!("more than {} handshakes are in progress", shared.handshakes.limit());
            refuse(record, Refused::Connection, &problem, &shared.log_limit);
            return None;
        }
    };
    drop(place);
    let (refused, problem) = match shaken {
        Ok(Ok(mesh)) => match Peer::new(&listener.service, mesh.peer_certificates()) {
            Ok(peer) => return Some((mesh, peer)),
            Err(e) => {
                relay::close_tls(mesh).await;
                (e.refused(), e.to_string())
            }
        },
        // Consul's own check of the port connects and leaves every 10 s.
        Ok(Err(HandshakeError::Silent)) => return None,
        Ok(Err(e)) => (e.refused(), e.to_string()),
        Err(_) => (Refused::Connection, format!("no TLS handshake within {:?}", listener.handshake_timeout)),
    };
    refuse(record, refused, &problem, &shared.log_limit);
    None
}

fn refuse(record: &Record, refused: Refused, problem: &str, log_limit: &LogLimit) {
    record.handshake_failed(refused, problem);
    let remote = record.info().remote;
    if log_limit.is_first(Host(remote), problem) {
        tracing::info!(target: "proxy.inbound", src = %Shown(remote), problem, "Connection refused: the peer did not prove a mesh identity");
    }
}

impl Connection {
    /// Copies both ways until the connection ends, a newer state of the intentions denies it, or the drain
    /// time is over; then the same for the next connection of the session, if there is one.
    #[expect(clippy::manual_async_fn, reason = "the future of an async fn has room for `self` twice")]
    fn relay(mut self) -> impl Future<Output = ()> {
        async move {
            loop {
                let Session { mesh, state, peer, shared, .. } = &mut self.session;
                let mut end = tokio::select! {
                    biased;
                    ended = self.copy.run(mesh, &mut self.app) => End::Relayed(ended),
                    revoked = authorization::revoked(state, &peer.id, &shared.audited, &mut self.record) => End::Revoked(revoked),
                };
                if matches!(end, End::Revoked(Revoked::CarriesRequests)) {
                    end = Box::pin(self.rest()).await;
                }
                self.record.bytes(self.copy.received(), self.copy.sent());
                // Boxed, for an open connection is to keep none of the memory that this takes.
                match Box::pin(self.end(end)).await {
                    Some(next) => self = next,
                    None => return,
                }
            }
        }
    }

    /// What it carries may be requests: the one that is under way gets its answer.
    async fn rest(&mut self) -> End {
        let Session { mesh, state, peer, shared, .. } = &mut self.session;
        tokio::select! {
            biased;
            revoked = authorization::revoked(state, &peer.id, &shared.audited, &mut self.record) => End::Revoked(revoked),
            ended = self.copy.run_to_rest(mesh, &mut self.app) => {
                ended.map_or(End::Revoked(Revoked::CarriesRequests), End::Relayed)
            }
        }
    }

    /// Ends the connection, and gives the next one of the session.
    async fn end(mut self, end: End) -> Option<Self> {
        match end {
            End::Relayed(Ok(())) => {
                self.record.ended();
                let (session, before) = (self.session, self.record.info().clone());
                drop((self.app, self.copy, self.record, self.open));
                return if session.mesh.is_free() { session.next(before).await } else { None };
            }
            End::Relayed(Err(broken)) => {
                self.record.failed((&broken).into());
                relay::abort(&broken, self.session.mesh.tls.io, self.app);
            }
            End::Revoked(revoked) => {
                let refusal = match &revoked {
                    Revoked::Denied(service, reason) => {
                        let what = "Open connection closed, it is denied now";
                        self.session.log_denial(what, self.record.info(), service, reason);
                        self.record.denied(reason, "denied while open");
                        denied(service, reason)
                    }
                    Revoked::Drained => {
                        self.record.failed(authorization::drained());
                        Reason::Drained.into()
                    }
                    Revoked::CarriesRequests => {
                        self.record.failed(authorization::carries_requests());
                        Reason::OtherProtocol.into()
                    }
                };
                self.session.mesh.refuse(&refusal).await;
                relay::close(self.app, self.session.mesh.tls).await;
            }
        }
        None
    }
}

/// The reason of a denial that is sent to the client.
fn denied(service: &Service, rule: &str) -> Refusal {
    Refusal::denied(service.share_denial_rule.then_some(rule))
}

enum End {
    Relayed(Result<(), Broken>),
    Revoked(Revoked),
}

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
