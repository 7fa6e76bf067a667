//! The roots of each trust domain, and the path from a certificate to one of them.
//!
//! A peer may show more than the path needs: certificates that cross-sign a former root and have expired since, copies,
//! foreign ones. Only what the path consists of counts, as with Go, OpenSSL and BoringSSL.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::DistinguishedName;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;

use super::certificate::{Certificate, Validity};
use super::der::{Der, SEQUENCE};
use super::path::Search;
use super::refusal::{MAX_CERTIFICATES, PeerError, Purpose};

/// Tolerance for the clock of the host that made a root a moment ago.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The roots by trust domain. Those of one trust domain vouch for no identity of another.
#[derive(Debug, Clone)]
pub(super) struct TrustStores {
    /// Our own trust domain, in lower case as all of them.
    own: String,
    by_domain: BTreeMap<String, Arc<Trust>>,
    provider: Arc<CryptoProvider>,
}

impl TrustStores {
    /// Knows our own trust domain alone.
    pub(super) fn new(own: String, roots: Trust, provider: Arc<CryptoProvider>) -> Self {
        Self { by_domain: BTreeMap::from([(own.clone(), Arc::new(roots))]), own, provider }
    }

    /// Whether there are roots of this trust domain.
    pub(super) fn knows(&self, trust_domain: &str) -> bool {
        self.by_domain.contains_key(trust_domain)
    }

    /// The roots that a certificate has to lead to which claims to be of this trust domain. A claim to an unknown trust
    /// domain, or to none, is checked against our own roots: their verdict tells a stranger from a peer of our mesh with
    /// a wrong name. The caller then refuses the name.
    pub(super) fn claimed(&self, trust_domain: Option<&str>) -> Option<&Trust> {
        let known = trust_domain.and_then(|domain| self.by_domain.get(domain));
        known.or_else(|| self.by_domain.get(&self.own)).map(|trust| &**trust)
    }

    /// The same with fewer roots of our own trust domain: those that are among `listed`. `None` if all are.
    pub(super) fn only(&self, listed: &[CertificateDer<'_>]) -> Option<Self> {
        let left = self.by_domain.get(&self.own)?.only(listed)?;
        let mut stores = self.clone();
        stores.by_domain.insert(self.own.clone(), Arc::new(left));
        Some(stores)
    }

    /// The roots of all trust domains.
    pub(super) fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        self.by_domain.values().flat_map(|trust| &trust.roots)
    }

    /// The subjects of all roots.
    pub(super) fn subjects(&self) -> Vec<DistinguishedName> {
        self.by_domain.values().flat_map(|trust| trust.subjects()).collect()
    }

    pub(super) fn provider(&self) -> &CryptoProvider {
        &self.provider
    }
}

/// Every root that the mesh lists for one trust domain, active or not.
pub(super) struct Trust {
    roots: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    /// # Errors
    /// When one can't be read.
    pub(super) fn new(roots: Vec<CertificateDer<'static>>, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        if roots.iter().any(|root| Certificate::read(root).is_none()) {
            return Err("a root certificate is not X.509".into());
        }
        Ok(Self { roots, provider })
    }

    /// Those of the roots that are also among `listed`; `None` if all are.
    fn only(&self, listed: &[CertificateDer<'_>]) -> Option<Self> {
        let left: Vec<_> = self.roots.iter().filter(|root| listed.contains(root)).cloned().collect();
        (left.len() < self.roots.len()).then(|| Self { roots: left, provider: Arc::clone(&self.provider) })
    }

    /// Whether any root is valid.
    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        self.read().iter().any(|root| root.valid.holds(now))
    }

    fn subjects(&self) -> Vec<DistinguishedName> {
        let subjects = self.read().into_iter().filter_map(|root| Der::only(root.subject, SEQUENCE));
        subjects.map(DistinguishedName::in_sequence).collect()
    }

    /// Finds a path from the first certificate of `chain` to a root that is valid at `now`, by way of any of the others,
    /// and returns how long that path is valid, its root included.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        purpose: Purpose,
        now: SystemTime,
    ) -> Result<Validity, PeerError> {
        let (leaf, others) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        if chain.len() > MAX_CERTIFICATES {
            return Err(PeerError::TooManyCertificates(chain.len()));
        }
        let leaf = Certificate::read(leaf).ok_or(PeerError::Malformed)?;
        // What can't be read is no part of a path.
        let others: Vec<Certificate<'_>> = others.iter().filter_map(|other| Certificate::read(other)).collect();
        let algorithms = self.provider.signature_verification_algorithms.all;
        Search { others: &others, roots: &self.read(), algorithms, purpose, now }.find(&leaf)
    }

    fn read(&self) -> Vec<Certificate<'_>> {
        let mut roots: Vec<_> = self.roots.iter().filter_map(|root| Certificate::read(root)).collect();
        for root in &mut roots {
            root.valid.from = root.valid.from.checked_sub(CLOCK_SKEW).unwrap_or(root.valid.from);
        }
        roots
    }
}

#[cfg(test)]
mod tests;

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("roots", &self.roots.len()).finish_non_exhaustive()
    }
}
