//! What outlives a snapshot, and who looks after an instance.

use super::super::balancer::PROBED_AT_ONCE;
use super::*;
use crate::proxy::limits::Limit;
use crate::snapshot::Limits;

#[test]
fn what_is_known_of_an_instance_outlives_a_snapshot() {
    let before = with_check(&[1, 1], all_may_go());
    report(&before, 1, Report::Unreachable, 0);
    fail(&before, 0, 4, 0);
    let open = before.picked(&before.instances[1], Probe::default(), 0, &mut |_| 0);
    let permit = before.admit(Limit::Connections).unwrap();
    let limits = Limits { max_connections: Some(1), ..Limits::default() };
    let after = Balancer::new(&endpoints(&[1, 2, 1]), Settings { limits, ..before.settings }, Some(&before));
    assert!(!after.instances[1].is_fit(10));
    assert_eq!(after.instances[1].load(), 1);
    assert!(after.admit(Limit::Connections).is_err());
    drop((open, permit));
    assert_eq!(after.instances[1].load(), 0);
    assert!(after.admit(Limit::Connections).is_ok());
    // A request that began before is among those that eject.
    report(&before, 0, Report::ServerError, 0);
    assert!(!after.instances[0].is_fit(10));
    assert!(Arc::ptr_eq(&after, &Balancer::new(&after.endpoints, after.settings, Some(&after))));
}

#[test]
fn a_probe_keeps_an_instance_aside_and_brings_it_back() {
    let balancer = balancer(Policy::Unset, &[1; 2]);
    report(&balancer, 0, Report::Unreachable, 0);
    let instance = &balancer.instances[0];
    let watched = instance.watch().expect("nobody looks after it");
    assert!(instance.watch().is_none());
    for now in (500..100_000).step_by(500) {
        assert!(instance.stay_aside(now, Duration::from_millis(1800)));
        assert_eq!(shares(&balancer, now, 50), [0, 50]);
    }
    assert!(balancer.is_used(100_000) && !balancer.is_used(200_000));
    instance.is_back();
    assert!(shares(&balancer, 100_000, 50)[0] > 10);
    assert!(!instance.stay_aside(100_000, Duration::from_millis(1800)));
    drop(watched);
    assert!(instance.watch().is_some());
    let permits: Vec<ProbePermit> = std::iter::from_fn(|| balancer.probe_permit()).collect();
    assert_eq!(permits.len(), PROBED_AT_ONCE);
    drop(permits);
    assert!(balancer.probe_permit().is_some());
}
