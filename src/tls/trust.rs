//! The mesh's roots, and the path from a certificate to one of them.
//!
//! A peer may show more than the path needs: certificates that cross-sign a former root and have expired since, copies,
//! foreign ones. Only what the path consists of counts, as with Go, OpenSSL and BoringSSL.

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

/// A root may have been made a moment ago on a host whose clock is a little ahead of ours.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Every root that the mesh lists, active or not.
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
    pub(super) fn only(&self, listed: &[CertificateDer<'_>]) -> Option<Self> {
        let left: Vec<_> = self.roots.iter().filter(|root| listed.contains(root)).cloned().collect();
        (left.len() < self.roots.len()).then(|| Self { roots: left, provider: Arc::clone(&self.provider) })
    }

    pub(super) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether any root is valid.
    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        self.read().iter().any(|root| root.valid.holds(now))
    }

    /// The subjects of the roots.
    pub(super) fn subjects(&self) -> Vec<DistinguishedName> {
        let subjects = self.read().into_iter().filter_map(|root| Der::only(root.subject, SEQUENCE));
        subjects.map(DistinguishedName::in_sequence).collect()
    }

    pub(super) fn provider(&self) -> &CryptoProvider {
        &self.provider
    }

    /// Finds a path from the first certificate of `chain` to a root that is valid at `now`, by way of any of the others,
    /// and tells how long that path is valid, its root included.
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
