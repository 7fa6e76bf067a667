//! The one place that the data plane tells what happens.

use std::sync::Arc;
use std::time::Duration;

use super::access;
use super::attempt::{Attempt, Destination};
use super::connect_error::ConnectError;
use super::connection::{ConnectionInfo, ConnectionRecord, Direction};
use super::request::RequestRecord;
use crate::access_log::{AccessLog, Active};
use crate::snapshot::{Address, Decision};
use crate::tls::SpiffeId;

/// Something that happens on the data path, told while it happens. Readers take from it what they count.
#[derive(Debug)]
pub enum Event<'a> {
    /// A listener has accepted a connection, or the peer began another one on a session that was kept.
    ConnectionAccepted(&'a ConnectionRecord),
    /// The downstream's TLS handshake succeeded: [`ConnectionRecord::handshake`] is its time.
    HandshakeFinished(&'a ConnectionRecord),
    /// The downstream did not prove a mesh identity. `problem` is one clause.
    HandshakeFailed { connection: &'a ConnectionRecord, problem: &'a str },
    /// The connection is over. Told once for each that was accepted.
    ConnectionFinished(&'a ConnectionRecord),
    /// The head of a request is complete.
    RequestReceived(&'a RequestRecord),
    /// The head of its response was given to the downstream's codec.
    ResponseStarted(&'a RequestRecord),
    /// The request is over. Told once for each that was received.
    RequestFinished(&'a RequestRecord),
    /// A request is to be sent to a destination, on whatever connection.
    AttemptStarted { connection: &'a ConnectionInfo, attempt: &'a Attempt },
    /// What came of that is in [`Attempt::result`]. Not told of an attempt that is given up for another one.
    AttemptEnded { connection: &'a ConnectionInfo, attempt: &'a Attempt },
    /// A new connection to a destination is being made.
    ConnectStarted(&'a Destination),
    /// It was made, TLS included, or why it was not.
    ConnectEnded { destination: &'a Destination, took: Duration, result: Result<(), &'a ConnectError> },
    /// The intentions allow or deny a connection or a request.
    Decided { service: &'a str, source: &'a SpiffeId, decision: &'a Decision<'a> },
    /// A limit let something through no more.
    Overflowed(Overflowed<'a>),
    /// An instance of a target is ejected for its errors.
    Ejected { target: &'a str, instance: &'a Address, time: Duration },
}

/// What was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflowed<'a> {
    /// By `max_inbound_connections` of a service.
    Inbound { service: &'a str },
    /// By a limit of a target, which has Consul's name for it.
    Target { target: &'a str, limit: &'static str },
}

/// Tells readers of events. Clones tell the same readers.
#[derive(Debug, Clone, Default)]
pub struct Observer(Arc<Readers>);

#[derive(Debug, Default)]
struct Readers {
    access_log: AccessLog,
    #[cfg(test)]
    events: std::sync::Mutex<Vec<String>>,
}

impl Observer {
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

    /// Tells all readers. Never waits.
    pub fn observe(&self, event: Event<'_>) {
        #[cfg(test)]
        self.record(&event);
        match event {
            Event::ConnectionFinished(record) => {
                access::log_connection(record);
                trace_connection(record);
            }
            Event::RequestFinished(record) => access::log_request(record),
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
            Event::AttemptStarted { .. } => "attempt".into(),
            Event::AttemptEnded { attempt, .. } => format!("attempt {:?}", attempt.result),
            Event::ConnectStarted(to) => format!("connect {}", to.cluster()),
            Event::ConnectEnded { result, .. } => match result {
                Ok(()) => "connected".into(),
                Err(error) => format!("not connected: {error}"),
            },
            Event::Decided { decision, .. } => format!("decided {decision}"),
            Event::Overflowed(what) => format!("{what:?}"),
            Event::Ejected { target, .. } => format!("ejected {target}"),
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
