//! The client side of an HTTP/2 connection.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderValue, Method, Request, Response};
use http_body::Body as _;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

use super::flow::{CONNECTION, Counted, Meter, Pings, USUAL, Windows};
use super::incoming::{Incoming, Sent};
use super::outgoing::{Outgoing, Uploading};
use super::replay_body::ReplayBody;
use super::wire::Wire;
use super::{HEAD_SIZE, SEND_BUFFER, SMALL_FRAMES};

/// State of a connection, shared by its users.
#[derive(Debug)]
pub(super) struct Known {
    pub meter: Arc<Meter>,
    /// No further request is to go over it.
    retired: AtomicBool,
    /// The far end gives no sign of life.
    silent: AtomicBool,
    /// Counts requests.
    requests: AtomicUsize,
}

impl Known {
    fn new(freed: Arc<Notify>) -> Self {
        Self {
            // The far end has not said yet how many it allows.
            meter: Arc::new(Meter::limited(1, freed)),
            retired: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
        }
    }

    #[must_use]
    pub(super) fn has_room(&self) -> bool {
        self.meter.has_room() && !self.silent.load(Ordering::Relaxed)
    }

    #[must_use]
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }
}

/// Sends requests over a connection.
#[derive(Clone)]
pub(super) struct Sender {
    requests: SendRequest<Bytes>,
    pub known: Arc<Known>,
}

/// A request that could not be sent at all, or brought no response.
pub(super) struct Unanswered {
    pub request: Option<Request<ReplayBody>>,
    pub error: h2::Error,
}

impl Sender {
    /// Sends the request and waits for the response head. Dropping this resets the stream.
    ///
    /// # Errors
    /// Those of the codec, with the request where nothing of it was sent.
    pub(super) async fn send(
        mut self,
        request: Request<ReplayBody>,
        counted: Counted,
    ) -> Result<Response<Incoming>, Box<Unanswered>> {
        if let Err(error) = poll_fn(|cx| self.requests.poll_ready(cx)).await {
            self.known.retire();
            return Err(Box::new(Unanswered { request: Some(request), error }));
        }
        self.known.requests.fetch_add(1, Ordering::Relaxed);
        let failed = |error| Box::new(Unanswered { request: None, error });
        let (response, uploading) = self.begin(request).map_err(failed)?;
        let response = match response.await {
            Ok(response) => response,
            Err(error) => {
                if is_refusal(&error) {
                    self.known.retire();
                }
                return Err(failed(error));
            }
        };
        let (head, source) = response.into_parts();
        let reader = counted.reader();
        let body = Incoming::http2(source, &head.headers, reader, Some(Sent { uploading, counted }));
        Ok(Response::from_parts(head, body))
    }

    /// Sends the head and what there is of the body, and has a task send the rest.
    fn begin(&mut self, request: Request<ReplayBody>) -> Result<(ResponseFuture, Option<Uploading>), h2::Error> {
        let (mut head, body) = request.into_parts();
        if let Some(length) = body.size_hint().exact()
            && (length > 0 || !matches!(head.method, Method::GET | Method::HEAD | Method::DELETE))
        {
            head.headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
        }
        let ends = body.is_end_stream();
        let sent = self.requests.send_request(Request::from_parts(head, ()), ends);
        let (response, stream) = sent.inspect_err(|_| self.known.retire())?;
        Ok((response, if ends { None } else { upload(body, stream) }))
    }
}

fn upload(body: ReplayBody, stream: SendStream<Bytes>) -> Option<Uploading> {
    let mut outgoing = Outgoing::new(body, stream, Reason::CANCEL);
    // What is there already needs no task.
    let mut now = Context::from_waker(std::task::Waker::noop());
    if Pin::new(&mut outgoing).poll(&mut now).is_ready() {
        return None;
    }
    let task = tokio::spawn(async move {
        // The task that waits for the response gets the error.
        let _ = outgoing.await;
    });
    Some(Uploading::new(task.abort_handle()))
}

/// Begins an HTTP/2 connection. The second part is to be run, and ends with the connection; `changed` is called when
/// the far end has said how many streams it allows, and whenever it says so anew. `remote`: the far end is another host.
/// `freed` is notified when a connection that was full has room again.
///
/// # Errors
/// None that depends on the far end.
pub(super) async fn connect(
    wire: Wire,
    remote: bool,
    freed: Arc<Notify>,
    changed: impl FnMut() + Send + Unpin + 'static,
) -> Result<(Sender, impl Future<Output = ()> + Send), h2::Error> {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_max_send_streams(UNKNOWN)
        .initial_window_size(USUAL)
        .initial_connection_window_size(CONNECTION)
        .max_header_list_size(u32::try_from(HEAD_SIZE).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        .data_frame_budget(SMALL_FRAMES)
        .enable_push(false);
    let (requests, mut connection) = builder.handshake(wire.clone()).await?;
    let known = Arc::new(Known::new(freed));
    if remote {
        wire.end_when_unacknowledged();
    }
    let driver = Driver {
        pings: Pings::new(connection.ping_pong().filter(|_| remote)),
        connection,
        windows: Windows::new(Arc::clone(&known.meter), remote),
        watch: remote.then(|| Watch::new(wire)),
        known: Arc::clone(&known),
        limit: UNKNOWN,
        changed,
    };
    Ok((Sender { requests, known }, driver))
}

/// Runs a connection.
struct Driver<F> {
    connection: Connection<Wire, Bytes>,
    pings: Pings,
    windows: Windows,
    watch: Option<Watch>,
    known: Arc<Known>,
    /// Streams that the far end allows at a time.
    limit: usize,
    changed: F,
}

impl<F: FnMut() + Unpin> Future for Driver<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        loop {
            if Pin::new(&mut this.connection).poll(cx).is_ready() {
                return Poll::Ready(());
            }
            this.follow_limit();
            if let Some(share) = this.pings.answered(cx) {
                this.windows.measured(share);
            }
            if this.windows.look() {
                this.pings.send();
            }
            let Driver { watch, pings, known, .. } = this;
            if watch.as_mut().is_some_and(|watch| watch.poll_dead(cx, pings, known).is_ready()) {
                return Poll::Ready(());
            }
            // While the far end has not confirmed one change, there is no other.
            match this.windows.unannounced() {
                Some(window) if this.connection.set_initial_window_size(window).is_ok() => {
                    this.windows.announced(window)
                }
                _ => return Poll::Pending,
            }
        }
    }
}

