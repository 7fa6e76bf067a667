//! The server side of one connection, of either version of HTTP.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONNECTION, EXPECT};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout};

use super::body::Body;
use super::departure::Departure;
use super::grpc::is_grpc;
use super::message;
use super::ongoing::Ongoing;
use crate::drain::Stage;
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::server::Server;
use crate::proxy::codec::turn::Turn;
use crate::proxy::codec::wire::Wire;
use crate::proxy::codec::{HEAD_SIZE, HEADERS, HTTP1_BUFFER};
use crate::proxy::listener::ListenerState;
use crate::proxy::log_limit::LogLimit;
use crate::proxy::outcome::{Fault, Outcome};
use crate::proxy::record::{Host, Shown};
use crate::snapshot::Upgrades;
use crate::tls::SpiffeId;

/// For how long a client may be silent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// For the first bytes of a connection. Clients that open connections ahead of time use them within it.
    pub first: Duration,
    /// For a request head, from its first byte to its last, and up to twice that.
    pub head: Duration,
    /// A connection on which nothing has moved for so long is ended.
    pub idle: Duration,
    /// The same where the client does not take what is sent to it.
    pub stall: Duration,
}

/// Deadlines of authenticated peers and of the local app. The idle time and the stall time are Envoy's.
pub(super) const TIMES: Times = Times {
    first: Duration::from_secs(600),
    head: Duration::from_secs(15),
    idle: Duration::from_secs(3600),
    stall: Duration::from_secs(300),
};

/// The part of a configuration by which requests are served.
pub(super) trait Part {
    /// Whether they are served at all. That may change while a connection is open.
    fn carries_requests(&self) -> bool;

    /// Of the listener, for the log.
    fn name(&self) -> String;
}

/// The settings of a connection, besides its requests.
pub(super) struct Terms<P> {
    state: watch::Receiver<ListenerState<P>>,
    times: Times,
    leaving: Arc<Leaving>,
    remote: Option<SocketAddr>,
    peer: Option<Arc<SpiffeId>>,
    log_limit: LogLimit,
}

impl<P: Part> Terms<P> {
    #[must_use]
    pub(super) fn new(
        state: watch::Receiver<ListenerState<P>>,
        times: Times,
        leaving: Arc<Leaving>,
        remote: Option<SocketAddr>,
        peer: Option<&Arc<SpiffeId>>,
        log_limit: LogLimit,
    ) -> Self {
        Self { state, times, leaving, remote, peer: peer.cloned(), log_limit }
    }

    /// Logs why something is refused that was no request yet.
    fn refused(&self, reason: &str) {
        let is_first = match &self.peer {
            Some(peer) => self.log_limit.is_first(peer, reason),
            None => self.log_limit.is_first(Host(self.remote), reason),
        };
        if is_first {
            tracing::info!(
                target: "proxy",
                listener = self.state.borrow().config.name(),
                source = self.peer.as_deref().map(tracing::field::display),
                src = %Shown(self.remote),
                reason,
                "Refused a malformed request"
            );
        }
    }

    /// Ends when no new request is to be taken.
    async fn leaves(&self) {
        let mut state = self.state.clone();
        tokio::select! {
            _ = state.wait_for(|state| state.stage >= Stage::Draining || !state.config.carries_requests()) => {}
            () = self.leaving.wait() => {}
        }
    }

    /// Ends when the connection is to be closed whatever is under way.
    async fn closes(&self) {
        let (mut state, mut kind) = (self.state.clone(), self.state.clone());
        let carries_bytes = async {
            let _ = kind.wait_for(|state| !state.config.carries_requests()).await;
            sleep(OTHER_KIND).await;
        };
        tokio::select! {
            _ = state.wait_for(|state| state.stage >= Stage::Closing) => {}
            () = carries_bytes => {}
        }
    }
}

/// Whether a connection is to take no new requests, for a reason of its own.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    now: AtomicBool,
    notify: Notify,
}

impl Leaving {
    pub(super) fn set(&self) {
        self.now.store(true, Ordering::Relaxed);
        self.notify.notify_waiters();
    }

