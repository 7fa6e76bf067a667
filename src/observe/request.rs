//! The record of one request.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::HOST;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

use super::attempt::Attempts;
use super::connection::ConnectionInfo;
use super::outcome::Outcome;
use crate::access_log::Active;
use crate::jwt::Providers;
use crate::stats::ClusterStats;
use crate::trace::Traced;

/// One request, from its head to the end of its response.
#[derive(Debug)]
pub struct RequestRecord {
    pub connection: Arc<ConnectionInfo>,
    /// When its head was complete.
    pub start: SystemTime,
    pub started: Instant,
    pub version: Version,
    pub method: Method,
    /// As it came, with the query, which may hold tokens.
    pub uri: Uri,
    /// The `host` header of a request whose target names no authority.
    pub host: Option<HeaderValue>,
    /// Of the service-router; `None` where there is none.
    pub route: Option<Arc<str>>,
    /// The numbers of the target that it is for, or was sent to last.
    pub cluster: Option<Arc<ClusterStats>>,
    /// Retries that are configured, and were made.
    pub retries: u32,
    /// Where it was sent, with what came of it.
    pub attempts: Attempts,
    /// From the start to the head of the response.
    pub responded: Option<Duration>,
    /// Of the response; zero before there is one.
    pub status: u16,
    /// How the response came about: [`Outcome::Ended`] for the upstream's own.
    pub answer: Option<Outcome>,
    /// How the request ended, known at its end.
    pub outcome: Outcome,
    /// Why it has a response of ours: one sentence for logs, which may hold a location with its query.
    pub cause: Option<Cow<'static, str>>,
    /// The rule that would have denied it, where audit mode let it through.
    pub would_be_denied_by: Option<Box<str>>,
    /// Bytes of bodies, from the downstream and to it. The first is known at the end.
    pub bytes_received: u64,
    pub bytes_sent: u64,
    /// All of the response was given, or has broken off on our side.
    pub is_complete: bool,
    /// The response had begun, and we broke it off.
    pub is_cut: bool,
    /// It went out on a connection to `cluster`, where it counts as active until its end.
    pub is_sent: bool,
    /// A call to a service of gRPC.
    pub is_grpc: bool,
    /// The outcome that its server answered with.
    pub grpc_status: Option<u8>,
    /// As long as it lasted; known at its end.
    pub duration: Duration,
    /// They say where tokens are that no log may show.
    pub providers: Option<Arc<Providers>>,
    /// For the access log that was on when it began.
    pub access_log: Option<Box<CopiedHeaders>>,
    /// The trace that it belongs to; `None`: it is not traced.
    pub traced: Option<Box<Traced>>,
}

/// The headers that the format of an access log names, and the log.
#[derive(Debug)]
pub struct CopiedHeaders {
    pub log: Arc<Active>,
    pub request: HeaderMap,
    pub response: HeaderMap,
    pub trailers: Option<HeaderMap>,
}

impl RequestRecord {
    /// Of a request that has come now.
    #[must_use]
    pub fn new<B>(connection: Arc<ConnectionInfo>, request: &Request<B>, log: Option<Arc<Active>>) -> Self {
        let named = request.uri().authority().is_some();
        Self {
            connection,
            start: SystemTime::now(),
            started: Instant::now(),
            version: request.version(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            host: if named { None } else { request.headers().get(HOST).cloned() },
            route: None,
            cluster: None,
            retries: 0,
            attempts: Attempts::default(),
            responded: None,
            status: 0,
            answer: None,
            outcome: Outcome::Ended,
            cause: None,
            would_be_denied_by: None,
            bytes_received: 0,
            bytes_sent: 0,
            is_complete: false,
            is_cut: false,
            is_sent: false,
            is_grpc: false,
            grpc_status: None,
            duration: Duration::ZERO,
            providers: None,
            traced: None,
            access_log: log.map(|log| Box::new(CopiedHeaders::new(log, request.headers()))),
        }
    }

    /// `HTTP/1.1` or `HTTP/2`.
    #[must_use]
    pub fn protocol(&self) -> &'static str {
        if self.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" }
    }

    /// Empty where it names none.
    #[must_use]
    pub fn authority(&self) -> &str {
        let host = || self.host.as_ref().and_then(|host| host.to_str().ok());
        self.uri.authority().map(|authority| authority.as_str()).or_else(host).unwrap_or_default()
    }

    /// With the query, as it came.
    #[must_use]
    pub fn path(&self) -> &str {
        self.uri.path_and_query().map_or("", |path| path.as_str())
    }
}

impl CopiedHeaders {
    fn new(log: Arc<Active>, headers: &HeaderMap) -> Self {
        let request = copy(&log.settings().format.header_names().request, headers);
        Self { log, request, response: HeaderMap::new(), trailers: None }
    }

    pub fn set_response(&mut self, headers: &HeaderMap) {
        self.response = copy(&self.log.settings().format.header_names().response, headers);
    }

    pub fn set_trailers(&mut self, trailers: &HeaderMap) {
        self.trailers = Some(copy(&self.log.settings().format.header_names().trailers, trailers));
    }
}

/// The first line of each name, which is all that formats show.
fn copy(names: &[HeaderName], headers: &HeaderMap) -> HeaderMap {
    names.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}
