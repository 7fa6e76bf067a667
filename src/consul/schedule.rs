//! The refetch scheduler: which request is sent next. Time and chance are arguments; nothing here does IO.
//!
//! Every query is *fetched*, which is answered at once. What tells when to fetch it again is, by its [`Role`], a
//! request of its own that blocks, the watch of a [`Table`] that its answer is made from, or a period.
//!
//! What keeps a change from being lost: **an answer counts as current only if it was asked for after its table's index
//! had come.** Whatever changes later is past that index. An answer that was asked for earlier is fetched once more.
//! That the table and the answer speak of the same state takes answers of the leader. Where a table's index cannot be
//! had or relied on, its queries are fetched periodically.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::endpoint::Table;

/// How long a request blocks that need not make room for others, where there are connections enough. The agent keeps a handler for as long as this after
/// we have gone away, so it is not longer.
pub(super) const LONG_WAIT: Duration = Duration::from_secs(60);

/// What has blocked for that long without news waits for up to so long before it blocks again. Its connection is closed
/// meanwhile: on a host that has none left, a program that was refused takes it, and we learn that there are too few.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// Rotation: time within which each of the rotating requests has had its turn, where more requests block than there is
/// room for.
const ROTATION: Duration = Duration::from_secs(8);
/// Shortest and longest blocking wait of a rotating request.
const ROTATION_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));

/// Nothing blocks for long before the intentions are known, as it would keep the connection that those may need. Where
/// none are asked for within this time after the start, there are none.
const START: Duration = Duration::from_secs(10);

/// Pause of a rotating request after a wait without a change: the longest time for which a change is not noticed.
const ROTATION_REST: Duration = Duration::from_secs(6);

/// Shortest blocking wait of a request while another one is due soon.
const SHORTEST_WAIT: Duration = Duration::from_millis(250);

/// Where a single connection has to do, the intentions block for as long as this at the most, and whatever comes in
/// between for as long as [`SHORTEST_WAIT`]: a denial is known within a second.
const ALONE_WAIT: Duration = Duration::from_millis(600);

/// Rotation of the requests for intentions of several services: time within which each has had its turn.
const AUTHORIZATION_ROTATION: Duration = Duration::from_millis(800);
/// Shortest blocking wait in that rotation.
const SHORTEST_TURN: Duration = Duration::from_millis(50);

/// How long it is on a host whose connections have not been enough lately: what is given up is free again when the agent has
/// answered. Whatever blocks for as long as this, or longer, gives its connection up.
pub(super) const CROWDED_WAIT: Duration = Duration::from_secs(15);

/// Where there may soon be none but the one for intentions, those block no longer than this: the others are asked for soon if
/// their connections are lost.
const SCARCE_WAIT: Duration = Duration::from_secs(4);

/// Interval between two fetches of a query that a table watch covers, in case the table misses a change.
const REFRESH: Duration = Duration::from_secs(60 * 60);

/// Shortest interval between two fetches of a query whose table cannot be relied on.
const PERIOD: Duration = Duration::from_secs(5);
/// Added to [`PERIOD`] for each query of that kind.
const PERIOD_EACH: Duration = Duration::from_millis(50);

/// Time within which all queries of a table are fetched again after a burst, within the bound on all refetches.
const REFETCH_CYCLE: Duration = Duration::from_secs(10);

/// Refetches per second at most, over a long time.
pub(super) const MOST_REFETCHES: f64 = 20.0;
/// Refetches per second where there are few queries, so that a series of config entry writes is followed without delay.
const LEAST_REFETCHES: f64 = 2.0;

/// Refetches that begin without a pause after a quiet time.
const BURST: f64 = 4.0;

/// Delay before a refetch: changes made together are fetched together, and the sidecars of a host do not fetch at the
/// same instant.
const GATHER: Duration = Duration::from_millis(100);

pub(super) type Id = u64;

/// Names a scope among those that are in use. Answers for one scope hold for no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeId(pub(super) u64);

/// How a change of a query's answer is noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// Its own request, which blocks on a connection that nothing else uses.
    Authorization,
    /// Its own request, which blocks. What `prompt` is true of does not rotate where there is room.
    Own { prompt: bool },
    /// It is the watch of that table.
    Table(Table),
    /// The watch of that table.
    Member(Table),
    /// Time.
    Periodic,
}

/// For whom the next request is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worker {
    /// The one for intentions; `alone` if there is no other.
    Authorization { alone: bool, room: Room },
    /// One of so many for all else.
    Shared { of: usize, room: Room },
}

/// Whether this host has enough connections to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Enough,
    /// They have not been enough lately.
    Crowded,
    /// There may soon be none besides the one for intentions.
    Scarce,
}

impl Worker {
    /// How long a request blocks that need not make room for others.
    fn long_wait(self) -> Duration {
        match self {
            Self::Authorization { room: Room::Scarce, .. } => SCARCE_WAIT,
            Self::Authorization { room, .. } | Self::Shared { room, .. } => match room {
                Room::Enough => LONG_WAIT,
                Room::Crowded | Room::Scarce => CROWDED_WAIT,
            },
        }
    }
}