    async fn wait(&self) {
        let mut notified = pin!(self.notify.notified());
        notified.as_mut().enable();
        if !self.now.load(Ordering::Relaxed) {
            notified.await;
        }
    }
}

/// Serves requests until the connection ends, is idle for too long, or a drain is over.
pub(super) async fn serve<P, H, F>(wire: Wire, terms: &Terms<P>, handle: H) -> Result<(), Fault>
where
    P: Part,
    H: Fn(Request<ReplayBody>, Ongoing) -> F + Clone,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let last_moment = async {
        terms.leaves().await;
        // A request may be on its way already.
        sleep(LAST_MOMENT).await;
    };
    let http2 = tokio::select! {
        first = timeout(terms.times.first, wire.begins_http2()) => first,
        () = last_moment => return Ok(()),
    };
    let http2 = match http2 {
        Ok(Ok(http2)) => http2,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
        Ok(Err(error)) => return Err(broken(error.to_string())),
        Err(_) => return Err(slow(format!("nothing came within {:?}", terms.times.first))),
    };
    if http2 { serve_http2(wire, terms, handle).await } else { serve_http1(wire, terms, handle).await }
}

async fn serve_http2<P, H, F>(wire: Wire, terms: &Terms<P>, handle: H) -> Result<(), Fault>
where
    P: Part,
    H: Fn(Request<ReplayBody>, Ongoing) -> F,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    wire.follow_frames();
    let answer = move |request: Request<Incoming>| {
        let (request, ongoing) = begin(request, true);
        // Boxed at once, as the state of an answer takes thousands of bytes and is moved on several times.
        let (response, of) = (Box::pin(handle(request, ongoing.clone())), ongoing.clone());
        (async move { finish(response.await.map(|body| body.of(of))) }, ongoing)
    };
    let connection = Server::new(wire.clone(), wire.is_remote(), answer);
    let watchman = Watchman::new(wire.clone(), terms.times);
    let ended = Box::pin(drive(connection, watchman, terms, Server::graceful_shutdown, false, None)).await;
    // A request that crossed our last GOAWAY is sent elsewhere by whoever reads that; a reset would hide it.
    wire.linger().await;
    ended.map(drop)
}

/// The codec of an idle connection holds some 20 KB, so it is ended where the client does not come back soon, and
/// another one is begun with the next request.
async fn serve_http1<P, H, F>(wire: Wire, terms: &Terms<P>, handle: H) -> Result<(), Fault>
where
    P: Part,
    H: Fn(Request<ReplayBody>, Ongoing) -> F + Clone,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    if wire.agreed_on_http2() {
        let reason = "the client agreed on HTTP/2 and does not speak it";
        terms.refused(reason);
        return Err(Fault::new(Outcome::BadRequest, reason));
    }
    wire.be_strict();
    let mut comes_back = false;
    let ended = loop {
        let (handle, on, latest) = (handle.clone(), wire.clone(), UnderWay::default());
        let (ongoing, upgrades) = (latest.clone(), wire.upgrades());
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            on.end_is_bodys(request.version() == Version::HTTP_10);
            let exchange = Http1::new(&request, &upgrades);
            let (request, ongoing) = begin(request.map(Incoming::from), false);
            latest.set(&ongoing);
            let (response, on) = (Box::pin(handle(request, ongoing.clone())), on.clone());
            async move { Ok::<_, Infallible>(exchange.finish(response.await, ongoing, on).await) }
        });
        let connection = http1::Builder::new()
            .auto_date_header(false)
            .header_read_timeout(None)
            .max_headers(HEADERS)
            .max_header_size(HEAD_SIZE)
            .max_buf_size(HTTP1_BUFFER)
            .half_close(true)
            .serve_connection(TokioIo::new(wire.clone()), service)
            .with_upgrades();
        let shut_down = http1::UpgradeableConnection::graceful_shutdown;
        let watchman = Watchman::new(wire.clone(), terms.times);
        match Box::pin(drive(connection, watchman, terms, shut_down, !comes_back, Some(ongoing))).await {
            Ok(Ended::AtRest) => {}
            Ok(Ended::Over) => break Ok(()),
            Err(error) => break Err(error),
        }
        let since = Instant::now();
        if !wakes(&wire, terms).await {
            break Ok(());
        }
        comes_back = since.elapsed() < SOON;
    };
    if ended.is_err() {
        // Now, and not when the wire has lingered: the client waits for more of the response.
        wire.give_up().await;
    }
    wire.linger().await;
    ended
}

