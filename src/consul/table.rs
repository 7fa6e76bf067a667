//! Table watches: one request that notices when any of many answers may have changed.
//!
//! Each of them wakes, or shows another index, although its filter leaves nothing and the token may see nothing of
//! what changed (tried with Consul 1.8.7, 1.19.2 and 1.22).

use std::time::Duration;

use reqwest::Method;

use super::endpoint::{Flow, Request, Response, Table};

/// Interval between two looks at the index of the config entries: no endpoint blocks on the index of all kinds.
const CONFIG_ENTRIES_PERIOD: Duration = Duration::from_secs(2);
/// The same interval for [`LIVELY`] after a change.
const LIVELY_PERIOD: Duration = Duration::from_secs(1);
/// Time after a change for which the index is looked at more often.
const LIVELY: Duration = Duration::from_secs(60);

impl Table {
    /// The smallest answer that carries the table's index.
    pub(super) fn request(&self) -> Request {
        match self {
            // Its index is that of nodes, services, checks, and what gateways stand for. Agents before 1.9 leave the
            // last out.
            Self::Instances(datacenter) => Request::new(Method::GET, &["internal", "ui", "services"])
                .param("dc", datacenter.as_deref())
                .param("filter", Some("Service.ID == \"\"")),
            // There is at most one of this kind, any token may read it, and the index is that of all kinds.
            Self::ConfigEntries => Request::new(Method::GET, &["config", "proxy-defaults"]),
        }
    }

    pub(super) fn flow(&self) -> Flow {
        match self {
            Self::Instances(_) => Flow::Index,
            Self::ConfigEntries => Flow::Poll(CONFIG_ENTRIES_PERIOD),
        }
    }
}

/// The smallest answer that carries the index of the intentions' table: there is none of this id.
pub(super) fn intentions() -> Request {
    Request::new(Method::GET, &["connect", "intentions"]).param("filter", Some("ID == \"\""))
}

/// When a table is looked at again that cannot be blocked on, so long after its last change. `None` is one that has not changed.
pub(super) fn period(since_change: Option<Duration>) -> Duration {
    if since_change.is_some_and(|since| since < LIVELY) { LIVELY_PERIOD } else { CONFIG_ENTRIES_PERIOD }
}

/// The index of a table; `None` where it cannot be relied on, since another server than the leader may have answered.
pub(super) fn index(response: &Response) -> Option<u64> {
    response.index.filter(|_| !response.stale)
}

/// Whether the agent is one before 1.9. There, what a terminating gateway stands for changes with the config entries.
pub(super) fn is_before_1_9(response: &Response) -> bool {
    response.default_policy.is_none()
}
