//! TLS over a socket, for bytes that are relayed as they come.
//!
//! A relay has no use for the buffers that a general TLS stream keeps per connection: it reads what is
//! there, seals or opens it and writes it on in the same turn. So the large buffers belong to the thread
//! ([`with_scratch`]) and a connection keeps only what could not be finished in its turn: the beginning
//! of a record, or bytes that the other side is not ready to take. An idle connection keeps none.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::established::Handshake;
use super::refusal::HandshakeError;
use super::sides::{Client, Server};
use super::unbuffered::{ClientHello, Emit, Next, Session, overhead};

/// Bytes read in one turn, of either kind: eight records, which is where larger reads stop paying.
const TURN: usize = 128 * 1024;

/// One thread's working memory, lent to a connection for the length of one turn. Nothing in it outlives
/// the turn.
pub struct Scratch {
    /// Ciphertext as it is read.
    wire: Box<[u8]>,
    /// What [`Stream::poll_open`] opened, behind room for a head where [`Stream::poll_open_by`] was asked for it.
    pub opened: Vec<u8>,
    /// Plaintext as it is read, to be sealed.
    read: Box<[u8]>,
    /// Ciphertext about to be written.
    sealed: Box<[u8]>,
}

/// Plaintext that was read in this turn. It stands where it was read or opened, in the [`Scratch`], behind room for a head
/// that goes with it.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    buffer: Buffer,
    /// Size of the room, in bytes.
    head: usize,
    end: usize,
}

#[derive(Debug, Clone, Copy)]
enum Buffer {
    Read,
    Opened,
}

impl Piece {
    /// Bytes of plaintext, without the head.
    #[must_use]
    pub fn len(self) -> usize {
        self.end - self.head
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Bytes that are left over now and then. Without any it is a pointer that is null, as it is on an idle connection.
#[derive(Debug, Default)]
#[expect(clippy::box_collection, reason = "a vector takes three times as much where there is none")]
pub struct Leftover(Option<Box<Vec<u8>>>);

impl Leftover {
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.get_or_insert_default().extend_from_slice(bytes);
        }
    }

    /// Keeps these instead.
    pub fn keep(&mut self, bytes: Vec<u8>) {
        self.0 = (!bytes.is_empty()).then(|| Box::new(bytes));
    }

    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.0.take().map_or_else(Vec::new, |bytes| *bytes)
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, count: usize) {
        let mut bytes = self.take();
        bytes.drain(..count);
        self.keep(bytes);
    }
}

impl Deref for Leftover {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.0.as_deref().map_or(&[], Vec::as_slice)
    }
}

impl DerefMut for Leftover {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().map_or(&mut [], Vec::as_mut_slice)
    }
}

/// Lends the thread's working memory. It must not be asked for again inside `act`.
pub fn with_scratch<T>(act: impl FnOnce(&mut Scratch) -> T) -> T {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
            wire: vec![0; TURN].into(),
            opened: Vec::with_capacity(TURN),
            read: vec![0; TURN].into(),
            sealed: vec![0; TURN + overhead(TURN)].into(),
        });
    }
    SCRATCH.with_borrow_mut(act)
}

