//! The parts of a certificate that a path depends on: read once, validated in `path`.

use std::time::{Duration, SystemTime};

use rustls_pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use webpki::RawPublicKeyEntity;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::X509Version;

use super::der::{Der, OID, SEQUENCE, number};
use super::names::{Constraints, Name};

/// A time during which something is valid, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) from: SystemTime,
    pub(super) until: SystemTime,
}

impl Validity {
    pub(super) fn and(self, other: Self) -> Self {
        Self { from: self.from.max(other.from), until: self.until.min(other.until) }
    }

    pub(super) fn holds(self, now: SystemTime) -> bool {
        self.from <= now && now <= self.until
    }
}

pub(super) struct Certificate<'a> {
    /// DER, with header.
    pub(super) subject: &'a [u8],
    pub(super) issuer: &'a [u8],
    pub(super) public_key: SubjectPublicKeyInfoDer<'a>,
    pub(super) valid: Validity,
    /// Version 1 has no extensions, and is nothing but a root.
    pub(super) is_version_1: bool,
    pub(super) extensions: Extensions<'a>,
    signed: Signed<'a>,
}

struct Signed<'a> {
    data: &'a [u8],
    /// The content of its `AlgorithmIdentifier`.
    algorithm: &'a [u8],
    signature: &'a [u8],
}

/// The extensions that are taken into account. What is wrong with one is a fault of the paths that the certificate is
/// part of, and of no others.
#[derive(Default)]
pub(super) struct Extensions<'a> {
    pub(super) fault: Option<String>,
    pub(super) is_authority: bool,
    /// How many certificates may be between it and the leaf.
    pub(super) path_length: Option<u32>,
    pub(super) key_usage: Option<KeyUsage>,
    pub(super) extended_key_usage: Option<Vec<&'a [u8]>>,
    pub(super) names: Vec<Name<'a>>,
    pub(super) constraints: Option<Constraints<'a>>,
    /// None is not the same as none of them.
    pub(super) policies: Option<Vec<&'a [u8]>>,
    pub(super) maps_policies: bool,
    pub(super) require_explicit_policy: Option<u32>,
    pub(super) inhibit_any_policy: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyUsage {
    pub(super) signs: bool,
    pub(super) signs_certificates: bool,
}

impl<'a> Certificate<'a> {
    /// `None` when it is not X.509.
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let (rest, parsed) = X509Certificate::from_der(der).ok()?;
        if !rest.is_empty() || parsed.signature_algorithm != parsed.tbs_certificate.signature {
            return None;
        }
        let mut parts = Der(Der::only(der, SEQUENCE)?);
        let (_, _, data) = parts.next()?;
        let algorithm = parts.expect(SEQUENCE)?;
        // No bit of its last byte is unused.
        let signature = parts.expect(BIT_STRING)?.strip_prefix(&[0])?;
        let tbs = parsed.tbs_certificate;
        let at = |seconds: i64| {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or_default()))
        };
        let valid =
            Validity { from: at(tbs.validity.not_before.timestamp())?, until: at(tbs.validity.not_after.timestamp())? };
        let mut extensions = Extensions::default();
        let mut seen = Vec::new();
        for extension in tbs.extensions() {
            // A borrowed copy of the identifier, for the parser's own does not live as long as what it read.
            let id = extension.oid.as_bytes().to_vec();
            let fault = if seen.contains(&id) {
                Err("is there twice")
            } else {
                extensions.take(&id, extension.critical, extension.value)
            };
            if let Err(fault) = fault {
                let name = extension.oid.to_id_string();
                extensions.fault.get_or_insert_with(|| format!("the extension {name} {fault}"));
            }
            seen.push(id);
        }
        Some(Self {
            subject: tbs.subject.as_raw(),
            issuer: tbs.issuer.as_raw(),
            public_key: SubjectPublicKeyInfoDer::from(tbs.subject_pki.raw),
            valid,
            is_version_1: tbs.version == X509Version::V1,
            extensions,
            signed: Signed { data, algorithm, signature },
        })
    }

    /// Whether the key of `issuer` made its signature.
    pub(super) fn is_signed_by(&self, issuer: &Self, algorithms: &[&dyn SignatureVerificationAlgorithm]) -> bool {
        let Ok(key) = RawPublicKeyEntity::try_from(&issuer.public_key) else { return false };
        let Signed { data, algorithm, signature } = self.signed;
        // More than one where the identifier does not tell the curve.
        let fits = |known: &&&dyn SignatureVerificationAlgorithm| known.signature_alg_id().as_ref() == algorithm;
        algorithms.iter().filter(fits).any(|known| key.verify_signature(*known, data, signature).is_ok())
    }

    /// Its alternative names, and its subject with the email addresses in it.
    pub(super) fn all_names(&self) -> impl Iterator<Item = Name<'a>> {
        let subject = Der::only(self.subject, SEQUENCE).filter(|rdns| !rdns.is_empty());
        let emails = subject.map(emails).unwrap_or_default();
        self.extensions.names.iter().copied().chain(subject.map(Name::Directory)).chain(emails)
    }

    pub(super) fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }
}

