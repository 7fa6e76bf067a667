//! `/explain`: the path of a request through router, splitter, resolver and balancer, and what decides it.

use std::fmt::Write as _;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use crate::observe::target_name;
use crate::snapshot::{Node, OutboundListener, RequestView, Resolver, Routed, Snapshot};
use crate::stats::scope::Cluster;

/// In words: `upstream`, `method` (GET), `path` (/), `header` (`name: value`).
pub(super) fn explain(state: &State, query: &Query) -> Reply {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let wanted = query.get("upstream").map_or("", String::as_str);
    let Some(listener) = find(&snapshot, wanted) else {
        let names: Vec<&str> = snapshot.outbound.values().map(|listener| &*listener.upstream.name).collect();
        let text = format!("there is no upstream {wanted:?}; upstreams are: {}\n", names.join(", "));
        return reply::status(StatusCode::NOT_FOUND, text);
    };
    let headers = match headers(query.get("header").map_or("", String::as_str)) {
        Ok(headers) => headers,
        Err(fault) => return reply::status(StatusCode::BAD_REQUEST, fault),
    };
    reply::text(text(state, listener, query, &headers))
}

fn find<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a Arc<OutboundListener>> {
    let is_named =
        |listener: &&Arc<OutboundListener>| listener.upstream.name == name || listener.key.destination == name;
    snapshot.outbound.values().find(is_named)
}

/// # Errors
/// When it is no header; a sentence.
fn headers(text: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let Some((name, value)) = line.split_once(':') else {
            return Err(format!("header {line:?}: write name: value\n"));
        };
        let name = HeaderName::try_from(name.trim()).map_err(|_| format!("{name:?} is no name of a header\n"))?;
        let value = HeaderValue::try_from(value.trim()).map_err(|_| format!("{value:?} is no value of a header\n"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn text(state: &State, listener: &OutboundListener, query: &Query, headers: &HeaderMap) -> String {
    let upstream = &listener.upstream;
    let mut text =
        format!("upstream {} at {} (protocol {:?})\n", upstream.name, listener.key.bind, upstream.chain.protocol);
    if upstream.awaited.is_some() {
        text.push_str("  the agent has not told where it leads: a connection asks for it and waits for 5 s at most\n");
        return text;
    }
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
    let Some(routed) = upstream.chain.route(&view, 0) else {
        text.push_str("  service-router: no route matches; the answer is 404\n");
        return text;
    };
    // A string takes whatever is written to it.
    let _ = writeln!(text, "request {} {target}", view.method);
    route(&mut text, &upstream.chain.start, &routed);
    split(&mut text, &upstream.chain.start, &routed);
    limits(&mut text, &routed);
    resolver(&mut text, state, routed.resolver);
    text
}

fn route(text: &mut String, start: &Node, routed: &Routed<'_>) {
    let _ = match (start, routed.route) {
        (Node::Router(routes), Some(route)) => {
            let place = routes.iter().position(|one| std::ptr::eq(one, route)).map_or(0, |at| at + 1);
            writeln!(text, "  service-router: route {place} of {} ({})", routes.len(), route.name)
        }
        _ => writeln!(text, "  service-router: none"),
    };
    if let Some(path) = &routed.path {
        let _ = writeln!(text, "    the path is rewritten to {path}");
    }
}

fn split(text: &mut String, start: &Node, routed: &Routed<'_>) {
    let splitter = match (start, routed.route.map(|route| &route.next)) {
        (Node::Splitter(splitter), _) => Some(splitter),
        (_, Some(crate::snapshot::Next::Splitter(splitter))) => Some(splitter),
        _ => None,
    };
    let Some(splitter) = splitter else { return };
    let total: u64 = splitter.legs().iter().map(|leg| leg.weight).sum();
    let _ = writeln!(text, "  service-splitter: {} legs; each request draws one by weight", splitter.legs().len());
    for leg in splitter.legs() {
        let share = if total == 0 { 0.0 } else { share(leg.weight, total) };
        let to = leg.resolver.targets.first().map_or("nothing", |target| &target.id);
        let _ = writeln!(text, "    {share:.2} % to {to}");
    }
}

#[expect(clippy::cast_precision_loss)]
fn share(weight: u64, total: u64) -> f64 {
    weight as f64 * 100.0 / total as f64
}

fn limits(text: &mut String, routed: &Routed<'_>) {
    let shown = |time: Option<std::time::Duration>| time.map_or_else(|| "none".to_owned(), |time| format!("{time:?}"));
    let from = if routed.route.is_some() { "service-router" } else { "service-resolver, or 15 s" };
    let _ = writeln!(
        text,
        "  request timeout {} ({from}), idle timeout {}",
        shown(routed.request_timeout),
        shown(routed.idle_timeout)
    );
    if let Some(retries) = routed.retries {
        let _ = writeln!(text, "  retries: {retries:?}");
    }
}

fn resolver(text: &mut String, state: &State, resolver: &Resolver) {
    if resolver.targets.is_empty() {
        text.push_str("  service-resolver: leads to no target\n");
    }
    for (place, target) in resolver.targets.iter().enumerate() {
        let role = if place == 0 { "target" } else { "failover" };
        let cluster = state.stats.cluster(&Cluster::Target(Arc::new(target_name(target))));
        let members = cluster.members();
        let _ = writeln!(
            text,
            "  service-resolver: {role} {} (service {:?} in {}), connect timeout {:?}",
            target.id, target.service, target.datacenter, target.connect_timeout
        );
        if members.usable.is_empty() {
            let _ = writeln!(text, "    no usable instance of {} registered", members.registered);
        }
        for member in &members.usable {
            let latency = member.latency.map_or_else(String::new, |micros| format!(", {:.1} ms", micros / 1000.0));
            let _ = writeln!(
                text,
                "    {} {}, weight {}, {} in flight{latency}",
                member.address,
                member.state.word(),
                member.weight,
                member.in_flight
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_line_by_line() {
        let read = headers("x-a: 1\n\nX-B:two\n").unwrap();
        assert_eq!((read["x-a"].as_bytes(), read["x-b"].as_bytes()), (&b"1"[..], &b"two"[..]));
        assert!(headers("x").is_err() && headers("a b: c").is_err());
    }
}
