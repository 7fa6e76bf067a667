//! The two sides of a handshake, as credentials make them: ready to accept, and ready to connect to one target.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, DnsName, ServerName};

use super::refusal::PeerError;
use super::spiffe::SpiffeId;
use super::verify::{Peer, Peers, expect};

/// Ready to accept connections from the mesh.
pub struct Server {
    pub(super) id: SpiffeId,
    pub(super) config: Arc<ServerConfig>,
    pub(super) without_alpn: Arc<ServerConfig>,
    pub(super) peers: Arc<Peers>,
}

impl Server {
    /// Our identity.
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

    /// Who the client is, as of `now`: asked after every handshake, full or resumed, for a resumed session brings the
    /// certificate of an earlier one, and again when [`Peer::until`] has passed. It takes nothing but `chain` into
    /// account, so that a chain that was shown to an earlier server can be authenticated by the present roots.
    ///
    /// # Errors
    /// When there is no certificate, no path from it to a root is valid at `now`, or its identity is not that of a
    /// service of our trust domain.
    pub fn authenticate(&self, chain: Option<&[CertificateDer<'_>]>, now: SystemTime) -> Result<Peer, PeerError> {
        let peer = self.peers.identify(chain.unwrap_or_default(), now)?;
        if peer.id.trust_domain == self.id.trust_domain {
            Ok(peer)
        } else {
            Err(PeerError::TrustDomain(Box::new(SpiffeId::clone(&peer.id))))
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
    pub(super) id: SpiffeId,
    pub(super) name: ServerName<'static>,
    pub(super) expected: Arc<[SpiffeId]>,
    pub(super) config: Arc<ClientConfig>,
    pub(super) without_alpn: Arc<ClientConfig>,
    pub(super) peers: Arc<Peers>,
}

impl Client {
    /// Our identity.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    #[must_use]
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// The identities that the server may have.
    #[must_use]
    pub fn expected(&self) -> &[SpiffeId] {
        &self.expected
    }

    /// The SNI, and the key of the session cache.
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
            id: self.id.clone(),
            name: self.name.clone(),
            expected: Arc::clone(&self.expected),
            config: Arc::new(config),
            without_alpn: Arc::clone(&self.without_alpn),
            peers: Arc::clone(&self.peers),
        }
    }

    /// Who the server is, as of `now`: asked after every handshake, full or resumed, and again when [`Peer::until`] has
    /// passed.
    ///
    /// # Errors
    /// When no path from its certificate to a root is valid at `now`, or the identity is not one of those expected.
    pub fn authenticate(&self, chain: Option<&[CertificateDer<'_>]>, now: SystemTime) -> Result<Peer, PeerError> {
        let peer = self.peers.identify(chain.unwrap_or_default(), now)?;
        expect(&peer.id, &self.expected).map(|()| peer)
    }
}

/// An SNI byte by byte, as Envoy sends it, whether or not a host could have that name; none where it can't be sent
/// (BoringSSL: 1 to 255 bytes, none of them zero).
pub(super) fn server_name(sni: &str) -> ServerName<'static> {
    // The library takes a dot at the end away, and expects that a host name is left.
    let name = if sni.ends_with('.') { DnsName::try_from(sni) } else { DnsName::try_from(sni.as_bytes()) };
    name.map_or_else(|_| Ipv4Addr::UNSPECIFIED.into(), |name| ServerName::DnsName(name.to_owned()))
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.name).field("expected", &self.expected).finish_non_exhaustive()
    }
}
