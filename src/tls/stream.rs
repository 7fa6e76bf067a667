//! TLS over a socket, for bytes that are relayed as they come.
//!
//! A relay has no use for the buffers that a general TLS stream keeps per connection: it reads what is
//! there, seals or opens it and writes it on in the same turn. So the large buffers belong to the thread
//! ([`with_scratch`]) and a connection keeps only what could not be finished in its turn: the beginning
//! of a record, or bytes that the other side is not ready to take. An idle connection keeps none.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::client::UnbufferedClientConnection;
use rustls::server::{Acceptor, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::refusal::PeerError;
use super::sides::{Client, Server};

/// Bytes read in one turn, of either kind: eight records, which is where larger reads stop paying.
const TURN: usize = 128 * 1024;

/// One thread's working memory, lent to a connection for the length of one turn. Nothing in it outlives
/// the turn.
pub struct Scratch {
    /// Ciphertext as it is read.
    wire: Box<[u8]>,
    /// What [`Stream::poll_open`] opened.
    pub opened: Vec<u8>,
    /// Plaintext as it is read, to be sealed.
    read: Box<[u8]>,
    /// Ciphertext about to be written.
    sealed: Box<[u8]>,
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

/// What sealing adds at most: header, type and tag of each record of 16 KiB, and an answer or two of the
/// protocol's own.
const fn overhead(plain: usize) -> usize {
    (plain / (16 * 1024) + 2) * 64
}

/// A TLS session over `io`, without buffers of its own while it is idle.
pub struct Stream<IO> {
    pub io: IO,
    session: Session,
    /// The beginning of a record whose rest has not come yet.
    incoming: Vec<u8>,
    /// Opened before anybody read it: what came in the same flight as the end of the handshake.
    plain: Vec<u8>,
    /// Sealed, and not yet taken by the socket.
    outgoing: Vec<u8>,
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

enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// Why a handshake did not succeed.
#[derive(Debug)]
pub enum HandshakeError {
    Io(io::Error),
    Tls(rustls::Error),
    /// The peer left before it said anything, as health checks do.
    Silent,
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(e) => write!(f, "{e}"),
            Self::Tls(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) => {
                write!(f, "{other}")
            }
            Self::Tls(rustls::Error::InvalidCertificate(error)) => match PeerError::of(error) {
                Some(error) => write!(f, "{error}"),
                None => write!(f, "{error}"),
            },
            Self::Tls(e) => write!(f, "{e}"),
            Self::Silent => f.write_str("the peer closed the connection without a word"),
        }
    }
}

impl std::error::Error for HandshakeError {}

impl HandshakeError {
    /// Whether the server refuses a client for offering none of its application protocols.
    #[must_use]
    pub fn is_lack_of_protocol(&self) -> bool {
        matches!(self, Self::Tls(rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol)))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Stream<IO> {
    /// Shakes hands as the server of a connection.
    ///
    /// # Errors
    /// See [`HandshakeError`]; the peer has been sent the alert that says why.
    pub async fn accept(io: IO, config: &Arc<rustls::ServerConfig>) -> Result<Self, HandshakeError> {
        let session = UnbufferedServerConnection::new(Arc::clone(config)).map_err(HandshakeError::Tls)?;
        Self::shake(io, Session::Server(Box::new(session)), Vec::new()).await
    }

    /// Shakes hands as the server of a connection, by the configuration that `server` has for what the client
    /// offers.
    ///
    /// # Errors
    /// See [`HandshakeError`]; the peer has been sent the alert that says why.
    pub async fn accept_offer(mut io: IO, server: &Server) -> Result<Self, HandshakeError> {
        let mut heard = Vec::new();
        let mut acceptor = Acceptor::default();
        let config = loop {
            let start = heard.len();
            if !read_more(&mut io, &mut heard).await.map_err(HandshakeError::Io)? {
                let left = HandshakeError::Io(io::ErrorKind::UnexpectedEof.into());
                return Err(if heard.is_empty() { HandshakeError::Silent } else { left });
            }
            let mut news = &heard[start..];
            let offer = acceptor.read_tls(&mut news).map_or(Ok(None), |_| acceptor.accept());
            match offer {
                Ok(Some(accepted)) => {
                    break server.config(accepted.client_hello().alpn().into_iter().flatten());
                }
                Ok(None) if news.is_empty() && heard.len() < HELLO_LIMIT => {}
                // The session comes to the same end, and tells the peer why.
                _ => break server.config([]),
            }
        };
        let session = UnbufferedServerConnection::new(Arc::clone(config)).map_err(HandshakeError::Tls)?;
        Self::shake(io, Session::Server(Box::new(session)), heard).await
    }

    /// Shakes hands as the client of a connection.
    ///
    /// # Errors
    /// See [`HandshakeError`]; the peer has been sent the alert that says why.
    pub async fn connect(io: IO, client: &Client) -> Result<Self, HandshakeError> {
        Self::connect_by(io, client, client.config()).await
    }

    /// The same, without offering any application protocol.
    ///
    /// # Errors
    /// As with [`Stream::connect`].
    pub async fn connect_without_alpn(io: IO, client: &Client) -> Result<Self, HandshakeError> {
        Self::connect_by(io, client, &client.without_alpn).await
    }

    async fn connect_by(io: IO, client: &Client, config: &Arc<rustls::ClientConfig>) -> Result<Self, HandshakeError> {
        let session = UnbufferedClientConnection::new(Arc::clone(config), client.name().clone());
        Self::shake(io, Session::Client(Box::new(session.map_err(HandshakeError::Tls)?)), Vec::new()).await
    }

    /// `incoming` was read already.
    async fn shake(io: IO, session: Session, incoming: Vec<u8>) -> Result<Self, HandshakeError> {
        let mut stream = Self {
            io,
            session,
            incoming,
            plain: Vec::new(),
            outgoing: Vec::new(),
            sent: 0,
            blocked: false,
            read: ReadSide::Open,
        };
        let mut heard = matches!(stream.session, Session::Client(_)) || !stream.incoming.is_empty();
        let shaken = poll_fn(|cx| with_scratch(|scratch| stream.poll_shake(cx, scratch, &mut heard))).await;
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
        heard: &mut bool,
    ) -> Poll<Result<(), HandshakeError>> {
        loop {
            let mut held = std::mem::take(&mut self.incoming);
            let mut keep = |payload: &[u8]| self.plain.extend_from_slice(payload);
            let opened = self.session.process(&mut held, &mut keep, &mut self.outgoing);
            let (used, next) = opened.map_err(HandshakeError::Tls)?;
            // Nothing is held most of the time, and then no memory either.
            self.incoming = if used == held.len() { Vec::new() } else { held.split_off(used) };
            match next {
                Next::Ready => return Poll::Ready(Ok(())),
                // Whoever has little to say may say it and end its direction in one flight with its handshake.
                Next::Closed if !self.session.is_handshaking() => {
                    self.read = ReadSide::Closed;
                    return Poll::Ready(Ok(()));
                }
                Next::Closed => return Poll::Ready(Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()))),
                Next::Blocked => {}
            }
            // Not waited for: the peer may be waiting for us to read before it reads.
            let _ = self.poll_flush(cx).map_err(HandshakeError::Io)?;
            let mut buffer = ReadBuf::new(&mut scratch.wire);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer)).map_err(HandshakeError::Io)?;
            if buffer.filled().is_empty() {
                let left = HandshakeError::Io(io::ErrorKind::UnexpectedEof.into());
                return Poll::Ready(Err(if *heard { left } else { HandshakeError::Silent }));
            }
            *heard = true;
            if self.incoming.len() + buffer.filled().len() > HANDSHAKE_LIMIT {
                return Poll::Ready(Err(too_large()));
            }
            self.incoming.extend_from_slice(buffer.filled());
        }
    }

    /// The certificates that the peer showed, leaf first; those of the original handshake when resumed.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match &self.session {
            Session::Client(session) => session.peer_certificates(),
            Session::Server(session) => session.peer_certificates(),
        }
    }

    /// Whether the handshake was a full one or resumed an earlier session.
    pub fn handshake_kind(&self) -> Option<rustls::HandshakeKind> {
        match &self.session {
            Session::Client(session) => session.handshake_kind(),
            Session::Server(session) => session.handshake_kind(),
        }
    }

    /// The application protocol that was agreed on, if any.
    pub fn alpn(&self) -> Option<&[u8]> {
        match &self.session {
            Session::Client(session) => session.alpn_protocol(),
            Session::Server(session) => session.alpn_protocol(),
        }
    }

    /// Version and cipher suite.
    #[cfg(test)]
    pub fn agreed(&self) -> (String, String) {
        let (version, suite) = match &self.session {
            Session::Client(session) => (session.protocol_version(), session.negotiated_cipher_suite()),
            Session::Server(session) => (session.protocol_version(), session.negotiated_cipher_suite()),
        };
        let name = |suite: rustls::SupportedCipherSuite| suite.suite().as_str().unwrap_or_default().to_owned();
        (
            version.and_then(|version| version.as_str()).unwrap_or_default().to_owned(),
            suite.map(name).unwrap_or_default(),
        )
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
        self.poll_open_by(cx, scratch, Vec::extend_from_slice)
    }

    /// The same, with `take` to decide what of each piece of plaintext goes into [`Scratch::opened`].
    ///
    /// # Errors
    /// As with [`Stream::poll_open`].
    pub fn poll_open_by(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        mut take: impl FnMut(&mut Vec<u8>, &[u8]),
    ) -> Poll<io::Result<()>> {
        scratch.opened.clear();
        if !self.plain.is_empty() {
            take(&mut scratch.opened, &std::mem::take(&mut self.plain));
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
        let opened = self.session.process(wire, &mut take, &mut self.outgoing);
        let (used, next) = opened.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        if next == Next::Closed {
            self.read = ReadSide::Closed;
        }
        // Nothing is held most of the time, and then no memory either.
        self.incoming = if used == wire.len() { Vec::new() } else { wire[used..].to_vec() };
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

    /// Reads once from `from`, seals what came and writes it, behind what is still outgoing. What the socket
    /// does not take is kept; see [`Stream::is_blocked`], and do not call this while it is. Gives the
    /// number of bytes read: zero is the end of `from`.
    ///
    /// # Errors
    /// `Ok(Err(_))` is an error of `from`, `Err(_)` one of the TLS side.
    pub fn poll_seal_from<F: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        from: &mut F,
    ) -> Poll<io::Result<io::Result<usize>>> {
        self.poll_seal_headed_from(cx, scratch, from, |_| [])
    }

    /// The same, with the `head` that goes with so many bytes sealed in front of them.
    ///
    /// # Errors
    /// As with [`Stream::poll_seal_from`].
    pub fn poll_seal_headed_from<F: AsyncRead + Unpin, const HEAD: usize>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        from: &mut F,
        head: impl FnOnce(usize) -> [u8; HEAD],
    ) -> Poll<io::Result<io::Result<usize>>> {
        let (room, body) = scratch.read.split_at_mut(HEAD);
        let mut buffer = ReadBuf::new(body);
        if let Err(e) = ready!(Pin::new(from).poll_read(cx, &mut buffer)) {
            return Poll::Ready(Ok(Err(e)));
        }
        let read = buffer.filled().len();
        if read == 0 {
            return Poll::Ready(Ok(Ok(0)));
        }
        room.copy_from_slice(&head(read));
        self.seal(cx, &mut scratch.sealed, &scratch.read[..HEAD + read])?;
        Poll::Ready(Ok(Ok(read)))
    }

    /// Seals `plain`, of at most 64 KiB, and writes it as [`Stream::poll_seal_from`] does what it reads.
    ///
    /// # Errors
    /// Those of the TLS side.
    pub fn poll_seal(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, plain: &[u8]) -> io::Result<()> {
        self.seal(cx, &mut scratch.sealed, plain)
    }

    fn seal(&mut self, cx: &mut Context<'_>, room: &mut [u8], plain: &[u8]) -> io::Result<()> {
        if self.has_outgoing() {
            self.session.emit_behind(Emit::Data(plain), &mut self.incoming, &mut self.outgoing)?;
            let _ = self.poll_flush(cx)?;
            return Ok(());
        }
        let sealed = self.session.emit(Emit::Data(plain), &mut self.incoming, room)?;
        self.write_or_keep(cx, &room[..sealed])
    }

    /// Writes `sealed`, and keeps what the socket does not take.
    fn write_or_keep(&mut self, cx: &mut Context<'_>, mut sealed: &[u8]) -> io::Result<()> {
        while !sealed.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, sealed)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => sealed = &sealed[count..],
                Poll::Pending => {
                    self.outgoing = sealed.to_vec();
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
        self.outgoing = Vec::new();
        self.sent = 0;
        self.blocked = false;
        Poll::Ready(Ok(()))
    }

    /// Queues the `close_notify` that ends our direction; [`Stream::poll_flush`] sends it.
    pub fn close(&mut self) {
        // A session that can't say goodbye any more has nothing left to say.
        let _ = self.session.emit_behind(Emit::Close, &mut self.incoming, &mut self.outgoing);
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

fn too_large() -> HandshakeError {
    HandshakeError::Tls(rustls::Error::General("the handshake is too large".into()))
}

/// More than any honest peer's handshake: a chain of certificates is a few KiB.
const HANDSHAKE_LIMIT: usize = TURN;

/// More than any honest client's first message.
const HELLO_LIMIT: usize = 64 * 1024;

/// Where a session stands when nothing is left to process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The handshake needs more bytes.
    Blocked,
    /// The handshake is complete.
    Ready,
    /// The peer's direction has ended.
    Closed,
}

