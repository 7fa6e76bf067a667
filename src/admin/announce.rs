//! How the commands of this host find a sidecar: it says where its admin server listens.
//!
//! On a Unix socket of an abstract name (unix(7)), which is no file, ends with the process, and is seen where the loopback
//! address is the same. It says the address and nothing else: the admin server decides who may read more.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Beginning of the abstract socket names. The rest is random: process ids are not unique where containers share a
/// network.
const PREFIX: &str = "lictor-admin/";

/// Time for the other end to send or to read the address.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Longest address that is read, in bytes.
const LONGEST: u64 = 4 * 1024;

/// Says to each who asks where the admin server listens, without end.
pub(super) async fn serve(address: &str) {
    let listener = match listen() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::debug!(target: "admin", %error, "Commands of this host can't find this sidecar without -admin");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((mut stream, _)) => {
                let _ = timeout(TIMEOUT, stream.write_all(address.as_bytes())).await;
            }
            // Out of descriptors, most likely: some are free again in a moment.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn listen() -> io::Result<UnixListener> {
    let name = format!("{PREFIX}{:016x}", fastrand::u64(..));
    let listener = std::os::unix::net::UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// A sidecar of this host, by what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announced {
    /// Where its admin server listens, as written in `-admin-bind`.
    At(String),
    /// It belongs to this user, and may be anybody's program: it is not asked.
    OtherUser(u32),
}

/// The sidecars of this host, in no order. Those of other users are asked by root alone.
///
/// # Errors
/// When the table of sockets cannot be read.
pub async fn announced() -> anyhow::Result<Vec<Announced>> {
    let table = std::fs::read_to_string("/proc/net/unix").context("can't read /proc/net/unix")?;
    let mut requests: JoinSet<_> = names(&table).map(|name| timeout(TIMEOUT, request(name.to_owned()))).collect();
    let mut found = Vec::new();
    while let Some(answer) = requests.join_next().await {
        // A sidecar that has just ended, or does not answer, is left out.
        if let Ok(Ok(Ok(one))) = answer {
            found.push(one);
        }
    }
    Ok(found)
}

/// Names that sidecars listen on, of the kernel's table (proc_net(5)), where `@` stands for the zero that they begin with.
fn names(table: &str) -> impl Iterator<Item = &str> {
    let listed = table.lines().filter_map(|line| line.rsplit_once(" @")).map(|(_, name)| name);
    listed.filter(|name| {
        let drawn = name.strip_prefix(PREFIX);
        drawn.is_some_and(|drawn| drawn.len() == 16 && drawn.bytes().all(|byte| byte.is_ascii_hexdigit()))
    })
}

async fn request(name: String) -> anyhow::Result<Announced> {
    let stream = std::os::unix::net::UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    let (owner, own) = (stream.peer_cred()?.uid(), own_user()?);
    if owner != own && own != 0 {
        return Ok(Announced::OtherUser(owner));
    }
    let mut address = String::new();
    stream.take(LONGEST).read_to_string(&mut address).await?;
    if address.is_empty() {
        bail!("the socket sent no address");
    }
    Ok(Announced::At(address))
}

/// The user of this process: that of a socket of its own.
fn own_user() -> io::Result<u32> {
    let (one, _other) = UnixStream::pair()?;
    Ok(one.peer_cred()?.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_are_asked() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000: 00000002 00000000 00010000 0001 01 11 @lictor-admin/0123456789abcdef\n\
            0000: 00000002 00000000 00010000 0001 01 12 @lictor-admin/0123456789abcdeg\n\
            0000: 00000002 00000000 00010000 0001 01 13 /run/x @lictor-admin/\n\
            0000: 00000002 00000000 00010000 0001 01 14\n\
            0000: 00000002 00000000 00010000 0001 01 15 @other\n";
        assert_eq!(names(table).collect::<Vec<_>>(), ["lictor-admin/0123456789abcdef"]);
    }

    #[tokio::test]
    async fn a_sidecar_says_where_it_is_until_it_ends() {
        let address = format!("unix:///nowhere/{:x}", fastrand::u64(..));
        let here = Announced::At(address.clone());
        let task = tokio::spawn(async move { serve(&address).await });
        while !announced().await.unwrap().contains(&here) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        task.abort();
        let _ = task.await;
        assert!(!announced().await.unwrap().contains(&here));
    }
}
