//! The numbers that the process keeps about its traffic, and the forms in which they are given out.
//!
//! [`Registry`] hands out groups of counters ([`ListenerStats`], [`ClusterStats`]). The data path adds to them without a
//! lock; who asks reads them as [`Sample`]s. A group lives as long as somebody holds it: the series of an upstream that was
//! removed go with its last connection. The number of series follows from the configuration alone, as nothing that a
//! peer sends becomes a name: statuses are the only exception, and there are 500 of them.

pub mod agent;
pub mod exemplar;
pub mod group;
pub mod grpc;
pub mod openmetrics;
pub mod plain;
pub mod prometheus;
pub mod scope;
pub mod statsd;
pub mod text;
pub mod value;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub use self::group::{
    CallerStats, ClusterStats, Handshakes, LimitNow, ListenerStats, Member, MemberState, Members, MembersNow, Sample,
    Samples, Value,
};
use self::scope::{Cluster, Listener};
use self::value::{Counter, Gauge};

/// All groups of a process. The lock is taken when the configuration changes and when somebody reads.
#[derive(Debug, Default)]
pub struct Registry {
    groups: Mutex<Groups>,
    pub refused: RefusedUpdates,
    pub scrapes: Scrapes,
    pub spans: Arc<SpanCounts>,
}

/// Spans of traces.
#[derive(Debug, Default)]
pub struct SpanCounts {
    pub sent: Counter,
    /// For want of room, or of a collector that takes them.
    pub dropped: Counter,
}

/// Answers of the agent that could not be used, so that what was known stayed.
#[derive(Debug, Default)]
pub struct RefusedUpdates {
    /// Chains, instances and prepared queries.
    pub upstreams: Counter,
    /// The registration, certificates, intentions and config entries.
    pub others: Counter,
}

/// Requests for numbers, but for those to the admin server.
#[derive(Debug, Default)]
pub struct Scrapes {
    pub connections: Counter,
    pub connections_active: Gauge,
    pub requests: Counter,
    pub requests_active: Gauge,
}

#[derive(Debug, Default)]
struct Groups {
    listeners: BTreeMap<(Listener, String), Weak<ListenerStats>>,
    clusters: BTreeMap<Cluster, Weak<ClusterStats>>,
    callers: BTreeMap<String, Arc<CallerStats>>,
}

/// Calling services that are counted one by one; further ones are counted together as [`OTHERS`].
const CALLERS: usize = 256;
/// Label of the calling services that are counted together.
const OTHERS: &str = "(others)";

impl Registry {
    /// The numbers of a listener; the same ones as long as anybody holds them.
    #[must_use]
    pub fn listener(&self, listener: Listener, address: String, http: bool) -> Arc<ListenerStats> {
        let key = (listener, address);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = groups.listeners.get(&key).and_then(Weak::upgrade) {
            stats.set_http(http);
            return stats;
        }
        groups.listeners.retain(|_, stats| stats.strong_count() > 0);
        let stats = Arc::new(ListenerStats::new(key.0.clone(), key.1.clone(), http));
        groups.listeners.insert(key, Arc::downgrade(&stats));
        stats
    }

    /// The numbers of a cluster; the same ones as long as anybody holds them.
    #[must_use]
    pub fn cluster(&self, cluster: &Cluster) -> Arc<ClusterStats> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = groups.clusters.get(cluster).and_then(Weak::upgrade) {
            return stats;
        }
        // A group that is gone leaves its memory with its last `Weak`.
        groups.clusters.retain(|_, stats| stats.strong_count() > 0);
        let stats = Arc::new(ClusterStats::new(cluster.clone()));
        groups.clusters.insert(cluster.clone(), Arc::downgrade(&stats));
        stats
    }

    /// The numbers of a service that connects to us: looked up once for each session.
    #[must_use]
    pub fn caller(&self, service: &str) -> Arc<CallerStats> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let is_counted = groups.callers.len() < CALLERS || groups.callers.contains_key(service);
        let name = if is_counted { service } else { OTHERS };
        let new = || Arc::new(CallerStats { service: name.to_owned(), ..CallerStats::default() });
        Arc::clone(groups.callers.entry(name.to_owned()).or_insert_with(new))
    }

    /// All services that have connected to us.
    #[must_use]
    pub fn callers(&self) -> Vec<Arc<CallerStats>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.callers.values().map(Arc::clone).collect()
    }

    /// Those that are held, in order. What is held no longer is forgotten.
    #[must_use]
    pub fn groups(&self) -> (Vec<Arc<ListenerStats>>, Vec<Arc<ClusterStats>>) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.listeners.retain(|_, stats| stats.strong_count() > 0);
        groups.clusters.retain(|_, stats| stats.strong_count() > 0);
        (
            groups.listeners.values().filter_map(Weak::upgrade).collect(),
            groups.clusters.values().filter_map(Weak::upgrade).collect(),
        )
    }

    /// All numbers under Envoy's names.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        let (listeners, clusters) = self.groups();
        listeners.iter().for_each(|stats| stats.collect(&mut samples));
        clusters.iter().for_each(|stats| stats.collect(&mut samples));
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_last_as_long_as_somebody_holds_them() {
        let registry = Registry::default();
        let held = registry.cluster(&Cluster::LocalApp);
        held.tries.increment();
        assert_eq!(registry.cluster(&Cluster::LocalApp).tries.get(), 1);
        let listener = registry.listener(Listener::Public, "a".into(), true);
        assert_eq!((registry.groups().0.len(), registry.groups().1.len()), (1, 1));
        drop((held, listener));
        assert!(registry.samples().is_empty());
        assert_eq!(registry.cluster(&Cluster::LocalApp).tries.get(), 0);
    }
}
