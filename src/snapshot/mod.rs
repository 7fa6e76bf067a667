//! The configuration of the data plane at one instant: values, no IO, no clock, no randomness.
//!
//! `control` writes a whole [`Snapshot`] and publishes it; `proxy` reads it. Parts that did not change
//! keep their `Arc`, so that a reader sees by pointer which parts a change does not concern.

mod address;
mod authority;
mod chain;
mod edits;
mod exposed;
#[cfg(test)]
pub(crate) mod fixture;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hash;
mod hits;
mod intention;
mod metrics;
mod path;
mod pattern;
mod permission;
mod protocol;
mod request;
mod resolver;
mod retry;
mod route;
mod route_match;
mod upgrade;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

pub use address::{Address, Bind, Endpoint, Endpoints, Host, LocalApp};
pub use chain::Chain;
pub use edits::{BadEdit, Edits};
pub use exposed::{Exposed, ExposedPath};
pub use hash::{
    CookieAttributes, CookieSource, HashPolicy, HashSource, HashTable, LoadBalancer, MAXIMUM_RING, MINIMUM_RING,
    Policy, RequestHash, hash_request,
};
pub use hits::Hits;
pub use intention::{Decider, Decision, DefaultPolicy, Intention, Intentions};
pub use metrics::MetricsSettings;
pub use path::{BadRequest, EscapedSlashes, NormalPath, Normalization, Underscores};
pub use pattern::{BadPattern, Pattern};
pub use permission::{
    Action, ClaimRequirement, Conditions, PathRule, Permission, ProviderRequirement, TokenRequirement,
};
pub use protocol::Protocol;
pub use request::{HeaderMatch, RequestView, Text, ValueTest};
pub use resolver::{REQUEST_TIMEOUT, Resolver, Target, Transport};
pub use retry::{Failure, RetryOn, RetryPolicy};
pub use route::{IDLE_TIMEOUT, Leg, Next, Node, Route, Routed, Splitter};
pub use route_match::{PathMatch, QueryMatch, QueryTest, RouteMatch};
pub use upgrade::Upgrades;

use crate::fetch::FetchRequest;
use crate::{access_log, jwt, tls, trace};

/// Everything that the data plane needs, as of one version.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counts up by one with each published change.
    pub version: u64,
    /// Of the registration; empty for a proxy that is defined by flags.
    pub proxy_id: String,
    /// Where the mesh reaches us, by the place where each is bound. A sidecar has one, or none: a registration without a
    /// port means "no public listener" to Consul.
    pub inbound: BTreeMap<Bind, Arc<InboundListener>>,
    /// Of a service that has no inbound listener any more: what the connections go by that are still open. It is not to be
    /// bound.
    pub former_inbound: Vec<Arc<InboundListener>>,
    /// Where the local app reaches the mesh. The key names the destination and where it is bound: another address is
    /// another listener.
    pub outbound: BTreeMap<OutboundKey, Arc<OutboundListener>>,
    /// Plaintext listeners for single paths of the local app. Anyone who can reach them may send requests.
    pub exposed: BTreeMap<Bind, Arc<Exposed>>,
    /// `None`: requests and connections have no log of their own.
    pub access_log: Option<Arc<access_log::Settings>>,
    pub metrics: Arc<MetricsSettings>,
    pub traces: Arc<trace::Settings>,
    /// Our certificate and the roots; always present once published.
    pub credentials: Option<Arc<tls::Credentials>>,
}

impl Snapshot {
    /// What the connections of an inbound listener go by that is no longer bound: the listener that its service has or had
    /// last. A registration whose service has another name now means that one.
    #[must_use]
    pub fn successor(&self, retired: &InboundListener) -> Option<&Arc<InboundListener>> {
        let mut all = self.inbound.values().chain(&self.former_inbound);
        let same = all.clone().find(|listener| listener.service.name == retired.service.name);
        same.or_else(|| all.next())
    }
}

/// An mTLS listener where the mesh reaches us. Its connections are terminated as one service; where a gateway lets the
/// server name choose among several, the table belongs here.
#[derive(Debug)]
pub struct InboundListener {
    pub bind: Bind,
    /// Time for a peer to finish its TLS handshake; default 10 s.
    pub handshake_timeout: Duration,
    /// Concurrent inbound connections; `None` is no limit.
    pub max_connections: Option<usize>,
    pub service: Arc<Service>,
}

