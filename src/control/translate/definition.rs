//! The proxy's own definition: its registration, or the flags of the ad-hoc mode.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::opaque::Opaque;
use super::{Bad, Notes, access_log, host, ip, metrics, tenancy};
use crate::access_log::Settings as AccessLog;
use crate::config::AdHoc;
use crate::consul::api;
use crate::control::query::{ChainQuery, PreparedQuery};
use crate::snapshot::{
    Address, Bind, Exposed, ExposedPath, Limits, LocalApp, MetricsSettings, OutboundKey, PassiveHealthCheck, Protocol,
    RequestSettings, Upgrades,
};

/// Consul's default for connecting to the local app.
const LOCAL_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's route default, which Consul leaves alone.
const LOCAL_REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's stream idle default, which Consul leaves alone.
const LOCAL_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Consul's built-in proxy documents this value for `handshake_timeout_ms`.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Consul's default for connecting to an upstream's instance.
pub(in crate::control) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the proxy is to do, before anything is known of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct Definition {
    /// The service that we stand in front of: its leaf and its intentions are ours.
    pub(in crate::control) service: String,
    pub(in crate::control) public: Option<PublicPlan>,
    pub(in crate::control) upstreams: BTreeMap<OutboundKey, UpstreamPlan>,
    pub(in crate::control) exposed: BTreeMap<Bind, Exposed>,
    pub(in crate::control) access_log: Option<AccessLog>,
    pub(in crate::control) metrics: MetricsSettings,
}

impl Definition {
    /// Leaves the tunnel as it is, or turns it off everywhere.
    pub(in crate::control) fn restrict_tunnel(&mut self, on: bool) {
        self.public.iter_mut().for_each(|public| public.tunnel &= on);
        self.upstreams.values_mut().for_each(|upstream| upstream.tunnel &= on);
    }
}

/// The public listener but for credentials and intentions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct PublicPlan {
    pub(in crate::control) bind: Bind,
    pub(in crate::control) protocol: Protocol,
    pub(in crate::control) local_app: LocalApp,
    pub(in crate::control) local_connect_timeout: Duration,
    pub(in crate::control) local_request_timeout: Option<Duration>,
    pub(in crate::control) local_idle_timeout: Option<Duration>,
    pub(in crate::control) handshake_timeout: Duration,
    pub(in crate::control) max_connections: Option<usize>,
    /// Answers of ours say why in a header.
    pub(in crate::control) expose_cause: bool,
    pub(in crate::control) upgrades: Upgrades,
    /// Whether the tunnel is agreed to, tcp only: `lictor_tunnel`.
    pub(in crate::control) tunnel: bool,
}

/// An upstream but for its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct UpstreamPlan {
    pub(in crate::control) name: String,
    pub(in crate::control) source: Source,
    pub(in crate::control) limits: Limits,
    pub(in crate::control) passive_health_check: PassiveHealthCheck,
    pub(in crate::control) requests: RequestSettings,
    /// Whether the tunnel is offered, tcp only: `lictor_tunnel`, of the upstream or else of the proxy.
    pub(in crate::control) tunnel: bool,
}

/// What tells an upstream's targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Source {
    Chain(ChainQuery),
    PreparedQuery { query: PreparedQuery, protocol: Protocol, connect_timeout: Duration },
}

/// Reads a proxy's registration as the agent gives it, central configuration merged in.
///
/// # Errors
/// When it is not that of a sidecar proxy.
pub(in crate::control) fn registered(
    service: &api::AgentService,
    enterprise: bool,
    notes: &mut Notes,
) -> Result<Definition, Bad> {
    if service.kind != "connect-proxy" {
        let kind = if service.kind.is_empty() { "an ordinary service" } else { &service.kind };
        return Err(Bad(format!("service {:?} is {kind}, not a connect-proxy", service.id)));
    }
    let proxy = service
        .proxy
        .as_ref()
        .filter(|proxy| !proxy.destination_service_name.is_empty())
        .ok_or_else(|| Bad(format!("proxy {:?} names no destination service", service.id)))?;
    if proxy.mode == "transparent" {
        notes.push("transparent proxy mode is not supported: only upstreams with a local port or socket work".into());
    }
    let public = public(service, proxy, notes);
    Ok(Definition {
        service: proxy.destination_service_name.clone(),
        exposed: exposed(service, proxy, public.as_ref(), notes),
        public,
        upstreams: upstreams(proxy, enterprise, notes),
        access_log: access_log::settings(proxy.access_logs.as_ref(), notes),
        metrics: metrics::settings(Opaque::new(Some(&proxy.config), "proxy config"), notes),
    })
}

