//! Exposed paths: plaintext listeners for health checks and scrapes, which know no identity.

use std::sync::Arc;

use super::http::expose::{Exposure, Plan};
use super::http::request_record::ConnectionInfo;
use super::listener::Accepted;
use super::log_limit::LogLimit;
use super::outcome::{Fault, Outcome};
use super::places::Places;
use super::record::{Direction, Record};
use crate::access_log::AccessLog;

/// Connections to one such listener at a time, as whoever reaches it may connect. The next takes the place of the oldest.
pub(super) const CONNECTIONS: usize = 256;

/// Serves one connection, whose requests have a task of their own.
pub(super) async fn serve(accepted: Accepted<Plan>, access_log: AccessLog, places: Arc<Places>, log_limit: LogLimit) {
    let Accepted { socket, remote, live, drain } = accepted;
    let mut record = Record::new(Direction::Inbound, remote);
    let caller = ConnectionInfo { access_log, remote, local: socket.local_address(), ..ConnectionInfo::default() };
    let connection = Exposure { live, caller, log_limit };
    let mut place = places.take();
    tokio::spawn(async move {
        let ended = tokio::select! {
            biased;
            ended = connection.serve(socket) => ended,
            () = place.lost() => Err(Fault::new(Outcome::Displaced, "its place was taken by a newer connection")),
        };
        record.result(&ended);
        drop(drain);
    });
}
