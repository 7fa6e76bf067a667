//! The server side of one connection, of either version of HTTP.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout};

use super::body::Body;
use super::message;
use crate::drain::Stage;
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::server::Server;
use crate::proxy::codec::wire::{Turn, Wire};
use crate::proxy::codec::{HEAD_SIZE, HEADERS, HTTP1_BUFFER};
use crate::proxy::listener::Live;

/// For how long a client may be silent.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// For the first bytes of a connection. Clients that open connections ahead of time use them within it.
    pub first: Duration,
    /// For a request head, from its first byte to its last, and up to twice that.
    pub head: Duration,
    /// A connection on which nothing has moved for so long is ended.
    pub idle: Duration,
    /// The same where the client does not take what is sent to it.
    pub stall: Duration,
}

/// For peers that have proved who they are, and for the local app. The idle time and the stall time are Envoy's.
pub const TIMES: Times = Times {
    first: Duration::from_secs(600),
    head: Duration::from_secs(15),
    idle: Duration::from_secs(3600),
    stall: Duration::from_secs(300),
};

/// Serves requests until the connection ends, is idle for too long, or a drain is over.
pub async fn serve<P, H, F>(wire: Wire, live: watch::Receiver<Live<P>>, times: Times, handle: H) -> Result<(), String>
where
    H: Fn(Request<Incoming>) -> F + Clone,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let mut drain = live.clone();
    let last_moment = async {
        let _ = drain.wait_for(|live| live.stage >= Stage::Draining).await;
        // A request may be on its way already.
        sleep(LAST_MOMENT).await;
    };
    let http2 = tokio::select! {
        first = timeout(times.first, wire.begins_http2()) => first,
        () = last_moment => return Ok(()),
    };
    let http2 = match http2 {
        Ok(Ok(http2)) => http2,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("nothing came within {:?}", times.first)),
    };
    if http2 { serve_http2(wire, live, times, handle).await } else { serve_http1(wire, live, times, handle).await }
}

async fn serve_http2<P, H, F>(wire: Wire, live: watch::Receiver<Live<P>>, times: Times, handle: H) -> Result<(), String>
where
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    wire.follow_blocks();
    let answer = move |request| {
        let response = handle(request);
        async move { finish(response.await, true, None) }
    };
    let connection = Server::new(wire.clone(), wire.is_remote(), answer);
    let watchman = Watchman::new(wire.clone(), times);
    let ended = Box::pin(drive(connection, watchman, live, Server::graceful_shutdown, false)).await;
    // A request that crossed our last GOAWAY is sent elsewhere by whoever reads that; a reset would hide it.
    wire.linger().await;
    ended.map(drop)
}

