//! Destinations of metrics besides the admin server.

use std::net::SocketAddr;
use std::time::Duration;

/// What the proxy's `Config` asks for, under the keys that Envoy's bootstrap is made of. Under Envoy a change needs a
/// restart; here it is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsSettings {
    /// `envoy_prometheus_bind_addr`: a listener for one path.
    pub prometheus: Option<SocketAddr>,
    /// `envoy_stats_bind_addr`: a listener for `/stats`.
    pub stats: Option<SocketAddr>,
    /// `envoy_statsd_url` as it is written: a variable of the environment may stand in it.
    pub statsd: Option<String>,
    /// `envoy_dogstatsd_url`, likewise.
    pub dogstatsd: Option<String>,
    /// `envoy_stats_tags`: labels for every series.
    pub tags: Vec<(String, String)>,
    /// `envoy_stats_flush_interval`: time between packets to statsd; default 5 s.
    pub flush_interval: Duration,
}

impl Default for MetricsSettings {
    fn default() -> Self {
        Self {
            prometheus: None,
            stats: None,
            statsd: None,
            dogstatsd: None,
            tags: Vec::new(),
            flush_interval: Duration::from_secs(5),
        }
    }
}
