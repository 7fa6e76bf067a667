//! `/stats` in its forms, and the process's own numbers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{ACCEPT, VARY};
use http::{HeaderMap, HeaderValue, StatusCode};

use super::process;
use super::query::Query;
use super::reply::{self, Reply};
use super::state::{Serving, State};
use crate::snapshot::{Hits, Intention, Intentions, Snapshot};
use crate::stats::agent::AgentNow;
use crate::stats::scope::{Listener, Scope};
use crate::stats::text::{Selection, Type};
use crate::stats::{Sample, Samples, Scrapes, openmetrics, plain, prometheus as exposition, text};

const USAGE: &str = "usage: /stats?format=text|json|prometheus\n";

pub(super) fn stats(state: &State, query: &Query) -> Reply {
    let selection = match selection(query) {
        Ok(selection) => selection,
        Err(fault) => return reply::status(StatusCode::BAD_REQUEST, fault),
    };
    match query.get("format").map_or("text", String::as_str) {
        "text" | "" => reply::text(text::lines(&selection.choose(samples(state)))),
        "json" => reply::json(&text::json(&selection.choose(samples(state)))),
        "prometheus" => encode(state, &selection),
        _ => reply::status(StatusCode::BAD_REQUEST, USAGE),
    }
}

pub(super) fn prometheus(state: &State, query: &Query) -> Reply {
    match selection(query) {
        Ok(selection) => encode(state, &selection),
        Err(fault) => reply::status(StatusCode::BAD_REQUEST, fault),
    }
}

fn encode(state: &State, selection: &Selection) -> Reply {
    let samples: Vec<Sample> = selection.choose(samples(state)).into_iter().map(|(_, sample)| sample).collect();
    reply::of(exposition::CONTENT_TYPE, exposition::encode(&samples, &common_labels(state)))
}

/// By our own names: in OpenMetrics for those who ask for that, else in the text format that every reader knows.
pub(super) fn own(state: &State, headers: &HeaderMap) -> Reply {
    let text = openmetrics(state);
    let accepts = headers.get_all(ACCEPT).iter().filter_map(|accept| accept.to_str().ok());
    let mut reply = match accepts.into_iter().any(|accept| accept.contains("application/openmetrics-text")) {
        true => reply::of(openmetrics::CONTENT_TYPE, text),
        false => reply::of(exposition::CONTENT_TYPE, plain::of(&text)),
    };
    reply.headers_mut().insert(VARY, HeaderValue::from_static("accept"));
    reply
}

fn openmetrics(state: &State) -> String {
    let (listeners, clusters) = state.stats.groups();
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let credentials = snapshot.credentials.as_ref();
    let roots = credentials.map(|credentials| credentials.describe().roots).unwrap_or_default();
    let refused = &state.stats.refused;
    let process = openmetrics::Process {
        started: process::unix_seconds(state.started_at),
        cpu_seconds: process::cpu_seconds(),
        resident_bytes: process::resident_bytes(),
        descriptors: process::descriptors(),
        is_ready: state.serving() == Serving::Live,
        configuration: snapshot.version,
        certificate_expiry: credentials.map(|credentials| whole_seconds(credentials.not_after())),
        roots: roots.into_iter().map(|root| (root.serial, whole_seconds(root.not_after))).collect(),
        agent: (state.agent)(),
        unusable_answers: [refused.upstreams.get(), refused.others.get()],
        rules: rules(&snapshot),
        spans_sent: state.stats.spans.sent.get(),
        spans_dropped: state.stats.spans.dropped.get(),
    };
    openmetrics::encode(&process, &listeners, &clusters, &own_labels(state))
}

/// Since 1970.
fn whole_seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The intentions of all services, each once, and the default policy.
fn rules(snapshot: &Snapshot) -> BTreeMap<String, [u64; 2]> {
    let mut rules: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    let mut add = |rule: String, hits: &Hits| {
        let [allowed, denied] = rules.entry(rule).or_default();
        *allowed += hits.allowed();
        *denied += hits.denied();
    };
    let mut known: Vec<&Arc<Intentions>> = Vec::new();
    for listener in snapshot.inbound.values() {
        let intentions = &listener.service.intentions;
        if known.iter().any(|known| Arc::ptr_eq(known, intentions)) {
            continue;
        }
        known.push(intentions);
        add("default policy".to_owned(), &intentions.default_policy().hits);
        let rule = |one: &Intention| format!("{} => {}", one.source_words(), one.destination);
        intentions.list().iter().for_each(|one| add(rule(one), &one.hits));
    }
    rules
}

/// # Errors
/// When a part of the query can't be read; a sentence.
fn selection(query: &Query) -> Result<Selection, String> {
    let filter = query.get("filter").map(|filter| regex::Regex::new(filter)).transpose();
    let only = match query.get("type").map(String::as_str) {
        None | Some("" | "All") => None,
        Some("Counters") => Some(Type::Counters),
        Some("Gauges") => Some(Type::Gauges),
        Some("Histograms") => Some(Type::Histograms),
        Some("TextReadouts") => Some(Type::TextReadouts),
        Some(other) => return Err(format!("type={other}: write Counters, Gauges, Histograms, TextReadouts or All\n")),
    };
    Ok(Selection {
        filter: filter.map_err(|error| format!("filter: {error}\n"))?,
        only,
        used_only: query.contains_key("usedonly"),
    })
}

