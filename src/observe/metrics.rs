//! The reader that counts. What it adds to is in [`crate::stats`]; when each number moves follows Envoy 1.40 under Consul,
//! where a name of Envoy's is given out for it.

use std::time::Duration;

use super::attempt::{AttemptResult, Destination};
use super::connect_error::ConnectError;
use super::connection::{ConnectionInfo, ConnectionRecord};
use super::event::{Event, Overflowed};
use super::outcome::Outcome;
use super::request::RequestRecord;
use crate::snapshot::{Decision, Target};
use crate::stats::scope::{TargetName, UpstreamName};
use crate::stats::{ClusterStats, Handshakes};
use crate::tls::{Handshake, Refused, Version};

/// Counts one event. `local_app` is what is sent to the app.
pub(super) fn count(event: &Event<'_>, local_app: &ClusterStats) {
    match event {
        Event::ConnectionAccepted(record) => {
            let stats = &record.info.stats;
            stats.connections.increment();
            stats.connections_active.increment();
        }
        Event::HandshakeFinished(record) => {
            let tls = &record.info.stats.tls;
            if let Some(made) = record.tls {
                handshake_made(tls, made);
            }
            if let Some(took) = record.handshake {
                tls.time.observe(took);
            }
        }
        Event::HandshakeFailed { connection, refused, .. } => {
            handshake_failed(&connection.info.stats.tls, *refused);
        }
        Event::ConnectionFinished(record) => connection_finished(record, local_app),
        Event::RequestReceived(record) => {
            let stats = &record.connection.stats;
            stats.requests.increment();
            stats.requests_active.increment();
        }
        Event::ResponseStarted(record) => response_started(record),
        Event::RequestFinished(record) => request_finished(record),
        Event::RelayStarted(record) => relay_started(record, local_app),
        Event::RequestSent(cluster) => cluster.tries.increment(),
        Event::Retried(cluster) => cluster.retries.increment(),
        Event::RetryRefused(cluster) => cluster.retries_refused.increment(),
        Event::AnswerRetried { cluster, status } => cluster.retried_answers.count(*status),
        Event::NoInstance(cluster) => cluster.no_instance.increment(),
        Event::ConnectStarted(to) => cluster(to, local_app).connections.increment(),
        Event::ConnectEnded { destination, took, result } => {
            connect_ended(cluster(destination, local_app), *took, *result);
        }
        Event::Decided { connection, decision, .. } => decided(connection, decision),
        Event::WouldDeny { connection, .. } => {
            connection.stats.would_deny.increment();
            connection.caller.iter().for_each(|caller| caller.would_deny.increment());
        }
        Event::WouldRevoke { connection, .. } => connection.stats.would_revoke.increment(),
        Event::Overflowed(overflowed) => limit_reached(*overflowed),
        Event::Ejected { stats, .. } => stats.ejections.increment(),
        Event::NotEjected(cluster) => cluster.ejections_refused.increment(),
        Event::AttemptStarted(_) | Event::AttemptEnded(_) => {}
    }
}

fn connect_ended(stats: &ClusterStats, took: Duration, result: Result<Option<Handshake>, &ConnectError>) {
    match result {
        Ok(made) => {
            stats.connect_time.observe(took);
            if let Some(made) = made {
                handshake_made(&stats.tls, made);
            }
        }
        Err(error) => {
            stats.connect_failures.increment();
            if error.is_timeout() {
                stats.connect_timeouts.increment();
            }
            if let Some(refused) = error.refused() {
                handshake_failed(&stats.tls, refused);
            }
        }
    }
}

/// To Envoy, an open connection of bytes is a request that is under way.
fn relay_started(record: &ConnectionRecord, local_app: &ClusterStats) {
    if let Some(last) = record.attempts.last() {
        let cluster = cluster(&last.destination, local_app);
        cluster.tries.increment();
        cluster.requests_active.increment();
    }
}

fn decided(connection: &ConnectionInfo, decision: &Decision<'_>) {
    let (stats, caller) = (&connection.stats, &connection.caller);
    decision.hits().count(decision.is_allowed());
    if decision.is_allowed() {
        stats.allowed.increment();
        caller.iter().for_each(|caller| caller.allowed.increment());
    } else {
        stats.denied.increment();
        caller.iter().for_each(|caller| caller.denied.increment());
    }
}

fn limit_reached(overflowed: Overflowed<'_>) {
    let counter = match overflowed {
        Overflowed::Inbound(connection) => &connection.stats.connections_limited,
        Overflowed::Target { stats, limit: "max_connections", .. } => &stats.connection_overflows,
        Overflowed::Target { stats, limit: "max_pending_requests", .. } => &stats.pending_overflows,
        Overflowed::Target { stats, .. } => &stats.overflows,
    };
    counter.increment();
}

fn handshake_made(tls: &Handshakes, made: Handshake) {
    tls.complete.increment();
    if made.is_resumed {
        tls.resumed.increment();
    }
    if made.version == Version::Tls12 {
        tls.tls12.increment();
    }
}

fn handshake_failed(tls: &Handshakes, refused: Refused) {
    let counter = match refused {
        Refused::Connection => &tls.connection_error,
        Refused::NoCertificate => &tls.no_certificate,
        Refused::Certificate => &tls.bad_certificate,
        Refused::Identity => &tls.other_identity,
    };
    counter.increment();
}

