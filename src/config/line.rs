//! How flags are written, for all commands.
//!
//! Consul is a Go program, and people's unit files hold what Go's `flag` package reads: `-x v`, `-x=v` and the same
//! with two dashes, values that begin with a dash, and booleans that take a value by `=` alone.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use clap::builder::ValueParser;
use clap::{Arg, Command};

use super::values;

/// Splits `-name` or `-name=value`; `None` when it is no flag at all.
///
/// # Errors
/// When there is no name.
pub(crate) fn split(argument: &str) -> anyhow::Result<Option<(&str, Option<&str>)>> {
    let Some(flag) = argument.strip_prefix('-').filter(|rest| !rest.is_empty()) else { return Ok(None) };
    let flag = flag.strip_prefix('-').unwrap_or(flag);
    if flag.is_empty() || flag.starts_with(['-', '=']) {
        bail!("bad flag syntax: {argument}");
    }
    Ok(Some(flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)))))
}

pub(crate) fn is_switch(flag: &Arg) -> bool {
    flag.get_value_parser().type_id() == ValueParser::bool().type_id()
}

/// The value of a switch, which is true without one.
///
/// # Errors
/// When it is no boolean, with what to write.
pub(crate) fn switch(name: &str, value: Option<&str>) -> anyhow::Result<bool> {
    let Some(value) = value else { return Ok(true) };
    values::boolean(value)
        .with_context(|| format!("invalid boolean value {value:?} for -{name}: write -{name}=true or -{name}=false"))
}

/// The sentence about a flag that a command does not know, with the nearest of those that it knows.
pub(crate) fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>, command: &str) -> anyhow::Error {
    let nearest = known.map(|known| (distance(name, known), known)).min();
    match nearest {
        Some((steps, known)) if steps <= 1 + name.len() / 4 => {
            anyhow::anyhow!("flag provided but not defined: -{name} (did you mean -{known}?)")
        }
        _ => anyhow::anyhow!("flag provided but not defined: -{name} (`{command} -help` lists the flags)"),
    }
}

/// Adds what a command's flags are, by their headings, with the variable that stands in for each.
pub(crate) fn list(text: &mut String, command: &Command, variable_of: fn(&str) -> Option<&'static str>) {
    let mut group = None;
    for flag in command.get_arguments().filter(|argument| !argument.is_positional()) {
        let heading = flag.get_help_heading();
        if heading != group {
            // A string takes whatever is written to it.
            let _ = writeln!(text, "\n{}\n", heading.unwrap_or_default());
            group = heading;
        }
        let name = flag.get_long().unwrap_or_default();
        let short = flag.get_short().map(|short| format!("-{short}, ")).unwrap_or_default();
        let value = flag.get_value_names().and_then(<[_]>::first).filter(|_| !is_switch(flag));
        let _ = writeln!(text, "  {short}-{name}{}", value.map(|value| format!("=<{value}>")).unwrap_or_default());
        let about = flag.get_help().map(ToString::to_string).unwrap_or_default();
        let variable = variable_of(name).map(|variable| format!(" [{variable}]")).unwrap_or_default();
        wrap(text, &format!("{}.{variable}", about.trim_end_matches('.')));
    }
}

/// Levenshtein's distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let best = (diagonal + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

/// Adds a paragraph, indented by five and at most 80 wide.
fn wrap(text: &mut String, paragraph: &str) {
    let mut width = 0;
    for word in paragraph.split_whitespace() {
        if width == 0 || width + 1 + word.len() > 80 {
            text.push_str(if width == 0 { "     " } else { "\n     " });
            width = 5;
        } else {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += word.len();
    }
    text.push('\n');
}
