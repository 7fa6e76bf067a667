//! `lictor status`: whether the sidecars of this host are well.

use clap::{CommandFactory as _, Parser};
use serde_json::json;

use super::find::Target;
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
";

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
struct Flags {
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { target } = Flags::try_parse_from(arguments)?;
    let found = target.all()?;
    let mut text = String::new();
    let mut exit = Exit::Fine;
    for sidecar in &found.sidecars {
        let state = sidecar.status["sidecar"]["state"].as_str().unwrap_or_default();
        if state != "LIVE" {
            exit = Exit::Wrong;
        }
        text.push_str(&format!("{} {}\n", sidecar.title(), escape(state)));
    }
    let json = json!(found.sidecars.iter().map(|sidecar| &sidecar.status).collect::<Vec<_>>());
    Ok(Report { text, json, exit }.shown(target.json))
}
