//! When a request is tried again.

use http::{HeaderMap, StatusCode};

/// When to try again, and how often. A policy without a condition would never apply and is not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub retries: u32,
    conditions: Vec<RetryOn>,
    statuses: Vec<u16>,
}

/// Envoy's conditions, as far as Consul takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryOn {
    /// Any 5xx, and no response at all.
    ServerError,
    /// 502, 503 and 504.
    GatewayError,
    Reset,
    /// A reset before the request was sent.
    ResetBeforeRequest,
    /// Also a connect that timed out.
    ConnectFailure,
    EnvoyRateLimited,
    /// 409.
    Retriable4xx,
    RefusedStream,
    /// A `grpc-status` in the response headers.
    Grpc(u32),
}

/// The failure of one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection to the instance.
    Connect,
    /// The stream was refused: the instance has not seen the request (`REFUSED_STREAM`, `GOAWAY`).
    Refused,
    /// Ended before any of the request was sent.
    ResetBeforeRequest,
    /// Ended later, before response headers.
    Reset,
}

impl RetryPolicy {
    /// Envoy's reading of a route's fields: without a condition nothing is tried again, and without a number
    /// once.
    #[must_use]
    pub fn new(retries: u32, conditions: Vec<RetryOn>, statuses: Vec<u16>) -> Option<Self> {
        let some = !conditions.is_empty() || !statuses.is_empty();
        some.then_some(Self { retries: retries.max(1), conditions, statuses })
    }

    /// Whether a response with these headers is to be tried again.
    #[must_use]
    pub fn retries_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        if headers.contains_key("x-envoy-ratelimited") {
            return self.conditions.contains(&RetryOn::EnvoyRateLimited);
        }
        let grpc_status = || headers.get("grpc-status")?.to_str().ok()?.parse::<u32>().ok();
        self.statuses.contains(&status.as_u16())
            || self.conditions.iter().any(|condition| match condition {
                RetryOn::ServerError => status.is_server_error(),
                RetryOn::GatewayError => matches!(status.as_u16(), 502..=504),
                RetryOn::Retriable4xx => status == StatusCode::CONFLICT,
                RetryOn::Grpc(code) => grpc_status() == Some(*code),
                _ => false,
            })
    }

    /// Whether a try that brought no response is to be tried again.
    #[must_use]
    pub fn retries_failure(&self, failure: Failure) -> bool {
        self.conditions.iter().any(|condition| match condition {
            // To Envoy a try without a response is a 503 of the instance.
            RetryOn::ServerError | RetryOn::GatewayError | RetryOn::Reset => true,
            RetryOn::ResetBeforeRequest => matches!(failure, Failure::ResetBeforeRequest | Failure::Connect),
            RetryOn::ConnectFailure => failure == Failure::Connect,
            RetryOn::RefusedStream => failure == Failure::Refused,
            _ => false,
        })
    }
}

impl RetryOn {
    /// Reads a condition as Consul and Envoy spell it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "5xx" => Self::ServerError,
            "gateway-error" => Self::GatewayError,
            "reset" => Self::Reset,
            "reset-before-request" => Self::ResetBeforeRequest,
            "connect-failure" => Self::ConnectFailure,
            "envoy-ratelimited" => Self::EnvoyRateLimited,
            "retriable-4xx" => Self::Retriable4xx,
            "refused-stream" => Self::RefusedStream,
            "cancelled" => Self::Grpc(1),
            "deadline-exceeded" => Self::Grpc(4),
            "resource-exhausted" => Self::Grpc(8),
            "internal" => Self::Grpc(13),
            "unavailable" => Self::Grpc(14),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::fixture::headers;

    #[test]
    fn retries_happen_on_their_conditions_alone() {
        assert_eq!(RetryPolicy::new(3, Vec::new(), Vec::new()), None);
        assert_eq!(RetryPolicy::new(0, vec![RetryOn::Reset], Vec::new()).map(|policy| policy.retries), Some(1));
        let on = |condition: &str| RetryPolicy::new(1, vec![RetryOn::parse(condition).unwrap()], Vec::new()).unwrap();
        let all = [500, 502, 503, 504, 409, 429];
        let retried = |policy: &RetryPolicy| {
            let retried =
                |status: &&u16| policy.retries_response(StatusCode::from_u16(**status).unwrap(), &HeaderMap::new());
            all.iter().filter(retried).copied().collect::<Vec<_>>()
        };
        assert_eq!(retried(&on("5xx")), [500, 502, 503, 504]);
        assert_eq!(retried(&on("gateway-error")), [502, 503, 504]);
        assert_eq!(retried(&on("retriable-4xx")), [409]);
        assert_eq!(retried(&on("reset")), [0; 0]);
        assert_eq!(retried(&RetryPolicy::new(1, Vec::new(), vec![429, 500]).unwrap()), [500, 429]);
        let failures = [Failure::Connect, Failure::Refused, Failure::ResetBeforeRequest, Failure::Reset];
        let after = |condition| failures.map(|failure| on(condition).retries_failure(failure));
        for condition in ["5xx", "gateway-error", "reset"] {
            assert_eq!(after(condition), [true; 4], "{condition}");
        }
        assert_eq!(after("connect-failure"), [true, false, false, false]);
        assert_eq!(after("refused-stream"), [false, true, false, false]);
        assert_eq!(after("reset-before-request"), [true, false, true, false]);
        assert_eq!(after("unavailable"), [false; 4]);
        let grpc = headers(&[("grpc-status", "14")]);
        assert!(on("unavailable").retries_response(StatusCode::OK, &grpc));
        assert!(!on("internal").retries_response(StatusCode::OK, &grpc));
        let limited = headers(&[("x-envoy-ratelimited", "true")]);
        assert!(!on("5xx").retries_response(StatusCode::SERVICE_UNAVAILABLE, &limited));
        assert!(on("envoy-ratelimited").retries_response(StatusCode::SERVICE_UNAVAILABLE, &limited));
        assert_eq!(RetryOn::parse("retriable-status-codes"), None);
    }
}
