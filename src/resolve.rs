//! Host names: looked up without holding anybody else up, and connected to over whichever of their addresses answers.
//!
//! The resolver is the C library's, so that `/etc/hosts` and nsswitch hold as everywhere else on the host; `hickory` knows no nsswitch.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::race::{Attempt, Next, Race};

/// The result of a look-up, shared by all tasks that waited for it.
type Found = Result<Arc<[IpAddr]>, (io::ErrorKind, String)>;
type Pending = watch::Receiver<Option<Found>>;

thread_local! {
    /// Names that tasks of this thread are looking up.
    static PENDING: RefCell<HashMap<String, Pending>> = RefCell::default();
}

/// The addresses of a name, as the C library's resolver finds them (`getaddrinfo`). That blocks, so each name has a thread
/// while it is looked up: one, however many wait for it, and also if the resolver never answers. The caller sets the time
/// limit.
///
/// # Errors
/// Those of the resolver, and that too many names are being looked up.
pub(crate) async fn lookup(name: &str) -> io::Result<Arc<[IpAddr]>> {
    let mut pending = pending(name)?;
    let found = pending.wait_for(Option::is_some).await.map(|found| found.clone());
    match found {
        Ok(Some(Ok(addresses))) => Ok(addresses),
        Ok(Some(Err((kind, text)))) => Err(io::Error::new(kind, text)),
        Ok(None) | Err(_) => Err(io::Error::other("the lookup of the name broke off")),
    }
}

