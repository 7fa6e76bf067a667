//! Samples in Prometheus' text format 0.0.4, under Envoy's names.
//!
//! Written out here, as `prometheus-client` adds `_total` to each counter and writes OpenMetrics alone, while Envoy's
//! names have no such ending and dashboards query them letter by letter.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::group::{Sample, Value};

/// Media type of [`encode`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All samples with `common` labels on each; times in milliseconds.
#[must_use]
pub fn encode(samples: &[Sample], common: &[(String, String)]) -> String {
    let mut families: BTreeMap<String, (&'static str, String)> = BTreeMap::new();
    for sample in samples {
        let (name, labels) = sample.scope.labelled(sample.stat);
        let labels = labels.iter().map(|(name, value)| (*name, &**value));
        let labels = labels_text(labels.chain(common.iter().map(|(name, value)| (&**name, &**value))));
        let kind = match sample.value {
            Value::Counter(_) => "counter",
            Value::Gauge(_) => "gauge",
            Value::Times(_) => "histogram",
        };
        let (_, lines) = families.entry(name.clone()).or_insert_with(|| (kind, String::new()));
        write_sample(lines, &name, &labels, sample.value);
    }
    families.into_iter().fold(String::new(), |mut text, (name, (kind, lines))| {
        let _ = write!(text, "# TYPE {name} {kind}\n{lines}");
        text
    })
}

fn write_sample(to: &mut String, name: &str, labels: &str, value: Value) {
    // A string takes whatever is written to it.
    let _ = match value {
        Value::Counter(value) | Value::Gauge(value) => writeln!(to, "{name}{{{labels}}} {value}"),
        Value::Times(times) => {
            for (bound, count) in times.cumulative() {
                let bound = bound.map_or_else(|| "+Inf".to_owned(), milliseconds);
                let _ = writeln!(to, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
            }
            let _ = writeln!(to, "{name}_sum{{{labels}}} {}", milliseconds(times.sum));
            writeln!(to, "{name}_count{{{labels}}} {}", times.count())
        }
    };
}

/// Microseconds as milliseconds, without zeros at the end.
#[must_use]
pub fn milliseconds(micros: u64) -> String {
    let (whole, rest) = (micros / 1000, micros % 1000);
    if rest == 0 {
        return whole.to_string();
    }
    format!("{whole}.{rest:03}").trim_end_matches('0').to_owned()
}

/// Labels but for braces; an empty value is the same as no label. Of two labels with one name the first stays: Prometheus
/// refuses a whole scrape for a second one, and tags of the registration may have any name.
#[must_use]
pub fn labels_text<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let (mut text, mut names) = (String::new(), Vec::new());
    for (name, value) in labels.filter(|(_, value)| !value.is_empty()) {
        if names.contains(&name) {
            continue;
        }
        names.push(name);
        if !text.is_empty() {
            text.push(',');
        }
        let _ = write!(text, "{name}=\"{}\"", escape(value));
    }
    text
}

fn escape(value: &str) -> String {
    value.chars().fold(String::with_capacity(value.len()), |mut text, c| {
        match c {
            '\\' => text.push_str(r"\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str(r"\n"),
            c => text.push(c),
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stats::group::{ClusterStats, ListenerStats};
    use crate::stats::scope::{Cluster, Listener};

    #[test]
    fn no_label_stands_twice() {
        let labels = [("a", "1"), ("b", ""), ("a", "2"), ("b", "3")];
        assert_eq!(labels_text(labels.into_iter()), "a=\"1\",b=\"3\"");
    }

    #[test]
    fn a_family_has_one_type_and_its_lines_stand_together() {
        let (cluster, listener) =
            (ClusterStats::new(Cluster::LocalApp), ListenerStats::new(Listener::Public, "0.0.0.0_21000".into(), true));
        cluster.answered(404);
        cluster.answer_time.observe(Duration::from_micros(1_500));
        let mut samples = Vec::new();
        listener.collect(&mut samples);
        cluster.collect(&mut samples);
        let text = encode(&samples, &[("local_cluster".into(), "a\"b\\c\nd".into())]);
        let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut unique = types.clone();
        unique.dedup();
        assert_eq!(types, unique);
        for line in [
            "# TYPE envoy_cluster_upstream_rq_time histogram",
            "envoy_cluster_upstream_rq{envoy_cluster_name=\"local_app\",envoy_response_code=\"404\",local_cluster=\"a\\\"b\\\\c\\nd\"} 1",
            "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"local_app\",local_cluster=\"a\\\"b\\\\c\\nd\",le=\"0.5\"} 0",
            "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"local_app\",local_cluster=\"a\\\"b\\\\c\\nd\",le=\"5\"} 1",
            "envoy_cluster_upstream_rq_time_sum{envoy_cluster_name=\"local_app\",local_cluster=\"a\\\"b\\\\c\\nd\"} 1.5",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\nin\n{text}");
        }
    }
}
