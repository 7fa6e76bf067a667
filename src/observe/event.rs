//! Events of the data plane.

use std::time::Duration;

use super::attempt::{Attempt, Destination};
use super::connect_error::ConnectError;
use super::connection::{ConnectionInfo, ConnectionRecord};
use super::request::RequestRecord;
use crate::snapshot::{Address, Decision};
use crate::stats::ClusterStats;
use crate::tls::{Handshake, Refused, SpiffeId};

/// An event of the data path, sent while it happens. Readers take from it what they count.
#[derive(Debug)]
pub enum Event<'a> {
    /// A listener has accepted a connection, or the peer began another one on a session that was kept.
    ConnectionAccepted(&'a ConnectionRecord),
    /// The downstream's TLS handshake succeeded: [`ConnectionRecord::handshake`] is its time.
    HandshakeFinished(&'a ConnectionRecord),
    /// The downstream did not prove a mesh identity. `problem` is one clause.
    HandshakeFailed { connection: &'a ConnectionRecord, refused: Refused, problem: &'a str },
    /// The connection is over. Told once for each that was accepted.
    ConnectionFinished(&'a ConnectionRecord),
    /// The head of a request is complete.
    RequestReceived(&'a RequestRecord),
    /// The head of its response was given to the downstream's codec.
    ResponseStarted(&'a RequestRecord),
    /// The request is over. Told once for each that was received.
    RequestFinished(&'a RequestRecord),
    /// A connection of bytes has got one to the destination of its last attempt.
    RelayStarted(&'a ConnectionRecord),
    /// A request goes out on a connection to a target.
    RequestSent(&'a ClusterStats),
    /// It is sent again by a retry that is configured.
    Retried(&'a ClusterStats),
    /// A retry that is configured, and is not made as there are too many.
    RetryRefused(&'a ClusterStats),
    /// An answer that is not passed on, as the request is sent again.
    AnswerRetried { cluster: &'a ClusterStats, status: u16 },
    /// There is no instance for a connection or a request.
    NoInstance(&'a ClusterStats),
    /// A request is to be sent to a destination, on whatever connection.
    AttemptStarted(&'a Attempt),
    /// Its result is in [`Attempt::result`]. Not sent for an attempt that is given up for another one.
    AttemptEnded(&'a Attempt),
    /// A new connection to a destination is being made.
    ConnectStarted(&'a Destination),
    /// It was made, TLS included (`None`: there is none with it), or why it was not.
    ConnectEnded { destination: &'a Destination, took: Duration, result: Result<Option<Handshake>, &'a ConnectError> },
    /// The intentions deny a connection or a request, which is let through as the service is in audit mode. `request` is its
    /// method and path. `reason` is one clause.
    WouldDeny { connection: &'a ConnectionInfo, request: Option<(&'a str, &'a str)>, reason: &'a str },
    /// The same of what is open, and denied by a newer state of the intentions; told once of each.
    WouldRevoke { connection: &'a ConnectionInfo, request: Option<(&'a str, &'a str)>, reason: &'a str },
    /// The intentions allow or deny a connection or a request.
    Decided { connection: &'a ConnectionInfo, source: &'a SpiffeId, decision: &'a Decision<'a> },
    /// A limit let something through no more.
    Overflowed(Overflowed<'a>),
    /// An instance that is due to be ejected is not, as too many are.
    NotEjected(&'a ClusterStats),
    /// An instance of a target is ejected for its errors.
    Ejected { target: &'a str, stats: &'a ClusterStats, instance: &'a Address, time: Duration },
}

/// The connection or request that a limit refused.
#[derive(Debug, Clone, Copy)]
pub enum Overflowed<'a> {
    /// By `max_inbound_connections` of a service.
    Inbound(&'a ConnectionInfo),
    /// By a limit of a target, which has Consul's name for it.
    Target { target: &'a str, stats: &'a ClusterStats, limit: &'static str },
}
