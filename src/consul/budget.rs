//! The connection budget: how many requests to the agent are under way at one time.
//!
//! The agent counts the connections of all programs on a host together and refuses the surplus (200 for each client
//! address by default, Consul 1.8.7 to 1.22). So the budget grows by one and is halved when a connection is refused,
//! as TCP does with its window. A refusal right after it has grown takes that one back. Each refusal doubles the time until
//! it grows again, so that many sidecars settle below the agent's limit instead of trying it out forever.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::schedule::Room;

/// Largest number of connections of use: one for intentions, one for each blocking request, and a few for answers.
const MOST: usize = 8;

/// Concurrent requests on one HTTP/2 connection.
const STREAMS: usize = 8;

/// Time until the budget grows by one connection after the first refusal.
const GROWTH: Duration = Duration::from_secs(60);
/// Longest time until the budget grows by one connection.
const SLOWEST_GROWTH: Duration = Duration::from_secs(30 * 60);

/// A refusal within this time after the budget has grown means that it has grown too far.
const PROBE: Duration = Duration::from_secs(10);

/// With this many connections or fewer, none is left for long waits.
const SCARCE: usize = 3;

/// Time after a refusal for which connections count as scarce. A sidecar below its maximum has tried for one more by
/// then.
const SHORTAGE: Duration = Duration::from_secs(60 * 60);

/// Refusals within this time count as one.
const ONE_MOMENT: Duration = Duration::from_secs(1);

pub(super) struct Budget {
    usage: watch::Sender<Usage>,
}

/// How much of the budget there is to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    /// Most connections by the settings.
    most: usize,
    /// Connections that may be open now.
    allowed: usize,
    /// One HTTP/2 connection carries all requests.
    multiplexed: bool,
    refused_at: Option<Instant>,
    grows_at: Option<Instant>,
    growth: Duration,
    grown_at: Option<Instant>,
}

impl Usage {
    fn new(most: usize) -> Self {
        let most = most.clamp(1, MOST);
        Self {
            most,
            allowed: most,
            multiplexed: false,
            refused_at: None,
            grows_at: None,
            growth: GROWTH,
            grown_at: None,
        }
    }

    /// Requests that may be under way besides the one for intentions, which always may. With none, that one's
    /// connection serves the others in between.
    pub(super) fn shared(&self) -> usize {
        if self.multiplexed { STREAMS - 1 } else { self.allowed - 1 }
    }

    /// Whether the agent's connections have been enough for this host lately. They are scarce where one more refusal or two may
    /// leave no request besides the one for intentions.
    pub(super) fn room(&self, now: Instant) -> Room {
        let recent = self.refused_at.is_some_and(|at| now.saturating_duration_since(at) < SHORTAGE);
        match recent && !self.multiplexed {
            true if self.allowed <= SCARCE => Room::Scarce,
            true => Room::Crowded,
            false => Room::Enough,
        }
    }

    fn refused(&mut self, now: Instant, chance: f64) {
        if self.multiplexed || self.refused_at.is_some_and(|at| now.saturating_duration_since(at) < ONE_MOMENT) {
            return;
        }
        // What was one too many is given back; what was enough so far and is not any more is halved.
        let is_probe = self.grown_at.take().is_some_and(|at| now.saturating_duration_since(at) < PROBE);
        self.allowed = if is_probe { self.allowed - 1 } else { self.allowed / 2 }.max(1);
        self.refused_at = Some(now);
        self.grows_at = Some(now + self.growth.mul_f64(0.75 + 0.5 * chance));
        self.growth = (self.growth * 2).min(SLOWEST_GROWTH);
    }

    /// Grows by one if it is time; says whether it did.
    fn grow(&mut self, now: Instant, chance: f64) -> bool {
        if self.grows_at.is_none_or(|at| at > now) {
            return false;
        }
        self.allowed += 1;
        self.grown_at = Some(now);
        self.grows_at = Some(now + self.growth.mul_f64(0.75 + 0.5 * chance));
        if self.allowed >= self.most {
            self.allowed = self.most;
            self.grows_at = None;
        }
        true
    }
}

impl Budget {
    /// For at most so many connections.
    pub(super) fn new(most: usize) -> Self {
        Self { usage: watch::Sender::new(Usage::new(most)) }
    }

    pub(super) fn usage(&self) -> Usage {
        *self.usage.borrow()
    }

