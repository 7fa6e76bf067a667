//! Bodies that go out on a stream of HTTP/2.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream};
use tokio::task::AbortHandle;

use super::flow::Counted;
use super::wire::WeakWire;

/// Sends a body as fast as the far end takes it. Ready when all of it was given to the codec, or nothing more of it
/// can be sent.
///
/// A piece is given to the codec as soon as the far end has room for any of it, so that few pieces are. Where that is not
/// room for all, its last byte stays here until it is. So a body is at its end when the far end has made room for the
/// whole, and until then whoever looks after the stream can end it, and what waits with it.
pub(super) struct Outgoing<B> {
    body: B,
    to: SendStream<Bytes>,
    /// Waits for room in the window, and whether it is the last.
    waits: Option<(Bytes, bool)>,
    /// The reset that is sent where the body breaks off.
    broken: Reason,
    /// Learns that it does.
    wire: Option<WeakWire>,
}

impl<B> Outgoing<B> {
    pub(super) fn new(body: B, to: SendStream<Bytes>, broken: Reason) -> Self {
        Self { body, to, waits: None, broken, wire: None }
    }

    /// Has the wire know when the body breaks off.
    pub(super) fn over(self, wire: WeakWire) -> Self {
        Self { wire: Some(wire), ..self }
    }
}

impl<B> Outgoing<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Error + 'static,
{
    /// `Ok(true)` when all is sent.
    fn poll_one(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, h2::Error>> {
        if let Poll::Ready(reason) = self.to.poll_reset(cx)? {
            return Poll::Ready(Err(reason.into()));
        }
        if let Some((data, last)) = &mut self.waits {
            while self.to.capacity() == 0 {
                match ready!(self.to.poll_capacity(cx)) {
                    Some(room) => drop(room?),
                    None => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
                }
            }
            let covered = self.to.capacity() >= data.len();
            let (data, last) = (data.split_to(data.len() - usize::from(!covered)), *last && covered);
            if covered {
                self.waits = None;
            }
            return Poll::Ready(self.to.send_data(data, last).map(|()| last));
        }
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else {
            return Poll::Ready(self.to.send_data(Bytes::new(), true).map(|()| true));
        };
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                if let Some(wire) = self.wire.as_ref().and_then(WeakWire::upgrade) {
                    wire.breaks_off_stream(self.to.stream_id().into());
                }
                self.to.send_reset(reason(&error).unwrap_or(self.broken));
                return Poll::Ready(Ok(true));
            }
        };
        match frame.into_data() {
            Ok(data) if data.is_empty() => {
                let last = self.body.is_end_stream();
                Poll::Ready(if last { self.to.send_data(data, true).map(|()| true) } else { Ok(false) })
            }
            Ok(data) => {
                self.to.reserve_capacity(data.len());
                self.waits = Some((data, self.body.is_end_stream()));
                Poll::Ready(Ok(false))
            }
            Err(frame) => {
                let Ok(trailers) = frame.into_trailers() else { return Poll::Ready(Ok(false)) };
                self.to.reserve_capacity(0);
                Poll::Ready(self.to.send_trailers(trailers).map(|()| true))
            }
        }
    }
}

impl<B> Future for Outgoing<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Error + 'static,
{
    type Output = Result<(), h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        while !ready!(self.poll_one(cx))? {}
        Poll::Ready(Ok(()))
    }
}

/// The error of the other stream that made a body break off.
fn reason(error: &(dyn Error + 'static)) -> Option<Reason> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            // That one concerns the connection it came on (RFC 9113, 7): who reads it elsewhere would try again over HTTP/1.1.
            return error.reason().filter(|reason| *reason != Reason::HTTP_1_1_REQUIRED);
        }
        next = error.source();
    }
    None
}

/// A request's body that a task sends. Dropping this ends it.
pub(crate) struct Uploading(AbortHandle);

impl Uploading {
    #[must_use]
    pub(crate) fn new(task: AbortHandle) -> Self {
        Self(task)
    }

    /// The answer is there, whole: few wait for the rest of a request then.
    pub(crate) fn end_soon(self, counted: Counted) {
        if self.0.is_finished() {
            return;
        }
        tokio::spawn(async move {
            let _counted = counted;
            tokio::time::sleep(AFTER_ANSWER).await;
            drop(self);
        });
    }
}

impl Drop for Uploading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Time for which the rest of a request's body is sent after the response has begun.
pub(super) const AFTER_ANSWER: Duration = Duration::from_secs(5);
