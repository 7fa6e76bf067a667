//! Bodies of requests, as they pass through: frame by frame, and again from the beginning where it is kept.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::time::Instant;

use super::framing;
use super::incoming::{BodyError, Incoming};

/// The body of a request that we send.
pub struct Upload(Option<Sending>);

/// A body of which the beginning is kept so that the request can be sent again. A newer one from
/// [`UploadState::again`] supersedes it.
struct Sending {
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

impl Upload {
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// The body, and a hold on it if there is anything in it.
    #[must_use]
    pub fn new(source: Incoming) -> (Self, Option<UploadState>) {
        use http_body::Body as _;
        if source.is_end_stream() {
            return (Self::none(), None);
        }
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
        (Self(Some(Sending { shared: Arc::clone(&shared), turn: 0, given: 0 })), Some(UploadState(shared)))
    }

    /// Whether there is nothing in it for sure.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(Sending::is_over)
    }
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut self.get_mut().0 {
            Some(sending) => sending.poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), Sending::size_hint)
    }
}

impl Sending {
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
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    framing::clean_trailers(trailers);
                }
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
    #[must_use]
    pub fn is_whole(&self) -> bool {
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
        Some(Upload(Some(Sending { shared: Arc::clone(&self.0), turn: shared.turn, given: 0 })))
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
    pub fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<()> {
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

    /// When something of it last came.
    #[must_use]
    pub fn moved(&self) -> Option<Instant> {
        lock(&self.0).moved
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request is not sent any further.
#[derive(Debug)]
pub enum Broken {
    /// Whoever sends it failed to.
    Source(BodyError),
    /// The request is sent again elsewhere.
    Superseded,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) => error.fmt(f),
            Self::Superseded => f.write_str("the request is sent elsewhere"),
        }
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Source(error) => Some(error),
            Self::Superseded => None,
        }
    }
}

/// Of a request's body, kept to send it again.
const KEPT_BODY: usize = 64 * 1024;
const KEPT_FRAMES: usize = 64;
