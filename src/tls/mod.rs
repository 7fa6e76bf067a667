//! Identity and mutual TLS.
//!
//! [`Credentials`] are what the agent gave, checked. They make a [`Server`] for the public listener and a
//! [`Client`] for each target; the data plane receives only those, never PEM. New credentials make new
//! ones, and with them go every ticket and cached session: a session never outlives the identity, the
//! roots or the trust that it was made with.

mod aead;
mod certificate;
mod der;
mod describe;
mod established;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod names;
mod path;
mod policy;
mod refusal;
mod sides;
mod spiffe;
mod stream;
#[cfg(test)]
mod tests;
mod tickets;
mod trust;
mod unbuffered;
mod verify;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use aead::{Aead, Implementation};
pub use describe::{CertificateInfo, CredentialsInfo};
pub use established::{Handshake, Version};
pub use policy::{Parameters, Policy, Versions, is_known_suite};
pub use refusal::{Alert, HandshakeError, PeerError, Refused};
pub use sides::{Client, Server};
pub use spiffe::{NotAService, SpiffeId};
pub use stream::{Leftover, Piece, ReadSide, Scratch, Stream, with_scratch};
pub use verify::Peer;

use certificate::{Certificate, Validity};
use refusal::Purpose;
use trust::{Trust, TrustStores};
use verify::{ClientIdentity, Peers, ServerIdentity};

/// The application protocol of two of ours for services that are not HTTP: the session carries one connection after
/// another. See docs/tunnel.md.
pub const TUNNEL: &[u8] = b"lictor-tunnel/3";
/// Its second version, in which no reason is given for the end of an open connection.
pub const TUNNEL_2: &[u8] = b"lictor-tunnel/2";
/// Its first version: a session's first connection begins unasked.
pub const TUNNEL_1: &[u8] = b"lictor-tunnel/1";
/// Every version, in order of preference. Peers that know only earlier ones agree on one of those.
pub const TUNNELS: &[&[u8]] = &[TUNNEL, TUNNEL_2, TUNNEL_1];

/// Our leaf and the mesh's roots, checked against each other and ready for handshakes.
#[derive(Clone)]
pub struct Credentials {
    id: SpiffeId,
    valid: Validity,
    key: Arc<CertifiedKey>,
    /// The roots of each trust domain: today of our own alone.
    trust: Arc<TrustStores>,
    aead: Aead,
    /// With the cipher suites of `aead`.
    provider: Arc<CryptoProvider>,
    policy: Policy,
}

impl Credentials {
    /// Puts together what the agent gave: the trust domain and every listed root (active or not), and the
    /// leaf with its intermediates and key.
    ///
    /// # Errors
    /// When anything does not parse, the key is not the leaf's, the leaf is not valid at `now`, is not for
    /// `service` in the trust domain, or does not chain to one of the roots.
    pub fn new(
        trust_domain: &str,
        roots_pem: &[String],
        leaf_pem: &str,
        key_pem: &str,
        service: &str,
        now: SystemTime,
    ) -> Result<Self, Error> {
        let aead = Aead::detect();
        let provider = Arc::new(policy::provider(aead));
        let trust = trust(roots_pem, &provider, now)?;
        let chain = certificates(leaf_pem).map_err(|e| Error::new(format!("the leaf certificate is not PEM: {e}")))?;
        if chain.is_empty() {
            return Err(Error::new("the leaf certificate holds no certificate"));
        }
        // The parser's own errors may quote what it read: say nothing more about a key.
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| Error::new("the leaf's private key is not a PEM key"))?;
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(|_| Error::new("the leaf's private key is of a kind that can't be used"))?;
        let key = CertifiedKey::new(chain, key);
        // As the library does, whose reading of certificates is stricter than what is required of peers.
        let public = key.cert.first().and_then(|leaf| Certificate::read(leaf)).map(|leaf| leaf.public_key);
        if key.key.public_key().zip(public).is_none_or(|(of_key, of_leaf)| of_key != of_leaf) {
            return Err(Error::new("the leaf's private key is not the key of its certificate"));
        }

