//! `lictor intentions suggest`: the service-intentions that allow whom the sidecar has seen, and nobody else.
//!
//! Sources are distinguished by name, for connections and requests alike: paths are too many to be written down, and a list
//! of those that were seen would deny the next one.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use clap::{CommandFactory as _, Parser};
use serde_json::{Value, json};

use super::find::{Sidecar, Target};
use super::{Command, Done, Exit, Report};
use crate::telemetry::escape;

pub(super) const COMMAND: Command = Command {
    words: "intentions suggest",
    about: "Write the intentions that allow whom it has seen",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " [options]

  Writes the smallest service-intentions config entry that allows the callers of a
  sidecar's service that it has seen since its start and that are allowed now, and
  nobody else. It leads from allowing all, or audit mode, to denying by default.
  Read it before you write it. Consul 1.9 or later takes it:

    $ lictor intentions suggest -service db > db.hcl
    $ consul config write db.hcl

  Callers that audit mode let through stand in it as comments; -include-denied
  allows them. With -json the same is JSON, and the comments go to stderr. Each
  instance of a service sees its own callers: compare all of them.
";

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
#[command(next_help_heading = "Whom to allow")]
struct Flags {
    /// Allow those too that audit mode let through and intentions deny. The default is false.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false)]
    include_denied: bool,
    #[command(flatten)]
    target: Target,
}

/// The place of a caller in the suggested entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Allowed,
    /// Let through in audit mode.
    WouldDeny,
    Denied,
    /// By requests or tokens, which is not to be made less.
    Permissions,
    /// Those beyond what the sidecar counts one by one.
    Others,
}

#[derive(Debug, PartialEq, Eq)]
struct Caller {
    name: String,
    kind: Kind,
    /// Connections of a TCP service, requests of an HTTP service.
    seen: u64,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { include_denied, target } = Flags::try_parse_from(arguments)?;
    let sidecar = target.one()?;
    let entry = Entry::of(&sidecar, include_denied)?;
    if target.json {
        for note in entry.notes() {
            eprintln!("# {note}");
        }
    }
    Ok(Report { text: entry.hcl(), json: entry.json(), exit: Exit::Fine }.shown(target.json))
}

#[derive(Debug)]
struct Entry {
    service: String,
    /// Seconds.
    uptime: u64,
    callers: Vec<Caller>,
    include_denied: bool,
    /// Whether the entry itself has to deny sources that it does not name.
    deny_others: bool,
}

impl Entry {
    fn of(sidecar: &Sidecar, include_denied: bool) -> anyhow::Result<Self> {
        let title = sidecar.title();
        let inbound = sidecar.status["inbound"].as_array().and_then(|all| all.first());
        let inbound = inbound.with_context(|| format!("{title} has no public listener, so no service can call it"))?;
        let uptime = sidecar.status["sidecar"]["uptime"].as_u64().unwrap_or_default();
        let entry = Self::read(inbound, uptime, include_denied);
        if entry.callers.is_empty() {
            bail!(
                "nobody has called {title} in the {} that it runs: have its callers at work first",
                duration(entry.uptime)
            );
        }
        Ok(entry)
    }

    /// Reads an entry of `inbound` of `/status`.
    fn read(inbound: &Value, uptime: u64, include_denied: bool) -> Self {
        let rules = inbound["intentions"].as_array().map_or(&[][..], Vec::as_slice);
        let denies_by_default = inbound["default_action"] == "deny";
        let of = |caller: &Value| {
            let count = |name: &str| caller[name].as_u64().unwrap_or_default();
            let name = caller["service"].as_str().unwrap_or_default().to_owned();
            let seen = count("allowed") + count("denied") + count("would_deny");
            let kind = kind(&name, rules, denies_by_default, count("would_deny") > 0);
            (seen > 0).then_some(Caller { name, kind, seen })
        };
        let callers = inbound["callers"].as_array().into_iter().flatten().filter_map(of).collect();
        // An intention for all destinations allows what no source of the entry matches.
        let allows_elsewhere = rules.iter().any(|rule| rule["destination"] == "*" && rule["action"] != "deny");
        Self {
            service: inbound["service"].as_str().unwrap_or_default().to_owned(),
            uptime,
            callers,
            include_denied,
            deny_others: !denies_by_default || allows_elsewhere,
        }
    }

    fn allows(&self, caller: &Caller) -> bool {
        caller.kind == Kind::Allowed || self.include_denied && caller.kind == Kind::WouldDeny
    }

    fn json(&self) -> Value {
        let allowed = self.callers.iter().filter(|caller| self.allows(caller));
        let mut sources: Vec<Value> = allowed.map(|caller| json!({ "Name": caller.name, "Action": "allow" })).collect();
        if self.deny_others {
            sources.push(json!({ "Name": "*", "Action": "deny" }));
        }
        json!({ "Kind": "service-intentions", "Name": self.service, "Sources": sources })
    }

    /// Remarks about the entry, each a sentence.
    fn notes(&self) -> Vec<String> {
        let mut notes = vec![format!(
            "service-intentions of {}, from the callers that its sidecar saw in {}. Who calls less often is missing.",
            quoted(&self.service),
            duration(self.uptime)
        )];
        notes.extend(self.callers.iter().filter(|caller| !self.allows(caller)).map(Caller::note));
        notes
    }

