//! The proxy's own definition: its registration, or the flags of the ad-hoc mode.

mod ad_hoc;
mod exposed;
#[cfg(test)]
mod fixture;
mod options;
mod plan;
mod public;
mod upstreams;

pub(in crate::control) use self::ad_hoc::ad_hoc;
use self::exposed::exposed;
pub(in crate::control) use self::options::audits_all;
pub(in crate::control) use self::plan::{CONNECT_TIMEOUT, Definition, PublicPlan, Source, UpstreamPlan};
use self::public::public;
use self::upstreams::upstreams;
use super::opaque::Opaque;
use super::{Bad, Notes, access_log, metrics, traces};
use crate::consul::api;

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
    let config = Opaque::new(Some(&proxy.config), "proxy config");
    Ok(Definition {
        service: proxy.destination_service_name.clone(),
        exposed: exposed(service, proxy, public.as_ref(), notes),
        public,
        upstreams: upstreams(proxy, enterprise, notes),
        access_log: access_log::settings(proxy.access_logs.as_ref(), notes),
        metrics: metrics::settings(config, notes),
        traces: traces::settings(config, &proxy.destination_service_name, &service.id, notes),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::fixture::read;

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
}