impl Session {
    /// Processes the records in `wire` as far as they are whole. Plaintext is given to `take`, answers are appended
    /// to `outgoing`. Tells how many bytes were used.
    fn process(
        &mut self,
        wire: &mut [u8],
        take: &mut impl FnMut(&[u8]),
        outgoing: &mut Vec<u8>,
    ) -> Result<(usize, Next), rustls::Error> {
        let mut used = 0;
        loop {
            let rest = &mut wire[used..];
            let stepped = match self {
                Self::Client(session) => step(session.process_tls_records(rest), take, outgoing),
                Self::Server(session) => step(session.process_tls_records(rest), take, outgoing),
            };
            used += stepped.used;
            match stepped.next {
                Ok(Some(next)) => return Ok((used, next)),
                Ok(None) => {}
                Err(error) => {
                    self.collect_alert(&mut wire[used..], outgoing);
                    return Err(error);
                }
            }
        }
    }

    /// After an error the session holds the alert that tells the peer.
    fn collect_alert(&mut self, wire: &mut [u8], outgoing: &mut Vec<u8>) {
        // Nothing else may be asked of a session that has failed: it would look at the same bytes again.
        while self.wants_write() {
            let stepped = match self {
                Self::Client(session) => step(session.process_tls_records(wire), &mut |_| {}, outgoing),
                Self::Server(session) => step(session.process_tls_records(wire), &mut |_| {}, outgoing),
            };
            if stepped.next.is_err() {
                return;
            }
        }
    }

