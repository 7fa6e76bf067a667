//! The final response to a request: the upstream's, or one of our own.

use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, LOCATION};
use http::{HeaderValue, Request, Response};

use super::body::Body;
use super::grpc::{grpc_status, is_grpc};
use super::request_record::{RequestObserver, RequestRecorder};
use crate::observe::Description;
use crate::proxy::outcome::{Fault, Outcome};

/// The parts of a request that its response depends on.
pub(super) struct Responder {
    grpc: bool,
    pub record: Box<RequestRecorder>,
}

impl Responder {
    #[must_use]
    pub(super) fn new<B>(requests: &RequestObserver, request: &Request<B>) -> Self {
        let grpc = is_grpc(request.headers());
        Self { grpc, record: requests.begin(request, grpc) }
    }

    /// The response to the request, or an answer of our own. With `expose_cause` a header says why, that of the sidecar
    /// behind included.
    #[must_use]
    pub(super) fn answer(self, result: Result<Response<Body>, Fault>, expose_cause: bool) -> Response<Body> {
        let (response, fault) = match result {
            Ok(mut response) => {
                // What another sidecar says names services and addresses too.
                if !expose_cause {
                    response.headers_mut().remove(X_LICTOR_CAUSE);
                }
                (response, None)
            }
            Err(fault) => (reply(&fault, self.grpc, expose_cause), Some(fault)),
        };
        let mut record = self.record;
        record.answered(&response, fault);
        response.map(|body| body.recorded(record))
    }
}

/// An answer of our own, with the cause in a header if `expose_cause`. `grpc` says that the request was one of gRPC.
fn reply(fault: &Fault, grpc: bool, expose_cause: bool) -> Response<Body> {
    let Description { status, body, .. } = fault.outcome.describe();
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    if fault.outcome == Outcome::Overflow {
        headers.insert(HeaderName::from_static("x-envoy-overloaded"), HeaderValue::from_static("true"));
    }
    if expose_cause {
        let cause: String = fault.cause.chars().map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect();
        if let Ok(cause) = HeaderValue::try_from(cause) {
            headers.insert(X_LICTOR_CAUSE, cause);
        }
    }
    if fault.outcome == Outcome::BadRequest {
        // Nobody knows what the rest is.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if fault.outcome == Outcome::Redirect
        && let Ok(location) = HeaderValue::from_bytes(fault.cause.as_bytes())
    {
        headers.insert(LOCATION, location);
    }
    if grpc {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(HeaderName::from_static("grpc-status"), grpc_status(status));
        headers.insert(HeaderName::from_static("grpc-message"), HeaderValue::from_static(body));
        return response;
    }
    if !body.is_empty() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        *response.body_mut() = Body::text(body);
    }
    *response.status_mut() = status;
    response
}

const X_LICTOR_CAUSE: HeaderName = HeaderName::from_static("x-lictor-cause");
