//! L4 between two of ours: a TLS session that carries one connection after another.
//!
//! Two sidecars of ours agree on it by ALPN ([`crate::tls::TUNNEL`]); to any other peer a session is one connection, as
//! ever. There is no multiplexing: a session belongs to one connection at a time, and when that has ended in
//! both directions, the client keeps the session for the next one. So nothing waits behind another connection's
//! bytes, and there is no flow control but TCP's.
//!
//! docs/tunnel.md specifies the bytes. Inside the session each direction is a sequence of pieces, each behind a header
//! of four bytes, a number in network byte order: so many bytes of the connection follow, or [`END`] ends this direction
//! of the connection, [`START`] begins another connection, [`REFUSED`] says that none begins or that the open one does not
//! go on. Pieces and TLS records need not begin or end together.
//!
//! * The client asks for a connection with [`START`], at the beginning and whenever both directions have ended. The
//!   server judges the peer again, connects to its local app, and answers with [`START`] too; or it says why not, and
//!   closes the session. The client sends no byte of the connection before that answer. So a session that died while it
//!   was kept is exchanged for another one, and an instance without an app for another instance, and nothing is lost or
//!   sent twice.
//! * In version 1 the first connection of a session begins with the session itself, without a [`START`], and a server
//!   that refuses says nothing. In version 2 it gives a reason where none begins. In version 3 it also gives one where it
//!   ends an open connection, and a denial may name the rule.
//! * A session that is closed with `close_notify` before an [`END`] has cut its connection cleanly, as a denial does.
//!   One that breaks off without has broken its connection, which is passed on as a reset. Neither is used again.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};

use super::relayed::Relayed;
use super::socket::Socket;
use super::workers;
use crate::tls::{Client, Leftover, Piece, ReadSide, Scratch, SpiffeId, Stream, with_scratch};

mod incoming;
mod refusal;

pub(super) use incoming::Role;
pub(super) use refusal::{Reason, Refusal};

use incoming::{END, HEADER, Incoming, Phase, REASON, REFUSED, START, Version};

/// A TLS session as a relay sees it: bytes of one connection, and the end of each direction.
pub struct MeshStream<IO> {
    pub tls: Stream<IO>,
    /// `None`: the session is the connection, and its end the connection's.
    framing: Option<Framing>,
}

struct Framing {
    incoming: Incoming,
    /// Of the connection, and read together with the answer that it may begin.
    early: Leftover,
    /// Our direction has ended with [`END`], or none has begun.
    ended: bool,
}

impl Framing {
    fn version(&self) -> Version {
        self.incoming.version
    }