/// The definition that the flags of the ad-hoc mode give.
///
/// # Errors
/// When the local app's address is not `host:port`.
pub(in crate::control) fn ad_hoc(flags: &AdHoc) -> Result<Definition, Bad> {
    let public = match &flags.public {
        None => None,
        Some((bind, local_app)) => {
            let (local_host, port) = local_app.rsplit_once(':').unwrap_or((local_app, ""));
            let port = port.parse().ok().filter(|port| *port != 0);
            // Go's dialer takes an empty host as this one; so does the built-in proxy.
            let local_host = if local_host.is_empty() { "127.0.0.1" } else { local_host };
            let address = port
                .and_then(|port| Some(Address { host: host(local_host)?, port }))
                .ok_or_else(|| Bad(format!("-service-addr {local_app:?} is not host:port")))?;
            Some(plain_public(Bind::Tcp(*bind), LocalApp::Tcp(address)))
        }
    };
    let upstreams = flags.upstreams.iter().map(|upstream| {
        let source = if upstream.prepared_query {
            Source::PreparedQuery {
                query: PreparedQuery { name: upstream.name.clone(), datacenter: None },
                protocol: Protocol::Tcp,
                connect_timeout: CONNECT_TIMEOUT,
            }
        } else {
            // The flags know bytes alone, whatever config entries say: the local app speaks to a plain port.
            let overrides = api::ChainOverrides { protocol: Some("tcp".to_owned()), ..Default::default() };
            Source::Chain(ChainQuery { service: upstream.name.clone(), overrides, ..Default::default() })
        };
        let kind = if upstream.prepared_query { "query" } else { "service" };
        let key = OutboundKey { destination: format!("{kind}:{}", upstream.name), bind: Bind::Tcp(upstream.bind) };
        let plan = UpstreamPlan {
            name: upstream.name.clone(),
            source,
            limits: Limits::default(),
            passive_health_check: PassiveHealthCheck::default(),
            requests: RequestSettings::default(),
            tunnel: true,
        };
        (key, plan)
    });
    Ok(Definition {
        service: flags.service.clone(),
        public,
        upstreams: upstreams.collect(),
        exposed: BTreeMap::new(),
        access_log: None,
        metrics: MetricsSettings::default(),
    })
}

fn plain_public(bind: Bind, local_app: LocalApp) -> PublicPlan {
    PublicPlan {
        bind,
        protocol: Protocol::Tcp,
        local_app,
        local_connect_timeout: LOCAL_CONNECT_TIMEOUT,
        local_request_timeout: Some(LOCAL_REQUEST_TIMEOUT),
        local_idle_timeout: Some(LOCAL_IDLE_TIMEOUT),
        handshake_timeout: HANDSHAKE_TIMEOUT,
        max_connections: None,
        expose_cause: false,
        upgrades: Upgrades::default(),
        tunnel: true,
    }
}

fn public(service: &api::AgentService, proxy: &api::Proxy, notes: &mut Notes) -> Option<PublicPlan> {
    let config = Opaque::new(Some(&proxy.config), "proxy config");
    let bind = public_bind(service, config, notes)?;
    let local_app = local_app(proxy, notes)?;
    let plain = plain_public(bind, local_app);
    for key in ["envoy_public_listener_json", "envoy_local_cluster_json", "envoy_listener_tracing_json"] {
        if config.has(key) {
            notes.push(format!("proxy config: {key} is for Envoy and ignored"));
        }
    }
    Some(PublicPlan {
        protocol: config.text("protocol", notes).map_or(Protocol::Tcp, |protocol| Protocol::parse(&protocol)),
        local_connect_timeout: above_zero(config.milliseconds("local_connect_timeout_ms", notes))
            .unwrap_or(plain.local_connect_timeout),
        local_request_timeout: match config.milliseconds("local_request_timeout_ms", notes) {
            None => plain.local_request_timeout,
            given => above_zero(given),
        },
        local_idle_timeout: match config.milliseconds("local_idle_timeout_ms", notes) {
            None => plain.local_idle_timeout,
            given => above_zero(given),
        },
        handshake_timeout: above_zero(config.milliseconds("handshake_timeout_ms", notes))
            .unwrap_or(plain.handshake_timeout),
        max_connections: config.count("max_inbound_connections", notes).filter(|max| *max > 0).map(saturate),
        expose_cause: expose_cause(config, notes),
        upgrades: upgrades(config, notes),
        tunnel: tunnel(config, notes).unwrap_or(true),
        ..plain
    })
}

/// Where to listen for the mesh; `None` when the registration has no port, which means not at all.
fn public_bind(service: &api::AgentService, config: Opaque<'_>, notes: &mut Notes) -> Option<Bind> {
    let port = config.integer("bind_port", notes).filter(|port| *port != 0);
    let port = match port.map(u16::try_from) {
        Some(Ok(port)) => port,
        Some(Err(_)) => {
            config.bad("bind_port", "a port", notes);
            service.port.get()?
        }
        None => service.port.get()?,
    };
    Some(Bind::Tcp(SocketAddr::new(bind_address(service, config, notes), port)))
}

