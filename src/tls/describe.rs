//! Descriptions of certificates for people: never a key.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Hexadecimal, lower case.
    pub serial: String,
    pub subject: String,
    pub issuer: String,
    pub uris: Vec<String>,
    pub dns: Vec<String>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// All of it, in PEM.
    pub pem: String,
}

/// Our certificate with its chain, and the roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialsInfo {
    /// Our leaf first, then what the agent gave along with it.
    pub chain: Vec<CertificateInfo>,
    /// Of every trust domain that is trusted.
    pub roots: Vec<CertificateInfo>,
}

/// The certificates that can be parsed.
pub(super) fn describe<'a>(certificates: impl Iterator<Item = &'a CertificateDer<'static>>) -> Vec<CertificateInfo> {
    certificates.filter_map(|der| certificate(der)).collect()
}

fn certificate(der: &[u8]) -> Option<CertificateInfo> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let names = parsed.subject_alternative_name().ok().flatten().map(|names| &names.value.general_names);
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    for name in names.into_iter().flatten() {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            GeneralName::DNSName(name) => dns.push((*name).to_owned()),
            _ => {}
        }
    }
    let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    Some(CertificateInfo {
        serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
        subject: parsed.subject().to_string(),
        issuer: parsed.issuer().to_string(),
        uris,
        dns,
        not_before: at(parsed.validity().not_before.timestamp()),
        not_after: at(parsed.validity().not_after.timestamp()),
        pem: pem(der),
    })
}

/// Lines of 64 characters (RFC 7468).
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}