/// The codec of an idle connection holds some 20 KB, so it is ended where the client does not come back soon, and
/// another one is begun with the next request.
async fn serve_http1<P, H, F>(wire: Wire, live: watch::Receiver<Live<P>>, times: Times, handle: H) -> Result<(), String>
where
    H: Fn(Request<Incoming>) -> F + Clone,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    if wire.agreed_on_http2() {
        return Err("the client agreed on HTTP/2 and does not speak it".into());
    }
    wire.be_strict();
    let mut comes_back = false;
    let ended = loop {
        let (handle, on, upgrades) = (handle.clone(), wire.clone(), wire.upgrades());
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            let leaves = message::leaves_http(&request, &upgrades).then(|| on.clone());
            on.end_is_bodys(request.version() == Version::HTTP_10);
            let (response, on) = (handle(request.map(Incoming::from)), on.clone());
            async move { Ok::<_, Infallible>(finish(response.await, false, leaves).map(|body| body.answers(on))) }
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
        let watchman = Watchman::new(wire.clone(), times);
        match Box::pin(drive(connection, watchman, live.clone(), shut_down, !comes_back)).await {
            Ok(Ended::AtRest) => {}
            Ok(Ended::Over) => break Ok(()),
            Err(error) => break Err(error),
        }
        let since = Instant::now();
        if !wakes(&wire, live.clone(), times).await {
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
async fn wakes<P>(wire: &Wire, mut live: watch::Receiver<Live<P>>, times: Times) -> bool {
    let more = tokio::select! {
        biased;
        more = timeout(times.idle, wire.has_more()) => matches!(more, Ok(Ok(true))),
        _ = live.wait_for(|live| live.stage >= Stage::Draining) => false,
    };
    if !more {
        let _ = timeout(times.head, wire.clone().shutdown()).await;
    }
    more
}

/// Says when the connection ends after this response. `leaves`: what follows the request was not looked at, as it
/// may be of another protocol; the wire under it.
fn finish(mut response: Response<Body>, http2: bool, leaves: Option<Wire>) -> Response<Body> {
    match leaves {
        Some(wire) if response.status() == StatusCode::SWITCHING_PROTOCOLS => wire.upgrade(),
        Some(_) => drop(response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"))),
        None if http2 => drop(response.headers_mut().remove(CONNECTION)),
        None => {}
    }
    response
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
    mut live: watch::Receiver<Live<P>>,
    shut_down: fn(Pin<&mut C>),
    rests: bool,
) -> Result<Ended, String>
where
    C: Future<Output = Result<(), E>>,
    E: std::error::Error,
{
    let (wire, mut observed) = (watchman.wire.clone(), live.clone());
    let mut connection = pin!(Turn::new(connection, wire.clone()));
    let mut draining = pin!(live.wait_for(|live| live.stage >= Stage::Draining));
    let turns = poll_fn(|cx| match connection.as_mut().poll(cx) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending if rests && wire.is_at_rest() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    });
    let at_rest = tokio::select! {
        biased;
        ended = turns => match ended {
            Some(ended) => return ended.map(|()| Ended::Over).map_err(|error| described(&error)),
            None => true,
        },
        _ = &mut draining => false,
        verdict = watchman.verdict() => match verdict {
            Verdict::Slow => return Err(format!("a request head took longer than {:?}", watchman.times.head)),
            Verdict::Stalled => return Err(format!("the client took nothing for {:?}", watchman.times.stall)),
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
            return ended.map(|()| Ended::AtRest).map_err(|error| described(&error));
        }
    }
    tokio::select! {
        biased;
        ended = &mut connection => ended.map(|()| Ended::Over).map_err(|error| described(&error)),
        _ = observed.wait_for(|live| live.stage >= Stage::Closing) => Err("the drain time is over".into()),
    }
}

fn described(error: &impl std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
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

/// For the first bytes of a connection, once a drain has begun.
const LAST_MOMENT: Duration = Duration::from_secs(1);
/// A client that sends the next request within this time is taken to go on doing so.
const SOON: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;

    use tokio::net::UnixStream;

    use super::*;
    use crate::proxy::socket::Socket;

    /// `GET /` for the host `a`, in HPACK.
    const FIELDS: &[u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;

    /// How a connection ends within a minute on which these frames come first.
    async fn ended(frames: &[&[u8]]) -> Option<Result<(), String>> {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (_live, live) = watch::channel(Live { part: Arc::new(()), stage: Stage::Running });
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        client.write_all(&frames.concat()).await.unwrap();
        let answer = |_| pending::<Response<Body>>();
        timeout(Duration::from_secs(60), serve(Wire::plain(Socket::Unix(server)), live, TIMES, answer)).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_block_that_does_not_end_is_cut() {
        let headers = |flags| [&[0, 0, 6, 1, END_STREAM | flags, 0, 0, 0, 1], FIELDS].concat();
        let continuation = |flags| vec![0, 0, 0, 9, flags, 0, 0, 0, 1];
        let whole = headers(END_HEADERS);
        for open in [&[&headers(0)[..]][..], &[&headers(0), &continuation(0)], &[&whole[..9]]] {
            let reason = ended(open).await.expect("it is cut").unwrap_err();
            assert!(reason.contains("request head"), "{reason}");
        }
        for complete in [&[&whole[..]][..], &[&headers(0), &continuation(END_HEADERS)]] {
            assert!(ended(complete).await.is_none());
        }
    }
}
