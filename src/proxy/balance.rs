//! Which instance of a target to dial, and what is remembered of each.
//!
//! Picks are power of two choices on the connections in flight, by weight. An instance that refused is
//! put aside for a while that grows with each failure, so that one that Consul still calls passing costs
//! a connection attempt now and then, and no connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::snapshot::{Address, Endpoint, Endpoints};

/// The instances of one target.
#[derive(Debug)]
pub struct Balancer {
    instances: Vec<Arc<Instance>>,
    /// Sum of the weights up to and including each instance; empty when all weights are equal.
    cumulated: Vec<u64>,
    /// How many the catalog lists, usable or not.
    pub registered: usize,
    endpoints: Arc<Endpoints>,
}

/// What is remembered of one instance, across snapshots.
#[derive(Debug)]
pub struct Instance {
    pub address: Address,
    weight: u32,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    in_flight: AtomicUsize,
    failures: AtomicU32,
    /// In milliseconds since [`Clock`] was made; zero is never.
    aside_until: AtomicU64,
}

impl Balancer {
    /// Takes over what `previous` remembers of the instances that are still there.
    #[must_use]
    pub fn new(endpoints: &Arc<Endpoints>, previous: Option<&Arc<Self>>) -> Arc<Self> {
        if let Some(previous) = previous.filter(|previous| Arc::ptr_eq(&previous.endpoints, endpoints)) {
            return Arc::clone(previous);
        }
        let known: HashMap<&Address, &Arc<State>> =
            previous.iter().flat_map(|balancer| &balancer.instances).map(|i| (&i.address, &i.state)).collect();
        let instance = |endpoint: &Endpoint| {
            let state = known.get(&endpoint.address).map(|state| Arc::clone(state)).unwrap_or_default();
            Arc::new(Instance { address: endpoint.address.clone(), weight: endpoint.weight.max(1), state })
        };
        let instances: Vec<Arc<Instance>> = endpoints.usable.iter().map(instance).collect();
        Arc::new(Self {
            cumulated: cumulated(&instances),
            instances,
            registered: endpoints.registered,
            endpoints: Arc::clone(endpoints),
        })
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.instances.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.instances.is_empty()
    }

    /// Connections open to the target.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.instances.iter().map(|i| i.state.in_flight.load(Ordering::Relaxed)).sum()
    }

    /// Whether an instance could be picked that is not put aside.
    #[must_use]
    pub fn is_up(&self, now: u64) -> bool {
        self.instances.iter().any(|instance| !instance.is_aside(now))
    }

    /// Picks an instance that is not among `tried`: of two chosen by weight, the one with fewer connections
    /// in flight for its weight. One that is put aside is picked only when there is no other; then the one
    /// whose time is up first. `random` gives numbers below its argument.
    #[must_use]
    pub fn pick(
        &self,
        now: u64,
        tried: &[Arc<Instance>],
        mut random: impl FnMut(u64) -> u64,
    ) -> Option<&Arc<Instance>> {
        let fit =
            |instance: &&Arc<Instance>| !instance.is_aside(now) && !tried.iter().any(|t| Arc::ptr_eq(t, instance));
        let first = self.instances.get(self.choose(&mut random)).filter(fit);
        let second = self.instances.get(self.choose(&mut random)).filter(fit);
        match (first, second) {
            (Some(a), Some(b)) => Some(if b.load() < a.load() { b } else { a }),
            (Some(one), None) | (None, Some(one)) => Some(one),
            (None, None) => {
                self.instances.iter().filter(fit).min_by_key(|i| i.load()).or_else(|| self.last_resort(tried))
            }
        }
    }

    fn last_resort(&self, tried: &[Arc<Instance>]) -> Option<&Arc<Instance>> {
        let untried = self.instances.iter().filter(|instance| !tried.iter().any(|t| Arc::ptr_eq(t, instance)));
        untried.min_by_key(|instance| instance.state.aside_until.load(Ordering::Relaxed))
    }

    /// The place of an instance, with a chance by its weight.
    fn choose(&self, random: &mut impl FnMut(u64) -> u64) -> usize {
        match self.cumulated.last() {
            Some(&total) => {
                let point = random(total);
                self.cumulated.partition_point(|&sum| sum <= point)
            }
            None if self.instances.is_empty() => 0,
            None => usize::try_from(random(self.instances.len() as u64)).unwrap_or(0),
        }
    }
}

fn cumulated(instances: &[Arc<Instance>]) -> Vec<u64> {
    if instances.windows(2).all(|pair| pair[0].weight == pair[1].weight) {
        return Vec::new();
    }
    let mut sum = 0;
    let add = |instance: &Arc<Instance>| {
        sum += u64::from(instance.weight);
        sum
    };
    instances.iter().map(add).collect()
}

