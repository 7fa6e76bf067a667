//! L4: bytes copied both ways between two connections, each plain or a TLS session.
//!
//! Each direction ends by itself: an end of stream on one side becomes an end of stream on the other while
//! the opposite direction goes on. Neither direction reads before what it read last is written, so that a
//! slow reader slows its writer down and no buffer grows.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::outcome::{Fault, Outcome};
use super::relayed::Relayed;
use super::socket::Socket;
use crate::stats::{ClusterStats, ListenerStats};
use crate::tls::{Leftover, Scratch, Stream, with_scratch};

/// Time without a byte after which a connection counts as idle.
const REST: Duration = Duration::from_millis(100);
/// Longest wait for a connection to become idle.
const REST_LIMIT: Duration = Duration::from_secs(5);
/// Reads of one connection before other connections of the thread are polled.
const TURNS: usize = 8;

/// One relay. It is kept by the caller, so that a relay that is cut short still has its counts.
pub(super) struct Relay {
    /// From the downstream to the upstream.
    up: Direction,
    /// From the upstream to the downstream.
    down: Direction,
    /// Whose bytes were moved last.
    spoke_last: Option<Side>,
    /// The upstream has ended without a byte, before the downstream did.
    pub was_left_unanswered: bool,
    /// Counts the bytes while they move.
    listener: Arc<ListenerStats>,
    cluster: Arc<ClusterStats>,
}

struct Direction {
    source: Side,
    phase: Phase,
    /// Read, and not yet taken by a sink that keeps nothing itself.
    left: Leftover,
    /// Bytes of plaintext.
    moved: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Flowing,
    /// Its source has ended; what is left has to go out, then the end itself.
    Ending,
    Done,
}

/// A relay that did not come to its end: which side broke, and how.
#[derive(Debug)]
pub(super) struct Broken {
    pub side: Side,
    pub error: io::Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// That has connected to us.
    Downstream,
    /// That we have connected to.
    Upstream,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }

    fn broke(self, error: io::Error) -> Broken {
        Broken { side: self, error }
    }
}

impl From<&Broken> for Fault {
    fn from(broken: &Broken) -> Self {
        let outcome = match broken.side {
            Side::Downstream => Outcome::ClientReset,
            Side::Upstream => Outcome::Reset,
        };
        Self::new(outcome, broken.to_string())
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Downstream => "the downstream",
            Side::Upstream => "the upstream",
        };
        write!(f, "{side} broke off: {}", self.error)
    }
}

impl Relay {
    /// One whose bytes are counted for the `listener` that has accepted the downstream, and for the `cluster` of the
    /// upstream.
    #[must_use]
    pub(super) fn new(listener: &Arc<ListenerStats>, cluster: &Arc<ClusterStats>) -> Self {
        Self {
            up: Direction::of(Side::Downstream),
            down: Direction::of(Side::Upstream),
            spoke_last: None,
            was_left_unanswered: false,
            listener: Arc::clone(listener),
            cluster: Arc::clone(cluster),
        }
    }

    /// Bytes of plaintext moved from the downstream.
    pub(super) fn received(&self) -> u64 {
        self.up.moved
    }

    /// Bytes of plaintext moved to the downstream.
    pub(super) fn sent(&self) -> u64 {
        self.down.moved
    }

    /// Copies until both directions have ended.
    ///
    /// # Errors
    /// See [`Broken`].
    pub(super) async fn run<D: Relayed, U: Relayed>(
        &mut self,
        downstream: &mut D,
        upstream: &mut U,
    ) -> Result<(), Broken> {
        poll_fn(|cx| with_scratch(|scratch| self.poll(cx, scratch, downstream, upstream))).await
    }

    /// Whether either side has sent a byte.
    pub(super) fn has_spoken(&self) -> bool {
        self.spoke_last.is_some()
    }

