//! Reads the arguments of a command, written as all flags of the program are (`config/line.rs`).

use anyhow::Context as _;

use super::Command;
use crate::config;
use crate::config::line::{self, is_switch, split, switch};

/// A parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Help,
    /// As clap reads them: flags as `--name=value`, then the words.
    Arguments(Vec<String>),
}

/// Flags may stand before, between and behind the words; all behind `--` are words.
///
/// # Errors
/// When there is no such flag, or its value is missing.
pub(super) fn read(command: &Command, arguments: &[&str]) -> anyhow::Result<Line> {
    let (name_of_command, command) = (command.words, (command.flags)());
    let (mut flags, mut words) = (Vec::new(), Vec::new());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if *argument == "--" {
            words.extend(rest.by_ref().map(|word| (*word).to_owned()));
            break;
        }
        let Some((name, inline)) = split(argument)? else {
            words.push((*argument).to_owned());
            continue;
        };
        if matches!(name, "h" | "help") {
            return Ok(Line::Help);
        }
        let is_short = |flag: &clap::Arg| flag.get_short().is_some_and(|short| name.chars().eq([short]));
        let known = command.get_arguments().find(|flag| flag.get_long() == Some(name) || is_short(flag));
        let Some((known, long)) = known.and_then(|flag| Some((flag, flag.get_long()?))) else {
            let names = command.get_arguments().filter_map(clap::Arg::get_long);
            return Err(line::unknown(name, names, &format!("lictor {name_of_command}")));
        };
        let value = if is_switch(known) {
            switch(name, inline)?.to_string()
        } else {
            let value = inline.or_else(|| rest.next().copied());
            value.with_context(|| format!("flag needs an argument: -{name}"))?.to_owned()
        };
        flags.push(format!("--{long}={value}"));
    }
    if !words.is_empty() && !command.get_arguments().any(clap::Arg::is_positional) {
        anyhow::bail!("`lictor {name_of_command}` takes flags alone: remove {:?}", words[0]);
    }
    flags.push("--".to_owned());
    flags.extend(words);
    Ok(Line::Arguments(flags))
}

/// The text of `lictor COMMAND -help`.
pub(super) fn help(command: &Command) -> String {
    let mut text = format!("Usage: lictor {}", command.words);
    text.push_str(command.help);
    line::list(&mut text, &(command.flags)(), variable_of);
    text.push_str(EXIT_CODES);
    text
}

fn variable_of(flag: &str) -> Option<&'static str> {
    if flag == "admin" { Some("LICTOR_ADMIN") } else { config::variable_of(flag) }
}

const EXIT_CODES: &str = "
Exit codes

  0  all is well, or allowed
  1  something is wrong, or denied
  2  not known: no sidecar answered, or the command line is wrong
";

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;
    use crate::cli::find::Target;

    #[derive(Debug, Parser)]
    #[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
    struct Flags {
        #[command(flatten)]
        target: Target,
        #[arg(long, short = 'H')]
        header: Vec<String>,
        words: Vec<String>,
    }

    const COMMAND: Command =
        Command { words: "look", about: "", help: "", flags: Flags::command, run: |_| anyhow::bail!("not run") };

    fn flags(line: &str) -> Flags {
        match read(&COMMAND, &line.split(' ').collect::<Vec<_>>()).unwrap() {
            Line::Arguments(arguments) => Flags::try_parse_from(arguments).unwrap(),
            Line::Help => panic!("{line}"),
        }
    }

    #[test]
    fn flags_stand_anywhere_with_one_dash_or_two() {
        for line in
            ["GET /x -admin 1 -json -H a:b", "--admin=1 GET --json /x -header=a:b", "-admin 1 -json=1 -H=a:b -- GET /x"]
        {
            let flags = flags(line);
            assert_eq!((flags.target.admin.as_deref(), flags.target.json), (Some("1"), true), "{line}");
            assert_eq!((flags.words.join(" ").as_str(), flags.header.join(" ").as_str()), ("GET /x", "a:b"), "{line}");
        }
        assert_eq!(flags("-H a -H -b").header, ["a", "-b"]);
    }

    #[test]
    fn wrong_lines_are_told_in_a_sentence() {
        for (line, expected) in [
            ("-jsn", "did you mean -json?"),
            ("-admin", "flag needs an argument: -admin"),
            ("-json=maybe", "invalid boolean value"),
            ("-frobnicate", "`lictor look -help` lists the flags"),
        ] {
            let error = read(&COMMAND, &[line]).expect_err(line).to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(read(&COMMAND, &["x", "-h"]).unwrap(), Line::Help);
    }
}
