//! Why a request gets an answer of our own, in the words that users of Envoy under Consul know.

use std::borrow::Cow;
use std::fmt::Display;

use http::StatusCode;

use super::patience::Expired;
use crate::proxy::codec::pool::{Failed, NoConnection};
use crate::proxy::limits::Overflow;

/// Why a request gets an answer of ours.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub kind: Kind,
    /// One sentence for the log.
    pub cause: Cow<'static, str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
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
    /// What the other end answered is not HTTP, or two readers may see two answers in it.
    BadResponse,
    /// Of which all is held back until its end.
    LargeResponse,
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
    pub(crate) fn told(self) -> (StatusCode, &'static str, &'static str) {
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
            Self::BadResponse => (
                StatusCode::BAD_GATEWAY,
                "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
                "UPE",
            ),
            Self::LargeResponse => (StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error", "-"),
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
    pub(crate) fn flag(self) -> &'static str {
        self.told().2
    }
}

impl Refusal {
    pub(crate) fn new(kind: Kind, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, cause: cause.into() }
    }

    /// For a request to `whom` that brought no response.
    pub(crate) fn of(whom: impl Display, failed: &Failed) -> Self {
        let told = failed.told();
        if failed.is_malformed() {
            return Self::new(Kind::BadResponse, format!("{whom} answered what is not to be passed on: {told}"));
        }
        Self::new(Kind::Reset, format!("{whom} broke off: {told}"))
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

impl From<NoConnection> for Refusal {
    fn from(why: NoConnection) -> Self {
        match why {
            NoConnection::Overflow(overflow) => overflow.into(),
            NoConnection::Unreachable(cause) => cause.into(),
        }
    }
}
