//! Deadlines of one request.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::proxy::codec::replay_body::{BodyProgress, Progress};
use crate::proxy::outcome::{Fault, Outcome};

/// Deadlines of one request: the whole request, a single try, and idle. One timer serves all three. The upload decides
/// from when on the first two count.
///
/// As in Envoy, the time for the response begins when the request is complete: an upload may take as long as it
/// goes on. What bounds one that does not is the idle time.
pub(crate) struct Deadlines {
    sleep: Option<Pin<Box<Sleep>>>,
    whole: Option<Limit>,
    one_try: Option<Limit>,
    idle: Option<Duration>,
    moved: Instant,
    upload: Option<BodyProgress>,
    /// The upload was complete when the timer was set last.
    complete: bool,
}

/// A time that counts from an instant, or from when the request is complete if that is later.
#[derive(Debug, Clone, Copy)]
struct Limit {
    start: Instant,
    time: Duration,
}

impl Limit {
    /// `None` while it does not count: more of the request is coming. What nobody has asked for yet is no upload that
    /// goes on: a connection is being made for it.
    fn end(self, upload: Option<Progress>) -> Option<Instant> {
        // A time too long to be counted is no limit.
        match upload {
            None | Some(Progress::NotRequested) => self.start.checked_add(self.time),
            Some(Progress::Coming) => None,
            Some(Progress::Complete(at)) => self.start.max(at).checked_add(self.time),
        }
    }
}

impl Deadlines {
    /// `None` is no limit.
    #[must_use]
    pub(crate) fn new(whole: Option<Duration>, idle: Option<Duration>, upload: Option<&BodyProgress>) -> Self {
        let now = Instant::now();
        let whole = whole.map(|time| Limit { start: now, time });
        let mut deadlines =
            Self { sleep: None, whole, one_try: None, idle, moved: now, upload: upload.cloned(), complete: false };
        deadlines.wake_at(deadlines.next());
        deadlines
    }

    /// For how long nothing may move.
    pub(crate) fn idle(&self) -> Option<Duration> {
        self.idle
    }

    /// Begins the time of one try, or ends it.
    pub(crate) fn try_for(&mut self, time: Option<Duration>) {
        self.one_try = time.map(|time| Limit { start: Instant::now(), time });
        if self.one_try.is_some() {
            self.wake_at(self.next());
        }
    }

    /// Something of the response came, or was taken: the idle time begins anew.
    pub(crate) fn progress(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

    /// When the next deadline is, as far as is known now.
    fn next(&self) -> Option<Instant> {
        let [whole, one_try] = self.ends();
        whole.into_iter().chain(one_try).chain(self.idle_end()).min()
    }

    fn ends(&self) -> [Option<Instant>; 2] {
        let upload = self.upload.as_ref().map(BodyProgress::progress);
        [self.whole, self.one_try].map(|limit| limit.and_then(|limit| limit.end(upload)))
    }

    fn idle_end(&self) -> Option<Instant> {
        let moved =
            self.upload.as_ref().and_then(BodyProgress::last_progress).map_or(self.moved, |m| m.max(self.moved));
        self.idle.and_then(|idle| moved.checked_add(idle))
    }

    fn wake_at(&mut self, next: Option<Instant>) {
        match (next, &mut self.sleep) {
            (Some(next), Some(sleep)) => sleep.as_mut().reset(next),
            (Some(next), none) => *none = Some(Box::pin(sleep_until(next))),
            (None, _) => self.sleep = None,
        }
    }

    /// Runs `act` until the first deadline.
    ///
    /// # Errors
    /// The deadline that passed, or that the upload broke off.
    pub(crate) async fn run_until<F: Future>(&mut self, act: F) -> Result<F::Output, TimedOut> {
        let mut act = pin!(act);
        poll_fn(|cx| match act.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Ok(done)),
            Poll::Pending => self.poll_expired(cx).map(Err),
        })
        .await
    }

    /// Ready once a deadline has passed.
    pub(crate) fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<TimedOut> {
        if let Some(upload) = &self.upload {
            if upload.poll_broken(cx).is_ready() {
                return Poll::Ready(TimedOut::Upload);
            }
            if !self.complete && upload.is_whole() {
                self.complete = true;
                self.wake_at(self.next());
            }
        }
        while let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(cx));
            let (now, [whole, one_try]) = (Instant::now(), self.ends());
            let over = |end: Option<Instant>| end.is_some_and(|end| end <= now);
            if over(whole) {
                return Poll::Ready(TimedOut::Whole);
            }
            if over(one_try) {
                return Poll::Ready(TimedOut::Try);
            }
            if over(self.idle_end()) {
                let whole = self.upload.as_ref().is_none_or(BodyProgress::is_whole);
                return Poll::Ready(if whole { TimedOut::Idle } else { TimedOut::IdleUpload });
            }
            self.wake_at(self.next());
        }
        Poll::Pending
    }
}

/// Why an exchange is not waited for any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimedOut {
    /// The time for the whole exchange.
    Whole,
    /// The time for one try.
    Try,
    /// The time in which nothing moved, after the request had come whole.
    Idle,
    /// The same, while more of the request's body was to come.
    IdleUpload,
    /// The client's body broke off.
    Upload,
}

impl From<TimedOut> for Fault {
    fn from(expired: TimedOut) -> Self {
        match expired {
            TimedOut::Whole => Self::new(Outcome::Timeout, "no whole answer within the request timeout"),
            TimedOut::Try => Self::new(Outcome::TryTimeout, "no answer within lictor_per_try_timeout_ms"),
            TimedOut::Idle => Self::new(Outcome::Idle, "nothing moved for the idle timeout"),
            TimedOut::IdleUpload => {
                Self::new(Outcome::IdleUpload, "nothing more of the request came for the idle timeout")
            }
            TimedOut::Upload => Self::new(Outcome::BadRequest, "the request's body broke off"),
        }
    }
}

impl fmt::Display for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole => "the time for the whole response is over",
            Self::Try => "the time for one try is over",
            Self::Idle | Self::IdleUpload => "nothing moved for the idle time",
            Self::Upload => "the request's body broke off",
        })
    }
}
