//! One line per connection, written once, whatever becomes of it.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::outcome::{Fault, Outcome};
use crate::access_log::{self, AccessLog, Active};
use crate::tls::SpiffeId;

/// What is to be told of a connection when it is over. One that is dropped unfinished tells that too.
pub(super) struct Record {
    direction: Direction,
    remote: Option<SocketAddr>,
    /// The other service, once it has proved itself.
    peer: Option<String>,
    /// Bytes of plaintext towards the local app, and from it.
    to_app: u64,
    from_app: u64,
    started: Instant,
    finished: bool,
    access: Option<Box<Access>>,
}

/// What the access log is told besides, of a connection that carries bytes.
struct Access {
    log: Arc<Active>,
    start: SystemTime,
    local: Option<SocketAddr>,
    peer: Option<Arc<SpiffeId>>,
    /// Cluster and host.
    upstream: Option<(String, String)>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Direction {
    Inbound,
    Outbound,
}

impl Record {
    #[must_use]
    pub(super) fn new(direction: Direction, remote: Option<SocketAddr>) -> Self {
        Self {
            direction,
            remote,
            peer: None,
            to_app: 0,
            from_app: 0,
            started: Instant::now(),
            finished: false,
            access: None,
        }
    }

    pub(super) fn peer(&mut self, peer: &SpiffeId) {
        // Only a line that will be written is worth the text.
        if tracing::enabled!(target: "proxy", tracing::Level::DEBUG) {
            self.peer = Some(peer.to_string());
        }
    }

    /// Has the connection told to the access log too, if there is one.
    pub(super) fn log_to(&mut self, log: &AccessLog, local: Option<SocketAddr>, peer: Option<&Arc<SpiffeId>>) {
        let (start, peer) = (SystemTime::now(), peer.cloned());
        self.access = log.active().map(|log| Box::new(Access { log, start, local, peer, upstream: None }));
    }

    /// Where it leads to.
    pub(super) fn leads_to(&mut self, cluster: impl ToString, host: impl ToString) {
        if let Some(access) = &mut self.access {
            access.upstream = Some((cluster.to_string(), host.to_string()));
        }
    }

    pub(super) fn bytes(&mut self, to_app: u64, from_app: u64) {
        self.to_app = to_app;
        self.from_app = from_app;
    }

    /// Writes the line of a connection that carried all that it was to carry.
    pub(super) fn ended(&mut self) {
        self.finish(Outcome::Ended, "ended");
    }

    /// Writes the line of one that did not end well.
    pub(super) fn failed(&mut self, fault: &Fault) {
        self.finish(fault.outcome, &fault.cause);
    }

    /// Writes the line of a connection of requests.
    pub(super) fn result(&mut self, ended: &Result<(), Fault>) {
        match ended {
            Ok(()) => self.ended(),
            Err(fault) => self.failed(fault),
        }
    }

    /// Writes the line. `cause` is one sentence.
    pub(super) fn finish(&mut self, outcome: Outcome, cause: &str) {
        self.finished = true;
        if let Some(access) = self.access.take() {
            self.tell(&access, outcome, cause);
        }
        let (src, peer) = (Shown(self.remote), self.peer.as_deref().unwrap_or("-"));
        let (to_app, from_app, ms) = (self.to_app, self.from_app, self.started.elapsed().as_millis());
        match self.direction {
            Direction::Inbound => {
                tracing::debug!(target: "proxy.inbound", src = %src, peer, bytes_to_app = to_app, bytes_from_app = from_app, duration_ms = ms, outcome = cause, "Connection");
            }
            Direction::Outbound => {
                tracing::debug!(target: "proxy.upstream", src = %src, peer, bytes_to_app = to_app, bytes_from_app = from_app, duration_ms = ms, outcome = cause, "Connection");
            }
        }
    }
}

impl Record {
    fn tell(&self, access: &Access, outcome: Outcome, cause: &str) {
        let (received, sent) = match self.direction {
            Direction::Inbound => (self.to_app, self.from_app),
            Direction::Outbound => (self.from_app, self.to_app),
        };
        let upstream = access.upstream.as_ref().map(|(cluster, host)| access_log::Upstream {
            cluster: Cow::Borrowed(cluster),
            route: None,
            host: Some(Cow::Borrowed(host)),
            local: None,
            transport_failure: None,
            attempts: 1,
        });
        let record = access_log::Record {
            duration: self.started.elapsed(),
            // As in Envoy, one that was carried has none, however it ended.
            flags: Cow::Borrowed(if upstream.is_some() { "" } else { outcome.describe().flag }),
            bytes_received: received,
            bytes_sent: sent,
            connection_termination: (outcome != Outcome::Ended).then_some(Cow::Borrowed(cause)),
            upstream,
            downstream_local: access.local,
            downstream_remote: self.remote,
            peer: access.peer.as_deref(),
            ..access_log::Record::new(access.start)
        };
        access.log.log(&record, access_log::Secrets::default());
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.finish(Outcome::Aborted, "aborted");
        }
    }
}

/// The address of a connection's far end.
pub(super) struct Shown(pub Option<SocketAddr>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => write!(f, "{address}"),
            None => f.write_str("unix"),
        }
    }
}

/// The same without the port, which is another one for each connection.
pub(super) struct Host(pub Option<SocketAddr>);

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => write!(f, "{}", address.ip()),
            None => f.write_str("unix"),
        }
    }
}