/// The address of every listener that is not an upstream's.
fn bind_address(service: &api::AgentService, config: Opaque<'_>, notes: &mut Notes) -> IpAddr {
    let configured = config.text("bind_address", notes).filter(|address| !address.is_empty());
    let address = configured.and_then(|address| {
        let parsed = bind_ip(&address);
        if parsed.is_none() {
            config.bad("bind_address", "an IP address", notes);
        }
        parsed
    });
    let registered = || {
        let address = Some(&service.address).filter(|address| !address.is_empty())?;
        let parsed = bind_ip(address);
        if parsed.is_none() {
            notes.push(format!("address {address:?} is a name, so the public listener binds every address"));
        }
        parsed
    };
    address.or_else(registered).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// Listeners for exposed paths, one for each port.
fn exposed(
    service: &api::AgentService,
    proxy: &api::Proxy,
    public: Option<&PublicPlan>,
    notes: &mut Notes,
) -> BTreeMap<Bind, Exposed> {
    if proxy.expose.checks {
        notes.push(
            "Expose.Checks is not supported, as the agent's HTTP API does not tell the paths of checks: list them in \
             Expose.Paths"
                .into(),
        );
    }
    if proxy.expose.paths.is_empty() {
        return BTreeMap::new();
    }
    let config = Opaque::new(Some(&proxy.config), "proxy config");
    let address = bind_address(service, config, notes);
    let mut listeners = BTreeMap::<Bind, Exposed>::new();
    for wire in &proxy.expose.paths {
        let Some((port, path)) = exposed_path(wire, proxy, notes) else { continue };
        let bind = Bind::Tcp(SocketAddr::new(address, port));
        if public.is_some_and(|public| public.bind == bind) {
            notes
                .push(format!("exposed path {:?}: port {port} is the public listener's, so it is left out", wire.path));
            continue;
        }
        let listener = listeners.entry(bind.clone()).or_insert_with(|| Exposed {
            bind,
            paths: BTreeMap::new(),
            connect_timeout: public.map_or(LOCAL_CONNECT_TIMEOUT, |public| public.local_connect_timeout),
            request_timeout: public.map_or(Some(LOCAL_REQUEST_TIMEOUT), |public| public.local_request_timeout),
            idle_timeout: public.map_or(Some(LOCAL_IDLE_TIMEOUT), |public| public.local_idle_timeout),
        });
        if listener.paths.contains_key(&wire.path) {
            notes.push(format!("exposed path {:?}: port {port} lists it twice; the first entry is used", wire.path));
        } else {
            listener.paths.insert(wire.path.clone(), path);
        }
    }
    listeners
}

fn exposed_path(wire: &api::ExposePath, proxy: &api::Proxy, notes: &mut Notes) -> Option<(u16, ExposedPath)> {
    let ports = wire.listener_port.get().zip(wire.local_path_port.get());
    let Some((port, local_port)) = ports.filter(|_| wire.path.starts_with('/')) else {
        notes.push(format!(
            "exposed path {:?} lacks a port or does not begin with a slash, so it is left out",
            wire.path
        ));
        return None;
    };
    let host = host(&proxy.local_service_address).or_else(|| host("127.0.0.1"))?;
    let protocol = match Protocol::parse(&wire.protocol) {
        Protocol::Http2 | Protocol::Grpc => Protocol::Http2,
        Protocol::Http | Protocol::Tcp => Protocol::Http,
    };
    let app = LocalApp::Tcp(Address { host, port: local_port });
    Some((port, ExposedPath { app, protocol }))
}

fn local_app(proxy: &api::Proxy, notes: &mut Notes) -> Option<LocalApp> {
    if !proxy.local_service_socket_path.is_empty() {
        return Some(LocalApp::Unix(PathBuf::from(&proxy.local_service_socket_path)));
    }
    let Some(port) = proxy.local_service_port.get() else {
        notes.push("the registration has neither local service port nor socket, so there is no public listener".into());
        return None;
    };
    let host = host(&proxy.local_service_address).or_else(|| host("127.0.0.1"))?;
    Some(LocalApp::Tcp(Address { host, port }))
}

fn upstreams(proxy: &api::Proxy, enterprise: bool, notes: &mut Notes) -> BTreeMap<OutboundKey, UpstreamPlan> {
    let mut bound = BTreeSet::new();
    let mut plans = BTreeMap::new();
    let tunnel = tunnel(Opaque::new(Some(&proxy.config), "proxy config"), notes).unwrap_or(true);
    for wire in &proxy.upstreams {
        let Some((key, plan)) = upstream(wire, &proxy.mesh_gateway.mode, tunnel, enterprise, notes) else { continue };
        if bound.insert(key.bind.clone()) {
            plans.insert(key, plan);
        } else {
            notes.push(format!("upstream {}: another one has the same address, so it is left out", plan.name));
        }
    }
    plans
}

/// One upstream; `None` for one that has no listener or cannot be served, the latter with a note.
fn upstream(
    wire: &api::Upstream,
    proxy_mode: &str,
    proxy_tunnel: bool,
    enterprise: bool,
    notes: &mut Notes,
) -> Option<(OutboundKey, UpstreamPlan)> {
    let name = &wire.destination_name;
    let bind = upstream_bind(wire, notes)?;
    if !wire.destination_peer.is_empty() {
        let peer = &wire.destination_peer;
        notes.push(format!(
            "upstream {name} of peer {peer}: not supported, as the agent's HTTP API does not offer a peer's roots"
        ));
        return None;
    }
    let place = format!("upstream {name}");
    let config = Opaque::new(Some(&wire.config), &place);
    for key in ["envoy_listener_json", "envoy_cluster_json"] {
        if config.has(key) {
            notes.push(format!("{place}: {key} is for Envoy and ignored"));
        }
    }
    let (kind, source) = match wire.destination_type.as_str() {
        "" | "service" => ("service", chain_source(wire, config, proxy_mode, enterprise, notes)),
        "prepared_query" => ("query", query_source(wire, config, notes)),
        other => {
            notes.push(format!("{place}: its type {other:?} is not known, so it is left out"));
            return None;
        }
    };
    let key = OutboundKey { destination: destination(kind, wire), bind };
    let plan = UpstreamPlan {
        name: name.clone(),
        source,
        limits: limits(config, notes),
        passive_health_check: passive_health_check(config, notes),
        requests: RequestSettings {
            per_try_timeout: above_zero(config.milliseconds("lictor_per_try_timeout_ms", notes)),
            expose_cause: expose_cause(config, notes),
            upgrades: upgrades(config, notes),
        },
        tunnel: tunnel(config, notes).unwrap_or(proxy_tunnel),
    };
    Some((key, plan))
}

/// `None`, without a note, for an entry that only carries settings for transparent proxies.
fn upstream_bind(wire: &api::Upstream, notes: &mut Notes) -> Option<Bind> {
    let name = &wire.destination_name;
    if !wire.local_bind_socket_path.is_empty() {
        let mode = &wire.local_bind_socket_mode;
        let parsed = socket_mode(mode);
        if parsed.is_none() && !mode.is_empty() {
            notes.push(format!("upstream {name}: socket mode {mode:?} is not an octal number, so it is ignored"));
        }
        return Some(Bind::Unix { path: PathBuf::from(&wire.local_bind_socket_path), mode: parsed });
    }
    let port = wire.local_bind_port.get()?;
    let address = if wire.local_bind_address.is_empty() { "127.0.0.1" } else { &wire.local_bind_address };
    let Some(address) = bind_ip(address) else {
        notes.push(format!("upstream {name}: {address:?} is not an IP address to bind, so it is left out"));
        return None;
    };
    Some(Bind::Tcp(SocketAddr::new(address, port)))
}

/// A literal address, or the one name whose meaning never needs a resolver.
fn bind_ip(text: &str) -> Option<IpAddr> {
    if text.eq_ignore_ascii_case("localhost") { Some(Ipv4Addr::LOCALHOST.into()) } else { ip(text) }
}

/// Consul reads `600` as decimal, which nobody means: here it is octal too.
fn socket_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").or_else(|| text.strip_prefix("0O")).unwrap_or(text);
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777)
}

