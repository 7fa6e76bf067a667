//! `lictor status`: whether the sidecars of this host are well.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clap::{CommandFactory as _, Parser};
use serde_json::{Value, json};

use super::find::{Sidecar, Target};
use super::view::{count, list, number, of, period, text};
use super::{Command, Done, Exit, Report};
use crate::telemetry::escape;

pub(super) const COMMAND: Command = Command {
    words: "status",
    about: "Whether the sidecars of this host are well",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " [options]

  Shows what the sidecars of this host do: whether they are ready, how long their
  certificates last, who calls them, whom they call, and what failed last and why.

  Exits with 1 where one is not ready, or its certificate has expired.
";

/// Problems that are shown, the newest ones; `-json` has all.
const PROBLEMS: usize = 5;

/// Callers that are shown; `-json` has all.
const CALLERS: usize = 10;

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
struct Flags {
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { target } = Flags::try_parse_from(arguments)?;
    let found = target.all()?;
    let (mut lines, mut sidecars, mut exit) = (String::new(), Vec::new(), Exit::Fine);
    for sidecar in &found.sidecars {
        let wrong = faults(&sidecar.status);
        show(&mut lines, sidecar, &wrong);
        if !wrong.is_empty() {
            exit = Exit::Wrong;
        }
        let mut status = sidecar.status.clone();
        status["address"] = json!(sidecar.address.to_string());
        status["wrong"] = json!(wrong);
        sidecars.push(status);
    }
    for fault in &found.faults {
        let _ = writeln!(lines, "{}", escape(fault));
    }
    let json = json!({ "sidecars": sidecars, "not_asked": found.faults });
    Ok(Report { text: lines, json, exit }.shown(target.json))
}

/// The faults of a sidecar, each a sentence.
pub(super) fn faults(status: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    match status["sidecar"]["state"].as_str() {
        Some("LIVE") => {}
        Some("INITIALIZING") => faults.push(
            "not ready: the configuration from the agent is not complete; the log of the sidecar names what is missing"
                .to_owned(),
        ),
        Some("DRAINING") => {
            faults.push("not ready: it drains, or its health check was set to fail (/healthcheck/fail)".to_owned())
        }
        state => faults.push(format!("not ready: its state is {}", state.unwrap_or("not known"))),
    }
    if seconds_left(status).is_some_and(|left| left <= 0.0) {
        faults.push(
            "its certificate has expired: check that the agent is reachable and can sign; see the log of the sidecar"
                .to_owned(),
        );
    }
    faults
}

/// Of the certificate; `None` without one.
pub(super) fn seconds_left(status: &Value) -> Option<f64> {
    Some(status["certificate"]["not_after"].as_f64()? - number(&status["time"]) / 1000.0)
}

fn show(lines: &mut String, sidecar: &Sidecar, wrong: &[String]) {
    let status = &sidecar.status;
    let about = &status["sidecar"];
    let state = if wrong.is_empty() { "ready" } else { "NOT WELL" };
    let _ = writeln!(lines, "{}: {state}, up {}", sidecar.title(), period(number(&about["uptime"])));
    for fault in wrong {
        let _ = writeln!(lines, "  {fault}");
    }
    if let Some(left) = seconds_left(status) {
        let _ =
            writeln!(lines, "  certificate {}, {:.1} days left", text(&status["certificate"]["uri"]), left / 86_400.0);
    }
    for inbound in list(&status["inbound"]) {
        show_inbound(lines, inbound);
    }
    for outbound in list(&status["outbound"]) {
        show_outbound(lines, outbound);
    }
    show_problems(lines, status);
}

fn show_inbound(lines: &mut String, inbound: &Value) {
    let _ = writeln!(
        lines,
        "  inbound at {} ({}): {}, {} allowed, {} denied; default policy: {}",
        text(&inbound["bind"]),
        text(&inbound["protocol"]),
        traffic(inbound),
        count(&inbound["allowed"]),
        count(&inbound["denied"]),
        text(&inbound["default"]),
    );
    if inbound["audit"] == true {
        let _ = writeln!(
            lines,
            "    AUDIT MODE IS ON: {} that intentions deny were let through",
            count(&inbound["would_deny"])
        );
    }
    let callers = list(&inbound["callers"]);
    for caller in callers.iter().take(CALLERS) {
        let (allowed, denied) = (count(&caller["allowed"]), count(&caller["denied"]));
        let audited = count(&caller["would_deny"]);
        let audited = if audited == 0 { String::new() } else { format!(", {audited} would be denied") };
        let _ = writeln!(lines, "    from {}: {allowed} allowed, {denied} denied{audited}", text(&caller["service"]));
    }
    if callers.len() > CALLERS {
        let _ = writeln!(lines, "    and {} callers more (-json shows all)", callers.len() - CALLERS);
    }
}

fn show_outbound(lines: &mut String, outbound: &Value) {
    let _ = writeln!(
        lines,
        "  upstream {} at {} ({}): {}",
        text(&outbound["name"]),
        text(&outbound["bind"]),
        text(&outbound["protocol"]),
        traffic(outbound),
    );
    if outbound["waits_for_agent"] == true {
        lines.push_str("    no discovery chain received yet\n");
    }
    for target in list(&outbound["targets"]) {
        let (states, failures) = (states(target), count(&target["connect_failures"]));
        let failures = if failures == 0 { String::new() } else { format!("; {failures} connects failed") };
        let overflows = count(&target["overflows"]);
        let overflows = if overflows == 0 { String::new() } else { format!("; {overflows} refused by a limit") };
        let _ = writeln!(lines, "    {}: {states}{failures}{overflows}", text(&target["id"]));
    }
}

/// `2 of 3 endpoints up, 1 ejected`.
pub(super) fn states(target: &Value) -> String {
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for endpoint in list(&target["endpoints"]) {
        *states.entry(of(&endpoint["state"])).or_default() += 1;
    }
    let up = states.remove("healthy").unwrap_or_default();
    let others = states.iter().map(|(state, count)| format!(", {count} {}", escape(state))).collect::<String>();
    format!("{up} of {} endpoints up{others}", count(&target["registered"]))
}

/// Requests where there are any to count, else connections.
fn traffic(listener: &Value) -> String {
    let open = count(&listener["connections_active"]);
    if listener["http"] != true {
        return format!("{} connections, {open} open", count(&listener["connections"]));
    }
    let latency = match (listener["p50_ms"].as_f64(), listener["p99_ms"].as_f64()) {
        (Some(p50), Some(p99)) => format!(" (p50 {p50:.1} ms, p99 {p99:.1} ms)"),
        _ => String::new(),
    };
    format!("{} requests{latency}, {} errors (5xx)", count(&listener["requests"]), count(&listener["classes"][4]))
}

fn show_problems(lines: &mut String, status: &Value) {
    let problems = list(&status["problems"]);
    for problem in problems.iter().take(PROBLEMS) {
        let ago = period((number(&status["time"]) - number(&problem["time"])) / 1000.0);
        let what = problem["what"].as_str().map_or_else(String::new, |what| format!(", {}", escape(what)));
        let _ = writeln!(
            lines,
            "  {ago} ago, {} {}: {} from {}{what}: {}",
            text(&problem["direction"]),
            text(&problem["listener"]),
            text(&problem["reason"]),
            text(&problem["who"]),
            text(&problem["cause"]),
        );
        let _ = writeln!(lines, "    do: {}", text(&problem["remedy"]));
    }
    if problems.len() > PROBLEMS {
        let _ = writeln!(lines, "  and {} problems before (-json shows all)", problems.len() - PROBLEMS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client::Address;

    fn status() -> Value {
        json!({
            "time": 1_000_000_000,
            "sidecar": { "service": "web", "state": "LIVE", "uptime": 7300 },
            "certificate": { "uri": "spiffe://td/svc/web", "not_after": 1_000_000.0 + 2.5 * 86_400.0 },
            "inbound": [{
                "bind": "0.0.0.0:1", "protocol": "http", "http": true, "requests": 7, "classes": [0, 5, 0, 1, 1],
                "p50_ms": 1.25, "p99_ms": 8.0, "allowed": 6, "denied": 1, "default": "default policy (allow)",
                "audit": true, "would_deny": 2,
                "callers": [{ "service": "a\u{1b}pi", "allowed": 6, "denied": 1, "would_deny": 2 }],
            }],
            "outbound": [{
                "name": "db", "bind": "127.0.0.1:2", "protocol": "tcp", "http": false, "connections": 3, "connections_active": 1,
                "waits_for_agent": false,
                "targets": [{
                    "id": "db.x", "registered": 3, "connect_failures": 2, "overflows": 0,
                    "endpoints": [{ "state": "healthy" }, { "state": "ejected" }],
                }],
            }],
            "problems": [{
                "time": 999_996_000, "direction": "inbound", "listener": "web", "reason": "Denied", "who": "api",
                "what": "GET /x", "cause": "intention api => web (deny, precedence 9)", "remedy": "allow it",
            }],
        })
    }

    fn shown(status: Value) -> String {
        let sidecar = Sidecar { address: Address::Tcp("127.0.0.1".into(), 19000), status };
        let mut lines = String::new();
        show(&mut lines, &sidecar, &faults(&sidecar.status));
        lines
    }

    #[test]
    fn the_text_answers_what_people_ask() {
        let expected = "\
web (127.0.0.1:19000): ready, up 2 h
  certificate spiffe://td/svc/web, 2.5 days left
  inbound at 0.0.0.0:1 (http): 7 requests (p50 1.2 ms, p99 8.0 ms), 1 errors (5xx), 6 allowed, 1 denied; default policy: default policy (allow)
    AUDIT MODE IS ON: 2 that intentions deny were let through
    from a\\u{1b}pi: 6 allowed, 1 denied, 2 would be denied
  upstream db at 127.0.0.1:2 (tcp): 3 connections, 1 open
    db.x: 1 of 3 endpoints up, 1 ejected; 2 connects failed
  4 s ago, inbound web: Denied from api, GET /x: intention api => web (deny, precedence 9)
    do: allow it
";
        assert_eq!(shown(status()), expected);
    }

    #[test]
    fn what_is_wrong_is_a_sentence() {
        let mut expired = status();
        expired["certificate"]["not_after"] = json!(999_999.0);
        assert!(shown(expired).contains("NOT WELL, up 2 h\n  its certificate has expired"));
        for (state, expected) in [
            ("INITIALIZING", "the configuration from the agent is not complete"),
            ("DRAINING", "it drains"),
            ("x", "its state is x"),
        ] {
            let mut other = status();
            other["sidecar"]["state"] = json!(state);
            assert!(faults(&other)[0].contains(expected), "{state}");
        }
        assert_eq!(faults(&json!({})), ["not ready: its state is not known"]);
    }
}
