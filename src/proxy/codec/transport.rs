//! Bytes over a plain socket or a TLS session, read ahead and gathered.
//!
//! What is written waits in a buffer until it is sent as a whole. What was read ahead of the codec waits in another one.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::socket::Socket;
use crate::tls::{ReadSide, Stream, with_scratch};

/// A socket or a session with what was read ahead of the codec and what it has written.
pub(super) struct Transport {
    io: Io,
    /// Read from the socket; what lies before `taken` has been read by the codec.
    incoming: Vec<u8>,
    taken: usize,
    /// Written by the codec; what lies before `sent` has gone to the socket.
    outgoing: Vec<u8>,
    sent: usize,
    /// A flush waits for the end of the turn.
    pub gathers: bool,
    /// Why nothing can be sent any more.
    pub broken: Option<io::ErrorKind>,
    /// What the far end may have answered before it took no more is still read.
    pub reads_to_end: bool,
    /// The far end takes no more, which the codec learns when it has read all.
    unheard: bool,
    /// Counts bytes that were written.
    written: u64,
    /// The client has ended its direction.
    ended: bool,
    /// Bytes of the next response that were sent before the codec wrote them.
    ahead: usize,
    /// The codec waits to write.
    blocked: bool,
    /// Shutting down is not for the codec to do.
    pub outlives_codec: bool,
}

pub(super) enum Io {
    Plain(Socket),
    Tls(Stream<Socket>),
}

/// Bytes that are gathered before a write to the socket.
const GATHERED: usize = 64 * 1024;

/// Bytes that are read at most while a response is awaited.
const AHEAD: usize = 16 * 1024;

/// How every answer in HTTP/1 begins.
const COMMON: &[u8] = b"HTTP/1.";

impl Transport {
    #[must_use]
    pub(super) fn new(io: Io) -> Self {
        Self {
            io,
            incoming: Vec::new(),
            taken: 0,
            outgoing: Vec::new(),
            sent: 0,
            gathers: true,
            broken: None,
            reads_to_end: false,
            unheard: false,
            written: 0,
            ended: false,
            ahead: 0,
            blocked: false,
            outlives_codec: false,
        }
    }

    /// The session with another host, if it is one.
    #[must_use]
    pub(super) fn tls(&self) -> Option<&Stream<Socket>> {
        match &self.io {
            Io::Plain(_) => None,
            Io::Tls(stream) => Some(stream),
        }
    }

    pub(super) fn socket(&mut self) -> &mut Socket {
        match &mut self.io {
            Io::Plain(socket) => socket,
            Io::Tls(stream) => &mut stream.io,
        }
    }

    pub(super) fn check(&mut self) -> io::Result<()> {
        match self.broken {
            Some(kind) => Err(kind.into()),
            None => self.socket().take_error().map_or(Ok(()), Err),
        }
    }

    /// Nothing waits to be read or sent, and the codec can write.
    #[must_use]
    pub(super) fn is_at_rest(&self) -> bool {
        self.outgoing.is_empty() && self.incoming.is_empty() && !self.blocked && self.broken.is_none()
    }

    /// Whether the socket has not taken all that was written.
    #[must_use]
    pub(super) fn has_unsent(&self) -> bool {
        let held = self.tls().is_some_and(|stream| stream.has_outgoing() && !self.unheard);
        held || !self.outgoing.is_empty()
    }

