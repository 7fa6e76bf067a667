//! The public listener of a registration.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::super::opaque::Opaque;
use super::super::{Notes, host};
use super::options::{above_zero, audit, bind_ip, expose_cause, saturate, share_denial_rule, tunnel, upgrades};
use super::plan::PublicPlan;
use crate::consul::api;
use crate::snapshot::{Address, Bind, LocalApp, Protocol, Upgrades};

/// Consul's default for connecting to the local app.
pub(super) const LOCAL_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Envoy's route default, which Consul leaves alone.
pub(super) const LOCAL_REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Envoy's stream idle default, which Consul leaves alone.
pub(super) const LOCAL_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Consul's built-in proxy documents this value for `handshake_timeout_ms`.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn public(service: &api::AgentService, proxy: &api::Proxy, notes: &mut Notes) -> Option<PublicPlan> {
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
        audit: audit(config, notes),
        upgrades: upgrades(config, notes),
        tunnel: tunnel(config, notes).unwrap_or(true),
        share_denial_rule: share_denial_rule(config, notes),
        ..plain
    })
}

pub(super) fn plain_public(bind: Bind, local_app: LocalApp) -> PublicPlan {
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
        audit: false,
        upgrades: Upgrades::default(),
        tunnel: true,
        share_denial_rule: false,
    }
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
pub(super) fn bind_address(service: &api::AgentService, config: Opaque<'_>, notes: &mut Notes) -> IpAddr {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::fixture::sidecar;
    use super::*;

    fn public_of(service: Value, proxy: Value) -> (Option<PublicPlan>, Vec<String>) {
        let (definition, notes) = sidecar(service, proxy);
        (definition.public, notes)
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
                "max_inbound_connections": 4, "protocol": "GRPC", "lictor_share_denial_rule": true,
            }}),
        );
        let expected = PublicPlan {
            local_connect_timeout: Duration::from_millis(1),
            local_request_timeout: Some(Duration::from_millis(2)),
            local_idle_timeout: Some(Duration::from_millis(3)),
            max_connections: Some(4),
            protocol: Protocol::Grpc,
            share_denial_rule: true,
            ..public
        };
        assert_eq!(given.unwrap(), expected);
    }

    #[test]
    fn audit_mode_is_on_where_it_is_plainly_said_and_off_otherwise() {
        for (value, expected, noted) in [
            (json!(true), true, 0),
            (json!("true"), true, 0),
            (json!(1), true, 0),
            (json!(false), false, 0),
            (json!("false"), false, 0),
            (json!(null), false, 0),
            (json!(2), false, 1),
            (json!("yes"), false, 1),
            (json!({"on": true}), false, 1),
        ] {
            let (public, notes) = public_of(json!({}), json!({"Config": {"lictor_intentions_audit": value}}));
            assert_eq!((public.unwrap().audit, notes.len()), (expected, noted), "{value} {notes:?}");
        }
        assert!(!public_of(json!({}), json!({})).0.unwrap().audit);
    }

    #[test]
    fn the_local_app_is_a_socket_or_an_address() {
        let tcp = |name: &str, port| Some(LocalApp::Tcp(Address { host: host(name).unwrap(), port }));
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
}
