//! The two sides of a handshake, as credentials make them: ready to accept, and ready to connect to one target.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};

use super::spiffe::SpiffeId;
use super::verify::{PeerError, Seen, expect};

/// Ready to accept connections from the mesh.
pub struct Server {
    pub(super) id: SpiffeId,
    pub(super) config: Arc<ServerConfig>,
    pub(super) without_alpn: Arc<ServerConfig>,
    pub(super) seen: Seen,
}

impl Server {
    /// Who we are.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The configuration for a client that offers the application protocols `offered`: ours are named only
    /// when one of them is among those, for a lack of overlap is no reason to refuse a peer (Envoy sends
    /// none, Consul's proxy up to 1.9 sends `h2` for raw TCP).
    pub fn config<'a>(&self, offered: impl IntoIterator<Item = &'a [u8]>) -> &Arc<ServerConfig> {
        let ours = &self.config.alpn_protocols;
        if offered.into_iter().any(|name| ours.iter().any(|our| our == name)) {
            &self.config
        } else {
            &self.without_alpn
        }
    }

    /// Who the client is, as of `now`: asked after every handshake, full or resumed, for a resumed session
    /// brings the certificate of an earlier one.
    ///
    /// # Errors
    /// When there is no certificate, one of the chain is not valid at `now`, or its identity is not that of
    /// a service of our trust domain.
    pub fn authenticate(
        &self,
        chain: Option<&[CertificateDer<'_>]>,
        now: SystemTime,
    ) -> Result<Arc<SpiffeId>, PeerError> {
        let peer = self.seen.identify(chain.unwrap_or_default(), now)?;
        if peer.trust_domain == self.id.trust_domain {
            Ok(peer)
        } else {
            Err(PeerError::TrustDomain(Box::new(SpiffeId::clone(&peer))))
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Ready to connect to one target.
pub struct Client {
    pub(super) name: ServerName<'static>,
    pub(super) expected: Arc<[SpiffeId]>,
    pub(super) config: Arc<ClientConfig>,
    pub(super) without_alpn: Arc<ClientConfig>,
    pub(super) seen: Seen,
}

impl Client {
    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// What goes into the SNI, and the key of the session cache.
    #[must_use]
    pub fn name(&self) -> &ServerName<'static> {
        &self.name
    }

    /// The same with other application protocols to offer.
    #[must_use]
    pub fn offering(&self, alpn: &[&[u8]]) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Self {
            name: self.name.clone(),
            expected: Arc::clone(&self.expected),
            config: Arc::new(config),
            without_alpn: Arc::clone(&self.without_alpn),
            seen: Seen::default(),
        }
    }

    /// Who the server is, as of `now`: asked after every handshake, full or resumed.
    ///
    /// # Errors
    /// When a certificate of the chain is not valid at `now`, or the identity is not one of those expected.
    pub fn authenticate(
        &self,
        chain: Option<&[CertificateDer<'_>]>,
        now: SystemTime,
    ) -> Result<Arc<SpiffeId>, PeerError> {
        let peer = self.seen.identify(chain.unwrap_or_default(), now)?;
        expect(&peer, &self.expected).map(|()| peer)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.name).field("expected", &self.expected).finish_non_exhaustive()
    }
}
