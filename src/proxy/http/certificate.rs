//! The element of `x-forwarded-client-cert` with the identity of the peer for the app, as Envoy writes it under Consul.

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::tls::SpiffeId;

/// What `us` says of a peer with this chain, leaf first. `None` for what can't be parsed, which no peer has that was
/// authenticated.
#[must_use]
pub(crate) fn element(us: &SpiffeId, chain: &[CertificateDer<'_>]) -> Option<HeaderValue> {
    let leaf = chain.first()?;
    let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
    let hash: String = digest(&SHA256, leaf).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut element = format!(
        "By={us};Hash={hash};Cert=\"{}\";Chain=\"{}\";Subject=\"{}\"",
        pem(leaf),
        chain.iter().map(pem).collect::<String>(),
        subject(&parsed).replace('\\', "\\\\").replace('"', "\\\""),
    );
    let names = parsed.subject_alternative_name().ok().flatten();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => element.extend([";URI=", uri]),
            GeneralName::DNSName(dns) => element.extend([";DNS=", dns]),
            _ => {}
        }
    }
    HeaderValue::try_from(element).ok()
}

/// The last part first, as in RFC 2253.
fn subject(certificate: &X509Certificate<'_>) -> String {
    let subject = certificate.subject().to_string();
    let parts: Vec<&str> = subject.split(", ").collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}

/// PEM with the characters escaped that Envoy escapes.
fn pem(certificate: &CertificateDer<'_>) -> String {
    const LINE: usize = 64;
    let text = STANDARD.encode(certificate);
    let mut pem = String::with_capacity(text.len() * 2);
    pem.push_str("-----BEGIN%20CERTIFICATE-----%0A");
    for (place, character) in text.chars().enumerate() {
        if place > 0 && place % LINE == 0 {
            pem.push_str("%0A");
        }
        match character {
            '+' => pem.push_str("%2B"),
            '/' => pem.push_str("%2F"),
            '=' => pem.push_str("%3D"),
            other => pem.push(other),
        }
    }
    pem.push_str("%0A-----END%20CERTIFICATE-----%0A");
    pem
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::pem::PemObject;

    use super::*;
    use crate::testing::ca::{Ca, uri};

    #[test]
    fn the_peer_is_told_in_envoys_order_and_its_pem_can_be_read_again() {
        let leaf = CertificateDer::from_pem_slice(Ca::new().leaf("web").cert_pem.as_bytes()).unwrap();
        let us = SpiffeId::parse(&uri("db")).unwrap();
        let element = element(&us, std::slice::from_ref(&leaf)).unwrap();
        let element = element.to_str().unwrap();
        let keys: Vec<&str> = element.split(';').map(|part| part.split('=').next().unwrap()).collect();
        assert_eq!(keys, ["By", "Hash", "Cert", "Chain", "Subject", "URI"]);
        assert!(element.starts_with(&format!("By={}", uri("db"))) && element.ends_with(&format!("URI={}", uri("web"))));
        let pem = element.split("Cert=\"").nth(1).unwrap().split('"').next().unwrap();
        let pem =
            pem.replace("%20", " ").replace("%0A", "\n").replace("%2B", "+").replace("%2F", "/").replace("%3D", "=");
        assert_eq!(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap(), leaf);
    }

    #[test]
    fn what_is_no_certificate_is_not_told() {
        let us = SpiffeId::parse(&uri("db")).unwrap();
        assert!(element(&us, &[]).is_none() && element(&us, &[CertificateDer::from(vec![1, 2, 3])]).is_none());
    }
}
