//! The byte stream under an HTTP connection, plain or TLS, and how its writes are gathered.
//!
//! An HTTP codec writes frame by frame, above all in HTTP/2; sealed and sent one by one they would cost a
//! record and a system call each. So a [`Wire`] keeps what is written until the codec has had its turn, and
//! [`Turn`] then sends it all at once.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;

use super::header_block::HeaderBlockProgress;
use super::http1_validator::Http1Validator;
use super::resets::Resets;
use crate::proxy::socket::Socket;
use crate::snapshot::Upgrades;
use crate::tls::{ReadSide, Stream, with_scratch};

/// A stream that a codec reads and writes. The mutex is never contended, as all of a connection stays on one
/// thread; it is there because both the codec and its [`Turn`] need the stream.
#[derive(Clone)]
pub struct Wire(Arc<Mutex<State>>);

/// A wire that does not keep its socket open: that ends with its codec.
#[derive(Clone)]
pub struct WeakWire(Weak<Mutex<State>>);

impl WeakWire {
    /// The wire, while its codec lives.
    #[must_use]
    pub fn upgrade(&self) -> Option<Wire> {
        self.0.upgrade().map(Wire)
    }
}

struct State {
    io: Io,
    /// Read from the socket; what lies before `taken` has been read from the wire.
    incoming: Vec<u8>,
    taken: usize,
    /// Written to the wire; what lies before `sent` has gone to the socket.
    outgoing: Vec<u8>,
    sent: usize,
    /// A flush waits for the end of the turn.
    gathers: bool,
    upgraded: bool,
    /// Why nothing can be sent any more.
    broken: Option<io::ErrorKind>,
    /// What the far end may have answered before it took no more is still read.
    hears_out: bool,
    /// The far end takes no more, which the codec learns when it has read all.
    unheard: bool,
    /// Counts reads and writes.
    moved: u64,
    /// What an HTTP/1 client may upgrade to.
    upgrades: Upgrades,
    /// Counts reads that brought something.
    received: u64,
    /// Counts bytes that were written.
    written: u64,
    /// Judges what an HTTP/1 client sends.
    strict: Option<Http1Validator>,
    /// Why it has refused one, until that is asked.
    refusal: Option<&'static str>,
    /// Follows what an HTTP/2 client sends.
    blocks: Option<HeaderBlockProgress>,
    /// Follows what the codec sends to an HTTP/2 client.
    resets: Option<Resets>,
    /// Responses that the codec has been given, the last of them perhaps not whole.
    begun: u64,
    /// Responses that the codec has been given whole.
    answered: u64,
    /// The client has ended its direction.
    ended: bool,
    /// Bytes of the next response that were sent before the codec wrote them.
    ahead: usize,
    /// The codec waits to write.
    blocked: bool,
    /// Shutting down is not for the codec to do.
    outlives_codec: bool,
    /// The client takes the end of the connection for the end of a body.
    end_is_bodys: bool,
    /// A response broke off.
    broke_off: bool,
    path_watch: PathWatch,
}

enum Io {
    Plain(Socket),
    Tls(Stream<Socket>),
}

/// How long, and for how many bytes, a connection is read from that we have ended.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

const FOREIGN: &str = "the client does not speak HTTP";

/// Bytes gathered at most; then the socket has to take some.
const GATHERED: usize = 64 * 1024;

/// Read at most while an answer is awaited.
const AHEAD: usize = 16 * 1024;

/// How every answer in HTTP/1 begins.
const COMMON: &[u8] = b"HTTP/1.";

/// How an HTTP/2 client begins, whatever was said about protocols before (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is under way on a connection, for which its path is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathWatch {
    /// Nothing, or what is no HTTP any more.
    Idle,
    /// A request that is as good as sent.
    Request,
    /// A body that the far end may have to wait for.
    Upload,
}

/// What has not been acknowledged for so long will not be. A far end that takes nothing counts as well.
const UNACKNOWLEDGED: Duration = Duration::from_secs(3);

/// What a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaits {
    Nothing,
    /// That more of a body is taken, as far as it has come.
    Taking,
    /// An answer of which nothing has been written.
    Answer,
    /// The rest of one.
    Rest,
}