const BIT_STRING: u8 = 0x03;

/// The fault of an extension.
type Fault = &'static str;

impl<'a> Extensions<'a> {
    /// The table of extensions (docs/certificates.md).
    fn take(&mut self, id: &[u8], critical: bool, value: &'a [u8]) -> Result<(), Fault> {
        let malformed = "can't be read";
        // id-ce of RFC 5280.
        match id.strip_prefix(&[0x55, 0x1d]) {
            Some([15]) => self.key_usage = Some(key_usage(value).ok_or(malformed)?),
            Some([17]) => self.names = Name::all(Der::only(value, SEQUENCE).ok_or(malformed)?).ok_or(malformed)?,
            Some([19]) => (self.is_authority, self.path_length) = basic_constraints(value).ok_or(malformed)?,
            Some([30]) => self.constraints = Some(Constraints::read(value, critical)?),
            // Where to ask about revocation: the mesh's authorities revoke by expiry.
            Some([31]) => {}
            Some([32]) => self.policies = Some(policies(value).ok_or(malformed)?),
            Some([33]) => self.maps_policies = true,
            Some([36]) => self.require_explicit_policy = policy_constraints(value).ok_or(malformed)?,
            Some([37]) => self.extended_key_usage = Some(identifiers(value).ok_or(malformed)?),
            Some([54]) => self.inhibit_any_policy = Some(Der::only(value, INTEGER).and_then(number).ok_or(malformed)?),
            _ if critical => return Err("is critical and not known"),
            _ => {}
        }
        Ok(())
    }
}

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;

fn key_usage(value: &[u8]) -> Option<KeyUsage> {
    let (unused, bits) = Der::only(value, BIT_STRING)?.split_first()?;
    let first = bits.first().copied().unwrap_or_default();
    (*unused < 8).then_some(KeyUsage { signs: first & 0x80 != 0, signs_certificates: first & 0x04 != 0 })
}

fn basic_constraints(value: &[u8]) -> Option<(bool, Option<u32>)> {
    match Der(Der::only(value, SEQUENCE)?).all()?[..] {
        [] => Some((false, None)),
        // Written out, although it is the default.
        [(BOOLEAN, [0])] => Some((false, None)),
        [(BOOLEAN, [0xff])] => Some((true, None)),
        [(BOOLEAN, [0xff]), (INTEGER, length)] => Some((true, Some(number(length)?))),
        _ => None,
    }
}

fn policies(value: &[u8]) -> Option<Vec<&[u8]>> {
    let all = Der(Der::only(value, SEQUENCE)?).all()?;
    all.into_iter().map(|(tag, policy)| if tag == SEQUENCE { Der(policy).expect(OID) } else { None }).collect()
}

/// How many certificates may follow before a policy is asked for. How many may still map policies is not taken into
/// account, as none that counts is mapped.
fn policy_constraints(value: &[u8]) -> Option<Option<u32>> {
    let mut required = None;
    for (tag, content) in Der(Der::only(value, SEQUENCE)?).all()? {
        let skip = number(content)?;
        match tag {
            0x80 => required = Some(skip),
            0x81 => {}
            _ => return None,
        }
    }
    Some(required)
}

fn identifiers(value: &[u8]) -> Option<Vec<&[u8]>> {
    let all = Der(Der::only(value, SEQUENCE)?).all()?;
    all.into_iter().map(|(tag, id)| (tag == OID).then_some(id)).collect()
}

/// The email addresses in a distinguished name (RFC 5280, 4.2.1.10).
fn emails(rdns: &[u8]) -> Vec<Name<'_>> {
    // 1.2.840.113549.1.9.1
    const EMAIL: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1];
    let attributes = Der(rdns).all().unwrap_or_default().into_iter().filter_map(|(_, set)| Der(set).all()).flatten();
    let emails = attributes.filter_map(|(_, attribute)| {
        let mut attribute = Der(attribute);
        (attribute.expect(OID)? == EMAIL).then(|| attribute.next().map_or(&[][..], |(_, value, _)| value))
    });
    // One that is not text matches nothing.
    emails.map(|value| Name::Email(std::str::from_utf8(value).unwrap_or_default())).collect()
}
