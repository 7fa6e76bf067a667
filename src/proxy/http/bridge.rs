//! gRPC for clients that speak HTTP/1.1, as Envoy's gRPC-HTTP/1.1 bridge has it, which Consul gives services whose
//! protocol is `grpc` (Consul 1.19.2, Envoy 1.40).
//!
//! How a call ended stands in the trailers, which such a client does not get. So the response is held back until they
//! come, and then says it in its headers: `grpc-status` and `grpc-message`, and status 503 for a call that failed.

use bytes::BytesMut;
use http::header::{CONTENT_LENGTH, HeaderName, TE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;

use super::body::{Body, Broken};
use super::grpc::is_grpc;
use super::ongoing::Over;
use crate::proxy::outcome::{Fault, Outcome};
use crate::snapshot::Protocol;

/// Whether the response to this request is to be [`gather`]ed. If so the request says what gRPC apps insist on.
pub(super) fn spans<B>(protocol: Protocol, request: &mut Request<B>) -> bool {
    let spans = protocol == Protocol::Grpc && request.version() < Version::HTTP_2 && is_grpc(request.headers());
    if spans {
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    }
    spans
}

/// The response, whole, with the end of its call in the headers. Without trailers it stays as it is: a call that failed
/// before the first message has said so in its headers.
///
/// # Errors
/// It broke off, took too long or has more than 1 MiB.
pub(super) async fn gather(response: Response<Body>) -> Result<Response<Body>, Fault> {
    if response.body().is_empty() {
        return Ok(response);
    }
    let (mut parts, mut body) = response.into_parts();
    let mut messages = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map_err(refused)?.into_data() {
            Ok(data) if messages.len() + data.len() > GATHERED => {
                return Err(Fault::new(
                    Outcome::LargeResponse,
                    "the response has more than 1 MiB, which is held back at most",
                ));
            }
            Ok(data) => messages.extend_from_slice(&data),
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    tell_end(&trailers, &mut parts.status, &mut parts.headers);
                }
            }
        }
    }
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(messages.len()));
    Ok(Response::from_parts(parts, Body::text(messages.freeze())))
}

/// The client has seen nothing of the response yet, so that an error can be sent.
fn refused(broken: Broken) -> Fault {
    match broken {
        Broken::Source(error) => Fault::new(Outcome::Reset, format!("the response broke off: {error}")),
        Broken::Over(Over::TimedOut(expired)) => expired.into(),
        Broken::Over(Over::Denied) => Fault::new(Outcome::Denied, "denied while it was under way"),
    }
}

fn tell_end(trailers: &HeaderMap, status: &mut StatusCode, headers: &mut HeaderMap) {
    let Some(ended) = trailers.get(GRPC_STATUS) else { return };
    if ended.as_bytes() != b"0" {
        *status = StatusCode::SERVICE_UNAVAILABLE;
    }
    headers.insert(GRPC_STATUS, ended.clone());
    if let Some(message) = trailers.get(GRPC_MESSAGE) {
        headers.insert(GRPC_MESSAGE, message.clone());
    }
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Longest body of a response that is held back, in bytes: Envoy's limit under Consul.
const GATHERED: usize = 1024 * 1024;