impl Wire {
    #[must_use]
    pub fn plain(socket: Socket) -> Self {
        Self::new(Io::Plain(socket))
    }

    #[must_use]
    pub fn tls(stream: Stream<Socket>) -> Self {
        Self::new(Io::Tls(stream))
    }

    fn new(io: Io) -> Self {
        Self(Arc::new(Mutex::new(State {
            io,
            incoming: Vec::new(),
            taken: 0,
            outgoing: Vec::new(),
            sent: 0,
            gathers: true,
            upgraded: false,
            broken: None,
            hears_out: false,
            unheard: false,
            moved: 0,
            upgrades: Upgrades::default(),
            received: 0,
            written: 0,
            strict: None,
            refusal: None,
            blocks: None,
            resets: None,
            begun: 0,
            answered: 0,
            ended: false,
            ahead: 0,
            blocked: false,
            outlives_codec: false,
            end_is_bodys: false,
            broke_off: false,
            path_watch: PathWatch::Idle,
        })))
    }

    /// Whether the client speaks HTTP/2, as its first bytes tell. An end of the stream is an error.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn begins_http2(&self) -> io::Result<bool> {
        poll_fn(|cx| self.state().poll_begins_http2(cx)).await
    }

    /// Says what an HTTP/1 client may upgrade to.
    pub fn allow_upgrades(&self, upgrades: Upgrades) {
        self.state().upgrades = upgrades;
    }

    #[must_use]
    pub fn upgrades(&self) -> Upgrades {
        self.state().upgrades.clone()
    }

    /// Lets nothing but unambiguous HTTP/1 requests through from here on.
    pub fn be_strict(&self) {
        let mut state = self.state();
        state.strict = Some(Http1Validator::new(state.upgrades.clone()));
    }

    /// Notes the HTTP/2 header blocks that come from here on, the preface included, and the streams that the codec resets.
    pub fn follow_frames(&self) {
        let mut state = self.state();
        state.blocks = Some(HeaderBlockProgress::after(PREFACE.len()));
        state.resets = Some(Resets::default());
    }

    /// Whether the handshake said that the client speaks HTTP/2.
    #[must_use]
    pub fn agreed_on_http2(&self) -> bool {
        matches!(&self.state().io, Io::Tls(stream) if stream.alpn() == Some(b"h2"))
    }

    /// The codec is given one more response.
    pub fn begins_answer(&self) {
        self.state().begun += 1;
    }

    /// The codec has been given all of it.
    pub fn answered(&self) {
        self.state().answered += 1;
    }

    /// Whether every HTTP/1 request that came has been answered, and nothing of another one is there.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        let state = self.state();
        let requests =
            state.strict.as_ref().filter(|strict| strict.refused().is_none()).and_then(Http1Validator::whole_requests);
        requests.is_some_and(|requests| requests > 0 && requests == state.answered)
            && state.outgoing.is_empty()
            && state.incoming.is_empty()
            && !(state.blocked || state.upgraded || state.broken.is_some())
    }

    /// Whether the codec may end without shutting the wire down.
    pub fn outlives_codec(&self, outlives: bool) {
        self.state().outlives_codec = outlives;
    }

    /// Whether the client takes the end of the connection for the end of a body, as HTTP/1.0 has it.
    pub fn end_is_bodys(&self, is: bool) {
        self.state().end_is_bodys = is;
    }

    /// The response that goes over it breaks off.
    pub fn breaks_off(&self) {
        self.state().broke_off = true;
    }

    /// Ends the connection that a codec has given up: with a reset where a response broke off that the client would
    /// otherwise take for whole.
    pub async fn give_up(&self) {
        if self.state().upgraded {
            return;
        }
        if !self.state().reset_if_cut() {
            let _ = timeout(LINGER, poll_fn(|cx| self.state().poll_shutdown(cx))).await;
        }
    }

    /// Waits for bytes; false at the end of the stream.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn has_more(&self) -> io::Result<bool> {
        poll_fn(|cx| self.state().poll_more(cx)).await.map(|count| count > 0)
    }

    /// From here on an answer is read although the far end takes no more of what is written: it may have answered early,
    /// and closed with a reset for what it did not read.
    pub fn hear_out(&self) {
        self.state().hears_out = true;
    }

    /// The codec is about to end and leave what follows to another.
    pub fn upgrade(&self) {
        self.state().upgraded = true;
    }

    /// For an upgraded connection, which has no turns: a flush sends, and no requests are looked for.
    pub fn release(&self) {
        let mut state = self.state();
        state.gathers = false;
        state.upgraded = false;
        state.hears_out = false;
        state.strict = None;
        drop(state);
        self.watch_path(PathWatch::Idle);
    }

    /// Why a request was refused, here or by an HTTP/2 codec, since this was asked last.
    #[must_use]
    pub fn take_refusal(&self) -> Option<&'static str> {
        let mut state = self.state();
        let resets = state.resets.as_mut().and_then(Resets::take);
        resets.or_else(|| state.refusal.take())
    }

    /// A number that changes whenever bytes move, and that of the request whose head has begun to come and is not
    /// complete.
    #[must_use]
    pub fn progress(&self) -> (u64, Option<u64>) {
        let state = self.state();
        let begun_block = || state.blocks.as_ref().and_then(HeaderBlockProgress::begun_head);
        (state.moved, state.strict.as_ref().and_then(Http1Validator::begun_head).or_else(begun_block))
    }

    /// What an HTTP/1 client waits for that has sent a request, or a part of it.
    #[must_use]
    pub fn awaits(&self) -> Awaits {
        let state = self.state();
        if state.strict.as_ref().is_some_and(Http1Validator::awaits_body) {
            return Awaits::Taking;
        }
        let requests = state.strict.as_ref().and_then(Http1Validator::whole_requests).filter(|_| !state.upgraded);
        match requests {
            Some(requests) if requests > state.begun => Awaits::Answer,
            Some(requests) if requests > state.answered => Awaits::Rest,
            _ => Awaits::Nothing,
        }
    }

    /// Reads what the client sends while the codec does not, up to a limit. Ready at the end of the client's direction.
    ///
    /// # Errors
    /// Those of the socket: the client has reset the connection.
    pub fn poll_end(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        while !state.ended {
            if state.incoming.len() - state.taken >= AHEAD {
                return Poll::Pending;
            }
            state.ended = ready!(state.poll_fill(cx))? == 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends the first bytes of the answer that is awaited, which are the same in each, one at a time. A client that
    /// has closed its connection replies with a reset, and one that has only ended its direction takes them. False if
    /// there are none left or the socket takes nothing.
    ///
    /// # Errors
    /// Those of the socket: the client is gone.
    pub fn probe(&self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut state = self.state();
        if state.ahead == COMMON.len() || state.blocked || !state.outgoing.is_empty() {
            return state.check().map(|()| false);
        }
        let at = state.ahead;
        state.ahead += 1;
        state.outgoing.push(COMMON[at]);
        let _ = state.poll_send(cx)?;
        Ok(true)
    }

    /// # Errors
    /// The client is gone, as the socket knows.
    pub fn check(&self) -> io::Result<()> {
        self.state().check()
    }

    /// What the peer showed in the handshake.
    pub fn peer_certificates(&self, act: &mut dyn FnMut(Option<&[CertificateDer<'_>]>)) {
        match &self.state().io {
            Io::Tls(stream) => act(stream.peer_certificates()),
            Io::Plain(_) => act(None),
        }
    }

    /// Has the connection end with a reset, so that nobody takes it for a good end.
    pub fn abort(&self) {
        self.state().socket().end_with_reset();
    }

    #[must_use]
    pub fn downgrade(&self) -> WeakWire {
        WeakWire(Arc::downgrade(&self.0))
    }

    /// Whether the socket has not taken all that was written.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        let state = self.state();
        let held = matches!(&state.io, Io::Tls(stream) if stream.has_outgoing() && !state.unheard);
        held || !state.outgoing.is_empty()
    }

    /// A number that changes whenever something comes.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.state().received
    }

    /// Bytes that were written so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.state().written
    }

    /// Whether the far end is another host, or may be.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self.state().io, Io::Tls(_))
    }

    /// Has the kernel look whether the path to another host still carries something, for what is under way on a
    /// connection of HTTP/1: that has no PING.
    pub fn watch_path(&self, watch: PathWatch) {
        let mut state = self.state();
        let Io::Tls(stream) = &state.io else { return };
        if watch == state.path_watch {
            return;
        }
        if (watch == PathWatch::Idle) != (state.path_watch == PathWatch::Idle) {
            stream.io.keep_alive(watch != PathWatch::Idle);
        }
        stream.io.end_when_unacknowledged((watch == PathWatch::Request).then_some(UNACKNOWLEDGED));
        state.path_watch = watch;
    }

    /// Ends the connection when what was sent is not acknowledged any more.
    pub fn end_when_unacknowledged(&self) {
        if let Io::Tls(stream) = &self.state().io {
            stream.io.end_when_unacknowledged(Some(UNACKNOWLEDGED));
        }
    }

    /// Has the connection end with a reset where the socket has not taken all that was written.
    pub fn cut_unsent(&self) {
        if self.has_unsent() {
            let mut state = self.state();
            state.broken = Some(io::ErrorKind::ConnectionAborted);
            state.socket().end_with_reset();
        }
    }

    /// After the end of what was written: reads on for a moment, as bytes that nobody has read make the kernel
    /// reset the connection, and with it what the peer has not read yet.
    pub async fn linger(&self) {
        if self.state().upgraded || self.state().broken == Some(io::ErrorKind::ConnectionAborted) {
            return;
        }
        let mut left = LINGER_BYTES;
        let _ = timeout(LINGER, poll_fn(|cx| self.state().poll_discard(cx, &mut left))).await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn socket(&mut self) -> &mut Socket {
        match &mut self.io {
            Io::Plain(socket) => socket,
            Io::Tls(stream) => &mut stream.io,
        }
    }

    fn check(&mut self) -> io::Result<()> {
        match self.broken {
            Some(kind) => Err(kind.into()),
            None => self.socket().take_error().map_or(Ok(()), Err),
        }
    }

    fn poll_begins_http2(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            let seen = self.incoming.len().min(PREFACE.len());
            if self.incoming[..seen] != PREFACE[..seen] {
                return Poll::Ready(Ok(false));
            }
            if seen == PREFACE.len() {
                return Poll::Ready(Ok(true));
            }
            if ready!(self.poll_more(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Reads once, without a codec.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // What the handshake left to send must not wait for the client, which may wait for it.
        let _ = self.poll_send(cx)?;
        self.poll_fill(cx)
    }

    /// Reads once, behind what is there. Zero is the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let before = self.incoming.len();
        match &mut self.io {
            Io::Plain(socket) => {
                let mut buffer = [0; 4096];
                let mut buffer = ReadBuf::new(&mut buffer);
                ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
                self.incoming.extend_from_slice(buffer.filled());
            }
            Io::Tls(stream) => {
                let incoming = &mut self.incoming;
                ready!(poll_opened(stream, cx, |opened| incoming.extend_from_slice(opened)))?;
            }
        }
        Poll::Ready(Ok(self.incoming.len() - before))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.taken == self.incoming.len() {
            match &mut self.io {
                Io::Plain(socket) => return Pin::new(socket).poll_read(cx, buffer),
                Io::Tls(stream) => {
                    let incoming = &mut self.incoming;
                    return poll_opened(stream, cx, |opened| {
                        let (now, later) = opened.split_at(opened.len().min(buffer.remaining()));
                        buffer.put_slice(now);
                        incoming.extend_from_slice(later);
                    });
                }
            }
        }
        let rest = &self.incoming[self.taken..];
        let now = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..now]);
        self.taken += now;
        if self.taken == self.incoming.len() {
            self.incoming = Vec::new();
            self.taken = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.outgoing.len() >= GATHERED {
            self.blocked = true;
            ready!(self.poll_send(cx))?;
            self.blocked = false;
        }
        if let Some(kind) = self.broken {
            return Poll::Ready(Err(kind.into()));
        }
        if self.outgoing.capacity() == 0 {
            self.outgoing = spare::take();
        }
        self.moved += 1;
        let before = self.outgoing.len();
        let mut gone = 0;
        for part in parts {
            // What has gone ahead of the codec is not sent again.
            let ahead = self.ahead.min(part.len());
            self.ahead -= ahead;
            gone += ahead;
            let part = &part[ahead..];
            let room = GATHERED.saturating_sub(self.outgoing.len());
            self.outgoing.extend_from_slice(&part[..part.len().min(room)]);
        }
        if let Some(resets) = &mut self.resets {
            resets.follow(&self.outgoing[before..]);
        }
        let count = self.outgoing.len() - before + gone;
        self.written += count as u64;
        Poll::Ready(Ok(count))
    }

    /// Sends what was written.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(kind) = self.broken {
            return Poll::Ready(Err(kind.into()));
        }
        let mut sent = match &mut self.io {
            _ if self.unheard => Poll::Ready(Ok(())),
            Io::Plain(socket) => poll_send_plain(socket, cx, &self.outgoing, &mut self.sent),
            Io::Tls(stream) => poll_send_tls(stream, cx, &self.outgoing, &mut self.sent),
        };
        if self.hears_out && matches!(&sent, Poll::Ready(Err(_))) {
            (self.unheard, sent) = (true, Poll::Ready(Ok(())));
            cx.waker().wake_by_ref();
        }
        if self.unheard {
            self.sent = self.outgoing.len();
        }
        if self.sent == self.outgoing.len() && self.outgoing.capacity() > 0 {
            spare::give(std::mem::take(&mut self.outgoing));
            self.sent = 0;
        }
        if let Poll::Ready(Err(error)) = &sent {
            self.broken = Some(error.kind());
        }
        sent
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>, left: &mut usize) -> Poll<()> {
        let socket = self.socket();
        let mut bytes = [0; 4096];
        while *left > 0 {
            let mut buffer = ReadBuf::new(&mut bytes);
            match ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => *left = left.saturating_sub(buffer.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(())
    }

    /// Makes a reset of the end, if the client would take another end for that of a body that broke off.
    fn reset_if_cut(&mut self) -> bool {
        if !(self.broke_off && self.end_is_bodys) {
            return false;
        }
        self.broken = Some(io::ErrorKind::ConnectionAborted);
        match &self.io {
            Io::Plain(socket) => socket.end_with_reset(),
            Io::Tls(stream) => stream.io.end_with_reset(),
        }
        true
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outlives_codec {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_send(cx))?;
        match &mut self.io {
            Io::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Io::Tls(stream) => {
                stream.close();
                ready!(stream.poll_flush(cx))?;
                Pin::new(&mut stream.io).poll_shutdown(cx)
            }
        }
    }
}

/// Reads until there is plaintext, or the end.
fn poll_opened(stream: &mut Stream<Socket>, cx: &mut Context<'_>, take: impl FnOnce(&[u8])) -> Poll<io::Result<()>> {
    with_scratch(|scratch| {
        while stream.read_side() == ReadSide::Open {
            ready!(stream.poll_open(cx, scratch))?;
            if !scratch.opened.is_empty() {
                take(&scratch.opened);
                break;
            }
        }
        Poll::Ready(Ok(()))
    })
}

fn poll_send_plain(socket: &mut Socket, cx: &mut Context<'_>, bytes: &[u8], sent: &mut usize) -> Poll<io::Result<()>> {
    while *sent < bytes.len() {
        match ready!(Pin::new(&mut *socket).poll_write(cx, &bytes[*sent..]))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            count => *sent += count,
        }
    }
    Poll::Ready(Ok(()))
}

