//! Samples as statsd and dogstatsd packets.
//!
//! Names and values are those that Envoy 1.40 sends under Consul: `envoy.` and the name with dots for statsd; the name
//! without its label parts and tags with dots for dogstatsd. Several lines share a packet, and empty tags are left out,
//! neither of which Envoy does.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::group::{Sample, Value};
use super::prometheus::milliseconds;
use super::value::Times;

/// Longest packet in bytes: the payload of an Ethernet frame behind IPv6 and UDP headers.
pub const LONGEST: usize = 1_432;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Statsd,
    Dogstatsd,
}

/// Makes packets of what has changed since the last ones.
#[derive(Debug)]
pub struct Writer {
    dialect: Dialect,
    counters: HashMap<String, u64>,
    times: HashMap<String, Times>,
}

impl Writer {
    #[must_use]
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, counters: HashMap::new(), times: HashMap::new() }
    }

    /// The packets of one flush. Counters say what was added, gauges what is; of a histogram, each bucket that gained
    /// values sends its upper bound once, with the sample rate that stands for how many there were.
    pub fn packets(&mut self, samples: &[Sample], common: &[(String, String)]) -> Vec<String> {
        let mut packets = Packets::default();
        // What is not there any more is forgotten.
        let (counters, times_before) = (std::mem::take(&mut self.counters), std::mem::take(&mut self.times));
        for sample in samples {
            let key = sample.scope.dotted(sample.stat);
            let (name, tags) = self.name(sample, &key, common);
            match sample.value {
                Value::Counter(value) => {
                    let before = counters.get(&key).copied().unwrap_or(0);
                    self.counters.insert(key, value);
                    // One that starts anew, with its upstream, starts from zero.
                    let added = value.checked_sub(before).unwrap_or(value);
                    if value > 0 {
                        packets.push(&format!("{name}:{added}|c{tags}"));
                    }
                }
                Value::Gauge(value) => packets.push(&format!("{name}:{value}|g{tags}")),
                Value::Times(times) => {
                    let before = times_before.get(&key).copied().unwrap_or_default();
                    self.times.insert(key, times);
                    let added = times.since(&before);
                    let kind = if self.dialect == Dialect::Statsd { "ms" } else { "h" };
                    for line in values(&added) {
                        packets.push(&format!("{name}:{}|{kind}{}{tags}", line.0, line.1));
                    }
                }
            }
        }
        packets.done
    }

    fn name(&self, sample: &Sample, dotted: &str, common: &[(String, String)]) -> (String, String) {
        if self.dialect == Dialect::Statsd {
            // What stands in the way of the format cannot be in a service's name that Consul takes, but in others.
            return (format!("envoy.{}", sound(dotted)), String::new());
        }
        let (_, labels) = sample.scope.labelled(sample.stat);
        let name = format!("envoy.{}", sample.scope.without_labels(sample.stat));
        let labels = labels.iter().map(|(name, value)| (dotted_label(name), &**value));
        let common = common.iter().map(|(name, value)| (dotted_label(name), &**value));
        let tags: Vec<String> = common
            .chain(labels)
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("{name}:{}", sound(value)))
            .collect();
        (name, format!("|#{}", tags.join(",")))
    }
}

/// `consul_source_service` is `consul.source.service`, and `envoy_response_code_class` `envoy.response_code_class`.
fn dotted_label(name: &str) -> String {
    let name = name.replacen("envoy_", "envoy.", 1);
    ["consul_source_", "consul_upstream_", "consul_destination_"]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix).map(|rest| format!("{}{rest}", prefix.replace('_', "."))))
        .unwrap_or(name)
}

fn sound(text: &str) -> String {
    text.chars().map(|c| if matches!(c, ':' | '|' | '#' | ',' | '@') || c.is_control() { '_' } else { c }).collect()
}

/// Values in milliseconds and the rest of the line's type.
fn values(added: &Times) -> impl Iterator<Item = (String, String)> {
    let bounds = super::value::BOUNDS.iter().copied().chain([super::value::BOUNDS[super::value::BOUNDS.len() - 1]]);
    bounds.zip(added.buckets).filter(|(_, count)| *count > 0).map(|(bound, count)| {
        #[expect(clippy::cast_precision_loss)]
        let rate = if count == 1 { String::new() } else { format!("|@{}", 1.0 / count as f64) };
        (milliseconds(bound), rate)
    })
}

#[derive(Default)]
struct Packets {
    done: Vec<String>,
}

impl Packets {
    fn push(&mut self, line: &str) {
        match self.done.last_mut() {
            Some(packet) if packet.len() + 1 + line.len() <= LONGEST => {
                // A string takes whatever is written to it.
                let _ = write!(packet, "\n{line}");
            }
            _ => self.done.push(line.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stats::group::ClusterStats;
    use crate::stats::scope::Cluster;

    fn lines(writer: &mut Writer, cluster: &ClusterStats) -> Vec<String> {
        let mut samples = Vec::new();
        cluster.collect(&mut samples);
        let packets = writer.packets(&samples, &[("local_cluster".into(), "web".into()), ("env".into(), "lab".into())]);
        assert!(packets.iter().all(|packet| packet.len() <= LONGEST));
        packets.iter().flat_map(|packet| packet.lines()).map(str::to_owned).collect()
    }

    #[test]
    fn counters_send_what_was_added() {
        let cluster = ClusterStats::new(Cluster::LocalApp);
        let mut writer = Writer::new(Dialect::Statsd);
        assert!(lines(&mut writer, &cluster).iter().all(|line| line.ends_with("|g")));
        cluster.answered(200);
        cluster.answered(200);
        let first = lines(&mut writer, &cluster);
        assert!(first.contains(&"envoy.cluster.local_app.upstream_rq_2xx:2|c".to_owned()), "{first:?}");
        assert!(lines(&mut writer, &cluster).contains(&"envoy.cluster.local_app.upstream_rq_2xx:0|c".to_owned()));
    }

    #[test]
    fn histograms_send_values_with_their_number() {
        let cluster = ClusterStats::new(Cluster::LocalApp);
        let mut writer = Writer::new(Dialect::Statsd);
        cluster.answer_time.observe(Duration::from_millis(3));
        (0..4).for_each(|_| cluster.answer_time.observe(Duration::from_millis(40)));
        let sent = lines(&mut writer, &cluster);
        let times: Vec<_> = sent.iter().filter(|line| line.contains("rq_time")).collect();
        assert_eq!(
            times,
            ["envoy.cluster.local_app.upstream_rq_time:5|ms", "envoy.cluster.local_app.upstream_rq_time:50|ms|@0.25"]
        );
        assert!(!lines(&mut writer, &cluster).iter().any(|line| line.contains("rq_time")));
    }

    #[test]
    fn dogstatsd_has_tags() {
        let cluster = ClusterStats::new(Cluster::LocalApp);
        cluster.answered(503);
        let sent = lines(&mut Writer::new(Dialect::Dogstatsd), &cluster);
        let expected = "envoy.cluster.upstream_rq_xx:1|c|#local_cluster:web,env:lab,envoy.cluster_name:local_app,\
                        envoy.response_code_class:5";
        assert!(sent.contains(&expected.to_owned()), "{sent:?}");
    }
}