    fn wants_write(&self) -> bool {
        match self {
            Self::Client(session) => session.wants_write(),
            Self::Server(session) => session.wants_write(),
        }
    }

    fn is_handshaking(&self) -> bool {
        match self {
            Self::Client(session) => session.is_handshaking(),
            Self::Server(session) => session.is_handshaking(),
        }
    }

    /// Seals into `room` and tells how much of it was used. `held` is what is held back of the incoming
    /// bytes: the session remembers how far it has looked at them and must find them again at every call.
    fn emit(&mut self, what: Emit<'_>, held: &mut [u8], room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Client(session) => emit(session.process_tls_records(held), what, room),
            Self::Server(session) => emit(session.process_tls_records(held), what, room),
        }
    }

    /// As [`Session::emit`], behind what `outgoing` holds.
    fn emit_behind(&mut self, what: Emit<'_>, held: &mut [u8], outgoing: &mut Vec<u8>) -> io::Result<()> {
        let start = outgoing.len();
        let plain = if let Emit::Data(plain) = what { plain.len() } else { 0 };
        outgoing.resize(start + plain + overhead(plain), 0);
        let emitted = self.emit(what, held, &mut outgoing[start..]);
        outgoing.truncate(start + *emitted.as_ref().unwrap_or(&0));
        emitted.map(|_| ())
    }
}

