//! The record of one connection.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::attempt::Attempts;
use super::outcome::Outcome;
use crate::access_log::Active;
use crate::snapshot::{Bind, Exposed, InboundListener, OutboundListener, Protocol};
use crate::stats::{CallerStats, ListenerStats};
use crate::tls::{Handshake, SpiffeId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// The listener that accepted a connection, with its configuration of that moment.
#[derive(Debug, Clone)]
pub enum Listener {
    Public(Arc<InboundListener>),
    Upstream(Arc<OutboundListener>),
    Exposed(Arc<Exposed>),
}

impl Listener {
    #[must_use]
    pub fn direction(&self) -> Direction {
        match self {
            Self::Public(_) | Self::Exposed(_) => Direction::Inbound,
            Self::Upstream(_) => Direction::Outbound,
        }
    }

    #[must_use]
    pub fn bind(&self) -> &Bind {
        match self {
            Self::Public(listener) => &listener.bind,
            Self::Upstream(listener) => &listener.key.bind,
            Self::Exposed(exposed) => &exposed.bind,
        }
    }

    /// The name of the service or upstream; none for exposed paths.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Public(listener) => &listener.service.name,
            Self::Upstream(listener) => &listener.upstream.name,
            Self::Exposed(_) => "",
        }
    }

    /// Whether its requests are calls of gRPC.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        match self {
            Self::Public(listener) => listener.service.protocol == Protocol::Grpc,
            Self::Upstream(listener) => listener.upstream.chain.protocol == Protocol::Grpc,
            Self::Exposed(_) => false,
        }
    }

    /// Whether it carries requests.
    #[must_use]
    pub fn is_http(&self) -> bool {
        match self {
            Self::Public(listener) => listener.service.protocol.is_http(),
            Self::Upstream(listener) => listener.upstream.chain.protocol.is_http(),
            Self::Exposed(_) => true,
        }
    }
}

/// Facts of an open connection, the same for all requests on it.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    pub listener: Listener,
    /// The numbers of the listener.
    pub stats: Arc<ListenerStats>,
    /// Of the downstream. `None` for a Unix socket.
    pub remote: Option<SocketAddr>,
    /// Of ours; known where an access log is on.
    pub local: Option<Box<SocketAddr>>,
    /// The authenticated identity of the downstream.
    pub peer: Option<Arc<SpiffeId>>,
    /// The numbers of that service.
    pub caller: Option<Arc<CallerStats>>,
}

/// One connection of the downstream, from its accept to its end. On a tunnel, each connection of a session is one.
#[derive(Debug)]
pub struct ConnectionRecord {
    pub info: ConnectionInfo,
    pub started: Instant,
    /// The downstream's TLS handshake, as long as it took. `None`: there was none, or it failed.
    pub handshake: Option<Duration>,
    /// How that was made.
    pub tls: Option<Handshake>,
    /// Where it was sent, for a connection that carries bytes. Those of a connection of requests are in its requests.
    pub attempts: Attempts,
    /// The last attempt brought a connection.
    pub is_connected: bool,
    /// The authenticated identity at the other end.
    pub upstream_peer: Option<Arc<SpiffeId>>,
    /// Plaintext from the downstream and to it, in bytes. Zero for a connection of requests.
    pub bytes_received: u64,
    pub bytes_sent: u64,
    /// It has ended.
    pub is_finished: bool,
    /// As long as it lasted; known at its end.
    pub duration: Duration,
    pub outcome: Outcome,
    /// Why it ended: one clause for logs.
    pub cause: Cow<'static, str>,
    /// The rule that denied it, in words.
    pub denied_by: Option<Box<str>>,
    /// The rule that would have, where audit mode let it through.
    pub would_be_denied_by: Option<Box<str>>,
    /// The access log that was on when it began to carry bytes, and when that was.
    pub access_log: Option<Box<(Arc<Active>, SystemTime)>>,
}

impl ConnectionRecord {
    /// One that was accepted just now.
    #[must_use]
    pub fn new(info: ConnectionInfo) -> Self {
        Self {
            info,
            started: Instant::now(),
            handshake: None,
            tls: None,
            attempts: Attempts::default(),
            is_connected: false,
            upstream_peer: None,
            bytes_received: 0,
            bytes_sent: 0,
            is_finished: false,
            duration: Duration::ZERO,
            outcome: Outcome::Aborted,
            cause: Cow::Borrowed("aborted"),
            denied_by: None,
            would_be_denied_by: None,
            access_log: None,
        }
    }

    #[must_use]
    pub fn direction(&self) -> Direction {
        self.info.listener.direction()
    }
}
