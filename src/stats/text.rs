//! Samples as Envoy's `/stats` shows them: lines, or JSON.

use std::fmt::Write as _;

use serde_json::{Value as Json, json};

use super::group::{Sample, Value};
use super::value::Times;

/// Which samples are asked for.
#[derive(Debug, Default)]
pub struct Selection {
    /// Found anywhere in the name with dots.
    pub filter: Option<regex::Regex>,
    pub only: Option<Type>,
    /// Leaves out what was never counted.
    pub used_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Counters,
    Gauges,
    Histograms,
    /// There are none.
    TextReadouts,
}

impl Selection {
    /// The chosen samples with their names, counters and gauges by name and histograms after them.
    #[must_use]
    pub fn choose(&self, samples: Vec<Sample>) -> Vec<(String, Sample)> {
        let named = samples.into_iter().map(|sample| (sample.scope.dotted(sample.stat), sample));
        let mut chosen: Vec<_> = named.filter(|(name, sample)| self.is_chosen(name, sample)).collect();
        chosen.sort_by(|(a, x), (b, y)| (type_of(x) == Type::Histograms, a).cmp(&(type_of(y) == Type::Histograms, b)));
        chosen
    }

    fn is_chosen(&self, name: &str, sample: &Sample) -> bool {
        let used = match &sample.value {
            Value::Counter(value) | Value::Gauge(value) => *value > 0,
            Value::Times(times) => times.count() > 0,
        };
        (used || !self.used_only)
            && self.only.is_none_or(|only| only == type_of(sample))
            && self.filter.as_ref().is_none_or(|filter| filter.is_match(name))
    }
}

fn type_of(sample: &Sample) -> Type {
    match sample.value {
        Value::Counter(_) => Type::Counters,
        Value::Gauge(_) => Type::Gauges,
        Value::Times(_) => Type::Histograms,
    }
}

/// `name: value` lines. Of a histogram, quantiles since the start stand for Envoy's of the last interval, too.
#[must_use]
pub fn lines(samples: &[(String, Sample)]) -> String {
    samples.iter().fold(String::new(), |mut text, (name, sample)| {
        // A string takes whatever is written to it.
        let _ = match &sample.value {
            Value::Counter(value) | Value::Gauge(value) => writeln!(text, "{name}: {value}"),
            Value::Times(times) => writeln!(text, "{name}: {}", quantiles_text(times)),
        };
        text
    })
}

const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

fn quantiles_text(times: &Times) -> String {
    if times.count() == 0 {
        return "No recorded values".to_owned();
    }
    let quantile = |percent: &f64| {
        let value = milliseconds(times, *percent);
        format!("P{percent}({value},{value})")
    };
    QUANTILES.iter().map(quantile).collect::<Vec<_>>().join(" ")
}

fn milliseconds(times: &Times, percent: f64) -> f64 {
    let micros = times.quantile(percent / 100.0).unwrap_or_default();
    micros.round() / 1000.0
}

/// The shape of Envoy's `/stats?format=json`.
#[must_use]
pub fn json(samples: &[(String, Sample)]) -> Json {
    let mut stats = Vec::new();
    let mut histograms = Vec::new();
    for (name, sample) in samples {
        match &sample.value {
            Value::Counter(value) | Value::Gauge(value) => stats.push(json!({ "name": name, "value": value })),
            Value::Times(times) => {
                let value = |percent: &f64| {
                    let value = (times.count() > 0).then(|| milliseconds(times, *percent));
                    json!({ "interval": value, "cumulative": value })
                };
                histograms.push(json!({ "name": name, "values": QUANTILES.iter().map(value).collect::<Vec<_>>() }));
            }
        }
    }
    if !histograms.is_empty() {
        stats.push(json!({ "histograms": { "supported_quantiles": QUANTILES, "computed_quantiles": histograms } }));
    }
    json!({ "stats": stats })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stats::group::ClusterStats;
    use crate::stats::scope::Cluster;

    fn samples() -> Vec<Sample> {
        let cluster = ClusterStats::new(Cluster::LocalApp);
        cluster.answered(200);
        cluster.answer_time.observe(Duration::from_millis(3));
        let mut samples = Vec::new();
        cluster.collect(&mut samples);
        samples
    }

    #[test]
    fn filters_types_and_used_ones_are_chosen() {
        let select = |filter: Option<&str>, only, used_only| {
            let filter = filter.map(|filter| regex::Regex::new(filter).unwrap());
            lines(&Selection { filter, only, used_only }.choose(samples()))
        };
        assert_eq!(
            select(None, Some(Type::Counters), true),
            "cluster.local_app.upstream_rq_200: 1\ncluster.local_app.upstream_rq_2xx: 1\n\
             cluster.local_app.upstream_rq_completed: 1\n"
        );
        assert_eq!(select(Some("rq_5xx$"), None, false), "cluster.local_app.upstream_rq_5xx: 0\n");
        assert!(select(Some("connect_ms"), None, false).ends_with("connect_ms: No recorded values\n"));
        assert!(select(Some("rq_time"), None, true).starts_with("cluster.local_app.upstream_rq_time: P0("));
        assert_eq!(select(None, Some(Type::TextReadouts), false), "");
    }

    #[test]
    fn json_has_values_as_numbers() {
        let chosen = Selection { filter: None, only: None, used_only: true }.choose(samples());
        let json = json(&chosen);
        assert_eq!(json["stats"][0], json!({ "name": "cluster.local_app.upstream_rq_200", "value": 1 }));
        let histograms = &json["stats"][3]["histograms"];
        assert_eq!(histograms["computed_quantiles"][0]["name"], "cluster.local_app.upstream_rq_time");
        assert_eq!(histograms["supported_quantiles"].as_array().unwrap().len(), 10);
    }
}
