//! `/status`: what this sidecar does, in one answer; and `/events`, the same each second.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior};

use super::process;
use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use super::watches;
use crate::observe::{Problem, listener_name, target_name};
use crate::snapshot::{InboundListener, Intention, OutboundListener, Target};
use crate::stats::scope::{Cluster, Listener};
use crate::stats::value::BOUNDS;
use crate::stats::{LimitNow, ListenerStats, Member};

/// Interval between two events of `/events`.
const PERIOD: Duration = Duration::from_secs(1);

pub(super) fn status(state: &State, _: &Query) -> Reply {
    reply::json(&value(state))
}

/// The state now and then each second, as server-sent events (HTML, section 9.2).
pub(super) fn events(state: &Arc<State>) -> Reply {
    let Ok(place) = Arc::clone(&state.streams).try_acquire_owned() else {
        return reply::status(StatusCode::SERVICE_UNAVAILABLE, "as many look on as may: close another page\n");
    };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let body = Events { state: Arc::clone(state), ticks, _place: place };
    let mut reply = reply::text("").map(|_| body.boxed());
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    reply
}

struct Events {
    state: Arc<State>,
    ticks: Interval,
    _place: OwnedSemaphorePermit,
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        ready!(self.ticks.poll_tick(cx));
        let event = format!("data: {}\n\n", value(&self.state));
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}

/// All of it. Times are milliseconds since 1970 where nothing else is said. `p50_ms` and `p99_ms` are since the start.
#[expect(clippy::cast_precision_loss, reason = "the bounds are far below 2^53")]
pub(super) fn value(state: &State) -> Value {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let id = snapshot.credentials.as_ref().map(|credentials| credentials.id().clone());
    let (listeners, _) = state.stats.groups();
    let datacenter = id.as_ref().map_or("", |id| &id.datacenter);
    let certificate = snapshot.credentials.as_ref().map(|credentials| {
        json!({
            "uri": credentials.id().to_string(),
            "not_before": process::unix_seconds(credentials.not_before()),
            "not_after": process::unix_seconds(credentials.not_after()),
        })
    });
    let of = |name: &Listener| listeners.iter().find(|stats| stats.listener == *name);
    let inbound = snapshot.inbound.values().map(|listener| inbound(state, listener, of(&Listener::Public)));
    let outbound = snapshot.outbound.values().map(|listener| {
        let name = Listener::Upstream(Arc::new(listener_name(&listener.key.destination, datacenter)));
        outbound(state, listener, of(&name))
    });
    let progress = (state.agent)();
    json!({
        "time": milliseconds(SystemTime::now()),
        "bounds_ms": BOUNDS.map(|micros| micros as f64 / 1000.0),
        "sidecar": {
            "service": id.as_ref().map(|id| &id.service),
            "started_for": state.started_for,
            "datacenter": datacenter,
            "namespace": id.as_ref().map(|id| &id.namespace),
            "partition": id.as_ref().map(|id| &id.partition),
            "trust_domain": id.as_ref().map(|id| &id.trust_domain),
            "version": env!("CARGO_PKG_VERSION"),
            "state": state.serving().word(),
            "uptime": state.started.elapsed().as_secs(),
            "configuration": snapshot.version,
            "memory": process::resident_bytes(),
            "admin": state.admin_address(),
        },
        "certificate": certificate,
        "inbound": inbound.collect::<Vec<_>>(),
        "outbound": outbound.collect::<Vec<_>>(),
        "exposed": snapshot.exposed.keys().map(ToString::to_string).collect::<Vec<_>>(),
        "agent": watches::agent(&progress),
        "watches": watches::list(&progress),
        "problems": state.observer.problems().newest().iter().map(problem).collect::<Vec<_>>(),
    })
}

fn inbound(state: &State, listener: &InboundListener, stats: Option<&Arc<ListenerStats>>) -> Value {
    let service = &listener.service;
    let callers = state.stats.callers();
    let callers = callers.iter().map(|caller| {
        json!({
            "service": caller.service,
            "allowed": caller.allowed.get(),
            "denied": caller.denied.get(),
            "would_deny": caller.would_deny.get(),
        })
    });
    let mut about = counts(stats);
    about["service"] = json!(service.name);
    about["bind"] = json!(listener.bind.to_string());
    about["protocol"] = json!(format!("{:?}", service.protocol).to_lowercase());
    about["http"] = json!(service.protocol.is_http());
    about["audit"] = json!(service.audit);
    about["default"] = json!(service.intentions.default_policy().to_string());
    about["default_action"] = json!(service.intentions.default_policy().action.to_string());
    let by_default = &service.intentions.default_policy().hits;
    about["default_allowed"] = json!(by_default.allowed());
    about["default_denied"] = json!(by_default.denied());
    about["intentions"] = service.intentions.list().iter().map(intention).collect();
    about["callers"] = callers.collect();
    about
}

