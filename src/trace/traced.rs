//! The trace context of one request in flight.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, header};

use super::active::Active;
use super::context::{Caller, Forms, read};
use super::fields::Parent;
use super::span::{Ids, Kind, Span, cut};
use super::{b3, w3c};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");

/// Requests with this many headers get no trace headers: the next proxy or app may take a hundred at most.
const ROOM: usize = 90;

/// A request that belongs to a trace, with the tracer of the moment when it came.
#[derive(Debug)]
pub struct Traced {
    tracer: Arc<Active>,
    ids: Ids,
    is_sampled: bool,
    /// Whether the headers are none of a caller's.
    begins: bool,
    forms: Forms,
    user_agent: Option<Box<str>>,
    request_id: Option<Box<str>>,
    client_trace_id: Option<Box<str>>,
    grpc_status: Option<u8>,
}

impl Traced {
    /// Decides about a request that has come. `None`: it is not traced, and its headers go on as they are.
    pub(super) fn begin(tracer: &Arc<Active>, kind: Kind, headers: &HeaderMap) -> Option<Box<Self>> {
        let requested = headers.contains_key(X_CLIENT_TRACE_ID);
        let (caller, sampler) = (read(headers), &tracer.sampler);
        let new_trace = |decision: Option<bool>| {
            let trace_id = tracer.new_trace_id();
            let decision = decision.filter(|_| sampler.respects_caller);
            let is_sampled = decision.unwrap_or_else(|| sampler.begins(trace_id, requested));
            // A caller's own word goes on as it is.
            let propagates = is_sampled || (decision.is_none() && sampler.draws());
            let forms = Forms {
                w3c: Some(u8::from(is_sampled) * w3c::SAMPLED),
                b3: Some(b3::Form { short: tracer.short_ids, ..b3::Form::default() }),
            };
            let ids = Ids { trace_id, span_id: new_span_id(), ..Ids::default() };
            propagates.then_some((ids, is_sampled, true, forms))
        };
        let (ids, is_sampled, begins, forms) = match caller {
            Caller::Unknown => return None,
            Caller::Nothing(decision) => new_trace(decision)?,
            Caller::Trace { parent, grandparent, sampled, forms } => {
                let decision = sampled.filter(|_| sampler.respects_caller);
                let is_sampled = decision.unwrap_or_else(|| sampler.begins(parent.trace_id, requested));
                if !is_sampled {
                    return None;
                }
                let state = forms.w3c.and_then(|_| w3c::state(headers));
                let forms = Forms { w3c: forms.w3c.map(|flags| flags | w3c::SAMPLED), ..forms };
                (Ids { state, ..below(parent, grandparent, tracer.shared && kind == Kind::Server) }, true, false, forms)
            }
        };
        let text = |name| headers.get(name)?.to_str().ok().map(|text| cut(text).into());
        let copied = |name| is_sampled.then(|| text(name)).flatten();
        Some(Box::new(Self {
            tracer: Arc::clone(tracer),
            ids,
            is_sampled,
            begins,
            forms,
            user_agent: copied(header::USER_AGENT),
            request_id: copied(X_REQUEST_ID),
            client_trace_id: copied(X_CLIENT_TRACE_ID),
            grpc_status: None,
        }))
    }

    /// Whether a span is made of it.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    #[must_use]
    pub fn trace_id(&self) -> u128 {
        self.ids.trace_id
    }

    /// Writes the headers with which the request goes on: it is sent by this span.
    pub fn pass_on(&mut self, headers: &mut HeaderMap) {
        if self.is_sampled && self.request_id.is_none() {
            let id = headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok());
            self.request_id = id.map(|id| cut(id).into());
        }
        if self.begins {
            if headers.len() > ROOM {
                return;
            }
            w3c::begin(headers);
        }
        let this = Parent { trace_id: self.ids.trace_id, span_id: self.ids.span_id };
        if let Some(flags) = self.forms.w3c {
            w3c::write(headers, this, flags);
        }
        if let Some(form) = self.forms.b3 {
            b3::write(headers, form, this, self.ids.parent_id, self.is_sampled);
        }
    }

    /// The response's headers or trailers, which say how a call of gRPC ended.
    pub fn answered(&mut self, fields: &HeaderMap) {
        if let Some(status) = fields.get("grpc-status") {
            self.grpc_status = status.to_str().ok().and_then(|status| status.parse().ok());
        }
    }

    /// Hands the span over, which is to be of a request that is traced.
    pub fn finish(&self, mut span: Span) {
        span.ids = self.ids.clone();
        let tags = &mut span.tags;
        tags.text("user_agent", self.user_agent.as_deref().unwrap_or("-"));
        for (name, value) in
            [("guid:x-request-id", &self.request_id), ("guid:x-client-trace-id", &self.client_trace_id)]
        {
            if let Some(value) = value {
                tags.text(name, value);
            }
        }
        if let Some(status) = self.grpc_status {
            tags.number("grpc.status_code", status.into());
            // Unknown, deadline exceeded, unimplemented, internal, unavailable and data loss.
            span.is_error |= matches!(status, 2 | 4 | 12..=15);
        }
        self.tracer.submit(span);
    }
}