/// Waits for more on a connection between two requests; false once there will be none, and the wire is shut down.
async fn wakes<P: Part>(wire: &Wire, terms: &Terms<P>) -> bool {
    let more = tokio::select! {
        biased;
        more = timeout(terms.times.idle, wire.has_more()) => matches!(more, Ok(Ok(true))),
        () = terms.leaves() => false,
    };
    if !more {
        let _ = timeout(terms.times.head, wire.clone().shutdown()).await;
    }
    more
}

/// A request as handlers take it, and what the connection sees of it.
fn begin(request: Request<Incoming>, http2: bool) -> (Request<ReplayBody>, Ongoing) {
    let grpc = http2 && is_grpc(request.headers());
    let (parts, body) = request.into_parts();
    let (body, upload) = ReplayBody::new(body);
    (Request::from_parts(parts, body), Ongoing::new(upload, grpc))
}

/// The parts of an HTTP/1 request that its response depends on.
struct Http1 {
    /// What follows it was not looked at, as it may be of another protocol.
    leaves: bool,
    /// The client waits for `100 Continue` before it sends the body.
    expects: bool,
}

impl Http1 {
    fn new<B>(request: &Request<B>, upgrades: &Upgrades) -> Self {
        Self { leaves: message::leaves_http(request, upgrades), expects: request.headers().contains_key(EXPECT) }
    }

