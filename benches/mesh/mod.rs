//! A mesh of two services for measuring: certificates, and what the sidecars of both go by.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use lictor::snapshot::{
    Address, Bind, Chain, Endpoint, Endpoints, Host, Limits, Node, OutboundKey, OutboundListener, PassiveHealthCheck,
    Protocol, RequestSettings, Resolver, Snapshot, Target, Transport, Upstream, UpstreamSettings,
};
use lictor::tls::{Client, Credentials, Server, TUNNEL};

const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A mesh of two services, `web` and `shop`, which calls it.
pub(crate) struct Mesh {
    pub web: Credentials,
    pub shop: Credentials,
}

impl Mesh {
    pub(crate) fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{TRUST_DOMAIN}").try_into()?)];
        let root = [params.self_signed(&key)?.pem()];
        let issuer = Issuer::new(params, key);
        let credentials = |service: &str| -> Result<Credentials> {
            let (leaf, key) = leaf(service, &issuer)?;
            Ok(Credentials::new(TRUST_DOMAIN, &root, &leaf, &key, service, SystemTime::now())?)
        };
        Ok(Self { web: credentials("web")?, shop: credentials("shop")? })
    }

    pub(crate) fn server(&self, protocol: Protocol) -> Result<Arc<Server>> {
        Ok(self.web.server(alpn(protocol))?)
    }

    pub(crate) fn client(&self, protocol: Protocol) -> Result<Arc<Client>> {
        let sni = format!("web.default.dc1.internal.{TRUST_DOMAIN}");
        Ok(self.shop.client(&sni, vec![self.web.id().clone()], alpn(protocol))?)
    }

    pub(crate) fn client_side(&self, protocol: Protocol, port: u16, public: u16) -> Result<Snapshot> {
        let endpoint = Endpoint { address: address(public), weight: 1 };
        let target = Target {
            id: "web.default.dc1".into(),
            service: "web".into(),
            datacenter: "dc1".into(),
            customization_hash: String::new(),
            transport: Transport::Mesh(self.client(protocol)?),
            connect_timeout: PATIENCE,
            endpoints: Arc::new(Endpoints { usable: vec![endpoint], registered: 1 }),
        };
        let key = OutboundKey { destination: "service:web".into(), bind: local(port) };
        let upstream = Upstream {
            name: "web".into(),
            chain: Chain {
                service: "web".into(),
                protocol,
                start: Node::Resolver(Arc::new(Resolver::new(vec![Arc::new(target)]))),
            },
            settings: UpstreamSettings::default(),
            limits: Limits::default(),
            passive_health_check: PassiveHealthCheck::default(),
            requests: RequestSettings::default(),
            awaited: None,
        };
        let listener = OutboundListener { key: key.clone(), upstream: Arc::new(upstream) };
        Ok(Snapshot { version: 1, outbound: [(key, Arc::new(listener))].into(), ..Snapshot::default() })
    }
}

/// A certificate and its key.
fn leaf(service: &str, issuer: &Issuer<'_, KeyPair>) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let uri = format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}");
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}

/// What two of our sidecars offer each other.
fn alpn(protocol: Protocol) -> &'static [&'static [u8]] {
    if protocol.is_http() { &[b"h2", b"http/1.1"] } else { &[TUNNEL] }
}

pub(crate) fn local(port: u16) -> Bind {
    Bind::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

pub(crate) fn address(port: u16) -> Address {
    Address { host: Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)), port }
}