/// How a request blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocking {
    /// For as long as it may.
    Long,
    /// For a moment, so that others have a turn.
    Rotating,
}

/// A request to send. `work` is whatever the caller needs for that.
pub(super) struct Job<W> {
    pub(super) id: Id,
    pub(super) work: W,
    /// How long it may block; `None` for a fetch.
    pub(super) wait: Option<Duration>,
    /// It blocks for a moment, so that others have a turn.
    pub(super) rotates: bool,
    /// Notified when nobody wants the answer any more.
    pub(super) cancelled: Arc<Notify>,
    sent: Instant,
}

pub(super) enum Next<W> {
    Job(Job<W>),
    /// Nothing before then, unless something else ends or begins.
    Later(Option<Instant>),
}

/// The result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// Answered; blocks next, but not before this time has passed.
    Block(Duration),
    /// Answered; fetched again after this time.
    Fetch(Duration),
    /// The watch of a table was answered, with this index, and is asked again after this time. `changed` is whether the
    /// index is another one than before.
    Table { index: Option<u64>, changed: bool, before_1_9: bool, pause: Duration },
    /// A query that a table watches over was answered; unless `covered`, with something that the table does not notice.
    Member { covered: bool },
    /// No answer came that can be used; tried again after this time.
    Failed(Duration),
}

/// How a request is to block, and for how long.
type Block = (Blocking, Duration);

/// All queries that are asked, each with its `W`.
pub(super) struct Schedule<W> {
    entries: BTreeMap<Id, Entry<W>>,
    tables: HashMap<(ScopeId, Table), TableState>,
    before_1_9: bool,
    next_id: Id,
    refetches: RefetchBudget,
    began: Instant,
    interrupted: Option<Instant>,
}

struct Entry<W> {
    scope: ScopeId,
    role: Role,
    /// Absent while a request is under way.
    work: Option<W>,
    cancelled: Arc<Notify>,
    /// When it is fetched next, and why.
    due: Option<(Instant, Why)>,
    /// From when on it may block, once it was answered so that it can.
    blocks_from: Option<Instant>,
    /// How the request under way blocks, if it does.
    blocking: Option<Blocking>,
    /// When the last request was sent.
    attended: Option<Instant>,
    /// Somebody waits for the first answer.
    awaited: bool,
}

/// What is asked first, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    First,
    /// It failed, or time is up.
    Again,
    Refetch,
    Refresh,
}

/// The watch of a table.
struct TableState {
    watch: Id,
    members: usize,
    /// Absent while its index cannot be relied on.
    known: Option<Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// When the index came.
    since: Instant,
    /// When what was asked for before that is fetched again.
    refetch: Instant,
}

impl<W> Schedule<W> {
    pub(super) fn new(began: Instant) -> Self {
        let (entries, tables, refetches) = (BTreeMap::new(), HashMap::new(), RefetchBudget::default());
        Self { entries, tables, before_1_9: false, next_id: 0, refetches, began, interrupted: None }
    }

    /// Asks one more thing from now on. `watch` makes the work of the table's watch, where there is none yet.
    pub(super) fn add(
        &mut self,
        scope: ScopeId,
        role: Role,
        work: W,
        now: Instant,
        watch: impl FnOnce(&Table) -> W,
    ) -> Id {
        if let Role::Member(table) = &role {
            let key = (scope, table.clone());
            if !self.tables.contains_key(&key) {
                let id = self.insert(scope, Role::Table(table.clone()), watch(table), now);
                self.tables.insert(key.clone(), TableState { watch: id, members: 0, known: None });
            }
            self.tables.entry(key).and_modify(|state| state.members += 1);
        }
        if role == Role::Authorization {
            self.give_turn();
        }
        self.insert(scope, role, work, now)
    }

    /// Ends what blocks on the connection for intentions: those of one more service are wanted.
    fn give_turn(&self) {
        let blocks = |entry: &&Entry<W>| entry.role == Role::Authorization && entry.blocking.is_some();
        self.entries.values().filter(blocks).for_each(|entry| entry.cancelled.notify_one());
    }

    fn insert(&mut self, scope: ScopeId, role: Role, work: W, now: Instant) -> Id {
        let id = self.next_id;
        self.next_id += 1;
        let entry = Entry {
            scope,
            role,
            work: Some(work),
            cancelled: Arc::default(),
            due: Some((now, Why::First)),
            blocks_from: None,
            blocking: None,
            attended: None,
            awaited: false,
        };
        self.entries.insert(id, entry);
        id
    }

