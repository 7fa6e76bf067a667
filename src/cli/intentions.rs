//! `lictor intentions check`: whether a source may reach the service of a sidecar, and by which rule.

use std::fmt::Write as _;

use clap::{CommandFactory as _, Parser};
use serde_json::Value;

use super::client::url;
use super::find::Target;
use super::request::RequestArgs;
use super::view::count;
use super::{Command, Done, Exit, Report};
use crate::telemetry::escape;

pub(super) const CHECK: Command = Command {
    words: "intentions check",
    about: "Whether a service may call this one, and by which rule",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " -from <source> [METHOD] [PATH] [options]

  Asks the sidecar of the service that is called whether the source may reach it,
  and names the rule that decides: intention, permission, or the default policy.
  The sidecar decides by the code that decides when a connection or request comes.

    $ lictor intentions check -service db -from web
    $ lictor intentions check -service db -from web PUT /admin -H 'x-team: red'

  Exits with 1 where it is denied, and with 2 where it depends on the request and
  none is given.
";

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
#[command(next_help_heading = "What to check")]
struct Flags {
    /// The service that calls: web, namespace/web, partition/namespace/web, or its whole identity (spiffe://...).
    #[arg(long, value_name = "source")]
    from: Option<String>,
    #[command(flatten)]
    request: RequestArgs,
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { from, request, target } = Flags::try_parse_from(arguments)?;
    let Some(from) = from.filter(|from| !from.is_empty()) else {
        anyhow::bail!("the calling service is missing: `lictor intentions check -from web`");
    };
    let line = request.line()?;
    let sidecar = target.one()?;
    let (method, path) = line.as_ref().map_or(("", ""), |(method, path)| (method, path));
    let headers = request.headers();
    let query = [("from", from.as_str()), ("method", method), ("path", path), ("header", &headers)];
    let json = sidecar.get(&url("/intentions/check", &query))?.json()?;
    let exit = match json["allowed"].as_bool() {
        Some(true) => Exit::Fine,
        Some(false) => Exit::Wrong,
        None => Exit::Unknown,
    };
    Ok(Report { text: text(&json, line.is_some()), json, exit }.shown(target.json))
}

fn text(answer: &Value, has_request: bool) -> String {
    let of = |value: &Value| escape(value.as_str().unwrap_or_default()).into_owned();
    let word = match answer["allowed"].as_bool() {
        Some(true) => "allowed",
        Some(false) => "denied",
        None => "depends on the request",
    };
    let request = answer["request"].as_str().map_or_else(String::new, |request| format!(" {}", escape(request)));
    let mut text = format!("{} => {}{request}: {word}\n", of(&answer["source"]), of(&answer["destination"]));
    // A string takes whatever is written to it.
    let _ = writeln!(text, "  {}", of(&answer["why"]));
    let rule = &answer["rule"];
    let permission = &rule["permission"];
    if permission.is_object() {
        let (number, conditions) = (count(&permission["number"]), of(&permission["conditions"]));
        let _ = writeln!(text, "  permission {number} is for: {conditions}");
    }
    for (what, required) in
        [("the intention", &rule["intention"]["token_of"]), ("the permission", &permission["token_of"])]
    {
        let names: Vec<String> = required.as_array().into_iter().flatten().map(of).collect();
        if !names.is_empty() {
            let _ = writeln!(text, "  {what} requires a token of {}", names.join(" or "));
        }
    }
    for token in answer["tokens"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  token of {}: {}", of(&token["provider"]), of(&token["fault"]));
    }
    if answer["audit"] == true && answer["allowed"] == false {
        text.push_str("  audit mode is on: the request is let through and counted as \"would be denied\"\n");
    }
    if has_request && answer["protocol"] == "tcp" {
        text.push_str("  the protocol is tcp: requests are not looked into\n");
    }
    if answer["allowed"].is_null() {
        text.push_str("  give a request: a method and a path, and the headers that the rules look at\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_text_names_the_rule() {
        let answer = json!({
            "source": "web", "destination": "db", "protocol": "http", "request": "GET /x", "allowed": false,
            "why": "denied by permission 2 (deny) of intention web => db (permissions, precedence 9)",
            "rule": {
                "kind": "permission", "intention": { "token_of": ["okta"] },
                "permission": { "number": 2, "conditions": "path begins with \"/x\"", "token_of": null },
            },
            "audit": true, "tokens": [{ "provider": "okta", "fault": "there is no \u{1b}token" }],
        });
        let expected = "\
web => db GET /x: denied
  denied by permission 2 (deny) of intention web => db (permissions, precedence 9)
  permission 2 is for: path begins with \"/x\"
  the intention requires a token of okta
  token of okta: there is no \\u{1b}token
  audit mode is on: the request is let through and counted as \"would be denied\"
";
        assert_eq!(text(&answer, true), expected);
        let unknown = json!({ "source": "web", "destination": "db", "protocol": "http", "allowed": null, "why": "w" });
        assert!(text(&unknown, false).starts_with("web => db: depends on the request\n  w\n  give a request"));
    }
}
