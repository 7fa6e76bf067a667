//! Facts from the kernel: listening processes, and the limit of open files (proc(5)).

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::check::Findings;

/// Limit of open files below which a warning is given: each connection takes two.
const FEW_FILES: u64 = 4096;

/// Looks at the limit of open files, which a sidecar raises as far as it may.
pub(super) fn limits(findings: &mut Findings) {
    match rlimit::Resource::NOFILE.get() {
        Ok((_, most)) if most < FEW_FILES => findings.warn(
            "open files",
            format!("at most {most} are allowed, and each connection takes two"),
            "raise LimitNOFILE of the unit, or `ulimit -Hn`",
        ),
        Ok((_, most)) => findings.ok("open files", format!("up to {most}")),
        Err(error) => findings.failed("open files", format!("the limit can't be read: {error}")),
    }
}

/// A listening TCP socket.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listening {
    at: SocketAddr,
    user: String,
    inode: String,
}

/// The process that listens at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    Nobody,
    /// Name and id of the process.
    Process(String, u32),
    /// A process that can't be looked at, of the user with this id.
    User(String),
}

impl Owner {
    pub(super) fn pid(&self) -> Option<u32> {
        if let Self::Process(_, pid) = self { Some(*pid) } else { None }
    }
}

/// The process that listens at `address`, or at an address that conflicts with it.
pub(super) fn owner(address: SocketAddr) -> Owner {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let found = tables.iter().flat_map(|table| table.lines()).filter_map(listening);
    let Some(found) = found.into_iter().find(|one| overlaps(one.at, address)) else { return Owner::Nobody };
    process(&format!("socket:[{}]", found.inode))
        .map_or(Owner::User(found.user), |(name, pid)| Owner::Process(name, pid))
}

/// The process that listens on the Unix socket at `path`.
pub(super) fn owner_of_path(path: &str) -> Owner {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let inode = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(7) == Some(&path)).then(|| fields.get(6).map(ToString::to_string)).flatten()
    });
    let Some(inode) = inode else { return Owner::Nobody };
    process(&format!("socket:[{inode}]")).map_or(Owner::User("?".into()), |(name, pid)| Owner::Process(name, pid))
}

/// A line of the table, if it is of a listening socket.
fn listening(line: &str) -> Option<Listening> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, local, _, LISTEN, _, _, _, user, _, inode, ..] = fields[..] else { return None };
    let (host, port) = local.split_once(':')?;
    // The kernel prints each word of an address as a number in the byte order of the host.
    let word = |at: usize| Some(u32::from_str_radix(host.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let host: IpAddr = if host.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let mut bytes = [0; 16];
        for (number, place) in bytes.chunks_exact_mut(4).enumerate() {
            place.copy_from_slice(&word(number * 8)?);
        }
        Ipv6Addr::from(bytes).to_canonical()
    };
    let at = SocketAddr::new(host, u16::from_str_radix(port, 16).ok()?);
    Some(Listening { at, user: user.to_owned(), inode: inode.to_owned() })
}

/// Whether one of two listeners keeps the other from its address.
fn overlaps(one: SocketAddr, other: SocketAddr) -> bool {
    let (one_ip, other_ip) = (one.ip(), other.ip());
    let is_any = one_ip.is_unspecified() || other_ip.is_unspecified();
    // A wildcard of IPv6 takes IPv4 as well, as a rule; one of IPv4 never takes IPv6.
    let same_family =
        one_ip.is_ipv4() == other_ip.is_ipv4() || one_ip == Ipv6Addr::UNSPECIFIED || other_ip == Ipv6Addr::UNSPECIFIED;
    one.port() == other.port() && (one_ip == other_ip || is_any && same_family)
}

/// Name and id of the process that has this open, as far as this user may look.
fn process(link: &str) -> Option<(String, u32)> {
    let ids: BTreeSet<u32> =
        fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    let has_it = |pid: &u32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd"));
        open.into_iter()
            .flatten()
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == link))
    };
    let pid = ids.into_iter().find(has_it)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some((name.trim().to_owned(), pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_read_from_the_kernels_table() {
        let line = |local: &str, state: &str| {
            format!(
                "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  1000        0 4242 1 x 100"
            )
        };
        // The kernel writes words as the processor has them.
        let loopback = format!("{:08X}:1F90", u32::from_ne_bytes([127, 0, 0, 1]));
        let found = listening(&line(&loopback, "0A")).unwrap();
        assert_eq!((found.at, &*found.user, &*found.inode), ("127.0.0.1:8080".parse().unwrap(), "1000", "4242"));
        assert_eq!(listening(&line(&loopback, "01")), None);
        assert_eq!(listening(&line(&format!("{}:0050", "0".repeat(32)), "0A")).unwrap().at, "[::]:80".parse().unwrap());
        for rubbish in ["", "  sl  local_address rem_address", "a b c 0A e f g h i j", &line("7F:1", "0A")] {
            assert_eq!(listening(rubbish), None);
        }
    }

    #[test]
    fn a_wildcard_is_in_the_way_of_each_address() {
        let overlap = |one: &str, other: &str| overlaps(one.parse().unwrap(), other.parse().unwrap());
        assert!(overlap("127.0.0.1:1", "127.0.0.1:1") && !overlap("127.0.0.1:1", "127.0.0.1:2"));
        assert!(overlap("0.0.0.0:1", "127.0.0.1:1") && overlap("127.0.0.1:1", "[::]:1"));
        assert!(!overlap("127.0.0.2:1", "127.0.0.1:1") && !overlap("0.0.0.0:1", "[::1]:1"));
    }

    #[test]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(owner(listener.local_addr().unwrap()).pid(), Some(std::process::id()));
    }
}