fn destination(kind: &str, wire: &api::Upstream) -> String {
    let parts =
        [("dc", &wire.datacenter), ("ns", &wire.destination_namespace), ("partition", &wire.destination_partition)];
    let mut text = format!("{kind}:{}", wire.destination_name);
    let given = parts.into_iter().filter(|(_, value)| !value.is_empty());
    for (separator, (key, value)) in std::iter::once('?').chain(std::iter::repeat('&')).zip(given) {
        text.extend([separator.to_string().as_str(), key, "=", value]);
    }
    text
}

fn chain_source(
    wire: &api::Upstream,
    config: Opaque<'_>,
    proxy_mode: &str,
    enterprise: bool,
    notes: &mut Notes,
) -> Source {
    let merged = config.nested("mesh_gateway", config.place(), notes).text("mode", notes).unwrap_or_default();
    let modes = [wire.mesh_gateway.mode.as_str(), &merged, proxy_mode];
    let overrides = api::ChainOverrides {
        protocol: config.text("protocol", notes).filter(|p| !p.is_empty()).map(|p| p.to_ascii_lowercase()),
        mesh_gateway_mode: modes.into_iter().find(|mode| !mode.is_empty()).map(str::to_owned),
        connect_timeout: above_zero(config.milliseconds("connect_timeout_ms", notes)),
    };
    Source::Chain(ChainQuery {
        service: wire.destination_name.clone(),
        // Our own servers compile it, as though for that datacenter, which need not be alive for it.
        datacenter: Some(wire.datacenter.clone()).filter(|datacenter| !datacenter.is_empty()),
        namespace: tenancy(&wire.destination_namespace, enterprise),
        partition: tenancy(&wire.destination_partition, enterprise),
        overrides,
    })
}

fn query_source(wire: &api::Upstream, config: Opaque<'_>, notes: &mut Notes) -> Source {
    let datacenter = Some(wire.datacenter.clone()).filter(|datacenter| !datacenter.is_empty());
    Source::PreparedQuery {
        query: PreparedQuery { name: wire.destination_name.clone(), datacenter },
        protocol: config.text("protocol", notes).map_or(Protocol::Tcp, |protocol| Protocol::parse(&protocol)),
        connect_timeout: above_zero(config.milliseconds("connect_timeout_ms", notes)).unwrap_or(CONNECT_TIMEOUT),
    }
}

/// Off by default: a cause names addresses of instances and rules.
fn expose_cause(config: Opaque<'_>, notes: &mut Notes) -> bool {
    let set = config.count("lictor_expose_cause", notes);
    // The older spelling of the key.
    set.or_else(|| config.count("lictor_tell_cause", notes)).is_some_and(|on| on > 0)
}

/// What connections may be upgraded to beside `websocket`.
fn upgrades(config: Opaque<'_>, notes: &mut Notes) -> Upgrades {
    let names = config.names("lictor_upgrades", notes);
    if let Some(http) = names.iter().find(|name| Upgrades::is_http(name.as_bytes())) {
        let place = config.place();
        notes.push(format!(
            "{place}: lictor_upgrades names {http:?}, which is never forwarded: requests behind it could not be judged"
        ));
    }
    Upgrades::new(names)
}

