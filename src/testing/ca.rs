//! A certificate authority like the mesh's, for tests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_RSA_SHA256, SanType,
};

use crate::tls::Credentials;

pub(crate) const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";

/// A root, or an authority below one, and its key.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    params: CertificateParams,
    pub pem: String,
}

/// A leaf as the agent gives it.
pub(crate) struct Leaf {
    pub cert_pem: String,
    pub key_pem: String,
}

impl Ca {
    pub(crate) fn new() -> Self {
        Self::with(KeyPair::generate().unwrap(), validity(-3600, 86_400))
    }

    /// A root with an RSA key, as `PrivateKeyType = "rsa"` makes it.
    pub(crate) fn rsa() -> Self {
        Self::with(KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap(), validity(-3600, 86_400))
    }

    pub(crate) fn expired() -> Self {
        Self::with(KeyPair::generate().unwrap(), validity(-7200, -3600))
    }

    fn with(key: KeyPair, validity: (SystemTime, SystemTime)) -> Self {
        Self::made(key, None, |params| *params = within(params.clone(), validity))
    }

    /// One that differs from the usual by what `adjust` does, signed by itself or by another.
    pub(crate) fn made(key: KeyPair, by: Option<&Self>, adjust: impl FnOnce(&mut CertificateParams)) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(1);
        let mut params = within(CertificateParams::default(), validity(-3600, 86_400));
        params.distinguished_name.push(DnType::CommonName, format!("ca-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{TRUST_DOMAIN}").try_into().unwrap())];
        adjust(&mut params);
        let certificate = match by {
            Some(by) => params.signed_by(&key, &by.issuer),
            None => params.self_signed(&key),
        };
        Self { pem: certificate.unwrap().pem(), issuer: Issuer::new(params.clone(), key), params }
    }

    /// An authority that this one signs for, valid from and until seconds from now.
    pub(crate) fn below(&self, from: i64, until: i64) -> Self {
        let ca = Self::with(KeyPair::generate().unwrap(), validity(from, until));
        Self { pem: self.sign(&ca, from, until), ..ca }
    }

    /// A certificate of another authority by this one, valid from and until seconds from now: one path more.
    pub(crate) fn sign(&self, other: &Self, from: i64, until: i64) -> String {
        let params = within(other.params.clone(), validity(from, until));
        params.signed_by(other.issuer.key(), &self.issuer).unwrap().pem()
    }

    /// The same authority with the same key in another certificate of its own.
    pub(crate) fn again(&self, from: i64, until: i64) -> String {
        within(self.params.clone(), validity(from, until)).self_signed(self.issuer.key()).unwrap().pem()
    }

    /// A leaf of a service, valid for a day.
    pub(crate) fn leaf(&self, service: &str) -> Leaf {
        self.leaf_with(&[&uri(service)], -60, 86_400)
    }

    /// A leaf with these URIs, valid from and until seconds from now.
    pub(crate) fn leaf_with(&self, uris: &[&str], from: i64, until: i64) -> Leaf {
        self.leaf_made(KeyPair::generate().unwrap(), uris, |params| {
            *params = within(params.clone(), validity(from, until))
        })
    }

    /// A leaf that differs from the usual by what `adjust` does.
    pub(crate) fn leaf_made(&self, key: KeyPair, uris: &[&str], adjust: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = within(CertificateParams::default(), validity(-60, 86_400));
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        adjust(&mut params);
        Leaf { cert_pem: params.signed_by(&key, &self.issuer).unwrap().pem(), key_pem: key.serialize_pem() }
    }

    /// The credentials of a service.
    pub(crate) fn credentials(&self, service: &str) -> Credentials {
        let leaf = self.leaf(service);
        let roots = [self.pem.clone()];
        Credentials::new(TRUST_DOMAIN, &roots, &leaf.cert_pem, &leaf.key_pem, service, SystemTime::now()).unwrap()
    }
}

pub(crate) fn uri(service: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}")
}

fn within(mut params: CertificateParams, (from, until): (SystemTime, SystemTime)) -> CertificateParams {
    params.not_before = from.into();
    params.not_after = until.into();
    params
}

fn validity(from: i64, until: i64) -> (SystemTime, SystemTime) {
    let at = |seconds: i64| {
        let distance = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
    };
    (at(from), at(until))
}
