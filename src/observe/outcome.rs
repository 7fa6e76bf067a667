//! How a connection or a request ended: one table, from which the log line, the access log, the answer and its header derive.

use std::borrow::Cow;
use std::fmt::{self, Display};

use http::StatusCode;

/// The side that ended a connection or request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It came to its end.
    Nobody,
    /// Who connected to us, or asked.
    Downstream,
    /// The local app, or an instance of an upstream.
    Upstream,
    /// This sidecar, by its configuration or a time limit.
    Us,
}

/// Whether the same may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeatable {
    /// It would end in the same way, or is over.
    No,
    /// Nobody has seen it.
    Yes,
    /// It may have been seen: only what changes nothing by being sent twice.
    IfIdempotent,
}

/// The flag, details, meaning and remedy of an outcome, and the answer to a request.
#[derive(Debug, Clone, Copy)]
pub struct Description {
    /// The flag of Envoy's access log (1.40); empty where it has none.
    pub flag: &'static str,
    /// Envoy's `RESPONSE_CODE_DETAILS`; empty for what only connections come to.
    pub details: &'static str,
    pub side: Side,
    pub repeatable: Repeatable,
    /// Of our answer; 200 where there is none of ours.
    pub status: StatusCode,
    pub body: &'static str,
    /// One sentence for operators: what happened.
    pub meaning: &'static str,
    /// One sentence for operators: what to do next. Empty where nothing is wrong.
    pub remedy: &'static str,
}

