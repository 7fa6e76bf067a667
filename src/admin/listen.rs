//! Where the admin server listens.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::guard;
use crate::config::AdminBind;

/// How many ports after a default one that is taken are tried.
const NEXT_PORTS: u16 = 1_000;

pub(super) enum Listener {
    Tcp { listener: TcpListener, host: Option<String> },
    Unix { listener: UnixListener, path: SocketFile },
}

/// Removed with the listener.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds what was asked for; the default address gives way to the next port that is free. `None` where it is turned off.
///
/// # Errors
/// When an address that was asked for can't be bound.
pub(super) fn admin(bind: &AdminBind) -> anyhow::Result<Option<Listener>> {
    Ok(Some(match bind {
        AdminBind::Off => return Ok(None),
        AdminBind::Unix(path) => unix(path)?,
        AdminBind::Tcp(address) => tcp(*address)?,
        AdminBind::Default(address) => match tcp(*address) {
            Ok(listener) => listener,
            Err(_) => match next_free(*address) {
                Some(listener) => {
                    tracing::warn!(
                        target: "admin",
                        taken = %address,
                        address = %listener.address(),
                        "The default admin address is taken: using the next free port; -admin-bind gives each sidecar its own"
                    );
                    listener
                }
                None => {
                    tracing::warn!(target: "admin", taken = %address, "No port is free for the admin server: going on without it");
                    return Ok(None);
                }
            },
        },
    }))
}

fn next_free(address: SocketAddr) -> Option<Listener> {
    let ports = (1..NEXT_PORTS).filter_map(|step| address.port().checked_add(step));
    ports.map(|port| SocketAddr::new(address.ip(), port)).find_map(|address| tcp(address).ok())
}

/// # Errors
/// When the address can't be bound.
pub(super) fn tcp(address: SocketAddr) -> anyhow::Result<Listener> {
    let listener = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    let listener = listener.with_context(|| format!("can't listen on {address} for the admin server"))?;
    Ok(Listener::Tcp { listener, host: None })
}

fn unix(path: &Path) -> anyhow::Result<Listener> {
    // One that was left behind would be in the way; one that is in use answers.
    if std::os::unix::net::UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("can't listen on unix://{} for the admin server", path.display()))?;
    Ok(Listener::Unix { listener, path: SocketFile(path.to_owned()) })
}

impl Listener {
    /// As it is written in `-admin-bind`.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp { listener, .. } => listener.local_addr().map_or_else(|_| String::new(), |at| at.to_string()),
            Self::Unix { path, .. } => format!("unix://{}", path.0.display()),
        }
    }

    pub(super) async fn accept(&mut self) -> io::Result<Connection> {
        match self {
            Self::Tcp { listener, host } => {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok(Connection::Tcp { stream, host: host.clone() })
            }
            Self::Unix { listener, .. } => Ok(Connection::Unix { stream: listener.accept().await?.0 }),
        }
    }
}

pub(super) enum Connection {
    Tcp { stream: TcpStream, host: Option<String> },
    Unix { stream: UnixStream },
}

impl Connection {
    /// The host that requests may name beside addresses, for [`guard::check`].
    pub(super) fn own_host(&self) -> Option<String> {
        match self {
            Self::Tcp { host, .. } => host.clone(),
            Self::Unix { .. } => Some(guard::ANY_HOST.to_owned()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp { stream, .. } => Pin::new(stream).poll_read(cx, buf),
            Self::Unix { stream } => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp { stream, .. } => Pin::new(stream).poll_write(cx, buf),
            Self::Unix { stream } => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp { stream, .. } => Pin::new(stream).poll_flush(cx),
            Self::Unix { stream } => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            Self::Unix { stream } => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