impl Instance {
    /// Counts a connection until the guard is dropped.
    #[must_use]
    pub fn enter(&self) -> InFlight {
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(&self.state))
    }

    /// The instance answered: whatever it did before is forgotten.
    pub fn succeeded(&self) {
        if self.state.failures.load(Ordering::Relaxed) != 0 {
            self.state.failures.store(0, Ordering::Relaxed);
            self.state.aside_until.store(0, Ordering::Relaxed);
        }
    }

    /// The instance could not be reached: it is put aside for 1 s, doubled with each failure up to 30 s.
    pub fn failed(&self, now: u64) {
        let failures = self.state.failures.fetch_add(1, Ordering::Relaxed).min(5);
        let aside = (ASIDE * 2_u32.pow(failures)).min(ASIDE_LIMIT);
        let until = now.saturating_add(u64::try_from(aside.as_millis()).unwrap_or(u64::MAX));
        self.state.aside_until.fetch_max(until, Ordering::Relaxed);
    }

    fn is_aside(&self, now: u64) -> bool {
        self.state.aside_until.load(Ordering::Relaxed) > now
    }

    /// What one more connection would make of it, for its weight.
    fn load(&self) -> u64 {
        let in_flight = self.state.in_flight.load(Ordering::Relaxed) as u64;
        (in_flight + 1) * 1000 / u64::from(self.weight)
    }
}

const ASIDE: Duration = Duration::from_secs(1);
const ASIDE_LIMIT: Duration = Duration::from_secs(30);

/// One connection of an instance.
#[derive(Debug)]
pub struct InFlight(Arc<State>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Milliseconds since it was made, for states that are shared between threads without a lock.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::snapshot::Host;

    fn endpoints(weights: &[u32]) -> Arc<Endpoints> {
        let endpoint = |(i, &weight): (usize, &u32)| Endpoint {
            address: Address { host: Host::Ip(IpAddr::from([127, 0, 0, 1])), port: 1000 + u16::try_from(i).unwrap() },
            weight,
        };
        Arc::new(Endpoints { usable: weights.iter().enumerate().map(endpoint).collect(), registered: weights.len() })
    }

    fn ports(balancer: &Balancer, count: usize) -> HashMap<u16, usize> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut picks = HashMap::new();
        for _ in 0..count {
            let picked = balancer.pick(0, &[], |below| random.u64(..below)).unwrap();
            *picks.entry(picked.address.port).or_default() += 1;
        }
        picks
    }

    #[test]
    fn picks_follow_weights() {
        let picks = ports(&Balancer::new(&endpoints(&[1, 3]), None), 10_000);
        assert!(picks[&1001] > picks[&1000] * 2, "{picks:?}");
        let picks = ports(&Balancer::new(&endpoints(&[1, 1]), None), 10_000);
        assert!(picks[&1000] > 2_000 && picks[&1001] > 2_000, "{picks:?}");
    }

    #[test]
    fn the_less_loaded_of_two_is_picked() {
        let balancer = Balancer::new(&endpoints(&[1, 1]), None);
        let busy: Vec<InFlight> = (0..10).map(|_| balancer.instances[0].enter()).collect();
        assert!(ports(&balancer, 1000)[&1001] > 700);
        assert_eq!(balancer.in_flight(), 10);
        drop(busy);
        assert_eq!(balancer.in_flight(), 0);
    }

    #[test]
    fn a_failed_instance_is_put_aside_and_comes_back() {
        let balancer = Balancer::new(&endpoints(&[1, 1]), None);
        balancer.instances[0].failed(0);
        assert_eq!(ports(&balancer, 100), HashMap::from([(1001, 100)]));
        assert!(balancer.pick(1000, &[], |_| 0).is_some_and(|i| i.address.port == 1000));
        balancer.instances[0].failed(1000);
        assert!(balancer.instances[0].is_aside(2999) && !balancer.instances[0].is_aside(3000));
        balancer.instances[0].succeeded();
        assert!(!balancer.instances[0].is_aside(1001));
    }

    #[test]
    fn when_all_are_aside_the_one_that_is_due_first_is_tried_and_none_twice() {
        let balancer = Balancer::new(&endpoints(&[1, 1]), None);
        balancer.instances[0].failed(0);
        balancer.instances[0].failed(0);
        balancer.instances[1].failed(0);
        assert!(!balancer.is_up(10));
        let first = Arc::clone(balancer.pick(10, &[], |_| 0).unwrap());
        assert_eq!(first.address.port, 1001);
        let second = Arc::clone(balancer.pick(10, std::slice::from_ref(&first), |_| 0).unwrap());
        assert_eq!(second.address.port, 1000);
        assert!(balancer.pick(10, &[first, second], |_| 0).is_none());
    }

    #[test]
    fn what_is_known_of_an_instance_outlives_a_snapshot() {
        let before = Balancer::new(&endpoints(&[1, 1]), None);
        before.instances[1].failed(0);
        let open = before.instances[1].enter();
        let after = Balancer::new(&endpoints(&[1, 2, 1]), Some(&before));
        assert!(after.instances[1].is_aside(10));
        assert_eq!(after.in_flight(), 1);
        drop(open);
        assert_eq!(after.in_flight(), 0);
        assert!(Arc::ptr_eq(&after, &Balancer::new(&after.endpoints, Some(&after))));
    }

    #[test]
    fn a_target_without_instances_has_none_to_pick() {
        let balancer = Balancer::new(&endpoints(&[]), None);
        assert!(balancer.pick(0, &[], |_| 0).is_none());
    }
}
