//! Checks of TLS on the wire, and of the certificates of peers.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use webpki::EndEntityCert;

use super::spiffe::SpiffeId;
use super::verify;
use super::{Client, HandshakeError, ReadSide, Server, Stream, TUNNEL, with_scratch};
use crate::testing::ca::{Ca, uri};

struct Mesh {
    server: Arc<Server>,
    client: Arc<Client>,
    leaf: Vec<u8>,
}

static MESH: LazyLock<Mesh> = LazyLock::new(|| {
    let ca = Ca::new();
    let server = ca.credentials("db").server(&[TUNNEL, b"h2"]).unwrap();
    let expected = SpiffeId::parse(&uri("db")).unwrap();
    let client = ca.credentials("web").client("db.mesh", vec![expected], &[TUNNEL]).unwrap();
    let leaf = CertificateDer::from_pem_slice(ca.leaf("web").cert_pem.as_bytes()).unwrap().to_vec();
    Mesh { server, client, leaf }
});

/// Bytes on the wire. The first byte says to whom: to a server, to a client, or as changes of what two of ours say
/// to each other.
pub fn tls_wire(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let piece = usize::from(first >> 2).max(1);
    match first & 3 {
        0 => assert!(alone(rest, piece, |pipe| Stream::accept_offer(pipe, &MESH.server)).is_err()),
        1 => assert!(alone(rest, piece, |pipe| Stream::connect(pipe, &MESH.client)).is_err()),
        _ => between(rest),
    }
}

/// Shakes hands with somebody who has no certificate, only these bytes.
fn alone<F>(bytes: &[u8], piece: usize, shake: impl FnOnce(Pipe) -> F) -> Result<(), HandshakeError>
where
    F: Future<Output = Result<Stream<Pipe>, HandshakeError>>,
{
    let pipe = Pipe::default();
    pipe.0.borrow_mut().piece = piece;
    pipe.0.borrow_mut().incoming.extend_from_slice(bytes);
    pipe.0.borrow_mut().ended = true;
    let mut shaken = pin!(shake(pipe));
    match poll(shaken.as_mut()) {
        Poll::Ready(ended) => ended.map(drop),
        Poll::Pending => panic!("it waits although all is there"),
    }
}

/// A client and a server, and somebody between them who may drop, repeat, change and add bytes.
fn between(mut changes: &[u8]) {
    let (near, far) = (Pipe::default(), Pipe::default());
    let mut client = pin!(Stream::connect(near.clone(), &MESH.client));
    let mut server = pin!(Stream::accept_offer(far.clone(), &MESH.server));
    let (mut connected, mut accepted) = (None, None);
    for _ in 0..8 {
        step(client.as_mut(), &mut connected);
        carry(&near, &far, &mut changes);
        step(server.as_mut(), &mut accepted);
        carry(&far, &near, &mut changes);
    }
    let (Some(Ok(mut client)), Some(Ok(mut server))) = (connected, accepted) else { return };
    assert!(MESH.server.authenticate(server.peer_certificates(), SystemTime::now()).is_ok());
    assert!(MESH.client.authenticate(client.peer_certificates(), SystemTime::now()).is_ok());
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    for round in 0..6_u8 {
        let said = vec![round; usize::from(round) * 700 + 1];
        let spoken = say(&mut client, &said);
        carry(&near, &far, &mut changes);
        if receive(&mut server, &mut asked).and(spoken).is_err() {
            break;
        }
        let spoken = say(&mut server, &said);
        carry(&far, &near, &mut changes);
        if receive(&mut client, &mut answered).and(spoken).is_err() {
            break;
        }
    }
    let all: Vec<u8> = (0..6_u8).flat_map(|round| vec![round; usize::from(round) * 700 + 1]).collect();
    for received in [asked, answered] {
        assert!(all.starts_with(&received), "something is heard that nobody said");
    }
}