    /// Bytes that were written so far.
    #[must_use]
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Whether what comes first are these bytes. An end of the stream is an error.
    pub(super) fn poll_begins_with(&mut self, cx: &mut Context<'_>, preface: &[u8]) -> Poll<io::Result<bool>> {
        loop {
            let seen = self.incoming.len().min(preface.len());
            if self.incoming[..seen] != preface[..seen] {
                return Poll::Ready(Ok(false));
            }
            if seen == preface.len() {
                return Poll::Ready(Ok(true));
            }
            if ready!(self.poll_more(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Reads once, without a codec.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // What the handshake left to send must not wait for the client, which may wait for it.
        let _ = self.poll_send(cx)?;
        self.poll_fill(cx)
    }

    /// Reads once, behind what is there. Zero is the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let before = self.incoming.len();
        match &mut self.io {
            Io::Plain(socket) => {
                // Most of the time nothing is there: it is not worth clearing.
                let mut buffer = [MaybeUninit::uninit(); 4096];
                let mut buffer = ReadBuf::uninit(&mut buffer);
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

    /// Reads what the client sends while the codec does not, up to a limit. Ready at the end of the client's direction.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.ended {
            if self.incoming.len() - self.taken >= AHEAD {
                return Poll::Pending;
            }
            self.ended = ready!(self.poll_fill(cx))? == 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends one of the first bytes of the answer that is awaited, which are the same in each. False if there are none left
    /// or the socket takes nothing.
    pub(super) fn probe(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if self.ahead == COMMON.len() || self.blocked || !self.outgoing.is_empty() {
            return self.check().map(|()| false);
        }
        let at = self.ahead;
        self.ahead += 1;
        self.outgoing.push(COMMON[at]);
        let _ = self.poll_send(cx)?;
        Ok(true)
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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

    /// Gathers what is written, and shows it to `follow`.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
        follow: impl FnOnce(&[u8]),
    ) -> Poll<io::Result<usize>> {
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
        follow(&self.outgoing[before..]);
        let count = self.outgoing.len() - before + gone;
        self.written += count as u64;
        Poll::Ready(Ok(count))
    }

    /// Sends what was written.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(kind) = self.broken {
            return Poll::Ready(Err(kind.into()));
        }
        let mut sent = match &mut self.io {
            _ if self.unheard => Poll::Ready(Ok(())),
            Io::Plain(socket) => poll_send_plain(socket, cx, &self.outgoing, &mut self.sent),
            Io::Tls(stream) => poll_send_tls(stream, cx, &self.outgoing, &mut self.sent),
        };
        if self.reads_to_end && matches!(&sent, Poll::Ready(Err(_))) {
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

    /// Sends what was gathered in one turn of the codec.
    pub(super) fn end_turn(&mut self, cx: &mut Context<'_>) {
        if self.broken.is_none() && matches!(self.poll_send(cx), Poll::Ready(Err(_))) {
            // The codec learns of it when it next reads or writes: now.
            cx.waker().wake_by_ref();
        }
    }

    pub(super) fn poll_discard(&mut self, cx: &mut Context<'_>, left: &mut usize) -> Poll<()> {
        let socket = self.socket();
        let mut bytes = [MaybeUninit::uninit(); 4096];
        while *left > 0 {
            let mut buffer = ReadBuf::uninit(&mut bytes);
            match ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => *left = left.saturating_sub(buffer.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(())
    }

    /// Has the connection end with a reset, at once.
    pub(super) fn reset(&mut self) {
        self.broken = Some(io::ErrorKind::ConnectionAborted);
        self.socket().end_with_reset();
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
    use std::future::poll_fn;
    use std::io::IoSlice;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Transport) {
        let (far, near) = UnixStream::pair().unwrap();
        (far, Transport::new(Io::Plain(Socket::unix(near))))
    }

    async fn end_turn(transport: &mut Transport) {
        poll_fn(|cx| {
            transport.end_turn(cx);
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_written_in_one_turn_is_sent_at_its_end() {
        let (mut far, mut transport) = pair();
        let mut followed = Vec::new();
        for word in ["one ", "turn"] {
            let parts = [IoSlice::new(word.as_bytes())];
            poll_fn(|cx| transport.poll_write(cx, &parts, |bytes| followed.extend_from_slice(bytes))).await.unwrap();
        }
        assert!(transport.has_unsent() && !transport.is_at_rest());
        assert_eq!(far.try_read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        end_turn(&mut transport).await;
        assert!(transport.is_at_rest());
        let mut got = [0; 8];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!((&got, &followed[..], transport.written()), (b"one turn", &b"one turn"[..], 8));
    }

    #[tokio::test]
    async fn bytes_that_went_ahead_of_an_answer_are_not_sent_twice() {
        let (mut far, mut transport) = pair();
        for _ in 0..4 {
            assert!(poll_fn(|cx| Poll::Ready(transport.probe(cx))).await.unwrap());
        }
        let parts = [IoSlice::new(b"HTTP/1.1 200 OK")];
        assert_eq!(poll_fn(|cx| transport.poll_write(cx, &parts, |_| {})).await.unwrap(), 15);
        end_turn(&mut transport).await;
        let mut got = [0; 15];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"HTTP/1.1 200 OK");
    }

    #[tokio::test]
    async fn what_was_looked_at_is_read_again() {
        let (mut far, mut transport) = pair();
        far.write_all(b"PRI and more").await.unwrap();
        assert!(poll_fn(|cx| transport.poll_begins_with(cx, b"PRI")).await.unwrap());
        let (mut bytes, mut got) = ([0; 5], Vec::new());
        while got.len() < 12 {
            let mut buffer = ReadBuf::new(&mut bytes);
            poll_fn(|cx| transport.poll_read(cx, &mut buffer)).await.unwrap();
            got.extend_from_slice(buffer.filled());
        }
        assert_eq!(got, b"PRI and more");
        drop(far);
        assert!(poll_fn(|cx| transport.poll_begins_with(cx, b"PRI")).await.is_err());
    }
}
