//! Spans of traces, as a reader of records. Names of tags are Envoy's, and ours where it has none.

use std::time::SystemTime;

use super::attempt::Attempt;
use super::connection::{ConnectionInfo, ConnectionRecord, Direction};
use super::outcome::{Outcome, Side};
use super::request::RequestRecord;
use crate::access_log::Secrets;
use crate::trace::{Kind, Span, Tags, Tracer};

/// Hands over the span of a request that is traced: one, however often it was sent.
pub(super) fn end_request(record: &RequestRecord) {
    let Some(traced) = record.traced.as_ref().filter(|traced| traced.is_sampled()) else { return };
    let info = &*record.connection;
    let secrets = Secrets { providers: record.providers.as_deref() };
    let mut span = Span::new(kind(info), record.authority(), record.start, record.duration);
    // Without an answer nobody knows better.
    span.is_error = record.status == 0 || record.status >= 500;
    let tags = &mut span.tags;
    let url = format!("http://{}{}", record.authority(), secrets.hide(record.path()));
    tags.text("http.url", &url);
    tags.text("http.method", record.method.as_str());
    tags.fixed("http.protocol", record.protocol());
    tags.number("http.status_code", record.status.into());
    tags.number("request_size", record.bytes_received);
    tags.number("response_size", record.bytes_sent);
    tag_ends(tags, info, record.attempts.last());
    tag_outcome(tags, record.outcome);
    if let Some(cause) = &record.cause {
        tags.text("lictor.cause", &secrets.hide(cause));
    }
    if let Some(rule) = &record.would_be_denied_by {
        tags.text("lictor.would_be_denied_by", rule);
    }
    if record.attempts.len() > 1 {
        tags.number("lictor.attempts", record.attempts.len() as u64);
    }
    traced.finish(span);
}

/// Hands over the span of a connection that carried bytes, where those are traced.
pub(super) fn end_connection(record: &ConnectionRecord, tracer: &Tracer) {
    let info = &record.info;
    if info.listener.is_http() || record.outcome == Outcome::Unused {
        return;
    }
    tracer.connection(|| {
        let start = SystemTime::now().checked_sub(record.duration).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut span = Span::new(kind(info), info.listener.name(), start, record.duration);
        span.is_error = matches!(record.outcome.describe().side, Side::Us | Side::Upstream);
        let tags = &mut span.tags;
        tags.fixed("network.transport", "tcp");
        tags.number("request_size", record.bytes_received);
        tags.number("response_size", record.bytes_sent);
        tag_ends(tags, info, record.attempts.last());
        tag_outcome(tags, record.outcome);
        if record.outcome != Outcome::Ended {
            tags.text("lictor.cause", &record.cause);
        }
        for (name, rule) in
            [("lictor.denied_by", &record.denied_by), ("lictor.would_be_denied_by", &record.would_be_denied_by)]
        {
            if let Some(rule) = rule {
                tags.text(name, rule);
            }
        }
        span
    });
}

fn kind(info: &ConnectionInfo) -> Kind {
    match info.listener.direction() {
        Direction::Inbound => Kind::Server,
        Direction::Outbound => Kind::Client,
    }
}

/// Who asked, and who was asked.
fn tag_ends(tags: &mut Tags, info: &ConnectionInfo, last: Option<&Attempt>) {
    if let Some(remote) = info.remote {
        tags.text("peer.address", &remote.ip().to_string());
    }
    if let Some(peer) = &info.peer {
        tags.text("lictor.source", &peer.to_string());
    }
    tags.fixed("downstream_cluster", "-");
    let cluster = last.map(|attempt| attempt.destination.cluster());
    for name in ["upstream_cluster", "upstream_cluster.name"] {
        tags.text(name, cluster.as_deref().unwrap_or("-"));
    }
    if let Some(last) = last {
        tags.text("upstream_address", &last.destination.host());
    }
}

fn tag_outcome(tags: &mut Tags, outcome: Outcome) {
    let flag = outcome.describe().flag;
    tags.fixed("response_flags", if flag.is_empty() { "-" } else { flag });
    tags.fixed("lictor.outcome", outcome.name());
}