fn cluster<'a>(destination: &'a Destination, local_app: &'a ClusterStats) -> &'a ClusterStats {
    match destination {
        Destination::LocalApp(_) => local_app,
        Destination::Instance { stats, .. } => stats,
    }
}

fn connection_finished(record: &ConnectionRecord, local_app: &ClusterStats) {
    let stats = &record.info.stats;
    stats.connections_active.decrement();
    stats.connection_time.observe(record.duration);
    if record.outcome == Outcome::Denied && record.is_connected {
        stats.revoked.increment();
    }
    // The relay has counted its bytes while they moved.
    if let Some(last) = record.attempts.last().filter(|_| record.is_connected) {
        cluster(&last.destination, local_app).requests_active.decrement();
    }
}

fn response_started(record: &RequestRecord) {
    record.connection.stats.answers.count(record.status);
    let Some(cluster) = &record.cluster else { return };
    cluster.answered(record.status);
    match record.answer {
        Some(Outcome::Timeout) => cluster.timeouts.increment(),
        Some(Outcome::TryTimeout) => cluster.try_timeouts.increment(),
        Some(Outcome::NoInstance) => cluster.no_instance.increment(),
        _ => {}
    }
    if record.retries > 0 {
        let good = record.answer == Some(Outcome::Ended) && record.status < 500;
        if good { cluster.retries_successful.increment() } else { cluster.retries_exhausted.increment() }
    }
}

fn request_finished(record: &RequestRecord) {
    let stats = &record.connection.stats;
    stats.requests_active.decrement();
    if record.is_sent
        && let Some(cluster) = &record.cluster
    {
        cluster.requests_active.decrement();
        if let Some(status) = record.grpc_status {
            cluster.grpc.count(record.uri.path(), status);
        }
    }
    if record.status > 0 {
        stats.request_time.observe(record.duration);
        if let Some(traced) = record.traced.as_ref().filter(|traced| traced.is_sampled()) {
            stats.exemplars.keep(record.duration, traced.trace_id());
        }
    }
    match record.outcome {
        Outcome::Aborted | Outcome::ClientReset | Outcome::BadRequest | Outcome::TooLarge => {
            stats.reset_by_asker.increment();
        }
        Outcome::Idle | Outcome::IdleUpload => stats.idle_timeouts.increment(),
        _ => {}
    }
    if record.is_cut {
        stats.reset_by_us.increment();
    }
    let (Some(cluster), Some(last)) = (&record.cluster, record.attempts.last()) else { return };
    if record.answer == Some(Outcome::Ended) && matches!(last.result, AttemptResult::Responded(_)) {
        cluster.answer_time.observe(last.started.elapsed());
    }
}

/// The name of a target in metrics, of what its SNI says: `v1.db.default.dc1.internal.<trust domain>`.
#[must_use]
pub fn target_name(target: &Target) -> TargetName {
    let sni = target.tls().name().to_str();
    let unknown = || TargetName {
        service: target.service.clone(),
        datacenter: target.datacenter.clone(),
        namespace: DEFAULT.to_owned(),
        custom_hash: target.customization_hash.clone(),
        ..TargetName::default()
    };
    let Some((front, domain)) = sni.split_once(".internal.").or_else(|| sni.split_once(".internal-v1.")) else {
        return unknown();
    };
    // The service may have dots in its name, and a subset stands before it.
    let before_datacenter = front.strip_suffix(&*target.datacenter).and_then(|front| front.strip_suffix('.'));
    let Some(before_datacenter) = before_datacenter else { return unknown() };
    let found = before_datacenter.rfind(&format!("{}.", target.service));
    let Some(at) = found else { return unknown() };
    let (subset, rest) = before_datacenter.split_at(at);
    let tenancy = &rest[target.service.len() + 1..];
    let (namespace, partition) = tenancy.split_once('.').unwrap_or((tenancy, ""));
    TargetName {
        service: target.service.clone(),
        subset: subset.trim_end_matches('.').to_owned(),
        namespace: namespace.to_owned(),
        partition: partition.to_owned(),
        datacenter: target.datacenter.clone(),
        custom_hash: target.customization_hash.clone(),
        trust_domain: domain.trim_end_matches(".consul").to_owned(),
    }
}

/// The name of an upstream in metrics, of its destination as in `service:db?dc=dc2`; `datacenter` is our own.
#[must_use]
pub fn listener_name(destination: &str, datacenter: &str) -> UpstreamName {
    let (name, query) = destination.split_once('?').unwrap_or((destination, ""));
    let service = match name.split_once(':') {
        Some(("query", name)) => format!("prepared_query_{name}"),
        Some((_, name)) => name.to_owned(),
        None => name.to_owned(),
    };
    let part = |key: &str, default: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(name, _)| *name == key).map(|(_, value)| value).next().unwrap_or(default).to_owned()
    };
    UpstreamName {
        service,
        namespace: part("ns", DEFAULT),
        partition: part("partition", DEFAULT),
        datacenter: part("dc", datacenter),
    }
}

const DEFAULT: &str = "default";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_are_called_as_by_envoy() {
        let shown = |destination| {
            let UpstreamName { service, namespace, partition, datacenter } = listener_name(destination, "dc1");
            format!("{service}.{namespace}.{partition}.{datacenter}")
        };
        assert_eq!(shown("service:db"), "db.default.default.dc1");
        assert_eq!(shown("service:db?dc=dc2&ns=x"), "db.x.default.dc2");
        assert_eq!(shown("query:near"), "prepared_query_near.default.default.dc1");
    }
}
