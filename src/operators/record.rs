//! The values that operators of a log format read.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use http::HeaderMap;

use crate::tls::SpiffeId;

/// What is known of a request, or of a connection that carries bytes, when it is over. What is `None` is written
/// as `-`, and in JSON as `null`.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    pub start: SystemTime,
    /// From the start to the last byte of the answer.
    pub duration: Duration,
    /// To the last byte of the request.
    pub request_duration: Option<Duration>,
    /// To the first byte of the upstream's answer.
    pub response_duration: Option<Duration>,
    /// `None` for a connection that carries bytes.
    pub request: Option<Request<'a>>,
    pub response: Option<Response<'a>>,
    /// Envoy's short names of what went wrong (`UF`, `UH`, `NR`, `UT`, `UO`, `DC`…), with commas between; may be
    /// empty.
    pub flags: Cow<'a, str>,
    /// Body bytes from the downstream.
    pub bytes_received: u64,
    /// Body bytes to the downstream.
    pub bytes_sent: u64,
    pub connection_termination: Option<Cow<'a, str>>,
    pub upstream: Option<Upstream<'a>>,
    pub downstream_local: Option<SocketAddr>,
    pub downstream_remote: Option<SocketAddr>,
    pub requested_server_name: Option<Cow<'a, str>>,
    /// Who is at the other end, where it has proved itself.
    pub peer: Option<&'a SpiffeId>,
    /// The rule that would have denied it, where audit mode let it through.
    pub would_be_denied_by: Option<&'a str>,
}

#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// `HTTP/1.1` or `HTTP/2`.
    pub protocol: &'static str,
    pub method: &'a str,
    /// With the query, as it came: before any rewrite.
    pub path: &'a str,
    pub authority: &'a str,
    pub headers: &'a HeaderMap,
}

#[derive(Debug, Clone)]
pub struct Response<'a> {
    pub code: u16,
    /// `via_upstream`, or what of ours answered.
    pub details: Option<Cow<'a, str>>,
    pub headers: &'a HeaderMap,
    pub trailers: Option<&'a HeaderMap>,
}

/// Where it went.
#[derive(Debug, Clone)]
pub struct Upstream<'a> {
    pub cluster: Cow<'a, str>,
    pub route: Option<Cow<'a, str>>,
    /// The endpoint that answered, or that was tried last.
    pub host: Option<Cow<'a, str>>,
    pub local: Option<SocketAddr>,
    /// Why TLS with it failed.
    pub transport_failure: Option<Cow<'a, str>>,
    pub attempts: u32,
}

impl Record<'_> {
    /// One of which nothing is known but its beginning.
    #[must_use]
    pub fn new(start: SystemTime) -> Self {
        Self {
            start,
            duration: Duration::ZERO,
            request_duration: None,
            response_duration: None,
            request: None,
            response: None,
            flags: Cow::Borrowed(""),
            bytes_received: 0,
            bytes_sent: 0,
            connection_termination: None,
            upstream: None,
            downstream_local: None,
            downstream_remote: None,
            requested_server_name: None,
            peer: None,
            would_be_denied_by: None,
        }
    }
}