    /// Says when the connection ends after this response.
    async fn finish(self, response: Response<Body>, ongoing: Ongoing, wire: Wire) -> Response<Body> {
        let mut response = response;
        let upgrades = self.leaves && response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if upgrades {
            wire.upgrade();
        } else if self.leaves || !self.is_read(response.body(), &ongoing).await {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        wire.begins_answer();
        response.map(|body| body.of(ongoing).answers(wire))
    }

    /// Whether all of the request has been read, so that another can follow it. A little that nobody wants is read now.
    async fn is_read(&self, answer: &Body, ongoing: &Ongoing) -> bool {
        let Some(upload) = ongoing.upload() else { return true };
        if upload.is_whole() {
            return true;
        }
        let may_drain = answer.is_ours() && !self.expects;
        may_drain && matches!(timeout(DRAIN_TIME, upload.drain(DRAIN_BYTES)).await, Ok(true))
    }
}

/// HTTP/2 has other words for what ends a connection.
fn finish(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().remove(CONNECTION);
    response
}

/// The request that is under way on an HTTP/1 connection.
#[derive(Clone, Default)]
struct UnderWay(Arc<Mutex<Option<Ongoing>>>);

impl UnderWay {
    fn set(&self, ongoing: &Ongoing) {
        *self.lock() = Some(ongoing.clone());
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ongoing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready once it must end.
    fn poll_over(&self, cx: &mut Context<'_>) -> Poll<Ongoing> {
        match &*self.lock() {
            Some(ongoing) => ongoing.poll_over(cx).map(|()| ongoing.clone()),
            None => Poll::Pending,
        }
    }
}

/// How a codec's connection ended well.
enum Ended {
    Over,
    /// The wire is still open, and nothing is under way on it.
    AtRest,
}

/// `rests`: it is to end as soon as nothing is under way, not only after a while.
async fn drive<C, P, E>(
    connection: C,
    mut watchman: Watchman,
    terms: &Terms<P>,
    shut_down: fn(Pin<&mut C>),
    rests: bool,
    under_way: Option<UnderWay>,
) -> Result<Ended, Fault>
where
    C: Future<Output = Result<(), E>>,
    P: Part,
    E: CodecError,
{
    let wire = watchman.wire.clone();
    let mut connection = pin!(Turn::new(connection, wire.clone()));
    let mut guard = Guard { under_way, departure: Departure::default(), wire: wire.clone(), terms, refused: false };
    let turns = poll_fn(|cx| match guard.poll(cx, connection.as_mut()) {
        Poll::Pending if rests && wire.is_at_rest() => Poll::Ready(None),
        polled => polled.map(Some),
    });
    let at_rest = tokio::select! {
        biased;
        ended = turns => match ended {
            Some(ended) => return ended.map(|()| Ended::Over),
            None => true,
        },
        () = terms.leaves() => false,
        verdict = watchman.verdict() => match verdict {
            Verdict::Slow => {
                let reason = format!("a request head took longer than {:?}", watchman.times.head);
                terms.refused(&reason);
                return Err(slow(reason));
            }
            Verdict::Stalled => return Err(slow(format!("the client took nothing for {:?}", watchman.times.stall))),
            Verdict::AtRest => true,
            Verdict::Idle => false,
        },
    };
    wire.outlives_codec(at_rest);
    shut_down(connection.as_mut().connection());
    if at_rest {
        // Whether nothing is under way the codec knows best. If something is, it is the last on this connection.
        let ended = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await;
        wire.outlives_codec(false);
        if let Poll::Ready(ended) = ended {
            return ended.map(|()| Ended::AtRest).map_err(|error| guard.fault(&error));
        }
    }
    tokio::select! {
        biased;
        ended = poll_fn(|cx| guard.poll(cx, connection.as_mut())) => ended.map(|()| Ended::Over),
        () = terms.closes() => Err(Fault::new(Outcome::Drained, "the time for what was under way is over")),
    }
}

/// Looks after what the codec of a connection has under way, and what it refuses, beside it.
struct Guard<'a, P> {
    /// `None` for HTTP/2, whose streams look after themselves.
    under_way: Option<UnderWay>,
    departure: Departure,
    wire: Wire,
    terms: &'a Terms<P>,
    /// The refused request has been reported.
    refused: bool,
}

impl<P: Part> Guard<'_, P> {
    /// Polls the codec, and then whether it must end or its client is gone.
    fn poll<C, E>(&mut self, cx: &mut Context<'_>, mut connection: Pin<&mut Turn<C>>) -> Poll<Result<(), Fault>>
    where
        C: Future<Output = Result<(), E>>,
        E: CodecError,
    {
        let ended = connection.as_mut().poll(cx);
        if let Some(reason) = self.wire.take_refusal() {
            self.refused = true;
            self.terms.refused(reason);
        }
        if let Poll::Ready(ended) = ended {
            return Poll::Ready(ended.map_err(|error| self.fault(&error)));
        }
        let Some(under_way) = &self.under_way else { return Poll::Pending };
        if let Poll::Ready(ongoing) = under_way.poll_over(cx) {
            // The answer's body, or whoever waits for the answer, ends it if the codec asks.
            if let Poll::Ready(ended) = connection.poll(cx) {
                return Poll::Ready(ended.map_err(|error| self.fault(&error)));
            }
            if !ongoing.is_done() {
                self.wire.breaks_off();
                return Poll::Ready(Err(broken("an answer was ended that the client does not take".into())));
            }
        }
        self.departure.poll(cx, &self.wire).map(Err)
    }

    /// Why the codec has ended the connection, for the log, which has it at once where what came is refused.
    fn fault(&self, error: &impl CodecError) -> Fault {
        let cause = match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        let Some(what) = error.refuses() else { return broken(cause) };
        if !self.refused {
            self.terms.refused(&format!("{what}: {cause}"));
        }
        Fault::new(Outcome::BadRequest, cause)
    }
}

fn broken(cause: String) -> Fault {
    Fault::new(Outcome::ClientReset, cause)
}

fn slow(cause: String) -> Fault {
    Fault::new(Outcome::IdleUpload, cause)
}

/// An error that ends a codec.
trait CodecError: std::error::Error {
    /// Why what the client sent is none of its protocol, if that is the error.
    fn refuses(&self) -> Option<&'static str>;
}

impl CodecError for hyper::Error {
    fn refuses(&self) -> Option<&'static str> {
        self.is_parse().then_some("the head of a request is malformed or too large")
    }
}