/// Whether two of ours may use a session for several connections.
fn tunnel(config: Opaque<'_>, notes: &mut Notes) -> Option<bool> {
    config.count("lictor_tunnel", notes).map(|on| on > 0)
}

fn limits(config: Opaque<'_>, notes: &mut Notes) -> Limits {
    let place = format!("{} limits", config.place());
    let limits = config.nested("limits", &place, notes);
    let mut limit = |key| limits.count(key, notes).map(saturate);
    Limits {
        max_connections: limit("max_connections"),
        max_pending_requests: limit("max_pending_requests"),
        max_concurrent_requests: limit("max_concurrent_requests"),
    }
}

fn passive_health_check(config: Opaque<'_>, notes: &mut Notes) -> PassiveHealthCheck {
    let place = format!("{} passive_health_check", config.place());
    let check = config.nested("passive_health_check", &place, notes);
    let default = PassiveHealthCheck::default();
    let percent = |given: Option<u64>| given.map(|percent| u32::try_from(percent.min(100)).unwrap_or(100));
    PassiveHealthCheck {
        interval: above_zero(check.duration("interval", notes)).unwrap_or(default.interval),
        max_failures: check
            .count("max_failures", notes)
            .filter(|max| *max > 0)
            .map_or(default.max_failures, |max| u32::try_from(max).unwrap_or(u32::MAX)),
        enforcing_consecutive_5xx: percent(check.count("enforcing_consecutive_5xx", notes))
            .unwrap_or(default.enforcing_consecutive_5xx),
        max_ejection_percent: percent(check.count("max_ejection_percent", notes)),
        base_ejection_time: above_zero(check.duration("base_ejection_time", notes))
            .unwrap_or(default.base_ejection_time),
    }
}

fn above_zero(duration: Option<Duration>) -> Option<Duration> {
    duration.filter(|duration| !duration.is_zero())
}

