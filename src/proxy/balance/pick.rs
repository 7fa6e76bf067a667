//! Which instance of a target is picked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::balancer::{Balancer, note};
use super::instance::Instance;
use super::report::{Picked, Probe};
use crate::snapshot::{HashTable, Policy};

impl Balancer {
    /// Picks an instance that is not among `tried`. `None`: there is none, or the others are ejected; who may
    /// send to the same instance again then asks without `tried`.
    ///
    /// `hash` counts with the policies that go by one; without it any instance will do. `random` gives numbers
    /// below its argument.
    #[must_use]
    pub fn pick(
        self: &Arc<Self>,
        now: u64,
        hash: Option<u64>,
        tried: &[Arc<Instance>],
        mut random: impl FnMut(u64) -> u64,
    ) -> Option<Picked> {
        note(&self.shared.used, now);
        let attempt = Attempt { now, tried };
        // Another thread may be faster at a probe. That is rare, and twice in a row rarer.
        for _ in 0..PROBES {
            let Some(instance) = self.choose(hash, &attempt, &mut random) else { break };
            if let Some(picked) = self.take(instance, now, &mut random) {
                return Some(picked);
            }
        }
        self.last_resort(&attempt, &mut random)
    }

    fn choose(
        &self,
        hash: Option<u64>,
        attempt: &Attempt<'_>,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Option<&Arc<Instance>> {
        match self.settings.policy {
            Policy::Unset => self.least_loaded(2, self.settings.http, attempt, random),
            Policy::LeastRequest { choices } => self.least_loaded(choices, false, attempt, random),
            Policy::RoundRobin => self.next_in_turn(attempt),
            Policy::Random => self.draw(attempt, random),
            Policy::RingHash { .. } | Policy::Maglev => match (hash, &self.table) {
                (Some(hash), Some(table)) => self.hashed(hash, table, attempt),
                _ => self.draw(attempt, random),
            },
        }
    }

    /// Of so many that are drawn by weight, the least loaded.
    fn least_loaded(
        &self,
        choices: u32,
        by_latency: bool,
        attempt: &Attempt<'_>,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Option<&Arc<Instance>> {
        let now = by_latency.then_some(attempt.now);
        let better = |best, other: &Arc<Instance>| attempt.fits(other) && other.beats(best, now);
        let mut best = self.draw(attempt, random)?;
        if self.instances.len() <= choices.max(2) as usize {
            return Some(
                self.instances.iter().fold(best, |best, other| if better(best, other) { other } else { best }),
            );
        }
        for _ in 1..choices.max(2) {
            match self.draw_other(best, random) {
                Some(other) if better(best, other) => best = other,
                _ => {}
            }
        }
        Some(best)
    }

    /// A random instance that fits, by weight.
    fn draw(&self, attempt: &Attempt<'_>, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        let drawn = (0..DRAWS).find_map(|_| self.draw_any(random).filter(|instance| attempt.fits(instance)));
        drawn.or_else(|| self.search(usize::try_from(random(self.instances.len().max(1) as u64)).unwrap_or(0), attempt))
    }

    fn draw_any(&self, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        match self.cumulated.last() {
            Some(&total) => self.at(random(total)),
            None if self.instances.is_empty() => None,
            None => self.instances.get(usize::try_from(random(self.instances.len() as u64)).unwrap_or(0)),
        }
    }

    /// With a chance by its weight, but another one.
    fn draw_other(&self, first: &Arc<Instance>, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        let other = |instance: &&Arc<Instance>| !Arc::ptr_eq(instance, first);
        let drawn = (0..2).find_map(|_| self.draw_any(random).filter(other));
        drawn.or_else(|| {
            let start = usize::try_from(random(self.instances.len() as u64)).unwrap_or(0);
            let (before, after) = self.instances.split_at(start.min(self.instances.len()));
            after.iter().chain(before).find(other)
        })
    }

