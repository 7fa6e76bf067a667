//! Bodies of responses, as they pass through, frame by frame.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::deadlines::{Deadlines, TimedOut};
use super::grpc::grpc_denial;
use super::ongoing::{Ongoing, Over};
use super::request_record::RequestRecorder;
use crate::proxy::balance::InFlight;
use crate::proxy::codec::framing;
use crate::proxy::codec::incoming::{BodyError, Incoming};
use crate::proxy::codec::pool::ConnectionGuard;
use crate::proxy::codec::wire::Wire;
use crate::proxy::limits::Permit;

/// The body of a response that we send.
pub(super) struct Body {
    source: Source,
    rest: Option<Box<ResponseTail>>,
    ongoing: Option<Ongoing>,
    answer: Option<Answer>,
    record: Option<Box<RequestRecorder>>,
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(ongoing) = self.ongoing.take() {
            ongoing.done();
        }
    }
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
}

/// Resources that an exchange holds until its response is over, and its deadlines.
pub(super) struct ResponseTail {
    pub deadlines: Option<Deadlines>,
    _held: ConnectionGuard,
    _counted: Option<(InFlight, Option<Permit>)>,
}

impl ResponseTail {
    #[must_use]
    pub(super) fn new(held: ConnectionGuard, counted: Option<(InFlight, Option<Permit>)>) -> Self {
        Self { deadlines: None, _held: held, _counted: counted }
    }
}

impl Body {
    #[must_use]
    pub(super) fn text(text: impl Into<Bytes>) -> Self {
        Self { source: Source::Text(text.into()), rest: None, ongoing: None, answer: None, record: None }
    }

    #[must_use]
    pub(super) fn empty() -> Self {
        Self::text(Bytes::new())
    }

    #[must_use]
    pub(super) fn stream(incoming: Incoming) -> Self {
        Self { source: Source::Stream(incoming), rest: None, ongoing: None, answer: None, record: None }
    }

    /// For the answer to `ongoing`, which watches over it from here on.
    #[must_use]
    pub(super) fn of(mut self, ongoing: Ongoing) -> Self {
        ongoing.answered(self.rest.as_mut().and_then(|rest| rest.deadlines.take()));
        self.ongoing = Some(ongoing);
        self
    }

    /// Whether it is of our own words, so that whatever there was of an exchange is over.
    #[must_use]
    pub(super) fn is_ours(&self) -> bool {
        matches!(self.source, Source::Text(_))
    }

    /// For a response that goes over `wire`.
    #[must_use]
    pub(super) fn answers(mut self, wire: Wire) -> Self {
        self.answer = Some(Answer(wire));
        self
    }

    /// Whether there is nothing in it for sure.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        use http_body::Body as _;
        self.is_end_stream()
    }

    /// Holds on to `rest` until the body has ended or is given up.
    #[must_use]
    pub(super) fn with(mut self, rest: ResponseTail) -> Self {
        use http_body::Body as _;
        if !self.is_end_stream() {
            self.rest = Some(Box::new(rest));
        }
        self
    }

    /// Tells `record` what becomes of it.
    #[must_use]
    pub(super) fn recorded(mut self, mut record: Box<RequestRecorder>) -> Self {
        if self.is_empty() {
            record.complete();
        } else {
            self.record = Some(record);
        }
        self
    }

    fn record_frame(&mut self, polled: &Poll<Option<Result<Frame<Bytes>, Broken>>>) {
        let over = polled.is_ready() && self.is_empty();
        let Some(record) = &mut self.record else { return };
        match polled {
            Poll::Ready(Some(Ok(frame))) => record.frame(frame),
            Poll::Ready(Some(Err(Broken::Source(_)))) => record.broken(None),
            Poll::Ready(Some(Err(Broken::Over(Over::TimedOut(expired))))) => record.broken(Some(*expired)),
            Poll::Ready(Some(Err(Broken::Over(Over::Denied)))) => record.denied(),
            Poll::Ready(None) => record.complete(),
            Poll::Pending => return,
        }
        if over {
            record.complete();
        }
    }
}

/// Why a body breaks off.
#[derive(Debug)]
pub(super) enum Broken {
    /// The sender failed.
    Source(BodyError),
    /// It is not to go on.
    Over(Over),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(error) => error.fmt(f),
            Self::Over(Over::TimedOut(expired)) => expired.fmt(f),
            Self::Over(Over::Denied) => f.write_str("its source is denied now"),
        }
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Source(error) => Some(error),
            Self::Over(_) => None,
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        let polled = this.poll_source(cx);
        if let (Poll::Ready(Some(Err(_))), Some(answer)) = (&polled, &this.answer) {
            answer.0.breaks_off();
        }
        if this.record.is_some() {
            this.record_frame(&polled);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Text(text) => text.is_empty(),
            Source::Stream(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Text(text) => SizeHint::with_exact(text.len() as u64),
            Source::Stream(incoming) => incoming.size_hint(),
        }
    }
}

impl Body {
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        use http_body::Body as _;
        if matches!(self.source, Source::Stream(_))
            && let Some(over) = self.ongoing.as_ref().and_then(Ongoing::over)
        {
            return Poll::Ready(Some(self.break_off(over)));
        }
        let mut polled = match &mut self.source {
            Source::Text(text) if text.is_empty() => Poll::Ready(None),
            Source::Text(text) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(text))))),
            Source::Stream(incoming) => Pin::new(incoming).poll_frame(cx).map_err(Broken::Source),
        };
        if let Poll::Ready(Some(Ok(frame))) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            framing::clean_trailers(trailers);
        }
        if self.ongoing.is_none()
            && let Some(expired) = self.poll_unwatched(cx, polled.is_pending())
        {
            return Poll::Ready(Some(self.break_off(Over::TimedOut(expired))));
        }
        match (&polled, &self.ongoing) {
            (Poll::Ready(Some(Ok(_))), Some(ongoing)) => ongoing.progress(),
            (Poll::Ready(None), _) => self.rest = None,
            _ => {}
        }
        polled
    }

    /// Why it is not waited for any longer, before it is the answer to anything.
    fn poll_unwatched(&mut self, cx: &mut Context<'_>, is_pending: bool) -> Option<TimedOut> {
        let deadlines = self.rest.as_mut()?.deadlines.as_mut()?;
        if !is_pending {
            deadlines.progress();
            return None;
        }
        match deadlines.poll_expired(cx) {
            Poll::Ready(expired) => Some(expired),
            Poll::Pending => None,
        }
    }

    /// Ends it before its end, such that the client sees that: with trailers, or not at all.
    fn break_off(&mut self, over: Over) -> Result<Frame<Bytes>, Broken> {
        let in_trailers = self.ongoing.as_ref().is_some_and(Ongoing::ends_in_trailers);
        self.source = Source::Text(Bytes::new());
        self.rest = None;
        match over {
            Over::Denied if in_trailers => Ok(Frame::trailers(grpc_denial())),
            _ => Err(Broken::Over(over)),
        }
    }
}