    /// Waits until connections have not been enough lately.
    pub(super) async fn shortage(&self) {
        // The sender lives in the budget, so this cannot fail.
        let _ = self.follow().wait_for(|usage| usage.room(Instant::now()) != Room::Enough).await;
    }

    /// Tells of changes.
    pub(super) fn follow(&self) -> watch::Receiver<Usage> {
        self.usage.subscribe()
    }

    /// The agent refused a connection.
    pub(super) fn refused(&self, chance: f64) {
        let before = self.usage().allowed;
        self.usage.send_modify(|usage| usage.refused(Instant::now(), chance));
        let after = self.usage().allowed;
        if after < before {
            tracing::info!(
                "The agent has no connection left for this host: using {after} at a time instead of {before}; raise \
                 limits.http_max_conns_per_client of the agent, or use a unix socket or https"
            );
        }
    }

    /// Whether the agent's answers come over HTTP/2.
    pub(super) fn set_multiplexed(&self, multiplexed: bool) {
        self.usage.send_if_modified(|usage| std::mem::replace(&mut usage.multiplexed, multiplexed) != multiplexed);
    }

    /// Waits until shared request number `number` may be sent. `follower` is one of [`Self::follow`].
    pub(super) async fn reserve(&self, number: usize, follower: &mut watch::Receiver<Usage>, chance: impl Fn() -> f64) {
        loop {
            let usage = *follower.borrow_and_update();
            if number < usage.shared() {
                return;
            }
            let grows_at = usage.grows_at.filter(|_| number == usage.shared());
            tokio::select! {
                // The sender lives in the budget, so this cannot fail.
                _ = follower.changed() => {}
                () = tokio::time::sleep_until(grows_at.unwrap_or_else(Instant::now)), if grows_at.is_some() => {
                    self.usage.send_if_modified(|usage| usage.grow(Instant::now(), chance()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_halved_when_refused_and_grows_by_one() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut usage = Usage::new(4);
        assert_eq!(usage.shared(), 3);
        usage.refused(at(0), 0.5);
        // Refused at the same moment, which says nothing new.
        usage.refused(at(0), 0.5);
        assert_eq!(usage.shared(), 1);
        usage.refused(at(2), 0.5);
        usage.refused(at(4), 0.5);
        assert_eq!((usage.allowed, usage.shared()), (1, 0));
        // The third refusal, so that it takes four times as long.
        assert!(!usage.grow(at(243), 0.5));
        assert!(usage.grow(at(244), 0.5));
        assert_eq!(usage.shared(), 1);
        for seconds in [1000, 2000, 3000] {
            usage.grow(at(seconds), 0.5);
        }
        assert_eq!((usage.allowed, usage.grows_at), (4, None));
    }

    #[test]
    fn what_was_one_too_many_is_given_back() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut usage = Usage::new(8);
        assert_eq!(usage.room(at(0)), Room::Enough);
        usage.refused(at(0), 0.5);
        assert!((usage.allowed, usage.room(at(0))) == (4, Room::Crowded) && usage.grow(at(60), 0.5));
        usage.refused(at(65), 0.5);
        assert_eq!(usage.allowed, 4);
        // What was enough is not any more.
        usage.refused(at(70), 0.5);
        assert_eq!((usage.allowed, usage.room(at(70))), (2, Room::Scarce));
        assert!(SHORTAGE > SLOWEST_GROWTH.mul_f64(1.25));
        assert_eq!(usage.room(at(70) + SHORTAGE), Room::Enough);
    }

    #[test]
    fn a_single_connection_for_all_needs_no_budget() {
        let mut usage = Usage::new(2);
        usage.multiplexed = true;
        usage.refused(Instant::now(), 0.5);
        assert_eq!((usage.allowed, usage.shared()), (2, STREAMS - 1));
    }

    #[test]
    fn more_than_is_of_use_is_not_used() {
        assert_eq!(Usage::new(128).shared(), MOST - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_over_the_budget_waits_for_it_to_grow() {
        let budget = Budget::new(4);
        let mut follower = budget.follow();
        budget.reserve(2, &mut follower, || 0.5).await;
        budget.refused(0.5);
        let start = Instant::now();
        budget.reserve(0, &mut follower, || 0.5).await;
        assert!(start.elapsed().is_zero());
        budget.reserve(1, &mut follower, || 0.5).await;
        assert_eq!(start.elapsed().as_secs(), GROWTH.as_secs());
    }
}
