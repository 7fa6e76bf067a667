//! Commands that ask a running sidecar, by its admin server.
//!
//! Each command is a file and a line in [`COMMANDS`]: it reads its flags, asks, and gives a [`Report`], which holds the
//! text and the JSON of its answer, and how it exits. Whatever comes from elsewhere goes through
//! `telemetry::escape` before it reaches a terminal.

mod client;
mod doctor;
mod explain;
mod find;
mod flags;
mod intentions;
mod request;
mod status;
mod suggest;
mod top;
mod view;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;

use serde_json::Value;

use crate::telemetry::{escape, escape_json};

/// In the order of their help.
const COMMANDS: &[Command] =
    &[status::COMMAND, top::COMMAND, explain::COMMAND, intentions::CHECK, suggest::COMMAND, doctor::COMMAND];

/// How to read and run one command.
pub(crate) struct Command {
    /// As it is typed: `intentions check`.
    words: &'static str,
    /// For the list of commands.
    about: &'static str,
    /// What stands above the flags, with examples: lines of 80 at most.
    help: &'static str,
    flags: fn() -> clap::Command,
    /// Gets the arguments as `flags` reads them.
    run: fn(Vec<String>) -> anyhow::Result<Done>,
}

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0
    Fine,
    /// 1: something is wrong, or denied.
    Wrong,
    /// 2: not known, or the command line is wrong.
    Unknown,
}

/// The result of a command.
#[derive(Debug)]
pub(crate) struct Report {
    /// Lines, without terminal escapes but those of the command's own.
    pub(crate) text: String,
    pub(crate) json: Value,
    pub(crate) exit: Exit,
}

/// The output that is left to print when a command has run.
#[derive(Debug)]
pub(crate) enum Done {
    Text(Report),
    Json(Report),
    /// Everything was shown.
    Shown(Exit),
}

impl Report {
    /// To be shown as text, or as JSON.
    pub(crate) fn shown(self, json: bool) -> Done {
        if json { Done::Json(self) } else { Done::Text(self) }
    }
}

/// Runs the command that the arguments name (without the program's name); `None` when it is none of ours.
#[must_use]
pub fn run(arguments: &[OsString]) -> Option<ExitCode> {
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str().unwrap_or("\u{fffd}")).collect();
    let (command, rest) = match find(&words) {
        Some(found) => found,
        None => return family(&words).map(|text| fail(&text, Exit::Unknown)),
    };
    let done = match flags::read(command, rest) {
        Ok(flags::Line::Help) => {
            print(&flags::help(command));
            return Some(ExitCode::SUCCESS);
        }
        Ok(flags::Line::Arguments(arguments)) => (command.run)(arguments),
        Err(error) => Err(error),
    };
    Some(match done {
        Ok(Done::Text(report)) => {
            print(&report.text);
            report.exit.into()
        }
        Ok(Done::Json(report)) => {
            print(&escape_json(&format!("{:#}\n", report.json)));
            report.exit.into()
        }
        Ok(Done::Shown(exit)) => exit.into(),
        Err(error) => fail(&format!("{error:#}"), Exit::Unknown),
    })
}

/// One line for each command, for the program's help.
#[must_use]
pub fn list() -> String {
    COMMANDS.iter().map(|command| format!("  {:<20} {}\n", command.words, command.about)).collect()
}

fn find<'a>(words: &'a [&'a str]) -> Option<(&'static Command, &'a [&'a str])> {
    COMMANDS.iter().find_map(|command| {
        let length = command.words.split(' ').count();
        let is_named = words.len() >= length && command.words.split(' ').eq(words[..length].iter().copied());
        is_named.then(|| (command, &words[length..]))
    })
}

/// The sentence about the first word of longer commands alone.
fn family(words: &[&str]) -> Option<String> {
    let first = words.first()?;
    let members = COMMANDS
        .iter()
        .map(|command| command.words)
        .filter(|known| known.split_once(' ').is_some_and(|(head, _)| head == *first));
    let members: Vec<String> = members.map(|known| format!("`lictor {known}`")).collect();
    (!members.is_empty()).then(|| format!("`{first}` alone is no command: there is {}", members.join(" and ")))
}

fn fail(sentence: &str, exit: Exit) -> ExitCode {
    let _ = io::stderr().write_all(format!("==> {}\n", escape(sentence)).as_bytes());
    exit.into()
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Fine => 0,
            Exit::Wrong => 1,
            Exit::Unknown => 2,
        })
    }
}

/// Nobody may be reading any more, which is no reason to panic.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_is_there_once_and_helps_within_the_width() {
        for command in COMMANDS {
            let words: Vec<&str> = command.words.split(' ').collect();
            assert_eq!(find(&words).map(|(found, rest)| (found.words, rest.len())), Some((command.words, 0)));
            (command.flags)().debug_assert();
            let help = flags::help(command);
            assert!(help.starts_with(&format!("Usage: lictor {}", command.words)), "{help}");
            assert!(help.contains("Exit codes") && help.lines().all(|line| line.len() <= 82), "{help}");
            assert!(list().contains(command.about) && list().lines().all(|line| line.len() <= 80));
        }
        assert!(find(&["connect", "proxy"]).is_none() && find(&[]).is_none());
    }
}
