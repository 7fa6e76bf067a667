//! Exposed paths: plaintext listeners for health checks and scrapes, which know no identity.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::http::expose::Exposure;
use super::http::note::Caller;
use super::http::pool::Pool;
use super::listener::Accepted;
use super::record::{Direction, Record};
use crate::access_log::AccessLog;
use crate::snapshot::Exposed;

/// The paths of one listener, with connections to the app for each.
#[derive(Debug)]
pub struct Plan {
    pub exposed: Arc<Exposed>,
    pub pools: BTreeMap<String, Pool>,
}

impl Plan {
    #[must_use]
    pub fn new(exposed: Arc<Exposed>) -> Self {
        let pools = exposed.paths.keys().map(|path| (path.clone(), Pool::default())).collect();
        Self { exposed, pools }
    }
}

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