    /// Copies until either side has sent a byte. `Some`: the connection has ended before that.
    pub(super) async fn run_until_spoken<D: Relayed, U: Relayed>(
        &mut self,
        downstream: &mut D,
        upstream: &mut U,
    ) -> Option<Result<(), Broken>> {
        poll_fn(|cx| match with_scratch(|scratch| self.poll(cx, scratch, downstream, upstream)) {
            Poll::Ready(ended) => Poll::Ready(Some(ended)),
            Poll::Pending if self.has_spoken() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    /// Copies until a connection can be cut that may carry requests of HTTP: nothing moves, and what the downstream asked
    /// has been answered. `None`: it can, or there was no such moment in [`REST_LIMIT`].
    pub(super) async fn run_to_rest<D: Relayed, U: Relayed>(
        &mut self,
        downstream: &mut D,
        upstream: &mut U,
    ) -> Option<Result<(), Broken>> {
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            let before = (self.received(), self.sent());
            if let Ok(ended) = timeout(REST, self.run(downstream, upstream)).await {
                return Some(ended);
            }
            let rests = before == (self.received(), self.sent()) && self.spoke_last != Some(Side::Downstream);
            if rests || Instant::now() >= deadline {
                return None;
            }
        }
    }

    fn poll<D: Relayed, U: Relayed>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        downstream: &mut D,
        upstream: &mut U,
    ) -> Poll<Result<(), Broken>> {
        let (received, sent) = (self.received(), self.sent());
        let polled = self.poll_turns(cx, scratch, downstream, upstream);
        self.count(self.received() - received, self.sent() - sent);
        polled
    }

    /// Counts what has just moved.
    #[inline]
    fn count(&self, received: u64, sent: u64) {
        if received > 0 {
            self.listener.received.add(received);
            self.cluster.sent.add(received);
        }
        if sent > 0 {
            self.listener.sent.add(sent);
            self.cluster.received.add(sent);
        }
    }

    fn poll_turns<D: Relayed, U: Relayed>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        downstream: &mut D,
        upstream: &mut U,
    ) -> Poll<Result<(), Broken>> {
        for _ in 0..TURNS {
            // The downstream comes second: where both have spoken since the last turn, what it asks may be unanswered.
            let was_flowing = self.down.phase == Phase::Flowing;
            let down = self.down.poll(cx, scratch, upstream, downstream, &mut self.spoke_last)?;
            if was_flowing && self.down.phase != Phase::Flowing {
                self.was_left_unanswered = self.down.moved == 0 && self.up.phase == Phase::Flowing;
            }
            let up = self.up.poll(cx, scratch, downstream, upstream, &mut self.spoke_last)?;
            if self.down.phase == Phase::Done && self.up.phase == Phase::Done {
                return Poll::Ready(Ok(()));
            }
            if down.is_pending() && up.is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Direction {
    fn of(source: Side) -> Self {
        Self { source, phase: Phase::Flowing, left: Leftover::default(), moved: 0 }
    }

    /// One turn. Ready means that another turn may find something to do.
    #[inline(always)]
    fn poll<F: Relayed, T: Relayed>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        from: &mut F,
        to: &mut T,
        spoke_last: &mut Option<Side>,
    ) -> Poll<Result<(), Broken>> {
        let (source, sink) = (self.source, self.source.other());
        if to.is_blocked(&self.left) {
            ready!(to.poll_left(cx, &mut self.left)).map_err(|error| sink.broke(error))?;
        }
        match self.phase {
            Phase::Flowing => {
                let read = from.poll_piece(cx, scratch, to.head()).map_err(|error| source.broke(error))?;
                let Poll::Ready(piece) = read else {
                    // What a handshake left to send has waited for this read, so that both go out together.
                    ready!(to.poll_left(cx, &mut self.left)).map_err(|error| sink.broke(error))?;
                    return Poll::Pending;
                };
                if !piece.is_empty() {
                    to.write_piece(cx, scratch, piece, &mut self.left).map_err(|error| sink.broke(error))?;
                    self.moved += piece.len() as u64;
                    *spoke_last = Some(source);
                }
                if from.is_last(piece) {
                    to.end(cx, scratch).map_err(|error| sink.broke(error))?;
                    self.phase = Phase::Ending;
                }
                Poll::Ready(Ok(()))
            }
            Phase::Ending => {
                ready!(to.poll_end(cx)).map_err(|error| sink.broke(error))?;
                self.phase = Phase::Done;
                Poll::Ready(Ok(()))
            }
            Phase::Done => Poll::Pending,
        }
    }
}

/// Ends both sides cleanly although neither has: each sees the end of the stream.
pub(super) async fn close(plain: Socket, tls: Stream<Socket>) {
    tokio::join!(plain.close(), close_tls(tls));
}

/// Ends a TLS connection cleanly: the peer sees the end of the stream.
pub(super) async fn close_tls(mut tls: Stream<Socket>) {
    tls.close();
    // What the socket does not take at once is not waited for: the end of the TCP stream says enough.
    poll_fn(|cx| {
        let _ = tls.poll_flush(cx);
        Poll::Ready(())
    })
    .await;
    tls.io.close().await;
}

/// Passes an abrupt end of one side on to the other.
pub(super) fn abort(broken: &Broken, downstream: Socket, upstream: Socket) {
    match broken.side {
        Side::Downstream => upstream.abort(),
        Side::Upstream => downstream.abort(),
    }
}

#[cfg(test)]
mod tests;
