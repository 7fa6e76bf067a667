//! Bodies that go out on a stream of HTTP/2.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
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
    /// Has this task woken when the far end resets the stream, or makes room.
    ///
    /// # Errors
    /// The far end has reset it.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Result<(), h2::Error> {
        match self.to.poll_reset(cx)? {
            Poll::Ready(reason) => Err(reason.into()),
            Poll::Pending => Ok(()),
        }
    }

    /// `Ok(true)` when all is sent.
    fn poll_one(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, h2::Error>> {
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
        // Room that is there at once would wake this task, which needs no second turn for it.
        self.poll_reset(&mut Context::from_waker(Waker::noop()))?;
        loop {
            match self.poll_one(cx)? {
                Poll::Ready(true) => return Poll::Ready(Ok(())),
                Poll::Ready(false) => {}
                Poll::Pending => {
                    self.poll_reset(cx)?;
                    return Poll::Pending;
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::Request;
    use http_body::Frame;
    use tokio::io::duplex;
    use tokio::sync::mpsc;

    use super::*;

    /// A body of what a test sends, which counts how often it is asked.
    struct Pieces {
        source: mpsc::UnboundedReceiver<Bytes>,
        asked: Arc<AtomicUsize>,
    }

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.source.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
        }
    }

    #[tokio::test]
    async fn a_piece_that_there_is_room_for_takes_one_turn() {
        let (near, far) = duplex(1 << 16);
        let (client, server) = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let ((mut requests, connection), mut server) = (client.unwrap(), server.unwrap());
        tokio::spawn(connection);
        let (_response, stream) = requests.send_request(Request::post("http://a/").body(()).unwrap(), false).unwrap();
        let (request, _respond) = server.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while server.accept().await.is_some() {} });
        let (pieces, source) = mpsc::unbounded_channel();
        let asked = Arc::new(AtomicUsize::new(0));
        let body = Pieces { source, asked: Arc::clone(&asked) };
        tokio::spawn(Outgoing::new(body, stream, Reason::CANCEL));
        let mut received = request.into_body();
        let mut before = 0;
        for piece in 0..8 {
            // The first turns are those in which the two sides agree on their windows.
            if piece == 3 {
                before = asked.load(Ordering::Relaxed);
            }
            pieces.send(Bytes::from_static(b"a message")).unwrap();
            assert_eq!(received.data().await.unwrap().unwrap(), "a message");
        }
        assert_eq!(asked.load(Ordering::Relaxed) - before, 5 * 2, "asked for the piece and for the one after it");
    }
}
