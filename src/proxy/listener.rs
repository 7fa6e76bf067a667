//! Listening sockets: bind, accept, spawn, stop; the same for both directions.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Type};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::log_limit::Seldom;
use super::socket::{self, Socket};
use crate::drain::{self, Stage};
use crate::snapshot::Bind;
use crate::stats::ListenerStats;

/// The settings of a running listener and its connections, replaced while they go on.
#[derive(Debug)]
pub(super) struct ListenerState<P> {
    pub config: Arc<P>,
    pub stage: Stage,
}

/// A connection that was accepted, and what it goes by.
///
/// A listener that the kernel redirects connections to (`iptables -j REDIRECT`) needs the address that the app dialled:
/// `SO_ORIGINAL_DST` of the accepted socket, which `socket2::SockRef` reads (`original_dst_v4`, `original_dst_v6`). The
/// `serve` of that kind of listener is to read it, before the first byte. No other kind has one, so that it is no field
/// here and costs no other listener a system call.
pub(super) struct Accepted<P> {
    pub socket: Socket,
    /// `None` for a Unix socket.
    pub remote: Option<SocketAddr>,
    pub state: watch::Receiver<ListenerState<P>>,
    /// Dropped when the connection is done.
    pub drain: drain::Watch,
    pub stats: Arc<ListenerStats>,
}

/// A listening socket that has not been given to a thread yet.
#[derive(Debug)]
pub(super) enum Bound {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// Binds one listening socket for each of `workers` threads, so that the kernel spreads connections and
/// each stays on its thread.
///
/// # Errors
/// Those of `socket`, `bind` and `listen`; above all `AddrInUse`.
pub(super) fn bind(bind: &Bind, workers: usize) -> io::Result<Vec<Bound>> {
    match bind {
        Bind::Tcp(address) => bind_tcp(*address, workers),
        Bind::Unix { path, mode } => bind_unix(path, *mode, workers),
    }
}

fn bind_tcp(address: SocketAddr, workers: usize) -> io::Result<Vec<Bound>> {
    let mut bound = Vec::with_capacity(workers);
    for worker in 0..workers {
        let socket =
            socket2::Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            // `[::]` and `0.0.0.0` are two addresses, each with its own owner.
            socket.set_only_v6(true)?;
        }
        // The first socket is bound before it allows others beside it: an address that another program has,
        // shared or not, is taken. The rest then join the first.
        let joins = worker > 0;
        if joins {
            socket.set_reuse_port(true)?;
        }
        socket.bind(&SockAddr::from(address))?;
        if !joins {
            socket.set_reuse_port(true)?;
        }
        socket::prepare(&socket);
        socket.listen(BACKLOG)?;
        bound.push(Bound::Tcp(socket.into()));
    }
    Ok(bound)
}

fn bind_unix(path: &Path, mode: Option<u32>, workers: usize) -> io::Result<Vec<Bound>> {
    remove_stale(path)?;
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    let mut bound = vec![Bound::Unix(listener.try_clone()?)];
    for _ in 1..workers {
        bound.push(Bound::Unix(listener.try_clone()?));
    }
    Ok(bound)
}

/// Removes a socket that nobody listens on any more; anything else at the path is left alone and makes the
/// bind fail.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket
        && std::os::unix::net::UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Accepts until the stage says otherwise, and has each connection served by a task of its own.
pub(super) async fn run<P, S, F>(
    bound: Bound,
    state: watch::Receiver<ListenerState<P>>,
    drain: drain::Watch,
    stats: Arc<ListenerStats>,
    serve: S,
) where
    P: Send + Sync + 'static,
    S: Fn(Accepted<P>) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = match Listener::new(bound) {
        Ok(listener) => listener,
        Err(e) => {
            tracing::error!(target: "proxy", error = %e, "Listening socket can't be used");
            return;
        }
    };
    let mut stage = state.clone();
    let stopped = async {
        // An owner that is gone counts as a stop.
        let _ = stage.wait_for(|state| state.stage >= Stage::Draining).await;
    };
    tokio::pin!(stopped);
    let failures = Seldom::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stopped => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, remote)) => {
                let (state, drain, stats) = (state.clone(), drain.clone(), Arc::clone(&stats));
                let accepted = Accepted { socket, remote, state, drain, stats };
                tokio::spawn(serve(accepted));
            }
            Err(e) => pause_after(&e, &failures).await,
        }
    }
    // Connections that the kernel has accepted already are served: closing the socket would reset them.
    while let Some((socket, remote)) = listener.accept_waiting().await {
        let (state, drain, stats) = (state.clone(), drain.clone(), Arc::clone(&stats));
        tokio::spawn(serve(Accepted { socket, remote, state, drain, stats }));
    }
}

/// A connection that died in the queue is nothing; out of descriptors or memory needs a moment.
async fn pause_after(error: &io::Error, failures: &Seldom) {
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) {
        if let Some(before) = failures.due() {
            tracing::warn!(target: "proxy", %error, before, "Accept failed; if the error is EMFILE, raise the limit of open files");
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

/// Pause after a failed `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn new(bound: Bound) -> io::Result<Self> {
        Ok(match bound {
            Bound::Tcp(listener) => Self::Tcp(TcpListener::from_std(listener)?),
            Bound::Unix(listener) => Self::Unix(UnixListener::from_std(listener)?),
        })
    }

    async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        match self {
            Self::Tcp(listener) => {
                listener.accept().await.map(|(stream, remote)| (Socket::accepted(stream), Some(remote)))
            }
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| (Socket::unix(stream), None)),
        }
    }

    /// A connection that is there already, if any.
    async fn accept_waiting(&self) -> Option<(Socket, Option<SocketAddr>)> {
        poll_fn(|cx| {
            Poll::Ready(match self {
                Self::Tcp(listener) => match listener.poll_accept(cx) {
                    Poll::Ready(Ok((stream, remote))) => Some((Socket::accepted(stream), Some(remote))),
                    _ => None,
                },
                Self::Unix(listener) => match listener.poll_accept(cx) {
                    Poll::Ready(Ok((stream, _))) => Some((Socket::unix(stream), None)),
                    _ => None,
                },
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn accepted_connections_have_what_every_connection_wants() {
        let bound = bind(&Bind::Tcp("127.0.0.1:0".parse().unwrap()), 1).unwrap().remove(0);
        let listener = Listener::new(bound).unwrap();
        let Listener::Tcp(tcp) = &listener else { unreachable!("it is TCP") };
        let _client = TcpStream::connect(tcp.local_addr().unwrap()).await.unwrap();
        let (Socket::Tcp(stream, _), _) = listener.accept().await.unwrap() else { unreachable!("it is TCP") };
        let socket = SockRef::from(&stream);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
    }
}
