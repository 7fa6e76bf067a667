//! For how long an exchange is waited for.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::proxy::codec::upload::UploadState;

/// The patience with one exchange: one timer for all of its limits, and an eye on its upload.
pub struct Patience {
    sleep: Option<Pin<Box<Sleep>>>,
    whole: Option<Instant>,
    one_try: Option<Instant>,
    idle: Option<Duration>,
    moved: Instant,
    upload: Option<UploadState>,
}

impl Patience {
    /// `None` is no limit.
    #[must_use]
    pub fn new(whole: Option<Duration>, idle: Option<Duration>, upload: Option<&UploadState>) -> Self {
        let now = Instant::now();
        // A time too long to be counted is no limit.
        let whole = whole.and_then(|whole| now.checked_add(whole));
        let first = whole.into_iter().chain(idle.and_then(|idle| now.checked_add(idle))).min();
        let sleep = first.map(|first| Box::pin(sleep_until(first)));
        Self { sleep, whole, one_try: None, idle, moved: now, upload: upload.cloned() }
    }

    /// Begins the time of one try, or ends it.
    pub fn try_for(&mut self, time: Option<Duration>) {
        self.one_try = time.and_then(|time| Instant::now().checked_add(time));
        if let Some(end) = self.one_try {
            match &mut self.sleep {
                Some(sleep) if sleep.deadline() > end => sleep.as_mut().reset(end),
                Some(_) => {}
                none => *none = Some(Box::pin(sleep_until(end))),
            }
        }
    }

    /// Something of the response came: the idle time begins anew.
    pub fn moved(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

    /// Waits for `act` as long as there is patience.
    ///
    /// # Errors
    /// Why there is none any more.
    pub async fn within<F: Future>(&mut self, act: F) -> Result<F::Output, Expired> {
        let mut act = pin!(act);
        poll_fn(|cx| match act.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Ok(done)),
            Poll::Pending => self.poll_expired(cx).map(Err),
        })
        .await
    }

    /// Ready once there is none any more.
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<Expired> {
        if let Some(upload) = &self.upload
            && upload.poll_broken(cx).is_ready()
        {
            return Poll::Ready(Expired::Upload);
        }
        let Some(sleep) = &mut self.sleep else { return Poll::Pending };
        loop {
            ready!(sleep.as_mut().poll(cx));
            let now = Instant::now();
            if self.whole.is_some_and(|whole| whole <= now) {
                return Poll::Ready(Expired::Whole);
            }
            if self.one_try.is_some_and(|end| end <= now) {
                return Poll::Ready(Expired::Try);
            }
            let moved = self.upload.as_ref().and_then(UploadState::moved).map_or(self.moved, |m| m.max(self.moved));
            let idle = self.idle.and_then(|idle| moved.checked_add(idle));
            if idle.is_some_and(|idle| idle <= now) {
                let whole = self.upload.as_ref().is_none_or(UploadState::is_whole);
                return Poll::Ready(if whole { Expired::Idle } else { Expired::IdleUpload });
            }
            let next = self.whole.into_iter().chain(self.one_try).chain(idle).min();
            let Some(next) = next else { return Poll::Pending };
            sleep.as_mut().reset(next);
        }
    }
}

/// Why an exchange is not waited for any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
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

impl fmt::Display for Expired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole => "the time for the whole response is over",
            Self::Try => "the time for one try is over",
            Self::Idle | Self::IdleUpload => "nothing moved for the idle time",
            Self::Upload => "the request's body broke off",
        })
    }
}
