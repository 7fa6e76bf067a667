//! The server side of an HTTP/2 connection.

use std::error::Error;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use h2::server::{Connection, Handshake, SendResponse};
use http::header::{CONTENT_LENGTH, TE};
use http::{HeaderValue, Request, Response};
use pin_project_lite::pin_project;

use super::flow::{CONNECTION, Counted, Meter, Pings, USUAL, Windows};
use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::wire::{WeakWire, Wire};
use super::{HEAD_SIZE, SMALL_FRAMES};

/// One connection, which ends when the client or a shutdown ends it.
pub(crate) struct Server<H> {
    state: State,
    handle: Box<H>,
    meter: Arc<Meter>,
    wire: WeakWire,
    remote: bool,
    /// Begun before there was a connection to shut down.
    shuts_down: bool,
}

enum State {
    Begins(Box<Handshake<Wire, Bytes>>),
    Serves(Box<Serving>),
}

struct Serving {
    connection: Connection<Wire, Bytes>,
    pings: Pings,
    windows: Windows,
}

impl<H> Server<H> {
    /// `remote`: the far end is another host. `handle` makes the answer to each request, in a task of its own; it is
    /// dropped when the client resets the stream. It also gives what watches over the stream.
    pub(crate) fn new(wire: Wire, remote: bool, handle: H) -> Self {
        let mut builder = h2::server::Builder::new();
        builder
            .max_concurrent_streams(STREAMS)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(Some(LOCAL_RESETS))
            .max_header_list_size(u32::try_from(HEAD_SIZE).unwrap_or(u32::MAX))
            .initial_window_size(USUAL)
            .initial_connection_window_size(CONNECTION)
            .max_send_buffer_size(SEND_BUFFER)
            .data_frame_budget(SMALL_FRAMES);
        let known = wire.downgrade();
        let state = State::Begins(Box::new(builder.handshake(wire)));
        Self { state, handle: Box::new(handle), meter: Arc::default(), wire: known, remote, shuts_down: false }
    }

    /// Takes no further requests, and ends after those under way.
    pub(crate) fn graceful_shutdown(self: Pin<&mut Self>) {
        let this = self.get_mut();
        match &mut this.state {
            State::Begins(_) => this.shuts_down = true,
            State::Serves(serving) => serving.connection.graceful_shutdown(),
        }
    }
}

impl<H, F, B, W> Future for Server<H>
where
    H: Fn(Request<Incoming>) -> (F, W),
    W: Watch + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Error + 'static,
{
    type Output = Result<(), h2::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Begins(handshake) => {
                    let mut connection = ready!(Pin::new(handshake.as_mut()).poll(cx))?;
                    if this.shuts_down {
                        connection.graceful_shutdown();
                    }
                    let pings = Pings::new(connection.ping_pong().filter(|_| this.remote));
                    let windows = Windows::new(Arc::clone(&this.meter), this.remote);
                    this.state = State::Serves(Box::new(Serving { connection, pings, windows }));
                }
                State::Serves(serving) => {
                    let Some(accepted) = ready!(serving.poll_request(cx)) else { return Poll::Ready(Ok(())) };
                    let (request, respond) = accepted?;
                    let counted = Counted::new(&this.meter);
                    let (head, source) = request.into_parts();
                    let body = Incoming::http2(source, &head.headers, counted.reader(), None);
                    let (response, watch) = (this.handle)(Request::from_parts(head, body));
                    tokio::spawn(Watched { stream: answer(response, respond, counted, this.wire.clone()), watch });
                }
            }
        }
    }
}

type Accepted = Result<(Request<h2::RecvStream>, SendResponse<Bytes>), h2::Error>;

impl Serving {
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted>> {
        loop {
            if let Poll::Ready(accepted) = self.connection.poll_accept(cx) {
                return Poll::Ready(accepted);
            }
            if let Some(share) = self.pings.answered(cx) {
                self.windows.measured(share);
            }
            if self.windows.look() {
                self.pings.send();
            }
            // While the far end has not confirmed one change, there is no other.
            match self.windows.unannounced() {
                Some(window) if self.connection.set_initial_window_size(window).is_ok() => {
                    self.windows.announced(window)
                }
                _ => return Poll::Pending,
            }
        }
    }
}

/// Watches over a stream, as nothing of its response is asked for while the client takes nothing.
pub(crate) trait Watch {
    /// Ready once the stream must end. The polling task is woken when that changes.
    fn poll_over(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// There is nothing left to end.
    fn is_done(&self) -> bool;
}

pin_project! {
    /// A stream with what watches over it. When it must end and does not by itself, it is dropped, which resets it.
    struct Watched<F, W> {
        #[pin]
        stream: F,
        watch: W,
    }
}

impl<F: Future<Output = ()>, W: Watch> Future for Watched<F, W> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        if this.stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        ready!(this.watch.poll_over(cx));
        // The response's body, or whoever waits for the response, ends it if asked.
        if this.stream.poll(cx).is_pending() && this.watch.is_done() {
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

/// Sends the response that comes of a request, unless the client resets the stream before.
async fn answer<B>(
    response: impl Future<Output = Response<B>>,
    mut respond: SendResponse<Bytes>,
    counted: Counted,
    wire: WeakWire,
) where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Error + 'static,
{
    let _counted = counted;
    let mut response = pin!(response);
    let response = poll_fn(|cx| match response.as_mut().poll(cx) {
        Poll::Ready(response) => Poll::Ready(Some(response)),
        Poll::Pending => respond.poll_reset(cx).map(|_| None),
    });
    let Some(response) = response.await else { return };
    let (mut head, body) = response.into_parts();
    head.headers.remove(TE);
    let ends = body.is_end_stream();
    if !ends && let Some(length) = body.size_hint().exact() {
        head.headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
    match respond.send_response(Response::from_parts(head, ()), ends) {
        Ok(_) if ends => {}
        // The connection tells who is to know.
        Ok(stream) => drop(Outgoing::new(body, stream, Reason::INTERNAL_ERROR).over(wire).await),
        Err(error) => {
            tracing::debug!(target: "proxy", %error, "A response could not be sent");
            respond.send_reset(Reason::INTERNAL_ERROR);
        }
    }
}

/// What a stream may have waiting for the socket, in bytes, beside one frame: 16 MiB for all streams of a connection.
const SEND_BUFFER: usize = 64 * 1024;
/// Concurrent requests on one connection.
const STREAMS: u32 = 256;
/// Streams that a client may have opened and reset before they were read ("rapid reset", CVE-2023-44487).
const PENDING_RESETS: usize = 32;
/// Streams that may be reset for errors of the client before the connection is closed.
const LOCAL_RESETS: usize = 256;
