//! Bodies of messages that come, in either version of HTTP.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Frame, SizeHint};

use super::flow::{Counted, Reader};
use super::outgoing::Uploading;

/// The body of a request or response that somebody sends to us.
pub struct Incoming(Kind);

enum Kind {
    Http1(hyper::body::Incoming),
    Http2(Box<Stream>),
}

/// The body of one HTTP/2 stream.
struct Stream {
    source: RecvStream,
    /// Bytes to come, where the head says so.
    length: Option<u64>,
    /// A frame was polled for.
    polled: bool,
    data_ended: bool,
    /// Nothing came behind the last frame, as of then: to ask the codec takes its lock.
    ended: bool,
    reader: Reader,
    /// Of the request that this answers.
    sent: Option<Sent>,
}

/// The part of the request that a response keeps.
pub(crate) struct Sent {
    /// More of its body is sent meanwhile.
    pub uploading: Option<Uploading>,
    pub counted: Counted,
}

impl Incoming {
    /// The body that follows this head. `sent` is what a response keeps of its request.
    pub(super) fn http2(source: RecvStream, head: &HeaderMap, reader: Reader, sent: Option<Sent>) -> Self {
        let ended = source.is_end_stream();
        let length = if ended { Some(0) } else { content_length(head) };
        let mut stream =
            Box::new(Stream { source, length, polled: false, data_ended: false, ended: false, reader, sent });
        if ended {
            stream.end();
        }
        Self(Kind::Http2(stream))
    }

    /// Whether all of it has come and been taken, whoever asks and whenever. [`http_body::Body::is_end_stream`] is for
    /// whoever takes the frames, and learns of an end that came by itself when it asks for the next one.
    #[must_use]
    pub(super) fn is_over(&self) -> bool {
        use http_body::Body as _;
        match &self.0 {
            Kind::Http1(body) => body.is_end_stream(),
            Kind::Http2(stream) => stream.ended || stream.source.is_end_stream(),
        }
    }
}

impl From<hyper::body::Incoming> for Incoming {
    fn from(body: hyper::body::Incoming) -> Self {
        Self(Kind::Http1(body))
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").finish_non_exhaustive()
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.get_mut().0 {
            Kind::Http1(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::Http1),
            Kind::Http2(stream) => stream.poll_frame(cx).map_err(BodyError::Http2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Http1(body) => body.is_end_stream(),
            Kind::Http2(stream) => stream.ended || (!stream.polled && stream.source.is_end_stream()),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Http1(body) => body.size_hint(),
            Kind::Http2(stream) => stream.length.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

impl Stream {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        self.polled = true;
        if !self.data_ended {
            match ready!(self.source.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    // More than was taken cannot be given back.
                    let _ = self.source.flow_control().release_capacity(bytes.len());
                    self.length = self.length.map(|length| length.saturating_sub(bytes.len() as u64));
                    self.reader.read(bytes.len());
                    if self.source.is_end_stream() {
                        self.end();
                    }
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.data_ended = true,
            }
        }
        let trailers = ready!(self.source.poll_trailers(cx));
        if trailers.is_ok() {
            self.end();
        }
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::trailers)).transpose())
    }

    /// All of it came: a request that is still being sent has its answer.
    fn end(&mut self) {
        self.ended = true;
        if let Some(Sent { uploading: Some(uploading), counted }) = self.sent.take() {
            uploading.end_soon(counted);
        }
    }
}

/// The length that a head gives its body; `None` where it gives none or several.
fn content_length(head: &HeaderMap) -> Option<u64> {
    let mut lines = head.get_all(CONTENT_LENGTH).iter();
    let length = lines.next()?.to_str().ok()?.parse().ok()?;
    lines.next().is_none().then_some(length)
}

/// Why a body breaks off.
#[derive(Debug)]
pub enum BodyError {
    Http1(hyper::Error),
    Http2(h2::Error),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http1(error) => error.fmt(f),
            Self::Http2(error) => error.fmt(f),
        }
    }
}

impl Error for BodyError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Http1(error) => Some(error),
            Self::Http2(error) => Some(error),
        }
    }
}
