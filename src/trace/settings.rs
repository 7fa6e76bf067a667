//! Settings of tracing.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::sampler::Sampler;

/// What the proxy's registration says. The environment may say otherwise ([`super::Environment`]).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    /// The service that the sidecar stands for.
    pub service: String,
    /// The id of the sidecar.
    pub node: String,
    /// `envoy_tracing_json`; `None`: nothing is traced.
    pub collector: Option<Collector>,
    /// `envoy_listener_tracing_json`; default: callers decide, and nothing begins here.
    pub sampler: Option<Sampler>,
    /// `lictor_trace_connections`: each connection that carries bytes makes a span.
    pub connections: bool,
}

/// The collector, and its protocol.
#[derive(Debug, Clone, PartialEq)]
pub enum Collector {
    Zipkin(Zipkin),
    Otlp(Otlp),
}

/// JSON of Zipkin's second version.
#[derive(Debug, Clone, PartialEq)]
pub struct Zipkin {
    pub url: String,
    /// Instead of the URL's own.
    pub host: Option<String>,
    /// A server's span has the id of the client's span.
    pub shared: bool,
    /// Whether ids of traces that begin here have 128 bits, rather than 64.
    pub long_ids: bool,
    /// For one request.
    pub timeout: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Otlp {
    pub url: String,
    /// Instead of the URL's own.
    pub host: Option<String>,
    /// A call of gRPC, rather than a request.
    pub grpc: bool,
    /// For one request.
    pub timeout: Duration,
    pub headers: Headers,
    /// PEM of the authorities of an `https` URL; default: the system's.
    pub certificate: Option<PathBuf>,
    /// The name that spans are sent under; default: the service's.
    pub service: Option<String>,
}

impl Otlp {
    /// Without headers, for requests.
    #[must_use]
    pub fn new(url: String) -> Self {
        let timeout = Collector::TIMEOUT;
        Self { url, host: None, grpc: false, timeout, headers: Headers::default(), certificate: None, service: None }
    }
}

impl Collector {
    /// Timeout of one request to the collector: the default of OpenTelemetry's specification for OTLP and Zipkin.
    pub const TIMEOUT: Duration = Duration::from_secs(10);

    #[must_use]
    pub fn url(&self) -> &str {
        match self {
            Self::Zipkin(zipkin) => &zipkin.url,
            Self::Otlp(otlp) => &otlp.url,
        }
    }
}

impl fmt::Display for Collector {
    /// Without what may be secrets: user, password, query and fragment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(mut url) = reqwest::Url::parse(self.url()) else { return f.write_str("a URL that is none") };
        // They fail where there can be none.
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        url.set_query(None);
        url.set_fragment(None);
        url.fmt(f)
    }
}

/// Names and values, which may be secrets.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Headers(pub Vec<(String, String)>);

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// Attributes common to all spans of a sidecar.
#[derive(Debug, Clone, Default)]
pub(super) struct Origin {
    pub service: String,
    pub node: String,
    /// Of the resource, for OTLP.
    pub attributes: Vec<(String, String)>,
}
