//! A TLS session without a socket, and the only file that names rustls' unbuffered interface.
//!
//! [`Session::receive`] opens received bytes in place, [`Session::seal`] seals plaintext. The session keeps no bytes:
//! its caller holds back those of a record that is not whole, and sends what is appended to `outgoing`. rustls 0.24
//! replaces that interface; docs/architecture.md says what the move will take.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::server::{Acceptor, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, Error, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};

use super::sides::Server;

/// One side of a TLS connection.
pub(super) enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// The state of a session when no complete record is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The handshake needs more bytes.
    NeedsMore,
    /// The handshake is complete.
    Established,
    /// The peer's direction has ended.
    PeerClosed,
}

/// What sealing adds at most: header, type and tag of each record of 16 KiB, and an answer or two of the protocol's own.
pub(super) const fn overhead(plain: usize) -> usize {
    (plain / (16 * 1024) + 2) * 64
}

/// The same call on either side: their types have no trait in common.
macro_rules! on_either {
    ($session:expr, $connection:ident => $call:expr) => {
        match $session {
            Session::Client($connection) => $call,
            Session::Server($connection) => $call,
        }
    };
}

impl Session {
    pub(super) fn client(config: &Arc<ClientConfig>, name: &ServerName<'static>) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(Arc::clone(config), name.clone())?;
        Ok(Self::Client(Box::new(connection)))
    }

    pub(super) fn server(config: &Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::Server(Box::new(UnbufferedServerConnection::new(Arc::clone(config))?)))
    }

    /// Processes the records in `wire` as far as they are whole. Plaintext is given to `take`, answers are appended
    /// to `outgoing`. Tells how many bytes were used; the others must come again, in front of those that follow.
    ///
    /// # Errors
    /// When the peer breaks the protocol or is refused; the alert that says so is in `outgoing` then.
    pub(super) fn receive(
        &mut self,
        wire: &mut [u8],
        take: &mut impl FnMut(&[u8]),
        outgoing: &mut Vec<u8>,
    ) -> Result<(usize, Next), Error> {
        let mut used = 0;
        loop {
            let rest = &mut wire[used..];
            let (done, next) = on_either!(self, it => step(it.process_tls_records(rest), take, outgoing));
            used += done;
            if let Some(next) = next.inspect_err(|_| self.collect_alert(&mut wire[used..], outgoing))? {
                return Ok((used, next));
            }
        }
    }

    /// After an error the session holds the alert that tells the peer.
    fn collect_alert(&mut self, wire: &mut [u8], outgoing: &mut Vec<u8>) {
        // Nothing else may be asked of a session that has failed: it would look at the same bytes again.
        while on_either!(self, it => it.wants_write())
            && on_either!(self, it => step(it.process_tls_records(wire), &mut |_| {}, outgoing)).1.is_ok()
        {}
    }

    /// Seals `what` into `room` and returns how much of it was used. `held` is what is held back of the incoming
    /// bytes: the session remembers how far it has looked at them and must find them again at every call.
    pub(super) fn seal(&mut self, what: Emit<'_>, held: &mut [u8], room: &mut [u8]) -> io::Result<usize> {
        on_either!(self, it => emit(it.process_tls_records(held), what, room))
    }

    /// As [`Session::seal`], behind what `outgoing` holds.
    pub(super) fn seal_behind(&mut self, what: Emit<'_>, held: &mut [u8], outgoing: &mut Vec<u8>) -> io::Result<()> {
        let start = outgoing.len();
        let plain = if let Emit::Data(plain) = what { plain.len() } else { 0 };
        outgoing.resize(start + plain + overhead(plain), 0);
        let sealed = self.seal(what, held, &mut outgoing[start..]);
        outgoing.truncate(start + *sealed.as_ref().unwrap_or(&0));
        sealed.map(|_| ())
    }

    pub(super) fn is_client(&self) -> bool {
        matches!(self, Self::Client(_))
    }

    pub(super) fn is_handshaking(&self) -> bool {
        on_either!(self, it => it.is_handshaking())
    }

    pub(super) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        on_either!(self, it => it.peer_certificates())
    }

    pub(super) fn alpn(&self) -> Option<&[u8]> {
        on_either!(self, it => it.alpn_protocol())
    }
}

/// Reads a client's first message, which decides what it is answered with.
#[derive(Default)]
pub(super) struct ClientHello(Acceptor);

impl ClientHello {
    /// Takes more of the message in. Gives the configuration of `server` for what the client offers, or for nothing when
    /// this is no such message; `None` asks for more bytes.
    pub(super) fn read<'a>(&mut self, mut news: &[u8], server: &'a Server) -> Option<&'a Arc<ServerConfig>> {
        match self.0.read_tls(&mut news).map_or(Ok(None), |_| self.0.accept()) {
            Ok(Some(accepted)) => Some(server.config(accepted.client_hello().alpn().into_iter().flatten())),
            Ok(None) if news.is_empty() => None,
            // The session comes to the same end, and tells the peer why.
            _ => Some(server.config([])),
        }
    }
}

/// Data that a session can seal.
#[derive(Clone, Copy)]
pub(super) enum Emit<'a> {
    Data(&'a [u8]),
    /// The `close_notify` that ends our direction.
    Close,
}

fn emit<D>(status: UnbufferedStatus<'_, '_, D>, what: Emit<'_>, room: &mut [u8]) -> io::Result<usize> {
    let refused = |error: EncryptError| io::Error::other(error.to_string());
    match (status.state, what) {
        (Ok(ConnectionState::WriteTraffic(mut to)), Emit::Data(plain)) => to.encrypt(plain, room).map_err(refused),
        (Ok(ConnectionState::WriteTraffic(mut to)), Emit::Close) => to.queue_close_notify(room).map_err(refused),
        (Ok(_), _) => Err(io::ErrorKind::NotConnected.into()),
        (Err(e), _) => Err(io::Error::new(io::ErrorKind::InvalidData, e)),
    }
}

/// One step of a session: how many bytes of its input are done with, and where it stands; `None` asks for another step.
fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    take: &mut impl FnMut(&[u8]),
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Option<Next>, Error>) {
    let mut used = status.discard;
    let next = status.state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                used += record.discard;
                take(record.payload);
            }
            Ok(None)
        }
        ConnectionState::EncodeTlsData(data) => encode(data, outgoing).map(|()| None),
        // It stands in `outgoing`, which is flushed in order: as good as transmitted.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(None)
        }
        ConnectionState::BlockedHandshake => Ok(Some(Next::NeedsMore)),
        ConnectionState::WriteTraffic(_) => Ok(Some(Next::Established)),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Some(Next::PeerClosed)),
        _ => Err(Error::General("an unexpected state of the TLS session".into())),
    });
    (used, next)
}

/// Appends one handshake message, which says how long it is when it does not fit.
fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let start = outgoing.len();
    let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) else { return Ok(()) };
    outgoing.resize(start + size.required_size, 0);
    data.encode(&mut outgoing[start..]).map(|_| ()).map_err(|e| Error::General(e.to_string()))
}

#[cfg(test)]
mod tests;
