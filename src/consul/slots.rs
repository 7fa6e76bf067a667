//! Turn-taking for a bounded number of connections.
//!
//! The agent counts the connections of all programs on a host together, so the bound that was configured
//! may be more than there is to have. Each time the agent refuses a connection for that reason, one slot is
//! put away for a while ([`Slot::withhold`]).
//!
//! Walking away from a request that blocks does not end its connection at the agent's end: the handler stays
//! until its wait is over (seen from 1.8.7 to 1.22). So a part of the bound is spare, for connections of that
//! kind, and where there are more of them, the slot itself is put away until then.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// How long a blocking query waits where it need not make room for others. The agent keeps a handler for
/// as long as this after we have gone away, so it is not longer.
pub(super) const LONG_WAIT: Duration = Duration::from_secs(60);

/// Within about this time everyone who takes turns has had one.
pub(super) const CYCLE: Duration = Duration::from_secs(10);

const SHORTEST_WAIT: Duration = Duration::from_secs(1);

/// Connections that are left to sweeps of watches that rest.
pub(super) const SWEEPERS: usize = 2;

/// How long a slot stays away that the agent had no connection for.
const WITHHELD: Duration = Duration::from_secs(30);

/// So many slots are never put away.
const FEWEST: usize = 4;

/// Who gets a free slot first, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Something that must never wait for its turn.
    Always = 0,
    /// A request that is answered at once.
    Prompt = 1,
    /// A request that is answered at once, because something may have changed.
    Sweep = 2,
    /// A request that blocks, and gives its slot up when one of the others wants it.
    Turn = 3,
}

pub(super) struct Slots {
    total: usize,
    /// So many connections that were walked away from do not count against `total`.
    spare: usize,
    state: Mutex<State>,
    /// Tells that there are fewer slots than there were.
    pub(super) shrunk: Notify,
}

#[derive(Default)]
struct State {
    free: usize,
    waiting: [VecDeque<oneshot::Sender<Slot>>; 4],
    /// Slots that can be asked for, the longest held first.
    askable: VecDeque<Arc<Notify>>,
    /// When each of the slots that are put away is back.
    withheld: Vec<Instant>,
    /// When the agent is done with each of the requests that were walked away from.
    abandoned: Vec<Instant>,
    /// Watches that keep a slot.
    always: usize,
    /// Watches that keep one so that others may rest.
    alarms: usize,
    /// Watches that take turns, and those that would if they did not rest.
    turns: usize,
    resting: usize,
}

/// How many want slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) total: usize,
    /// Watches that keep a slot, alarms aside.
    pub(super) always: usize,
    /// The other watches, whether they rest or not.
    pub(super) turns: usize,
}

/// The right to one connection, for as long as this lives.
pub(super) struct Slot {
    /// `None` once the slot has been passed on.
    slots: Option<Arc<Slots>>,
    asked: Option<Arc<Notify>>,
    /// Until when the agent is busy with the request that is under way.
    busy: Option<Instant>,
}

/// How a watch comes by its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Always,
    Alarm,
    Turn,
}

/// A watch that is counted.
pub(super) struct Member {
    slots: Arc<Slots>,
    kind: Kind,
    resting: AtomicBool,
}

impl Slots {
    /// For `bound` connections, a quarter of which is spare.
    pub(super) fn new(bound: usize) -> Arc<Self> {
        let spare = bound.div_ceil(4);
        let total = (bound - spare).max(1);
        let state = Mutex::new(State { free: total, ..State::default() });
        Arc::new(Self { total, spare, state, shrunk: Notify::new() })
    }

    pub(super) fn join(self: &Arc<Self>, kind: Kind) -> Member {
        *self.lock().count(kind) += 1;
        Member { slots: self.clone(), kind, resting: AtomicBool::new(false) }
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        let total = self.total - state.withheld.len();
        Load { total, always: state.always, turns: state.turns + state.resting }
    }

    pub(super) async fn acquire(self: &Arc<Self>, claim: Claim) -> Slot {
        let granted = {
            let mut state = self.lock();
            let (grant, granted) = oneshot::channel();
            state.waiting[claim as usize].push_back(grant);
            self.settle(&mut state);
            let waits = state.waiting[claim as usize].back().is_some_and(|last| !last.is_closed());
            // Without a spare connection, whoever is asked would make no room.
            if waits
                && matches!(claim, Claim::Always | Claim::Prompt)
                && state.abandoned.len() < self.spare
                && let Some(asked) = state.askable.pop_front()
            {
                asked.notify_one();
            }
            granted
        };
        match granted.await {
            Ok(slot) => slot,
            // Grants are only dropped together with the slots, which `self` keeps.
            Err(_) => std::future::pending().await,
        }
    }

