//! How a connection or a request ended: one list, from which the log line, the access log, the answer and its header derive.

use std::borrow::Cow;
use std::fmt::{self, Display};

use http::StatusCode;

use super::codec::pool::{Failed, NoConnection};
use super::limits::Overflow;

/// How a connection or a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All that was to be carried was carried.
    Ended,
    /// The client left before the end, or we did at the end of our own life.
    Aborted,
    /// The client broke off.
    ClientReset,
    /// The client did not prove who it is, or does not any more.
    Unproved,
    /// A session was made and no connection was asked for on it.
    Unused,
    /// The connection carries another protocol than the service has now.
    OtherProtocol,
    /// The time for what was under way is over.
    Drained,
    /// A newer connection took its place.
    Displaced,
    /// Not HTTP, or such that two readers may see two requests.
    BadRequest,
    /// The head of the request.
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
    /// The server broke off.
    Reset,
    /// What the server answered is not HTTP, or two readers may see two answers in it.
    BadResponse,
    /// Of which all is held back until its end.
    LargeResponse,
    Overflow,
    Timeout,
    /// One try of perhaps several.
    TryTimeout,
    /// Nothing moved, and it was the server's turn.
    Idle,
    /// Nothing moved, and it was the client's turn.
    IdleUpload,
}

/// What an outcome is called, and what a request is told of it.
pub(crate) struct Told {
    /// The flag of Envoy's access log (1.40); empty where it has none.
    pub flag: &'static str,
    /// Envoy's `RESPONSE_CODE_DETAILS`; empty for what only connections come to.
    pub details: &'static str,
    pub status: StatusCode,
    pub body: &'static str,
}

impl Outcome {
    /// Of all that derives from an outcome, the one place.
    pub(crate) const fn describe(self) -> Told {
        const OK: StatusCode = StatusCode::OK;
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        let (flag, details, status, body) = match self {
            Self::Ended => ("", "via_upstream", OK, ""),
            Self::Aborted | Self::ClientReset => ("DC", "downstream_remote_disconnect", OK, ""),
            Self::Unproved | Self::Unused | Self::OtherProtocol | Self::Drained | Self::Displaced => ("", "", OK, ""),
            Self::BadRequest => ("DPE", "bad_request", StatusCode::BAD_REQUEST, ""),
            Self::TooLarge => ("DPE", "bad_request", StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, ""),
            Self::Method => ("", "bad_request", StatusCode::METHOD_NOT_ALLOWED, ""),
            Self::Denied => {
                ("", "rbac_access_denied_matched_policy[none]", StatusCode::FORBIDDEN, "RBAC: access denied")
            }
            Self::Redirect => ("", "path_normalization_failed", StatusCode::TEMPORARY_REDIRECT, ""),
            Self::NoRoute => ("NR", "route_not_found", StatusCode::NOT_FOUND, ""),
            Self::NoInstance => ("UH", "no_healthy_upstream", UNAVAILABLE, "no healthy upstream"),
            Self::Unreachable => (
                "UF",
                "upstream_reset_before_response_started{remote_connection_failure}",
                UNAVAILABLE,
                "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure",
            ),
            Self::Reset => (
                "UC",
                "upstream_reset_before_response_started{connection_termination}",
                UNAVAILABLE,
                "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            ),
            Self::BadResponse => (
                "UPE",
                "upstream_reset_before_response_started{protocol_error}",
                StatusCode::BAD_GATEWAY,
                "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
            ),
            Self::LargeResponse => {
                ("", "response_payload_too_large", StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error")
            }
            Self::Overflow => (
                "UO",
                "upstream_reset_before_response_started{overflow}",
                UNAVAILABLE,
                "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            ),
            Self::Timeout => ("UT", "response_timeout", StatusCode::GATEWAY_TIMEOUT, "upstream request timeout"),
            Self::TryTimeout => {
                ("UT", "upstream_per_try_timeout", StatusCode::GATEWAY_TIMEOUT, "upstream request timeout")
            }
            // Older versions of Envoy say 408 to both, which would be the client's fault.
            Self::Idle => ("SI", "stream_idle_timeout", StatusCode::GATEWAY_TIMEOUT, "stream timeout"),
            Self::IdleUpload => ("SI", "stream_idle_timeout", StatusCode::REQUEST_TIMEOUT, "stream timeout"),
        };
        Told { flag, details, status, body }
    }

    /// The flag as logs show it, which is never empty.
    #[must_use]
    pub(crate) const fn flag(self) -> &'static str {
        let flag = self.describe().flag;
        if flag.is_empty() { "-" } else { flag }
    }
}

/// Why a connection or a request did not end well.
#[derive(Debug)]
pub(crate) struct Fault {
    pub outcome: Outcome,
    /// One sentence for the log.
    pub cause: Cow<'static, str>,
}

impl Fault {
    pub(crate) fn new(outcome: Outcome, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { outcome, cause: cause.into() }
    }

    /// For a request to `whom` that brought no response.
    pub(crate) fn of(whom: impl Display, failed: &Failed) -> Self {
        let told = failed.describe();
        if failed.is_malformed() {
            return Self::new(Outcome::BadResponse, format!("{whom} answered what is not to be passed on: {told}"));
        }
        Self::new(Outcome::Reset, format!("{whom} broke off: {told}"))
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl From<Overflow> for Fault {
    fn from(overflow: Overflow) -> Self {
        Self::new(Outcome::Overflow, overflow.to_string())
    }
}

impl From<NoConnection> for Fault {
    fn from(why: NoConnection) -> Self {
        match why {
            NoConnection::Overflow(overflow) => overflow.into(),
            NoConnection::Unreachable(cause) => Self::new(Outcome::Unreachable, cause),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Outcome; 24] = [
        Outcome::Ended,
        Outcome::Aborted,
        Outcome::ClientReset,
        Outcome::Unproved,
        Outcome::Unused,
        Outcome::OtherProtocol,
        Outcome::Drained,
        Outcome::Displaced,
        Outcome::BadRequest,
        Outcome::TooLarge,
        Outcome::Method,
        Outcome::Denied,
        Outcome::Redirect,
        Outcome::NoRoute,
        Outcome::NoInstance,
        Outcome::Unreachable,
        Outcome::Reset,
        Outcome::BadResponse,
        Outcome::LargeResponse,
        Outcome::Overflow,
        Outcome::Timeout,
        Outcome::TryTimeout,
        Outcome::Idle,
        Outcome::IdleUpload,
    ];

    #[test]
    fn what_has_an_answer_of_ours_says_why_in_the_access_log() {
        for outcome in ALL {
            let Told { flag, details, status, body } = outcome.describe();
            assert!(status == StatusCode::OK || !details.is_empty(), "{outcome:?}");
            assert!(status != StatusCode::OK || body.is_empty(), "{outcome:?}");
            // A gRPC client is shown the body in a header.
            assert!(http::HeaderValue::from_str(body).is_ok() && flag.len() <= 3, "{outcome:?}");
            assert_ne!(outcome.flag(), "", "{outcome:?}");
        }
    }
}