/// A service that we stand in front of: who it is to the mesh, who may reach it, and where its app is.
#[derive(Debug, Clone)]
pub struct Service {
    /// The destination of the intentions.
    pub name: String,
    pub protocol: Protocol,
    pub tls: Arc<tls::Server>,
    pub intentions: Arc<Intentions>,
    pub local_app: LocalApp,
    /// Time to connect to the local app; Consul's default is 5 s.
    pub local_connect_timeout: Duration,
    /// Whole answer of the local app, HTTP only; `None` is no limit; Consul's default is 15 s.
    pub local_request_timeout: Option<Duration>,
    /// Idle time of a stream to the local app, HTTP only; `None` is no limit; Consul's default is 5 min.
    pub local_idle_timeout: Option<Duration>,
    /// Normalisation of requests before the intentions decide, HTTP only.
    pub normalization: Normalization,
    /// Allowed upgrades of connections, HTTP only: `lictor_upgrades`.
    pub upgrades: Upgrades,
    /// Whether `x-forwarded-client-cert` is removed rather than added to, HTTP only.
    pub sanitize_forwarded_cert: bool,
    /// Answers of ours say why in a header, HTTP only: `lictor_expose_cause`.
    pub expose_cause: bool,
    /// Audit mode: denied traffic is logged and let through, `lictor_intentions_audit`. It is about identities that
    /// were proved and messages that are sound; whatever else is refused stays refused.
    pub audit: bool,
    /// Clients with a tunnel get the rule that denies them, tcp only: `lictor_share_denial_rule`.
    pub share_denial_rule: bool,
    /// Those that the intentions name, HTTP only. One that is not here has no valid token.
    pub token_providers: Arc<jwt::Providers>,
}

/// Identifies an outbound listener: the destination as the registration names it (`service:db`, `query:dbq`,
/// `service:db?dc=dc2`), with the place where it is bound.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OutboundKey {
    pub destination: String,
    pub bind: Bind,
}

/// A plaintext listener where the local app reaches the mesh.
#[derive(Debug)]
pub struct OutboundListener {
    pub key: OutboundKey,
    /// Where every connection leads. A listener whose connections are told apart by their original destination has a
    /// table of upstreams in this place.
    pub upstream: Arc<Upstream>,
}

impl OutboundListener {
    /// Leads nowhere, or nowhere yet.
    #[must_use]
    pub fn unknown(key: OutboundKey, name: String, awaited: Option<Arc<FetchRequest>>) -> Self {
        Self { key, upstream: Arc::new(Upstream::unknown(name, awaited)) }
    }
}

/// A dependency of the local app.
#[derive(Debug)]
pub struct Upstream {
    /// The name that the registration gives it, for logs.
    pub name: String,
    pub chain: Chain,
    pub settings: UpstreamSettings,
    /// Connections open to one target at a time, `limits.max_connections`; `None` is no limit.
    pub limits: Limits,
    pub passive_health_check: PassiveHealthCheck,
    pub requests: RequestSettings,
    /// Something while it is not known yet where it leads. A connection requests it and waits. Until then it
    /// has no target.
    pub awaited: Option<Arc<FetchRequest>>,
}

impl Upstream {
    /// An upstream without targets, or without a discovery chain yet.
    #[must_use]
    pub fn unknown(name: String, awaited: Option<Arc<FetchRequest>>) -> Self {
        let start = Node::Resolver(Arc::new(Resolver::new(Vec::new())));
        Self {
            chain: Chain { service: name.clone(), protocol: Protocol::Tcp, start },
            name,
            settings: UpstreamSettings::default(),
            limits: Limits::default(),
            passive_health_check: PassiveHealthCheck::default(),
            requests: RequestSettings::default(),
            awaited,
        }
    }
}

/// Which settings are the upstream's own, rather than those of the config entries behind its chain: for `explain` alone.
/// An agent merges `service-defaults` of the local service in, and `proxy-defaults`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UpstreamSettings {
    /// There is no chain, but a prepared query.
    pub is_query: bool,
    pub protocol: bool,
    pub connect_timeout: bool,
}

