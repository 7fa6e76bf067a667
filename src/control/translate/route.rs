//! Parts of routers, splitters and resolvers that only HTTP requests are concerned with.

use std::time::Duration;

use http::HeaderName;

use super::{Bad, Notes};
use crate::consul::api::{self, GoDuration};
use crate::snapshot::{
    CookieAttributes, CookieSource, Edits, HashPolicy, HashSource, HeaderMatch, IDLE_TIMEOUT, LoadBalancer,
    MAXIMUM_RING, MINIMUM_RING, Next, PathMatch, Pattern, Policy, QueryMatch, QueryTest, REQUEST_TIMEOUT, RetryOn,
    RetryPolicy, Route, RouteMatch, Text, ValueTest,
};

/// Reads a route that leads to `next`.
///
/// # Errors
/// When a request could not be matched or edited as the route says: a pattern or a header is not usable.
pub(super) fn route<R>(
    wire: &api::RouteDefinition,
    name: String,
    next: Next<R>,
    notes: &mut Notes,
) -> Result<Route<R>, Bad> {
    let nothing = api::RouteDestination::default();
    let destination = wire.destination.as_ref().unwrap_or(&nothing);
    let in_route = |bad: Bad| Bad(format!("its route {name}: {bad}"));
    Ok(Route {
        matches: wire.matches.http.as_ref().map(matches).transpose().map_err(in_route)?.unwrap_or_default(),
        prefix_rewrite: rewrite(&destination.prefix_rewrite),
        request_timeout: timeout(destination.request_timeout, REQUEST_TIMEOUT),
        idle_timeout: timeout(destination.idle_timeout, IDLE_TIMEOUT),
        sets_request_timeout: destination.request_timeout.nanoseconds() != 0,
        sets_idle_timeout: destination.idle_timeout.nanoseconds() != 0,
        service: destination.service.clone(),
        retries: retries(destination, &name, notes),
        request_edits: edits(destination.request_headers.as_ref(), notes).map_err(in_route)?,
        response_edits: edits(destination.response_headers.as_ref(), notes).map_err(in_route)?,
        next,
        name: name.into(),
    })
}

/// Zero is not set, and less is none.
pub(super) fn timeout(wire: GoDuration, default: Duration) -> Option<Duration> {
    if wire.nanoseconds() == 0 { Some(default) } else { wire.positive() }
}

/// Reads changes to headers.
///
/// # Errors
/// When one of them can't be made.
pub(super) fn edits(wire: Option<&api::HeaderModifiers>, notes: &mut Notes) -> Result<Edits, Bad> {
    let Some(wire) = wire else { return Ok(Edits::default()) };
    let add = wire.add.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let set = wire.set.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let edits = Edits::new(wire.remove.iter().map(String::as_str), add, set).map_err(|bad| Bad(bad.to_string()))?;
    for operator in edits.unknown_operators() {
        notes.push(format!("the operator %{operator}% in a header is not supported and has no value"));
    }
    Ok(edits)
}

/// Reads how a node's instances are chosen.
///
/// # Errors
/// When requests are to be hashed by a header that can't be.
pub(super) fn load_balancer(wire: Option<&api::LoadBalancer>, notes: &mut Notes) -> Result<LoadBalancer, Bad> {
    let Some(wire) = wire else { return Ok(LoadBalancer::default()) };
    let policy = match wire.policy.as_str() {
        "" => Policy::Unset,
        "round_robin" => Policy::RoundRobin,
        "random" => Policy::Random,
        "least_request" => {
            Policy::LeastRequest { choices: wire.least_request_config.as_ref().map_or(0, |c| c.choice_count).max(2) }
        }
        "ring_hash" => ring(wire.ring_hash_config.as_ref()),
        "maglev" => Policy::Maglev,
        other => {
            notes.push(format!("the load balancer's policy {other:?} is not known, so the default policy is used"));
            Policy::Unset
        }
    };
    let hash_policies = wire.hash_policies.iter().filter_map(|wire| hash_policy(wire, notes).transpose());
    Ok(LoadBalancer { policy, hash_policies: hash_policies.collect::<Result<_, _>>()? })
}

fn ring(wire: Option<&api::RingHashConfig>) -> Policy {
    let or = |size: Option<u64>, default| size.filter(|size| *size > 0).unwrap_or(default);
    Policy::RingHash {
        minimum: or(wire.map(|wire| wire.minimum_ring_size), MINIMUM_RING),
        maximum: or(wire.map(|wire| wire.maximum_ring_size), MAXIMUM_RING),
    }
}

