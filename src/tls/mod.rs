//! Identity and mutual TLS.

mod spiffe;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

pub use spiffe::{NotAService, SpiffeId};

/// Our leaf and the mesh's roots, checked against each other and ready for handshakes.
pub struct Credentials {}

impl Credentials {
    /// Puts together what the agent gave: the trust domain and every listed root (active or not), and the leaf with its
    /// intermediates and key.
    ///
    /// # Errors
    /// When anything does not parse, the key is not the leaf's, the leaf is not valid at `now`, is not for
    /// `service` in the trust domain, or does not chain to one of the roots.
    pub fn new(
        _trust_domain: &str,
        _roots_pem: &[String],
        _leaf_pem: &str,
        _key_pem: &str,
        _service: &str,
        _now: SystemTime,
    ) -> Result<Self, Error> {
        unimplemented!()
    }

    /// Who we are.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        unimplemented!()
    }

    /// For a public listener: client certificates are required and chain to the roots. `alpn` in order of preference, may be empty.
    #[must_use]
    pub fn server(&self, _alpn: &[&[u8]]) -> Arc<Server> {
        unimplemented!()
    }

    /// For dialling one target: the name to send as SNI and the identities that its server may have.
    #[must_use]
    pub fn client(&self, _sni: &str, _expected: Vec<SpiffeId>, _alpn: &[&[u8]]) -> Arc<Client> {
        unimplemented!()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// Ready to accept connections from the mesh.
#[derive(Debug)]
pub struct Server {}

/// Ready to connect to one target.
#[derive(Debug)]
pub struct Client {}

/// Credentials that can't be used, and why.
#[derive(Debug)]
pub struct Error(pub String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