fn step<F: Future>(future: Pin<&mut F>, output: &mut Option<F::Output>) {
    if output.is_none()
        && let Poll::Ready(ready) = poll(future)
    {
        *output = Some(ready);
    }
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

fn say(stream: &mut Stream<Pipe>, plain: &[u8]) -> io::Result<()> {
    let mut cx = Context::from_waker(Waker::noop());
    with_scratch(|scratch| stream.poll_seal(&mut cx, scratch, plain))
}

/// Opens what is there.
fn receive(stream: &mut Stream<Pipe>, received: &mut Vec<u8>) -> io::Result<()> {
    let mut cx = Context::from_waker(Waker::noop());
    while stream.read_side() == ReadSide::Open {
        let opened = with_scratch(|scratch| {
            let opened = stream.poll_open(&mut cx, scratch);
            received.extend_from_slice(&scratch.opened);
            opened
        });
        match opened {
            Poll::Ready(opened) => opened?,
            Poll::Pending => break,
        }
        let _ = stream.poll_flush(&mut cx);
    }
    Ok(())
}

/// Brings what was written to the other side, with the next change.
fn carry(from: &Pipe, to: &Pipe, changes: &mut &[u8]) {
    let mut bytes = std::mem::take(&mut from.0.borrow_mut().outgoing);
    let [kind, high, low, value] = next(changes);
    let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len().max(1);
    match kind % 8 {
        1 if !bytes.is_empty() => bytes[at] ^= value.max(1),
        2 => bytes.truncate(at),
        3 => bytes.extend_from_within(at..),
        4 => drop(bytes.splice(at..at, changes.iter().take(usize::from(value)).copied())),
        5 if !bytes.is_empty() => drop(bytes.drain(at..(at + usize::from(value)).min(bytes.len()))),
        6 => to.0.borrow_mut().piece = usize::from(value).max(1),
        7 => to.0.borrow_mut().ended = true,
        _ => {}
    }
    to.0.borrow_mut().incoming.extend_from_slice(&bytes);
}

/// Nothing is changed once the changes are used up.
fn next(changes: &mut &[u8]) -> [u8; 4] {
    let Some((change, rest)) = changes.split_first_chunk() else { return [0; 4] };
    *changes = rest;
    *change
}

/// One end of a connection in memory.
#[derive(Clone, Default)]
struct Pipe(Rc<RefCell<Ends>>);

#[derive(Default)]
struct Ends {
    incoming: Vec<u8>,
    /// Most bytes that one read gives; zero is no limit.
    piece: usize,
    ended: bool,
    outgoing: Vec<u8>,
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut ends = self.0.borrow_mut();
        if ends.incoming.is_empty() && !ends.ended {
            return Poll::Pending;
        }
        let piece = if ends.piece == 0 { usize::MAX } else { ends.piece };
        let count = ends.incoming.len().min(piece).min(to.remaining());
        to.put_slice(&ends.incoming[..count]);
        ends.incoming.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().outgoing.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A certificate of a peer, an identity as text, or changes of a certificate that is good.
pub fn certificate(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    match first % 3 {
        0 => certificate_of(rest),
        1 => identity(rest),
        _ => changed(rest),
    }
}

/// Another reader of certificates finds the same identity.
fn certificate_of(der: &[u8]) {
    let der = CertificateDer::from(der);
    let Ok(id) = verify::uri(&der) else { return };
    assert_eq!(SpiffeId::parse(&id.to_string()), Ok(id.clone()));
    let Ok(other) = EndEntityCert::try_from(&der) else { return };
    let uris: Vec<&str> = other.valid_uri_names().collect();
    assert!(uris.iter().all(|uri| SpiffeId::parse(uri).as_ref() == Ok(&id)), "{uris:?} are not {id}");
}

/// What is printed is read alike.
fn identity(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    let Ok(id) = SpiffeId::parse(text) else { return };
    assert_eq!(SpiffeId::parse(&id.to_string()), Ok(id.clone()));
    for part in [&id.trust_domain, &id.partition, &id.namespace, &id.datacenter, &id.service] {
        assert!(!part.is_empty());
    }
}

/// No change of what an authority signed makes another identity of it.
fn changed(mut changes: &[u8]) {
    let mut leaf = MESH.leaf.clone();
    for _ in 0..8 {
        let [kind, high, low, value] = next(&mut changes);
        let at = usize::from(u16::from_be_bytes([high, low])) % leaf.len().max(1);
        match kind % 4 {
            1 if !leaf.is_empty() => leaf[at] ^= value,
            2 => drop(leaf.splice(at..at, changes.iter().take(usize::from(value)).copied())),
            3 if !leaf.is_empty() => drop(leaf.drain(at..(at + usize::from(value)).min(leaf.len()))),
            _ => {}
        }
    }
    certificate_of(&leaf);
    let chain = [CertificateDer::from(leaf)];
    if let Ok(peer) = MESH.server.authenticate(Some(&chain), SystemTime::now()) {
        assert_eq!(peer.id.to_string(), uri("web"));
    }
}
