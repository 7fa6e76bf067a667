//! Answers of our own, in the words that users of Envoy under Consul know.

use std::borrow::Cow;

use http::header::{CONNECTION, CONTENT_TYPE, HeaderName, LOCATION};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use super::body::{Body, Expired};
use crate::proxy::balance::Overflow;

const X_LICTOR_CAUSE: HeaderName = HeaderName::from_static("x-lictor-cause");

/// Why a request gets an answer of ours.
#[derive(Debug)]
pub struct Refusal {
    pub kind: Kind,
    /// One sentence for the log.
    pub cause: Cow<'static, str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not HTTP, or such that two readers may see two requests.
    BadRequest,
    /// The head.
    TooLarge,
    /// CONNECT.
    Method,
    Denied,
    /// To where the same path is spelt with plain slashes, which is the cause.
    Redirect,
    NoRoute,
    NoInstance,
    /// No connection to anywhere.
    Unreachable,
    /// The other end broke off before it answered.
    Reset,
    Overflow,
    Timeout,
    /// One try of perhaps several.
    TryTimeout,
    /// Nothing moved, and it was the app's turn.
    Idle,
    /// Nothing moved, and it was the client's turn.
    IdleUpload,
}

impl Kind {
    /// Status, body and the flag that Envoy's access log has for it (Envoy 1.40).
    fn told(self) -> (StatusCode, &'static str, &'static str) {
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        match self {
            Self::BadRequest => (StatusCode::BAD_REQUEST, "", "DPE"),
            Self::TooLarge => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "", "DPE"),
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, "", "-"),
            Self::Denied => (StatusCode::FORBIDDEN, "RBAC: access denied", "-"),
            Self::Redirect => (StatusCode::TEMPORARY_REDIRECT, "", "-"),
            Self::NoRoute => (StatusCode::NOT_FOUND, "", "NR"),
            Self::NoInstance => (UNAVAILABLE, "no healthy upstream", "UH"),
            Self::Unreachable => (
                UNAVAILABLE,
                "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure",
                "UF",
            ),
            Self::Reset => (
                UNAVAILABLE,
                "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
                "UC",
            ),
            Self::Overflow => {
                (UNAVAILABLE, "upstream connect error or disconnect/reset before headers. reset reason: overflow", "UO")
            }
            Self::Timeout | Self::TryTimeout => (StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", "UT"),
            // Older versions say 408 to both, which would be the client's fault.
            Self::Idle => (StatusCode::GATEWAY_TIMEOUT, "stream timeout", "SI"),
            Self::IdleUpload => (StatusCode::REQUEST_TIMEOUT, "stream timeout", "SI"),
        }
    }

    /// As in Envoy's access log.
    #[must_use]
    pub fn flag(self) -> &'static str {
        self.told().2
    }
}

impl Refusal {
    pub fn new(kind: Kind, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, cause: cause.into() }
    }

    /// The answer, with the cause in a header if `tells_cause`. `grpc` says that the request was one of gRPC.
    #[must_use]
    pub fn reply(&self, grpc: bool, tells_cause: bool) -> Response<Body> {
        let (status, text, _) = self.kind.told();
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        if self.kind == Kind::Overflow {
            headers.insert(HeaderName::from_static("x-envoy-overloaded"), HeaderValue::from_static("true"));
        }
        if tells_cause {
            let cause: String = self.cause.chars().map(|c| if c.is_ascii_graphic() { c } else { ' ' }).collect();
            if let Ok(cause) = HeaderValue::try_from(cause) {
                headers.insert(X_LICTOR_CAUSE, cause);
            }
        }
        if self.kind == Kind::BadRequest {
            // Nobody knows what the rest is.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if self.kind == Kind::Redirect
            && let Ok(location) = HeaderValue::from_str(&self.cause)
        {
            headers.insert(LOCATION, location);
        }
        if grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(HeaderName::from_static("grpc-status"), grpc_status(status));
            headers.insert(HeaderName::from_static("grpc-message"), HeaderValue::from_static(text));
            return response;
        }
        if !text.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            *response.body_mut() = Body::text(text);
        }
        *response.status_mut() = status;
        response
    }
}

impl From<Expired> for Refusal {
    fn from(expired: Expired) -> Self {
        match expired {
            Expired::Whole => Self::new(Kind::Timeout, "no whole answer within the request timeout"),
            Expired::Try => Self::new(Kind::TryTimeout, "no answer within lictor_per_try_timeout_ms"),
            Expired::Idle => Self::new(Kind::Idle, "nothing moved for the idle timeout"),
            Expired::IdleUpload => Self::new(Kind::IdleUpload, "nothing more of the request came for the idle timeout"),
            Expired::Upload => Self::new(Kind::BadRequest, "the request's body broke off"),
        }
    }
}

impl From<Overflow> for Refusal {
    fn from(overflow: Overflow) -> Self {
        Self::new(Kind::Overflow, overflow.to_string())
    }
}

/// Why an instance could not be connected to.
impl From<String> for Refusal {
    fn from(cause: String) -> Self {
        Self::new(Kind::Unreachable, cause)
    }
}

impl From<hyper::Error> for Refusal {
    fn from(error: hyper::Error) -> Self {
        Self::new(Kind::Unreachable, format!("no HTTP connection could be made: {error}"))
    }
}

/// Whether these are the headers of a gRPC request.
#[must_use]
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// As gRPC maps statuses of HTTP, and Envoy does.
fn grpc_status(status: StatusCode) -> HeaderValue {
    HeaderValue::from_static(match status.as_u16() {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502..=504 => "14",
        _ => "2",
    })
}
