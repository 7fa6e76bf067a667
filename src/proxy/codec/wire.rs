//! The byte stream under an HTTP connection, plain or TLS, and how its writes are gathered.
//!
//! An HTTP codec writes frame by frame, above all in HTTP/2; sealed and sent one by one they would cost a
//! record and a system call each. So a [`Wire`] keeps what is written until the codec has had its turn, and
//! [`Turn`](super::turn::Turn) then sends it all at once. A [`Transport`] does that, and [`Messages`] follows what the bytes mean.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{sleep, timeout};

use super::messages::{Awaits, Messages};
use super::transport::{Io, Transport};
use crate::proxy::socket::Socket;
use crate::snapshot::Upgrades;
use crate::stats::value::Counter;
use crate::stats::{ClusterStats, ListenerStats};
use crate::tls::Stream;

/// A stream that a codec reads and writes. The mutex is never contended, as all of a connection stays on one
/// thread; it is there because both the codec and its turn need the stream.
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
    transport: Transport,
    messages: Messages,
    path_watch: PathWatch,
    /// Somebody looks at the path of bodies.
    looked_at: bool,
    /// Counts reads and writes.
    moved: u64,
    /// Counts reads that brought something.
    received: u64,
    /// The counters of its bytes.
    counts: Option<Counts>,
}

/// The numbers that the bytes of a connection are added to while they pass: heads, bodies and whatever else the codec says.
pub enum Counts {
    Listener(Arc<ListenerStats>),
    Cluster(Arc<ClusterStats>),
}

impl Counts {
    fn received(&self, bytes: usize) {
        self.counters().0.add(bytes as u64);
    }

    fn sent(&self, bytes: usize) {
        self.counters().1.add(bytes as u64);
    }

    /// Received, and sent.
    fn counters(&self) -> (&Counter, &Counter) {
        match self {
            Self::Listener(stats) => (&stats.received, &stats.sent),
            Self::Cluster(stats) => (&stats.received, &stats.sent),
        }
    }
}

/// Time for which a connection that was closed on our side is still read (lingering close).
const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are read at most in a lingering close.
const LINGER_BYTES: usize = 1024 * 1024;

/// How an HTTP/2 client begins, whatever was said about protocols before (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The activity on a connection for which its path is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathWatch {
    /// Nothing, or what is no HTTP any more.
    Idle,
    /// A request that is as good as sent.
    Request,
    /// A body that the far end may have to wait for.
    Upload,
}

/// Time without a TCP acknowledgement after which a peer counts as gone. A peer with a closed receive window counts as
/// well.
const UNACKNOWLEDGED: Duration = Duration::from_secs(3);