fn saturate(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::AdHocUpstream;

    fn read(registration: Value) -> (Result<Definition, Bad>, Vec<String>) {
        let mut notes = Notes::default();
        let service = serde_json::from_value(registration).unwrap();
        (registered(&service, false, &mut notes), notes.take())
    }

    fn sidecar(service: Value, proxy: Value) -> (Definition, Vec<String>) {
        let mut registration = json!({"Kind": "connect-proxy", "ID": "web-sidecar-proxy", "Port": 21000});
        let mut whole = json!({"DestinationServiceName": "web", "LocalServicePort": 8080});
        registration.as_object_mut().unwrap().extend(service.as_object().unwrap().clone());
        whole.as_object_mut().unwrap().extend(proxy.as_object().unwrap().clone());
        registration["Proxy"] = whole;
        let (definition, notes) = read(registration);
        (definition.unwrap(), notes)
    }

    fn public_of(service: Value, proxy: Value) -> (Option<PublicPlan>, Vec<String>) {
        let (definition, notes) = sidecar(service, proxy);
        (definition.public, notes)
    }

    fn upstream_of(wire: Value) -> (Option<(OutboundKey, UpstreamPlan)>, Vec<String>) {
        let (definition, notes) = sidecar(json!({}), json!({ "Upstreams": [wire] }));
        (definition.upstreams.into_iter().next(), notes)
    }

    fn chain_query(wire: Value) -> ChainQuery {
        match upstream_of(wire).0.unwrap().1.source {
            Source::Chain(query) => query,
            other => panic!("not a chain: {other:?}"),
        }
    }

    #[test]
    fn only_a_sidecar_with_a_destination_will_do() {
        for (registration, expected) in [
            (json!({"ID": "web"}), "service \"web\" is an ordinary service, not a connect-proxy"),
            (json!({"ID": "gw", "Kind": "mesh-gateway"}), "service \"gw\" is mesh-gateway, not a connect-proxy"),
            (json!({"ID": "p", "Kind": "connect-proxy"}), "proxy \"p\" names no destination service"),
            (json!({"ID": "p", "Kind": "connect-proxy", "Proxy": {}}), "proxy \"p\" names no destination service"),
        ] {
            assert_eq!(read(registration).0.unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn the_public_listener_is_bound_where_the_registration_says() {
        for (service, config, expected) in [
            (json!({}), json!({}), Some("0.0.0.0:21000")),
            (json!({"Address": "10.0.0.5"}), json!({}), Some("10.0.0.5:21000")),
            (json!({"Address": "fd00::5"}), json!({}), Some("[fd00::5]:21000")),
            (json!({"Address": "10.0.0.5"}), json!({"bind_address": "127.0.0.1"}), Some("127.0.0.1:21000")),
            (json!({}), json!({"BindAddress": "[::]", "bind_port": "21001"}), Some("[::]:21001")),
            (json!({}), json!({"bind_port": 21002.0}), Some("0.0.0.0:21002")),
            (json!({"Port": 0}), json!({"bind_port": 21002}), Some("0.0.0.0:21002")),
            (json!({"Port": 0}), json!({}), None),
        ] {
            let (public, notes) = public_of(service.clone(), json!({ "Config": config }));
            let bind = public.map(|public| public.bind);
            assert_eq!(bind, expected.map(|address| Bind::Tcp(address.parse().unwrap())), "{service} {config}");
            assert_eq!(notes, Vec::<String>::new());
        }
    }

    #[test]
    fn a_bad_value_is_told_and_keeps_no_other_from_counting() {
        let config = json!({
            "bind_port": 70000, "bind_address": "here", "protocol": ["http"], "local_connect_timeout_ms": "soon",
            "max_inbound_connections": -1, "handshake_timeout_ms": "2500", "envoy_public_listener_json": "{}",
        });
        let (public, notes) = public_of(json!({"Address": "db.internal"}), json!({ "Config": config }));
        let public = public.unwrap();
        assert_eq!(public.bind, Bind::Tcp("0.0.0.0:21000".parse().unwrap()));
        assert_eq!(public.protocol, Protocol::Http);
        assert_eq!(public.local_connect_timeout, LOCAL_CONNECT_TIMEOUT);
        assert_eq!(public.handshake_timeout, Duration::from_millis(2500));
        assert_eq!(public.max_connections, None);
        for part in ["bind_port", "bind_address", "db.internal", "local_connect_timeout_ms", "max_inbound", "envoy_"] {
            assert_eq!(notes.iter().filter(|note| note.contains(part)).count(), 1, "{part} in {notes:?}");
        }
    }

    #[test]
    fn times_and_limits_have_consuls_defaults_and_meanings_of_zero() {
        let (public, _) = public_of(json!({}), json!({}));
        let public = public.unwrap();
        assert_eq!(public, plain_public(public.bind.clone(), public.local_app.clone()));
        let zeros = json!({
            "local_connect_timeout_ms": 0, "local_request_timeout_ms": 0, "local_idle_timeout_ms": 0,
            "handshake_timeout_ms": 0, "max_inbound_connections": 0,
        });
        let (zero, _) = public_of(json!({}), json!({ "Config": zeros }));
        let expected = PublicPlan { local_request_timeout: None, local_idle_timeout: None, ..public.clone() };
        assert_eq!(zero.unwrap(), expected);
        let (given, _) = public_of(
            json!({}),
            json!({"Config": {
                "local_connect_timeout_ms": 1.0, "LocalRequestTimeoutMs": 2, "local_idle_timeout_ms": "3",
                "max_inbound_connections": 4, "protocol": "GRPC",
            }}),
        );
        let expected = PublicPlan {
            local_connect_timeout: Duration::from_millis(1),
            local_request_timeout: Some(Duration::from_millis(2)),
            local_idle_timeout: Some(Duration::from_millis(3)),
            max_connections: Some(4),
            protocol: Protocol::Grpc,
            ..public
        };
        assert_eq!(given.unwrap(), expected);
    }

    #[test]
    fn the_local_app_is_a_socket_or_an_address() {
        let tcp = |host: &str, port| Some(LocalApp::Tcp(Address { host: super::host(host).unwrap(), port }));
        for (proxy, expected) in [
            (json!({}), tcp("127.0.0.1", 8080)),
            (json!({"LocalServiceAddress": "::1"}), tcp("::1", 8080)),
            (json!({"LocalServiceAddress": "app.local"}), tcp("app.local", 8080)),
            (json!({"LocalServiceSocketPath": "/run/app"}), Some(LocalApp::Unix("/run/app".into()))),
            (json!({"LocalServicePort": 0}), None),
        ] {
            let (public, notes) = public_of(json!({}), proxy.clone());
            assert_eq!(public.map(|public| public.local_app), expected, "{proxy}");
            assert_eq!(notes.is_empty(), expected.is_some(), "{proxy}");
        }
    }

    #[test]
    fn exposed_paths_are_gathered_by_port() {
        let exposed = |service: Value, paths: Value| {
            let (definition, notes) =
                sidecar(service, json!({"LocalServicePort": 8080, "Expose": {"Paths": paths, "Checks": false}}));
            let listener = |(bind, exposed): (&Bind, &Exposed)| {
                let path = |(path, to): (&String, &ExposedPath)| format!("{path} {} {:?}", to.app, to.protocol);
                (bind.to_string(), exposed.paths.iter().map(path).collect::<Vec<_>>())
            };
            (definition.exposed.iter().map(listener).collect::<Vec<_>>(), notes.len())
        };
        let path = |port: u16, path: &str, local: u16, protocol: &str| json!({"ListenerPort": port, "Path": path, "LocalPathPort": local, "Protocol": protocol});
        let on = |port: u16, paths: &[&str]| {
            (format!("0.0.0.0:{port}"), paths.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        for (paths, expected, noted) in [
            (json!([]), vec![], 0),
            (json!([path(1, "/a", 2, "")]), vec![on(1, &["/a 127.0.0.1:2 Http"])], 0),
            (
                json!([path(1, "/a", 2, "http"), path(3, "/a", 2, "http"), path(1, "/b", 4, "http2")]),
                vec![on(1, &["/a 127.0.0.1:2 Http", "/b 127.0.0.1:4 Http2"]), on(3, &["/a 127.0.0.1:2 Http"])],
                0,
            ),
            (json!([path(1, "/a", 2, ""), path(1, "/a", 3, "")]), vec![on(1, &["/a 127.0.0.1:2 Http"])], 1),
            (json!([path(0, "/a", 2, ""), path(1, "/a", 0, ""), path(1, "a", 2, "")]), vec![], 3),
            (json!([path(21000, "/a", 2, "")]), vec![], 1),
        ] {
            assert_eq!(exposed(json!({"Port": 21000}), paths.clone()), (expected, noted), "{paths}");
        }
        let one = json!([path(1, "/a", 2, "")]);
        assert_eq!(exposed(json!({"Port": 0, "Address": "10.0.0.1"}), one).0[0].0, "10.0.0.1:1");
        let (definition, notes) = sidecar(json!({}), json!({"LocalServicePort": 1, "Expose": {"Checks": true}}));
        assert!(definition.exposed.is_empty() && notes.iter().any(|note| note.contains("Expose.Checks")));
    }

    #[test]
    fn upstreams_are_bound_to_a_port_or_a_socket_or_left_out() {
        let unix = |mode| Some(Bind::Unix { path: "/run/db".into(), mode });
        let tcp = |address: &str| Some(Bind::Tcp(address.parse().unwrap()));
        for (wire, expected, told) in [
            (json!({"LocalBindPort": 9191}), tcp("127.0.0.1:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "::1"}), tcp("[::1]:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "localhost"}), tcp("127.0.0.1:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "db.local"}), None, true),
            (json!({"LocalBindSocketPath": "/run/db"}), unix(None), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "0600"}), unix(Some(0o600)), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "600"}), unix(Some(0o600)), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "rw"}), unix(None), true),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "07777"}), unix(None), true),
            (json!({}), None, false),
            (json!({"LocalBindPort": 9191, "DestinationPeer": "east"}), None, true),
            (json!({"LocalBindPort": 9191, "DestinationType": "wormhole"}), None, true),
        ] {
            let mut wire = wire;
            wire["DestinationName"] = "db".into();
            let (upstream, notes) = upstream_of(wire.clone());
            assert_eq!(upstream.map(|(key, _)| key.bind), expected, "{wire}");
            assert_eq!(notes.len(), usize::from(told), "{wire}: {notes:?}");
        }
    }

    #[test]
    fn a_place_is_given_to_the_first_that_asks_for_it() {
        let (definition, notes) = sidecar(
            json!({}),
            json!({"Upstreams": [
                {"DestinationName": "db", "LocalBindPort": 9191},
                {"DestinationName": "db", "LocalBindPort": 9191},
                {"DestinationName": "cache", "LocalBindPort": 9191},
                {"DestinationName": "db", "LocalBindPort": 9192},
                {"DestinationName": "db", "LocalBindPort": 9193, "Datacenter": "dc2", "DestinationNamespace": "x"},
                {"DestinationType": "prepared_query", "DestinationName": "db", "LocalBindPort": 9194},
            ]}),
        );
        let keys: Vec<_> =
            definition.upstreams.keys().map(|key| format!("{} {:?}", key.destination, key.bind)).collect();
        assert_eq!(
            keys,
            [
                "query:db Tcp(127.0.0.1:9194)",
                "service:db Tcp(127.0.0.1:9191)",
                "service:db Tcp(127.0.0.1:9192)",
                "service:db?dc=dc2&ns=x Tcp(127.0.0.1:9193)",
            ]
        );
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn a_chain_is_asked_for_with_what_the_upstream_overrides() {
        let plain = ChainQuery { service: "db".into(), ..ChainQuery::default() };
        assert_eq!(chain_query(json!({"DestinationName": "db", "LocalBindPort": 1})), plain);
        let all = json!({
            "DestinationName": "db", "LocalBindPort": 1, "Datacenter": "dc2", "DestinationNamespace": "default",
            "DestinationPartition": "part", "MeshGateway": {"Mode": "remote"},
            "Config": {"Protocol": "HTTP", "connect_timeout_ms": 3000.0, "mesh_gateway": {"Mode": "local"}},
        });
        let expected = ChainQuery {
            datacenter: Some("dc2".into()),
            // The community edition refuses the parameter, and `default` is what it means anyway.
            namespace: None,
            partition: Some("part".into()),
            overrides: api::ChainOverrides {
                protocol: Some("http".into()),
                mesh_gateway_mode: Some("remote".into()),
                connect_timeout: Some(Duration::from_secs(3)),
            },
            ..plain
        };
        assert_eq!(chain_query(all), expected);
        let merged =
            json!({"DestinationName": "db", "LocalBindPort": 1, "Config": {"mesh_gateway": {"Mode": "local"}}});
        assert_eq!(chain_query(merged).overrides.mesh_gateway_mode.as_deref(), Some("local"));
        let (definition, _) = sidecar(
            json!({}),
            json!({"MeshGateway": {"Mode": "none"}, "Upstreams": [{"DestinationName": "db", "LocalBindPort": 1}]}),
        );
        let inherited = definition.upstreams.into_values().next().unwrap().source;
        assert!(matches!(inherited, Source::Chain(q) if q.overrides.mesh_gateway_mode.as_deref() == Some("none")));
    }

    #[test]
    fn an_upstream_uses_the_tunnel_unless_it_or_the_proxy_says_otherwise() {
        let upstreams = json!([
            {"DestinationName": "a", "LocalBindPort": 1},
            {"DestinationName": "b", "LocalBindPort": 2, "Config": {"lictor_tunnel": true}},
            {"DestinationName": "c", "LocalBindPort": 3, "Config": {"LictorTunnel": false}},
        ]);
        for (config, public, expected) in [
            (json!({}), true, [true, true, false]),
            (json!({"lictor_tunnel": false}), false, [false, true, false]),
            (json!({"lictor_tunnel": "true"}), true, [true, true, false]),
        ] {
            let (mut definition, _) = sidecar(json!({}), json!({"Config": config, "Upstreams": upstreams}));
            let seen = |definition: &Definition| -> Vec<bool> {
                definition.upstreams.values().map(|upstream| upstream.tunnel).collect()
            };
            assert_eq!((definition.public.as_ref().unwrap().tunnel, seen(&definition)), (public, expected.to_vec()));
            definition.restrict_tunnel(false);
            assert_eq!((definition.public.as_ref().unwrap().tunnel, seen(&definition)), (false, vec![false; 3]));
        }
    }

    #[test]
    fn limits_and_health_checks_are_read_in_both_spellings() {
        let registered = json!({
            "limits": {"max_connections": 7, "max_pending_requests": 0, "max_concurrent_requests": "9"},
            "passive_health_check": {"interval": "30s", "max_failures": 3, "enforcing_consecutive_5xx": 50,
                "max_ejection_percent": 250, "base_ejection_time": "1m"},
            "lictor_per_try_timeout_ms": 250, "lictor_expose_cause": true, "lictor_upgrades": ["chat", "TLS/1.2"],
        });
        let merged = json!({
            "limits": {"MaxConnections": 7, "MaxPendingRequests": 0, "MaxConcurrentRequests": 9},
            "passive_health_check": {"Interval": 30_000_000_000_u64, "MaxFailures": 3, "EnforcingConsecutive5xx": 50,
                "MaxEjectionPercent": 250, "BaseEjectionTime": 60_000_000_000_u64},
            "LictorPerTryTimeoutMs": "250", "LictorTellCause": 1, "LictorUpgrades": "chat, TLS/1.2",
        });
        for config in [registered, merged] {
            let wire = json!({"DestinationName": "db", "LocalBindPort": 1, "Config": config});
            let (upstream, notes) = upstream_of(wire);
            let (_, plan) = upstream.unwrap();
            let limits =
                Limits { max_connections: Some(7), max_pending_requests: Some(0), max_concurrent_requests: Some(9) };
            let check = PassiveHealthCheck {
                interval: Duration::from_secs(30),
                max_failures: 3,
                enforcing_consecutive_5xx: 50,
                max_ejection_percent: Some(100),
                base_ejection_time: Duration::from_secs(60),
            };
            assert_eq!((plan.limits, plan.passive_health_check), (limits, check));
            let requests = RequestSettings {
                per_try_timeout: Some(Duration::from_millis(250)),
                expose_cause: true,
                upgrades: Upgrades::new(["chat".to_owned(), "TLS/1.2".to_owned()]),
            };
            assert_eq!(plan.requests, requests);
            assert_eq!(notes, Vec::<String>::new());
        }
        let (upstream, notes) = upstream_of(json!({"DestinationName": "db", "LocalBindPort": 1, "Config": {
            "limits": 7, "passive_health_check": {"interval": "0s", "max_failures": "many"},
        }}));
        let (_, plan) = upstream.unwrap();
        assert_eq!((plan.limits, plan.passive_health_check), (Limits::default(), PassiveHealthCheck::default()));
        assert_eq!(plan.requests, RequestSettings::default());
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn an_upgrade_to_http_is_not_taken_from_the_registration() {
        for (names, notes) in
            [(json!(["h2c", "chat"]), 1), (json!("HTTP/2.0"), 1), (json!({"a": 1}), 1), (json!(["chat"]), 0)]
        {
            let config = json!({"lictor_upgrades": names});
            let (upstream, noted) = upstream_of(json!({"DestinationName": "db", "LocalBindPort": 1, "Config": config}));
            let (_, plan) = upstream.unwrap();
            assert_eq!(noted.len(), notes, "{names} {noted:?}");
            assert!(!plan.requests.upgrades.allow(b"h2c") && plan.requests.upgrades.allow(b"websocket"));
        }
    }

    #[test]
    fn flags_define_a_proxy_too() {
        let upstream = |name: &str, prepared_query| AdHocUpstream {
            name: name.into(),
            prepared_query,
            bind: "127.0.0.1:9191".parse().unwrap(),
        };
        let flags = AdHoc {
            service: "web".into(),
            upstreams: vec![upstream("db", false), upstream("dbq", true)],
            public: Some(("0.0.0.0:8443".parse().unwrap(), ":8080".into())),
            register: None,
        };
        let definition = ad_hoc(&flags).unwrap();
        let public = definition.public.unwrap();
        assert_eq!(public.bind, Bind::Tcp("0.0.0.0:8443".parse().unwrap()));
        assert_eq!(public.local_app, LocalApp::Tcp(Address { host: super::host("127.0.0.1").unwrap(), port: 8080 }));
        let destinations: Vec<_> = definition.upstreams.keys().map(|key| key.destination.as_str()).collect();
        assert_eq!(destinations, ["query:dbq", "service:db"]);
        for app in ["app", "app:", "app:http", "app:0"] {
            let public = Some(("0.0.0.0:8443".parse().unwrap(), app.into()));
            assert!(ad_hoc(&AdHoc { public, ..flags.clone() }).is_err(), "{app}");
        }
    }
}
