//! Connections to the local app.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time;

use super::socket::Socket;
use crate::observe::{ConnectError, Destination, Event, LocalAppProblem, Observer};
use crate::snapshot::LocalApp;

/// Connects to the local app within `timeout`.
///
/// # Errors
/// Why it took no connection.
pub(super) async fn connect_app(
    app: &LocalApp,
    timeout: Duration,
    observer: &Observer,
) -> Result<Socket, LocalAppProblem> {
    let destination = Destination::LocalApp(app.clone());
    observer.observe(Event::ConnectStarted(&destination));
    let started = Instant::now();
    let connected = match time::timeout(timeout, Socket::connect_app(app)).await {
        Ok(connected) => connected.map_err(|error| LocalAppProblem::Io(Arc::new(error))),
        Err(_) => Err(LocalAppProblem::TimedOut(timeout)),
    };
    let error = connected.as_ref().err().map(|problem| ConnectError::local_app(app, problem.clone()));
    observer.observe(Event::ConnectEnded {
        destination: &destination,
        took: started.elapsed(),
        result: error.as_ref().map_or(Ok(None), Err),
    });
    connected.map(|socket| socket.counted(observer.local_app()))
}
