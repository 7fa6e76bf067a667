//! Which service a certificate proves: its path to the roots of the trust domain that it claims, then its SPIFFE id instead
//! of a host name.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature_with_raw_key;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::RawPublicKeyEntity;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate::{Certificate, Validity};
use super::refusal::{PeerError, Purpose};
use super::spiffe::SpiffeId;
use super::trust::TrustStores;

/// The authenticated identity of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub id: Arc<SpiffeId>,
    /// The first expiry in the path that was verified, its root included. What holds after it is to be asked anew:
    /// another path may hold for longer.
    pub until: SystemTime,
}

/// Verifies chains against the roots of the trust domain that their leaf claims. The same few peers come again and again,
/// so that a chain that was verified is looked up, and only the time is looked at again. What is known here is worth
/// nothing to other roots.
pub(super) struct Peers {
    trust: Arc<TrustStores>,
    /// The purpose of the peers' certificates.
    purpose: Purpose,
    known: Mutex<HashMap<Vec<u8>, Known>>,
}

struct Known {
    /// All of the chain but its leaf, which is the key.
    rest: Vec<Vec<u8>>,
    id: Arc<SpiffeId>,
    /// That of the path which was verified.
    valid: Validity,
}

/// Verified leaves that are remembered. A peer renews its own every few days.
const KNOWN: usize = 512;

impl Peers {
    pub(super) fn new(trust: Arc<TrustStores>, purpose: Purpose) -> Self {
        Self { trust, purpose, known: Mutex::default() }
    }

    /// The service that a chain, leaf first, proves at `now`.
    ///
    /// # Errors
    /// When there is no path to a root of the claimed trust domain that is valid at `now`, or the leaf does not name one
    /// service.
    pub(super) fn identify(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Peer, PeerError> {
        let (leaf, rest) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        let fits = |known: &&Known| known.valid.holds(now) && known.has(rest);
        if let Some(known) = self.lock().get(leaf.as_ref()).filter(fits) {
            return Ok(Peer { id: Arc::clone(&known.id), until: known.valid.until });
        }
        // A claim so far, which chooses the roots that have to prove it.
        let claimed = uri(leaf);
        let trust_domain = claimed.as_ref().ok().map(|id| &*id.trust_domain);
        let trust = self.trust.claimed(trust_domain).ok_or(PeerError::UnknownIssuer)?;
        let valid = trust.verify(chain, self.purpose, now)?;
        let id = Arc::new(claimed?);
        let rest = rest.iter().map(|certificate| certificate.to_vec()).collect();
        let mut known = self.lock();
        if known.len() >= KNOWN {
            known.clear();
        }
        known.insert(leaf.to_vec(), Known { rest, id: Arc::clone(&id), valid });
        Ok(Peer { id, until: valid.until })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn has(&self, rest: &[CertificateDer<'_>]) -> bool {
        self.rest.iter().map(Vec::as_slice).eq(rest.iter().map(|certificate| certificate.as_ref()))
    }
}

/// The single URI of the subject's alternative names, as a service's identity.
pub(super) fn uri(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
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

/// Checks that `shown` is one of those expected.
pub(super) fn expect(shown: &SpiffeId, expected: &[SpiffeId]) -> Result<(), PeerError> {
    if expected.contains(shown) {
        return Ok(());
    }
    Err(PeerError::Unexpected { shown: Box::new(shown.clone()), expected: expected.to_vec() })
}

/// Verifies the clients of our listener: services of the mesh.
#[derive(Debug)]
pub(super) struct ClientIdentity {
    pub(super) peers: Arc<Peers>,
    /// Names of the roots, for the client to choose its certificate by.
    pub(super) hints: Vec<DistinguishedName>,
}

/// Verifies the servers of one target: services with one of the expected identities.
#[derive(Debug)]
pub(super) struct ServerIdentity {
    pub(super) peers: Arc<Peers>,
    pub(super) expected: Arc<[SpiffeId]>,
}

/// rustls wants it of a verifier.
impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").finish_non_exhaustive()
    }
}

impl Peers {
    /// As a handshake asks.
    fn verify(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<Peer, PeerError> {
        let mut chain = Vec::with_capacity(1 + rest.len());
        chain.push(CertificateDer::from(leaf.as_ref()));
        chain.extend(rest.iter().map(|certificate| CertificateDer::from(certificate.as_ref())));
        self.identify(&chain, SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(now.as_secs()))
    }
}

/// The methods that both traits have: what a handshake is signed with does not depend on the side.
macro_rules! verify_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.peers.verify_tls12(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.peers.verify_tls13(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.peers.schemes()
        }
    };
}

impl ClientCertVerifier for ClientIdentity {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.peers.verify(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    verify_signatures! {}
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
        let peer = self.peers.verify(end_entity, intermediates, now)?;
        expect(&peer.id, &self.expected)?;
        Ok(ServerCertVerified::assertion())
    }

    verify_signatures! {}
}

/// What a handshake is signed with. The key is taken from the certificate as it is read here, for the library's own
/// reading refuses extensions that are allowed in a path.
impl Peers {
    fn verify_tls12(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let leaf = Certificate::read(certificate).ok_or(PeerError::Malformed)?;
        let key = RawPublicKeyEntity::try_from(&leaf.public_key).map_err(|_| PeerError::Malformed)?;
        let schemes = self.trust.provider().signature_verification_algorithms.mapping;
        // RSA-PKCS1 and ECDSA without a curve are what TLS 1.3 has no more; each may be several algorithms.
        let fits = |(scheme, _): &&(SignatureScheme, _)| *scheme == signature.scheme;
        let mut algorithms = schemes.iter().find(fits).map(|(_, algorithms)| algorithms.iter()).into_iter().flatten();
        if algorithms.any(|algorithm| key.verify_signature(*algorithm, message, signature.signature()).is_ok()) {
            return Ok(HandshakeSignatureValid::assertion());
        }
        Err(rustls::Error::InvalidCertificate(CertificateError::BadSignature))
    }

    fn verify_tls13(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let leaf = Certificate::read(certificate).ok_or(PeerError::Malformed)?;
        let algorithms = &self.trust.provider().signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &leaf.public_key, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.trust.provider().signature_verification_algorithms.supported_schemes()
    }
}
