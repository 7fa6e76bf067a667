//! What goes badly, and what becomes of it.

use super::*;

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
