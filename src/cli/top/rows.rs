//! Rates of each listener of a sidecar, between two of its statuses (`/status`). Missing figures are left out.

use serde_json::{Value, json};

use crate::cli::find::Sidecar;
use crate::cli::view::{count, list, number, of};
use crate::stats::value::Times;

/// Problems in each JSON object, the newest ones.
const PROBLEMS: usize = 10;

/// A listener: the public one, or that of an upstream.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) now: &'a Value,
    pub(super) is_inbound: bool,
    /// Itself before, and how many seconds ago that was.
    before: Option<(&'a Value, f64)>,
}

/// The public listener, then the upstreams, as the status has them.
pub(super) fn rows<'a>(before: Option<&'a Value>, now: &'a Value) -> Vec<Row<'a>> {
    let seconds = before.map_or(0.0, |before| (number(&now["time"]) - number(&before["time"])) / 1000.0);
    let before = before.filter(|_| seconds > 0.0);
    let all = ["inbound", "outbound"].into_iter().flat_map(|direction| {
        let known = before.map_or(&[][..], |before| list(&before[direction]));
        list(&now[direction]).iter().map(move |listener| {
            let before = known.iter().find(|known| key(known) == key(listener));
            Row { now: listener, is_inbound: direction == "inbound", before: before.map(|before| (before, seconds)) }
        })
    });
    all.collect()
}

fn key(listener: &Value) -> (&Value, &Value) {
    (&listener["key"], &listener["bind"])
}

impl Row<'_> {
    pub(super) fn name(&self) -> &str {
        of(&self.now[if self.is_inbound { "service" } else { "name" }])
    }

    fn is_http(&self) -> bool {
        self.now["http"] == true
    }

    /// Requests a second; connections, where requests are not looked into.
    pub(super) fn rate(&self) -> Option<f64> {
        let counter = if self.is_http() { "requests" } else { "connections" };
        self.per_second(|listener| count(&listener[counter]))
    }

    /// Answers 5xx a second; for TCP, connects to endpoints that failed or were refused by a limit.
    pub(super) fn errors(&self) -> Option<f64> {
        match (self.is_http(), self.is_inbound) {
            (true, _) => self.per_second(|listener| count(&listener["classes"][4])),
            (false, true) => None,
            (false, false) => self.per_second(|listener| {
                let failed = |target: &Value| count(&target["connect_failures"]) + count(&target["overflows"]);
                list(&listener["targets"]).iter().map(failed).sum()
            }),
        }
    }

    fn denials(&self) -> Option<f64> {
        self.per_second(|listener| count(&listener["denied"]))
    }

    /// Only the public listener denies.
    pub(super) fn denied(&self) -> Option<u64> {
        self.is_inbound.then(|| count(&self.now["denied"]))
    }

    /// Usable ones, and registered ones, of all targets.
    pub(super) fn endpoints(&self) -> Option<(usize, u64)> {
        let registered = self.targets().iter().map(|target| count(&target["registered"])).sum();
        (!self.is_inbound).then(|| (self.endpoints_that_are("healthy"), registered))
    }

    pub(super) fn targets(&self) -> &[Value] {
        list(&self.now["targets"])
    }

    /// Its state in a word or two: a limit that is reached, ejections, audit mode.
    pub(super) fn state(&self) -> String {
        let is_full = |target: &&Value| limits(target).next().is_some() || target["retries_refused"] == true;
        let (ejected, unreachable) = (self.endpoints_that_are("ejected"), self.endpoints_that_are("unreachable"));
        if self.now["audit"] == true {
            "audit".to_owned()
        } else if self.now["waits_for_agent"] == true {
            "waits".to_owned()
        } else if self.targets().iter().any(|target| is_full(&target)) {
            "limit".to_owned()
        } else if ejected > 0 {
            format!("{ejected} ejected")
        } else if unreachable > 0 {
            format!("{unreachable} down")
        } else {
            "ok".to_owned()
        }
    }

    fn endpoints_that_are(&self, state: &str) -> usize {
        let endpoints = self.targets().iter().flat_map(|target| list(&target["endpoints"]));
        endpoints.filter(|endpoint| endpoint["state"] == state).count()
    }

    /// `None` without a time before, and where the count began anew.
    fn per_second(&self, counter: impl Fn(&Value) -> u64) -> Option<f64> {
        let (before, seconds) = self.before?;
        let more = counter(self.now).checked_sub(counter(before))?;
        #[expect(clippy::cast_precision_loss, reason = "what comes in seconds is far below 2^53")]
        let more = more as f64;
        Some(more / seconds)
    }

    /// Milliseconds that so large a share of the requests took at most, since the status before; since the start of the
    /// sidecar, where there is none before.
    pub(super) fn latency(&self, share: f64) -> Option<f64> {
        let now = times(self.now)?;
        let between = self.before.map_or(Some(now), |(before, _)| {
            let before = times(before)?;
            // Its sidecar may have started again.
            (before.buckets.iter().zip(now.buckets).all(|(before, now)| *before <= now)).then(|| now.since(&before))
        })?;
        between.quantile(share).map(|micros| micros / 1000.0)
    }

    fn json(&self) -> Value {
        let active = if self.is_http() { "requests_active" } else { "connections_active" };
        let endpoints = self.endpoints().map(|(usable, registered)| {
            json!({
                "usable": usable,
                "registered": registered,
                "ejected": self.endpoints_that_are("ejected"),
                "unreachable": self.endpoints_that_are("unreachable"),
            })
        });
        let limits: Vec<_> = self.targets().iter().flat_map(limits).map(|(limit, _)| limit).collect();
        json!({
            "direction": if self.is_inbound { "inbound" } else { "outbound" },
            "name": self.name(),
            "protocol": self.now["protocol"],
            "counts": if self.is_http() { "requests" } else { "connections" },
            "per_second": rounded(self.rate()),
            "errors_per_second": rounded(self.errors()),
            "active": self.now[active],
            "p50_ms": rounded(self.latency(0.5)),
            "p99_ms": rounded(self.latency(0.99)),
            "endpoints": endpoints,
            "limits_reached": limits,
            "denied": self.denied(),
            "denied_per_second": rounded(self.denials().filter(|_| self.is_inbound)),
            "state": self.state(),
        })
    }
}

