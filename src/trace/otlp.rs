//! Spans as OTLP 1 has them, in protobuf: the few messages of `opentelemetry.proto.collector.trace.v1` that are sent.

use std::time::Duration;

use prost::{Message, Oneof};

use super::settings::Origin;
use super::span::{Kind, Span};
use super::w3c::SAMPLED;
use super::zipkin::since_1970;

#[must_use]
pub(super) fn encode(origin: &Origin, spans: &[Span]) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let sdk = [
        ("service.name", &*origin.service),
        ("service.instance.id", &origin.node),
        ("telemetry.sdk.name", "lictor"),
        ("telemetry.sdk.language", "rust"),
        ("telemetry.sdk.version", version),
    ];
    let own = sdk.iter().filter(|(name, _)| *name == "service.name" || !is_in(&origin.attributes, name));
    let given = origin.attributes.iter().filter(|(name, _)| name != "service.name");
    let attributes = own.map(|(name, value)| attribute(name, value));
    let attributes = attributes.chain(given.map(|(name, value)| attribute(name, value))).collect();
    let scope_spans = ScopeSpans {
        scope: Some(Scope { name: "lictor".into(), version: version.into() }),
        spans: spans.iter().map(|span| encode_span(origin, span)).collect(),
    };
    let resource_spans = ResourceSpans { resource: Some(Resource { attributes }), scope_spans: vec![scope_spans] };
    ExportRequest { resource_spans: vec![resource_spans] }.encode_to_vec()
}

/// Spans that the collector did not take, of what it answered.
#[must_use]
pub(super) fn refused(answer: &[u8]) -> u64 {
    let answer = ExportResponse::decode(answer).unwrap_or_default();
    answer.partial_success.map_or(0, |partial| u64::try_from(partial.rejected_spans).unwrap_or(0))
}

fn encode_span(origin: &Origin, span: &Span) -> EncodedSpan {
    // SPAN_KIND_SERVER and SPAN_KIND_CLIENT of trace.proto; the names of each kind are Envoy's.
    let (kind, name) = match span.kind {
        Kind::Server => (2, "ingress".to_owned()),
        Kind::Client => (3, format!("egress {}", span.name)),
    };
    let tags = span.tags.iter().chain([("component", "proxy"), ("node_id", &*origin.node)]);
    let start = since_1970(span.start);
    EncodedSpan {
        trace_id: span.ids.trace_id.to_be_bytes().to_vec(),
        span_id: span.ids.span_id.to_be_bytes().to_vec(),
        trace_state: span.ids.state.as_deref().unwrap_or_default().to_owned(),
        parent_span_id: span.ids.parent_id.map(|id| id.to_be_bytes().to_vec()).unwrap_or_default(),
        name,
        kind,
        start_time_unix_nano: nanos(start),
        end_time_unix_nano: nanos(start.saturating_add(span.duration)),
        attributes: tags.map(|(name, value)| attribute(name, value)).collect(),
        // STATUS_CODE_ERROR; STATUS_CODE_OK is for the app to set, by the specification of OpenTelemetry.
        status: Some(Status { code: if span.is_error { 2 } else { 0 } }),
        flags: SAMPLED.into(),
    }
}

fn is_in(attributes: &[(String, String)], name: &str) -> bool {
    attributes.iter().any(|(other, _)| other == name)
}

fn attribute(name: &str, value: &str) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(Text::StringValue(value.to_owned())) }) }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Clone, PartialEq, Message)]
struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<EncodedSpan>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct EncodedSpan {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(string, tag = "3")]
    trace_state: String,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Text", tags = "1")]
    value: Option<Text>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Text {
    #[prost(string, tag = "1")]
    StringValue(String),
}

#[derive(Clone, PartialEq, Message)]
struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_spans: i64,
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::trace::span::Ids;

    fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
        let found = attributes.iter().find(|attribute| attribute.key == name)?;
        let Text::StringValue(text) = found.value.clone()?.value?;
        Some(text)
    }

    #[test]
    fn spans_are_read_as_they_were_written() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_000_000_001);
        let mut span = Span::new(Kind::Client, "db", start, Duration::from_nanos(9));
        let state = Some("a=b".into());
        span.ids = Ids { trace_id: 0xabc, span_id: 0xdef, parent_id: None, is_shared: false, state };
        span.tags.number("http.status_code", 503);
        span.is_error = true;
        let attributes = vec![("env".into(), "lab".into()), ("service.name".into(), "x".into())];
        let origin = Origin { service: "web".into(), node: "web-1".into(), attributes };
        let request = ExportRequest::decode(&*encode(&origin, &[span])).unwrap();
        let resource = &request.resource_spans[0].resource.as_ref().unwrap().attributes;
        assert_eq!(text(resource, "service.name").as_deref(), Some("web"));
        assert_eq!(text(resource, "env").as_deref(), Some("lab"));
        let span = &request.resource_spans[0].scope_spans[0].spans[0];
        assert_eq!(
            (span.trace_id[15], span.trace_id.len(), &span.span_id[..]),
            (0xbc, 16, &[0, 0, 0, 0, 0, 0, 0xd, 0xef][..])
        );
        assert_eq!((&*span.name, span.kind, &*span.trace_state), ("egress db", 3, "a=b"));
        assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 9);
        assert_eq!(
            (text(&span.attributes, "http.status_code").as_deref(), span.status.as_ref().unwrap().code),
            (Some("503"), 2)
        );
    }

    /// Field by field, as the specification's own tools would write it.
    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let bytes = ExportRequest {
            resource_spans: vec![ResourceSpans {
                resource: None,
                scope_spans: vec![ScopeSpans {
                    scope: None,
                    spans: vec![EncodedSpan {
                        trace_id: vec![7; 16],
                        span_id: vec![8; 8],
                        name: "x".into(),
                        kind: 2,
                        start_time_unix_nano: 1,
                        end_time_unix_nano: 2,
                        status: Some(Status { code: 2 }),
                        flags: 1,
                        ..EncodedSpan::default()
                    }],
                }],
            }],
        }
        .encode_to_vec();
        let mut span = vec![0x0a, 16];
        span.extend([7; 16]);
        span.extend([0x12, 8]);
        span.extend([8; 8]);
        span.extend([0x2a, 1, b'x', 0x30, 2, 0x39, 1, 0, 0, 0, 0, 0, 0, 0, 0x41, 2, 0, 0, 0, 0, 0, 0, 0]);
        span.extend([0x7a, 2, 0x18, 2, 0x85, 0x01, 1, 0, 0, 0]);
        let within = |tag: u8, inner: &[u8]| [&[tag, u8::try_from(inner.len()).unwrap()], inner].concat();
        assert_eq!(bytes, within(0x0a, &within(0x12, &within(0x12, &span))));
    }

    #[test]
    fn what_the_collector_refused_is_known() {
        assert_eq!(refused(&[]), 0);
        assert_eq!(refused(&[0x0a, 2, 0x08, 7]), 7);
        assert_eq!(refused(b"not protobuf"), 0);
    }
}
