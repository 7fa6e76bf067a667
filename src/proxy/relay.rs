//! L4: bytes copied both ways between a plain socket and a TLS stream.
//!
//! Each direction ends by itself: an end of stream on one side becomes an end of stream on the other while
//! the opposite direction goes on. Neither direction reads before what it read last is written, so that a
//! slow reader slows its writer down and no buffer grows.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};

use super::socket::Socket;
use crate::tls::{ReadSide, Scratch, Stream, with_scratch};

/// Turns taken before other connections of the thread get theirs.
const TURNS: usize = 8;

/// One relay. It is kept by the caller, so that a relay that is cut short still tells what it moved.
pub struct Relay {
    /// Opened, and not yet taken by the plain socket.
    to_plain: Vec<u8>,
    opening: Direction,
    sealing: Direction,
    /// Bytes of plaintext moved from the TLS side to the plain one, and back.
    pub opened: u64,
    pub sealed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Flowing,
    /// Its source has ended; what is left has to go out, then the end itself.
    Ending,
    Done,
}

/// A relay that did not come to its end: which side broke, and how.
#[derive(Debug)]
pub struct Broken {
    pub side: Side,
    pub error: io::Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Plain,
    Tls,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Plain => "the local side",
            Side::Tls => "the mesh side",
        };
        write!(f, "{side} broke off: {}", self.error)
    }
}

fn plain(error: io::Error) -> Broken {
    Broken { side: Side::Plain, error }
}

fn tls(error: io::Error) -> Broken {
    Broken { side: Side::Tls, error }
}

impl Relay {
    #[must_use]
    pub fn new() -> Self {
        Self { to_plain: Vec::new(), opening: Direction::Flowing, sealing: Direction::Flowing, opened: 0, sealed: 0 }
    }

    /// Copies until both directions have ended.
    ///
    /// # Errors
    /// See [`Broken`].
    pub async fn run<P, T>(&mut self, plain: &mut P, tls: &mut Stream<T>) -> Result<(), Broken>
    where
        P: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        poll_fn(|cx| with_scratch(|scratch| self.poll(cx, scratch, plain, tls))).await
    }

    fn poll<P, T>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        plain: &mut P,
        tls: &mut Stream<T>,
    ) -> Poll<Result<(), Broken>>
    where
        P: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        for _ in 0..TURNS {
            let opening = self.poll_opening(cx, scratch, plain, tls)?;
            let sealing = self.poll_sealing(cx, scratch, plain, tls)?;
            if self.opening == Direction::Done && self.sealing == Direction::Done {
                return Poll::Ready(Ok(()));
            }
            if opening.is_pending() && sealing.is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One turn of TLS to plain. Ready means that another turn may find something to do.
    fn poll_opening<P, T>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        to: &mut P,
        from: &mut Stream<T>,
    ) -> Poll<Result<(), Broken>>
    where
        P: AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        if !self.to_plain.is_empty() {
            let sent = poll_write_all(cx, to, &self.to_plain).map_err(plain)?;
            if sent < self.to_plain.len() {
                self.to_plain.drain(..sent);
                return Poll::Pending;
            }
            self.to_plain = Vec::new();
        }
        match self.opening {
            Direction::Flowing => {
                ready!(from.poll_open(cx, scratch)).map_err(tls)?;
                let sent = poll_write_all(cx, to, &scratch.opened).map_err(plain)?;
                self.to_plain.extend_from_slice(&scratch.opened[sent..]);
                self.opened += scratch.opened.len() as u64;
                if from.read_side() != ReadSide::Open {
                    self.opening = Direction::Ending;
                }
                Poll::Ready(Ok(()))
            }
            Direction::Ending => {
                ready!(Pin::new(to).poll_shutdown(cx)).map_err(plain)?;
                self.opening = Direction::Done;
                Poll::Ready(Ok(()))
            }
            Direction::Done => Poll::Pending,
        }
    }

    /// One turn of plain to TLS. Ready means that another turn may find something to do.
    fn poll_sealing<P, T>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        from: &mut P,
        to: &mut Stream<T>,
    ) -> Poll<Result<(), Broken>>
    where
        P: AsyncRead + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        if to.is_blocked() {
            ready!(to.poll_flush(cx)).map_err(tls)?;
        }
        match self.sealing {
            // What the handshake left to send waits for this read, so that both go out together.
            Direction::Flowing => match to.poll_seal_from(cx, scratch, from).map_err(tls)? {
                Poll::Ready(Ok(0)) => {
                    to.close();
                    self.sealing = Direction::Ending;
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Ok(read)) => {
                    self.sealed += read as u64;
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(plain(error))),
                Poll::Pending => {
                    ready!(to.poll_flush(cx)).map_err(tls)?;
                    Poll::Pending
                }
            },
            Direction::Ending => {
                ready!(to.poll_flush(cx)).map_err(tls)?;
                ready!(Pin::new(&mut to.io).poll_shutdown(cx)).map_err(tls)?;
                self.sealing = Direction::Done;
                Poll::Ready(Ok(()))
            }
            Direction::Done => Poll::Pending,
        }
    }
}

/// Writes as much as the socket takes now.
fn poll_write_all<W: AsyncWrite + Unpin>(cx: &mut Context<'_>, to: &mut W, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match Pin::new(&mut *to).poll_write(cx, &bytes[sent..])? {
            Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(count) => sent += count,
            Poll::Pending => break,
        }
    }
    Ok(sent)
}

/// Ends both sides cleanly although neither has: each sees the end of the stream.
pub async fn close(plain: Socket, tls: Stream<Socket>) {
    tokio::join!(plain.close(), close_tls(tls));
}

/// Ends a TLS connection cleanly: the peer sees the end of the stream.
pub async fn close_tls(mut tls: Stream<Socket>) {
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
pub fn abort(broken: &Broken, plain: Socket, tls: Stream<Socket>) {
    match broken.side {
        Side::Plain => tls.io.abort(),
        Side::Tls => plain.abort(),
    }
}
