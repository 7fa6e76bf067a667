//! `lictor doctor`: what keeps a sidecar of this host from working, and what to do about it.

use std::fmt::Write as _;

use clap::{CommandFactory as _, Parser};
use serde_json::json;

use super::client::block_on;
use super::find::{Sidecar, Target};
use super::{Command, Done, Exit, Report};
use crate::config::{self, AgentFlags, Mode, ModeFlags};
use crate::doctor::{self, Check, Level, Running, Subject};
use crate::telemetry::escape;

pub(super) const COMMAND: Command = Command {
    words: "doctor",
    about: "What keeps a sidecar from working, and what to do",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " [options]

  Asks the agent each question that a sidecar asks, once, and looks at clocks,
  certificates, ports, the local app and the instances of the upstreams. One line
  for each: ok, warn or FAIL, what was found, and what to do next. With
  -sidecar-for or -proxy-id for that sidecar, else for those that run on the host.
  The flags and variables are those of `lictor connect proxy`. No token is shown.

    $ lictor doctor -sidecar-for web

  Exits with 1 where a line says FAIL.
";

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
struct Flags {
    #[command(flatten)]
    mode: ModeFlags,
    #[command(flatten)]
    agent: AgentFlags,
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { mode, agent, target } = Flags::try_parse_from(arguments)?;
    let json = target.json;
    let settings = config::agent_of(mode, agent, |name| std::env::var_os(name))?;
    // That none runs is a finding, and not the end.
    let running: Vec<Running> = match target.all() {
        Ok(found) => found.sidecars.into_iter().map(running).collect(),
        Err(error) if target.is_chosen() => return Err(error),
        Err(_) => Vec::new(),
    };
    let subject = settings.mode.map(|mode| match mode {
        Mode::ProxyId(id) => Subject::ProxyId(id),
        Mode::SidecarFor(id) => Subject::SidecarFor(id),
        Mode::AdHoc(ad_hoc) => Subject::Either(ad_hoc.service),
    });
    let checks = block_on(doctor::examine(&settings.agent, subject, &running))??;
    Ok(report(&settings.warnings, &checks).shown(json))
}

fn running(sidecar: Sidecar) -> Running {
    Running { address: sidecar.address.to_string(), status: sidecar.status }
}

fn report(warnings: &[String], checks: &[Check]) -> Report {
    let mut text = String::new();
    for warning in warnings {
        // A string takes whatever is written to it.
        let _ = writeln!(text, "warn  {}", escape(warning));
    }
    for check in checks {
        let _ = writeln!(text, "{}", escape(&check.to_string()));
    }
    let rows = checks.iter().map(|check| {
        json!({
            "level": check.level.word(),
            "sidecar": check.about,
            "name": check.name,
            "found": check.found,
            "next": check.next,
        })
    });
    let exit = if checks.iter().any(|check| check.level == Level::Fail) { Exit::Wrong } else { Exit::Fine };
    let json = json!({ "checks": rows.collect::<Vec<_>>(), "warnings": warnings });
    Report { text, json, exit }
}
