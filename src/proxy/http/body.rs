//! Message bodies as they pass through, frame by frame.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::note::Note;
use super::pool::Held;
use super::wire::Wire;
use crate::proxy::balance::{InFlight, Permit};

/// The body of a request or response that we send.
pub struct Body {
    source: Source,
    rest: Option<Box<Rest>>,
    _answer: Option<Answer>,
    /// For the access log.
    note: Option<Box<Note>>,
}

/// Tells the wire when the response that goes over it has been given to the codec, whole or broken off.
struct Answer(Wire);

impl Drop for Answer {
    fn drop(&mut self) {
        self.0.answered();
    }
}

enum Source {
    /// Our own words, or nothing.
    Text(Bytes),
    Stream(Incoming),
    Upload(Upload),
}

/// What an exchange holds until its response is over, and the time it has.
pub struct Rest {
    pub patience: Option<Patience>,
    _held: Held,
    _counted: Option<(InFlight, Permit)>,
}

impl Rest {
    #[must_use]
    pub fn new(held: Held, counted: Option<(InFlight, Permit)>) -> Self {
        Self { patience: None, _held: held, _counted: counted }
    }
}

impl Body {
    #[must_use]
    pub fn text(text: impl Into<Bytes>) -> Self {
        Self { source: Source::Text(text.into()), rest: None, _answer: None, note: None }
    }

    #[must_use]
    pub fn empty() -> Self {
        Self::text(Bytes::new())
    }

    #[must_use]
    pub fn stream(incoming: Incoming) -> Self {
        Self { source: Source::Stream(incoming), rest: None, _answer: None, note: None }
    }

    #[must_use]
    pub fn upload(upload: Upload) -> Self {
        Self { source: Source::Upload(upload), rest: None, _answer: None, note: None }
    }

    /// For the body of a response that goes over `wire`.
    #[must_use]
    pub fn answers(mut self, wire: Wire) -> Self {
        self._answer = Some(Answer(wire));
        self
    }

    /// Whether there is nothing in it for sure.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        use http_body::Body as _;
        self.is_end_stream()
    }

    /// Holds on to `rest` until the body has ended or is given up.
    #[must_use]
    pub fn with(mut self, rest: Rest) -> Self {
        use http_body::Body as _;
        if !self.is_end_stream() {
            self.rest = Some(Box::new(rest));
        }
        self
    }

    /// Tells `note` what becomes of it.
    #[must_use]
    pub fn noted(mut self, mut note: Box<Note>) -> Self {
        if self.is_empty() {
            note.complete();
        } else {
            self.note = Some(note);
        }
        self
    }

    fn tell(&mut self, polled: &Poll<Option<Result<Frame<Bytes>, Broken>>>) {
        let over = self.is_empty();
        let Some(note) = &mut self.note else { return };
        match polled {
            Poll::Ready(Some(Ok(frame))) => note.frame(frame),
            Poll::Ready(Some(Err(broken))) => note.broken(broken),
            Poll::Ready(None) => note.complete(),
            Poll::Pending => return,
        }
        if over {
            note.complete();
        }
    }
}

/// Why a body breaks off.
#[derive(Debug)]
pub enum Broken {
    /// Whoever sends it failed to.
    Source(hyper::Error),
    TimedOut(Expired),
    /// The request is sent again elsewhere.
    Superseded,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) => error.fmt(f),
            Self::TimedOut(Expired::Whole) => f.write_str("the time for the whole response is over"),
            Self::TimedOut(Expired::Try) => f.write_str("the time for one try is over"),
            Self::TimedOut(Expired::Idle | Expired::IdleUpload) => f.write_str("nothing moved for the idle time"),
            Self::TimedOut(Expired::Upload) => f.write_str("the request's body broke off"),
            Self::Superseded => f.write_str("the request is sent elsewhere"),
        }
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Source(error) => Some(error),
            _ => None,
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        let polled = this.poll_source(cx);
        if this.note.is_some() {
            this.tell(&polled);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Text(text) => text.is_empty(),
            Source::Stream(incoming) => incoming.is_end_stream(),
            Source::Upload(upload) => upload.is_over(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Text(text) => SizeHint::with_exact(text.len() as u64),
            Source::Stream(incoming) => incoming.size_hint(),
            Source::Upload(upload) => upload.size_hint(),
        }
    }
}

impl Body {
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        use http_body::Body as _;
        let polled = match &mut self.source {
            Source::Text(text) if text.is_empty() => Poll::Ready(None),
            Source::Text(text) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(text))))),
            Source::Stream(incoming) => Pin::new(incoming).poll_frame(cx).map_err(Broken::Source),
            Source::Upload(upload) => upload.poll_frame(cx),
        };
        let patience = self.rest.as_mut().and_then(|rest| rest.patience.as_mut());
        match (&polled, patience) {
            (Poll::Ready(Some(Ok(_))), Some(patience)) => patience.moved(),
            (Poll::Pending, Some(patience)) => {
                let expired = ready!(patience.poll_expired(cx));
                return Poll::Ready(Some(Err(Broken::TimedOut(expired))));
            }
            (Poll::Ready(None), _) => self.rest = None,
            _ => {}
        }
        polled
    }
}

/// The body of a request, of which the beginning is kept so that the request can be sent again. A newer one
/// from [`Upload::again`] supersedes it.
pub struct Upload {
    shared: Arc<Mutex<Shared>>,
    turn: u32,
    /// How many of the kept frames this one has given.
    given: usize,
}

