//! Answers of the admin server.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use serde_json::Value;

pub(super) type Body = BoxBody<Bytes, std::convert::Infallible>;
pub(super) type Reply = Response<Body>;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// A whole answer of one media type.
pub(super) fn of(content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()).boxed());
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    reply
}

pub(super) fn text(body: impl Into<Bytes>) -> Reply {
    of(TEXT, body)
}

pub(super) fn status(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    let mut reply = text(body);
    *reply.status_mut() = status;
    reply
}

pub(super) fn json(value: &Value) -> Reply {
    // A value is always written: its keys are strings.
    let mut body = serde_json::to_string_pretty(value).unwrap_or_default();
    body.push('\n');
    of(JSON, body)
}

pub(super) fn ok() -> Reply {
    text("OK\n")
}

/// In the words of Envoy.
pub(super) fn method_not_allowed(allowed: &'static str) -> Reply {
    let mut reply = status(StatusCode::METHOD_NOT_ALLOWED, format!("Method not allowed, {allowed} required.\n"));
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}
