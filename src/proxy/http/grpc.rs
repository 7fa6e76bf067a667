//! The gRPC status that stands for an HTTP status.

use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::observe::Description;
use crate::proxy::outcome::Outcome;

/// The trailers of a gRPC response whose source has been denied meanwhile.
pub(super) fn grpc_denial() -> HeaderMap {
    let Description { status, body, .. } = Outcome::Denied.describe();
    let status = (HeaderName::from_static("grpc-status"), grpc_status(status));
    [status, (HeaderName::from_static("grpc-message"), HeaderValue::from_static(body))].into_iter().collect()
}

/// Whether these are the headers of a gRPC request.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// The gRPC status for a status of HTTP: as gRPC maps statuses of HTTP, and Envoy does.
pub(super) fn grpc_status(status: StatusCode) -> HeaderValue {
    HeaderValue::from_static(match status.as_u16() {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502..=504 => "14",
        _ => "2",
    })
}
