//! Exposed paths: plaintext listeners for health checks and scrapes, which know no identity.

use std::sync::Arc;

use super::http::expose::{Exposure, Plan};
use super::http::request_record::RequestObserver;
use super::listener::Accepted;
use super::log_limit::LogLimit;
use super::outcome::{Fault, Outcome};
use super::places::Places;
use super::record::Record;
use crate::observe::{ConnectionInfo, Listener, Observer};

/// Concurrent connections of one listener of an exposed path, which has no authentication. A new one replaces the
/// oldest.
pub(super) const CONNECTIONS: usize = 256;

/// Serves one connection, whose requests have a task of their own.
pub(super) async fn serve(accepted: Accepted<Plan>, observer: Observer, places: Arc<Places>, log_limit: LogLimit) {
    let Accepted { socket, remote, state, drain, stats } = accepted;
    let local = if observer.access_log().is_on() { socket.local_address().map(Box::new) } else { None };
    let listener = Listener::Exposed(Arc::clone(&state.borrow().config.exposed));
    let mut record =
        Record::accepted(&observer, ConnectionInfo { listener, stats, remote, local, peer: None, caller: None });
    let requests = RequestObserver { observer, connection: Arc::new(record.info().clone()) };
    let connection = Exposure { state, remote, requests, log_limit };
    let mut place = places.take();
    tokio::spawn(async move {
        let ended = tokio::select! {
            biased;
            ended = connection.serve(socket) => ended,
            () = place.lost() => Err(Fault::new(Outcome::Displaced, "its place was taken by a newer connection")),
        };
        record.result(ended);
        drop(drain);
    });
}