/// Names each outcome once, for the type and for [`Outcome::ALL`].
macro_rules! outcomes {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// How a connection or a request ended.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Outcome {
            $($(#[$doc])* $name,)*
        }

        impl Outcome {
            /// Every outcome.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name, for lists and labels.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

outcomes! {
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
    /// Let through in audit mode. Nothing ends so: it is reported beside the outcome.
    WouldDeny,
    /// The sidecar of the destination has denied a connection of ours, and said so.
    DeniedByDestination,
    /// The sidecar of the destination has ended a connection of ours without a byte, which is how sidecars deny.
    ProbablyDenied,
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

/// An outcome without an answer of ours.
const fn silent(flag: &'static str, side: Side, repeatable: Repeatable) -> Description {
    Description { flag, details: "", side, repeatable, status: StatusCode::OK, body: "", meaning: "", remedy: "" }
}

/// An outcome with one.
const fn answered(
    flag: &'static str,
    side: Side,
    repeatable: Repeatable,
    status: StatusCode,
    details: &'static str,
    body: &'static str,
) -> Description {
    Description { flag, details, side, repeatable, status, body, meaning: "", remedy: "" }
}

impl Description {
    const fn means(self, meaning: &'static str, remedy: &'static str) -> Self {
        Self { meaning, remedy, ..self }
    }

    const fn details(self, details: &'static str) -> Self {
        Self { details, ..self }
    }
}

impl Outcome {
    /// Of all that derives from an outcome, the one place.
    #[must_use]
    pub const fn describe(self) -> Description {
        match self {
            Self::Ended
            | Self::Aborted
            | Self::ClientReset
            | Self::Unproved
            | Self::Unused
            | Self::OtherProtocol
            | Self::Drained
            | Self::Displaced => self.describe_end(),
            Self::BadRequest
            | Self::TooLarge
            | Self::Method
            | Self::Denied
            | Self::WouldDeny
            | Self::Redirect
            | Self::NoRoute => self.describe_refusal(),
            Self::DeniedByDestination | Self::ProbablyDenied => self.describe_denied_there(),
            Self::NoInstance | Self::Unreachable | Self::Overflow => self.describe_unsent(),
            Self::Reset | Self::BadResponse | Self::LargeResponse => self.describe_response(),
            Self::Timeout | Self::TryTimeout | Self::Idle | Self::IdleUpload => self.describe_timeout(),
        }
    }

    /// Ends without an answer of ours.
    const fn describe_end(self) -> Description {
        match self {
            Self::Aborted => silent("DC", Side::Downstream, Repeatable::IfIdempotent)
                .details("downstream_remote_disconnect")
                .means(
                    "The downstream left before the end, or this sidecar was stopped.",
                    "Look at the downstream: its own timeout may be shorter than the answer takes.",
                ),
            Self::ClientReset => silent("DC", Side::Downstream, Repeatable::IfIdempotent)
                .details("downstream_remote_disconnect")
                .means(
                    "The downstream reset its connection or ended it in the middle of a message.",
                    "Look at the downstream's log: it crashed, timed out or cancelled.",
                ),
            Self::Unproved => silent("", Side::Us, Repeatable::Yes).means(
                "The peer showed no valid certificate of the mesh, or the one it showed is no longer valid.",
                "See the problem in this sidecar's log; compare the roots of both sides and the clocks of both hosts.",
            ),
            Self::Unused => silent("", Side::Downstream, Repeatable::Yes)
                .means("A peer made a TLS session and requested no connection on it.", "Nothing, unless there are many: then see what the peer does."),
            Self::OtherProtocol => silent("", Side::Us, Repeatable::Yes).means(
                "The protocol of the service has changed to one of HTTP, so that each request is to be decided by itself.",
                "Connect again.",
            ),
            Self::Drained => silent("", Side::Us, Repeatable::IfIdempotent).means(
                "This sidecar, or that of the destination, is stopping, and its drain time is over.",
                "Connect to another instance; raise the drain time if connections last longer.",
            ),
            Self::Displaced => silent("", Side::Us, Repeatable::Yes).means(
                "An exposed path or the handshakes in progress had as many connections as they may have, and this was the oldest.",
                "Find the client that opens so many connections.",
            ),
            _ => silent("", Side::Nobody, Repeatable::No)
                .details("via_upstream")
                .means("All that was to be carried was carried.", ""),
        }
    }

    /// What is refused before it is sent anywhere.
    const fn describe_refusal(self) -> Description {
        const NO: Repeatable = Repeatable::No;
        match self {
            Self::BadRequest => answered("DPE", Side::Us, NO, StatusCode::BAD_REQUEST, "bad_request", "").means(
                "The request is not HTTP, or such that two readers may see two requests, or its body broke off.",
                "See the cause in this sidecar's log and correct the client.",
            ),
            Self::TooLarge => {
                answered("DPE", Side::Us, NO, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "bad_request", "").means(
                    "The head of the request has more than 100 headers or 60 KiB.",
                    "Send fewer or smaller headers; cookies are the usual reason.",
                )
            }
            Self::Method => answered("", Side::Us, NO, StatusCode::METHOD_NOT_ALLOWED, "bad_request", "")
                .means("The method is CONNECT, which the mesh does not carry.", "Use another method."),
            Self::Redirect => {
                answered("", Side::Us, NO, StatusCode::TEMPORARY_REDIRECT, "path_normalization_failed", "").means(
                    "The path has escaped slashes, and the configuration redirects to the path without them.",
                    "Follow the redirect, or set escaped_slashes_action of the mesh's request normalization.",
                )
            }
            Self::NoRoute => answered("NR", Side::Us, NO, StatusCode::NOT_FOUND, "route_not_found", "").means(
                "No route of the service-router matches, or the path is not exposed.",
                "Compare the request with the service-router's routes or the exposed paths.",
            ),
            Self::WouldDeny => silent("", Side::Us, NO).means(
                "The intentions do not allow this source, or not this request; it was let through, as the service is in audit mode.",
                "Allow it in the service-intentions of the destination, if it should be, before lictor_intentions_audit is turned off.",
            ),
            // Denied.
            _ => answered(
                "",
                Side::Us,
                NO,
                StatusCode::FORBIDDEN,
                "rbac_access_denied_matched_policy[none]",
                "RBAC: access denied",
            )
            .means(
                "The intentions do not allow this source, or not this request.",
                "See the deciding rule in this sidecar's log and change the service-intentions of the destination if it should be allowed.",
            ),
        }
    }

    /// Connections that the other side's sidecar has ended, for which Envoy has no flag.
    const fn describe_denied_there(self) -> Description {
        match self {
            Self::DeniedByDestination => {
                silent("", Side::Upstream, Repeatable::No).details("denied_by_destination").means(
                    "The sidecar of the destination denied the connection: its intentions do not allow this service.",
                    "See the deciding rule in the log of the destination's sidecar, and change its service-intentions if this service should be allowed.",
                )
            }
            // Probably denied.
            _ => silent("", Side::Upstream, Repeatable::No).details("probably_denied_by_destination").means(
                "The sidecar of the destination ended the connection after the handshake and without a byte: its intentions probably deny this service, or else its app took no connection or closed it at once.",
                "See the log of the destination's sidecar, and the intentions with the destination (consul intention check).",
            ),
        }
    }

    /// What was not sent to any upstream.
    const fn describe_unsent(self) -> Description {
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        match self {
            Self::NoInstance => {
                answered("UH", Side::Us, Repeatable::Yes, UNAVAILABLE, "no_healthy_upstream", "no healthy upstream")
                    .means(
                        "No instance of the upstream can be used: none is registered, none passes its checks, or all are ejected.",
                        "See the health checks of the service in Consul, and whether the token may read its nodes and services.",
                    )
            }
            Self::Unreachable => answered(
                "UF",
                Side::Upstream,
                Repeatable::Yes,
                UNAVAILABLE,
                "upstream_reset_before_response_started{remote_connection_failure}",
                "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure",
            )
            .means(
                "No instance, or not the local app, took a connection.",
                "See the reason for each address in this sidecar's log: refused, timed out, or a wrong certificate.",
            ),
            // Overflow.
            _ => answered(
                "UO",
                Side::Us,
                Repeatable::Yes,
                UNAVAILABLE,
                "upstream_reset_before_response_started{overflow}",
                "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            )
            .means(
                "A limit of connections or requests is reached.",
                "Raise the limit that the log names (limits of the upstream, max_inbound_connections), or add instances.",
            ),
        }
    }

    /// What went wrong with the upstream's response.
    const fn describe_response(self) -> Description {
        match self {
            Self::BadResponse => answered(
                "UPE",
                Side::Upstream,
                Repeatable::No,
                StatusCode::BAD_GATEWAY,
                "upstream_reset_before_response_started{protocol_error}",
                "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
            )
            .means(
                "The server's answer is not HTTP, or two readers may see two answers in it.",
                "Compare the protocol in service-defaults with the protocol of the app.",
            ),
            Self::LargeResponse => answered(
                "",
                Side::Us,
                Repeatable::No,
                StatusCode::INTERNAL_SERVER_ERROR,
                "response_payload_too_large",
                "Internal Server Error",
            )
            .means(
                "A response that is held back until its end, for a gRPC client of HTTP/1.1, is too large.",
                "Have the client use HTTP/2.",
            ),
            // Reset.
            _ => answered(
                "UC",
                Side::Upstream,
                Repeatable::IfIdempotent,
                StatusCode::SERVICE_UNAVAILABLE,
                "upstream_reset_before_response_started{connection_termination}",
                "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            )
            .means(
                "The server ended its connection before or within its answer.",
                "See the server's log: it crashed, or closes idle connections that are still used.",
            ),
        }
    }

    /// What took too long.
    const fn describe_timeout(self) -> Description {
        const GATEWAY_TIMEOUT: StatusCode = StatusCode::GATEWAY_TIMEOUT;
        const ONCE: Repeatable = Repeatable::IfIdempotent;
        match self {
            Self::Timeout => {
                answered("UT", Side::Us, ONCE, GATEWAY_TIMEOUT, "response_timeout", "upstream request timeout").means(
                    "The answer took longer than the request timeout.",
                    "See why the server is slow, or raise the timeout of the route or resolver, or local_request_timeout_ms.",
                )
            }
            Self::TryTimeout => {
                answered("UT", Side::Us, ONCE, GATEWAY_TIMEOUT, "upstream_per_try_timeout", "upstream request timeout")
                    .means(
                        "The answer of one try took longer than the time for a try.",
                        "See why the server is slow, or raise the time for a try.",
                    )
            }
            // Older versions of Envoy say 408 to both, which would be the client's fault.
            Self::Idle => answered("SI", Side::Us, ONCE, GATEWAY_TIMEOUT, "stream_idle_timeout", "stream timeout")
                .means(
                    "Nothing moved within the idle timeout, and it was the server's turn.",
                    "Raise the idle timeout of the route, or local_idle_timeout_ms, if such pauses are usual.",
                ),
            _ => answered("SI", Side::Us, ONCE, StatusCode::REQUEST_TIMEOUT, "stream_idle_timeout", "stream timeout")
                .means(
                    "Nothing moved within the idle timeout, and it was the client's turn.",
                    "See why the client sends or takes nothing.",
                ),
        }
    }

    /// The flag as logs show it, which is never empty.
    #[must_use]
    pub const fn flag(self) -> &'static str {
        let flag = self.describe().flag;
        if flag.is_empty() { "-" } else { flag }
    }

    /// The side that ended a connection or request.
    #[must_use]
    pub const fn side(self) -> Side {
        self.describe().side
    }

    /// Whether the same may be sent again.
    #[must_use]
    pub const fn repeatable(self) -> Repeatable {
        self.describe().repeatable
    }

    /// One sentence: what happened.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        self.describe().meaning
    }

    /// One sentence: what to do next.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        self.describe().remedy
    }
}

/// Why a connection or a request did not end well.
#[derive(Debug)]
pub struct Fault {
    pub outcome: Outcome,
    /// One sentence for the log.
    pub cause: Cow<'static, str>,
}

impl Fault {
    pub fn new(outcome: Outcome, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { outcome, cause: cause.into() }
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_an_answer_of_ours_says_why_in_the_access_log() {
        for outcome in Outcome::ALL {
            let Description { flag, details, status, body, .. } = outcome.describe();
            assert!(status == StatusCode::OK || !details.is_empty(), "{outcome:?}");
            assert!(status != StatusCode::OK || body.is_empty(), "{outcome:?}");
            // A gRPC client is shown the body in a header.
            assert!(http::HeaderValue::from_str(body).is_ok() && flag.len() <= 3, "{outcome:?}");
            assert_ne!(outcome.flag(), "", "{outcome:?}");
        }
    }

    #[test]
    fn each_outcome_says_what_it_means_and_what_to_do_in_words_of_its_own() {
        let mut meanings = std::collections::BTreeSet::new();
        for outcome in Outcome::ALL {
            let Description { meaning, remedy, side, repeatable, .. } = outcome.describe();
            assert!(meaning.ends_with('.') && meanings.insert(meaning), "{outcome:?}: {meaning}");
            assert_eq!(remedy.is_empty(), *outcome == Outcome::Ended, "{outcome:?}");
            assert!(remedy.is_empty() || remedy.ends_with('.'), "{outcome:?}: {remedy}");
            assert_eq!(side == Side::Nobody, *outcome == Outcome::Ended, "{outcome:?}");
            assert_eq!(outcome.name(), format!("{outcome:?}"));
            assert!(repeatable == Repeatable::No || outcome.describe().status.as_u16() != 400, "{outcome:?}");
        }
    }
}
