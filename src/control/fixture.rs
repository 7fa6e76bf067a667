//! Fixtures of the control plane's tests: a certificate authority, and short answers of the agent.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};

use crate::consul::api;

pub(super) const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";

/// A root of the mesh, as Consul's built-in provider makes it.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

impl Ca {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{TRUST_DOMAIN}"))];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A leaf for a service, valid for an hour from now.
    pub(super) fn leaf(&self, service: &str) -> Value {
        self.leaf_until(service, SystemTime::now() + Duration::from_secs(3600))
    }

    pub(super) fn leaf_until(&self, service: &str, not_after: SystemTime) -> Value {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.not_before = (not_after - Duration::from_secs(7200)).into();
        params.not_after = not_after.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![uri(&format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}"))];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        json!({"CertPEM": certificate.pem(), "PrivateKeyPEM": key.serialize_pem(), "Service": service})
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(super) fn roots(cas: &[&Ca]) -> Value {
    let roots: Vec<Value> = cas.iter().map(|ca| json!({ "RootCert": ca.pem })).collect();
    json!({"TrustDomain": TRUST_DOMAIN, "Roots": roots})
}

/// A registration of a sidecar of `web` on port 21000, with upstreams on ports of their own.
pub(super) fn registration(upstreams: &[(&str, u16)]) -> Value {
    let upstreams: Vec<Value> =
        upstreams.iter().map(|(name, port)| json!({"DestinationName": name, "LocalBindPort": port})).collect();
    json!({
        "Kind": "connect-proxy", "ID": "web-sidecar-proxy", "Service": "web-sidecar-proxy", "Port": 21000,
        "Proxy": {"DestinationServiceName": "web", "LocalServicePort": 8080, "Upstreams": upstreams},
    })
}

/// A chain that leads to the targets in order: the first, then the others when it fails. Each is
/// `service.datacenter`.
pub(super) fn chain(targets: &[&str]) -> Value {
    let target = |id: &&str| {
        let (service, datacenter) = id.split_once('.').unwrap();
        let sni = format!("{service}.default.{datacenter}.internal.{TRUST_DOMAIN}");
        let target =
            json!({"ID": id, "Service": service, "Namespace": "default", "Datacenter": datacenter, "SNI": sni});
        ((*id).to_owned(), target)
    };
    let all: serde_json::Map<String, Value> = targets.iter().map(target).collect();
    json!({
        "Protocol": "tcp", "StartNode": "resolver:start",
        "Nodes": {"resolver:start": {"Type": "resolver", "Name": "start", "Resolver": {
            "ConnectTimeout": "7s", "Target": targets[0], "Failover": {"Targets": targets[1..]}}}},
        "Targets": all,
    })
}

/// A row of a health endpoint: a passing instance.
pub(super) fn row(address: &str, port: u16) -> Value {
    json!({
        "Node": {"Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1"},
        "Service": {"Kind": "connect-proxy", "Address": address, "Port": port},
        "Checks": [{"CheckID": "serfHealth", "Status": "passing"}],
    })
}

pub(super) fn rows(values: &[Value]) -> Vec<api::CheckServiceNode> {
    values.iter().map(|value| read(value.clone())).collect()
}

pub(super) fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}
