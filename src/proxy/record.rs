//! One line per connection, written once, whatever becomes of it.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

use crate::tls::SpiffeId;

/// What is to be told of a connection when it is over. One that is dropped unfinished tells that too.
pub struct Record {
    direction: Direction,
    remote: Option<SocketAddr>,
    /// The other service, once it has proved itself.
    peer: Option<String>,
    /// Bytes of plaintext towards the local app, and from it.
    to_app: u64,
    from_app: u64,
    started: Instant,
    finished: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Record {
    #[must_use]
    pub fn new(direction: Direction, remote: Option<SocketAddr>) -> Self {
        Self { direction, remote, peer: None, to_app: 0, from_app: 0, started: Instant::now(), finished: false }
    }

    pub fn peer(&mut self, peer: &SpiffeId) {
        // Only a line that will be written is worth the text.
        if tracing::enabled!(target: "proxy", tracing::Level::DEBUG) {
            self.peer = Some(peer.to_string());
        }
    }

    pub fn bytes(&mut self, to_app: u64, from_app: u64) {
        self.to_app = to_app;
        self.from_app = from_app;
    }

    /// Writes the line.
    pub fn finish(&mut self, outcome: &str) {
        self.finished = true;
        let (src, peer) = (Shown(self.remote), self.peer.as_deref().unwrap_or("-"));
        let (to_app, from_app, ms) = (self.to_app, self.from_app, self.started.elapsed().as_millis());
        match self.direction {
            Direction::Inbound => {
                tracing::debug!(target: "proxy.inbound", src = %src, peer, bytes_to_app = to_app, bytes_from_app = from_app, duration_ms = ms, outcome, "Connection");
            }
            Direction::Outbound => {
                tracing::debug!(target: "proxy.upstream", src = %src, peer, bytes_to_app = to_app, bytes_from_app = from_app, duration_ms = ms, outcome, "Connection");
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.finish("aborted");
        }
    }
}

/// The address of a connection's far end.
pub struct Shown(pub Option<SocketAddr>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => write!(f, "{address}"),
            None => f.write_str("unix"),
        }
    }
}
