use std::net::IpAddr;
use std::time::Duration;

use super::*;
use crate::snapshot::Host;

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

const RING: Policy = Policy::RingHash { minimum: 1024, maximum: 8 << 20 };
const POLICIES: [Policy; 6] =
    [Policy::Unset, Policy::RoundRobin, Policy::Random, Policy::LeastRequest { choices: 3 }, RING, Policy::Maglev];

#[test]
fn every_policy_shares_out_by_weight() {
    for policy in POLICIES {
        for (weights, expected) in [(&[1, 1, 1, 1][..], [2500; 4]), (&[1, 1, 2, 4], [1250, 1250, 2500, 5000])] {
            let shares = shares(&balancer(policy, weights), 0, 10_000);
            for (share, expected) in shares.iter().zip(expected) {
                assert!(share.abs_diff(expected) < expected / 8, "{policy:?} {weights:?}: {shares:?}");
            }
        }
    }
}

#[test]
fn requests_in_flight_settle_by_weight() {
    for policy in [Policy::Unset, Policy::LeastRequest { choices: 2 }] {
        let balancer = balancer(policy, &[1, 3, 1]);
        let mut rng = fastrand::Rng::with_seed(7);
        let _held: Vec<Picked> = (0..1000).map(|_| pick(&balancer, 0, &mut rng).unwrap()).collect();
        let load: Vec<u32> = balancer.instances.iter().map(|instance| instance.load()).collect();
        assert!(load[1].abs_diff(600) < 30 && load[0].abs_diff(200) < 30, "{load:?}");
    }
}

