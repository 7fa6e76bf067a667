//! Connections that leave HTTP behind: WebSocket and whatever else a client and an app agree on.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Response};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::body::{Body, ResponseTail};
use super::deadlines::Deadlines;
use crate::drain::{self, Stage};
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::wire::Wire;
use crate::proxy::listener::ListenerState;
use crate::stats::ListenerStats;

/// Joins both connections after the response that says so, and gives that response. They are cut at the end of a
/// drain, when `may_stay` says no of a newer configuration, or when nothing has moved for the idle time of the exchange.
pub(super) fn join<P: Send + Sync + 'static>(
    client: OnUpgrade,
    mut response: Response<Incoming>,
    rest: ResponseTail,
    mut state: watch::Receiver<ListenerState<P>>,
    drain: drain::Watch,
    stats: &Arc<ListenerStats>,
    mut may_stay: impl FnMut(&P) -> bool + Send + 'static,
) -> Response<Body> {
    let server = hyper::upgrade::on(&mut response);
    let counted = Counted::new(stats);
    let idle = rest.deadlines.as_ref().and_then(Deadlines::idle);
    tokio::spawn(async move {
        let _held = (rest, drain, counted);
        let Ok(Ok(mut joined)) = timeout(TAKE_TIME, take_both(client, server)).await else { return };
        let wires = [joined.client.clone(), joined.server.clone()];
        let copied = tokio::select! {
            biased;
            () = stands_still(wires, idle) => None,
            _ = state.wait_for(|state| state.stage >= Stage::Closing || !may_stay(&state.config)) => None,
            copied = joined.copy() => Some(copied),
        };
        match copied {
            None => joined.close().await,
            Some(Err(error)) => {
                tracing::debug!(target: "proxy", %error, "An upgraded connection broke off");
                joined.abort();
            }
            Some(Ok(())) => {}
        }
    });
    let (mut parts, _) = response.into_parts();
    let protocol = parts.headers.remove(UPGRADE);
    super::message::strip(&mut parts.headers);
    parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        parts.headers.insert(UPGRADE, protocol);
    }
    Response::from_parts(parts, Body::empty())
}

/// Counts an upgraded connection until it is dropped.
struct Counted(Arc<ListenerStats>);

impl Counted {
    fn new(stats: &Arc<ListenerStats>) -> Self {
        stats.upgrades_active.increment();
        Self(Arc::clone(stats))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.upgrades_active.decrement();
    }
}

/// Both connections, without their codecs.
struct Joined {
    client: Wire,
    server: Wire,
    /// Bytes that the codecs have read beyond their messages.
    sent: [bytes::Bytes; 2],
}

async fn take_both(client: OnUpgrade, server: OnUpgrade) -> io::Result<Joined> {
    let (client, server) = tokio::try_join!(client, server).map_err(io::Error::other)?;
    let (client, client_sent) = take(client)?;
    let (server, server_sent) = take(server)?;
    Ok(Joined { client, server, sent: [client_sent, server_sent] })
}

impl Joined {
    async fn copy(&mut self) -> io::Result<()> {
        let Self { client, server, sent: [client_sent, server_sent] } = self;
        server.write_all(client_sent).await?;
        client.write_all(server_sent).await?;
        server.flush().await?;
        client.flush().await?;
        copy_bidirectional_with_sizes(client, server, BUFFER, BUFFER).await.map(drop)
    }

    /// Ends both cleanly although neither has.
    async fn close(mut self) {
        let _ = tokio::join!(timeout(TAKE_TIME, self.client.shutdown()), timeout(TAKE_TIME, self.server.shutdown()));
        tokio::join!(self.client.linger(), self.server.linger());
    }

    /// Passes on that one of them broke off.
    fn abort(self) {
        self.client.abort();
        self.server.abort();
    }
}

/// Ends when nothing has moved on either wire for `idle`, give or take a part of it.
async fn stands_still(wires: [Wire; 2], idle: Option<Duration>) {
    let Some(idle) = idle else { return pending().await };
    let progress = || wires.each_ref().map(|wire| wire.progress().0);
    let (mut before, mut still) = (progress(), 0);
    while still < LOOKS {
        sleep((idle / LOOKS).max(SHORTEST)).await;
        let now = progress();
        still = if now == before { still + 1 } else { 0 };
        before = now;
    }
}

/// The wire under a connection, and what the codec has read of it beyond its own.
fn take(upgraded: Upgraded) -> io::Result<(Wire, bytes::Bytes)> {
    let parts = upgraded.downcast::<TokioIo<Wire>>().map_err(|_| io::ErrorKind::Unsupported)?;
    let wire = parts.io.into_inner();
    wire.release();
    Ok((wire, parts.read_buf))
}

/// Time for the codecs to release their connections, and for a clean end to be sent.
const TAKE_TIME: Duration = Duration::from_secs(1);
const BUFFER: usize = 16 * 1024;
/// Checks within the idle time whether a byte has moved.
const LOOKS: u32 = 8;
/// Shortest interval between two such checks.
const SHORTEST: Duration = Duration::from_millis(10);
