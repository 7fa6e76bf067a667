//! The search for a path from a certificate to a root, and what makes a path valid (RFC 5280, 6.1).
//!
//! Pure: certificates, roots and the time come in, its validity or what is wrong goes out. Of what a peer shows, only the
//! path counts. What Go (`crypto/x509`, for Consul's own proxy) and BoringSSL (for Envoy) decide differently is refused;
//! the table is in docs/certificates.md.

use std::time::SystemTime;

use rustls_pki_types::SignatureVerificationAlgorithm;

use super::certificate::{Certificate, Validity};
use super::refusal::{PeerError, Purpose};

/// Longest path: authorities between a leaf and a root.
const MAX_AUTHORITIES: usize = 8;

/// The most signatures that are checked in one search. A chain of three takes two; more are taken by authorities that
/// have the same name.
const MAX_SIGNATURES: usize = 64;

/// The inputs of a path search.
pub(super) struct Search<'a> {
    /// The intermediate certificates of the peer.
    pub(super) others: &'a [Certificate<'a>],
    pub(super) roots: &'a [Certificate<'a>],
    pub(super) algorithms: &'a [&'a dyn SignatureVerificationAlgorithm],
    pub(super) purpose: Purpose,
    pub(super) now: SystemTime,
}

/// The state of a search.
#[derive(Default)]
struct Findings {
    signatures: usize,
    /// The fault of the first path that was found.
    problem: Option<PeerError>,
}

impl<'a> Search<'a> {
    /// The time during which the first valid path from `leaf` is valid, its root included.
    ///
    /// # Errors
    /// When there is none: what is wrong with the first path that leads to a root, if one does.
    pub(super) fn find(&self, leaf: &'a Certificate<'a>) -> Result<Validity, PeerError> {
        let mut findings = Findings::default();
        let found = self.extend(&mut vec![leaf], &mut findings);
        found.ok_or_else(|| findings.problem.unwrap_or(PeerError::UnknownIssuer))
    }