    /// Why the server refuses, once it has said all of it.
    fn refusal(&self) -> Option<Refusal> {
        self.incoming.reason().map(|reason| Refusal::decode(reason, self.version()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> MeshStream<IO> {
    /// A session that was just made, with its first connection unless that has to be asked for.
    #[must_use]
    pub fn new(tls: Stream<IO>, role: Role) -> Self {
        let framing = tls.alpn().and_then(Version::agreed).map(|version| Framing {
            incoming: Incoming::new(role, version),
            early: Leftover::default(),
            ended: version.asks(),
        });
        Self { framing, tls }
    }

    /// Whether an answer that a connection begins says that the server's app has taken it.
    #[must_use]
    pub fn answers_for_app(&self) -> bool {
        self.framing.as_ref().is_some_and(|framing| framing.version().asks())
    }

    /// Whether nothing comes any more after what was opened last.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        match &self.framing {
            None => self.tls.read_side() != ReadSide::Open,
            // A session that broke off is an error of the next read.
            Some(framing) => !framing.incoming.phase.is_open() || self.tls.read_side() == ReadSide::Closed,
        }
    }

    /// Whether the connection has ended cleanly in both directions and the session may carry another.
    #[must_use]
    pub fn is_free(&self) -> bool {
        let free =
            |framing: &Framing| framing.ended && matches!(framing.incoming.phase, Phase::Ended | Phase::Requested);
        self.tls.read_side() == ReadSide::Open && self.framing.as_ref().is_some_and(free)
    }

    /// The client's part in beginning a connection on a session that is free: asks, and waits for the answer.
    ///
    /// # Errors
    /// The session is of no use any more. Nothing of the connection was sent.
    pub async fn start(&mut self) -> io::Result<Result<(), Refusal>> {
        let Self { tls, framing: Some(framing) } = self else { return Err(io::ErrorKind::Unsupported.into()) };
        framing.ended = false;
        framing.incoming.phase = Phase::Awaiting;
        send(tls, &START.to_be_bytes()).await?;
        framing.read_until(tls, Phase::is_answer).await?;
        if let Some(refusal) = framing.refusal() {
            return Ok(Err(refusal));
        }
        if framing.incoming.phase == Phase::Carrying && tls.read_side() == ReadSide::Closed {
            // Cut as soon as it had begun: nothing comes behind what is early.
            framing.incoming.phase = Phase::Ended;
        }
        Ok(Ok(()))
    }

    /// Waits until the client requests another connection on a session that is free.
    ///
    /// # Errors
    /// The session is of no use any more, for which the end of it is the usual reason.
    pub async fn requested(&mut self) -> io::Result<()> {
        let Self { tls, framing: Some(framing) } = self else { return Err(io::ErrorKind::Unsupported.into()) };
        framing.read_until(tls, |phase| phase != Phase::Ended).await
    }

    /// Answers that the connection that was asked for begins; the first one of version 1 needs no answer.
    ///
    /// # Errors
    /// Those of the session.
    pub async fn accept(&mut self) -> io::Result<()> {
        match &mut self.framing {
            Some(framing) if framing.incoming.phase == Phase::Requested => {
                framing.ended = false;
                framing.incoming.phase = Phase::Carrying;
                send(&mut self.tls, &START.to_be_bytes()).await
            }
            _ => Ok(()),
        }
    }

    /// Tells the client why the connection that it asked for does not begin, or why the one that is open does not go on,
    /// where its version knows of that. The caller closes the session.
    pub async fn refuse(&mut self, refusal: &Refusal) {
        let Some(framing) = &self.framing else { return };
        let version = framing.version();
        let is_understood = match framing.incoming.phase {
            Phase::Requested => version.asks(),
            _ => version >= Version::V3 && !framing.ended,
        };
        if is_understood {
            let reason = refusal.encode(version);
            let length = u32::try_from(reason.len()).unwrap_or(REASON);
            let message = [&REFUSED.to_be_bytes()[..], &length.to_be_bytes(), &reason].concat();
            // A client that it does not reach makes do with the end of the session.
            let _ = send(&mut self.tls, &message).await;
        }
    }

    /// Why the server's sidecar ended the connection, if it said so.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        self.framing.as_ref().and_then(Framing::refusal)
    }

    /// Ends a connection that carries nothing, so that the session is free for another one. Whatever the server's app
    /// sends is thrown away.
    ///
    /// # Errors
    /// The session is of no use any more.
    pub async fn end_unused(&mut self) -> io::Result<()> {
        poll_fn(|cx| Poll::Ready(with_scratch(|scratch| self.end(cx, scratch)))).await?;
        poll_fn(|cx| self.poll_end(cx)).await?;
        while !self.has_ended() {
            poll_fn(|cx| with_scratch(|scratch| self.poll_piece(cx, scratch, 0))).await?;
        }
        Ok(())
    }

    /// Lets go of a session that carries nothing, without waiting for the peer.
    pub fn part(mut self) {
        self.tls.close();
        let _ = self.tls.poll_flush(&mut Context::from_waker(Waker::noop()));
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Relayed for MeshStream<IO> {
    fn head(&self) -> usize {
        if self.framing.is_some() { HEADER } else { 0 }
    }

    /// The connection's own bytes.
    ///
    /// # Errors
    /// Those of [`Stream::poll_open`], `InvalidData` for what is no tunnel, and `UnexpectedEof` for a session that broke
    /// off before the connection's end.
    #[inline]
    fn poll_piece(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, head: usize) -> Poll<io::Result<Piece>> {
        let Some(framing) = &mut self.framing else {
            ready!(self.tls.poll_open_by(cx, scratch, head, Vec::extend_from_slice))?;
            return Poll::Ready(Ok(scratch.opened_piece(head)));
        };
        if !framing.incoming.phase.is_open() || !framing.early.is_empty() {
            return Poll::Ready(Ok(scratch.put_opened(&framing.early.take(), head)));
        }
        ready!(framing.poll_open(&mut self.tls, cx, scratch, head))?;
        Poll::Ready(Ok(scratch.opened_piece(head)))
    }

    fn is_last(&self, _: Piece) -> bool {
        self.has_ended()
    }

    fn is_blocked(&self, _: &[u8]) -> bool {
        self.tls.is_blocked()
    }

    /// The session keeps what it has sealed.
    #[inline]
    fn poll_left(&mut self, cx: &mut Context<'_>, _: &mut Leftover) -> Poll<io::Result<()>> {
        self.tls.poll_flush(cx)
    }

    #[inline]
    fn write_piece(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        piece: Piece,
        _: &mut Leftover,
    ) -> io::Result<()> {
        // What is read in one turn is far less than the number can say.
        let header = u32::try_from(piece.len()).unwrap_or(START).to_be_bytes();
        let head = self.head();
        self.tls.poll_seal_piece(cx, scratch, piece, &header[..head])
    }

    /// With [`END`] where the session goes on.
    fn end(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> io::Result<()> {
        match &mut self.framing {
            Some(framing) if self.tls.read_side() == ReadSide::Open && framing.incoming.phase != Phase::Refused => {
                framing.ended = true;
                self.tls.poll_seal(cx, scratch, &END.to_be_bytes())
            }
            _ => {
                self.tls.close();
                Ok(())
            }
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.tls.poll_flush(cx))?;
        match &self.framing {
            Some(framing) if framing.ended => Poll::Ready(Ok(())),
            _ => Pin::new(&mut self.tls.io).poll_shutdown(cx),
        }
    }
}

/// What the socket does not take at once goes out with the connection's bytes.
async fn send<IO: AsyncRead + AsyncWrite + Unpin>(tls: &mut Stream<IO>, bytes: &[u8]) -> io::Result<()> {
    poll_fn(|cx| Poll::Ready(with_scratch(|scratch| tls.poll_seal(cx, scratch, bytes)))).await
}

impl Framing {
    fn poll_open<IO: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        tls: &mut Stream<IO>,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        head: usize,
    ) -> Poll<io::Result<()>> {
        ready!(tls.poll_open_by(cx, scratch, head, |opened, payload| self.incoming.take(payload, opened)))?;
        if self.incoming.phase == Phase::Broken {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the peer speaks no tunnel")));
        }
        if self.incoming.phase.is_open() && tls.read_side() == ReadSide::Truncated {
            let broken = "the session broke off before the end of the connection";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, broken)));
        }
        Poll::Ready(Ok(()))
    }

