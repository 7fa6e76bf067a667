//! Bodies of requests, as they pass through: frame by frame, and again from the beginning where it is kept.

use std::error::Error;
use std::fmt;
use std::future::poll_fn;
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
pub struct ReplayBody(Option<Sending>);

/// A body of which the beginning is kept so that the request can be sent again. A newer one from
/// [`BodyProgress::again`] supersedes it.
struct Sending {
    shared: Arc<Mutex<Shared>>,
    turn: u32,
}

struct Shared {
    /// `None`: it was cut.
    source: Option<Incoming>,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    /// The source has ended; what is kept is all there is, unless it is not whole.
    ended: bool,
    /// Everything from the first byte on is kept.
    whole: bool,
    /// It is not sent again.
    settled: bool,
    /// The source broke off: the client is gone, or what it sent is no HTTP.
    broken: bool,
    /// The sender has asked for the first frame.
    requested: bool,
    /// When all of it had come.
    complete: Option<Instant>,
    /// Wakes the task that waits for the body to be complete or to break off.
    waits: Option<Waker>,
    /// Wakes the sender, which waits for the next frame.
    sender: Option<Waker>,
    turn: u32,
    /// How many of the kept frames the newest one has given, and one more when it has given the trailers.
    given: usize,
    /// Data bytes that came.
    received: u64,
    /// When a frame last came.
    moved: Option<Instant>,
}

/// A hold on an upload from the side that sends it.
#[derive(Clone)]
pub struct BodyProgress(Arc<Mutex<Shared>>);

impl ReplayBody {
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// The body, and a hold on it if there is anything in it.
    #[must_use]
    pub fn new(source: Incoming) -> (Self, Option<BodyProgress>) {
        use http_body::Body as _;
        if source.is_end_stream() {
            return (Self::none(), None);
        }
        let shared = Arc::new(Mutex::new(Shared {
            source: Some(source),
            kept: Vec::new(),
            kept_bytes: 0,
            trailers: None,
            ended: false,
            whole: true,
            settled: false,
            broken: false,
            requested: false,
            complete: None,
            waits: None,
            sender: None,
            turn: 0,
            given: 0,
            received: 0,
            moved: None,
        }));
        (Self(Some(Sending { shared: Arc::clone(&shared), turn: 0 })), Some(BodyProgress(shared)))
    }

    /// Whether there is nothing in it for sure.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(Sending::is_over)
    }
}

impl http_body::Body for ReplayBody {
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
        shared.requested = true;
        if let Some(frame) = shared.kept.get(shared.given) {
            shared.given += 1;
            return Poll::Ready(Some(Ok(Frame::data(frame.clone()))));
        }
        shared.keep_less();
        if shared.ended {
            let trailers = shared.trailers.as_ref().filter(|_| shared.given == shared.kept.len());
            shared.given = shared.kept.len() + 1;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers.clone()))));
        }
        let Some(source) = &mut shared.source else { return Poll::Ready(Some(Err(Broken::Cut))) };
        let Poll::Ready(frame) = Pin::new(source).poll_frame(cx) else {
            keep_waker(&mut shared.sender, cx);
            return Poll::Pending;
        };
        shared.moved = Some(Instant::now());
        let frame = match frame {
            None => {
                shared.ended = true;
                None
            }
            Some(Err(error)) => {
                shared.broken = true;
                wake(&mut shared.waits);
                Some(Err(Broken::Source(error)))
            }
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    framing::clean_trailers(trailers);
                }
                shared.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                shared.given += shared.keep(&frame);
                Some(Ok(frame))
            }
        };
        if shared.complete.is_none() && shared.has_given_all() {
            shared.complete = shared.moved;
            wake(&mut shared.waits);
        }
        Poll::Ready(frame)
    }

    /// Nothing will come any more. What is not sure is not said.
    fn is_over(&self) -> bool {
        let shared = lock(&self.shared);
        shared.turn == self.turn
            && shared.has_given_all()
            && shared.trailers.is_none()
            && shared.given >= shared.kept.len()
    }

    fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.shared);
        let again = shared.kept.iter().skip(shared.given).map(|frame| frame.len() as u64).sum::<u64>();
        let rest = shared.source.as_ref().map(http_body::Body::size_hint).unwrap_or_default();
        match rest.exact() {
            Some(rest) if shared.whole => SizeHint::with_exact(rest + again),
            _ => rest,
        }
    }
}

