//! The admin server: what the process is doing, for people, probes and dashboards.
//!
//! It looks on, and is above the data plane: `app` hands it what it reads ([`State`]). What only reads is GET; what
//! changes something is POST. Envoy's paths answer in Envoy's shapes, as probes, `consul troubleshoot` and
//! dashboards read them; ours are `/livez`, `/readyz`, `/metrics`, `/status` and `/explain`.

mod announce;
mod certs;
#[cfg(test)]
mod docs;
mod envoy;
mod explain;
mod explanation;
mod guard;
mod intentions;
mod listen;
mod page;
mod process;
mod query;
mod reply;
mod routes;
mod scrape;
mod sinks;
mod stall;
mod state;
mod stats;
mod statsd;
mod status;
mod watches;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body::Body;
use hyper::body::Incoming;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::either::Either;

pub use self::announce::{Announced, announced};
pub use self::explanation::Explanation;
use self::guard::Hosts;
use self::listen::Listener;
use self::scrape::Tls;
use self::stall::StallLimit;
pub use self::state::{Command, Started, State, Watched};
use crate::config::AdminSettings;
use crate::stats::value::{Counter, Gauge};

/// Concurrent connections of one listener.
const CONNECTIONS: usize = 64;
/// Time for a client to send the head of a request, and for a TLS handshake.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// The paths that a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Everything, to those who reach the admin address.
    Admin,
    /// `/ready` alone.
    Ready,
    /// Metrics alone, under one path.
    Prometheus,
    /// Paths that begin with `/stats`.
    Stats,
}

/// Binds the admin server and what else the settings ask for, and serves until the process ends.
///
/// # Errors
/// When an address that was asked for can't be bound. The default one gives way to the next that is free.
pub async fn run(settings: &AdminSettings, state: Arc<State>) -> anyhow::Result<()> {
    let admin = listen::admin(&settings.bind)?;
    if let Some(admin) = &admin {
        tracing::info!(target: "admin", address = %admin.address(), "Admin server started");
        state.set_admin_address(admin.address());
    }
    let ready = settings.ready.map(listen::tcp).transpose()?;
    let admin = async {
        match admin {
            Some(listener) => {
                let address = listener.address();
                tokio::join!(serve(listener, Scope::Admin, None, Arc::clone(&state)), announce::serve(&address));
            }
            None => std::future::pending().await,
        }
    };
    let ready = async {
        match ready {
            Some(listener) => serve(listener, Scope::Ready, None, Arc::clone(&state)).await,
            None => std::future::pending().await,
        }
    };
    tokio::join!(admin, ready, sinks::follow(&state));
    Ok(())
}

/// Accepts without end. `tls` is for scrapes.
async fn serve(mut listener: Listener, scope: Scope, mut tls: Option<Tls>, state: Arc<State>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Before `accept`: connections beyond the limit wait in the kernel's queue and cost this process nothing.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::debug!(target: "admin", %error, "A connection could not be accepted");
                // Out of descriptors, most likely: some are free again in a moment.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let state = Arc::clone(&state);
        let hosts = match (scope, &connection) {
            (Scope::Admin, Either::Left(_)) => Hosts::Own,
            _ => Hosts::Any,
        };
        let acceptor = tls.as_mut().and_then(Tls::acceptor);
        tokio::spawn(async move {
            match acceptor {
                None => serve_connection(connection, hosts, scope, state).await,
                Some(acceptor) => match timeout(HEAD_TIMEOUT, acceptor.accept(connection)).await {
                    Ok(Ok(stream)) => serve_connection(stream, hosts, scope, state).await,
                    Ok(Err(error)) => tracing::debug!(target: "admin", %error, "A scraper's TLS handshake failed"),
                    Err(_) => tracing::debug!(target: "admin", "A scraper's TLS handshake took too long"),
                },
            }
            drop(permit);
        });
    }
}

async fn serve_connection<S>(connection: S, hosts: Hosts, scope: Scope, state: Arc<State>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let counted = matches!(scope, Scope::Prometheus | Scope::Stats);
    let scrapes = counted.then_some(&state.stats.scrapes);
    let _connection = scrapes.map(|scrapes| Counted::new(&scrapes.connections, &scrapes.connections_active));
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move {
            let _request = scrapes.map(|scrapes| Counted::new(&scrapes.requests, &scrapes.requests_active));
            Ok::<_, Infallible>(routes::answer(request, scope, hosts, &state).await)
        }
    });
    if let Err(error) = serve_http(connection, service).await {
        tracing::debug!(target: "admin", %error, "A connection to the admin server ended early");
    }
}

/// Ends when the client does not send the next request in time, or does not read its answer.
async fn serve_http<S, H, B>(connection: S, service: H) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: HttpService<Incoming, ResBody = B, Error = Infallible>,
    B: Body<Error = Infallible> + 'static,
{
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(64 * 1024);
    http.serve_connection(TokioIo::new(StallLimit::new(connection)), service).await
}

/// Something that goes on until it is dropped.
struct Counted<'a>(&'a Gauge);

impl<'a> Counted<'a> {
    fn new(all: &Counter, active: &'a Gauge) -> Self {
        all.increment();
        active.increment();
        Self(active)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.decrement();
    }
}
