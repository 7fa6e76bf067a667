//! The one receiver of the data plane's events.

use std::sync::Arc;

use http::HeaderMap;

use super::clock::Clock;
use super::connection::{ConnectionInfo, ConnectionRecord, Direction, Listener};
use super::event::Event;
#[cfg(test)]
use super::event::Overflowed;
use super::problems::Problems;
use super::{access, metrics, spans};
use crate::access_log::{AccessLog, Active};
use crate::stats::scope::Cluster;
use crate::stats::{ClusterStats, Registry};
use crate::trace::{Kind, Traced, Tracer};

/// Passes events to readers. Clones have the same readers.
#[derive(Debug, Clone)]
pub struct Observer(Arc<Readers>);

impl Default for Observer {
    fn default() -> Self {
        Self::new(Arc::default(), Tracer::default())
    }
}

#[derive(Debug)]
struct Readers {
    access_log: AccessLog,
    tracer: Tracer,
    stats: Arc<Registry>,
    /// Counters of the local app.
    local_app: Arc<ClusterStats>,
    clock: Clock,
    problems: Problems,
    #[cfg(test)]
    events: std::sync::Mutex<Vec<String>>,
}

impl Observer {
    /// One that counts in `stats` and traces through `tracer`.
    #[must_use]
    pub fn new(stats: Arc<Registry>, tracer: Tracer) -> Self {
        Self(Arc::new(Readers {
            access_log: AccessLog::default(),
            tracer,
            local_app: stats.cluster(&Cluster::LocalApp),
            stats,
            clock: Clock::start(),
            problems: Problems::default(),
            #[cfg(test)]
            events: std::sync::Mutex::default(),
        }))
    }

    /// The registry of the counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<Registry> {
        &self.0.stats
    }

    /// The numbers of what is sent to the local app.
    #[must_use]
    pub fn local_app(&self) -> &Arc<ClusterStats> {
        &self.0.local_app
    }

    /// The newest problems.
    #[must_use]
    pub fn problems(&self) -> &Problems {
        &self.0.problems
    }

    /// For the states of instances that all threads share.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.0.clock
    }

    /// The access log, whose settings may be replaced.
    #[must_use]
    pub fn access_log(&self) -> &AccessLog {
        &self.0.access_log
    }

    /// The access log that a request or a connection goes by that begins now; `None`: it is off.
    #[must_use]
    pub fn active_access_log(&self) -> Option<Arc<Active>> {
        self.0.access_log.active()
    }

    /// The tracer, whose settings may be replaced.
    #[must_use]
    pub fn tracer(&self) -> &Tracer {
        &self.0.tracer
    }

    /// What is traced of a request that has come on a connection; `None`: nothing. Exposed paths are for those who are
    /// outside of the mesh.
    #[must_use]
    pub fn begin_trace(&self, connection: &ConnectionInfo, headers: &HeaderMap) -> Option<Box<Traced>> {
        let kind = match connection.listener {
            Listener::Upstream(_) => Kind::Client,
            Listener::Public(_) => Kind::Server,
            Listener::Exposed(_) => return None,
        };
        self.0.tracer.begin(kind, headers)
    }

    /// Tells all readers. Never waits.
    pub fn observe(&self, event: Event<'_>) {
        #[cfg(test)]
        self.record(&event);
        metrics::count(&event, &self.0.local_app);
        match event {
            Event::ConnectionFinished(record) => {
                self.0.problems.connection(record);
                access::log_connection(record);
                spans::end_connection(record, &self.0.tracer);
                trace_connection(record);
            }
            Event::RequestFinished(record) => {
                self.0.problems.request(record);
                access::log_request(record);
                spans::end_request(record);
            }
            Event::HandshakeFailed { connection, problem, .. } => {
                self.0.problems.handshake(&connection.info, problem);
            }
            Event::WouldDeny { connection, request, reason } | Event::WouldRevoke { connection, request, reason } => {
                self.0.problems.would_deny(connection, request, reason);
            }
            _ => {}
        }
    }

    /// The names of all events so far, for tests.
    #[cfg(test)]
    pub(crate) fn recorded(&self) -> Vec<String> {
        self.0.events.lock().unwrap().clone()
    }

    #[cfg(test)]
    fn record(&self, event: &Event<'_>) {
        let text = match event {
            Event::ConnectionAccepted(record) => format!("accepted {:?}", record.direction()),
            Event::HandshakeFinished(_) => "handshake".into(),
            Event::HandshakeFailed { problem, .. } => format!("no handshake: {problem}"),
            Event::ConnectionFinished(record) => format!("connection {}", record.outcome.name()),
            Event::RequestReceived(record) => format!("request {}", record.path()),
            Event::ResponseStarted(record) => format!("response {}", record.status),
            Event::RequestFinished(record) => format!("finished {}", record.outcome.name()),
            Event::RelayStarted(_) => "relay".into(),
            Event::RequestSent(_) => "sent".into(),
            Event::Retried(_) => "retried".into(),
            Event::RetryRefused(_) => "retry refused".into(),
            Event::AnswerRetried { status, .. } => format!("answer {status} not passed on"),
            Event::NoInstance(_) => "no instance".into(),
            Event::AttemptStarted(_) => "attempt".into(),
            Event::AttemptEnded(attempt) => format!("attempt {:?}", attempt.result),
            Event::ConnectStarted(to) => format!("connect {}", to.cluster()),
            Event::ConnectEnded { result, .. } => match result {
                Ok(_) => "connected".into(),
                Err(error) => format!("not connected: {error}"),
            },
            Event::Decided { decision, .. } => format!("decided {decision}"),
            Event::WouldDeny { reason, .. } => format!("would deny: {reason}"),
            Event::WouldRevoke { reason, .. } => format!("would revoke: {reason}"),
            Event::Overflowed(Overflowed::Inbound(_)) => "overflow of inbound connections".into(),
            Event::Overflowed(Overflowed::Target { target, limit, .. }) => format!("overflow of {limit} of {target}"),
            Event::Ejected { target, .. } => format!("ejected {target}"),
            Event::NotEjected(_) => "not ejected".into(),
        };
        self.0.events.lock().unwrap().push(text);
    }
}

/// One line at the level of debug for each connection.
fn trace_connection(record: &ConnectionRecord) {
    fn shown<T: ToString>(value: Option<&T>, none: &str) -> String {
        value.map_or_else(|| none.to_owned(), ToString::to_string)
    }
    let ConnectionRecord { info, bytes_received: received, bytes_sent: sent, cause, .. } = record;
    let (src, peer) =
        (|| shown(info.remote.as_ref(), "unix"), || shown(info.peer.as_ref().or(record.upstream_peer.as_ref()), "-"));
    let ms = record.duration.as_millis();
    match record.direction() {
        Direction::Inbound => {
            tracing::debug!(target: "proxy.inbound", src = src(), peer = peer(), bytes_to_app = received, bytes_from_app = sent, duration_ms = ms, outcome = &**cause, "Connection");
        }
        Direction::Outbound => {
            tracing::debug!(target: "proxy.upstream", src = src(), peer = peer(), bytes_to_app = sent, bytes_from_app = received, duration_ms = ms, outcome = &**cause, "Connection");
        }
    }
}
