//! Whether an HTTP/1 client is gone that waits for an answer, so that nothing is done for it any more.
//!
//! A reset says so. An end of the client's direction says it too, or that the client sends no more and waits for its
//! answer (BusyBox wget does that). TCP tells the two apart when something is sent: who has closed replies with a
//! reset. So the first bytes of the answer, which are the same in each, are sent ahead.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::proxy::codec::messages::Awaits;
use crate::proxy::codec::wire::Wire;
use crate::proxy::outcome::{Fault, Outcome};

/// Looks after one connection.
#[derive(Default)]
pub(super) struct Departure {
    /// Since the client has ended its direction, with the timer of the next look.
    half: Option<Half>,
    /// Since more of a body was to come.
    taking: Option<Taking>,
}

struct Half {
    since: Instant,
    looks: u32,
    moved: u64,
    sleep: Pin<Box<Sleep>>,
}

impl Departure {
    /// Ready with the reason once the client is gone. To be asked after the codec has had its turn.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, wire: &Wire) -> Poll<Fault> {
        let awaits = wire.awaits();
        if awaits != Awaits::Taking {
            self.taking = None;
        }
        match awaits {
            Awaits::Answer | Awaits::Rest => {}
            Awaits::Taking => return self.taking.get_or_insert_with(Taking::new).poll(cx, wire),
            Awaits::Nothing => {
                self.half = None;
                return Poll::Pending;
            }
        }
        if let Err(error) = ready!(wire.poll_end(cx)) {
            return Poll::Ready(gone(&error));
        }
        let half = self.half.get_or_insert_with(|| Half {
            since: Instant::now(),
            looks: 0,
            moved: 0,
            sleep: Box::pin(sleep(LOOK_TIME)),
        });
        loop {
            ready!(half.sleep.as_mut().poll(cx));
            if let Err(gone) = half.look(cx, wire, awaits) {
                return Poll::Ready(gone);
            }
            half.sleep.as_mut().reset(Instant::now() + LOOK_TIME);
        }
    }
}

/// A client that sends a body. Where nobody takes that, nothing is read, and a reset not noticed. (An end would wait
/// behind what was not taken.)
struct Taking {
    moved: u64,
    sleep: Pin<Box<Sleep>>,
}

impl Taking {
    fn new() -> Self {
        Self { moved: 0, sleep: Box::pin(sleep(LOOK_TIME)) }
    }

    fn poll(&mut self, cx: &mut Context<'_>, wire: &Wire) -> Poll<Fault> {
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            self.sleep.as_mut().reset(Instant::now() + LOOK_TIME);
            let (moved, _) = wire.progress();
            let stands = std::mem::replace(&mut self.moved, moved) == moved;
            if let Some(error) = stands.then(|| wire.check().err()).flatten() {
                return Poll::Ready(gone(&error));
            }
        }
    }
}

impl Half {
    fn look(&mut self, cx: &mut Context<'_>, wire: &Wire, awaits: Awaits) -> Result<(), Fault> {
        self.looks += 1;
        // One byte after a quarter of a second, the next after one, two, four seconds and so on.
        let probes = awaits == Awaits::Answer
            && (self.looks == 1 || (self.looks / 4).is_power_of_two() && self.looks.is_multiple_of(4));
        let checked = if probes { wire.probe(cx).map(drop) } else { wire.check() };
        checked.map_err(|error| gone(&error))?;
        let (moved, _) = wire.progress();
        if std::mem::replace(&mut self.moved, moved) != moved {
            self.since = Instant::now();
        }
        let deadlines = if awaits == Awaits::Answer { ANSWER_TIME } else { REST_TIME };
        if self.since.elapsed() >= deadlines {
            let cause = format!("the client has ended its direction, and nothing has come for it for {deadlines:?}");
            return Err(Fault::new(Outcome::Idle, cause));
        }
        Ok(())
    }
}

fn gone(error: &io::Error) -> Fault {
    Fault::new(Outcome::ClientReset, format!("the client is gone: {error}"))
}

/// Interval between two checks of a client that has closed its direction.
const LOOK_TIME: Duration = Duration::from_millis(250);
/// Time for which such a client waits for the head of a response: Envoy's idle timeout of a stream.
const ANSWER_TIME: Duration = Duration::from_secs(300);
/// Time for which such a client waits for the next bytes of a response.
const REST_TIME: Duration = Duration::from_secs(30);