    /// Hands free slots to those who wait for one.
    fn settle(self: &Arc<Self>, state: &mut State) {
        let now = Instant::now();
        let away = state.withheld.len();
        state.withheld.retain(|back| *back > now);
        state.free += away - state.withheld.len();
        state.abandoned.retain(|done| *done > now);
        while state.free > 0 {
            let next = [Claim::Always, Claim::Prompt, Claim::Sweep, Claim::Turn]
                .into_iter()
                .find_map(|claim| state.waiting[claim as usize].pop_front().map(|grant| (claim, grant)));
            let Some((claim, grant)) = next else { return };
            let asked = (claim == Claim::Turn).then(Arc::<Notify>::default);
            match grant.send(Slot { slots: Some(self.clone()), asked: asked.clone(), busy: None }) {
                Ok(()) => {
                    state.free -= 1;
                    state.askable.extend(asked);
                }
                // Nobody waits there any more. The slot must not come back here while the lock is held.
                Err(mut slot) => slot.slots = None,
            }
        }
    }

    /// A slot that is not to be had before `back`; but for the last few.
    fn put_away(self: &Arc<Self>, state: &mut State, back: Instant) {
        if self.total - state.withheld.len() > FEWEST {
            state.withheld.push(back);
            self.shrunk.notify_one();
        } else {
            state.free += 1;
            self.settle(state);
        }
    }

    /// How long a blocking query may keep its slot.
    pub(super) fn wait(&self, claim: Claim) -> Duration {
        let state = self.lock();
        let total = self.total - state.withheld.len();
        if claim == Claim::Always || state.fits(total) {
            return LONG_WAIT;
        }
        let always = state.always + state.alarms;
        // Where not even those fit that should keep their slot, they take turns with the rest.
        let (slots, watches) = match total.checked_sub(always) {
            Some(slots @ 1..) => (slots, state.turns),
            _ => (total, always + state.turns),
        };
        CYCLE.mul_f64(slots as f64 / watches.max(1) as f64).clamp(SHORTEST_WAIT, LONG_WAIT)
    }

    /// Whether those that keep a slot leave one to the others. Alarms do, or are given up.
    pub(super) fn always_fits(&self) -> bool {
        let state = self.lock();
        let total = self.total - state.withheld.len();
        state.always < total || state.fits(total)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A slot that is given back cannot be asked for.
    fn forget(&mut self, asked: Option<Arc<Notify>>) {
        if let Some(asked) = asked {
            self.askable.retain(|other| !Arc::ptr_eq(other, &asked));
        }
    }

    fn count(&mut self, kind: Kind) -> &mut usize {
        match kind {
            Kind::Always => &mut self.always,
            Kind::Alarm => &mut self.alarms,
            Kind::Turn => &mut self.turns,
        }
    }

    /// Whether everyone has a slot who wants one for long.
    fn fits(&self, total: usize) -> bool {
        let sweepers = if self.resting > 0 { SWEEPERS } else { 0 };
        self.always + self.alarms + self.turns + sweepers <= total
    }
}

impl Slot {
    /// Ends when somebody else needs the slot; never for one that is kept.
    pub(super) async fn asked_for(&self) {
        match &self.asked {
            Some(asked) => asked.notified().await,
            None => std::future::pending().await,
        }
    }
}

impl Slot {
    /// A request that blocks for as long as `wait` is sent.
    pub(super) fn begin(&mut self, wait: Duration) {
        // The agent adds up to a sixteenth, so that requests do not wake together.
        self.busy = Some(Instant::now() + wait + wait / 16);
    }

    /// The request was answered.
    pub(super) fn end(&mut self) {
        self.busy = None;
    }

    /// Gives the slot back later than now, since the agent has no connection for it.
    pub(super) fn withhold(mut self) {
        let Some(slots) = self.slots.take() else { return };
        let mut state = slots.lock();
        state.forget(self.asked.take());
        slots.put_away(&mut state, Instant::now() + WITHHELD);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(slots) = self.slots.take() else { return };
        let mut state = slots.lock();
        state.forget(self.asked.take());
        match self.busy {
            Some(done) if state.abandoned.len() >= slots.spare => slots.put_away(&mut state, done),
            done => {
                state.abandoned.extend(done);
                state.free += 1;
                slots.settle(&mut state);
            }
        }
    }
}

impl Member {
    /// Tells whether one that takes turns wants none for now.
    pub(super) fn rest(&self, rests: bool) {
        if self.resting.swap(rests, Ordering::Relaxed) == rests {
            return;
        }
        let mut state = self.slots.lock();
        let (from, to) = if rests { (1, 0) } else { (0, 1) };
        state.turns = state.turns + to - from;
        state.resting = state.resting + from - to;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.rest(false);
        *self.slots.lock().count(self.kind) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;

    #[tokio::test]
    async fn a_free_slot_goes_to_the_most_urgent() {
        let slots = Slots::new(1);
        let held = slots.acquire(Claim::Prompt).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for claim in [Claim::Turn, Claim::Prompt, Claim::Always] {
            let (slots, order) = (slots.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let _slot = slots.acquire(claim).await;
                order.lock().expect("no panics").push(claim);
            }));
            yield_now().await;
        }
        drop(held);
        for task in tasks {
            task.await.expect("no panics");
        }
        assert_eq!(*order.lock().expect("no panics"), [Claim::Always, Claim::Prompt, Claim::Turn]);
        assert_eq!(slots.lock().free, 1);
    }

