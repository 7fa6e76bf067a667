//! The terminal: taken, drawn on, and given back as it was.

use std::future::Future;
use std::io::{self, Read as _, Stdout, stdin, stdout};
use std::sync::Once;
use std::thread;

use anyhow::Context as _;
use ratatui_core::terminal::Terminal;
use ratatui_crossterm::CrosstermBackend;
use ratatui_crossterm::crossterm::cursor::Show;
use ratatui_crossterm::crossterm::execute;
use ratatui_crossterm::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::Sender;

use super::draw::{View, draw};
use super::keys::{Key, Reader};
use crate::cli::find::Sidecar;

/// The events that the view handles.
pub(super) enum Event {
    Answer(anyhow::Result<Sidecar>),
    Key(Key),
    /// The terminal may be of another size.
    Resized,
    /// A signal, or no keys any more.
    End,
}

/// The terminal while it is ours; it is given back when this is dropped.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    _taken: Taken,
}

impl Screen {
    /// # Errors
    /// When the terminal can't be taken; it is as it was then.
    pub(super) fn open() -> anyhow::Result<Self> {
        let open = || {
            let taken = Taken::take()?;
            Ok(Self { terminal: Terminal::new(CrosstermBackend::new(stdout()))?, _taken: taken })
        };
        open().map_err(|error: io::Error| anyhow::anyhow!("can't draw on this terminal ({error}): -json needs none"))
    }

    /// # Errors
    /// When the terminal is gone.
    pub(super) fn draw(&mut self, view: &View<'_>) -> anyhow::Result<()> {
        self.terminal.draw(|frame| draw(frame.buffer_mut(), view)).context("can't draw on the terminal any more")?;
        Ok(())
    }
}

struct Taken;

impl Taken {
    fn take() -> io::Result<Self> {
        static ONCE: Once = Once::new();
        // A panic ends the program where it happens, without a drop.
        ONCE.call_once(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                give_back();
                hook(panic);
            }));
        });
        enable_raw_mode()?;
        let taken = Self;
        execute!(stdout(), EnterAlternateScreen)?;
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        give_back();
    }
}

/// Errors are ignored: a terminal that is gone has nothing to restore.
fn give_back() {
    let _ = disable_raw_mode();
    let _ = execute!(stdout(), LeaveAlternateScreen, Show);
}

/// Sends what is typed, from a thread that ends with the program. It waits for keys alone: crossterm's events wait for the
/// size as well, and of two that come at once they leave one until the next comes.
pub(super) fn read_keys(events: Sender<Event>) {
    thread::spawn(move || {
        let (mut reader, mut bytes) = (Reader::default(), [0; 64]);
        loop {
            let typed = match stdin().read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(length) => &bytes[..length],
            };
            for key in typed.iter().filter_map(|byte| reader.take(*byte)) {
                if events.blocking_send(Event::Key(key)).is_err() {
                    return;
                }
            }
        }
        let _ = events.blocking_send(Event::End);
    });
}

/// Sends each change of the size, and the end at the first signal that asks for it.
///
/// # Errors
/// When signals can't be waited for.
pub(super) fn signalled(events: Sender<Event>) -> anyhow::Result<impl Future<Output = ()>> {
    let wait = |kind| signal(kind).context("can't wait for signals");
    let (mut interrupt, mut terminate) = (wait(SignalKind::interrupt())?, wait(SignalKind::terminate())?);
    let (mut hang_up, mut resize) = (wait(SignalKind::hangup())?, wait(SignalKind::window_change())?);
    Ok(async move {
        loop {
            let event = tokio::select! {
                _ = interrupt.recv() => Event::End,
                _ = terminate.recv() => Event::End,
                _ = hang_up.recv() => Event::End,
                _ = resize.recv() => Event::Resized,
            };
            if events.send(event).await.is_err() {
                return;
            }
        }
    })
}