    /// Reads until the peer's direction has come to a phase that `will_do`.
    async fn read_until<IO: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        tls: &mut Stream<IO>,
        will_do: impl Fn(Phase) -> bool,
    ) -> io::Result<()> {
        while !will_do(self.incoming.phase) {
            if tls.read_side() != ReadSide::Open {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let early = poll_fn(|cx| {
                with_scratch(|scratch| {
                    if tls.has_outgoing() {
                        let _ = tls.poll_flush(cx)?;
                    }
                    ready!(self.poll_open(tls, cx, scratch, 0))?;
                    Poll::Ready(io::Result::Ok(scratch.opened.clone()))
                })
            });
            let early = early.await?;
            self.early.keep(early);
        }
        Ok(())
    }
}

/// The free sessions with one instance, of each thread its own.
#[derive(Default)]
pub struct Sessions {
    /// By the number of the worker.
    slots: Mutex<Vec<Slot>>,
    /// When the instance last refused a client for offering the tunnel.
    refused: Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Slot {
    /// What the sessions were made with: another identity, other roots or other names to expect are another client.
    client: Option<Arc<Client>>,
    /// The one used last is at the end.
    idle: Vec<Idle>,
    /// A task looks after them.
    swept: bool,
}

struct Idle {
    session: MeshStream<Socket>,
    since: Instant,
}

impl Sessions {
    /// Begins a connection on a free session, and tells with whom. `None`: there is none, or it was of no use before half
    /// of the time was over, so that the rest is left for a new one.
    pub async fn start(
        &self,
        client: &Arc<Client>,
        until: Instant,
    ) -> Option<Result<(MeshStream<Socket>, Arc<SpiffeId>), Refusal>> {
        let mut session = self.take(client)?;
        // Time may have passed its certificate by.
        let peer = client.authenticate(session.tls.peer_certificates(), SystemTime::now()).ok()?.id;
        let now = Instant::now();
        let half = now + until.saturating_duration_since(now) / 2;
        if let Ok(Ok(answer)) = timeout_at(half, session.start()).await {
            return Some(answer.map(|()| (session, peer)));
        }
        // Those that are older are no better.
        drop(self.with_slot(|slot| std::mem::take(&mut slot.idle)));
        None
    }