fn intention(intention: &Intention) -> Value {
    let action = match intention.action {
        Some(action) => action.to_string(),
        None => format!("{} permissions", intention.permissions.len()),
    };
    json!({
        "source": intention.source,
        "namespace": intention.source_namespace,
        "partition": intention.source_partition,
        "permissions": intention.action.is_none(),
        "destination": intention.destination,
        "action": action,
        "precedence": intention.precedence,
        "allowed": intention.hits.allowed(),
        "denied": intention.hits.denied(),
    })
}

fn outbound(state: &State, listener: &OutboundListener, stats: Option<&Arc<ListenerStats>>) -> Value {
    let upstream = &listener.upstream;
    let mut about = counts(stats);
    about["name"] = json!(upstream.name);
    about["key"] = json!(listener.key.destination);
    about["bind"] = json!(listener.key.bind.to_string());
    about["protocol"] = json!(format!("{:?}", upstream.chain.protocol).to_lowercase());
    about["http"] = json!(upstream.chain.protocol.is_http());
    about["waits_for_agent"] = json!(upstream.awaited.is_some());
    let mut targets: Vec<&Arc<Target>> = Vec::new();
    for target in upstream.chain.targets() {
        if !targets.iter().any(|known| known.id == target.id) {
            targets.push(target);
        }
    }
    about["targets"] = targets.into_iter().map(|target| self::target(state, target)).collect();
    about
}

fn target(state: &State, target: &Target) -> Value {
    let cluster = state.stats.cluster(&Cluster::Target(Arc::new(target_name(target))));
    let members = cluster.members();
    json!({
        "id": target.id,
        "service": target.service,
        "datacenter": target.datacenter,
        "registered": members.registered,
        "tries": cluster.tries.get(),
        "retries": cluster.retries.get(),
        "timeouts": cluster.timeouts.get() + cluster.try_timeouts.get(),
        "connect_failures": cluster.connect_failures.get(),
        "overflows": cluster.overflows.get() + cluster.pending_overflows.get() + cluster.connection_overflows.get(),
        "ejections": cluster.ejections.get(),
        "limits": {
            "connections": limit(members.connections),
            "pending_requests": limit(members.pending_requests),
            "requests": limit(members.requests),
        },
        "retries_refused": members.retries_are_refused,
        "endpoints": members.usable.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

/// `open` is Envoy's word for a limit that is reached.
fn limit(limit: LimitNow) -> Value {
    json!({ "used": limit.used, "maximum": limit.maximum, "open": limit.is_reached() })
}

fn endpoint(member: &Member) -> Value {
    json!({
        "address": member.address,
        "weight": member.weight,
        "state": member.state.word(),
        "breaker": member.state.breaker(),
        "in_flight": member.in_flight,
        "latency_ms": member.latency.map(|micros| f64::from(micros) / 1000.0),
    })
}

/// The counters of a listener; zeros before it is bound.
fn counts(stats: Option<&Arc<ListenerStats>>) -> Value {
    let Some(stats) = stats else {
        return json!({
            "connections": 0, "connections_active": 0, "received": 0, "sent": 0, "requests": 0, "requests_active": 0,
            "classes": [0, 0, 0, 0, 0], "times": [], "p50_ms": null, "p99_ms": null, "allowed": 0, "denied": 0, "would_deny": 0,
            "revoked": 0, "would_revoke": 0,
        });
    };
    let times = stats.request_time.get();
    let quantile = |q| times.quantile(q).map(|micros| micros / 1000.0);
    json!({
        "connections": stats.connections.get(),
        "connections_active": stats.connections_active.get(),
        "received": stats.received.get(),
        "sent": stats.sent.get(),
        "requests": stats.requests.get(),
        "requests_active": stats.requests_active.get(),
        "classes": stats.answers.get(),
        // How many requests took how long, by `bounds_ms`: two states give the quantiles of the time between them.
        "times": times.buckets,
        "p50_ms": quantile(0.5),
        "p99_ms": quantile(0.99),
        "allowed": stats.allowed.get(),
        "denied": stats.denied.get(),
        "would_deny": stats.would_deny.get(),
        "revoked": stats.revoked.get(),
        "would_revoke": stats.would_revoke.get(),
    })
}

fn problem(problem: &Problem) -> Value {
    let about = problem.outcome.describe();
    json!({
        "number": problem.number,
        "time": milliseconds(problem.at),
        "direction": problem.direction,
        "listener": problem.listener,
        "reason": problem.outcome.name(),
        "flag": about.flag,
        "who": problem.who,
        "what": problem.what,
        "cause": problem.cause,
        "remedy": about.remedy,
    })
}

fn milliseconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
