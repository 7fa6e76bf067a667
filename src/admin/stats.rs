//! `/stats` in its forms, and the process's own numbers.

use std::time::SystemTime;

use http::header::{ACCEPT, VARY};
use http::{HeaderMap, HeaderValue, StatusCode};

use super::process;
use super::query::Query;
use super::reply::{self, Reply};
use super::state::{Serving, State};
use crate::stats::scope::Scope;
use crate::stats::text::{Selection, Type};
use crate::stats::{Sample, Samples, openmetrics, plain, prometheus as exposition, text};

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
    let (configuration, certificate_expiry) = state.snapshots.borrow().as_ref().map_or((0, None), |snapshot| {
        let expiry = snapshot.credentials.as_ref().map(|credentials| process::unix_seconds(credentials.not_after()));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        (snapshot.version, expiry.map(|expiry| expiry as u64))
    });
    let process = openmetrics::Process {
        started: process::unix_seconds(state.started_at),
        cpu_seconds: process::cpu_seconds(),
        resident_bytes: process::resident_bytes(),
        descriptors: process::descriptors(),
        is_ready: state.serving() == Serving::Live,
        configuration,
        certificate_expiry,
        spans_sent: state.stats.spans.sent.get(),
        spans_dropped: state.stats.spans.dropped.get(),
    };
    openmetrics::encode(&process, &listeners, &clusters, &own_labels(state))
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
    let refused = &state.stats.refused;
    Samples::of(Scope::ClusterManager, &mut samples).counter("cds.update_rejected", refused.upstreams.get());
    Samples::of(Scope::ListenerManager, &mut samples).counter("lds.update_rejected", refused.others.get());
    samples
}

/// Whole days for which our certificate and all that it leads to are valid; 0 when it has expired.
fn days_until_expiry(state: &State, now: SystemTime) -> Option<u64> {
    let snapshot = state.snapshots.borrow();
    let until = snapshot.as_ref()?.credentials.as_ref()?.not_after();
    Some(until.duration_since(now).map_or(0, |left| left.as_secs() / (24 * 60 * 60)))
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
