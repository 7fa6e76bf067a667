//! A stream socket of either family, with the settings that every connection of a proxy wants.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::resolve;
use crate::snapshot::{Address, Host, LocalApp};
use crate::stats::ClusterStats;
use crate::tls::with_scratch;

/// No Nagle delay, and keep-alive so that a peer that vanished is noticed. A socket that refuses either still works.
pub(super) fn prepare(socket: &socket2::Socket) {
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&KEEPALIVE);
}

/// A connected TCP or Unix stream socket.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream, Option<Counted>),
    Unix(UnixStream, Option<Counted>),
}

impl Socket {
    /// Dials the local app.
    ///
    /// # Errors
    /// Those of name resolution and `connect`. The caller sets the time limit.
    pub async fn connect_app(app: &LocalApp) -> io::Result<Self> {
        match app {
            LocalApp::Tcp(address) => Self::connect(address).await,
            LocalApp::Unix(path) => Self::connect_unix(path).await,
        }
    }

    /// Dials an address; a name is resolved first, and whichever of its addresses answers is used.
    ///
    /// # Errors
    /// Those of name resolution and `connect`. The caller sets the time limit.
    pub async fn connect(address: &Address) -> io::Result<Self> {
        let stream = match &address.host {
            Host::Ip(ip) => TcpStream::connect((*ip, address.port)).await?,
            Host::Name(name) => resolve::connect(&resolve::lookup(name).await?, address.port).await?,
        };
        Ok(Self::tcp(stream))
    }

    async fn connect_unix(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).await.map(Self::unix)
    }

    /// Takes over a TCP connection, with the settings of [`prepare`].
    #[must_use]
    pub fn tcp(stream: TcpStream) -> Self {
        prepare(&SockRef::from(&stream));
        Self::Tcp(stream, None)
    }

    /// Takes over a TCP connection that a listening socket has accepted, on which [`prepare`] was called: Linux passes the
    /// settings on, which saves five system calls for each connection.
    #[must_use]
    pub fn accepted(stream: TcpStream) -> Self {
        if cfg!(target_os = "linux") { Self::Tcp(stream, None) } else { Self::tcp(stream) }
    }

    #[must_use]
    pub fn unix(stream: UnixStream) -> Self {
        Self::Unix(stream, None)
    }

    /// The same, counted among the open connections of a cluster as long as it is there.
    #[must_use]
    pub fn counted(self, stats: &Arc<ClusterStats>) -> Self {
        let counted = Some(Counted::new(stats));
        match self {
            Self::Tcp(stream, _) => Self::Tcp(stream, counted),
            Self::Unix(stream, _) => Self::Unix(stream, counted),
        }
    }

    /// The local address; `None` for a Unix socket.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream, _) => stream.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }

    /// Ends the connection when what was sent has not been acknowledged for so long, or as the kernel sees fit. A socket
    /// that refuses still works.
    pub fn end_when_unacknowledged(&self, time: Option<Duration>) {
        if let Self::Tcp(stream, _) = self {
            let _ = SockRef::from(stream).set_tcp_user_timeout(time);
        }
    }

    /// Whether what was sent was sent again, and nothing has been acknowledged for so long, in any of this. A far end that
    /// takes nothing for now acknowledges that it is asked.
    #[must_use]
    pub fn is_unacknowledged(&self, time: Duration) -> bool {
        match self {
            Self::Tcp(stream, _) => tcp_info(stream).is_ok_and(|info| {
                info.tcpi_unacked > 0
                    && info.tcpi_retransmits > 0
                    && u128::from(info.tcpi_last_ack_recv) >= time.as_millis()
            }),
            Self::Unix(..) => false,
        }
    }

    /// Has a peer that vanished be noticed within seconds, or in the usual time. A socket that refuses still works.
    pub fn keep_alive(&self, closely: bool) {
        if let Self::Tcp(stream, _) = self {
            let _ = SockRef::from(stream).set_tcp_keepalive(if closely { &CLOSE_WATCH } else { &KEEPALIVE });
        }
    }

    /// Ends abruptly: the far end sees a reset instead of an end.
    pub fn abort(self) {
        self.end_with_reset();
    }

    /// Whenever it is closed, the far end sees a reset instead of an end.
    pub fn end_with_reset(&self) {
        if let Self::Tcp(stream, _) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// The socket's pending error (`SO_ERROR`), which is cleared.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        let error = match self {
            Self::Tcp(stream, _) => stream.take_error(),
            Self::Unix(stream, _) => stream.take_error(),
        };
        error.unwrap_or_else(Some)
    }

    /// Ends cleanly: the far end sees the end of the stream and not a reset, which the kernel would send if
    /// the socket were closed with bytes unread. What still comes is thrown away, for a short while.
    pub async fn close(mut self) {
        let _ = timeout(LINGER, async {
            self.shutdown().await?;
            let mut left = LINGER_BYTES;
            while left > 0 {
                match poll_fn(|cx| with_scratch(|scratch| scratch.poll_discard(cx, &mut self))).await? {
                    0 => break,
                    read => left = left.saturating_sub(read),
                }
            }
            io::Result::Ok(())
        })
        .await;
    }
}

/// Counts an open connection to a cluster until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<ClusterStats>);

impl Counted {
    fn new(stats: &Arc<ClusterStats>) -> Self {
        stats.connections_active.increment();
        Self(Arc::clone(stats))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections_active.decrement();
    }
}

/// The kernel's `TCP_INFO` of a connection (tcp(7)). No well-kept crate reads it.
#[allow(unsafe_code)]
fn tcp_info(stream: &TcpStream) -> io::Result<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut size = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `stream` is borrowed. The kernel writes `size` bytes at most, which is the size
    // of what it writes to. All fields are numbers, for which zero, where it writes less, is a value.
    let info = unsafe {
        let result = libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        );
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        info.assume_init()
    };
    Ok(info)
}

/// TCP keepalive: first probe after 30 s of silence, then every 10 s; the peer is gone after four unanswered ones.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10)).with_retries(4);
/// TCP keepalive while a response is awaited: the peer is gone after some three seconds.
const CLOSE_WATCH: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(1)).with_interval(Duration::from_secs(1)).with_retries(2);

/// How long, and for how many bytes, a connection that we end is read from before it is closed.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream, _) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream, _) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Self::Unix(stream, _) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
