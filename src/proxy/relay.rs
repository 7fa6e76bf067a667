//! L4: bytes copied both ways between a plain socket and a TLS session.
//!
//! Each direction ends by itself: an end of stream on one side becomes an end of stream on the other while
//! the opposite direction goes on. Neither direction reads before what it read last is written, so that a
//! slow reader slows its writer down and no buffer grows.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};

use super::outcome::{Fault, Outcome};
use super::socket::Socket;
use super::tunnel::MeshStream;
use crate::tls::{Scratch, Stream, with_scratch};

/// A connection on which nothing has moved for so long rests.
const REST: Duration = Duration::from_millis(100);
/// How long it is waited for.
const REST_LIMIT: Duration = Duration::from_secs(5);
/// Turns taken before other connections of the thread get theirs.
const TURNS: usize = 8;

/// One relay. It is kept by the caller, so that a relay that is cut short still tells what it moved.
pub(super) struct Relay {
    /// Opened, and not yet taken by the plain socket.
    to_plain: Vec<u8>,
    opening: Direction,
    sealing: Direction,
    /// Bytes of plaintext moved from the TLS side to the plain one, and back.
    pub opened: u64,
    pub sealed: u64,
    /// Whose bytes were moved last.
    spoke_last: Option<Side>,
    /// The TLS side has ended without a byte, before the plain one did.
    pub was_left_unanswered: bool,
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
pub(super) struct Broken {
    pub side: Side,
    pub error: io::Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Plain,
    Tls,
}

impl Broken {
    /// Which side that was of the connection; `client` is on this one of the relay.
    pub(super) fn of(&self, client: Side) -> Fault {
        let outcome = if self.side == client { Outcome::ClientReset } else { Outcome::Reset };
        Fault::new(outcome, self.to_string())
    }
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
    pub(super) fn new() -> Self {
        let (opening, sealing) = (Direction::Flowing, Direction::Flowing);
        let (opened, sealed, spoke_last) = (0, 0, None);
        Self { to_plain: Vec::new(), opening, sealing, opened, sealed, spoke_last, was_left_unanswered: false }
    }

    /// Copies until both directions have ended.
    ///
    /// # Errors
    /// See [`Broken`].
    pub(super) async fn run<P, T>(&mut self, plain: &mut P, tls: &mut MeshStream<T>) -> Result<(), Broken>
    where
        P: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        poll_fn(|cx| with_scratch(|scratch| self.poll(cx, scratch, plain, tls))).await
    }