impl<F: FnMut()> Driver<F> {
    fn follow_limit(&mut self) {
        let limit = self.connection.max_concurrent_send_streams();
        if limit != self.limit {
            self.limit = limit;
            self.known.meter.limit(limit.min(STREAMS));
            (self.changed)();
        }
    }
}

impl<F> Drop for Driver<F> {
    fn drop(&mut self) {
        self.known.retire();
    }
}

/// Looks for signs of life while something is waited for.
struct Watch {
    wire: Wire,
    /// The next look; `None` while nothing is waited for.
    round: Option<Pin<Box<Sleep>>>,
    every: Duration,
    /// As of the last look.
    received: u64,
    sent: u64,
    requests: usize,
    /// A PING was sent, and the far end has until then to answer it.
    answer_due: Option<Instant>,
}

impl Watch {
    fn new(wire: Wire) -> Self {
        Self { wire, round: None, every: LOOK, received: 0, sent: 0, requests: 0, answer_due: None }
    }

    /// Ready when the far end is taken to be gone.
    fn poll_dead(&mut self, cx: &mut Context<'_>, pings: &mut Pings, known: &Known) -> Poll<()> {
        if known.meter.open() == 0 {
            // The task that begins a stream polls this.
            (self.round, self.answer_due) = (None, None);
            known.silent.store(false, Ordering::Relaxed);
            return Poll::Pending;
        }
        self.follow(known);
        loop {
            let Some(round) = &mut self.round else { return Poll::Pending };
            ready!(round.as_mut().poll(cx));
            match self.look(pings, known) {
                Some(next) => self.look_at(next),
                None => return Poll::Ready(()),
            }
        }
    }

    /// Begins to look, or to look more often, for a new request; and less often when an old one has its sign of life.
    fn follow(&mut self, known: &Known) {
        let requests = known.requests.load(Ordering::Relaxed);
        let another = requests != self.requests;
        let alive = self.answer_due.is_some() && self.wire.received() != self.received;
        if alive {
            self.answer_due = None;
            known.silent.store(false, Ordering::Relaxed);
        }
        if !alive && self.round.is_some() && (!another || self.every == LOOK || self.answer_due.is_some()) {
            return;
        }
        self.every = if alive && !another { (self.every * 2).min(RARELY) } else { LOOK };
        self.remember(requests);
        self.look_at(Instant::now() + self.every);
    }

    /// When to look next; `None` if the far end is taken to be gone.
    fn look(&mut self, pings: &mut Pings, known: &Known) -> Option<Instant> {
        let now = Instant::now();
        let much = self.wire.sent().saturating_sub(self.sent) > MUCH;
        // What was sent before a PING arrives before it.
        let time = if much { ANSWER_BEHIND_MUCH } else { ANSWER };
        if self.wire.received() != self.received {
            self.remember(known.requests.load(Ordering::Relaxed));
            return Some(now + self.every);
        }
        let Some(until) = self.answer_due else {
            self.remember(known.requests.load(Ordering::Relaxed));
            pings.send();
            self.answer_due = Some(now + time);
            return Some(now + DOUBT);
        };
        known.silent.store(true, Ordering::Relaxed);
        (now < until).then_some(until)
    }

    fn remember(&mut self, requests: usize) {
        (self.received, self.sent, self.requests) = (self.wire.received(), self.wire.sent(), requests);
    }

    fn look_at(&mut self, next: Instant) {
        match &mut self.round {
            Some(round) => round.as_mut().reset(next),
            none => *none = Some(Box::pin(sleep_until(next))),
        }
    }
}

/// The far end has not looked at the request: it left the stream out of a GOAWAY (RFC 9113, 6.8), or refused it (8.7).
#[must_use]
pub(super) fn is_refusal(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM))
}

/// More than any far end allows: it has said nothing yet.
const UNKNOWN: usize = usize::MAX - 1;
/// Requests at a time on one connection at most. More connections would take more system calls and TLS records for the
/// same frames. The smallest windows of so many streams are 16 MiB together.
const STREAMS: usize = 512;
const LOCAL_RESETS: usize = 1024;

/// Interval between two checks of a connection with requests in flight.
const LOOK: Duration = Duration::from_millis(500);
/// Interval between two checks where the same requests have been in flight for long.
const RARELY: Duration = Duration::from_secs(16);
/// Time without an answer to a PING after which further requests go over another connection.
const DOUBT: Duration = Duration::from_millis(300);
/// Timeout of a PING.
const ANSWER: Duration = Duration::from_secs(2);
/// Timeout of a PING behind [`MUCH`] unsent bytes.
const ANSWER_BEHIND_MUCH: Duration = Duration::from_secs(10);
/// Bytes that take a slow path noticeable time.
const MUCH: u64 = 64 * 1024;
