//! Instances that answer as a test says, at a time that it says.

mod ejecting;
mod picking;
mod remembering;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::report::Probe;
use super::*;
use crate::snapshot::{Address, Endpoint, Endpoints, Host, PassiveHealthCheck, Policy};

const FIRST_PORT: u16 = 1000;

fn endpoints(weights: &[u32]) -> Arc<Endpoints> {
    let endpoint = |(port, &weight): (u16, &u32)| Endpoint {
        address: Address { host: Host::Ip(IpAddr::from([127, 0, 0, 1])), port },
        weight,
    };
    Arc::new(Endpoints { usable: (FIRST_PORT..).zip(weights).map(endpoint).collect(), registered: weights.len() })
}

fn balancer(policy: Policy, weights: &[u32]) -> Arc<Balancer> {
    let settings = Settings { policy, http: true, ..Settings::default() };
    Balancer::new(&endpoints(weights), settings, None)
}

fn with_check(weights: &[u32], passive_health_check: PassiveHealthCheck) -> Arc<Balancer> {
    let settings = Settings { http: true, passive_health_check, ..Settings::default() };
    Balancer::new(&endpoints(weights), settings, None)
}

/// The place of the instance in the list.
fn place(picked: &Picked) -> usize {
    usize::from(picked.instance().address.port - FIRST_PORT)
}

fn pick(balancer: &Arc<Balancer>, now: u64, rng: &mut fastrand::Rng) -> Option<Picked> {
    balancer.pick(now, None, &[], |below| rng.u64(..below))
}

/// How often each instance is picked when nothing else goes on.
fn shares(balancer: &Arc<Balancer>, now: u64, count: usize) -> Vec<usize> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut shares = vec![0; balancer.len()];
    for _ in 0..count {
        shares[place(&pick(balancer, now, &mut rng).unwrap())] += 1;
    }
    shares
}

fn report(balancer: &Arc<Balancer>, instance: usize, outcome: Report, now: u64) {
    let picked = balancer.picked(&balancer.instances[instance], Probe::default(), now, &mut |_| 0);
    picked.report(outcome, Duration::from_millis(5), now);
}

fn fail(balancer: &Arc<Balancer>, instance: usize, times: usize, now: u64) {
    for _ in 0..times {
        report(balancer, instance, Report::ServerError, now);
    }
}

/// All may be ejected.
fn all_may_go() -> PassiveHealthCheck {
    PassiveHealthCheck { max_ejection_percent: Some(100), ..PassiveHealthCheck::default() }
}

const RING: Policy = Policy::RingHash { minimum: 1024, maximum: 8 << 20 };
const POLICIES: [Policy; 6] =
    [Policy::Unset, Policy::RoundRobin, Policy::Random, Policy::LeastRequest { choices: 3 }, RING, Policy::Maglev];