/// Once sealed, bytes are the stream's to send.
fn poll_send_tls(
    stream: &mut Stream<Socket>,
    cx: &mut Context<'_>,
    bytes: &[u8],
    sent: &mut usize,
) -> Poll<io::Result<()>> {
    if stream.is_blocked() {
        ready!(stream.poll_flush(cx))?;
    }
    if *sent < bytes.len() {
        with_scratch(|scratch| stream.poll_seal(cx, scratch, &bytes[*sent..]))?;
        *sent = bytes.len();
    }
    if stream.has_outgoing() { stream.poll_flush(cx) } else { Poll::Ready(Ok(())) }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        if let Some(strict) = state.strict.as_mut().filter(|strict| strict.refused().is_some()) {
            let rest = strict.rest();
            buffer.put_slice(&rest[..rest.len().min(buffer.remaining())]);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(state.poll_read(cx, buffer))?;
        state.moved += 1;
        state.received += u64::from(buffer.filled().len() > before);
        if let Some(blocks) = &mut state.blocks {
            blocks.follow(&buffer.filled()[before..]);
        }
        if let Some(strict) = &mut state.strict {
            strict.validate(&mut buffer.filled_mut()[before..]);
            let (refused, foreign) = (strict.refused(), strict.is_foreign());
            state.refusal = refused.or(foreign.then_some(FOREIGN));
            if foreign {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, FOREIGN)));
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.state().poll_write(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.state().poll_write(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        match (state.broken, state.gathers) {
            (Some(kind), _) => Poll::Ready(Err(kind.into())),
            (None, true) => Poll::Ready(Ok(())),
            (None, false) => state.poll_send(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().poll_shutdown(cx)
    }
}

pin_project! {
    /// A codec's connection with its wire: what the codec writes in one turn is sent at the end of it.
    pub struct Turn<C> {
        #[pin]
        connection: C,
        wire: Wire,
    }
}

impl<C> Turn<C> {
    pub(crate) fn new(connection: C, wire: Wire) -> Self {
        Self { connection, wire }
    }

    pub(crate) fn connection(self: Pin<&mut Self>) -> Pin<&mut C> {
        self.project().connection
    }
}

impl<C: Future> Future for Turn<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let polled = this.connection.poll(cx);
        let mut wire = this.wire.state();
        if wire.broken.is_none() && matches!(wire.poll_send(cx), Poll::Ready(Err(_))) {
            // The codec learns of it when it next reads or writes: now.
            cx.waker().wake_by_ref();
        }
        polled
    }
}

/// Emptied buffers of the thread, so that connections hold none while they are idle.
mod spare {
    use std::cell::RefCell;

    const KEPT: usize = 16;
    const FIRST: usize = 4096;

    thread_local! {
        static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn take() -> Vec<u8> {
        BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(FIRST))
    }

    pub(super) fn give(mut buffer: Vec<u8>) {
        buffer.clear();
        BUFFERS.with_borrow_mut(|buffers| {
            if buffers.len() < KEPT {
                buffers.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::testing::ca::{Ca, uri};
    use crate::tls::SpiffeId;

    #[tokio::test]
    async fn the_kernel_watches_the_path_of_what_is_under_way() {
        let (ca, listener) = (Ca::new(), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
        let client = ca.credentials("web").client("db.x.consul", expected, &[b"http/1.1"]).unwrap();
        let server = ca.credentials("db").server(&[b"http/1.1"]).unwrap();
        let near = Socket::tcp(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let (far, _) = listener.accept().await.unwrap();
        let accept = Stream::accept(far, server.config([&b"http/1.1"[..]]));
        let connect = async {
            let mut near = Stream::connect(near, &client).await.unwrap();
            poll_fn(|cx| near.poll_flush(cx)).await.unwrap();
            near
        };
        let (near, far) = tokio::join!(connect, accept);
        let (wire, _far) = (Wire::tls(near), far.unwrap());
        let seconds = |wire: &Wire| {
            let mut state = wire.state();
            let Socket::Tcp(stream) = state.socket() else { unreachable!("it is TCP") };
            let socket = SockRef::from(&*stream);
            let unacknowledged = socket.tcp_user_timeout().unwrap().map(|time| time.as_secs());
            (unacknowledged.unwrap_or(0), socket.tcp_keepalive_time().unwrap().as_secs())
        };
        assert_eq!(seconds(&wire), (0, 30));
        for (watch, expected) in [
            (PathWatch::Request, (3, 1)),
            (PathWatch::Upload, (0, 1)),
            (PathWatch::Request, (3, 1)),
            (PathWatch::Idle, (0, 30)),
            (PathWatch::Upload, (0, 1)),
        ] {
            wire.watch_path(watch);
            assert_eq!(seconds(&wire), expected, "{watch:?}");
        }
        wire.release();
        assert_eq!(seconds(&wire), (0, 30));
        wire.end_when_unacknowledged();
        assert_eq!(seconds(&wire), (3, 30));
    }
}