impl CodecError for h2::Error {
    fn refuses(&self) -> Option<&'static str> {
        const WHAT: &str =
            "a frame is out of place or malformed, or a header block can't be decoded or has a path that is not UTF-8";
        self.is_library().then_some(WHAT)
    }
}

/// Looks at a connection now and then, so that no request needs a timer for these limits.
struct Watchman {
    wire: Wire,
    times: Times,
    rounds: Interval,
    /// As of the last round.
    moved: u64,
    heads: u64,
    still: u32,
}

enum Verdict {
    Idle,
    /// Nothing is under way, and nothing has moved in the last round.
    AtRest,
    Slow,
    /// The client does not take what is sent to it.
    Stalled,
}

impl Watchman {
    fn new(wire: Wire, times: Times) -> Self {
        let mut rounds = interval_at(Instant::now() + times.head, times.head);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { wire, times, rounds, moved: 0, heads: 0, still: 0 }
    }

    /// May be dropped and called again.
    async fn verdict(&mut self) -> Verdict {
        loop {
            self.rounds.tick().await;
            let (moved, begun_head) = self.wire.progress();
            match begun_head {
                Some(head) if head == self.heads => return Verdict::Slow,
                Some(head) => self.heads = head,
                None => self.heads = 0,
            }
            self.still = if moved == self.moved { self.still + 1 } else { 0 };
            self.moved = moved;
            let still = self.times.head * self.still;
            if still >= self.times.stall && self.wire.has_unsent() {
                return Verdict::Stalled;
            }
            if still >= self.times.idle {
                return Verdict::Idle;
            }
            if self.still > 0 && self.wire.is_at_rest() {
                return Verdict::AtRest;
            }
        }
    }
}

/// Time for requests in flight when the protocol of a listener has changed; Envoy's drain time.
const OTHER_KIND: Duration = Duration::from_secs(600);
/// Time for the first bytes of a connection once a drain has begun.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// Bytes of an unwanted request body that are read, so that the connection can be used again.
const DRAIN_BYTES: u64 = 64 * 1024;
/// Time for which an unwanted request body is read.
const DRAIN_TIME: Duration = Duration::from_millis(250);
/// A client that sends its next request within this time is expected to go on doing so.
const SOON: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::net::UnixStream;

    use super::*;
    use crate::proxy::socket::Socket;

    impl Part for () {
        fn carries_requests(&self) -> bool {
            true
        }

        fn name(&self) -> String {
            String::new()
        }
    }

    /// `GET /` for the host `a`, in HPACK.
    const FIELDS: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;

    /// How a connection ends within a minute on which these frames come first.
    async fn ended(frames: &[&[u8]]) -> Option<Result<(), Fault>> {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (_live, state) = watch::channel(ListenerState { config: Arc::new(()), stage: Stage::Running });
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        client.write_all(&frames.concat()).await.unwrap();
        let answer = |_, _| pending::<Response<Body>>();
        timeout(
            Duration::from_secs(60),
            serve(
                Wire::plain(Socket::unix(server)),
                &Terms::new(state, TIMES, Arc::default(), None, None, LogLimit::default()),
                answer,
            ),
        )
        .await
        .ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_block_that_does_not_end_is_cut() {
        let headers = |flags| [&[0, 0, 6, 1, END_STREAM | flags, 0, 0, 0, 1], FIELDS].concat();
        let continuation = |flags| vec![0, 0, 0, 9, flags, 0, 0, 0, 1];
        let whole = headers(END_HEADERS);
        for open in [&[&headers(0)[..]][..], &[&headers(0), &continuation(0)], &[&whole[..9]]] {
            let fault = ended(open).await.expect("it is cut").unwrap_err();
            assert!(fault.cause.contains("request head"), "{fault}");
        }
        for complete in [&[&whole[..]][..], &[&headers(0), &continuation(END_HEADERS)]] {
            assert!(ended(complete).await.is_none());
        }
    }
}