        let id = key.end_entity_cert().map_err(|_| PeerError::NoCertificate).and_then(verify::uri);
        let id = id.map_err(|e| Error::new(format!("the leaf certificate: {e}")))?;
        if id.trust_domain != trust_domain.to_ascii_lowercase() || id.service != service {
            return Err(Error::new(format!(
                "the leaf certificate is for {id}, not for service {service:?} of trust domain {trust_domain:?}"
            )));
        }
        let valid = trust
            .verify(&key.cert, Purpose::Server, now)
            .map_err(|e| Error::new(format!("the leaf certificate: {e}")))?;
        let trust = Arc::new(TrustStores::new(id.trust_domain.clone(), trust, Arc::clone(&provider)));
        Ok(Self { id, valid, key: Arc::new(key), trust, aead, provider, policy: Policy::default() })
    }

    /// The same credentials, used as the mesh's policy says.
    #[must_use]
    pub fn under(&self, policy: Policy) -> Self {
        Self { policy, ..self.clone() }
    }

    /// The same credentials, trusting no root that is not among `roots_pem`; `None` if that changes nothing, or one of
    /// those can't be read. Our own leaf may be of a root that is trusted no more.
    #[must_use]
    pub fn trusting_only(&self, roots_pem: &[String]) -> Option<Self> {
        let read = |pem: &String| certificates(pem).ok().filter(|roots| !roots.is_empty());
        let listed: Option<Vec<_>> = roots_pem.iter().map(read).collect();
        let trust = Arc::new(self.trust.only(&listed?.concat())?);
        Some(Self { trust, ..self.clone() })
    }

    /// The same credentials, with records sealed by `aead`.
    #[must_use]
    pub fn sealed_by(self, aead: Aead) -> Self {
        if aead == self.aead {
            return self;
        }
        Self { aead, provider: Arc::new(policy::provider(aead)), ..self }
    }

    /// Our identity.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Since when the leaf is valid, and all between it and its root.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.valid.from
    }

    /// When the leaf expires, or a certificate between it and its root, or the root: whichever is first.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.valid.until
    }

    /// The certificates, for people to read.
    #[must_use]
    pub fn describe(&self) -> CredentialsInfo {
        let chain = describe::describe(self.key.cert.iter());
        CredentialsInfo { chain, roots: describe::describe(self.trust.roots()) }
    }

    /// For a public listener: client certificates are required and chain to the roots. `alpn` is in order
    /// of preference and may be empty; a client that offers none of it is served all the same.
    ///
    /// # Errors
    /// When the TLS library refuses the roots.
    pub fn server(&self, alpn: &[&[u8]]) -> Result<Arc<Server>, Error> {
        let peers = Arc::new(Peers::new(self.trust.clone(), Purpose::Client));
        let verifier = ClientIdentity { peers: Arc::clone(&peers), hints: self.trust.subjects() };
        let mut config = ServerConfig::builder_with_provider(self.policy.incoming.restrict(&self.provider))
            .with_protocol_versions(self.policy.incoming.versions.supported())
            .map_err(|e| Error::new(e.to_string()))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
        config.ticketer = aws_lc_rs::Ticketer::new().map_err(|e| Error::new(e.to_string()))?;
        // One ticket a connection: a client that reconnects takes one and is given one.
        config.send_tls13_tickets = 1;
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(Server { id: self.id.clone(), config: Arc::new(config), without_alpn, peers }))
    }

    /// For dialling one target: the name to send as SNI and the identities that its server may have.
    /// A name of more than 255 bytes is not sent.
    ///
    /// # Errors
    /// When no roots are known of an expected identity's trust domain, or the TLS library refuses the settings.
    pub fn client(&self, sni: &str, expected: Vec<SpiffeId>, alpn: &[&[u8]]) -> Result<Arc<Client>, Error> {
        if let Some(id) = expected.iter().find(|id| !self.trust.knows(&id.trust_domain)) {
            return Err(Error::new(format!("no root certificate is known of the trust domain of {id}")));
        }
        let expected: Arc<[SpiffeId]> = expected.into();
        let peers = Arc::new(Peers::new(self.trust.clone(), Purpose::Server));
        let verifier = ServerIdentity { peers: Arc::clone(&peers), expected: Arc::clone(&expected) };
        let mut config = ClientConfig::builder_with_provider(self.policy.outgoing.restrict(&self.provider))
            .with_protocol_versions(self.policy.outgoing.versions.supported())
            .map_err(|e| Error::new(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
        config.resumption = rustls::client::Resumption::store(Arc::new(tickets::Tickets::default()));
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let (id, name) = (self.id.clone(), sides::server_name(sni));
        Ok(Arc::new(Client { id, name, expected, config: Arc::new(config), without_alpn, peers }))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Credentials that can't be used, and why.
#[derive(Debug)]
pub struct Error(String);

impl Error {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect()
}

/// The roots. Those that have expired anchor nothing; at least one must not have.
fn trust(pems: &[String], provider: &Arc<CryptoProvider>, now: SystemTime) -> Result<Trust, Error> {
    let mut roots = Vec::new();
    for pem in pems {
        roots.extend(certificates(pem).map_err(|e| Error::new(format!("a root certificate is not PEM: {e}")))?);
    }
    let trust = Trust::new(roots, Arc::clone(provider)).map_err(Error::new)?;
    if trust.is_valid(now) { Ok(trust) } else { Err(Error::new("no valid root certificate is listed")) }
}
