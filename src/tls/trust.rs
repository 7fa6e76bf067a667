//! The mesh's roots, and the path from a certificate to one of them.
//!
//! A peer may show more than the path needs: certificates that cross-sign a former root and have expired since, copies,
//! foreign ones. Only what the path consists of counts, as with Go, OpenSSL and BoringSSL.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::DistinguishedName;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::refusal::{MAX_CERTIFICATES, PeerError, Purpose};

/// A root may have been made a moment ago on a host whose clock is a little ahead of ours.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// A time during which something is valid, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) from: SystemTime,
    pub(super) until: SystemTime,
}

impl Validity {
    /// That of a certificate; `None` when it can't be read.
    fn read(certificate: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let at =
            |seconds: i64| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)));
        let validity = certificate.validity();
        Some(Self { from: at(validity.not_before.timestamp())?, until: at(validity.not_after.timestamp())? })
    }

    fn and(self, other: Self) -> Self {
        Self { from: self.from.max(other.from), until: self.until.min(other.until) }
    }

    pub(super) fn holds(self, now: SystemTime) -> bool {
        self.from <= now && now <= self.until
    }
}

/// Every root that the mesh lists, active or not.
pub(super) struct Trust {
    anchors: Vec<TrustAnchor<'static>>,
    /// Of each anchor, in the same order.
    valid: Vec<Validity>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    /// # Errors
    /// What is wrong with a certificate.
    pub(super) fn new(roots: &[CertificateDer<'_>], provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let mut trust = Self { anchors: Vec::new(), valid: Vec::new(), provider };
        for root in roots {
            let valid = Validity::read(root).ok_or("a root certificate is not X.509")?;
            let anchor =
                webpki::anchor_from_trusted_cert(root).map_err(|e| format!("a root certificate can't be used: {e}"))?;
            trust.anchors.push(anchor.to_owned());
            trust.valid.push(Validity { from: valid.from.checked_sub(CLOCK_SKEW).unwrap_or(valid.from), ..valid });
        }
        Ok(trust)
    }

    /// Whether any root is valid.
    pub(super) fn is_valid(&self, now: SystemTime) -> bool {
        self.valid.iter().any(|valid| valid.holds(now))
    }

    /// The subjects of the roots.
    pub(super) fn subjects(&self) -> Vec<DistinguishedName> {
        self.anchors.iter().map(|anchor| DistinguishedName::in_sequence(&anchor.subject)).collect()
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
        let leaf = EndEntityCert::try_from(leaf).map_err(|_| PeerError::Malformed)?;
        let time = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let usage = match purpose {
            Purpose::Client => KeyUsage::client_auth(),
            Purpose::Server => KeyUsage::server_auth(),
        };
        let found = Cell::new(None);
        let judge = |path: &VerifiedPath<'_>| {
            let valid = self.validity(path).ok_or(webpki::Error::UnknownIssuer)?;
            if now < valid.from {
                return Err(webpki::Error::CertNotValidYet { time, not_before: time });
            }
            if now > valid.until {
                return Err(webpki::Error::CertExpired { time, not_after: time });
            }
            found.set(Some(valid));
            Ok(())
        };
        let algorithms = self.provider.signature_verification_algorithms.all;
        leaf.verify_for_usage(algorithms, &self.anchors, others, time, usage, None, Some(&judge))
            .map_err(|e| refusal(e, purpose))?;
        found.get().ok_or(PeerError::UnknownIssuer)
    }

    /// How long all of a path is valid.
    fn validity(&self, path: &VerifiedPath<'_>) -> Option<Validity> {
        let anchor = self.anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()))?;
        let mut valid = self.valid.get(anchor)?.and(Validity::read(&path.end_entity().der())?);
        for certificate in path.intermediate_certificates() {
            valid = valid.and(Validity::read(&certificate.der())?);
        }
        Some(valid)
    }
}

fn refusal(error: webpki::Error, purpose: Purpose) -> PeerError {
    match error {
        webpki::Error::CertExpired { .. } => PeerError::Expired,
        webpki::Error::CertNotValidYet { .. } => PeerError::NotYetValid,
        // Another authority of the same name is not the one that signed.
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => PeerError::UnknownIssuer,
        webpki::Error::RequiredEkuNotFoundContext(_) => PeerError::NotFor(purpose),
        webpki::Error::BadDer | webpki::Error::TrailingData(_) => PeerError::Malformed,
        error => PeerError::BadPath(error.to_string()),
    }
}

#[cfg(test)]
mod tests;

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("roots", &self.anchors.len()).finish_non_exhaustive()
    }
}
