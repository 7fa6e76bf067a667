//! `lictor top`: what a sidecar does, looked at each second.

mod draw;
mod keys;
mod rows;
mod screen;

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::bail;
use clap::{CommandFactory as _, Parser};
use serde_json::json;
use tokio::sync::mpsc::{self, Sender};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::client::{Address, block_on};
use super::find::{Sidecar, Target};
use super::{Command, Done, Exit};
use crate::telemetry::escape_json;
use draw::View;
use keys::Key;
use screen::{Event, Screen};

pub(super) const COMMAND: Command = Command {
    words: "top",
    about: "What a sidecar does, live on the terminal",
    help: HELP,
    flags: Flags::command,
    run,
};

const HELP: &str = " [options]

  Shows each second what a sidecar does for its service and for each upstream:
  requests a second (connections, where the protocol is TCP), errors a second
  (5xx, or failed connects), latency since its start, endpoints that are up of
  those that are registered, denials, breakers and ejections; and what failed
  last and why.

  Arrows, or j and k, choose a row, whose endpoints or callers are shown below.
  q and Ctrl-C end it. With -json it prints an object each second, one a line,
  and needs no terminal:

    $ lictor top -service web -json -count 10

  Exits with 2 where -json ends while the sidecar does not answer.
";

/// Interval between two requests for the status.
const PERIOD: Duration = Duration::from_secs(1);

/// Capacity of the channel of events; readers wait when it is full.
const WAITING: usize = 16;

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
#[command(next_help_heading = "How long to look")]
struct Flags {
    /// End after so many looks. The default is 0: no end.
    #[arg(long, value_name = "number", default_value_t = 0)]
    count: u64,
    #[command(flatten)]
    target: Target,
}

fn run(arguments: Vec<String>) -> anyhow::Result<Done> {
    let Flags { count, target } = Flags::try_parse_from(arguments)?;
    let has_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if !target.json && !has_terminal {
        bail!("`lictor top` draws on a terminal, and this is none: -json prints the same as lines of JSON");
    }
    let sidecar = target.one()?;
    let exit = block_on(async {
        if target.json { Ok(print(sidecar, count).await) } else { show(sidecar, count).await.map(|()| Exit::Fine) }
    })??;
    Ok(Done::Shown(exit))
}

/// One object for each look, until nobody reads them.
async fn print(mut sidecar: Sidecar, count: u64) -> Exit {
    let (sender, mut events) = mpsc::channel(WAITING);
    tokio::spawn(look(sidecar.address.clone(), sender));
    let mut looks = 0;
    while let Some(Event::Answer(answer)) = events.recv().await {
        let (line, exit) = match answer {
            Ok(now) => {
                let before = std::mem::replace(&mut sidecar, now).status;
                (rows::json(&sidecar, Some(&before)), Exit::Fine)
            }
            Err(error) => (json!({ "error": format!("{error:#}") }), Exit::Unknown),
        };
        let mut out = io::stdout().lock();
        let is_read = writeln!(out, "{}", escape_json(&line.to_string())).and_then(|()| out.flush()).is_ok();
        looks += 1;
        if looks == count || !is_read {
            return exit;
        }
    }
    Exit::Unknown
}

/// Draws until somebody ends it.
async fn show(mut now: Sidecar, count: u64) -> anyhow::Result<()> {
    let (sender, mut events) = mpsc::channel(WAITING);
    tokio::spawn(screen::signalled(sender.clone())?);
    tokio::spawn(look(now.address.clone(), sender.clone()));
    let mut screen = Screen::open()?;
    screen::read_keys(sender);
    let (mut before, mut trouble, mut chosen, mut looks) = (None, None, 0, 0);
    loop {
        let view =
            View { sidecar: &now, before: before.as_ref(), chosen, trouble: trouble.as_deref().unwrap_or_default() };
        screen.draw(&view)?;
        match events.recv().await {
            Some(Event::Key(key)) => {
                let Some(row) = moved(key, chosen, rows::rows(None, &now.status).len()) else { return Ok(()) };
                chosen = row;
            }
            // It is drawn again.
            Some(Event::Resized) => {}
            Some(Event::Answer(answer)) => {
                match answer {
                    Ok(next) => {
                        before = Some(std::mem::replace(&mut now, next).status);
                        trouble = None;
                    }
                    Err(error) => trouble = Some(format!("{error:#}")),
                }
                looks += 1;
                if looks == count {
                    return Ok(());
                }
            }
            Some(Event::End) | None => return Ok(()),
        }
    }
}

/// Asks the sidecar each second, whether it answers or not.
async fn look(address: Address, events: Sender<Event>) {
    let mut ticks = interval_at(Instant::now() + PERIOD, PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if events.send(Event::Answer(Sidecar::fetch(address.clone()).await)).await.is_err() {
            return;
        }
    }
}

/// The chosen row after a key; `None` where the key ends it.
fn moved(key: Key, chosen: usize, rows: usize) -> Option<usize> {
    let last = rows.saturating_sub(1);
    let chosen = chosen.min(last);
    match key {
        Key::End => None,
        Key::Up => Some(chosen.saturating_sub(1)),
        Key::Down => Some((chosen + 1).min(last)),
        Key::First => Some(0),
        Key::Last => Some(last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_choose_within_the_rows_and_end() {
        for (key, chosen, rows, expected) in [
            (Key::Down, 0, 3, Some(1)),
            (Key::Down, 2, 3, Some(2)),
            (Key::Up, 2, 3, Some(1)),
            (Key::Up, 0, 3, Some(0)),
            // Rows have gone since.
            (Key::Up, 9, 3, Some(1)),
            (Key::Down, 0, 0, Some(0)),
            (Key::First, 2, 3, Some(0)),
            (Key::Last, 0, 3, Some(2)),
            (Key::End, 1, 3, None),
        ] {
            assert_eq!(moved(key, chosen, rows), expected, "{key:?} {chosen} of {rows}");
        }
    }
}
