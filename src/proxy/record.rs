//! The record of a connection while it lasts, finished once, whatever becomes of it.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use super::outcome::{Fault, Outcome};
use crate::observe::{Attempt, ConnectionInfo, ConnectionRecord, Event, Listener, Observer};
use crate::tls::{Handshake, Refused, SpiffeId};

/// Reports one connection to the observer. One that is dropped unfinished is reported as aborted.
pub(super) struct Record {
    observer: Observer,
    /// Boxed, as it goes from task to task with its connection.
    record: Box<ConnectionRecord>,
}

impl Record {
    /// Of a connection that was accepted just now.
    #[must_use]
    pub(super) fn accepted(observer: &Observer, info: ConnectionInfo) -> Self {
        let record = Box::new(ConnectionRecord::new(info));
        observer.observe(Event::ConnectionAccepted(&record));
        Self { observer: observer.clone(), record }
    }

    pub(super) fn observer(&self) -> &Observer {
        &self.observer
    }

    pub(super) fn info(&self) -> &ConnectionInfo {
        &self.record.info
    }

    /// The configuration of its listener has become known, or changed before it was used.
    pub(super) fn accepted_by(&mut self, listener: Listener) {
        self.record.info.listener = listener;
    }

    /// The downstream has proved who it is, in a handshake that began with the connection.
    pub(super) fn handshake_finished(&mut self, peer: &Arc<SpiffeId>, tls: Handshake) {
        self.record.tls = Some(tls);
        self.record.handshake = Some(self.record.started.elapsed());
        self.record.info.peer = Some(Arc::clone(peer));
        self.record.info.caller = Some(self.observer.stats().caller(&peer.service));
        self.observer.observe(Event::HandshakeFinished(&self.record));
    }

    pub(super) fn handshake_failed(&self, refused: Refused, problem: &str) {
        self.observer.observe(Event::HandshakeFailed { connection: &self.record, refused, problem });
    }

    /// It carries bytes from here on, and has a line in the access log, if one is on.
    pub(super) fn carries_bytes(&mut self) {
        self.record.access_log = self.observer.active_access_log().map(|log| Box::new((log, SystemTime::now())));
    }

    /// An attempt that is over, or given up.
    pub(super) fn attempt(&mut self, attempt: Attempt) {
        self.record.attempts.push(attempt);
    }

    /// The last attempt brought a connection; `peer` is who that is with, if it has proved itself.
    pub(super) fn connected(&mut self, peer: Option<Arc<SpiffeId>>) {
        self.record.is_connected = true;
        self.record.upstream_peer = peer;
        self.observer().observe(Event::RelayStarted(&self.record));
    }

    /// Bytes of plaintext from the downstream, and to it.
    pub(super) fn bytes(&mut self, received: u64, sent: u64) {
        self.record.bytes_received = received;
        self.record.bytes_sent = sent;
    }

    /// Audit mode lets it through; `rule` says what would have denied it.
    pub(super) fn audited(&mut self, rule: String) {
        self.record.would_be_denied_by = Some(rule.into());
    }

    /// Audit mode lets it go on. That counts once, and not where it was let through in the first place.
    pub(super) fn would_revoke(&mut self, rule: String) {
        if self.record.would_be_denied_by.is_none() {
            self.observer().observe(Event::WouldRevoke { connection: self.info(), request: None, reason: &rule });
            self.audited(rule);
        }
    }

    /// Finishes a connection that is denied; `rule` says by what.
    pub(super) fn denied(&mut self, rule: &str, cause: &'static str) {
        self.record.denied_by = Some(rule.into());
        self.finish(Outcome::Denied, cause);
    }

    /// Finishes a connection that carried all that it was to carry.
    pub(super) fn ended(&mut self) {
        self.finish(Outcome::Ended, "ended");
    }

    /// Finishes one that did not end well.
    pub(super) fn failed(&mut self, fault: Fault) {
        self.finish(fault.outcome, fault.cause);
    }

    /// Finishes a connection of requests.
    pub(super) fn result(&mut self, ended: Result<(), Fault>) {
        match ended {
            Ok(()) => self.ended(),
            Err(fault) => self.failed(fault),
        }
    }

    /// `cause` is one sentence.
    pub(super) fn finish(&mut self, outcome: Outcome, cause: impl Into<Cow<'static, str>>) {
        self.record.is_finished = true;
        self.record.outcome = outcome;
        self.record.cause = cause.into();
        self.record.duration = self.record.started.elapsed();
        self.observer.observe(Event::ConnectionFinished(&self.record));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.record.is_finished {
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