impl Shared {
    /// All of it has come and been taken.
    fn is_ended(&self) -> bool {
        self.ended || self.source.as_ref().is_some_and(Incoming::is_over)
    }

    /// The same, as whoever takes the frames knows it.
    fn has_given_all(&self) -> bool {
        self.ended || self.source.as_ref().is_some_and(http_body::Body::is_end_stream)
    }

    /// Lets go of what is kept, once all of it has been given and nobody will ask for it again.
    fn keep_less(&mut self) {
        if self.settled && self.given == self.kept.len() {
            self.keep_nothing();
            self.given = 0;
        }
    }

    fn keep_nothing(&mut self) {
        self.whole = false;
        self.kept = Vec::new();
    }

    /// Keeps a frame while there is room, and returns how many data frames were kept.
    fn keep(&mut self, frame: &Frame<Bytes>) -> usize {
        if let Some(trailers) = frame.trailers_ref() {
            self.ended = true;
            self.trailers = Some(trailers.clone());
            // They have been given just now.
            return 1;
        }
        let Some(data) = frame.data_ref().filter(|_| self.whole) else { return 0 };
        if self.kept_bytes + data.len() > KEPT_BODY || self.kept.len() == KEPT_FRAMES {
            self.keep_nothing();
            return 0;
        }
        self.kept_bytes += data.len();
        self.kept.push(data.clone());
        1
    }
}

impl BodyProgress {
    /// All of the body has come.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        lock(&self.0).is_ended()
    }

    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let shared = lock(&self.0);
        match (shared.complete.or(shared.moved.filter(|_| shared.is_ended())), shared.requested) {
            (Some(at), _) => Progress::Complete(at),
            (None, true) => Progress::Coming,
            (None, false) => Progress::NotRequested,
        }
    }

    /// Lets nothing more of it through. The sender breaks off.
    pub fn cut(&self) {
        let mut shared = lock(&self.0);
        if shared.is_ended() {
            return;
        }
        let source = shared.source.take();
        shared.broken = true;
        wake(&mut shared.sender);
        wake(&mut shared.waits);
        drop(shared);
        drop(source);
    }

    /// Reads what nobody wants of it, up to `limit` bytes, and returns whether that was all. Nobody may be sending it.
    pub async fn drain(&self, limit: u64) -> bool {
        let mut left = limit;
        poll_fn(|cx| {
            use http_body::Body as _;
            let mut shared = lock(&self.0);
            while !shared.is_ended() {
                let Some(source) = &mut shared.source else { return Poll::Ready(false) };
                match ready!(Pin::new(source).poll_frame(cx)) {
                    None => shared.ended = true,
                    Some(Err(_)) => return Poll::Ready(false),
                    Some(Ok(frame)) => {
                        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                        let Some(rest) = left.checked_sub(length) else { return Poll::Ready(false) };
                        left = rest;
                    }
                }
            }
            Poll::Ready(true)
        })
        .await
    }

    /// The whole body once more, if all that was sent of it is kept.
    #[must_use]
    pub fn again(&self) -> Option<ReplayBody> {
        let mut shared = lock(&self.0);
        if !shared.whole || shared.broken || shared.settled {
            return None;
        }
        shared.turn += 1;
        shared.given = 0;
        Some(ReplayBody(Some(Sending { shared: Arc::clone(&self.0), turn: shared.turn })))
    }

    /// There is an answer that is passed on: what has been sent of it, and what will be, is not kept any longer. A small
    /// frame that is kept holds all that was read with it.
    pub fn settle(&self) {
        let mut shared = lock(&self.0);
        shared.settled = true;
        shared.keep_less();
    }

    /// Data bytes that came of it so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        lock(&self.0).received
    }

    /// The client's body broke off.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        lock(&self.0).broken
    }

    /// Ready once it broke off. Who waits is also woken when it is complete.
    pub fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        if shared.broken {
            return Poll::Ready(());
        }
        if shared.complete.is_none() {
            keep_waker(&mut shared.waits, cx);
        }
        Poll::Pending
    }

    /// When something of it last came.
    #[must_use]
    pub fn last_progress(&self) -> Option<Instant> {
        lock(&self.0).moved
    }
}