fn hash_policy(wire: &api::HashPolicy, notes: &mut Notes) -> Result<Option<HashPolicy>, Bad> {
    let source = match wire.field.as_str() {
        "" if wire.source_ip => HashSource::SourceIp,
        "header" => HashSource::Header(
            HeaderName::from_bytes(wire.field_value.as_bytes())
                .map_err(|_| Bad(format!("requests can't be hashed by a header {:?}", wire.field_value)))?,
        ),
        "query_parameter" => HashSource::Query(wire.field_value.clone()),
        "cookie" => HashSource::Cookie(CookieSource {
            name: wire.field_value.clone(),
            generate: wire.cookie_config.as_ref().and_then(cookie),
        }),
        other => {
            notes.push(format!("a hash policy of the kind {other:?} is not known and left out"));
            return Ok(None);
        }
    };
    Ok(Some(HashPolicy { source, terminal: wire.terminal }))
}

/// Neither a session's cookie nor one with an age: none is made up.
fn cookie(wire: &api::CookieConfig) -> Option<CookieAttributes> {
    let max_age = wire.ttl.positive();
    let path = Some(wire.path.clone()).filter(|path| !path.is_empty());
    (wire.session || max_age.is_some()).then_some(CookieAttributes { max_age, path })
}

fn rewrite(text: &str) -> Option<String> {
    match text {
        "" => None,
        path if path.starts_with('/') => Some(path.to_owned()),
        path => Some(format!("/{path}")),
    }
}

fn retries(wire: &api::RouteDestination, route: &str, notes: &mut Notes) -> Option<RetryPolicy> {
    let mut conditions = Vec::new();
    for text in &wire.retry_on {
        match RetryOn::parse(text) {
            Some(condition) => conditions.push(condition),
            None => notes.push(format!("route {route}: the retry condition {text:?} is not known and left out")),
        }
    }
    if wire.retry_on_connect_failure {
        conditions.push(RetryOn::ConnectFailure);
    }
    RetryPolicy::new(wire.num_retries, conditions, wire.retry_on_status_codes.clone())
}

fn matches(wire: &api::RouteHttpMatch) -> Result<RouteMatch, Bad> {
    let headers = wire.header.iter().filter_map(|wire| header(wire).transpose());
    let query = wire.query_param.iter().filter_map(|wire| query(wire).transpose());
    Ok(RouteMatch {
        path: path(wire)?,
        headers: headers.collect::<Result<_, _>>()?,
        query: query.collect::<Result<_, _>>()?,
        methods: wire.methods.clone(),
    })
}

fn path(wire: &api::RouteHttpMatch) -> Result<PathMatch, Bad> {
    let text = |path: &str| Text::new(path, wire.case_insensitive);
    Ok(match (wire.path_exact.as_str(), wire.path_prefix.as_str(), wire.path_regex.as_str()) {
        ("", "", "") => PathMatch::Any,
        ("", "", regex) => PathMatch::Regex(Pattern::new(regex).map_err(bad)?),
        ("", prefix, _) => PathMatch::Prefix(text(prefix)),
        (exact, _, _) => PathMatch::Exact(text(exact)),
    })
}

/// An entry with no kind of test is skipped, as Consul's own Envoy configuration does.
fn header(wire: &api::RouteHeaderMatch) -> Result<Option<HeaderMatch>, Bad> {
    let text = |text: &str| Text::new(text, false);
    let test = if !wire.exact.is_empty() {
        ValueTest::Exact(text(&wire.exact))
    } else if !wire.regex.is_empty() {
        ValueTest::Regex(Pattern::new(&wire.regex).map_err(bad)?)
    } else if !wire.prefix.is_empty() {
        ValueTest::Prefix(text(&wire.prefix))
    } else if !wire.suffix.is_empty() {
        ValueTest::Suffix(text(&wire.suffix))
    } else if wire.present {
        ValueTest::Present
    } else {
        return Ok(None);
    };
    match HeaderMatch::new(&wire.name, test, wire.invert) {
        Some(matches) => Ok(Some(matches)),
        None => Err(Bad(format!("requests can't be matched by a header {:?}", wire.name))),
    }
}

fn query(wire: &api::RouteQueryMatch) -> Result<Option<QueryMatch>, Bad> {
    let test = if !wire.exact.is_empty() {
        QueryTest::Exact(wire.exact.clone())
    } else if !wire.regex.is_empty() {
        QueryTest::Regex(Pattern::new(&wire.regex).map_err(bad)?)
    } else if wire.present {
        QueryTest::Present
    } else {
        return Ok(None);
    };
    Ok(Some(QueryMatch { name: wire.name.clone(), test }))
}

fn bad(error: impl ToString) -> Bad {
    Bad(error.to_string())
}
