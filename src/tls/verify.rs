//! Whom a certificate speaks for: its chain to the mesh's roots, then its SPIFFE id instead of a host name.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::spiffe::SpiffeId;

/// Why a peer is not spoken to, although its chain may be good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerError {
    NoCertificate,
    /// Not X.509 as far as it has to be read.
    Malformed,
    NotYetValid,
    Expired,
    /// None, or more than one, URI in the subject's alternative names.
    NotOneUri(usize),
    NotAService(String),
    TrustDomain(Box<SpiffeId>),
    Unexpected {
        shown: Box<SpiffeId>,
        expected: Vec<SpiffeId>,
    },
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("it showed no certificate"),
            Self::Malformed => f.write_str("its certificate can't be read"),
            Self::NotYetValid => f.write_str("its certificate is not valid yet (compare the hosts' clocks)"),
            Self::Expired => f.write_str("its certificate has expired"),
            Self::NotOneUri(count) => {
                write!(f, "its certificate holds {count} URIs where a mesh identity is exactly one")
            }
            Self::NotAService(uri) => write!(f, "its identity {uri:?} is not that of a mesh service"),
            Self::TrustDomain(id) => write!(f, "its identity {id} is of another trust domain"),
            Self::Unexpected { shown, expected } => {
                write!(f, "its identity is {shown}, expected ")?;
                for (i, id) in expected.iter().enumerate() {
                    write!(f, "{}{id}", if i == 0 { "" } else { " or " })?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for PeerError {}

/// What a chain says of its holder, and when that holds: while all of its certificates are valid.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: Arc<SpiffeId>,
    not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl Peer {
    fn read(chain: &[CertificateDer<'_>]) -> Result<Self, PeerError> {
        let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
        let (mut not_before, mut not_after) = validity(leaf).ok_or(PeerError::Malformed)?;
        for certificate in &chain[1..] {
            let (from, until) = validity(certificate).ok_or(PeerError::Malformed)?;
            not_before = not_before.max(from);
            not_after = not_after.min(until);
        }
        Ok(Self { id: Arc::new(uri(leaf)?), not_before, not_after })
    }

    fn valid(&self, now: SystemTime) -> Result<(), PeerError> {
        if now < self.not_before {
            Err(PeerError::NotYetValid)
        } else if now > self.not_after {
            Err(PeerError::Expired)
        } else {
            Ok(())
        }
    }
}

/// Reads the identity of a chain, leaf first, and checks that all of it is valid at `now`. Signatures are
/// the handshake's matter; this is what has to hold for a resumed session too.
pub(super) fn identify(chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Peer, PeerError> {
    let peer = Peer::read(chain)?;
    peer.valid(now).map(|()| peer)
}

/// What chains that were seen before say. The same few peers come again and again, and reading a chain
/// costs more than looking it up.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<HashMap<Vec<u8>, Known>>);

#[derive(Debug)]
struct Known {
    /// All of the chain but its leaf, which is the key.
    rest: Vec<Vec<u8>>,
    peer: Arc<Peer>,
}

/// Leaves remembered at a time. A peer renews its own every few days.
const SEEN: usize = 512;

impl Seen {
    /// As [`identify`].
    pub(super) fn identify(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Arc<SpiffeId>, PeerError> {
        let (leaf, rest) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        let known = self.lock().get(leaf.as_ref()).filter(|known| known.has(rest)).map(|known| Arc::clone(&known.peer));
        let peer = match known {
            Some(peer) => peer,
            None => {
                let peer = Arc::new(Peer::read(chain)?);
                let rest = rest.iter().map(|certificate| certificate.to_vec()).collect();
                let mut seen = self.lock();
                if seen.len() >= SEEN {
                    seen.clear();
                }
                seen.insert(leaf.to_vec(), Known { rest, peer: Arc::clone(&peer) });
                peer
            }
        };
        peer.valid(now)?;
        Ok(Arc::clone(&peer.id))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn has(&self, rest: &[CertificateDer<'_>]) -> bool {
        self.rest.iter().map(Vec::as_slice).eq(rest.iter().map(|certificate| certificate.as_ref()))
    }
}

/// The single URI of the subject's alternative names, as a service's identity.
fn uri(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Malformed)?;
    let names = leaf.subject_alternative_name().map_err(|_| PeerError::Malformed)?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => SpiffeId::parse(uri).map_err(|e| PeerError::NotAService(e.0)),
        (first, more) => Err(PeerError::NotOneUri(more + usize::from(first.is_some()))),
    }
}

/// From when until when a certificate is valid; `None` when it can't be read.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let at =
        |seconds: i64| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)));
    let validity = certificate.validity();
    Some((at(validity.not_before.timestamp())?, at(validity.not_after.timestamp())?))
}

/// Checks the signatures of a chain, leaf first, up to one of the roots.
pub(super) fn chains_to(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    provider: &CryptoProvider,
    now: SystemTime,
) -> Result<(), rustls::Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(
        &ParsedCertificate::try_from(leaf)?,
        roots,
        intermediates,
        now,
        algorithms,
    )
}

/// Checks that `shown` is one of those expected.
pub(super) fn expect(shown: &SpiffeId, expected: &[SpiffeId]) -> Result<(), PeerError> {
    if expected.contains(shown) {
        return Ok(());
    }
    Err(PeerError::Unexpected { shown: Box::new(shown.clone()), expected: expected.to_vec() })
}

/// Verifies the server of a target: chain to the roots, and the identity that was meant.
#[derive(Debug)]
pub(super) struct ServerIdentity {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: Arc<[SpiffeId]>,
}

impl ServerIdentity {
    pub(super) fn new(roots: Arc<RootCertStore>, provider: Arc<CryptoProvider>, expected: Arc<[SpiffeId]>) -> Self {
        Self { roots, provider, expected }
    }
}

impl ServerCertVerifier for ServerIdentity {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        uri(end_entity)
            .and_then(|shown| expect(&shown, &self.expected))
            .map(|()| ServerCertVerified::assertion())
            .map_err(|e| rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(e)))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
