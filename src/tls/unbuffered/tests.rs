//! What only tests ask of a session, and a session fed by hand.

use std::sync::Arc;

use rustls::{HandshakeKind, ServerConfig, SupportedCipherSuite};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Emit, Next, Session, overhead};
use crate::testing::ca::{Ca, uri};
use crate::tls::{HandshakeError, SpiffeId, Stream};

impl<IO: AsyncRead + AsyncWrite + Unpin> Stream<IO> {
    /// Shakes hands as the server of a connection, whatever the client offers.
    pub(crate) async fn accept(io: IO, config: &Arc<ServerConfig>) -> Result<Self, HandshakeError> {
        Self::shake(io, Session::server(config).map_err(HandshakeError::Tls)?, Vec::new()).await
    }

    /// Whether the handshake was a full one or resumed an earlier session.
    pub(crate) fn handshake_kind(&self) -> Option<HandshakeKind> {
        on_either!(&self.session, it => it.handshake_kind())
    }

    /// Version and cipher suite.
    pub(crate) fn agreed(&self) -> (String, String) {
        let (version, suite) = on_either!(&self.session, it => (it.protocol_version(), it.negotiated_cipher_suite()));
        let name = |suite: SupportedCipherSuite| suite.suite().as_str().unwrap_or_default().to_owned();
        (
            version.and_then(|version| version.as_str()).unwrap_or_default().to_owned(),
            suite.map(name).unwrap_or_default(),
        )
    }
}

/// What one side has received and not used, and what it has to send.
struct Side {
    session: Session,
    held: Vec<u8>,
    outgoing: Vec<u8>,
    opened: Vec<u8>,
}

impl Side {
    fn new(session: Session) -> Self {
        Self { session, held: Vec::new(), outgoing: Vec::new(), opened: Vec::new() }
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<Next, rustls::Error> {
        self.held.extend_from_slice(bytes);
        let mut take = |plain: &[u8]| self.opened.extend_from_slice(plain);
        let (used, next) = self.session.receive(&mut self.held, &mut take, &mut self.outgoing)?;
        self.held.drain(..used);
        Ok(next)
    }

    fn seal(&mut self, what: Emit<'_>) -> Vec<u8> {
        let mut sealed = Vec::new();
        self.session.seal_behind(what, &mut self.held, &mut sealed).unwrap();
        sealed
    }
}

/// Brings what one side has to send to the other.
fn carry(from: &mut Side, to: &mut Side, piece: usize) {
    for bytes in std::mem::take(&mut from.outgoing).chunks(piece) {
        to.receive(bytes).unwrap();
    }
}

/// Two sides whose handshake is complete, carried `piece` bytes at a time.
fn established(piece: usize) -> (Side, Side) {
    let ca = Ca::new();
    let server = ca.credentials("db").server(&[b"h2"]).unwrap();
    let client = ca.credentials("web").client("db.mesh", vec![SpiffeId::parse(&uri("db")).unwrap()], &[b"h2"]).unwrap();
    let mut near = Side::new(Session::client(client.config(), client.name()).unwrap());
    let mut far = Side::new(Session::server(server.config([&b"h2"[..]])).unwrap());
    assert_eq!(near.receive(&[]).unwrap(), Next::NeedsMore);
    for _ in 0..4 {
        carry(&mut near, &mut far, piece);
        carry(&mut far, &mut near, piece);
    }
    assert!(!near.session.is_handshaking() && !far.session.is_handshaking());
    (near, far)
}

#[test]
fn a_session_takes_bytes_in_any_pieces_and_says_when_it_needs_more() {
    for piece in [1, 7, usize::MAX] {
        let (near, far) = established(piece);
        for side in [&near, &far] {
            assert_eq!(side.session.alpn(), Some(&b"h2"[..]));
            assert!(side.session.peer_certificates().is_some());
        }
        assert!(near.session.is_client() && !far.session.is_client());
    }
}

#[test]
fn what_is_sealed_is_opened_in_order_and_within_the_overhead() {
    let (mut near, mut far) = established(usize::MAX);
    let mut all = Vec::new();
    for size in [1, 100, 16 * 1024, 64 * 1024] {
        let plain = vec![7; size];
        let sealed = near.seal(Emit::Data(&plain));
        assert!(sealed.len() <= size + overhead(size), "{} for {size}", sealed.len());
        // The first bytes of a record are held back, and found again with the rest.
        let (first, rest) = sealed.split_at(3);
        assert_eq!(far.receive(first).unwrap(), Next::Established);
        assert_eq!((far.held.len(), far.opened.len()), (3, all.len()));
        assert_eq!(far.receive(rest).unwrap(), Next::Established);
        all.extend(plain);
        assert!(far.opened == all && far.held.is_empty());
    }
}

#[test]
fn a_side_seals_while_it_holds_back_the_beginning_of_a_record() {
    let (mut near, mut far) = established(usize::MAX);
    let sealed = near.seal(Emit::Data(b"question"));
    far.receive(&sealed[..9]).unwrap();
    let answer = far.seal(Emit::Data(b"answer"));
    near.receive(&answer).unwrap();
    far.receive(&sealed[9..]).unwrap();
    assert_eq!((near.opened.as_slice(), far.opened.as_slice()), (&b"answer"[..], &b"question"[..]));
}

#[test]
fn the_end_of_a_direction_is_told_and_ends_only_that_one() {
    let (mut near, mut far) = established(usize::MAX);
    let end = near.seal(Emit::Close);
    assert_eq!(far.receive(&end).unwrap(), Next::PeerClosed);
    let rest = far.seal(Emit::Data(b"rest"));
    near.receive(&rest).unwrap();
    assert_eq!(near.opened, b"rest");
}

#[test]
fn bytes_that_are_no_tls_leave_an_alert_to_send() {
    let ca = Ca::new();
    let server = ca.credentials("db").server(&[]).unwrap();
    let mut far = Side::new(Session::server(server.config([])).unwrap());
    assert!(far.receive(b"GET / HTTP/1.1\r\n\r\n").is_err());
    // An alert's content type.
    assert_eq!(far.outgoing.first(), Some(&21));
}
