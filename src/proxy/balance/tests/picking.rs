//! Who gets how much.

use super::*;

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