/// All numbers under Envoy's names.
pub(super) fn samples(state: &State) -> Vec<Sample> {
    let mut samples = state.stats.samples();
    let mut server = Samples::of(Scope::Server, &mut samples);
    server.gauge("live", 1);
    server.gauge(
        "state",
        match state.serving() {
            // ServerInfo.State of Envoy's admin API.
            Serving::Live => 0,
            Serving::Draining => 1,
            Serving::Initializing => 3,
        },
    );
    server.gauge("uptime", state.started.elapsed().as_secs());
    if let Some(days) = days_until_expiry(state, SystemTime::now()) {
        server.gauge("days_until_first_cert_expiring", days);
    }
    server.gauge("concurrency", state.workers as u64);
    let resident = process::resident_bytes();
    server.gauge("memory_allocated", resident);
    server.gauge("memory_heap_size", resident);
    server.gauge("memory_physical_size", resident);
    if let Some(expiry) = certificate_expiry(state) {
        for public in state.stats.groups().0.iter().filter(|stats| stats.listener == Listener::Public) {
            let mut socket = Samples::of(Scope::Socket(public.address.clone()), &mut samples);
            socket.gauge("ssl.certificate.expiration_unix_time_seconds", whole_seconds(expiry));
        }
    }
    agent(&(state.agent)(), &mut samples);
    scrapes(&state.stats.scrapes, &mut samples);
    let refused = &state.stats.refused;
    Samples::of(Scope::ClusterManager, &mut samples).counter("cds.update_rejected", refused.upstreams.get());
    Samples::of(Scope::ListenerManager, &mut samples).counter("lds.update_rejected", refused.others.get());
    samples
}

/// Under the names of the cluster that Envoy reaches its agent by.
fn agent(now: &AgentNow, into: &mut Vec<Sample>) {
    let of = |results: &[&str]| {
        let counted = now.requests.iter().filter(|(_, result, _)| results.contains(result));
        counted.map(|(_, _, count)| count).sum::<u64>()
    };
    let all: u64 = now.requests.iter().map(|(_, _, count)| count).sum();
    let mut samples = Samples::of(Scope::LocalAgent, into);
    samples.counter("upstream_rq_total", all + now.requests_active);
    samples.gauge("upstream_rq_active", now.requests_active);
    samples.counter("upstream_rq_completed", of(&["answered", "refused"]));
    samples.counter("upstream_cx_connect_fail", of(&["unreachable"]));
}

/// Numbers of scrapes, once there was one.
fn scrapes(scrapes: &Scrapes, into: &mut Vec<Sample>) {
    if scrapes.connections.get() == 0 {
        return;
    }
    let mut samples = Samples::of(Scope::Scrapes, into);
    samples.counter("downstream_cx_total", scrapes.connections.get());
    samples.gauge("downstream_cx_active", scrapes.connections_active.get());
    samples.counter("downstream_rq_total", scrapes.requests.get());
    samples.gauge("downstream_rq_active", scrapes.requests_active.get());
}

/// Whole days for which our certificate and all that it leads to are valid; 0 when it has expired.
fn days_until_expiry(state: &State, now: SystemTime) -> Option<u64> {
    let until = certificate_expiry(state)?;
    Some(until.duration_since(now).map_or(0, |left| left.as_secs() / (24 * 60 * 60)))
}

/// When our certificate, or one that it leads to, expires.
fn certificate_expiry(state: &State) -> Option<SystemTime> {
    Some(state.snapshots.borrow().as_ref()?.credentials.as_ref()?.not_after())
}

/// The labels that every series of ours has.
fn own_labels(state: &State) -> Vec<(String, String)> {
    let snapshot = state.snapshots.borrow();
    let Some(snapshot) = snapshot.as_deref() else { return Vec::new() };
    let id = snapshot.credentials.as_ref().map(|credentials| credentials.id());
    let own = id.into_iter().flat_map(|id| [("source", &id.service), ("datacenter", &id.datacenter)]);
    own.map(|(name, value)| (name.to_owned(), value.clone())).chain(snapshot.metrics.tags.iter().cloned()).collect()
}

/// The labels that every series has under Consul: whose sidecar this is, and `envoy_stats_tags`.
pub(super) fn common_labels(state: &State) -> Vec<(String, String)> {
    let snapshot = state.snapshots.borrow();
    let Some(snapshot) = snapshot.as_deref() else { return Vec::new() };
    let mut labels: Vec<(String, String)> = Vec::new();
    if let Some(credentials) = &snapshot.credentials {
        let id = credentials.id();
        let own = [
            ("local_cluster", &id.service),
            ("consul_source_service", &id.service),
            ("consul_source_namespace", &id.namespace),
            ("consul_source_partition", &id.partition),
            ("consul_source_datacenter", &id.datacenter),
        ];
        labels.extend(own.map(|(name, value)| (name.to_owned(), value.clone())));
    }
    for (name, value) in &snapshot.metrics.tags {
        // A tag of one of these names replaces it, as with Envoy.
        match labels.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.clone_from(value),
            None => labels.push((name.clone(), value.clone())),
        }
    }
    labels
}
