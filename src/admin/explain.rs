//! `/explain`: the path of a request through router, splitter, resolver and balancer, and what decides it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::json;

use super::explanation::{EndpointNow, Explanation, Recent, Setting, Step, TargetNow, Way};
use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use crate::observe::target_name;
use crate::snapshot::{
    LoadBalancer, Next, Node, OutboundListener, Policy, Protocol, RequestView, Resolver, Route, RouteMatch, Routed,
    Snapshot, Splitter, Target, Upstream,
};
use crate::stats::scope::Cluster;

/// Consul's default for `ConnectTimeout` of a service-resolver.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

const DEFAULT: &str = "default";

/// Problems of an upstream that are shown, the newest ones.
const PROBLEMS: usize = 3;

/// `upstream`, `method` (GET), `path` (/), `header` (`name: value`, one a line), `format` (`text`, `json`).
pub(super) fn explain(state: &State, query: &Query) -> Reply {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let listener = match find(&snapshot, query.get("upstream").map_or("", String::as_str)) {
        Ok(listener) => listener,
        Err(fault) => return reply::status(StatusCode::NOT_FOUND, fault),
    };
    let headers = match headers(query.get("header").map_or("", String::as_str)) {
        Ok(headers) => headers,
        Err(fault) => return reply::status(StatusCode::BAD_REQUEST, fault),
    };
    let explanation = explanation(state, listener, query, &headers);
    match query.get("format").map(String::as_str) {
        Some("json") => reply::json(&json!(explanation)),
        _ => reply::text(explanation.to_string()),
    }
}

/// # Errors
/// When there is no such upstream; a sentence with those that there are.
fn find<'a>(snapshot: &'a Snapshot, wanted: &str) -> Result<&'a Arc<OutboundListener>, String> {
    let is_named =
        |listener: &&Arc<OutboundListener>| listener.upstream.name == wanted || listener.key.destination == wanted;
    snapshot.outbound.values().find(is_named).ok_or_else(|| {
        let names: Vec<&str> = snapshot.outbound.values().map(|listener| &*listener.upstream.name).collect();
        let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        format!("there is no upstream {wanted:?} in the sidecar's registration; there are: {names}\n")
    })
}

