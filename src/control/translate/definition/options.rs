//! Settings that several parts of a registration have in common.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::super::opaque::Opaque;
use super::super::{Notes, ip};
use crate::consul::api;
use crate::snapshot::{Limits, PassiveHealthCheck, Upgrades};

/// Off by default: a cause names addresses of instances and rules.
pub(super) fn expose_cause(config: Opaque<'_>, notes: &mut Notes) -> bool {
    let set = config.count("lictor_expose_cause", notes);
    // The older spelling of the key.
    set.or_else(|| config.count("lictor_tell_cause", notes)).is_some_and(|on| on > 0)
}

/// The key of the proxy's `Config` that turns audit mode on.
const AUDIT: &str = "lictor_intentions_audit";

/// Whether proxy-defaults has the key, which the agent merges into every registration.
pub(in crate::control) fn audits_all(entry: &api::ProxyDefaults) -> bool {
    Opaque::new(Some(&entry.config), "proxy-defaults").has(AUDIT)
}

/// Whether denied traffic is logged and let through. Anything but a plain `true` is false.
pub(super) fn audit(config: Opaque<'_>, notes: &mut Notes) -> bool {
    config.switch(AUDIT, notes).unwrap_or(false)
}

/// Allowed upgrades of connections beside `websocket`.
pub(super) fn upgrades(config: Opaque<'_>, notes: &mut Notes) -> Upgrades {
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
pub(super) fn tunnel(config: Opaque<'_>, notes: &mut Notes) -> Option<bool> {
    config.count("lictor_tunnel", notes).map(|on| on > 0)
}

/// Whether clients get the rule that denies them, tcp only.
pub(super) fn share_denial_rule(config: Opaque<'_>, notes: &mut Notes) -> bool {
    config.count("lictor_share_denial_rule", notes).is_some_and(|on| on > 0)
}

pub(super) fn limits(config: Opaque<'_>, notes: &mut Notes) -> Limits {
    let place = format!("{} limits", config.place());
    let limits = config.nested("limits", &place, notes);
    let mut limit = |key| limits.count(key, notes).map(saturate);
    Limits {
        max_connections: limit("max_connections"),
        max_pending_requests: limit("max_pending_requests"),
        max_concurrent_requests: limit("max_concurrent_requests"),
    }
}

pub(super) fn passive_health_check(config: Opaque<'_>, notes: &mut Notes) -> PassiveHealthCheck {
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

pub(super) fn above_zero(duration: Option<Duration>) -> Option<Duration> {
    duration.filter(|duration| !duration.is_zero())
}

pub(super) fn saturate(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// A literal address, or the one name whose meaning never needs a resolver.
pub(super) fn bind_ip(text: &str) -> Option<IpAddr> {
    if text.eq_ignore_ascii_case("localhost") { Some(Ipv4Addr::LOCALHOST.into()) } else { ip(text) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::fixture::upstream_of;
    use crate::snapshot::{Limits, PassiveHealthCheck, RequestSettings, Upgrades};

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
}