struct Shared {
    source: Incoming,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    /// The source has ended; what is kept is all there is, unless it is not whole.
    ended: bool,
    /// Everything from the first byte on is kept.
    whole: bool,
    /// The source broke off: the client is gone, or what it sent is no HTTP.
    broken: bool,
    /// Whoever wants to know when it breaks off.
    waits: Option<Waker>,
    turn: u32,
    /// Data bytes that came.
    received: u64,
    /// When a frame last came.
    moved: Option<Instant>,
}

/// A hold on an upload from the side that sends it.
#[derive(Clone)]
pub struct UploadState(Arc<Mutex<Shared>>);

/// Of a request's body, kept to send it again.
pub const KEPT_BODY: usize = 64 * 1024;
const KEPT_FRAMES: usize = 64;

impl Upload {
    #[must_use]
    pub fn new(source: Incoming) -> (Self, UploadState) {
        let shared = Arc::new(Mutex::new(Shared {
            source,
            kept: Vec::new(),
            kept_bytes: 0,
            trailers: None,
            ended: false,
            whole: true,
            broken: false,
            waits: None,
            turn: 0,
            received: 0,
            moved: None,
        }));
        (Self { shared: Arc::clone(&shared), turn: 0, given: 0 }, UploadState(shared))
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        use http_body::Body as _;
        let mut shared = lock(&self.shared);
        let shared = &mut *shared;
        if shared.turn != self.turn {
            return Poll::Ready(Some(Err(Broken::Superseded)));
        }
        if let Some(frame) = shared.kept.get(self.given) {
            self.given += 1;
            return Poll::Ready(Some(Ok(Frame::data(frame.clone()))));
        }
        if shared.ended {
            let trailers = shared.trailers.as_ref().filter(|_| self.given == shared.kept.len());
            self.given = shared.kept.len() + 1;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers.clone()))));
        }
        let frame = ready!(Pin::new(&mut shared.source).poll_frame(cx));
        shared.moved = Some(Instant::now());
        Poll::Ready(match frame {
            None => {
                shared.ended = true;
                None
            }
            Some(Err(error)) => {
                shared.broken = true;
                if let Some(waker) = shared.waits.take() {
                    waker.wake();
                }
                Some(Err(Broken::Source(error)))
            }
            Some(Ok(frame)) => {
                shared.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                self.given += shared.keep(&frame);
                Some(Ok(frame))
            }
        })
    }

    /// Nothing will come any more. What is not sure is not said.
    fn is_over(&self) -> bool {
        let shared = lock(&self.shared);
        shared.turn == self.turn && shared.is_ended() && shared.trailers.is_none() && self.given >= shared.kept.len()
    }

    fn size_hint(&self) -> SizeHint {
        use http_body::Body as _;
        let shared = lock(&self.shared);
        let again = shared.kept.iter().skip(self.given).map(|frame| frame.len() as u64).sum::<u64>();
        match shared.source.size_hint().exact() {
            Some(rest) if shared.whole => SizeHint::with_exact(rest + again),
            _ => shared.source.size_hint(),
        }
    }
}

impl Shared {
    fn is_ended(&self) -> bool {
        use http_body::Body as _;
        self.ended || self.source.is_end_stream()
    }

    /// Keeps a frame while there is room, and tells how many data frames were kept.
    fn keep(&mut self, frame: &Frame<Bytes>) -> usize {
        if let Some(trailers) = frame.trailers_ref() {
            self.ended = true;
            self.trailers = Some(trailers.clone());
            // They have been given just now.
            return 1;
        }
        let Some(data) = frame.data_ref().filter(|_| self.whole) else { return 0 };
        if self.kept_bytes + data.len() > KEPT_BODY || self.kept.len() == KEPT_FRAMES {
            self.whole = false;
            self.kept = Vec::new();
            return 0;
        }
        self.kept_bytes += data.len();
        self.kept.push(data.clone());
        1
    }
}

impl UploadState {
    /// All of the body has come.
    fn is_whole(&self) -> bool {
        lock(&self.0).is_ended()
    }

    /// The whole body once more, if all that was sent of it is kept.
    #[must_use]
    pub fn again(&self) -> Option<Upload> {
        let mut shared = lock(&self.0);
        if !shared.whole || shared.broken {
            return None;
        }
        shared.turn += 1;
        Some(Upload { shared: Arc::clone(&self.0), turn: shared.turn, given: 0 })
    }

    /// Data bytes that came of it so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        lock(&self.0).received
    }

    /// What the client sent broke off.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        lock(&self.0).broken
    }

    /// Ready once it broke off.
    fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        if shared.broken {
            return Poll::Ready(());
        }
        match &mut shared.waits {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn moved(&self) -> Option<Instant> {
        lock(&self.0).moved
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long an exchange is waited for: one timer for all of its limits, and an eye on its upload.
pub struct Patience {
    sleep: Option<Pin<Box<Sleep>>>,
    whole: Option<Instant>,
    one_try: Option<Instant>,
    idle: Option<Duration>,
    moved: Instant,
    upload: Option<UploadState>,
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

    fn moved(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

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

/// The body of a request, and a hold on it if there is anything in it.
#[must_use]
pub fn upload(body: Incoming) -> (Body, Option<UploadState>) {
    use http_body::Body as _;
    if body.is_end_stream() {
        return (Body::empty(), None);
    }
    let (upload, state) = Upload::new(body);
    (Body::upload(upload), Some(state))
}
