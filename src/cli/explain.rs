//! `lictor explain`: where a request to an upstream goes, and what decides it.

use clap::{CommandFactory as _, Parser};
use serde_json::Value;

use super::client::url;
use super::find::{Sidecar, Target};
use super::request::RequestArgs;
use super::{Command, Done, Exit, Report};
use crate::admin::Explanation;

pub(super) const COMMAND: Command = Command {
    words: "explain",
    about: "Where a request to an upstream goes, and why",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " -upstream <name> [METHOD] [PATH] [options]

  Shows the way of a request from the app to the instances of an upstream: through
  router, splitter, resolver and balancer, with the config entry that decided each
  step, the timeouts and where each comes from. It sends nothing.

    $ lictor explain -upstream invoice GET /v2/list -H 'x-beta: 1'

  Exits with 1 where no route matches, or no instance can be used.
";

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
#[command(next_help_heading = "What to explain")]
struct Flags {
    /// Name of the upstream, as in the registration. It may be left out where there is one alone.
    #[arg(long, value_name = "name")]
    upstream: Option<String>,
    #[command(flatten)]
    request: RequestArgs,
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { upstream, request, target } = Flags::try_parse_from(arguments)?;
    let upstream = upstream.filter(|name| !name.is_empty());
    let has = |sidecar: &Sidecar| upstream.as_ref().is_none_or(|name| upstreams(sidecar).any(|known| known == name));
    let sidecar = target.one_that(has)?;
    let upstream = match &upstream {
        Some(name) => name.as_str(),
        None => only_upstream(&sidecar)?,
    };
    let (method, path) = request.line()?.unwrap_or_else(|| ("GET".to_owned(), "/".to_owned()));
    let headers = request.headers();
    let query =
        [("format", "json"), ("upstream", upstream), ("method", &method), ("path", &path), ("header", &headers)];
    let json = sidecar.get(&url("/explain", &query))?.json()?;
    let explanation: Explanation = serde_json::from_value(json.clone())?;
    let exit = if explanation.fault.is_none() { Exit::Fine } else { Exit::Wrong };
    Ok(Report { text: format!("sidecar {}\n{explanation}", sidecar.title()), json, exit }.shown(target.json))
}

/// Each by its name, and by the key that distinguishes upstreams of one service.
fn upstreams(sidecar: &Sidecar) -> impl Iterator<Item = &str> {
    let all = sidecar.status["outbound"].as_array().into_iter().flatten();
    all.flat_map(|upstream| [&upstream["name"], &upstream["key"]]).filter_map(Value::as_str)
}

fn only_upstream(sidecar: &Sidecar) -> anyhow::Result<&str> {
    let names = || sidecar.status["outbound"].as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
    match (names().next(), names().nth(1)) {
        (Some(name), None) => Ok(name),
        (None, _) => anyhow::bail!("the sidecar {} has no upstream", sidecar.title()),
        _ => {
            let all: Vec<&str> = names().collect();
            anyhow::bail!("choose one by -upstream; there are: {}", all.join(", "))
        }
    }
}
