//! Binds the admin server's listener.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::either::Either;

use crate::config::AdminBind;

/// Ports after the default one that are tried when it is taken.
const NEXT_PORTS: u16 = 1_000;

/// A connection to the admin server.
pub(super) type Connection = Either<TcpStream, UnixStream>;

pub(super) enum Listener {
    Tcp(TcpListener),
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
    Ok(Listener::Tcp(listener))
}

fn unix(path: &Path) -> anyhow::Result<Listener> {
    // A socket file that a dead process left behind makes `bind` fail. A live server accepts the connection.
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
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| String::new(), |at| at.to_string()),
            Self::Unix { path, .. } => format!("unix://{}", path.0.display()),
        }
    }

    pub(super) async fn accept(&mut self) -> io::Result<Connection> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok(Either::Left(stream))
            }
            Self::Unix { listener, .. } => Ok(Either::Right(listener.accept().await?.0)),
        }
    }
}