    /// Copies until a connection can be cut that may carry requests of HTTP: nothing moves, and what `client` asked
    /// has been answered. `None`: it can, or there was no such moment in [`REST_LIMIT`].
    pub(super) async fn run_to_rest<P, T>(
        &mut self,
        plain: &mut P,
        tls: &mut MeshStream<T>,
        client: Side,
    ) -> Option<Result<(), Broken>>
    where
        P: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            let before = (self.opened, self.sealed);
            if let Ok(ended) = timeout(REST, self.run(plain, tls)).await {
                return Some(ended);
            }
            let rests = before == (self.opened, self.sealed) && self.spoke_last != Some(client);
            if rests || Instant::now() >= deadline {
                return None;
            }
        }
    }

    fn poll<P, T>(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        plain: &mut P,
        tls: &mut MeshStream<T>,
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
        from: &mut MeshStream<T>,
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
                if !scratch.opened.is_empty() {
                    self.spoke_last = Some(Side::Tls);
                }
                if from.has_ended() {
                    self.opening = Direction::Ending;
                    self.was_left_unanswered = self.opened == 0 && self.sealing == Direction::Flowing;
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
        to: &mut MeshStream<T>,
    ) -> Poll<Result<(), Broken>>
    where
        P: AsyncRead + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        if to.tls.is_blocked() {
            ready!(to.tls.poll_flush(cx)).map_err(tls)?;
        }
        match self.sealing {
            // What the handshake left to send waits for this read, so that both go out together.
            Direction::Flowing => match to.poll_seal_from(cx, scratch, from).map_err(tls)? {
                Poll::Ready(Ok(0)) => {
                    to.end(cx, scratch).map_err(tls)?;
                    self.sealing = Direction::Ending;
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Ok(read)) => {
                    self.sealed += read as u64;
                    self.spoke_last = Some(Side::Plain);
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(plain(error))),
                Poll::Pending => {
                    ready!(to.tls.poll_flush(cx)).map_err(tls)?;
                    Poll::Pending
                }
            },
            Direction::Ending => {
                ready!(to.poll_end(cx)).map_err(tls)?;
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
pub(super) fn abort(broken: &Broken, plain: Socket, tls: Stream<Socket>) {
    match broken.side {
        Side::Plain => tls.io.abort(),
        Side::Tls => plain.abort(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::proxy::tunnel::Role;
    use crate::testing::ca::{Ca, uri};
    use crate::tls::{SpiffeId, TUNNEL, TUNNEL_1};

    /// Without and with a tunnel.
    const FORMS: [&[&[u8]]; 3] = [&[], &[TUNNEL_1], &[TUNNEL]];

    /// The plain ends of a pair of relays with TLS between them, as two sidecars make it.
    async fn pair(buffer: usize, alpn: &'static [&'static [u8]]) -> (DuplexStream, DuplexStream) {
        let (client, near) = duplex(buffer);
        let (server, far) = duplex(buffer);
        let (left, right) = duplex(buffer);
        tokio::spawn(relay_as(Role::Client, alpn, near, left));
        tokio::spawn(relay_as(Role::Server, alpn, far, right));
        (client, server)
    }

    async fn relay_as<P, T>(role: Role, alpn: &[&[u8]], mut plain: P, wire: T) -> Result<(), Broken>
    where
        P: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        static CA: std::sync::LazyLock<Ca> = std::sync::LazyLock::new(Ca::new);
        let tls = match role {
            Role::Client => {
                let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
                let client = CA.credentials("web").client("db.x.consul", expected, alpn).unwrap();
                Stream::connect(wire, &client).await.unwrap()
            }
            Role::Server => {
                let server = CA.credentials("db").server(alpn).unwrap();
                Stream::accept(wire, server.config(alpn.iter().copied())).await.unwrap()
            }
        };
        let mut mesh = MeshStream::new(tls, role);
        if mesh.is_free() {
            match role {
                Role::Client => mesh.start().await.unwrap().unwrap(),
                Role::Server => {
                    mesh.asked().await.unwrap();
                    mesh.accept().await.unwrap();
                }
            }
        }
        Relay::new().run(&mut plain, &mut mesh).await
    }

    #[tokio::test]
    async fn bytes_come_back_whole_through_any_buffer() {
        for (buffer, alpn) in [1, 7, 4096, 1 << 20].into_iter().flat_map(|buffer| FORMS.map(|alpn| (buffer, alpn))) {
            let (mut client, mut server) = pair(buffer, alpn).await;
            let size = if buffer < 100 { 5_000 } else { 3_000_000 };
            let sent: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
            let echo = tokio::spawn(async move {
                let mut bytes = vec![0; 10_000];
                loop {
                    match server.read(&mut bytes).await.unwrap() {
                        0 => break,
                        read => server.write_all(&bytes[..read]).await.unwrap(),
                    }
                }
                server.shutdown().await.unwrap();
            });
            let (mut reader, mut writer) = tokio::io::split(client);
            let write = async {
                writer.write_all(&sent).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let (_, read) = tokio::join!(write, reader.read_to_end(&mut received));
            read.unwrap();
            assert!(received == sent, "through {buffer}");
            echo.await.unwrap();
            client = reader.unsplit(writer);
            drop(client);
        }
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        for alpn in FORMS {
            let (mut client, mut server) = pair(4096, alpn).await;
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = String::new();
            server.read_to_string(&mut question).await.unwrap();
            assert_eq!(question, "question");
            server.write_all(b"answer, after the end of the question").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "answer, after the end of the question");
        }
    }

    #[tokio::test]
    async fn a_reader_that_stops_stops_the_writer() {
        for alpn in FORMS {
            let (mut client, server) = pair(4096, alpn).await;
            let mut taken = 0;
            let chunk = vec![0; 64 * 1024];
            let limit = std::time::Duration::from_millis(200);
            while let Ok(written) = tokio::time::timeout(limit, client.write(&chunk)).await {
                taken += written.unwrap();
                assert!(taken < 4 << 20, "nothing holds the writer back");
            }
            drop(server);
        }
    }

    #[tokio::test]
    async fn a_side_that_breaks_is_named() {
        for alpn in FORMS {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (app, _) = listener.accept().await.unwrap();
            let (left, right) = duplex(4096);
            let (peer, far) = duplex(4096);
            tokio::spawn(relay_as(Role::Server, alpn, far, right));
            let relay = tokio::spawn(relay_as(Role::Client, alpn, Socket::tcp(app), left));
            Socket::tcp(dialled).abort();
            assert_eq!(relay.await.unwrap().unwrap_err().side, Side::Plain);
            drop(peer);
        }
    }

    #[tokio::test]
    async fn a_tunnel_that_breaks_off_is_no_end_and_one_that_is_closed_is() {
        static CA: std::sync::LazyLock<Ca> = std::sync::LazyLock::new(Ca::new);
        for closes in [true, false] {
            let (wire, far) = duplex(1 << 16);
            let (mut app, plain) = duplex(1 << 16);
            let relay = tokio::spawn(async move {
                let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
                let client = CA.credentials("web").client("db.x.consul", expected, &[TUNNEL_1]).unwrap();
                let tls = Stream::connect(wire, &client).await.unwrap();
                let mut plain = plain;
                Relay::new().run(&mut plain, &mut MeshStream::new(tls, Role::Client)).await
            });
            let server = CA.credentials("db").server(&[TUNNEL_1]).unwrap();
            let mut tls = Stream::accept(far, server.config([TUNNEL_1])).await.unwrap();
            let word = [&3_u32.to_be_bytes()[..], b"abc"].concat();
            poll_fn(|cx| Poll::Ready(with_scratch(|scratch| tls.poll_seal(cx, scratch, &word)))).await.unwrap();
            if closes {
                tls.close();
            }
            poll_fn(|cx| tls.poll_flush(cx)).await.unwrap();
            let mut got = [0; 3];
            app.read_exact(&mut got).await.unwrap();
            let tls = Some(tls).filter(|_| closes);
            app.shutdown().await.unwrap();
            let ended = relay.await.unwrap();
            assert_eq!(ended.is_ok(), closes, "{ended:?}");
            drop(tls);
        }
    }
}