    /// Goes on from a path, leaf first, whose signatures are good.
    fn extend(&self, path: &mut Vec<&'a Certificate<'a>>, findings: &mut Findings) -> Option<Validity> {
        let last = *path.last()?;
        for root in self.roots {
            if self.is_signed(last, root, findings) {
                match self.validate(path, root) {
                    Ok(valid) => return Some(valid),
                    Err(problem) => findings.problem = findings.problem.take().or(Some(problem)),
                }
            }
        }
        if path.len() > MAX_AUTHORITIES {
            return None;
        }
        for other in self.others {
            // The same authority twice leads nowhere (RFC 4158, 5.2).
            let is_there = path.iter().any(|one| one.subject == other.subject && one.public_key == other.public_key);
            if !is_there && self.is_signed(last, other, findings) {
                path.push(other);
                let found = self.extend(path, findings);
                path.pop();
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    fn is_signed(&self, certificate: &Certificate<'_>, issuer: &Certificate<'_>, findings: &mut Findings) -> bool {
        if certificate.issuer != issuer.subject {
            return false;
        }
        if findings.signatures == MAX_SIGNATURES {
            let problem =
                || PeerError::BadPath(format!("more than {MAX_SIGNATURES} signatures would have to be checked"));
            findings.problem.get_or_insert_with(problem);
            return false;
        }
        findings.signatures += 1;
        certificate.is_signed_by(issuer, self.algorithms)
    }

    /// Validates a path, leaf first, all of whose signatures are good.
    fn validate(&self, below: &[&Certificate<'_>], root: &Certificate<'_>) -> Result<Validity, PeerError> {
        let path: Vec<&Certificate<'_>> = below.iter().copied().chain([root]).collect();
        let valid = path.iter().fold(root.valid, |valid, certificate| valid.and(certificate.valid));
        if self.now > valid.until {
            return Err(PeerError::Expired);
        }
        if self.now < valid.from {
            return Err(PeerError::NotYetValid);
        }
        if !path.iter().all(|certificate| allows(certificate, self.purpose)) {
            return Err(PeerError::NotFor(self.purpose));
        }
        extensions(&path).and_then(|()| names(&path)).and_then(|()| policies(below)).map_err(PeerError::BadPath)?;
        Ok(valid)
    }
}

/// Whether a certificate, or what an authority issues, may be used by a client or a server. `anyExtendedKeyUsage` is
/// that to Go, and is not to BoringSSL.
fn allows(certificate: &Certificate<'_>, purpose: Purpose) -> bool {
    // id-kp of RFC 5280.
    let id: &[u8] = match purpose {
        Purpose::Server => &[0x2b, 6, 1, 5, 5, 7, 3, 1],
        Purpose::Client => &[0x2b, 6, 1, 5, 5, 7, 3, 2],
    };
    certificate.extensions.extended_key_usage.as_ref().is_none_or(|usages| usages.contains(&id))
}

/// Checks each certificate of a path by its place.
fn extensions(path: &[&Certificate<'_>]) -> Result<(), String> {
    for (place, certificate) in path.iter().enumerate() {
        let (is_leaf, is_root, who) = (place == 0, place + 1 == path.len(), Place(place, path.len()));
        let extensions = &certificate.extensions;
        if let Some(fault) = &extensions.fault {
            return Err(format!("of {who}, {fault}"));
        }
        if is_leaf {
            if extensions.is_authority {
                return Err("it is an authority's, which can't be a service's identity (SPIFFE X.509-SVID, 4.1)".into());
            }
            if extensions.key_usage.is_some_and(|usage| !usage.signs) {
                return Err("its key usage does not allow signatures".into());
            }
            continue;
        }
        if !(extensions.is_authority || is_root && certificate.is_version_1) {
            return Err(format!("{who} is not an authority's (basic constraints)"));
        }
        if extensions.key_usage.is_some_and(|usage| !usage.signs_certificates) {
            return Err(format!("the key usage of {who} does not allow to sign certificates"));
        }
        let between = place - 1;
        if extensions.path_length.is_some_and(|length| usize::try_from(length).is_ok_and(|length| between > length)) {
            return Err(format!("{between} authorities are below {who}, more than its path length"));
        }
    }
    Ok(())
}

/// Each name of a path against the constraints of each authority above it.
fn names(path: &[&Certificate<'_>]) -> Result<(), String> {
    let mut compared = 0;
    for (place, authority) in path.iter().enumerate() {
        let Some(constraints) = &authority.extensions.constraints else { continue };
        for (below, certificate) in path.iter().enumerate().take(place) {
            for name in certificate.all_names() {
                compared += constraints.len();
                if compared > MAX_COMPARISONS {
                    return Err("it has too many names, or too many constraints of them".into());
                }
                if !constraints.allow(name) {
                    let (who, by) = (Place(below, path.len()), Place(place, path.len()));
                    return Err(format!("the name constraints of {by} do not allow {name} of {who}"));
                }
            }
        }
    }
    Ok(())
}

/// The most comparisons of a name with a constraint.
const MAX_COMPARISONS: usize = 10_000;

/// Whether there is a policy where an authority asks for one (RFC 5280, 6.1, without the mapping of policies). The path
/// is leaf first, without its root.
fn policies(path: &[&Certificate<'_>]) -> Result<(), String> {
    // All, until a certificate names some.
    let mut valid: Option<Vec<&[u8]>> = None;
    let (mut explicit, mut inhibit_any) = (path.len() + 1, path.len() + 1);
    let mut are_mapped = false;
    for (place, certificate) in path.iter().enumerate().rev() {
        let extensions = &certificate.extensions;
        let (is_leaf, is_self_issued) = (place == 0, certificate.is_self_issued());
        let named = extensions.policies.as_deref().unwrap_or_default();
        let any_counts = inhibit_any > 0 || (!is_leaf && is_self_issued);
        if !(any_counts && named.contains(&ANY_POLICY)) {
            valid = Some(match valid {
                None => named.iter().copied().filter(|policy| *policy != ANY_POLICY).collect(),
                Some(valid) => valid.into_iter().filter(|policy| named.contains(policy)).collect(),
            });
        }
        let is_none = |valid: &Option<Vec<_>>| valid.as_ref().is_some_and(Vec::is_empty);
        if explicit == 0 && is_none(&valid) {
            return Err("an authority above it requires a certificate policy, which it is not issued under".into());
        }
        if !is_self_issued {
            (explicit, inhibit_any) = (explicit.saturating_sub(1), inhibit_any.saturating_sub(1));
        }
        let sooner = |skip: usize, by: Option<u32>| by.map_or(skip, |by| skip.min(usize::try_from(by).unwrap_or(skip)));
        let required = extensions.require_explicit_policy.filter(|skip| !is_leaf || *skip == 0);
        (explicit, inhibit_any) = (sooner(explicit, required), sooner(inhibit_any, extensions.inhibit_any_policy));
        are_mapped |= extensions.maps_policies;
        if is_leaf && explicit == 0 {
            if is_none(&valid) {
                return Err("a certificate policy is required, which it is not issued under".into());
            }
            if are_mapped {
                return Err("a certificate policy is required where policies are mapped, which is not supported".into());
            }
        }
    }
    Ok(())
}

/// 2.5.29.32.0
const ANY_POLICY: &[u8] = &[0x55, 0x1d, 32, 0];

/// A certificate of a path for the log: its place, leaf first, and how many there are.
struct Place(usize, usize);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self(0, _) => f.write_str("the leaf"),
            Self(place, all) if place + 1 == all => f.write_str("the root"),
            Self(place, _) => write!(f, "intermediate {place}"),
        }
    }
}

#[cfg(test)]
mod tests;
