//! Spans as Zipkin's second version has them, in JSON. What Envoy says in its spans is said in the same words.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::settings::Origin;
use super::span::{Kind, Span};

#[must_use]
pub(super) fn encode(origin: &Origin, spans: &[Span]) -> Vec<u8> {
    let spans: Vec<Value> = spans.iter().map(|span| encode_span(origin, span)).collect();
    Value::Array(spans).to_string().into_bytes()
}

fn encode_span(origin: &Origin, span: &Span) -> Value {
    let (kind, end) = match span.kind {
        Kind::Client => ("CLIENT", "cr"),
        Kind::Server => ("SERVER", "ss"),
    };
    let (start, duration) = (micros(since_1970(span.start)), micros(span.duration).max(1));
    let mut tags: Map<String, Value> = span.tags.iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
    tags.insert("component".into(), json!("proxy"));
    tags.insert("node_id".into(), json!(origin.node));
    if span.is_error {
        tags.insert("error".into(), json!("true"));
    }
    let mut encoded = json!({
        "traceId": trace_id(span.ids.trace_id),
        "id": format!("{:016x}", span.ids.span_id),
        "kind": kind,
        "name": span.name,
        "timestamp": start,
        "duration": duration,
        "localEndpoint": { "serviceName": origin.service },
        "annotations": [{ "timestamp": start.saturating_add(duration), "value": end }],
        "tags": tags,
    });
    if let Some(parent) = span.ids.parent_id {
        encoded["parentId"] = json!(format!("{parent:016x}"));
    }
    if span.ids.is_shared {
        encoded["shared"] = json!(true);
    }
    encoded
}

/// One of 64 bits has 16 digits.
fn trace_id(id: u128) -> String {
    if u64::try_from(id).is_ok() { format!("{id:016x}") } else { format!("{id:032x}") }
}

pub(super) fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::span::Ids;

    #[test]
    fn a_span_is_an_object_of_a_list() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001);
        let mut span = Span::new(Kind::Server, "db:80", start, Duration::from_micros(250));
        span.ids = Ids { trace_id: 0xabc, span_id: 0xdef, parent_id: Some(1), is_shared: true, state: None };
        span.tags.fixed("http.method", "GET");
        span.is_error = true;
        let origin = Origin { service: "db".into(), node: "db-sidecar-proxy".into(), attributes: Vec::new() };
        let expected = json!([{
            "traceId": "0000000000000abc", "id": "0000000000000def", "parentId": "0000000000000001", "shared": true,
            "kind": "SERVER", "name": "db:80", "timestamp": 1_700_000_000_000_001_u64, "duration": 250,
            "localEndpoint": {"serviceName": "db"},
            "annotations": [{"timestamp": 1_700_000_000_000_251_u64, "value": "ss"}],
            "tags": {"http.method": "GET", "component": "proxy", "node_id": "db-sidecar-proxy", "error": "true"},
        }]);
        assert_eq!(serde_json::from_slice::<Value>(&encode(&origin, &[span])).unwrap(), expected);
    }
}
