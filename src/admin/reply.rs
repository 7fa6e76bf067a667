//! Answers of the admin server.

use std::time::SystemTime;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use serde_json::Value;
use time::OffsetDateTime;

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

/// RFC 3339 in UTC, to the second.
pub(super) fn timestamp(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let (date, time) = (at.date(), at.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_in_utc() {
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH + Duration::from_secs(951_827_696)), "2000-02-29T12:34:56Z");
    }
}