/// A span below a caller's, or that span itself, seen from the server's side.
fn below(parent: Parent, grandparent: Option<u64>, shared: bool) -> Ids {
    let (span_id, parent_id) =
        if shared { (parent.span_id, grandparent) } else { (new_span_id(), Some(parent.span_id)) };
    Ids { trace_id: parent.trace_id, span_id, parent_id, is_shared: shared, state: None }
}

pub(super) fn new_span_id() -> u64 {
    fastrand::u64(1..)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use tokio::sync::mpsc;

    use super::*;
    use crate::trace::sampler::Sampler;

    fn tracer(sampler: Sampler, room: usize) -> (Arc<Active>, mpsc::Receiver<Span>) {
        let (queue, spans) = mpsc::channel(room);
        let (full, counts) = (Arc::default(), Arc::default());
        let active =
            Active { sampler, shared: false, short_ids: false, connections: false, queue, batch: 1, full, counts };
        (Arc::new(active), spans)
    }

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
        headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[test]
    fn what_was_drawn_is_told_whichever_it_is() {
        let (tracer, _spans) = tracer(Sampler::of_roots(0.5), 1);
        let mut seen = [false, false];
        for _ in 0..200 {
            let mut headers = headers(&[("tracestate", "of=another")]);
            let mut traced = Traced::begin(&tracer, Kind::Client, &headers).unwrap();
            traced.pass_on(&mut headers);
            let (flags, b3) = if traced.is_sampled() { ("-01", "1") } else { ("-00", "0") };
            assert!(text(&headers, "traceparent").ends_with(flags), "{headers:?}");
            assert_eq!((text(&headers, "x-b3-sampled"), text(&headers, "tracestate")), (b3, ""));
            seen[usize::from(traced.is_sampled())] = true;
        }
        assert_eq!(seen, [true, true]);
    }

    #[test]
    fn a_decision_of_the_caller_holds_where_it_is_respected() {
        let unsampled = headers(&[("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")]);
        let begins = |sampler, headers: &HeaderMap| Traced::begin(&tracer(sampler, 1).0, Kind::Server, headers);
        assert!(begins(Sampler::of_roots(1.0), &unsampled).is_none());
        let always = Sampler { respects_caller: false, ..Sampler::of_roots(1.0) };
        let mut passed = unsampled.clone();
        begins(always, &unsampled).unwrap().pass_on(&mut passed);
        assert!(text(&passed, "traceparent").ends_with("-01"));
        // Nothing begins by chance, but when somebody asks.
        assert!(begins(Sampler::of_roots(0.0), &HeaderMap::new()).is_none());
        assert!(begins(Sampler::of_roots(0.0), &headers(&[("x-client-trace-id", "x")])).unwrap().is_sampled());
        assert!(begins(Sampler::of_roots(1.0), &headers(&[("b3", "0")])).is_none());
    }

    #[test]
    fn a_full_head_gets_no_headers_and_a_full_queue_no_spans() {
        let (tracer, mut spans) = tracer(Sampler::of_roots(1.0), 1);
        let mut full: HeaderMap =
            (0..=ROOM).map(|n| (format!("x-{n}").parse::<HeaderName>().unwrap(), "y".parse().unwrap())).collect();
        let before = full.clone();
        let mut traced = Traced::begin(&tracer, Kind::Client, &full).unwrap();
        traced.pass_on(&mut full);
        assert_eq!(full, before);
        for _ in 0..3 {
            traced.finish(Span::new(Kind::Client, &"é".repeat(10_000), SystemTime::now(), Duration::ZERO));
        }
        assert_eq!(tracer.counts.dropped.get(), 2);
        let span = spans.try_recv().unwrap();
        assert!(span.name.len() <= 256 && spans.try_recv().is_err());
    }
}