    fn hcl(&self) -> String {
        let mut text = String::new();
        // A string takes whatever is written to it.
        let _ = writeln!(text, "# {}", self.notes()[0]);
        text.push_str("# It replaces the present entry of this name. Read it, then: consul config write FILE\n");
        let _ = writeln!(text, "Kind = \"service-intentions\"\nName = {}\nSources = [", quoted(&self.service));
        for caller in &self.callers {
            let allowed = self.allows(caller);
            let _ = writeln!(text, "  # {}", if allowed { caller.seen_note() } else { caller.note() });
            let block = source(&caller.name, "allow");
            if allowed {
                text.push_str(&block);
            } else if caller.kind == Kind::WouldDeny {
                text.extend(block.lines().map(|line| format!("  # {}\n", line.strip_prefix("  ").unwrap_or(line))));
            }
        }
        if self.deny_others {
            text.push_str("  # Everybody else.\n");
            text.push_str(&source("*", "deny"));
        }
        text.push_str("]\n");
        text
    }
}

impl Caller {
    fn seen_note(&self) -> String {
        let word = if self.kind == Kind::WouldDeny { "Would be denied by the present intentions; s" } else { "S" };
        format!("{word}een {} times.", self.seen)
    }

    /// Why it is not allowed.
    fn note(&self) -> String {
        let (name, seen) = (quoted(&self.name), self.seen);
        match self.kind {
            Kind::Allowed => self.seen_note(),
            Kind::WouldDeny => format!(
                "{name} was seen {seen} times, and would be denied: audit mode let it through. -include-denied allows it."
            ),
            Kind::Denied => format!("{name} was seen {seen} times, and is denied. Add it by hand if it should not be."),
            Kind::Permissions => format!(
                "{name} was seen {seen} times, and has permissions for requests, or needs a token: copy its source from \
                 `consul config read -kind service-intentions`, as a plain allow would allow it more."
            ),
            Kind::Others => format!(
                "More services called than the sidecar counts one by one; the others called {seen} times and are missing."
            ),
        }
    }
}

/// The decision of the present intentions about a caller: the first one that names it, or all, decides.
fn kind(name: &str, rules: &[Value], denies_by_default: bool, was_let_through: bool) -> Kind {
    if name == "(others)" {
        return Kind::Others;
    }
    let rule = rules.iter().find(|rule| rule["source"] == name || rule["source"] == "*");
    let denied = match rule {
        Some(rule) if rule["permissions"] == true => return Kind::Permissions,
        Some(rule) => rule["action"] == "deny",
        None => denies_by_default,
    };
    match (denied, was_let_through) {
        (false, _) => Kind::Allowed,
        (true, true) => Kind::WouldDeny,
        (true, false) => Kind::Denied,
    }
}

fn source(name: &str, action: &str) -> String {
    format!("  {{\n    Name   = {}\n    Action = \"{action}\"\n  }},\n", quoted(name))
}

/// As a string of HCL and JSON, which ends no comment and is harmless on a terminal.
fn quoted(text: &str) -> String {
    escape(&Value::from(text).to_string()).into_owned()
}

fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbound(default: &str, intentions: &Value) -> Value {
        let caller = |name: &str, allowed, denied, would_deny| json!({ "service": name, "allowed": allowed, "denied": denied, "would_deny": would_deny });
        json!({
            "service": "db", "default_action": default, "intentions": intentions,
            "callers": [
                caller("api", 3, 0, 1), caller("batch", 0, 0, 2), caller("idle", 0, 0, 0), caller("spy\n", 0, 4, 0), caller("web", 5, 0, 0),
            ],
        })
    }

    fn rule(source: &str, destination: &str, action: &str) -> Value {
        json!({ "source": source, "destination": destination, "action": action, "permissions": action.ends_with("permissions") })
    }

    #[test]
    fn who_is_allowed_is_named_and_nobody_else() {
        let rules = json!([rule("web", "db", "allow"), rule("api", "db", "2 permissions")]);
        let entry = Entry::read(&inbound("deny", &rules), 60, false);
        assert_eq!(
            entry.json(),
            json!({ "Kind": "service-intentions", "Name": "db", "Sources": [{ "Name": "web", "Action": "allow" }] })
        );
        let included = Entry::read(&inbound("deny", &rules), 60, true);
        assert_eq!(included.json()["Sources"][0], json!({ "Name": "batch", "Action": "allow" }));
        let hcl = entry.hcl();
        for part in [
            "    Name   = \"web\"\n    Action = \"allow\"\n",
            "  #   Name   = \"batch\"\n",
            "# \"spy\\n\" was seen 4 times, and is denied.",
            "# \"api\" was seen 4 times, and has permissions",
        ] {
            assert!(hcl.contains(part), "{part}\n{hcl}");
        }
        assert!(!hcl.contains("idle") && !hcl.contains("\"*\""), "{hcl}");
        assert!(included.hcl().contains("    Name   = \"batch\"\n"));
    }

    #[test]
    fn where_anything_else_would_let_others_in_they_are_denied() {
        let all = json!({ "Name": "*", "Action": "deny" });
        let last = |default: &str, rules: Value| {
            let entry = Entry::read(&inbound(default, &rules), 1, false).json();
            entry["Sources"].as_array().unwrap().last().cloned()
        };
        assert_eq!(last("allow", json!([])), Some(all.clone()));
        assert_eq!(last("deny", json!([rule("*", "*", "allow")])), Some(all.clone()));
        assert_ne!(last("deny", json!([rule("web", "db", "allow")])), Some(all));
    }
}