    /// The instance that a point below the sum of weights belongs to.
    fn at(&self, point: u64) -> Option<&Arc<Instance>> {
        self.instances.get(self.cumulated.partition_point(|&sum| sum <= point))
    }

    fn next_in_turn(&self, attempt: &Attempt<'_>) -> Option<&Arc<Instance>> {
        let next = || {
            let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
            match self.cumulated.last() {
                Some(&total) => {
                    // The stride has no divisor in common with the total: each point has its turn once a round.
                    let point = u128::from(turn) * u128::from(self.stride) % u128::from(total);
                    self.at(u64::try_from(point).unwrap_or(0))
                }
                None => self.instances.get(usize::try_from(turn).unwrap_or(0).checked_rem(self.instances.len())?),
            }
        };
        let drawn = (0..DRAWS).find_map(|_| next().filter(|instance| attempt.fits(instance)));
        drawn.or_else(|| {
            let turn = self.shared.turn.load(Ordering::Relaxed).checked_rem(self.instances.len() as u64)?;
            self.search(usize::try_from(turn).unwrap_or(0), attempt)
        })
    }

    fn hashed(&self, hash: u64, table: &HashTable, attempt: &Attempt<'_>) -> Option<&Arc<Instance>> {
        let candidates = table.candidates(hash).take(CANDIDATES).filter_map(|index| self.instances.get(index));
        let mut fitting = candidates.filter(|instance| attempt.fits(instance));
        fitting.next().or_else(|| {
            let start = hash.checked_rem(self.instances.len() as u64)?;
            self.search(usize::try_from(start).unwrap_or(0), attempt)
        })
    }

    /// The first that fits, from a place on.
    fn search(&self, start: usize, attempt: &Attempt<'_>) -> Option<&Arc<Instance>> {
        let (before, after) = self.instances.split_at(start.min(self.instances.len()));
        after.iter().chain(before).find(|instance| attempt.fits(instance))
    }

    /// Among those put aside, the one whose time is up first. Then, if there is none that could be used, one that is
    /// ejected, unless the configuration says how many may be.
    fn last_resort(self: &Arc<Self>, attempt: &Attempt<'_>, random: &mut impl FnMut(u64) -> u64) -> Option<Picked> {
        let untried = || self.instances.iter().filter(|instance| !attempt.was_tried(instance));
        let aside = untried().filter(|instance| instance.state.circuit.lets_in(attempt.now));
        if let Some(instance) = aside.min_by_key(|instance| instance.state.aside.due()) {
            let circuit = instance.state.circuit.enter(attempt.now)?;
            return Some(self.picked(instance, Probe::new(instance, false, circuit), attempt.now, random));
        }
        let panics = self.settings.passive_health_check.max_ejection_percent.is_none() && !self.is_up(attempt.now);
        let ejected = untried().filter(|_| panics).min_by_key(|instance| instance.load());
        ejected.map(|instance| self.picked(instance, Probe::default(), attempt.now, random))
    }

    /// `None`: another has just gone to probe it.
    fn take(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        now: u64,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Option<Picked> {
        let aside = instance.state.aside.enter(now)?;
        let mut probe = Probe::new(instance, aside, false);
        if instance.state.circuit.enter(now)? {
            probe = probe.with_circuit(instance);
        }
        Some(self.picked(instance, probe, now, random))
    }
}

/// Which instances will do.
struct Attempt<'a> {
    now: u64,
    tried: &'a [Arc<Instance>],
}

impl Attempt<'_> {
    fn fits(&self, instance: &Arc<Instance>) -> bool {
        instance.is_fit(self.now) && !self.was_tried(instance)
    }

    fn was_tried(&self, instance: &Arc<Instance>) -> bool {
        self.tried.iter().any(|tried| tried.is_same(instance))
    }
}

/// Random draws before all instances are searched.
const DRAWS: usize = 8;
/// Places of a hash table that are tried before all instances are searched.
const CANDIDATES: usize = 128;
const PROBES: usize = 3;