impl Scratch {
    /// Reads plaintext once from `io`, and leaves room for `head` bytes in front of it. An empty piece is the end.
    ///
    /// # Errors
    /// Those of the read.
    pub fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut IO,
        head: usize,
    ) -> Poll<io::Result<Piece>> {
        let mut buffer = ReadBuf::new(&mut self.read[head..]);
        ready!(Pin::new(io).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(Piece { buffer: Buffer::Read, head, end: head + buffer.filled().len() }))
    }

    /// Makes a piece of `plain`, as if that had been opened in this turn.
    pub fn put_opened(&mut self, plain: &[u8], head: usize) -> Piece {
        self.clear_opened(head);
        self.opened.extend_from_slice(plain);
        self.opened_piece(head)
    }

    /// The plaintext of a piece of this turn.
    #[must_use]
    pub fn plaintext(&self, piece: Piece) -> &[u8] {
        let bytes = match piece.buffer {
            Buffer::Read => &*self.read,
            Buffer::Opened => &*self.opened,
        };
        &bytes[piece.head..piece.end]
    }

    #[inline]
    fn clear_opened(&mut self, head: usize) {
        self.opened.clear();
        if head > 0 {
            self.opened.resize(head, 0);
        }
    }

    /// What was opened in this turn behind room for `head` bytes.
    #[must_use]
    #[inline]
    pub fn opened_piece(&self, head: usize) -> Piece {
        Piece { buffer: Buffer::Opened, head, end: self.opened.len() }
    }

    /// Reads once from `io` and throws away what came; zero is the end.
    ///
    /// # Errors
    /// Those of the read.
    pub fn poll_discard<IO: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut IO,
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(&mut self.read);
        ready!(Pin::new(io).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

/// A TLS session over `io`, without buffers of its own while it is idle.
pub struct Stream<IO> {
    pub io: IO,
    pub(super) session: Session,
    /// The beginning of a record whose rest has not come yet.
    incoming: Leftover,
    /// Opened before anybody read it: what came in the same flight as the end of the handshake.
    plain: Leftover,
    /// Sealed, and not yet taken by the socket.
    outgoing: Leftover,
    /// How much of `outgoing` the socket has taken.
    sent: usize,
    /// The socket took less than it was given: nothing is sealed until it is writable again.
    blocked: bool,
    read: ReadSide,
}

/// How far the peer's direction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadSide {
    Open,
    /// The peer ended it with a `close_notify`.
    Closed,
    /// The socket ended without one. Some stacks never send it, so that it is passed on as an ordinary end.
    Truncated,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Stream<IO> {
    /// Shakes hands as the server of a connection, by the configuration that `server` has for what the client
    /// offers.
    ///
    /// # Errors
    /// See [`HandshakeError`]; the peer has been sent the alert that says why.
    pub async fn accept_offer(mut io: IO, server: &Server) -> Result<Self, HandshakeError> {
        let mut received = Vec::new();
        let mut hello = ClientHello::default();
        let config = loop {
            let start = received.len();
            if !read_more(&mut io, &mut received).await.map_err(HandshakeError::Io)? {
                let left = HandshakeError::Io(io::ErrorKind::UnexpectedEof.into());
                return Err(if received.is_empty() { HandshakeError::Silent } else { left });
            }
            match hello.read(&received[start..], server) {
                Some(config) => break config,
                None if received.len() < HELLO_LIMIT => {}
                // The session comes to the same end, and tells the peer why.
                None => break server.config([]),
            }
        };
        Self::shake(io, Session::server(config).map_err(HandshakeError::Tls)?, received).await
    }

    /// Shakes hands as the client of a connection.
    ///
    /// # Errors
    /// See [`HandshakeError`]; the peer has been sent the alert that says why.
    pub async fn connect(io: IO, client: &Client) -> Result<Self, HandshakeError> {
        let session = Session::client(client.config(), client.name()).map_err(HandshakeError::Tls)?;
        Self::shake(io, session, Vec::new()).await
    }

    /// The same, without offering any application protocol.
    ///
    /// # Errors
    /// As with [`Stream::connect`].
    pub async fn connect_without_alpn(io: IO, client: &Client) -> Result<Self, HandshakeError> {
        let session = Session::client(&client.without_alpn, client.name()).map_err(HandshakeError::Tls)?;
        Self::shake(io, session, Vec::new()).await
    }

    /// `incoming` was read already.
    pub(super) async fn shake(io: IO, session: Session, incoming: Vec<u8>) -> Result<Self, HandshakeError> {
        let mut stream = Self {
            io,
            session,
            incoming: Leftover::default(),
            plain: Leftover::default(),
            outgoing: Leftover::default(),
            sent: 0,
            blocked: false,
            read: ReadSide::Open,
        };
        stream.incoming.keep(incoming);
        let mut received = stream.session.is_client() || !stream.incoming.is_empty();
        let shaken = poll_fn(|cx| with_scratch(|scratch| stream.poll_shake(cx, scratch, &mut received))).await;
        if let Err(HandshakeError::Tls(_)) = shaken {
            // The alert that says why: worth one try, not a wait.
            let _ = poll_fn(|cx| Poll::Ready(stream.poll_flush(cx))).await;
        }
        shaken.map(|()| stream)
    }

    /// Goes on until the handshake is complete. What is left in `outgoing` then (a client's last flight,
    /// a server's ticket) goes out with the first application data, or with the first flush.
    fn poll_shake(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        received: &mut bool,
    ) -> Poll<Result<(), HandshakeError>> {
        loop {
            let (mut held, mut outgoing) = (self.incoming.take(), self.outgoing.take());
            let mut keep = |payload: &[u8]| self.plain.extend_from_slice(payload);
            let opened = self.session.receive(&mut held, &mut keep, &mut outgoing);
            self.outgoing.keep(outgoing);
            let (used, next) = opened.map_err(HandshakeError::Tls)?;
            self.incoming.keep(held.split_off(used));
            match next {
                Next::Established => return Poll::Ready(Ok(())),
                // A client with little to send may end its direction in one flight with its handshake.
                Next::PeerClosed if !self.session.is_handshaking() => {
                    self.read = ReadSide::Closed;
                    return Poll::Ready(Ok(()));
                }
                Next::PeerClosed => return Poll::Ready(Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()))),
                Next::NeedsMore => {}
            }
            // Not waited for: the peer may be waiting for us to read before it reads.
            let _ = self.poll_flush(cx).map_err(HandshakeError::Io)?;
            let mut buffer = ReadBuf::new(&mut scratch.wire);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer)).map_err(HandshakeError::Io)?;
            if buffer.filled().is_empty() {
                let left = HandshakeError::Io(io::ErrorKind::UnexpectedEof.into());
                return Poll::Ready(Err(if *received { left } else { HandshakeError::Silent }));
            }
            *received = true;
            if self.incoming.len() + buffer.filled().len() > HANDSHAKE_LIMIT {
                return Poll::Ready(Err(HandshakeError::too_large()));
            }
            self.incoming.extend_from_slice(buffer.filled());
        }
    }

    /// The certificates that the peer showed, leaf first; those of the original handshake when resumed.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.session.peer_certificates()
    }

    /// How the handshake was made.
    pub fn handshake(&self) -> Handshake {
        self.session.handshake()
    }

    /// The application protocol that was agreed on, if any.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.session.alpn()
    }

    /// How the peer's direction stands.
    pub fn read_side(&self) -> ReadSide {
        self.read
    }

    /// Reads once and leaves what was opened in [`Scratch::opened`], which is emptied first. An empty result
    /// means that the peer's direction has ended ([`Stream::read_side`] says how) or that nothing but
    /// protocol messages came; answers to those wait in the outgoing buffer, see [`Stream::poll_flush`].
    ///
    /// # Errors
    /// Those of the socket, and `InvalidData` for what is not good TLS.
    pub fn poll_open(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<io::Result<()>> {
        self.poll_open_by(cx, scratch, 0, Vec::extend_from_slice)
    }

    /// The same, behind room for `head` bytes, and with `take` to decide what of each part of the plaintext is appended to
    /// [`Scratch::opened`].
    ///
    /// # Errors
    /// As with [`Stream::poll_open`].
    pub fn poll_open_by(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        head: usize,
        mut take: impl FnMut(&mut Vec<u8>, &[u8]),
    ) -> Poll<io::Result<()>> {
        scratch.clear_opened(head);
        if !self.plain.is_empty() {
            take(&mut scratch.opened, &self.plain.take());
            return Poll::Ready(Ok(()));
        }
        let held = self.incoming.len();
        let mut buffer = ReadBuf::new(&mut scratch.wire[held..]);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        let read = buffer.filled().len();
        if read == 0 {
            self.read = ReadSide::Truncated;
            return Poll::Ready(Ok(()));
        }
        let opened = self.open(read, scratch, take);
        if opened.is_err() {
            // The alert that says why: worth one try, not a wait.
            let _ = self.poll_flush(cx);
        }
        Poll::Ready(opened)
    }

    /// Opens what is held back and the `read` bytes that stand behind its place in the scratch.
    fn open(
        &mut self,
        read: usize,
        scratch: &mut Scratch,
        mut take: impl FnMut(&mut Vec<u8>, &[u8]),
    ) -> io::Result<()> {
        let held = self.incoming.len();
        scratch.wire[..held].copy_from_slice(&self.incoming);
        let wire = &mut scratch.wire[..held + read];
        let mut take = |payload: &[u8]| take(&mut scratch.opened, payload);
        let mut outgoing = self.outgoing.take();
        let opened = self.session.receive(wire, &mut take, &mut outgoing);
        self.outgoing.keep(outgoing);
        let (used, next) = opened.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if next == Next::PeerClosed {
            self.read = ReadSide::Closed;
        }
        self.incoming.keep(wire[used..].to_vec());
        Ok(())
    }

    /// Whether the socket would not take all of what was sealed: flush before sealing more.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether a flush has something to do.
    pub fn has_outgoing(&self) -> bool {
        self.sent < self.outgoing.len()
    }

    /// Seals a piece of this turn with `head`, for which it has to have as much room, and writes it, behind what is still
    /// outgoing. What the socket does not take is kept; see [`Stream::is_blocked`], and do not call this while it is.
    ///
    /// # Errors
    /// Those of the session and of the socket.
    pub fn poll_seal_piece(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        piece: Piece,
        head: &[u8],
    ) -> io::Result<()> {
        let Scratch { opened, read, sealed, .. } = scratch;
        let bytes: &mut [u8] = match piece.buffer {
            Buffer::Read => read,
            Buffer::Opened => opened,
        };
        bytes[..piece.head].copy_from_slice(head);
        self.seal(cx, sealed, &bytes[..piece.end])
    }

    /// Seals `plain`, of at most 64 KiB, and writes it as [`Stream::poll_seal_piece`] does.
    ///
    /// # Errors
    /// Those of the TLS side.
    pub fn poll_seal(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, plain: &[u8]) -> io::Result<()> {
        self.seal(cx, &mut scratch.sealed, plain)
    }

    fn seal(&mut self, cx: &mut Context<'_>, room: &mut [u8], plain: &[u8]) -> io::Result<()> {
        if self.has_outgoing() {
            self.seal_behind(Emit::Data(plain))?;
            let _ = self.poll_flush(cx)?;
            return Ok(());
        }
        let sealed = self.session.seal(Emit::Data(plain), &mut self.incoming, room)?;
        self.write_or_keep(cx, &room[..sealed])
    }

    /// Writes `sealed`, and keeps what the socket does not take.
    fn write_or_keep(&mut self, cx: &mut Context<'_>, mut sealed: &[u8]) -> io::Result<()> {
        while !sealed.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, sealed)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => sealed = &sealed[count..],
                Poll::Pending => {
                    self.outgoing.keep(sealed.to_vec());
                    self.blocked = true;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes what is outgoing.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.outgoing.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.outgoing[self.sent..])? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(count) => self.sent += count,
                Poll::Pending => {
                    self.blocked = true;
                    return Poll::Pending;
                }
            }
        }
        self.outgoing = Leftover::default();
        self.sent = 0;
        self.blocked = false;
        Poll::Ready(Ok(()))
    }

    /// Queues the `close_notify` that ends our direction; [`Stream::poll_flush`] sends it.
    pub fn close(&mut self) {
        // A session that can't say goodbye any more has nothing left to say.
        let _ = self.seal_behind(Emit::Close);
    }

    /// Seals `what` behind what is outgoing.
    fn seal_behind(&mut self, what: Emit<'_>) -> io::Result<()> {
        let mut outgoing = self.outgoing.take();
        let sealed = self.session.seal_behind(what, &mut self.incoming, &mut outgoing);
        self.outgoing.keep(outgoing);
        sealed
    }
}

/// Appends what the socket has; false at its end.
async fn read_more<IO: AsyncRead + Unpin>(io: &mut IO, to: &mut Vec<u8>) -> io::Result<bool> {
    poll_fn(|cx| {
        with_scratch(|scratch| {
            let mut buffer = ReadBuf::new(&mut scratch.wire);
            ready!(Pin::new(&mut *io).poll_read(cx, &mut buffer))?;
            to.extend_from_slice(buffer.filled());
            Poll::Ready(Ok(!buffer.filled().is_empty()))
        })
    })
    .await
}

/// Longest handshake, in bytes: a chain of certificates is a few KiB.
const HANDSHAKE_LIMIT: usize = TURN;

/// Longest ClientHello, in bytes.
const HELLO_LIMIT: usize = 64 * 1024;