/// How far an upload has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nobody has wanted any of it yet.
    NotRequested,
    Coming,
    Complete(Instant),
}

fn keep_waker(kept: &mut Option<Waker>, cx: &Context<'_>) {
    match kept {
        Some(waker) => waker.clone_from(cx.waker()),
        none => *none = Some(cx.waker().clone()),
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a request is not sent any further.
#[derive(Debug)]
pub enum Broken {
    /// The sender failed.
    Source(BodyError),
    /// The request is sent again elsewhere.
    Superseded,
    /// The request is not to go on.
    Cut,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) => error.fmt(f),
            Self::Superseded => f.write_str("the request is sent elsewhere"),
            Self::Cut => f.write_str("the request was ended"),
        }
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Source(error) => Some(error),
            Self::Superseded | Self::Cut => None,
        }
    }
}

/// Bytes of a request's body that are kept to send it again.
const KEPT_BODY: usize = 64 * 1024;
/// Frames of a request's body that are kept to send it again.
const KEPT_FRAMES: usize = 64;

#[cfg(test)]
mod tests {
    use h2::SendStream;
    use http::Request;
    use http_body_util::BodyExt as _;
    use tokio::io::duplex;

    use super::*;
    use crate::proxy::codec::flow::{Counted, Meter};

    /// A request's body as it comes over HTTP/2, and what sends it.
    async fn incoming() -> (SendStream<Bytes>, Incoming) {
        let (near, far) = duplex(1 << 16);
        let (client, server) = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let ((mut requests, connection), mut server) = (client.unwrap(), server.unwrap());
        tokio::spawn(connection);
        let (response, stream) = requests.send_request(Request::post("http://a/").body(()).unwrap(), false).unwrap();
        let (request, respond) = server.accept().await.unwrap().unwrap();
        tokio::spawn(async move {
            let _open = (response, respond, requests);
            while server.accept().await.is_some() {}
        });
        let (head, source) = request.into_parts();
        let reader = Counted::new(&Arc::new(Meter::default())).reader();
        (stream, Incoming::http2(source, &head.headers, reader, None))
    }

    async fn next(body: &mut ReplayBody) -> Bytes {
        body.frame().await.unwrap().unwrap().into_data().unwrap()
    }

    #[tokio::test]
    async fn nothing_is_kept_once_there_is_an_answer() {
        let (mut stream, source) = incoming().await;
        let (mut body, progress) = ReplayBody::new(source);
        let progress = progress.unwrap();
        for message in ["one", "two"] {
            stream.send_data(message.into(), false).unwrap();
            assert_eq!(next(&mut body).await, message);
        }
        assert_eq!(lock(&progress.0).kept.len(), 2);
        progress.settle();
        assert!(lock(&progress.0).kept.is_empty() && progress.again().is_none());
        stream.send_data("three".into(), false).unwrap();
        assert_eq!(next(&mut body).await, "three");
        assert!(lock(&progress.0).kept.is_empty());
        stream.send_data("four".into(), true).unwrap();
        assert_eq!(next(&mut body).await, "four");
        assert!(body.frame().await.is_none() && progress.is_whole());
        assert_eq!(progress.received(), 15);
    }

    #[tokio::test]
    async fn a_body_that_is_sent_again_is_sent_whole_though_the_answer_comes_before() {
        let (mut stream, source) = incoming().await;
        let (mut first, progress) = ReplayBody::new(source);
        let progress = progress.unwrap();
        for message in ["one", "two"] {
            stream.send_data(message.into(), false).unwrap();
            assert_eq!(next(&mut first).await, message);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x-end", http::HeaderValue::from_static("1"));
        stream.send_trailers(trailers.clone()).unwrap();
        assert_eq!(first.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        let mut again = progress.again().unwrap();
        assert_eq!(next(&mut again).await, "one");
        progress.settle();
        assert!(matches!(first.frame().await, Some(Err(Broken::Superseded))));
        assert_eq!(next(&mut again).await, "two");
        assert_eq!(again.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(again.frame().await.is_none());
    }
}
