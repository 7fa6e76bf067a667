//! The server side of one connection, of either version of HTTP.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval_at, timeout};

use super::body::Body;
use super::message;
use super::wire::{Turn, Wire};
use super::{CONNECTION_WINDOW, HEAD_SIZE, HEADERS, STREAM_WINDOW};
use crate::drain::Stage;
use crate::proxy::listener::Live;

/// Serves requests until the connection ends, is idle for too long, or a drain is over.
pub async fn serve<P, H, F>(wire: Wire, live: watch::Receiver<Live<P>>, handle: H) -> Result<(), String>
where
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let mut drain = live.clone();
    let http2 = tokio::select! {
        first = timeout(FIRST_TIME, wire.begins_http2()) => first,
        // Nobody waits for an answer yet.
        _ = drain.wait_for(|live| live.stage >= Stage::Draining) => return Ok(()),
    };
    let http2 = match http2 {
        Ok(Ok(http2)) => http2,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("nothing came within {FIRST_TIME:?}")),
    };
    let upgradable = wire.clone();
    let service = service_fn(move |request| {
        let leaves = (!http2 && message::leaves_http(&request)).then(|| upgradable.clone());
        let response = handle(request);
        async move { Ok::<_, Infallible>(finish(response.await, http2, leaves)) }
    });
    if http2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .auto_date_header(false)
            .max_concurrent_streams(STREAMS)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(LOCAL_RESETS)
            .max_header_list_size(u32::try_from(HEAD_SIZE).unwrap_or(u32::MAX))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .serve_connection(TokioIo::new(wire.clone()), service);
        drive(connection, wire, live, http2::Connection::graceful_shutdown).await
    } else {
        wire.be_strict();
        let connection = http1::Builder::new()
            .auto_date_header(false)
            .header_read_timeout(None)
            .max_headers(HEADERS)
            .max_header_size(HEAD_SIZE)
            .half_close(true)
            .serve_connection(TokioIo::new(wire.clone()), service)
            .with_upgrades();
        let ended = drive(connection, wire.clone(), live, http1::UpgradeableConnection::graceful_shutdown).await;
        wire.linger().await;
        ended
    }
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

async fn drive<C, P>(
    connection: C,
    wire: Wire,
    mut live: watch::Receiver<Live<P>>,
    shut_down: fn(Pin<&mut C>),
) -> Result<(), String>
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut observed = live.clone();
    let mut connection = pin!(Turn::new(connection, wire.clone()));
    let mut draining = pin!(live.wait_for(|live| live.stage >= Stage::Draining));
    let mut watchman = Watchman::new(wire);
    tokio::select! {
        biased;
        ended = &mut connection => return ended.map_err(|error| described(&error)),
        _ = &mut draining => {}
        verdict = watchman.verdict() => if let Verdict::Slow = verdict {
            return Err(format!("a request head took longer than {HEAD_TIME:?}"));
        },
    }
    shut_down(connection.as_mut().connection());
    tokio::select! {
        biased;
        ended = &mut connection => ended.map_err(|error| described(&error)),
        _ = observed.wait_for(|live| live.stage >= Stage::Closing) => Err("the drain time is over".into()),
    }
}

fn described(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Looks at a connection now and then, so that no request needs a timer for these limits.
struct Watchman {
    wire: Wire,
    rounds: Interval,
    /// As of the last round.
    moved: u64,
    heads: u64,
    still: u32,
}

enum Verdict {
    Idle,
    Slow,
}

impl Watchman {
    fn new(wire: Wire) -> Self {
        let mut rounds = interval_at(tokio::time::Instant::now() + HEAD_TIME, HEAD_TIME);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { wire, rounds, moved: 0, heads: 0, still: 0 }
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
            if self.still >= IDLE_ROUNDS {
                return Verdict::Idle;
            }
        }
    }
}

/// For the first bytes of a connection. Clients that open connections ahead of time use them within it.
const FIRST_TIME: Duration = Duration::from_secs(600);
/// For a request head, from its first byte to its last, and up to twice that.
const HEAD_TIME: Duration = Duration::from_secs(15);
/// A connection on which nothing has moved for an hour is ended, as by Envoy.
const IDLE_ROUNDS: u32 = 240;

/// Requests at a time on one HTTP/2 connection.
const STREAMS: u32 = 256;
/// Streams that a client may have opened and reset before we looked at them ("rapid reset").
const PENDING_RESETS: usize = 32;
/// Streams that we may have reset over a connection's errors.
const LOCAL_RESETS: usize = 256;