    /// Keeps a session for the next connection, if it is free and there are not enough.
    pub fn keep(self: &Arc<Self>, session: MeshStream<Socket>, client: &Arc<Client>) {
        if !session.is_free() {
            return;
        }
        let idle = Idle { session, since: Instant::now() };
        let unwanted = self.with_slot(|slot| {
            if !slot.is_for(client) || slot.idle.len() >= KEPT {
                return Some(idle);
            }
            slot.idle.push(idle);
            if !std::mem::replace(&mut slot.swept, true) {
                tokio::spawn(sweep(Arc::downgrade(self), workers::current()));
            }
            None
        });
        drop(unwanted);
    }

    /// Lets go of all, on every thread.
    pub fn clear(&self) {
        let idle: Vec<Vec<Idle>> = self.slots().iter_mut().map(|slot| std::mem::take(&mut slot.idle)).collect();
        *self.refused_at() = None;
        drop(idle);
    }

    /// Whether the instance refuses clients that offer the tunnel. It is offered again after a while: the instance may
    /// have got another sidecar meanwhile.
    #[must_use]
    pub fn are_refused(&self) -> bool {
        self.refused_at().is_some_and(|at| at.elapsed() < REFUSED_TIME)
    }

    pub fn refuse(&self) {
        *self.refused_at() = Some(Instant::now());
    }

    fn refused_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, client: &Arc<Client>) -> Option<MeshStream<Socket>> {
        let (taken, unwanted) = self.with_slot(|slot| {
            let mut unwanted = Vec::new();
            if !slot.is_for(client) {
                unwanted = std::mem::take(&mut slot.idle);
                slot.client = Some(Arc::clone(client));
            }
            (slot.idle.pop().filter(Idle::is_fresh), unwanted)
        });
        drop(unwanted);
        taken.map(|idle| idle.session)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sessions are not to be dropped inside: closing a socket takes its time.
    fn with_slot<T>(&self, act: impl FnOnce(&mut Slot) -> T) -> T {
        let worker = workers::current();
        let mut slots = self.slots();
        if slots.len() <= worker {
            slots.resize_with(worker + 1, Slot::default);
        }
        act(&mut slots[worker])
    }
}

/// Closes in time what nobody uses.
async fn sweep(sessions: std::sync::Weak<Sessions>, worker: usize) {
    loop {
        tokio::time::sleep(SWEEP_TIME).await;
        let Some(sessions) = sessions.upgrade() else { return };
        let mut slots = sessions.slots();
        let Some(slot) = slots.get_mut(worker) else { return };
        // They lie in the order in which they were put there.
        let stale = slot.idle.partition_point(|idle| !idle.is_fresh());
        let stale: Vec<Idle> = slot.idle.drain(..stale).collect();
        let over = slot.idle.is_empty();
        slot.swept = !over;
        drop(slots);
        drop(stale);
        if over {
            return;
        }
    }
}

impl Slot {
    fn is_for(&self, client: &Arc<Client>) -> bool {
        self.client.as_ref().is_some_and(|made| Arc::ptr_eq(made, client))
    }
}

impl Idle {
    fn is_fresh(&self) -> bool {
        self.since.elapsed() < IDLE_TIME
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

/// Idle sessions that are kept for each instance and thread: so many connections may begin at one time without a
/// handshake.
const KEPT: usize = 64;
/// Time for which a client keeps an idle session.
const IDLE_TIME: Duration = Duration::from_secs(3);
/// Interval between two checks for idle sessions to close.
const SWEEP_TIME: Duration = Duration::from_secs(1);
/// Time for which an instance that refused the tunnel is connected to without offering it.
const REFUSED_TIME: Duration = Duration::from_secs(300);
/// Time for which a server keeps an idle session: longer than [`IDLE_TIME`], so that the client closes first as a rule.
pub(super) const SERVER_IDLE_TIME: Duration = Duration::from_secs(10);

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;