/// # Errors
/// When it is no header; a sentence.
pub(super) fn headers(text: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        // The value may be a token, and is not shown.
        let Some((name, value)) = line.split_once(':') else {
            return Err("a header without a colon: write name: value\n".to_owned());
        };
        let name = HeaderName::try_from(name.trim()).map_err(|_| format!("{name:?} is no name of a header\n"))?;
        let value = HeaderValue::try_from(value.trim()).map_err(|_| format!("the value of {name} can't be sent\n"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn explanation(state: &State, listener: &OutboundListener, query: &Query, headers: &HeaderMap) -> Explanation {
    let upstream = &listener.upstream;
    let mut result = Explanation {
        upstream: upstream.name.clone(),
        bind: listener.key.bind.to_string(),
        problems: problems(state, &upstream.name),
        ..Explanation::default()
    };
    if upstream.awaited.is_some() {
        result.fault = Some(
            "no discovery chain received yet: a connection fetches it and waits for 5 s at most; `lictor status` \
             and the log say what the agent does not answer"
                .to_owned(),
        );
        return result;
    }
    result.protocol = protocol(upstream);
    if upstream.chain.protocol == Protocol::Tcp {
        if let Node::Resolver(resolver) = &upstream.chain.start {
            result.ways = vec![way(state, upstream, 100.0, &upstream.chain.service, resolver)];
        }
    } else {
        request(&mut result, state, upstream, query, headers);
    }
    result.settings.extend(limits(upstream));
    if result.fault.is_none() {
        result.fault = fault(&result.ways);
    }
    result
}

fn request(result: &mut Explanation, state: &State, upstream: &Upstream, query: &Query, headers: &HeaderMap) {
    let target = query.get("path").filter(|path| !path.is_empty()).map_or("/", String::as_str);
    let (path, search) = target.split_once('?').map_or((target, None), |(path, search)| (path, Some(search)));
    let authority = headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let view = RequestView {
        method: query.get("method").filter(|method| !method.is_empty()).map_or("GET", String::as_str),
        path,
        path_as_written: true,
        query: search,
        authority,
        headers,
    };
    result.request = Some(format!("{} {target}", view.method));
    let service = &upstream.chain.service;
    // The number draws a leg, which is not shown, and nothing else.
    let Some(routed) = upstream.chain.route(&view, 0) else {
        result.steps.push(step("router", "no route matches", &format!("service-router/{service}")));
        result.fault = Some(format!("no route of service-router/{service} matches: the answer is 404"));
        return;
    };
    let place = route(&mut result.steps, upstream, &routed);
    let splitter = match (&upstream.chain.start, routed.route.map(|route| &route.next)) {
        (Node::Splitter(splitter), _) | (_, Some(Next::Splitter(splitter))) => Some(splitter),
        _ => None,
    };
    result.ways = match splitter {
        Some(splitter) => split(&mut result.steps, state, upstream, splitter),
        None => {
            let named = routed.route.map(|route| &route.service).filter(|service| !service.is_empty());
            vec![way(state, upstream, 100.0, named.unwrap_or(service), routed.resolver)]
        }
    };
    result.settings = timeouts(upstream, &routed, &place);
}

/// Tells the route; gives its place as a config entry: `service-router/db, route 2`.
fn route(steps: &mut Vec<Step>, upstream: &Upstream, routed: &Routed<'_>) -> String {
    let entry = format!("service-router/{}", upstream.chain.service);
    let (Node::Router(routes), Some(route)) = (&upstream.chain.start, routed.route) else {
        steps.push(step("router", "every request goes on", &format!("there is no {entry}")));
        return entry;
    };
    let place = routes.iter().position(|one| std::ptr::eq(one, route)).map_or(0, |at| at + 1);
    let says = format!("route {place} of {} is the first that matches: {}", routes.len(), conditions(&route.matches));
    let from = format!("{entry}, route {place}");
    steps.push(step("router", &says, &from));
    if let Some(path) = &routed.path {
        steps.push(step("router", &format!("the path becomes {path}"), &from));
    }
    from
}

fn conditions(matches: &RouteMatch) -> String {
    let headers = matches.headers.iter().map(ToString::to_string);
    let query = matches.query.iter().map(ToString::to_string);
    let methods = (!matches.methods.is_empty()).then(|| format!("method {}", matches.methods.join(" or ")));
    let all: Vec<String> =
        std::iter::once(matches.path.to_string()).chain(methods).chain(headers).chain(query).collect();
    all.join(", ")
}

fn split(steps: &mut Vec<Step>, state: &State, upstream: &Upstream, splitter: &Splitter) -> Vec<Way> {
    let legs = splitter.legs();
    let total: u64 = legs.iter().map(|leg| leg.weight).sum();
    let says = format!("each request draws one of {} ways by weight", legs.len());
    steps.push(step("splitter", &says, &format!("service-splitter/{}", splitter.service)));
    legs.iter().map(|leg| way(state, upstream, share(leg.weight, total), &leg.service, &leg.resolver)).collect()
}

#[expect(clippy::cast_precision_loss)]
fn share(weight: u64, total: u64) -> f64 {
    if total == 0 { 0.0 } else { weight as f64 * 100.0 / total as f64 }
}

/// `named` is the service that the step before names; empty where that is not known.
fn way(state: &State, upstream: &Upstream, share: f64, named: &str, resolver: &Resolver) -> Way {
    let service = resolver.targets.first().map_or("", |target| &target.service);
    let entry = format!("service-resolver/{service}");
    let says = resolver.targets.first().map_or_else(|| "leads to no target".to_owned(), ToString::to_string);
    let chain = &upstream.chain;
    let from = if upstream.settings.is_query {
        format!("prepared query {}", chain.service)
    } else if !named.is_empty() && !service.eq_ignore_ascii_case(named) {
        format!("service-resolver/{named} redirects to it")
    } else if resolver.is_configured {
        entry.clone()
    } else {
        format!("there is no {entry}")
    };
    let targets = resolver.targets.iter().map(|target| self::target(state, upstream, resolver, &entry, target));
    Way {
        share,
        resolver: step("resolver", &says, &from),
        balancer: balancer(&resolver.load_balancer, &entry),
        targets: targets.collect(),
    }
}

fn balancer(balancer: &LoadBalancer, entry: &str) -> Setting {
    let value = match balancer.policy {
        Policy::Unset => return setting("of two random instances the one with less in flight", DEFAULT),
        Policy::RoundRobin => "round_robin".to_owned(),
        Policy::Random => "random".to_owned(),
        Policy::LeastRequest { choices } => format!("least_request of {choices}"),
        Policy::RingHash { .. } => "ring_hash".to_owned(),
        Policy::Maglev => "maglev".to_owned(),
    };
    setting(&value, entry)
}

fn target(state: &State, upstream: &Upstream, resolver: &Resolver, entry: &str, target: &Target) -> TargetNow {
    let from = if upstream.settings.connect_timeout {
        "connect_timeout_ms of the upstream's config".to_owned()
    } else if target.connect_timeout != CONNECT_TIMEOUT {
        entry.to_owned()
    } else if resolver.is_configured {
        format!("{entry}, or the default")
    } else {
        DEFAULT.to_owned()
    };
    let cluster = state.stats.cluster(&Cluster::Target(Arc::new(target_name(target))));
    let members = cluster.members();
    let endpoints = members.usable.iter().map(|member| EndpointNow {
        address: member.address.clone(),
        state: member.state.word().to_owned(),
        weight: member.weight,
        in_flight: member.in_flight,
        latency_ms: member.latency.map(|micros| f64::from(micros) / 1000.0),
    });
    TargetNow {
        id: target.id.clone(),
        service: target.service.clone(),
        datacenter: target.datacenter.clone(),
        connect_timeout: timeout(Some(target.connect_timeout), &from),
        registered: members.registered,
        endpoints: endpoints.collect(),
    }
}

fn timeouts(upstream: &Upstream, routed: &Routed<'_>, place: &str) -> Vec<(String, Setting)> {
    let resolver = matches!(upstream.chain.start, Node::Resolver(_)).then_some(routed.resolver);
    let by_route = |sets: fn(&Route) -> bool| routed.route.is_some_and(sets);
    let request = if by_route(|route| route.sets_request_timeout) {
        place.to_owned()
    } else if let Some(resolver) = resolver.filter(|resolver| resolver.sets_request_timeout) {
        format!("service-resolver/{}", resolver.targets.first().map_or("", |target| &target.service))
    } else {
        DEFAULT.to_owned()
    };
    let idle = if by_route(|route| route.sets_idle_timeout) { place } else { DEFAULT };
    let mut all = vec![
        ("request timeout".to_owned(), timeout(routed.request_timeout, &request)),
        ("idle timeout".to_owned(), timeout(routed.idle_timeout, idle)),
    ];
    if let Some(time) = upstream.requests.per_try_timeout {
        all.push((
            "timeout of a try".to_owned(),
            timeout(Some(time), "lictor_per_try_timeout_ms of the upstream's config"),
        ));
    }
    if let Some(retries) = routed.retries {
        all.push(("retries".to_owned(), setting(&retries.retries.to_string(), place)));
    }
    all
}

/// The limits that are set.
fn limits(upstream: &Upstream) -> impl Iterator<Item = (String, Setting)> {
    let limits = upstream.limits;
    let all = [
        ("max_connections", limits.max_connections),
        ("max_pending_requests", limits.max_pending_requests),
        ("max_concurrent_requests", limits.max_concurrent_requests),
    ];
    let set = all.into_iter().filter_map(|(name, limit)| Some((name, limit?)));
    set.map(|(name, limit)| (name.to_owned(), setting(&limit.to_string(), "limits of the upstream's config")))
}

fn protocol(upstream: &Upstream) -> Setting {
    let service = &upstream.chain.service;
    let from = if upstream.settings.protocol {
        // The agent merges service-defaults and proxy-defaults into the registration: the origin of a key is lost.
        format!("the upstream's config: its own, or merged from service-defaults/{service} or proxy-defaults/global")
    } else {
        format!("service-defaults/{service}, else proxy-defaults/global, else tcp")
    };
    setting(&format!("{:?}", upstream.chain.protocol).to_lowercase(), &from)
}

fn problems(state: &State, upstream: &str) -> Vec<Recent> {
    let newest = state.observer.problems().newest();
    let own = newest.iter().filter(|problem| problem.direction == "outbound" && problem.listener == upstream);
    let result = own.take(PROBLEMS).map(|problem| Recent {
        reason: problem.outcome.name().to_owned(),
        cause: problem.cause.clone(),
        remedy: problem.outcome.describe().remedy.to_owned(),
        seconds_ago: SystemTime::now().duration_since(problem.at).map_or(0, |since| since.as_secs()),
    });
    result.collect()
}

/// Why not every request or connection reaches an instance.
fn fault(ways: &[Way]) -> Option<String> {
    let leads = |way: &&Way| way.targets.iter().flat_map(|target| &target.endpoints).any(EndpointNow::is_used);
    let lost: f64 = ways.iter().filter(|way| !leads(way)).map(|way| way.share).sum();
    let next = "see the checks of its instances, and their state above";
    match ways.iter().find(leads) {
        None => Some(format!("it leads to no usable instance: {next}")),
        Some(_) if lost > 0.0 => Some(format!("{lost:.2} % of the requests lead to no usable instance: {next}")),
        Some(_) => None,
    }
}

fn step(at: &str, says: &str, from: &str) -> Step {
    Step { at: at.to_owned(), says: says.to_owned(), from: from.to_owned() }
}

fn setting(value: &str, from: &str) -> Setting {
    Setting { value: value.to_owned(), from: from.to_owned() }
}

fn timeout(time: Option<Duration>, from: &str) -> Setting {
    setting(&time.map_or_else(|| "none".to_owned(), |time| format!("{time:?}")), from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_line_by_line_and_values_not_told() {
        let read = headers("x-a: 1\n\nX-B:two\n").unwrap();
        assert_eq!((read["x-a"].as_bytes(), read["x-b"].as_bytes()), (&b"1"[..], &b"two"[..]));
        for bad in ["Bearer SECRET", "a b: SECRET", "a: SECRET\u{1}"] {
            assert!(!headers(bad).expect_err(bad).contains("SECRET"));
        }
    }

    #[test]
    fn a_way_without_a_used_instance_is_a_fault() {
        let way = |share, state: &str| Way {
            share,
            targets: vec![TargetNow {
                endpoints: vec![EndpointNow { state: state.into(), ..Default::default() }],
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(fault(&[way(60.0, "healthy"), way(40.0, "probed")]), None);
        assert!(fault(&[way(60.0, "healthy"), way(40.0, "ejected")]).unwrap().starts_with("40.00 % of the requests"));
        assert!(fault(&[way(100.0, "unreachable")]).unwrap().starts_with("it leads to no usable instance"));
        assert!(fault(&[]).unwrap().starts_with("it leads to no usable instance"));
    }
}