/// The lookup of a name that is under way, or one that begins.
fn pending(name: &str) -> io::Result<Pending> {
    PENDING.with_borrow_mut(|pending| {
        if let Some(known) = pending.get(name) {
            return Ok(known.clone());
        }
        if pending.len() >= NAMES {
            let text = format!("more than {NAMES} names are being looked up: does the resolver answer?");
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        let (sender, found) = watch::channel(None);
        pending.insert(name.to_string(), found.clone());
        let name = name.to_string();
        tokio::spawn(async move {
            let looked_up = name.clone();
            // The port means nothing here.
            let resolve =
                move || (looked_up.as_str(), 0).to_socket_addrs().map(|found| found.map(|to| to.ip()).collect());
            let resolved = tokio::task::spawn_blocking(resolve).await.unwrap_or_else(|e| Err(io::Error::other(e)));
            PENDING.with_borrow_mut(|pending| pending.remove(&name));
            sender.send_replace(Some(resolved.map_err(|e| (e.kind(), e.to_string()))));
        });
        Ok(found)
    })
}

/// Connects to one of these addresses: to each beside those before it that have not answered for a while (RFC 8305,
/// section 5), so that a dead one costs no more than that.
///
/// # Errors
/// The first of the attempts', as the resolver's order is by preference.
pub(crate) async fn connect(addresses: &[IpAddr], port: u16) -> io::Result<TcpStream> {
    connect_address(addresses, port).await.map(|(stream, _)| stream)
}

/// As [`connect`], with the address that answered.
///
/// # Errors
/// As there.
pub(crate) async fn connect_address(addresses: &[IpAddr], port: u16) -> io::Result<(TcpStream, IpAddr)> {
    let mut left = alternating(addresses).into_iter().take(ADDRESSES);
    let mut first_error = None;
    let next = |failed: Option<io::Error>| {
        if let Some(error) = failed {
            first_error.get_or_insert(error);
        }
        match left.next() {
            Some(ip) => Next::Begin(attempt(ip, port), STAGGER),
            None => Next::Wait,
        }
    };
    let connected = Race::new().run(next).await;
    connected.ok_or_else(|| first_error.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no address")))
}

/// The addresses of a name in the order in which a client is to use them that waits long for each: one that answers now
/// comes first. To find it, it is connected to. Where each family has one address at most, nothing is changed, as clients
/// try a family beside the other.
pub(crate) async fn answering_first(addresses: &[IpAddr], port: u16) -> Vec<IpAddr> {
    let mut order = addresses.to_vec();
    let of_v6 = addresses.iter().filter(|ip| ip.is_ipv6()).count();
    if of_v6 > 1 || addresses.len() - of_v6 > 1 {
        // The client finds out itself why none of them answers.
        if let Ok((_, answers)) = connect_address(addresses, port).await {
            order.sort_by_key(|ip| *ip != answers);
        }
    }
    order
}

fn attempt(ip: IpAddr, port: u16) -> Attempt<(TcpStream, IpAddr), io::Error> {
    Box::pin(async move { Ok((TcpStream::connect(SocketAddr::from((ip, port))).await?, ip)) })
}

/// The families by turns, as one of them may not get through at all (RFC 8305, section 4); each in its order.
fn alternating(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv6() == first_is_v6);
    let mut order = Vec::with_capacity(addresses.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    loop {
        let before = order.len();
        order.extend(first.next());
        order.extend(second.next());
        if order.len() == before {
            return order;
        }
    }
}

/// Time after which the next address is tried beside the first (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried at most.
const ADDRESSES: usize = 16;
/// Concurrent name look-ups of one thread of the data plane.
const NAMES: usize = 64;

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns() {
        for (given, order) in [
            (&[][..], &[][..]),
            (&["::1", "::2", "::3", "10.0.0.1"], &["::1", "10.0.0.1", "::2", "::3"]),
            (&["10.0.0.1", "10.0.0.2", "::1"], &["10.0.0.1", "::1", "10.0.0.2"]),
        ] {
            assert_eq!(alternating(&ips(given)), ips(order));
        }
    }

    #[tokio::test]
    async fn a_name_is_looked_up_once_for_all_who_ask() {
        let lookups = (0..200).map(|_| tokio::task::spawn(async { lookup("localhost").await }));
        let lookups: Vec<_> = lookups.collect();
        for lookup in lookups {
            assert!(lookup.await.unwrap().unwrap().iter().all(IpAddr::is_loopback));
        }
        assert!(PENDING.with_borrow(HashMap::is_empty));
        assert!(lookup("no such name").await.is_err());
    }

    #[tokio::test]
    async fn names_that_are_never_found_hold_up_so_many_and_no_more() {
        let (_tell, never) = watch::channel(None);
        PENDING.with_borrow_mut(|pending| {
            pending.extend((0..NAMES).map(|number| (format!("name-{number}"), never.clone())));
        });
        assert_eq!(lookup("localhost").await.unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        let waits = tokio::time::timeout(Duration::from_millis(20), lookup("name-0"));
        assert!(waits.await.is_err());
        PENDING.with_borrow_mut(HashMap::clear);
        assert!(lookup("localhost").await.is_ok());
    }

    #[tokio::test]
    async fn one_that_answers_comes_first() {
        let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Its queue is full, so that it takes no connection and refuses none.
        let swallows = TcpSocket::new_v4().unwrap();
        swallows.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
        let swallows = swallows.listen(0).unwrap();
        let _queued = TcpStream::connect(swallows.local_addr().unwrap()).await.unwrap();
        for (given, order) in [
            (&["127.0.0.1", "127.0.0.2", "127.0.0.3"][..], &["127.0.0.3", "127.0.0.1", "127.0.0.2"][..]),
            (&["127.0.0.1", "::1"], &["127.0.0.1", "::1"]),
        ] {
            assert_eq!(answering_first(&ips(given), port).await, ips(order));
        }
        drop(listener);
        let none = ips(&["127.0.0.2", "127.0.0.3"]);
        assert_eq!(answering_first(&none, port).await, none);
    }

    /// A port that 127.0.0.3 listens on. The other two addresses are held, so that nobody else listens there.
    async fn one_listens_of_three() -> (TcpListener, [tokio::net::TcpSocket; 2], u16) {
        loop {
            let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let silent = [1, 2]
                .map(|last| (tokio::net::TcpSocket::new_v4().unwrap(), SocketAddr::from(([127, 0, 0, last], port))));
            if silent.iter().all(|(socket, address)| socket.bind(*address).is_ok()) {
                return (listener, silent.map(|(socket, _)| socket), port);
            }
        }
    }

    #[tokio::test]
    async fn the_next_address_is_tried_when_one_fails() {
        let (_listener, _silent, port) = one_listens_of_three().await;
        let (_, ip) = connect_address(&ips(&["127.0.0.1", "127.0.0.2", "127.0.0.3"]), port).await.unwrap();
        assert_eq!(ip, ips(&["127.0.0.3"])[0]);
        let refused = connect(&ips(&["127.0.0.1", "127.0.0.2"]), port).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect(&[], port).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
