//! The TLS versions and cipher suites of the mesh.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::{SupportedCipherSuite, SupportedProtocolVersion};

use super::aead::Aead;

/// For either direction, as the mesh config entry has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// For the public listener.
    pub incoming: Parameters,
    /// For connections to targets.
    pub outgoing: Parameters,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    pub versions: Versions,
    /// IANA names of the TLS 1.2 suites that may be used; empty is all that we know. Those of TLS 1.3 are not
    /// configurable, as in Envoy.
    pub cipher_suites: Vec<String>,
}

/// TLS 1.3, and 1.2 for Envoy, which as a client stops there unless configured otherwise. Nothing older is spoken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Versions {
    #[default]
    Both,
    Tls12,
    Tls13,
}

/// aws-lc-rs with the cipher suites of `aead`, and X25519 before the hybrid post-quantum group, which costs half a
/// millisecond more for each full handshake.
pub(super) fn provider(aead: Aead) -> CryptoProvider {
    CryptoProvider {
        cipher_suites: aead.cipher_suites(),
        kx_groups: vec![kx_group::X25519, kx_group::X25519MLKEM768, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Whether `name` is a TLS 1.2 suite that can be used.
#[must_use]
pub fn is_known_suite(name: &str) -> bool {
    Aead::detect().cipher_suites().iter().any(|suite| is_named(suite, name))
}

impl Parameters {
    /// The provider with the suites that may be used.
    pub(super) fn restrict(&self, provider: &Arc<CryptoProvider>) -> Arc<CryptoProvider> {
        if self.cipher_suites.is_empty() {
            return Arc::clone(provider);
        }
        let may_be_used = |suite: &SupportedCipherSuite| {
            suite.tls13().is_some() || self.cipher_suites.iter().any(|name| is_named(suite, name))
        };
        let mut provider = CryptoProvider::clone(provider);
        provider.cipher_suites.retain(may_be_used);
        Arc::new(provider)
    }
}

impl Versions {
    pub(super) fn supported(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Both => BOTH,
            Self::Tls12 => &BOTH[1..],
            Self::Tls13 => &BOTH[..1],
        }
    }
}

const BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

fn is_named(suite: &SupportedCipherSuite, name: &str) -> bool {
    suite.tls13().is_none() && suite.suite().as_str() == Some(name)
}