/// The limits of a target that are reached: the breaker of each is open.
pub(super) fn limits(target: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let all = target["limits"].as_object().into_iter().flatten();
    all.filter(|(_, limit)| limit["open"] == true).map(|(name, limit)| (name.as_str(), limit))
}

/// How long the requests of a listener took.
fn times(listener: &Value) -> Option<Times> {
    Times::of(&list(&listener["times"]).iter().map(count).collect::<Vec<_>>())
}

/// To thousandths.
fn rounded(rate: Option<f64>) -> Option<f64> {
    rate.map(|rate| (rate * 1000.0).round() / 1000.0)
}

/// One look at a sidecar.
pub(super) fn json(sidecar: &Sidecar, before: Option<&Value>) -> Value {
    let now = &sidecar.status;
    let problems = list(&now["problems"]);
    json!({
        "time": now["time"],
        "service": sidecar.name(),
        "address": sidecar.address.to_string(),
        "sidecar": now["sidecar"]["state"],
        "rows": rows(before, now).iter().map(Row::json).collect::<Vec<_>>(),
        "problems": &problems[..problems.len().min(PROBLEMS)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(time: u64, requests: u64, failures: u64) -> Value {
        json!({
            "time": time,
            "inbound": [{ "service": "web", "bind": "a:1", "http": true, "requests": requests, "classes": [0, 0, 0, 0, failures], "denied": failures }],
            "outbound": [{
                "name": "db", "key": "db", "bind": "a:2", "http": false, "connections": requests,
                "targets": [{
                    "registered": 4, "connect_failures": failures, "overflows": failures, "limits": { "requests": { "open": false } },
                    "endpoints": [{ "state": "healthy" }, { "state": "ejected" }, { "state": "unreachable" }],
                }],
            }],
        })
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let (before, now) = (status(1000, 10, 1), status(3000, 50, 2));
        let rows = rows(Some(&before), &now);
        let shown: Vec<_> = rows.iter().map(|row| (row.name(), row.rate(), row.errors(), row.denials())).collect();
        assert_eq!(shown[0], ("web", Some(20.0), Some(0.5), Some(0.5)));
        assert_eq!(shown[1], ("db", Some(20.0), Some(1.0), Some(0.0)));
        assert_eq!((rows[1].endpoints(), rows[1].state().as_str()), (Some((1, 4)), "1 ejected"));
        assert_eq!((rows[0].endpoints(), rows[0].denied(), rows[1].denied()), (None, Some(2), None));
    }

    #[test]
    fn no_rate_is_told_where_none_is_known() {
        let (early, late) = (status(1000, 10, 0), status(2000, 20, 0));
        let rate = |before: Option<&Value>, now: &Value| rows(before, now)[1].rate();
        assert_eq!(rate(None, &late), None);
        // The sidecar was started again, or its clock was set.
        assert_eq!(rate(Some(&status(0, 99, 0)), &late), None);
        assert_eq!(rate(Some(&late), &early), None);
        let mut moved = early;
        moved["outbound"][0]["bind"] = json!("a:3");
        assert_eq!(rate(Some(&moved), &late), None);
    }

    #[test]
    fn latencies_are_of_the_time_between() {
        let with = |time, fast: u64, slow: u64| {
            let mut status = status(time, 0, 0);
            let mut times = [0; 20];
            (times[1], times[5]) = (fast, slow);
            status["inbound"][0]["times"] = json!(times);
            status
        };
        let (before, now) = (with(1000, 1000, 0), with(2000, 1001, 9));
        let latency = |before: Option<&Value>, now: &Value| rows(before, now)[0].latency(0.5);
        // Between 25 and 50 ms, where nearly all before took less than one.
        assert!((25.0..=50.0).contains(&latency(Some(&before), &now).unwrap()));
        assert!((0.5..=1.0).contains(&latency(None, &now).unwrap()));
        // Nothing was asked in between; the sidecar was started again; it does not say.
        assert_eq!(latency(Some(&before), &with(2000, 1000, 0)), None);
        assert_eq!(latency(Some(&before), &with(2000, 999, 9)), None);
        assert_eq!(latency(Some(&before), &status(2000, 0, 0)), None);
    }

    #[test]
    fn what_holds_an_upstream_up_is_its_state() {
        let state = |change: &dyn Fn(&mut Value)| {
            let mut status = status(0, 0, 0);
            change(&mut status["outbound"][0]);
            rows(None, &status)[1].state()
        };
        assert_eq!(state(&|row| row["waits_for_agent"] = json!(true)), "waits");
        assert_eq!(state(&|row| row["targets"][0]["limits"]["requests"]["open"] = json!(true)), "limit");
        assert_eq!(state(&|row| row["targets"][0]["endpoints"][1] = json!({})), "1 down");
        assert_eq!(state(&|row| row["targets"] = json!([])), "ok");
    }

    #[test]
    fn the_object_tells_what_the_view_shows() {
        let address = crate::cli::client::Address::Tcp("127.0.0.1".into(), 1);
        let sidecar = Sidecar { address, status: status(2000, 20, 0) };
        let object = json(&sidecar, Some(&status(1000, 10, 0)));
        assert_eq!(object["rows"][1]["per_second"], 10.0);
        assert_eq!(
            object["rows"][1]["endpoints"],
            json!({ "usable": 1, "registered": 4, "ejected": 1, "unreachable": 1 })
        );
        assert_eq!(object["rows"][0]["endpoints"], Value::Null);
        let empty = Sidecar { address: sidecar.address, status: json!({}) };
        assert_eq!(json(&empty, None)["rows"], json!([]));
    }
}