    #[tokio::test]
    async fn whoever_blocks_is_asked_to_make_room() {
        let slots = Slots::new(3);
        let kept = slots.acquire(Claim::Always).await;
        let turn = slots.acquire(Claim::Turn).await;
        let waiting = tokio::spawn({
            let slots = slots.clone();
            async move { slots.acquire(Claim::Prompt).await }
        });
        turn.asked_for().await;
        drop(turn);
        let prompt = waiting.await.expect("no panics");
        assert!(prompt.asked.is_none() && kept.asked.is_none());
        drop((prompt, kept));
        let state = slots.lock();
        assert_eq!((state.free, state.askable.len()), (2, 0));
    }

    #[tokio::test]
    async fn one_who_gave_up_waiting_takes_no_slot() {
        let slots = Slots::new(1);
        let held = slots.acquire(Claim::Turn).await;
        for claim in [Claim::Always, Claim::Turn] {
            let waiting = tokio::spawn({
                let slots = slots.clone();
                async move { drop(slots.acquire(claim).await) }
            });
            yield_now().await;
            waiting.abort();
            assert!(waiting.await.is_err());
        }
        drop(held);
        let state = slots.lock();
        assert_eq!((state.free, state.askable.len()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn slots_that_the_agent_has_no_connection_for_are_put_away_for_a_while() {
        let slots = Slots::new(8);
        let _members: Vec<_> =
            (0..6).map(|number| slots.join(if number < 4 { Kind::Always } else { Kind::Turn })).collect();
        assert!(slots.always_fits() && slots.wait(Claim::Turn) == LONG_WAIT);
        for _ in 0..10 {
            slots.acquire(Claim::Turn).await.withhold();
        }
        assert_eq!(slots.lock().free, FEWEST);
        // Four that keep a slot leave none to the other two, so that all six take turns.
        assert!(!slots.always_fits());
        assert_eq!(slots.wait(Claim::Turn), CYCLE.mul_f64(4.0 / 6.0));
        let held = [(); FEWEST].map(|()| slots.acquire(Claim::Prompt));
        let mut all = Vec::new();
        for slot in held {
            all.push(slot.await);
        }
        tokio::time::sleep(WITHHELD).await;
        all.push(slots.acquire(Claim::Turn).await);
        all.push(slots.acquire(Claim::Turn).await);
        drop(all);
        assert_eq!(slots.lock().free, 6);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_were_walked_away_from_count_until_the_agent_is_done() {
        let slots = Slots::new(8);
        let mut held = Vec::new();
        for _ in 0..6 {
            let mut slot = slots.acquire(Claim::Turn).await;
            slot.begin(LONG_WAIT);
            held.push(slot);
        }
        held[5].end();
        held.truncate(2);
        // Two connections are spare, and one request was answered; the fourth keeps its slot away.
        let counts = || {
            let state = slots.lock();
            (state.free, state.abandoned.len(), state.withheld.len())
        };
        assert_eq!(counts(), (3, 2, 1));
        for _ in 0..3 {
            held.push(slots.acquire(Claim::Turn).await);
        }
        // Nobody is asked for a slot that would not come.
        let waiting = tokio::spawn({
            let slots = slots.clone();
            async move { slots.acquire(Claim::Prompt).await }
        });
        tokio::time::sleep(LONG_WAIT).await;
        assert!(!waiting.is_finished());
        assert_eq!(slots.lock().askable.len(), 5);
        tokio::time::sleep(LONG_WAIT / 16).await;
        drop(held.pop());
        let _prompt = waiting.await.expect("no panics");
        assert_eq!(counts(), (1, 0, 0));
    }

    #[test]
    fn waits_shorten_so_that_everyone_has_a_turn() {
        let slots = Slots::new(30);
        let mut members: Vec<_> = (0..4).map(|_| slots.join(Kind::Always)).collect();
        members.extend((0..18).map(|_| slots.join(Kind::Turn)));
        assert_eq!(slots.wait(Claim::Turn), LONG_WAIT);
        members.extend((0..18).map(|_| slots.join(Kind::Turn)));
        assert_eq!(slots.wait(Claim::Turn), Duration::from_secs(5));
        members.extend((0..400).map(|_| slots.join(Kind::Turn)));
        assert_eq!(slots.wait(Claim::Turn), SHORTEST_WAIT);
        assert_eq!(slots.wait(Claim::Always), LONG_WAIT);
        members.clear();
        assert_eq!(slots.wait(Claim::Turn), LONG_WAIT);
    }
}