    /// Asks it no more.
    pub(super) fn remove(&mut self, id: Id) {
        let Some(entry) = self.entries.remove(&id) else { return };
        // Kept by the task that waits for the answer, if there is one.
        entry.cancelled.notify_one();
        let Role::Member(table) = entry.role else { return };
        let key = (entry.scope, table);
        if let Some(state) = self.tables.get_mut(&key) {
            state.members -= 1;
            if state.members == 0 {
                let watch = state.watch;
                self.tables.remove(&key);
                self.remove(watch);
            }
        }
    }

    /// How its next request is scheduled, and when it is due as far as is known.
    pub(super) fn timing(&self, id: Id) -> (Role, Option<Instant>) {
        match self.entries.get(&id) {
            Some(entry) => (entry.role.clone(), entry.due.map(|(at, _)| at).or(entry.blocks_from)),
            None => (Role::Periodic, None),
        }
    }

    /// Its first answer is waited for: it is fetched before all others.
    pub(super) fn await_first(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.awaited = true;
        }
    }

    /// Whether a request that rotates may be given up for something new: seldom enough that the agent has let go of the one
    /// before.
    pub(super) fn may_interrupt(&mut self, now: Instant) -> bool {
        let rotates =
            |entry: &Entry<W>| entry.role != Role::Authorization && entry.blocking == Some(Blocking::Rotating);
        let may = self.entries.values().any(rotates)
            && self.interrupted.is_none_or(|at| now.saturating_duration_since(at) >= ROTATION_BOUNDS.1 * 2);
        if may {
            self.interrupted = Some(now);
        }
        may
    }

    /// The agent is back: what failed is tried at once, and what time tells of is looked at.
    pub(super) fn recovered(&mut self, now: Instant) {
        for entry in self.entries.values_mut() {
            if let Some((at, Why::Again)) = &mut entry.due {
                *at = now;
            }
        }
    }

    /// Everything of a scope is fetched anew, as nothing that blocks may be relied on.
    pub(super) fn start_anew(&mut self, scope: ScopeId, now: Instant) {
        self.tables.iter_mut().filter(|((of, _), _)| *of == scope).for_each(|(_, table)| table.known = None);
        for entry in self.entries.values_mut().filter(|entry| entry.scope == scope) {
            entry.blocks_from = None;
            entry.due = Some((now, Why::Again));
        }
    }

    /// The next request for `worker`.
    pub(super) fn next(&mut self, worker: Worker, now: Instant) -> Next<W> {
        let chosen = match worker {
            Worker::Authorization { alone: true, .. } => self.alone(now),
            _ => self.fetchable(worker, now).map(|id| (id, None)).or_else(|| self.blockable(worker, now)),
        };
        match chosen.and_then(|(id, block)| self.take(id, block, now)) {
            Some(job) => Next::Job(job),
            None => Next::Later(self.next_event(worker, now)),
        }
    }

    fn take(&mut self, id: Id, block: Option<Block>, now: Instant) -> Option<Job<W>> {
        let entry = self.entries.get_mut(&id)?;
        let work = entry.work.take()?;
        entry.attended = Some(now);
        entry.blocking = block.map(|(how, _)| how);
        if block.is_none() {
            entry.due = None;
            entry.blocks_from = None;
        }
        let (wait, rotates) = (block.map(|(_, wait)| wait), entry.blocking == Some(Blocking::Rotating));
        Some(Job { id, work, wait, rotates, cancelled: entry.cancelled.clone(), sent: now })
    }

    /// What is due, the most urgent first.
    fn fetchable(&self, worker: Worker, now: Instant) -> Option<Id> {
        let due = self.idle(worker).filter_map(|(id, entry)| {
            let (at, why) = entry.due.filter(|(at, _)| *at <= now)?;
            Some((entry.urgency(why), at, id))
        });
        due.min().map(|(_, _, id)| id)
    }

    /// What may block: those that do not rotate first, and of the others the one that was not attended for longest.
    fn blockable(&self, worker: Worker, now: Instant) -> Option<(Id, Option<Block>)> {
        let mut all: Vec<(u8, Id, &Entry<W>)> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_for(worker) && (entry.blocks_from.is_some() || entry.blocking.is_some()))
            .map(|(id, entry)| (entry.rank(), *id, entry))
            .collect();
        all.sort_by_key(|(rank, id, _)| (*rank, *id));
        let kept = match worker {
            Worker::Shared { .. } if !self.is_authorized(now) => 0,
            // One worker is left to what is due.
            Worker::Shared { of, .. } if all.len() >= of => of.saturating_sub(1),
            // There is one worker for the intentions of all services.
            Worker::Authorization { .. } if all.len() > 1 => 0,
            _ => all.len(),
        };
        let count = |how| all.iter().filter(|(_, _, entry)| entry.blocking == Some(how)).count();
        let long = count(Blocking::Long);
        let ready = |entry: &Entry<W>| entry.work.is_some() && entry.blocks_from.is_some_and(|from| from <= now);
        if let Some((_, id, _)) = all.iter().take(kept).find(|(_, _, entry)| ready(entry))
            && long < kept
        {
            return Some((*id, Some((Blocking::Long, worker.long_wait()))));
        }
        if count(Blocking::Rotating) > 0 {
            return None;
        }
        let next = all.iter().filter(|(_, _, entry)| ready(entry)).min_by_key(|(_, id, entry)| (entry.attended, *id));
        let rotating = u32::try_from(all.len() - long).unwrap_or(u32::MAX);
        let wait = match worker {
            Worker::Authorization { .. } => (AUTHORIZATION_ROTATION / rotating.max(1)).max(SHORTEST_TURN),
            Worker::Shared { .. } => (ROTATION / rotating.max(1)).clamp(ROTATION_BOUNDS.0, ROTATION_BOUNDS.1),
        };
        next.map(|(_, id, _)| (*id, Some((Blocking::Rotating, self.until_due(worker, now, wait)))))
    }

    /// Whether the request for intentions has what it needs.
    fn is_authorized(&self, now: Instant) -> bool {
        let mut authorizing = self.entries.values().filter(|entry| entry.role == Role::Authorization).peekable();
        match authorizing.peek() {
            Some(_) => authorizing.all(|entry| entry.blocks_from.is_some() || entry.blocking.is_some()),
            None => now.saturating_duration_since(self.began) >= START,
        }
    }

    /// For a single connection: the intentions are asked at least once within [`ALONE_WAIT`] and a little more.
    fn alone(&self, now: Instant) -> Option<(Id, Option<Block>)> {
        let worker = Worker::Authorization { alone: true, room: Room::Scarce };
        let is_old = |at: Option<Instant>| at.is_none_or(|at| now.saturating_duration_since(at) >= ALONE_WAIT);
        let due = self.fetchable(worker, now);
        let ready = |entry: &Entry<W>| entry.blocks_from.is_some_and(|from| from <= now);
        let blocking = self.idle(worker).filter(|(_, entry)| ready(entry));
        let (authorization, others): (Vec<_>, Vec<_>) =
            blocking.partition(|(_, entry)| entry.role == Role::Authorization);
        let oldest =
            |of: &[(Id, &Entry<W>)]| of.iter().min_by_key(|(id, entry)| (entry.attended, *id)).map(|(id, _)| *id);
        let turn = ALONE_WAIT / u32::try_from(authorization.len()).unwrap_or(u32::MAX).max(1);
        let urgent: Vec<_> = authorization.iter().filter(|(_, entry)| is_old(entry.attended)).copied().collect();
        if let Some(id) = oldest(&urgent) {
            let wait = if due.is_some() { Duration::from_millis(1) } else { turn };
            return Some((id, Some((Blocking::Rotating, wait))));
        }
        let block = |of: &[(Id, &Entry<W>)], wait| {
            oldest(of).map(|id| (id, Some((Blocking::Rotating, self.until_due(worker, now, wait)))))
        };
        due.map(|id| (id, None)).or_else(|| block(&others, SHORTEST_WAIT)).or_else(|| block(&authorization, turn))
    }

    /// `wait`, or less if something is due before.
    fn until_due(&self, worker: Worker, now: Instant, wait: Duration) -> Duration {
        let due = self.idle(worker).filter_map(|(_, entry)| entry.due).map(|(at, _)| at).min();
        let left = due.map_or(wait, |at| at.saturating_duration_since(now));
        wait.min(left.max(SHORTEST_WAIT))
    }

    fn next_event(&self, worker: Worker, now: Instant) -> Option<Instant> {
        let due = self.idle(worker).filter_map(|(_, entry)| entry.due.map(|(at, _)| at));
        let blocks = self.idle(worker).filter_map(|(_, entry)| entry.blocks_from);
        // What could begin now, but for want of room, begins when something else ends.
        due.chain(blocks).filter(|at| *at > now).min()
    }

    /// Those that no request is under way for.
    fn idle(&self, worker: Worker) -> impl Iterator<Item = (Id, &Entry<W>)> {
        let idle = move |(_, entry): &(&Id, &Entry<W>)| entry.work.is_some() && entry.is_for(worker);
        self.entries.iter().filter(idle).map(|(id, entry)| (*id, entry))
    }

    /// Takes a job back with what became of it.
    pub(super) fn done(&mut self, job: Job<W>, done: Done, now: Instant, chance: f64) {
        let Job { id, work, sent, wait, rotates, .. } = job;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.work = Some(work);
        entry.blocking = None;
        entry.blocks_from = None;
        // Something may have become due while it was under way.
        let due = entry.due.take();
        match done {
            Done::Block(pause) => {
                let over = wait.is_some_and(|wait| now.saturating_duration_since(sent) >= wait);
                let rest = match over && entry.role != Role::Authorization {
                    true if rotates => ROTATION_REST,
                    true => GIVE_WAY.mul_f64(chance),
                    false => Duration::ZERO,
                };
                entry.blocks_from = Some(now + pause.max(rest));
                entry.due = due;
            }
            Done::Fetch(pause) => entry.due = Some((now + pause, Why::Again)),
            Done::Failed(pause) => {
                entry.due = Some((now + pause, Why::Again));
                if let Role::Table(table) = entry.role.clone() {
                    let key = (entry.scope, table);
                    self.lose(&key, now, chance);
                }
            }
            Done::Member { covered } => {
                entry.awaited = false;
                let next = self.after_answer(id, covered, sent, now, chance);
                self.set_due(id, next);
            }
            Done::Table { index, changed, before_1_9, pause } => {
                self.before_1_9 |= before_1_9;
                self.table_answered(id, index.is_some(), changed, pause, now, chance);
            }
        }
    }

    fn set_due(&mut self, id: Id, due: (Instant, Why)) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.due = Some(due);
        }
    }

    /// When an answer that was asked for at `sent` is fetched again.
    fn after_answer(&self, id: Id, covered: bool, sent: Instant, now: Instant, chance: f64) -> (Instant, Why) {
        let known = self.entries.get(&id).and_then(|entry| self.known(entry)).filter(|_| covered);
        match known {
            Some(known) if sent < known.since => (known.refetch.max(now), Why::Refetch),
            Some(_) => (now + REFRESH.mul_f64(0.75 + 0.5 * chance), Why::Refresh),
            None => (now + self.period(chance), Why::Again),
        }
    }

    /// What is known of all the tables that an answer is made from.
    fn known(&self, entry: &Entry<W>) -> Option<Known> {
        let Role::Member(table) = &entry.role else { return None };
        let known = self.tables.get(&(entry.scope, table.clone()))?.known?;
        let gateways = self.tables.get(&(entry.scope, Table::ConfigEntries)).filter(|_| self.before_1_9);
        match gateways {
            Some(gateways) => {
                let gateways = gateways.known?;
                let later = known.since.max(gateways.since);
                Some(Known { since: later, refetch: known.refetch.max(gateways.refetch) })
            }
            None => Some(known),
        }
    }

    /// The interval between fetches of a query without a table.
    fn period(&self, chance: f64) -> Duration {
        let periodic = |entry: &&Entry<W>| matches!(entry.role, Role::Member(_) | Role::Periodic);
        let members = self.entries.values().filter(periodic).count();
        let each = PERIOD_EACH.saturating_mul(u32::try_from(members).unwrap_or(u32::MAX));
        PERIOD.max(each).mul_f64(0.9 + 0.2 * chance)
    }

    fn table_answered(&mut self, id: Id, is_known: bool, changed: bool, pause: Duration, now: Instant, chance: f64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Role::Table(table) = entry.role.clone() else { return };
        let periodic = table == Table::ConfigEntries;
        let table = (entry.scope, table);
        if !is_known {
            entry.due = Some((now + pause.max(PERIOD), Why::Again));
            return self.lose(&table, now, chance);
        }
        let known = self.tables.get(&table).and_then(|state| state.known);
        let from = match known {
            Some(_) if !changed => now + GIVE_WAY.mul_f64(chance),
            _ => self.refetch(&table, known.is_none(), now, chance),
        };
        if let Some(entry) = self.entries.get_mut(&id) {
            let next = (now + pause).max(from);
            match periodic {
                true => entry.due = Some((next, Why::Again)),
                false => entry.blocks_from = Some(next),
            }
        }
    }

    /// Has everything fetched that `table` watches over; says from when on. The first time, that is only what was asked
    /// for before the table's index came.
    fn refetch(&mut self, key: &(ScopeId, Table), first: bool, now: Instant, chance: f64) -> Instant {
        let (scope, table) = key;
        let also_instances = self.before_1_9 && *table == Table::ConfigEntries;
        let is_of = |role: &Role| match role {
            Role::Member(of) => of == table || also_instances && matches!(of, Table::Instances(_)),
            _ => false,
        };
        let concerned = |entry: &Entry<W>| entry.scope == *scope && is_of(&entry.role) && entry.attended.is_some();
        let count = self.entries.values().filter(|entry| concerned(entry)).count();
        let members: usize = self.tables.values().map(|table| table.members).sum();
        let gathered = if first { now } else { now + GATHER.mul_f64(chance) };
        let from = self.refetches.take(count, members, gathered);
        for entry in self.entries.values_mut().filter(|entry| concerned(entry) && entry.work.is_some()) {
            let sooner = entry.due.filter(|(at, why)| *at <= from && *why != Why::Refresh);
            entry.due = sooner.or(Some((from, Why::Refetch)));
        }
        if let Some(state) = self.tables.get_mut(key) {
            state.known = Some(Known { since: now, refetch: from });
        }
        from
    }

    /// The table's index cannot be relied on any more.
    fn lose(&mut self, key: &(ScopeId, Table), now: Instant, chance: f64) {
        let Some(state) = self.tables.get_mut(key) else { return };
        if state.known.take().is_none() {
            return;
        }
        let period = self.period(chance);
        let (scope, role) = (key.0, Role::Member(key.1.clone()));
        for entry in self.entries.values_mut().filter(|entry| entry.scope == scope && entry.role == role) {
            if let Some((at, why @ Why::Refresh)) = &mut entry.due {
                (*at, *why) = (now + period, Why::Again);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_known(&self, scope: ScopeId, table: &Table) -> bool {
        self.tables.get(&(scope, table.clone())).is_some_and(|state| state.known.is_some())
    }
}

impl<W> Entry<W> {
    fn is_for(&self, worker: Worker) -> bool {
        match worker {
            Worker::Authorization { alone, .. } => alone || self.role == Role::Authorization,
            Worker::Shared { .. } => self.role != Role::Authorization,
        }
    }

    fn urgency(&self, why: Why) -> (u8, Why) {
        let role = match self.role {
            Role::Authorization => 0,
            _ if self.awaited => 1,
            Role::Own { .. } => 2,
            Role::Table(_) => 3,
            Role::Member(_) | Role::Periodic => 4,
        };
        (role, why)
    }

    /// Which of those that block rotate last.
    fn rank(&self) -> u8 {
        match self.role {
            Role::Own { prompt: true } => 0,
            Role::Table(_) => 1,
            _ => 2,
        }
    }
}

/// Lets refetches begin at once after a quiet time, and bounds how many there are in the long run.
#[derive(Debug, Default)]
struct RefetchBudget {
    /// Queries that were asked and are not paid for yet.
    debt: f64,
    since: Option<Instant>,
}

impl RefetchBudget {
    /// When so many of `members` may be fetched: those may be a few times each without a pause, and once in every
    /// [`REFETCH_CYCLE`] for ever, but for the bound on all together.
    fn take(&mut self, queries: usize, members: usize, now: Instant) -> Instant {
        let (queries, members) = (queries as f64, members.max(1) as f64);
        let rate = (members / REFETCH_CYCLE.as_secs_f64()).clamp(LEAST_REFETCHES, MOST_REFETCHES);
        let since = self.since.unwrap_or(now);
        self.debt = (self.debt - rate * now.saturating_duration_since(since).as_secs_f64()).max(0.0) + queries;
        let excess = self.debt - BURST * members;
        let from = now + Duration::from_secs_f64((excess / rate).max(0.0));
        self.since = Some(now.max(since));
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Worker = Worker::Shared { of: 3, room: Room::Enough };

    /// A schedule, and what is added to it and asked of it.
    struct Stage {
        schedule: Schedule<&'static str>,
        now: Instant,
    }

    impl Stage {
        /// Long after the start.
        fn new() -> Self {
            let now = Instant::now();
            Self { schedule: Schedule::new(now), now: now + START }
        }

        fn add(&mut self, role: Role, name: &'static str) -> Id {
            self.schedule.add(ScopeId(0), role, name, self.now, |table| match table {
                Table::Instances(_) => "instances table",
                Table::ConfigEntries => "config table",
            })
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        fn next(&mut self, worker: Worker) -> Option<Job<&'static str>> {
            match self.schedule.next(worker, self.now) {
                Next::Job(job) => Some(job),
                Next::Later(_) => None,
            }
        }

        /// The name and wait of what is next, which goes on.
        fn named(&mut self, worker: Worker) -> Option<(&'static str, Option<Duration>)> {
            self.next(worker).map(|job| (job.work, job.wait))
        }

        fn done(&mut self, job: Job<&'static str>, done: Done) {
            self.schedule.done(job, done, self.now, 0.5);
        }

        /// Asks whatever is due, each answered at once.
        fn fetch_all(&mut self) -> Vec<&'static str> {
            let mut names = Vec::new();
            while let Some(job) = self.next(ALL) {
                let Job { work, wait: None, .. } = &job else {
                    self.done(job, Done::Block(Duration::from_secs(1)));
                    continue;
                };
                names.push(*work);
                let done = match *work {
                    "instances table" | "config table" => table(1, true),
                    "own" => Done::Block(Duration::ZERO),
                    _ => Done::Member { covered: true },
                };
                self.done(job, done);
            }
            names
        }
    }

    fn table(index: u64, changed: bool) -> Done {
        Done::Table { index: Some(index), changed, before_1_9: false, pause: Duration::ZERO }
    }

    fn member() -> Role {
        Role::Member(Table::Instances(None))
    }

    #[test]
    fn what_we_are_goes_before_tables_and_those_before_what_they_tell_of() {
        let mut stage = Stage::new();
        stage.add(member(), "first");
        let awaited = stage.add(member(), "awaited");
        stage.add(Role::Periodic, "periodic");
        stage.add(Role::Own { prompt: true }, "own");
        stage.add(Role::Authorization, "intentions");
        stage.schedule.await_first(awaited);
        let names: Vec<_> = std::iter::from_fn(|| stage.named(ALL)).map(|(name, _)| name).collect();
        assert_eq!(names, ["awaited", "own", "instances table", "first", "periodic"]);
        assert_eq!(stage.named(Worker::Authorization { alone: false, room: Room::Enough }), Some(("intentions", None)));
    }

    #[test]
    fn an_answer_that_was_asked_for_before_its_table_is_fetched_once_more() {
        let mut stage = Stage::new();
        stage.add(member(), "early");
        let watch = stage.next(ALL).expect("the table");
        let early = stage.next(ALL).expect("its member");
        stage.pass(Duration::from_millis(1));
        stage.done(watch, table(1, true));
        stage.done(early, Done::Member { covered: true });
        let again = stage.next(ALL).expect("the same again");
        assert_eq!((again.work, again.wait), ("early", None));
        stage.done(again, Done::Member { covered: true });
        let blocks = stage.next(ALL).expect("the table");
        assert_eq!(blocks.work, "instances table");
        assert!(blocks.wait.is_some() && stage.next(ALL).is_none());
        // A change while it is being asked for.
        stage.pass(Duration::from_secs(1));
        stage.done(blocks, table(2, true));
        stage.pass(GATHER);
        let member = stage.next(ALL).expect("the member");
        stage.pass(Duration::from_millis(1));
        let blocks = stage.next(ALL).expect("the table");
        stage.done(blocks, table(3, true));
        stage.done(member, Done::Member { covered: true });
        stage.pass(GATHER);
        let names: Vec<_> = std::iter::from_fn(|| stage.named(ALL)).collect();
        assert!(names.contains(&("early", None)), "{names:?}");
    }

    #[test]
    fn a_table_that_is_not_known_has_its_members_fetched_periodically() {
        let mut stage = Stage::new();
        stage.add(member(), "one");
        let watch = stage.next(ALL).expect("the table");
        stage.done(watch, Done::Failed(Duration::from_secs(15)));
        assert_eq!(stage.fetch_all(), ["one"]);
        stage.pass(PERIOD.mul_f64(1.1));
        assert_eq!(stage.fetch_all(), ["one"]);
        stage.pass(Duration::from_secs(15));
        // The table is known from here on, and what was asked for before is asked for once more.
        assert_eq!(stage.fetch_all(), ["instances table", "one"]);
        stage.pass(PERIOD * 3);
        assert_eq!(stage.fetch_all(), [""; 0]);
    }

    #[test]
    fn before_1_9_the_instances_change_with_the_config_entries_too() {
        let mut stage = Stage::new();
        stage.add(member(), "instances");
        stage.add(Role::Member(Table::ConfigEntries), "chain");
        stage.fetch_all();
        stage.pass(Duration::from_secs(2));
        let config = std::iter::from_fn(|| stage.next(ALL)).find(|job| job.work == "config table").expect("it is due");
        stage.done(
            config,
            Done::Table { index: Some(2), changed: true, before_1_9: true, pause: Duration::from_secs(2) },
        );
        stage.pass(GATHER);
        let mut names: Vec<_> = std::iter::from_fn(|| stage.named(ALL)).filter(|(_, wait)| wait.is_none()).collect();
        names.sort_unstable();
        assert_eq!(names, [("chain", None), ("instances", None)]);
    }

    #[test]
    fn what_blocks_and_has_no_room_rotates() {
        let mut stage = Stage::new();
        for (name, prompt) in [("registration", true), ("roots", false), ("leaf", false)] {
            stage.add(Role::Own { prompt }, name);
        }
        let first: Vec<_> = std::iter::from_fn(|| stage.next(ALL)).collect();
        first.into_iter().for_each(|job| stage.done(job, Done::Block(Duration::ZERO)));
        // Room for all: one worker is left.
        let of_four = Worker::Shared { of: 4, room: Room::Enough };
        let jobs: Vec<_> = std::iter::from_fn(|| stage.next(of_four)).collect();
        assert!(jobs.iter().all(|job| job.wait == Some(LONG_WAIT)) && jobs.len() == 3);
        jobs.into_iter().for_each(|job| stage.done(job, Done::Block(Duration::ZERO)));
        stage.pass(Duration::from_millis(1));
        // Two workers: one for the registration, one for the others in turn.
        let of_two = Worker::Shared { of: 2, room: Room::Enough };
        assert_eq!(stage.named(of_two), Some(("registration", Some(LONG_WAIT))));
        let mut turns = Vec::new();
        for _ in 0..4 {
            let job = stage.next(of_two).expect("one that rotates");
            assert!(stage.next(of_two).is_none(), "one at a time");
            turns.push(job.work);
            stage.pass(job.wait.expect("it blocks"));
            stage.done(job, Done::Block(Duration::ZERO));
            stage.pass(ROTATION_REST);
        }
        assert_eq!(turns, ["roots", "leaf", "roots", "leaf"]);
    }

    #[test]
    fn what_blocks_gives_way_however_long_it_may() {
        for (room, shared, intentions) in [
            (Room::Enough, LONG_WAIT, LONG_WAIT),
            (Room::Crowded, CROWDED_WAIT, CROWDED_WAIT),
            (Room::Scarce, CROWDED_WAIT, SCARCE_WAIT),
        ] {
            let mut stage = Stage::new();
            stage.add(Role::Authorization, "intentions");
            stage.add(Role::Own { prompt: true }, "own");
            let workers =
                [(Worker::Authorization { alone: false, room }, intentions), (Worker::Shared { of: 3, room }, shared)];
            for (worker, wait) in workers {
                let fetched = stage.next(worker).expect("it is fetched");
                stage.done(fetched, Done::Block(Duration::ZERO));
                let job = stage.next(worker).expect("it blocks");
                assert_eq!((job.wait, job.rotates), (Some(wait), false), "{room:?} {worker:?}");
                stage.pass(wait);
                stage.done(job, Done::Block(Duration::ZERO));
                // Intentions are asked for at once again, and others after a moment in which somebody else may connect.
                let at_once = stage.next(worker).is_some();
                assert_eq!(at_once, matches!(worker, Worker::Authorization { .. }), "{room:?} {worker:?}");
                stage.pass(GIVE_WAY);
                assert!(at_once || stage.next(worker).is_some_and(|job| job.wait == Some(wait)), "{room:?} {worker:?}");
            }
        }
    }

    #[test]
    fn nothing_blocks_for_long_before_the_intentions_are_known() {
        let mut stage = Stage::new();
        stage.now = stage.schedule.began;
        stage.add(Role::Own { prompt: true }, "own");
        stage.fetch_all();
        stage.pass(Duration::from_secs(1));
        let job = stage.next(ALL).expect("it blocks for a moment");
        assert!(job.rotates);
        stage.add(Role::Authorization, "intentions");
        stage.pass(START);
        stage.done(job, Done::Block(Duration::ZERO));
        stage.pass(START);
        let job = stage.next(ALL).expect("it blocks for a moment");
        assert!(job.rotates);
        stage.done(job, Done::Block(Duration::ZERO));
        let authorization = Worker::Authorization { alone: false, room: Room::Enough };
        let intentions = stage.next(authorization).expect("they are fetched");
        stage.done(intentions, Done::Block(Duration::ZERO));
        assert_eq!(stage.named(authorization), Some(("intentions", Some(LONG_WAIT))));
        stage.pass(START);
        assert_eq!(stage.named(ALL), Some(("own", Some(LONG_WAIT))));
    }

    #[test]
    fn a_single_connection_asks_for_intentions_all_the_time() {
        let mut stage = Stage::new();
        stage.add(Role::Authorization, "intentions");
        for name in ["a", "b", "c", "d", "e", "f"] {
            stage.add(Role::Periodic, name);
        }
        let alone = Worker::Authorization { alone: true, room: Room::Scarce };
        let mut since = Duration::ZERO;
        for _ in 0..60 {
            let job = stage.next(alone).expect("there is always something");
            let took = job.wait.unwrap_or(Duration::from_millis(100));
            stage.pass(took);
            since = if job.work == "intentions" { Duration::ZERO } else { since + took };
            assert!(since < Duration::from_secs(1), "{since:?}");
            let done = if job.work == "intentions" { Done::Block(Duration::ZERO) } else { Done::Fetch(Duration::ZERO) };
            stage.done(job, done);
        }
    }

    #[test]
    fn a_budget_lets_refetches_be_prompt_but_not_endless() {
        let mut budget = RefetchBudget::default();
        let start = Instant::now();
        assert!((0..8).all(|_| budget.take(200, 400, start) == start));
        let later = budget.take(200, 400, start);
        assert_eq!((later - start).as_secs(), 10);
        // Fewer are fetched once in a cycle.
        let mut budget = RefetchBudget::default();
        assert!((0..4).all(|_| budget.take(40, 40, start) == start));
        assert_eq!(budget.take(40, 40, start) - start, REFETCH_CYCLE);
        // A lone one follows a change each second, however many there are.
        let mut budget = RefetchBudget::default();
        assert!((0..60).map(|second| start + Duration::from_secs(second)).all(|now| budget.take(1, 1, now) == now));
    }

    #[test]
    fn what_is_removed_takes_its_table_along() {
        let mut stage = Stage::new();
        let (one, two) = (stage.add(member(), "one"), stage.add(member(), "two"));
        stage.schedule.remove(one);
        assert!(stage.schedule.tables.contains_key(&(ScopeId(0), Table::Instances(None))));
        let job = stage.next(ALL).expect("the table");
        stage.schedule.remove(two);
        assert!(stage.schedule.tables.is_empty() && stage.schedule.entries.is_empty());
        stage.done(job, table(1, true));
        assert!(stage.next(ALL).is_none());
    }
}
