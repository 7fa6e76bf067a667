//! Waits before the first snapshot: for the agent, for our token, and for our registration.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

use super::draft::Want;
use super::query::Query;
use crate::consul::{self, Client, api};

/// Time between attempts to reach the agent before anything is known.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a token that the agent does not know is waited for at the start. One that was just created has to reach
/// all servers, and an agent remembers for `acl.token_ttl`, 30 s by default, that it did not know a token.
pub(super) const UNKNOWN_TOKEN_WAIT: Duration = Duration::from_secs(40);
/// Interval between two log lines about one wait.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Finds the id of the only sidecar that is registered for the service with the id `service_id`, whatever
/// its case. An agent that is not there yet is waited for without end.
///
/// # Errors
/// When there is none or more than one, or the agent refuses to say.
pub(super) async fn resolve_proxy_id(client: &Client, service_id: &str) -> anyhow::Result<String> {
    let mut reported: Option<Instant> = None;
    let mut unknown_token = UnknownToken::default();
    loop {
        match client.agent_services().await {
            Ok(services) => return only_sidecar(&services, service_id),
            Err(error) if unknown_token.may_become_known(&error) => {}
            Err(error) if !is_passing(&error) => bail!("can't look up the sidecar of {service_id}: {error}"),
            Err(error) => {
                if reported.is_none_or(|at| at.elapsed() >= REPORT_INTERVAL) {
                    tracing::warn!("waiting for the agent, to look up the sidecar of {service_id}: {error}");
                    reported = Some(Instant::now());
                }
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Whether waiting may help: an agent that starts, stops or is overloaded.
fn is_passing(error: &consul::Error) -> bool {
    let server_side = matches!(error.kind(), consul::ErrorKind::Status { code, .. } if *code >= 500);
    error.is_transport() || error.is_rate_limited() || server_side
}

fn only_sidecar(services: &BTreeMap<String, api::AgentService>, service_id: &str) -> anyhow::Result<String> {
    let is_sidecar = |service: &api::AgentService| {
        let of = service.proxy.as_ref().map(|proxy| &proxy.destination_service_id);
        service.kind == "connect-proxy" && of.is_some_and(|of| of.to_lowercase() == service_id.to_lowercase())
    };
    let ids: Vec<&str> =
        services.iter().filter(|(_, service)| is_sidecar(service)).map(|(id, _)| id.as_str()).collect();
    match ids[..] {
        [id] => Ok(id.to_owned()),
        [] => bail!(
            "No sidecar proxy registered for {service_id}: register the service with a sidecar_service, or use a \
             token that may read it (service:read)"
        ),
        _ => bail!(
            "More than one sidecar proxy registered for {service_id}: {}. Start proxy with -proxy-id and one of them",
            ids.join(", ")
        ),
    }
}

/// Since when the agent does not know our token.
#[derive(Debug, Default)]
pub(super) struct UnknownToken(Option<Instant>);

impl UnknownToken {
    /// Whether the error is of a token that may yet become known; says so the first time.
    pub(super) fn may_become_known(&mut self, error: &consul::Error) -> bool {
        if !error.is_unknown_token() {
            return false;
        }
        let first = self.0.is_none();
        let since = *self.0.get_or_insert_with(Instant::now);
        if first {
            tracing::warn!(
                "the agent does not know the token: waiting for up to {} s, in case that it was created just now",
                UNKNOWN_TOKEN_WAIT.as_secs()
            );
        }
        since.elapsed() < UNKNOWN_TOKEN_WAIT
    }
}

/// With more queries about upstreams than this, none is sent before the first snapshot: the agent would answer hundreds of
/// queries while the public listener waits for a few.
const FEW_UPSTREAMS: usize = 16;
/// Longest time for which they are held back.
const HOLD_BACK: Duration = Duration::from_secs(1);

/// Queries about upstreams that wait for the first snapshot.
#[derive(Debug, Default)]
pub(super) struct HeldBack {
    queries: Vec<Query>,
    /// When they are sent all the same.
    pub(super) until: Option<Instant>,
    is_over: bool,
}

impl HeldBack {
    /// Keeps the queries that wait; gives the rest.
    pub(super) fn hold(&mut self, mut wants: Vec<Want>, now: Instant) -> Vec<Want> {
        let waits = |want: &Want| matches!(want, Want::Start(query) if query.is_about_upstreams());
        // Once some are held back, an end of one of them has to be seen, however few are left.
        let are_few = self.until.is_none() && wants.iter().filter(|want| waits(want)).count() <= FEW_UPSTREAMS;
        if self.is_over || are_few {
            return wants;
        }
        wants.retain(|want| match want {
            Want::Start(query) if query.is_about_upstreams() => {
                self.queries.push(query.clone());
                false
            }
            Want::Start(_) => true,
            Want::Stop(query) => {
                let held = self.queries.iter().position(|held| held == query);
                held.map(|position| self.queries.remove(position)).is_none()
            }
        });
        self.until.get_or_insert(now + HOLD_BACK);
        wants
    }

    /// What has waited. Nothing waits from here on.
    pub(super) fn release(&mut self) -> Vec<Want> {
        self.is_over = true;
        self.until = None;
        std::mem::take(&mut self.queries).into_iter().map(Want::Start).collect()
    }
}

/// The state of our registration, for the log.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Registration {
    #[default]
    Unknown,
    Known,
    Missing,
}

impl Registration {
    /// A registration that is gone does not end us: it may be a reload of the agent's configuration, and the
    /// service behind us runs on.
    pub(super) fn failed(&mut self, id: &str, error: &consul::Error) {
        if !error.is_not_found() {
            return;
        }
        match std::mem::replace(self, Self::Missing) {
            Self::Missing => {}
            Self::Unknown => tracing::warn!(
                "no proxy with the id {id} is registered with this agent: waiting for it; register it with \
                 `consul services register`, or give its id with -proxy-id"
            ),
            Self::Known => tracing::warn!(
                "the registration {id} is gone from the agent: the last one that was read stays in use until it is back"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::query::PreparedQuery;
    use super::*;

    #[test]
    fn what_is_held_back_and_not_wanted_any_more_is_never_sent() {
        let query = |number: usize| Query::PreparedQuery(PreparedQuery { name: number.to_string(), datacenter: None });
        let mut held = HeldBack::default();
        let now = Instant::now();
        assert!(held.hold((0..17).map(|number| Want::Start(query(number))).collect(), now).is_empty());
        for number in 0..16 {
            assert!(held.hold(vec![Want::Stop(query(number))], now).is_empty());
        }
        assert_eq!(held.release().len(), 1);
    }

    #[test]
    fn the_only_sidecar_of_a_service_is_found_whatever_the_case() {
        let service = |kind: &str, of: &str| json!({"Kind": kind, "Proxy": {"DestinationServiceID": of}});
        let services: BTreeMap<String, api::AgentService> = serde_json::from_value(json!({
            "web": {"ID": "web"},
            "web-sidecar-proxy": service("connect-proxy", "Web"),
            "web-gateway": service("mesh-gateway", "web"),
            "db-1": service("connect-proxy", "db"),
            "db-2": service("connect-proxy", "db"),
        }))
        .unwrap();
        assert_eq!(only_sidecar(&services, "wEB").unwrap(), "web-sidecar-proxy");
        let none = only_sidecar(&services, "cache").unwrap_err().to_string();
        assert!(none.contains("No sidecar proxy registered for cache"), "{none}");
        let several = only_sidecar(&services, "db").unwrap_err().to_string();
        assert!(several.contains("More than one sidecar proxy registered for db: db-1, db-2"), "{several}");
        assert!(several.contains("Start proxy with -proxy-id"), "{several}");
    }
}
