//! Exposed paths: plaintext listeners for health checks and scrapes, which know no identity.

use super::http::expose::{Exposure, Plan};
use super::http::note::Caller;
use super::listener::Accepted;
use super::record::{Direction, Record};
use crate::access_log::AccessLog;

/// Serves one connection, whose requests have a task of their own.
pub async fn serve(accepted: Accepted<Plan>, access_log: AccessLog) {
    let Accepted { socket, remote, live, drain } = accepted;
    let mut record = Record::new(Direction::Inbound, remote);
    let caller = Caller { access_log, remote, local: socket.local_address(), ..Caller::default() };
    let connection = Exposure { live, caller };
    tokio::spawn(async move {
        let ended = connection.serve(socket).await;
        record.finish(ended.as_ref().map_or_else(String::as_str, |()| "ended"));
        drop(drain);
    });
}
