//! `envoy_prometheus_bind_addr` and its like: where metrics go.

use std::net::SocketAddr;
use std::time::Duration;

use super::Notes;
use super::opaque::Opaque;
use crate::snapshot::MetricsSettings;

/// Shortest interval between packets for statsd. Envoy's minimum is a millisecond.
const SHORTEST_FLUSH: Duration = Duration::from_millis(100);

/// What cannot be read is noted and left out.
pub(super) fn settings(config: Opaque<'_>, notes: &mut Notes) -> MetricsSettings {
    let default = MetricsSettings::default();
    let flush = config.duration("envoy_stats_flush_interval", notes).filter(|time| !time.is_zero());
    MetricsSettings {
        prometheus: address(config, "envoy_prometheus_bind_addr", notes),
        stats: address(config, "envoy_stats_bind_addr", notes),
        statsd: url(config, "envoy_statsd_url", &["udp://"], notes),
        dogstatsd: url(config, "envoy_dogstatsd_url", &["udp://", "unix://"], notes),
        tags: tags(config, notes),
        flush_interval: flush.map_or(default.flush_interval, |time| time.max(SHORTEST_FLUSH)),
    }
}

fn address(config: Opaque<'_>, key: &str, notes: &mut Notes) -> Option<SocketAddr> {
    let text = config.text(key, notes).filter(|text| !text.is_empty())?;
    let address = text.strip_prefix("localhost:").map_or(text.clone(), |port| format!("127.0.0.1:{port}"));
    let parsed = address.parse().ok();
    if parsed.is_none() {
        config.bad(key, "an address such as \"0.0.0.0:20200\"", notes);
    }
    parsed
}

/// A variable of the environment is known only where it is used.
fn url(config: Opaque<'_>, key: &str, schemes: &[&str], notes: &mut Notes) -> Option<String> {
    let text = config.text(key, notes).filter(|text| !text.is_empty())?;
    if text.starts_with('$') || schemes.iter().any(|scheme| text.starts_with(scheme)) {
        return Some(text);
    }
    config.bad(key, &format!("a URL that begins with {}", schemes.join(" or ")), notes);
    None
}

fn tags(config: Opaque<'_>, notes: &mut Notes) -> Vec<(String, String)> {
    let tags: Vec<_> = config.names("envoy_stats_tags", notes).iter().map(|text| tag(text)).collect();
    // Labels that no reader takes: one without a name, and that of a histogram's buckets.
    let (good, bad): (Vec<_>, Vec<_>) = tags.into_iter().partition(|(key, _)| !matches!(key.as_str(), "" | "le"));
    for (key, _) in bad {
        config.note(&format!("envoy_stats_tags has a tag with the name {key:?}, which is left out"), notes);
    }
    good
}

/// `k=v`; a bare word has the value 1, and keys are in lower case, as Consul has them.
fn tag(text: &str) -> (String, String) {
    let (key, value) = text.split_once('=').unwrap_or((text, "1"));
    let sound = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let key: String = key.trim().chars().map(sound).collect();
    let key = if key.starts_with(|c: char| c.is_ascii_digit()) { format!("_{key}") } else { key };
    (key, value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(config: &Value) -> (MetricsSettings, usize) {
        let mut notes = Notes::default();
        let settings = settings(Opaque::new(config.as_object(), "proxy config"), &mut notes);
        (settings, notes.take().len())
    }

    #[test]
    fn keys_are_those_of_envoy_under_consul() {
        let (settings, noted) = read(&json!({
            "envoy_prometheus_bind_addr": "0.0.0.0:20200",
            "envoy_stats_bind_addr": "localhost:9000",
            "envoy_statsd_url": "udp://${HOST_IP}:8125",
            "envoy_dogstatsd_url": "unix:///var/run/dsd.sock",
            "envoy_stats_tags": ["env=lab", "Canary", "a-b=c=d"],
            "envoy_stats_flush_interval": "1s",
        }));
        let tag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(noted, 0);
        assert_eq!(settings.prometheus, "0.0.0.0:20200".parse().ok());
        assert_eq!(settings.stats, "127.0.0.1:9000".parse().ok());
        assert_eq!(settings.statsd.as_deref(), Some("udp://${HOST_IP}:8125"));
        assert_eq!(settings.dogstatsd.as_deref(), Some("unix:///var/run/dsd.sock"));
        assert_eq!(settings.tags, [tag("env", "lab"), tag("canary", "1"), tag("a_b", "c=d")]);
        assert_eq!(settings.flush_interval, Duration::from_secs(1));
    }

    #[test]
    fn what_cannot_be_read_is_noted() {
        assert_eq!(read(&json!({})), (MetricsSettings::default(), 0));
        for config in [
            json!({"envoy_prometheus_bind_addr": "20200"}),
            json!({"envoy_statsd_url": "tcp://127.0.0.1:1"}),
            json!({"envoy_statsd_url": "unix:///x"}),
            json!({"envoy_stats_flush_interval": "soon"}),
            json!({"envoy_stats_tags": ["=lab"]}),
            json!({"envoy_stats_tags": "LE=1"}),
        ] {
            assert_eq!(read(&config), (MetricsSettings::default(), 1), "{config}");
        }
        assert_eq!(read(&json!({"envoy_statsd_url": "$STATSD"})).0.statsd.as_deref(), Some("$STATSD"));
    }
}
