//! The definition that flags give instead of a registration.

use std::collections::BTreeMap;

use super::super::{Bad, host};
use super::plan::{CONNECT_TIMEOUT, Definition, Source, UpstreamPlan};
use super::public::plain_public;
use crate::config::AdHoc;
use crate::consul::api;
use crate::control::query::{ChainQuery, PreparedQuery};
use crate::snapshot::{
    Address, Bind, Limits, LocalApp, MetricsSettings, OutboundKey, PassiveHealthCheck, Protocol, RequestSettings,
};
use crate::trace;

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
        traces: trace::Settings {
            service: flags.service.clone(),
            node: format!("{}-proxy", flags.service),
            ..trace::Settings::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdHocUpstream;

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
        assert_eq!(public.local_app, LocalApp::Tcp(Address { host: host("127.0.0.1").unwrap(), port: 8080 }));
        let destinations: Vec<_> = definition.upstreams.keys().map(|key| key.destination.as_str()).collect();
        assert_eq!(destinations, ["query:dbq", "service:db"]);
        for app in ["app", "app:", "app:http", "app:0"] {
            let public = Some(("0.0.0.0:8443".parse().unwrap(), app.into()));
            assert!(ad_hoc(&AdHoc { public, ..flags.clone() }).is_err(), "{app}");
        }
    }
}