/// What a session can be asked to seal.
#[derive(Clone, Copy)]
enum Emit<'a> {
    Data(&'a [u8]),
    /// The `close_notify` that ends our direction.
    Close,
}

fn emit<D>(status: UnbufferedStatus<'_, '_, D>, what: Emit<'_>, room: &mut [u8]) -> io::Result<usize> {
    match (status.state, what) {
        (Ok(ConnectionState::WriteTraffic(mut traffic)), Emit::Data(plain)) => {
            traffic.encrypt(plain, room).map_err(refused)
        }
        (Ok(ConnectionState::WriteTraffic(mut traffic)), Emit::Close) => {
            traffic.queue_close_notify(room).map_err(refused)
        }
        (Ok(_), _) => Err(io::ErrorKind::NotConnected.into()),
        (Err(e), _) => Err(io::Error::new(io::ErrorKind::InvalidData, e)),
    }
}

fn refused(error: EncryptError) -> io::Error {
    io::Error::other(error.to_string())
}

/// One step of a session: how many bytes of its input are done with, and where it stands; `None` asks for
/// another step.
struct Step {
    used: usize,
    next: Result<Option<Next>, rustls::Error>,
}

fn step<D>(status: UnbufferedStatus<'_, '_, D>, take: &mut impl FnMut(&[u8]), outgoing: &mut Vec<u8>) -> Step {
    let mut used = status.discard;
    let next = status.state.and_then(|state| handle(state, &mut used, take, outgoing));
    Step { used, next }
}

fn handle<D>(
    state: ConnectionState<'_, '_, D>,
    used: &mut usize,
    take: &mut impl FnMut(&[u8]),
    outgoing: &mut Vec<u8>,
) -> Result<Option<Next>, rustls::Error> {
    match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                *used += record.discard;
                take(record.payload);
            }
            Ok(None)
        }
        ConnectionState::EncodeTlsData(mut data) => encode(&mut data, outgoing).map(|()| None),
        // It stands in `outgoing`, which is flushed in order: as good as transmitted.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(None)
        }
        ConnectionState::BlockedHandshake => Ok(Some(Next::Blocked)),
        ConnectionState::WriteTraffic(_) => Ok(Some(Next::Ready)),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Some(Next::Closed)),
        _ => Err(rustls::Error::General("a state of TLS that was never asked for".into())),
    }
}

/// Appends one handshake message, which says how long it is when it does not fit.
fn encode<D>(data: &mut EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), rustls::Error> {
    let start = outgoing.len();
    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
        outgoing.resize(start + size.required_size, 0);
        data.encode(&mut outgoing[start..]).map_err(|e| rustls::Error::General(e.to_string()))?;
    }
    Ok(())
}