#[test]
fn a_round_goes_to_each_once_and_to_the_heavy_ones_in_between() {
    let turns = |weights: &[u32], count| {
        let balancer = balancer(Policy::RoundRobin, weights);
        let mut rng = fastrand::Rng::with_seed(7);
        (0..count).map(|_| place(&pick(&balancer, 0, &mut rng).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(turns(&[1, 1, 1], 7), [0, 1, 2, 0, 1, 2, 0]);
    let weighted = turns(&[1, 3, 1], 10);
    for round in weighted.chunks(5) {
        assert_eq!([0, 1, 2].map(|i| round.iter().filter(|turn| **turn == i).count()), [1, 3, 1]);
    }
    assert!(!weighted.windows(3).any(|three| three == [1, 1, 1]), "{weighted:?}");
}

#[test]
fn a_slow_instance_gets_visibly_less() {
    // Poisson arrivals, some 20 in flight; one of four instances is ten times slower.
    let slow_share = |policy| {
        let balancer = balancer(policy, &[1; 4]);
        let mut rng = fastrand::Rng::with_seed(7);
        let mut under_way: Vec<(f64, f64, Picked)> = Vec::new();
        let (mut time, mut shares) = (0.0_f64, [0_u32; 4]);
        for _ in 0..20_000 {
            time += -(1.0 - rng.f64()).ln() * 0.5;
            for (_, latency, picked) in under_way.extract_if(.., |(end, ..)| *end <= time) {
                picked.report(Report::Success, Duration::from_secs_f64(latency / 1000.0), time as u64);
            }
            let picked = pick(&balancer, time as u64, &mut rng).unwrap();
            shares[place(&picked)] += 1;
            let latency = if place(&picked) == 0 { 100.0 } else { 10.0 } * (0.5 + rng.f64());
            under_way.push((time + latency, latency, picked));
        }
        f64::from(shares[0]) / 20_000.0
    };
    let (random, least, ours) =
        (slow_share(Policy::Random), slow_share(Policy::LeastRequest { choices: 2 }), slow_share(Policy::Unset));
    assert!(random > 0.23, "{random}");
    assert!(least < random / 2.0, "{least}");
    assert!(ours < random / 8.0 && ours < least, "{ours} against {least}");
    assert!(ours > 0.0, "it is tried at times");
}

#[test]
fn a_slow_instance_gets_less_even_of_one_request_at_a_time_and_recovers() {
    let balancer = balancer(Policy::Unset, &[1; 2]);
    let mut rng = fastrand::Rng::with_seed(7);
    let mut now = 0;
    let mut share = |slow: u64| {
        let mut picks = 0;
        for _ in 0..1000 {
            let picked = pick(&balancer, now, &mut rng).unwrap();
            let latency = if place(&picked) == 0 { slow } else { 5 };
            picks += usize::from(place(&picked) == 0);
            now += latency;
            picked.report(Report::Success, Duration::from_millis(latency), now);
        }
        picks
    };
    let equal = share(5);
    assert!((400..600).contains(&equal), "{equal}");
    let slow = share(50);
    assert!(slow < 50, "{slow}");
    for _ in 0..6 {
        share(5);
    }
    let equal = share(5);
    assert!((400..600).contains(&equal), "{equal}");
}

/// How many of so many requests, one after the other, each instance gets, when it takes so many milliseconds.
fn one_by_one(balancer: &Arc<Balancer>, now: &mut u64, count: usize, latency: impl Fn(usize) -> u64) -> Vec<usize> {
    let mut rng = fastrand::Rng::with_seed(*now);
    let mut shares = vec![0; balancer.len()];
    for _ in 0..count {
        let picked = pick(balancer, *now, &mut rng).unwrap();
        let latency = latency(place(&picked));
        shares[place(&picked)] += 1;
        *now += latency;
        picked.report(Report::Success, Duration::from_millis(latency), *now);
    }
    shares
}

#[test]
fn one_slow_answer_costs_an_instance_its_share_for_a_moment_only() {
    for first in [20, 100, 1000, 10_000] {
        // Its first answer is slow, or one after many quick ones.
        for before in [0, 300] {
            let balancer = balancer(Policy::Unset, &[1; 3]);
            let mut now = 0;
            one_by_one(&balancer, &mut now, before, |_| 3);
            let picked = balancer.picked(&balancer.instances[0], Probe::default(), now, &mut |_| 0);
            now += first;
            picked.report(Report::Success, Duration::from_millis(first), now);
            one_by_one(&balancer, &mut now, 200, |_| 3);
            let shares = one_by_one(&balancer, &mut now, 300, |_| 3);
            assert!(shares.iter().all(|share| (60..140).contains(share)), "{first} ms after {before}: {shares:?}");
        }
    }
}

#[test]
fn an_instance_that_stays_slow_is_tried_ever_more_seldom() {
    let balancer = balancer(Policy::Unset, &[1; 3]);
    let mut now = 0;
    let latency = |place| if place == 0 { 300 } else { 3 };
    let first = one_by_one(&balancer, &mut now, 1000, latency)[0];
    let later = one_by_one(&balancer, &mut now, 10_000, latency)[0];
    assert!(first < 20 && (1..=10).contains(&later), "{first}, then {later}");
}

#[test]
fn an_instance_that_is_new_or_back_is_not_run_over() {
    let before = balancer(Policy::Unset, &[1; 3]);
    let mut rng = fastrand::Rng::with_seed(7);
    let _busy: Vec<Picked> = (0..300).map(|_| pick(&before, 0, &mut rng).unwrap()).collect();
    let after = Balancer::new(&endpoints(&[1; 4]), before.settings, Some(&before));
    let _more: Vec<Picked> = (0..300).map(|_| pick(&after, 0, &mut rng).unwrap()).collect();
    let load = after.instances[3].load();
    assert!(load <= 8, "{load}");
    report(&after, 3, Report::Unreachable, 0);
    report(&after, 3, Report::Success, 0);
    (0..300).for_each(|_| after.instances[3].state.succeeded());
    let _more: Vec<Picked> = (0..300).map(|_| pick(&after, 0, &mut rng).unwrap()).collect();
    assert!(after.instances[3].load() > 100, "{}", after.instances[3].load());
}

fn hashed(balancer: &Arc<Balancer>, hash: u64, now: u64) -> u16 {
    let mut rng = fastrand::Rng::with_seed(hash);
    let picked = balancer.pick(now, Some(hash), &[], |below| rng.u64(..below)).unwrap();
    picked.instance().address.port
}

#[test]
fn a_hash_leads_to_the_same_instance_and_few_move_when_one_goes() {
    for policy in [RING, Policy::Maglev] {
        let before = balancer(policy, &[1; 10]);
        let after = Balancer::new(&endpoints(&[1; 9]), before.settings, Some(&before));
        let hashes = || (0..2000_u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let gone = FIRST_PORT + 9;
        let stays = |hash: &u64| hashed(&before, *hash, 0) == hashed(&after, *hash, 0);
        let moved = hashes().filter(|hash| hashed(&before, *hash, 0) != gone).filter(|hash| !stays(hash)).count();
        assert!(moved < 150, "{policy:?} moved {moved}");
        assert!(hashes().all(|hash| hashed(&before, hash, 0) == hashed(&before, hash, 99)));
    }
}

#[test]
fn what_hashes_to_an_instance_that_is_out_goes_to_the_same_other_one_and_comes_back() {
    for policy in [RING, Policy::Maglev] {
        let balancer = balancer(policy, &[1; 10]);
        let home = hashed(&balancer, 42, 0);
        report(&balancer, usize::from(home - FIRST_PORT), Report::Unreachable, 0);
        let other = hashed(&balancer, 42, 0);
        assert!(other != home && other == hashed(&balancer, 42, 999));
        assert_eq!(hashed(&balancer, 42, 1000), home);
    }
}

#[test]
fn an_unreachable_instance_is_put_aside_and_probed_by_one_alone() {
    let balancer = balancer(Policy::Unset, &[1, 1]);
    report(&balancer, 0, Report::Unreachable, 0);
    assert_eq!(shares(&balancer, 999, 100), [0, 100]);
    let mut rng = fastrand::Rng::with_seed(7);
    let picks: Vec<Picked> = (0..20).map(|_| pick(&balancer, 1000, &mut rng).unwrap()).collect();
    assert_eq!(picks.iter().filter(|picked| place(picked) == 0).count(), 1);
    for picked in picks {
        let outcome = if place(&picked) == 0 { Report::Unreachable } else { Report::Success };
        picked.report(outcome, Duration::from_millis(5), 1000);
    }
    assert_eq!(shares(&balancer, 2999, 100), [0, 100]);
    // A probe that is dropped without a word leaves it to the next.
    let probes = shares(&balancer, 3000, 100)[0];
    assert!(probes > 1, "{probes}");
    report(&balancer, 0, Report::ServerError, 3000);
    assert!(shares(&balancer, 3000, 100)[0] > 20);
}

#[test]
fn when_all_are_aside_the_one_that_is_due_first_is_tried_and_none_twice() {
    for policy in POLICIES {
        let balancer = balancer(policy, &[1, 1]);
        report(&balancer, 0, Report::Unreachable, 5);
        report(&balancer, 1, Report::Unreachable, 0);
        assert!(!balancer.is_up(10));
        let first = Arc::clone(balancer.pick(10, Some(1), &[], |_| 0).unwrap().instance());
        assert_eq!(first.address.port, FIRST_PORT + 1);
        let second = Arc::clone(balancer.pick(10, Some(1), std::slice::from_ref(&first), |_| 0).unwrap().instance());
        assert_eq!(second.address.port, FIRST_PORT);
        assert!(balancer.pick(10, Some(1), &[first, second], |_| 0).is_none());
        assert!(balancer.is_up(1000));
    }
}

#[test]
fn errors_in_a_row_eject_and_one_probe_decides() {
    let check = PassiveHealthCheck { max_failures: 3, ..PassiveHealthCheck::default() };
    let balancer = with_check(&[1, 1], check);
    fail(&balancer, 0, 2, 0);
    report(&balancer, 0, Report::Success, 0);
    fail(&balancer, 0, 2, 0);
    assert!(balancer.instances[0].is_fit(0));
    report(&balancer, 0, Report::Reset, 0);
    assert_eq!(shares(&balancer, 29_999, 100), [0, 100]);
    // What was under way changes nothing, be it good or bad.
    report(&balancer, 0, Report::Success, 10);
    fail(&balancer, 0, 10, 10);
    assert_eq!(shares(&balancer, 29_999, 100), [0, 100]);

    let mut rng = fastrand::Rng::with_seed(7);
    let mut probe = |now| {
        let picks: Vec<Picked> = (0..20).map(|_| pick(&balancer, now, &mut rng).unwrap()).collect();
        let mut probes: Vec<Picked> = picks.into_iter().filter(|picked| place(picked) == 0).collect();
        assert_eq!(probes.len(), 1);
        probes.remove(0)
    };
    probe(30_000).report(Report::ServerError, Duration::ZERO, 30_000);
    assert_eq!(shares(&balancer, 89_999, 100), [0, 100]);
    drop(probe(90_000));
    probe(90_000).report(Report::Success, Duration::from_millis(1), 90_000);
    fail(&balancer, 0, 2, 90_000);
    assert!(shares(&balancer, 90_000, 100)[0] > 10);
}

/// All may be ejected.
fn all_may_go() -> PassiveHealthCheck {
    PassiveHealthCheck { max_ejection_percent: Some(100), ..PassiveHealthCheck::default() }
}

#[test]
fn where_all_may_be_ejected_there_may_be_none_to_pick() {
    for policy in POLICIES {
        let settings = Settings { policy, http: true, passive_health_check: all_may_go(), ..Settings::default() };
        let balancer = Balancer::new(&endpoints(&[1]), settings, None);
        fail(&balancer, 0, 5, 0);
        assert!(balancer.pick(29_999, Some(1), &[], |_| 0).is_none());
        assert!(!balancer.is_up(29_999) && balancer.is_up(30_000));
        let probe = balancer.pick(30_000, Some(1), &[], |_| 0).unwrap();
        assert!(balancer.pick(30_000, Some(1), &[], |_| 0).is_none());
        let _ = probe.report(Report::Success, Duration::ZERO, 30_000);
        assert!(balancer.pick(30_000, Some(1), &[], |_| 0).is_some());
    }
}

#[test]
fn the_last_usable_instance_is_not_ejected_where_nothing_is_said() {
    for policy in POLICIES {
        let alone = balancer(policy, &[1]);
        fail(&alone, 0, 50, 0);
        assert!(alone.is_up(0) && alone.pick(0, Some(1), &[], |_| 0).is_some());

        let two = balancer(policy, &[1, 1]);
        report(&two, 1, Report::Unreachable, 0);
        fail(&two, 0, 50, 0);
        assert!(two.instances[0].is_fit(0));
        // The other is back, and out again when this one is ejected.
        fail(&two, 0, 5, 1000);
        assert_eq!(shares(&two, 1001, 10), [0, 10]);
        report(&two, 1, Report::Unreachable, 1001);
        let aside = two.pick(1002, Some(1), &[], |_| 0).unwrap();
        assert_eq!(place(&aside), 1);
        let ejected = two.pick(1002, Some(1), &[Arc::clone(aside.instance())], |_| 0).unwrap();
        assert_eq!(place(&ejected), 0);
        let both = [Arc::clone(aside.instance()), Arc::clone(ejected.instance())];
        assert!(two.pick(1002, Some(1), &both, |_| 0).is_none() && !two.is_up(1002));
    }
}

#[test]
fn a_retry_does_not_go_to_an_ejected_instance_while_another_is_in_use() {
    let balancer = balancer(Policy::Unset, &[1, 1]);
    fail(&balancer, 0, 5, 0);
    let tried = [Arc::clone(&balancer.instances[1])];
    assert!(balancer.pick(1, None, &tried, |_| 0).is_none());
}

#[test]
fn no_more_than_the_allowed_part_is_ejected() {
    let parts: [(usize, Option<u32>, usize); 14] = [
        (10, None, 1),
        (3, None, 1),
        (2, None, 1),
        (1, None, 0),
        (29, None, 2),
        (10, Some(10), 1),
        (9, Some(10), 0),
        (10, Some(0), 0),
        (10, Some(35), 3),
        (3, Some(50), 1),
        (1, Some(99), 0),
        (4, Some(100), 4),
        (1, Some(100), 1),
        (3, Some(67), 2),
    ];
    for (instances, percent, expected) in parts {
        let check = PassiveHealthCheck { max_ejection_percent: percent, ..PassiveHealthCheck::default() };
        let balancer = with_check(&vec![1; instances], check);
        for instance in 0..instances {
            fail(&balancer, instance, 5, 0);
        }
        let ejected = balancer.instances.iter().filter(|instance| !instance.is_fit(0)).count();
        assert_eq!(ejected, expected, "{percent:?} % of {instances}");
    }
}

#[test]
fn ejection_is_a_matter_of_chance_where_it_is_enforced_in_part() {
    for (chance, expected) in [(0, 0..=0), (30, 220..=380), (100, 1000..=1000)] {
        let check = PassiveHealthCheck {
            enforcing_consecutive_5xx: chance,
            max_ejection_percent: Some(100),
            max_failures: 1,
            ..PassiveHealthCheck::default()
        };
        let balancer = with_check(&[1; 1000], check);
        let mut rng = fastrand::Rng::with_seed(7);
        for instance in &balancer.instances {
            let picked = balancer.picked(instance, Probe::default(), 0, &mut |below| rng.u64(..below));
            picked.report(Report::ServerError, Duration::ZERO, 0);
        }
        let ejected = balancer.instances.iter().filter(|instance| !instance.is_fit(0)).count();
        assert!(expected.contains(&ejected), "{chance} %: {ejected}");
    }
}

#[test]
fn connections_that_fail_count_but_do_not_eject_alone() {
    let balancer = with_check(&[1], all_may_go());
    for second in 0..10 {
        report(&balancer, 0, Report::Unreachable, second * 40_000);
    }
    assert!(balancer.pick(400_000, None, &[], |_| 0).is_some());
    report(&balancer, 0, Report::ServerError, 400_000);
    assert!(balancer.pick(400_000, None, &[], |_| 0).is_none());
}

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
fn picks_go_on_with_most_of_many_instances_out() {
    for policy in POLICIES {
        let balancer = balancer(policy, &[1; 1000]);
        for instance in (0..1000).filter(|instance| instance % 100 != 3) {
            report(&balancer, instance, Report::Unreachable, 0);
        }
        let mut rng = fastrand::Rng::with_seed(7);
        for hash in 0..100_u64 {
            let hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let picked = balancer.pick(10, Some(hash), &[], |below| rng.u64(..below)).unwrap();
            assert_eq!(place(&picked) % 100, 3, "{policy:?}");
        }
    }
}

#[test]
fn a_target_without_instances_has_none_to_pick() {
    for policy in POLICIES {
        let balancer = balancer(policy, &[]);
        assert!(balancer.pick(0, Some(1), &[], |_| 0).is_none() && !balancer.is_up(0));
        assert!(balancer.no_endpoint_reason().starts_with("no instance is registered"));
    }
}

#[test]
fn threads_at_once_lose_no_count_and_send_one_probe() {
    let balancer = balancer(Policy::Unset, &[1; 2]);
    fail(&balancer, 0, 5, 0);
    let probes = std::thread::scope(|scope| {
        let worker = |seed| {
            let balancer = &balancer;
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                let held = (0..2000).map(|_| pick(balancer, 30_000, &mut rng).unwrap());
                // All are held until the end, so that a second probe would be one at the same time.
                held.collect::<Vec<_>>()
            })
        };
        let workers: Vec<_> = (0..4).map(worker).collect();
        let picks: Vec<Picked> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
        picks.iter().filter(|picked| place(picked) == 0).count()
    });
    assert_eq!(probes, 1);
    assert_eq!(balancer.instances.iter().map(|instance| instance.load()).sum::<u32>(), 0);
}

#[test]
fn an_instance_that_hangs_gets_no_more_while_its_estimate_decays() {
    let balancer = balancer(Policy::Unset, &[1; 2]);
    let mut rng = fastrand::Rng::with_seed(7);
    for now in 0..200 {
        let picked = pick(&balancer, now, &mut rng).unwrap();
        picked.report(Report::Success, Duration::from_millis(5), now);
    }
    // The first answers nothing from now on, the other one as ever, to one request each 10 ms for 20 s.
    let mut hanging: Vec<Picked> = Vec::new();
    for now in (200..20_000).step_by(10) {
        let picked = pick(&balancer, now, &mut rng).unwrap();
        if place(&picked) == 0 {
            hanging.push(picked);
        } else {
            picked.report(Report::Success, Duration::from_millis(5), now + 5);
        }
    }
    assert!((1..4).contains(&hanging.len()), "{}", hanging.len());
    // It answers again.
    hanging.into_iter().for_each(|picked| drop(picked.report(Report::Success, Duration::from_secs(20), 20_000)));
    let shares = shares(&balancer, 60_000, 100);
    assert!(shares[0] > 20, "{shares:?}");
}

#[test]
fn those_who_ask_for_long_answers_say_nothing_while_others_are_answered() {
    let balancer = balancer(Policy::Unset, &[1; 2]);
    let first = &balancer.instances[0];
    let _polls: Vec<Picked> = (0..5).map(|_| balancer.picked(first, Probe::default(), 0, &mut |_| 0)).collect();
    for now in 0..10_000 {
        (0..2).for_each(|instance| report(&balancer, instance, Report::Success, now));
    }
    let (polled, other) = balancer.instances[0].latencies(&balancer.instances[1], 10_000).unwrap();
    assert!(polled < other * 1.5, "{polled} {other}");
}

#[test]
fn an_instance_whose_connections_are_ended_unanswered_is_put_aside_and_comes_last() {
    for policy in POLICIES {
        let balancer = balancer(policy, &[1; 3]);
        let mut rng = fastrand::Rng::with_seed(7);
        let dead = balancer.instances[1].clone();
        let mut failed = 0;
        for now in 0..60_000 {
            let picked = pick(&balancer, now, &mut rng).unwrap();
            if picked.instance().is_same(&dead) {
                failed += 1;
                let _ = picked.closed_unanswered(now);
            } else {
                let _ = picked.connected(now);
            }
        }
        // Two, then one after 1, 3, 7, 15 and 31 s.
        assert!((6..=9).contains(&failed), "{policy:?}: {failed}");
        let _ = balancer.picked(&dead, Probe::default(), 60_000, &mut |_| 0).connected(60_000);
        assert!(dead.is_fit(60_000));
    }
}

#[test]
fn where_every_instance_ends_connections_unanswered_each_gets_its_part() {
    let balancer = balancer(Policy::Unset, &[1; 3]);
    let mut rng = fastrand::Rng::with_seed(7);
    let mut counts = [0; 3];
    for now in (0..300_000).step_by(10) {
        let picked = pick(&balancer, now, &mut rng).expect("the last resort");
        counts[place(&picked)] += 1;
        let _ = picked.closed_unanswered(now);
    }
    assert!(counts.iter().all(|count| *count > 9_000), "{counts:?}");
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

#[test]
fn as_many_as_give_no_answer_are_ejected_while_another_is_left() {
    for (outcome, ejected) in [(Report::Reset, 3), (Report::ServerError, 1)] {
        let balancer = balancer(Policy::Unset, &[1; 4]);
        for instance in 0..4 {
            (0..20).for_each(|_| report(&balancer, instance, outcome, 0));
        }
        let out = balancer.instances.iter().filter(|instance| !instance.is_fit(0)).count();
        assert_eq!(out, ejected, "{outcome:?}");
    }
}