/// How often the path of a body is looked at, and how long nothing may come back before that is a sign.
const LOOK: Duration = Duration::from_secs(1);

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
        let (transport, messages) = (Transport::new(io), Messages::default());
        let state = State {
            transport,
            messages,
            path_watch: PathWatch::Idle,
            looked_at: false,
            moved: 0,
            received: 0,
            counts: None,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The same with its bytes counted from here on.
    #[must_use]
    pub fn counted(self, counts: Counts) -> Self {
        self.state().counts = Some(counts);
        self
    }

    /// Whether the client speaks HTTP/2, by its first bytes. An end of the stream is an error.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn begins_http2(&self) -> io::Result<bool> {
        poll_fn(|cx| self.state().transport.poll_begins_with(cx, PREFACE)).await
    }

    /// Says what an HTTP/1 client may upgrade to.
    pub fn allow_upgrades(&self, upgrades: Upgrades) {
        self.state().messages.upgrades = upgrades;
    }

    #[must_use]
    pub fn upgrades(&self) -> Upgrades {
        self.state().messages.upgrades.clone()
    }

    /// Lets nothing but unambiguous HTTP/1 requests through from here on.
    pub fn be_strict(&self) {
        self.state().messages.be_strict();
    }

    /// Notes the HTTP/2 header blocks that come from here on, the preface included, and the streams that the codec resets.
    pub fn follow_frames(&self) {
        self.state().messages.follow_frames(PREFACE.len());
    }

    /// Whether the handshake said that the client speaks HTTP/2.
    #[must_use]
    pub fn agreed_on_http2(&self) -> bool {
        self.state().transport.tls().is_some_and(|stream| stream.alpn() == Some(b"h2"))
    }

    /// The codec is given one more response.
    pub fn begins_answer(&self) {
        self.state().messages.begun += 1;
    }

    /// The codec has been given all of it.
    pub fn answered(&self) {
        self.state().messages.answered += 1;
    }

    /// Whether every HTTP/1 request that came has been answered, and nothing of another one is there.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        let state = self.state();
        state.messages.are_answered() && state.transport.is_at_rest()
    }

    /// Whether the codec may end without shutting the wire down.
    pub fn outlives_codec(&self, outlives: bool) {
        self.state().transport.outlives_codec = outlives;
    }

    /// Whether the client takes the end of the connection for the end of a body, as HTTP/1.0 has it.
    pub fn end_is_bodys(&self, is: bool) {
        self.state().messages.end_is_bodys = is;
    }

    /// The response that goes over it breaks off.
    pub fn breaks_off(&self) {
        self.state().messages.broke_off = true;
    }

    /// The response on this HTTP/2 stream breaks off: that the codec resets it refuses nothing.
    pub(super) fn breaks_off_stream(&self, stream: u32) {
        self.state().messages.breaks_off(stream);
    }

    /// Ends the connection that a codec has given up: with a reset where a response broke off that the client would
    /// otherwise take for whole.
    pub async fn give_up(&self) {
        if self.state().messages.upgraded {
            return;
        }
        if !self.state().reset_if_cut() {
            let _ = timeout(LINGER, poll_fn(|cx| self.state().transport.poll_shutdown(cx))).await;
        }
    }

    /// Waits for bytes; false at the end of the stream.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn has_more(&self) -> io::Result<bool> {
        poll_fn(|cx| self.state().transport.poll_more(cx)).await.map(|count| count > 0)
    }

    /// From here on an answer is read although the far end takes no more of what is written: it may have answered early,
    /// and closed with a reset for what it did not read.
    pub fn read_to_end(&self) {
        self.state().transport.reads_to_end = true;
    }

    /// The codec is about to end and leave what follows to another.
    pub fn upgrade(&self) {
        self.state().messages.upgraded = true;
    }

    /// For an upgraded connection, which has no turns: a flush sends, and no requests are looked for.
    pub fn release(&self) {
        let mut state = self.state();
        state.messages.release();
        state.transport.gathers = false;
        state.transport.reads_to_end = false;
        drop(state);
        self.watch_path(PathWatch::Idle);
    }

    /// Why a request was refused, here or by an HTTP/2 codec, since this was asked last.
    #[must_use]
    pub fn take_refusal(&self) -> Option<&'static str> {
        self.state().messages.take_refusal()
    }

    /// A number that changes whenever bytes move, and that of the request whose head has begun to come and is not
    /// complete.
    #[must_use]
    pub fn progress(&self) -> (u64, Option<u64>) {
        let state = self.state();
        (state.moved, state.messages.begun_head())
    }

    /// What an HTTP/1 client waits for that has sent a request, or a part of it.
    #[must_use]
    pub fn awaits(&self) -> Awaits {
        self.state().messages.awaits()
    }

    /// Reads what the client sends while the codec does not, up to a limit. Ready at the end of the client's direction.
    ///
    /// # Errors
    /// Those of the socket: the client has reset the connection.
    pub fn poll_end(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().transport.poll_end(cx)
    }

    /// Sends the first bytes of the answer that is awaited, which are the same in each, one at a time. A client that
    /// has closed its connection replies with a reset, and one that has only ended its direction takes them. False if
    /// there are none left or the socket takes nothing.
    ///
    /// # Errors
    /// Those of the socket: the client is gone.
    pub fn probe(&self, cx: &mut Context<'_>) -> io::Result<bool> {
        self.state().transport.probe(cx)
    }

    /// # Errors
    /// The client is gone, as the socket knows.
    pub fn check(&self) -> io::Result<()> {
        self.state().transport.check()
    }

    /// The certificates that the peer showed in the handshake.
    pub fn peer_certificates(&self, act: &mut dyn FnMut(Option<&[CertificateDer<'_>]>)) {
        match self.state().transport.tls() {
            Some(stream) => act(stream.peer_certificates()),
            None => act(None),
        }
    }

    /// Has the connection end with a reset, so that nobody takes it for a good end.
    pub fn abort(&self) {
        self.state().transport.socket().end_with_reset();
    }

    #[must_use]
    pub fn downgrade(&self) -> WeakWire {
        WeakWire(Arc::downgrade(&self.0))
    }

    /// Whether the socket has not taken all that was written.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.state().transport.has_unsent()
    }

    /// A number that changes whenever something comes.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.state().received
    }

    /// Bytes that were written so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.state().transport.written()
    }

    /// Whether the far end is another host, or may be.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.state().transport.tls().is_some()
    }

    /// Has the kernel look whether the path to another host still carries something, for what is under way on a
    /// connection of HTTP/1: that has no PING.
    pub fn watch_path(&self, watch: PathWatch) {
        let mut state = self.state();
        let Some(stream) = state.transport.tls() else { return };
        if watch == state.path_watch {
            return;
        }
        if (watch == PathWatch::Idle) != (state.path_watch == PathWatch::Idle) {
            stream.io.keep_alive(watch != PathWatch::Idle);
        }
        stream.io.end_when_unacknowledged((watch == PathWatch::Request).then_some(UNACKNOWLEDGED));
        state.path_watch = watch;
        if watch == PathWatch::Upload && !std::mem::replace(&mut state.looked_at, true) {
            tokio::spawn(look_at_uploads(self.downgrade()));
        }
    }

    /// Has the kernel end the connection where nothing comes back for what was sent of a body; false when none is under way.
    fn look_at_upload(&self) -> bool {
        let mut state = self.state();
        state.looked_at = state.path_watch == PathWatch::Upload;
        if let Some(stream) = state.transport.tls().filter(|_| state.looked_at) {
            let silent = stream.io.is_unacknowledged(LOOK);
            stream.io.end_when_unacknowledged(silent.then_some(UNACKNOWLEDGED));
        }
        state.looked_at
    }

    /// Ends the connection when what was sent is not acknowledged any more.
    pub fn end_when_unacknowledged(&self) {
        if let Some(stream) = self.state().transport.tls() {
            stream.io.end_when_unacknowledged(Some(UNACKNOWLEDGED));
        }
    }

    /// Has the connection end with a reset where the socket has not taken all that was written.
    pub fn cut_unsent(&self) {
        if self.has_unsent() {
            self.state().transport.reset();
        }
    }

    /// After the end of what was written: reads on for a moment, as bytes that nobody has read make the kernel
    /// reset the connection, and with it what the peer has not read yet.
    pub async fn linger(&self) {
        let is_over =
            |state: &State| state.messages.upgraded || state.transport.broken == Some(io::ErrorKind::ConnectionAborted);
        if is_over(&self.state()) {
            return;
        }
        let mut left = LINGER_BYTES;
        let _ = timeout(LINGER, poll_fn(|cx| self.state().transport.poll_discard(cx, &mut left))).await;
    }

    /// Sends what the codec has written in its turn.
    pub(super) fn end_turn(&self, cx: &mut Context<'_>) {
        self.state().transport.end_turn(cx);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Makes a reset of the end, if the client would take another end for that of a body that broke off.
    fn reset_if_cut(&mut self) -> bool {
        let is_cut = self.messages.broke_off && self.messages.end_is_bodys;
        if is_cut {
            self.transport.reset();
        }
        is_cut
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Self { transport, messages, moved, counts, .. } = self;
        let written = ready!(transport.poll_write(cx, parts, |bytes| {
            *moved += 1;
            messages.written(bytes);
        }))?;
        if let Some(counts) = counts {
            counts.sent(written);
        }
        Poll::Ready(Ok(written))
    }
}

/// The kernel can't be told to leave alone a far end that takes nothing for now. So it is told to end the connection only
/// while nothing at all comes back.
async fn look_at_uploads(wire: WeakWire) {
    loop {
        sleep(LOOK).await;
        if !wire.upgrade().is_some_and(|wire| wire.look_at_upload()) {
            return;
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        if let Some(rest) = state.messages.instead() {
            buffer.put_slice(&rest[..rest.len().min(buffer.remaining())]);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(state.transport.poll_read(cx, buffer))?;
        state.moved += 1;
        let read = buffer.filled().len() - before;
        state.received += u64::from(read > 0);
        if let Some(counts) = &state.counts {
            counts.received(read);
        }
        Poll::Ready(state.messages.read(&mut buffer.filled_mut()[before..]))
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
        let transport = &mut self.state().transport;
        match (transport.broken, transport.gathers) {
            (Some(kind), _) => Poll::Ready(Err(kind.into())),
            (None, true) => Poll::Ready(Ok(())),
            (None, false) => transport.poll_send(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().transport.poll_shutdown(cx)
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
            let Socket::Tcp(stream, _) = state.transport.socket() else { unreachable!("it is TCP") };
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