/// Settings of our own, HTTP only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestSettings {
    /// One try, from the instance's choice to the head of its answer: `lictor_per_try_timeout_ms`; `None` is no limit.
    pub per_try_timeout: Option<Duration>,
    /// Answers of ours say why in a header: `lictor_expose_cause`.
    pub expose_cause: bool,
    /// Allowed upgrades of connections: `lictor_upgrades`.
    pub upgrades: Upgrades,
}

/// Upstream limits; each `None` is no limit and zero is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub max_connections: Option<usize>,
    pub max_pending_requests: Option<usize>,
    pub max_concurrent_requests: Option<usize>,
}

/// Outlier ejection, `passive_health_check`; defaults as Envoy has them under Consul.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassiveHealthCheck {
    /// Time between sweeps; default 10 s.
    pub interval: Duration,
    /// Consecutive failures that eject; default 5.
    pub max_failures: u32,
    /// Chance in percent that reaching `max_failures` ejects; default 100.
    pub enforcing_consecutive_5xx: u32,
    /// Part in percent of the instances that may be ejected. Where it is set, it is kept to as by Envoy 1.40: of three
    /// instances 50 ejects one and 10 none, and 100 all, a lone one too. `None`: 10, and one always may be as long as
    /// another is left to use.
    ///
    /// Consul (seen with 1.19.2 and 1.22-dev) has Envoy eject whether or not there is a `passive_health_check`
    /// (`outlier_detection: {}`), and use none of what is ejected (`healthy_panic_threshold: 0`). What Envoy makes of
    /// the 10 % that it then goes by depends on its version: older ones always eject one instance, which turns
    /// a lone instance's own 500s into 503s; 1.40 ejects none of fewer than ten. Ours does neither harm.
    pub max_ejection_percent: Option<u32>,
    /// Time of the first ejection, which grows with each; default 30 s.
    pub base_ejection_time: Duration,
}

impl Default for PassiveHealthCheck {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            max_failures: 5,
            enforcing_consecutive_5xx: 100,
            max_ejection_percent: None,
            base_ejection_time: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ca::Ca;

    fn listener(tls: &Arc<tls::Server>, service: &str, port: u16) -> Arc<InboundListener> {
        let loopback = std::net::Ipv4Addr::LOCALHOST;
        let service = Service {
            name: service.into(),
            protocol: Protocol::Tcp,
            tls: Arc::clone(tls),
            intentions: Arc::new(Intentions::new(
                vec![],
                DefaultPolicy { action: Action::Deny, source: "test".into(), hits: Hits::default() },
            )),
            local_app: LocalApp::Tcp(Address { host: Host::Ip(loopback.into()), port: 80 }),
            local_connect_timeout: Duration::from_secs(5),
            local_request_timeout: None,
            local_idle_timeout: None,
            normalization: Normalization::default(),
            upgrades: Upgrades::default(),
            sanitize_forwarded_cert: false,
            expose_cause: false,
            audit: false,
            share_denial_rule: false,
            token_providers: Arc::default(),
        };
        Arc::new(InboundListener {
            bind: Bind::Tcp((loopback, port).into()),
            handshake_timeout: Duration::from_secs(10),
            max_connections: None,
            service: Arc::new(service),
        })
    }

    #[test]
    fn connections_of_a_stopped_listener_go_by_what_holds_for_their_service() {
        let tls = Ca::new().credentials("web").server(&[]).unwrap();
        let listener = |service: &str, port| listener(&tls, service, port);
        let (web, api, former) = (listener("web", 1), listener("api", 2), listener("former", 3));
        let both = Snapshot {
            inbound: [&api, &web].map(|listener| (listener.bind.clone(), Arc::clone(listener))).into(),
            former_inbound: vec![Arc::clone(&former)],
            ..Snapshot::default()
        };
        // Each listener was elsewhere before.
        for (retired, now) in [("web", &web), ("api", &api), ("former", &former)] {
            let successor = both.successor(&listener(retired, 9)).unwrap();
            assert!(Arc::ptr_eq(successor, now), "{retired}: {successor:?}");
        }
        // The service that stands alone has another name now.
        let renamed = Snapshot { former_inbound: vec![Arc::clone(&web)], ..Snapshot::default() };
        assert!(Arc::ptr_eq(renamed.successor(&api).unwrap(), &web));
        assert!(Snapshot::default().successor(&api).is_none());
    }
}
