//! The answer of `/explain`: JSON for programs, and text for people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::telemetry::escape;

/// The way of a request, or of a connection, from the app to the instances of an upstream.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    pub upstream: String,
    /// The address that the app connects to.
    pub bind: String,
    pub protocol: Setting,
    /// `GET /path`; `None` where the protocol is TCP, of which nothing is looked into.
    pub request: Option<String>,
    /// From the app on, up to where the ways part.
    pub steps: Vec<Step>,
    pub settings: Vec<(String, Setting)>,
    /// The destinations; each request draws one by its share.
    pub ways: Vec<Way>,
    /// The newest that went wrong with this upstream, newest first.
    pub problems: Vec<Recent>,
    /// Why it leads nowhere, or a part of the requests does.
    pub fault: Option<String>,
}

/// A value, and what says so: a config entry, the upstream's own config, or a default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Setting {
    pub value: String,
    pub from: String,
}

/// A decision, and the config entry that made it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Step {
    /// `router`, `splitter` or `resolver`.
    pub at: String,
    pub says: String,
    pub from: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Way {
    /// Percent of the requests.
    pub share: f64,
    pub resolver: Step,
    pub balancer: Setting,
    /// The one that is meant, then those to fail over to.
    pub targets: Vec<TargetNow>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TargetNow {
    pub id: String,
    pub service: String,
    pub datacenter: String,
    pub connect_timeout: Setting,
    /// Instances in the catalog, those that fail their checks included.
    pub registered: usize,
    pub endpoints: Vec<EndpointNow>,
}

/// An instance that passes its checks.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointNow {
    pub address: String,
    /// `healthy`, `unreachable`, `ejected` or `probed`.
    pub state: String,
    pub weight: u32,
    pub in_flight: u32,
    /// That answers take of late.
    pub latency_ms: Option<f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Recent {
    pub reason: String,
    pub cause: String,
    pub remedy: String,
    pub seconds_ago: u64,
}

impl EndpointNow {
    /// Whether requests and connections are given to it as things are.
    #[must_use]
    pub fn is_used(&self) -> bool {
        matches!(self.state.as_str(), "healthy" | "probed")
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", escape(&self.value), escape(&self.from))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", escape(&self.at), escape(&self.says), escape(&self.from))
    }
}

/// Lines of text. What comes from elsewhere is escaped.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "upstream {} at {}", escape(&self.upstream), escape(&self.bind))?;
        if !self.protocol.value.is_empty() {
            writeln!(f, "  protocol {}", self.protocol)?;
        }
        if let Some(request) = &self.request {
            writeln!(f, "request {}", escape(request))?;
        }
        for step in &self.steps {
            writeln!(f, "  {step}")?;
        }
        for (name, setting) in &self.settings {
            writeln!(f, "  {} {setting}", escape(name))?;
        }
        for way in &self.ways {
            if self.ways.len() > 1 {
                writeln!(f, "  {:.2} % of the requests", way.share)?;
            }
            write!(f, "{way}")?;
        }
        for Recent { reason, cause, seconds_ago, .. } in &self.problems {
            writeln!(f, "  {seconds_ago} s ago: {}: {}", escape(reason), escape(cause))?;
        }
        match &self.fault {
            Some(fault) => writeln!(f, "=> {}", escape(fault)),
            None => writeln!(f, "=> it leads to instances that are used"),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}", self.resolver)?;
        writeln!(f, "  balancer: {}", self.balancer)?;
        for (place, target) in self.targets.iter().enumerate() {
            let role = if place == 0 { "target" } else { "failover" };
            let (id, timeout) = (escape(&target.id), &target.connect_timeout);
            writeln!(f, "  {role} {id}, connect timeout {timeout}")?;
            if target.endpoints.is_empty() {
                writeln!(f, "    no usable instance of {} registered", target.registered)?;
            }
            for EndpointNow { address, state, weight, in_flight, latency_ms } in &target.endpoints {
                let latency = latency_ms.map_or_else(String::new, |latency| format!(", {latency:.1} ms"));
                let (address, state) = (escape(address), escape(state));
                writeln!(f, "    {address} {state}, weight {weight}, {in_flight} in flight{latency}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(value: &str, from: &str) -> Setting {
        Setting { value: value.into(), from: from.into() }
    }

    #[test]
    fn the_text_names_what_decided_and_is_harmless() {
        let endpoint =
            EndpointNow { address: "1.2.3.4:5".into(), state: "healthy".into(), weight: 1, ..Default::default() };
        let way = |share, endpoints| Way {
            share,
            resolver: Step {
                at: "resolver".into(),
                says: "service \"db\" in dc1".into(),
                from: "no service-resolver/db".into(),
            },
            balancer: setting("least of two", "default"),
            targets: vec![TargetNow {
                id: "db.x".into(),
                connect_timeout: setting("5s", "default"),
                registered: 3,
                endpoints,
                ..Default::default()
            }],
        };
        let explanation = Explanation {
            upstream: "d\u{1b}b".into(),
            bind: "127.0.0.1:1".into(),
            protocol: setting("http", "service-defaults/db"),
            request: Some("GET /x".into()),
            steps: vec![Step {
                at: "router".into(),
                says: "route 1 of 2".into(),
                from: "service-router/db, route 1".into(),
            }],
            settings: vec![("request timeout".into(), setting("3s", "service-router/db, route 1"))],
            ways: vec![way(75.0, vec![endpoint]), way(25.0, Vec::new())],
            problems: vec![Recent {
                reason: "NoInstance".into(),
                cause: "why".into(),
                seconds_ago: 4,
                ..Default::default()
            }],
            fault: Some("25.00 % of the requests lead to no usable instance".into()),
        };
        let expected = "\
upstream d\\u{1b}b at 127.0.0.1:1
  protocol http (service-defaults/db)
request GET /x
  router: route 1 of 2 (service-router/db, route 1)
  request timeout 3s (service-router/db, route 1)
  75.00 % of the requests
  resolver: service \"db\" in dc1 (no service-resolver/db)
  balancer: least of two (default)
  target db.x, connect timeout 5s (default)
    1.2.3.4:5 healthy, weight 1, 0 in flight
  25.00 % of the requests
  resolver: service \"db\" in dc1 (no service-resolver/db)
  balancer: least of two (default)
  target db.x, connect timeout 5s (default)
    no usable instance of 3 registered
  4 s ago: NoInstance: why
=> 25.00 % of the requests lead to no usable instance
";
        assert_eq!(explanation.to_string(), expected);
        let read: Explanation = serde_json::from_value(serde_json::to_value(&explanation).unwrap()).unwrap();
        assert_eq!(read, explanation);
    }
}
