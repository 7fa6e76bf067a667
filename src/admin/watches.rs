//! `/debug/watches`: what the agent is asked, how, and what it answered.

use serde_json::{Value, json};

use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use crate::stats::agent::{AgentNow, AgentQuery};

pub(super) fn watches(state: &State, _: &Query) -> Reply {
    let now = (state.agent)();
    let mut about = agent(&now);
    about["watches"] = list(&now);
    reply::json(&about)
}

/// The agent, without the queries.
pub(super) fn agent(now: &AgentNow) -> Value {
    let requests =
        now.requests.iter().map(|(kind, result, count)| json!({ "kind": kind, "result": result, "count": count }));
    json!({
        "address": now.address,
        "connections": now.connections,
        "room": now.room,
        "requests_active": now.requests_active,
        "requests": requests.collect::<Vec<_>>(),
    })
}

/// Each query. Times are seconds.
pub(super) fn list(now: &AgentNow) -> Value {
    now.queries.iter().map(query).collect()
}

fn query(query: &AgentQuery) -> Value {
    json!({
        "what": query.what,
        "kind": query.kind,
        "request": query.request,
        "how": query.how,
        "table": query.table,
        "state": query.state,
        "under_way": query.under_way,
        "blocks_for": query.blocks_for,
        "rotates": query.rotates,
        "next": query.next,
        "age": query.age,
        "index": query.index,
        "answered_by": query.answered_by,
        "failing": query.is_failing,
        "error": query.error.as_ref().map(|(error, _)| error),
        "error_age": query.error.as_ref().map(|(_, ago)| ago),
        "requests": query.requests,
        "errors": query.errors,
    })
}
