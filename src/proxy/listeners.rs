//! The running listeners of one kind, and those that are no longer wanted while their connections go on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::listener::{self, Accepted, ListenerState};
use super::workers::Workers;
use crate::drain::{self, Stage};
use crate::observe::Observer;
use crate::snapshot::{Bind, Protocol};
use crate::stats::{ListenerStats, scope};

/// What the listeners of one kind and their connections go by, made of a part of the snapshot. See [`ListenerState`].
pub(super) trait ListenerConfig: Sized + Send + Sync + 'static {
    /// The part of the snapshot.
    type Part;

    /// For the log.
    fn name(part: &Self::Part) -> &str;

    /// For metrics; `datacenter` is our own.
    fn scope(part: &Self::Part, datacenter: &str) -> scope::Listener;

    fn bind(part: &Self::Part) -> &Bind;

    /// Takes over what `previous` remembers.
    fn new(part: &Arc<Self::Part>, previous: Option<&Self>, observer: &Observer) -> Arc<Self>;

    /// Whether it was made of this very one.
    fn is_made_of(&self, part: &Arc<Self::Part>) -> bool;

    fn protocol(&self) -> Protocol;
}

/// All listeners of one kind.
pub(super) struct Set<K, L> {
    running: BTreeMap<K, Running<L>>,
    /// No longer wanted, while their connections go on.
    retired: Vec<Running<L>>,
}

impl<K, L> Default for Set<K, L> {
    fn default() -> Self {
        Self { running: BTreeMap::new(), retired: Vec::new() }
    }
}

impl<K: Ord + Clone, L: ListenerConfig> Set<K, L> {
    /// Stops those that are not wanted any more.
    pub(super) fn retire(&mut self, wanted: &BTreeMap<K, Arc<L::Part>>) {
        for (_, mut running) in self.running.extract_if(.., |key, _| !wanted.contains_key(key)) {
            running.stop();
            self.retired.push(running);
        }
        self.forget_retired();
    }

    /// Forgets those that are not wanted any more and have no connection left.
    pub(super) fn forget_retired(&mut self) {
        self.retired.retain(|retired| retired.users() > 0);
    }

    /// None is wanted any more, and none is updated but as a retired one.
    pub(super) fn retire_all(&mut self) {
        self.retired.extend(std::mem::take(&mut self.running).into_values());
    }

    /// Gives each that is wanted what it goes by now, or starts it. `serve` makes what serves the connections of a new
    /// one.
    pub(super) fn run<M, S, F>(&mut self, wanted: &BTreeMap<K, Arc<L::Part>>, starter: &mut Starter<'_>, serve: M)
    where
        M: Fn() -> S,
        S: Fn(Accepted<L>) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        for (key, part) in wanted {
            if let Some(running) = self.running.get(key) {
                running.update(part, &starter.observer);
            } else if let Some(running) = starter.start(part, &serve) {
                self.running.insert(key.clone(), running);
            }
        }
    }

    pub(super) fn advance(&self, stage: Stage) {
        self.all().for_each(|running| running.advance(stage));
    }

    /// How many connections, and threads that accept, there are.
    pub(super) fn users(&self) -> usize {
        self.all().map(Running::users).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Running<L>> {
        self.running.values().chain(&self.retired)
    }
}

impl<K, L: ListenerConfig<Part = L>> Set<K, L> {
    /// Gives the retired what `successor` says that they go by now.
    pub(super) fn update_retired<'a>(&self, successor: impl Fn(&L) -> Option<&'a Arc<L>>)
    where
        L: 'a,
    {
        for running in &self.retired {
            let now = Arc::clone(&running.state.borrow().config);
            if let Some(part) = successor(&now).filter(|part| !now.is_made_of(part)) {
                running.set(Arc::clone(part));
            }
        }
    }
}

/// A listener that accepts, or did and still has connections.
struct Running<L> {
    name: String,
    bind: Bind,
    state: watch::Sender<ListenerState<L>>,
    stats: Arc<ListenerStats>,
    /// Removed when the listener stops.
    socket_file: Option<SocketFile>,
}

impl<L: ListenerConfig> Running<L> {
    /// Publishes what it is made of now; the same one again concerns nobody.
    fn update(&self, part: &Arc<L::Part>, observer: &Observer) {
        let before = Arc::clone(&self.state.borrow().config);
        if before.is_made_of(part) {
            return;
        }
        let new = L::new(part, Some(&before), observer);
        let (before, now) = (before.protocol(), new.protocol());
        self.stats.set_http(now.is_http());
        if before.is_http() != now.is_http() {
            tracing::info!(target: "proxy", listener = self.name, ?before, ?now, "The protocol has changed; open connections are ended, each after its answer");
        }
        self.set(new);
    }
}

impl<L> Running<L> {
    fn set(&self, config: Arc<L>) {
        self.state.send_modify(|state| state.config = config);
    }

    fn advance(&self, stage: Stage) {
        self.state.send_modify(|state| state.stage = state.stage.max(stage));
    }

    fn stop(&mut self) {
        tracing::info!(target: "proxy", listener = self.name, bind_addr = %self.bind, "Stopping listener; its open connections go on");
        self.advance(Stage::Draining);
        self.socket_file = None;
    }

    /// How many connections, and threads that accept, go by it.
    fn users(&self) -> usize {
        self.state.receiver_count()
    }
}

/// The file of a Unix socket, removed with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds listeners and has every worker accept from them.
pub(super) struct Starter<'a> {
    workers: &'a Workers,
    observer: Observer,
    /// Our own, once it is known.
    datacenter: String,
    drain: drain::Watch,
    /// Binds that failed and are tried again.
    failed: BTreeMap<Bind, Failed>,
}

/// A bind that is tried again.
struct Failed {
    attempts: u32,
    next: Instant,
}

impl<'a> Starter<'a> {
    #[must_use]
    pub(super) fn new(workers: &'a Workers, observer: Observer, drain: drain::Watch) -> Self {
        Self { workers, observer, datacenter: String::new(), drain, failed: BTreeMap::new() }
    }

    pub(super) fn set_datacenter(&mut self, datacenter: &str) {
        if self.datacenter != datacenter {
            datacenter.clone_into(&mut self.datacenter);
        }
    }

    /// Tries no longer what is not wanted.
    pub(super) fn forget_all_but(&mut self, is_wanted: impl Fn(&Bind) -> bool) {
        self.failed.retain(|bind, _| is_wanted(bind));
    }

    /// When to try again what could not be bound.
    #[must_use]
    pub(super) fn next_try(&self) -> Option<Instant> {
        self.failed.values().map(|failed| failed.next).min()
    }

    /// Binds and starts a listener on every worker. A failure is logged and tried again later.
    fn start<L, M, S, F>(&mut self, part: &Arc<L::Part>, serve: &M) -> Option<Running<L>>
    where
        L: ListenerConfig,
        M: Fn() -> S,
        S: Fn(Accepted<L>) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (name, bind) = (L::name(part), L::bind(part));
        if self.failed.get(bind).is_some_and(|failed| Instant::now() < failed.next) {
            return None;
        }
        let bound = match listener::bind(bind, self.workers.count()) {
            Ok(bound) => bound,
            Err(error) => {
                self.bind_failed(name, bind, &error);
                return None;
            }
        };
        self.failed.remove(bind);
        tracing::info!(target: "proxy", listener = name, bind_addr = %bind, "Starting listener");
        let config = L::new(part, None, &self.observer);
        let address = bind.to_string().replace(':', "_");
        let scope = L::scope(part, &self.datacenter);
        let stats = self.observer.stats().listener(scope, address, config.protocol().is_http());
        let (state, watched) = watch::channel(ListenerState { config, stage: Stage::Running });
        let serve = serve();
        for (worker, bound) in bound.into_iter().enumerate() {
            let (state, drain, stats) = (watched.clone(), self.drain.clone(), Arc::clone(&stats));
            self.workers.spawn(worker, listener::run(bound, state, drain, stats, serve.clone()));
        }
        let socket_file = match bind {
            Bind::Unix { path, .. } => Some(SocketFile(path.clone())),
            Bind::Tcp(_) => None,
        };
        Some(Running { name: name.to_owned(), bind: bind.clone(), state, stats, socket_file })
    }

    fn bind_failed(&mut self, name: &str, bind: &Bind, error: &std::io::Error) {
        let failed = self.failed.entry(bind.clone()).or_insert(Failed { attempts: 0, next: Instant::now() });
        let wait = (RETRY_FIRST * 2_u32.pow(failed.attempts.min(16))).min(RETRY_LAST);
        failed.next = Instant::now() + wait;
        failed.attempts += 1;
        // A listener of ours that has just moved away may need a moment to close.
        if failed.attempts == QUIET_ATTEMPTS {
            tracing::error!(
                target: "proxy",
                listener = name,
                bind_addr = %bind,
                %error,
                "Listener could not be started; trying again. If the address is taken, stop the program that has it or change the registration"
            );
        }
    }
}

/// First pause before a listener is bound again, which doubles with each attempt.
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// Longest pause before a listener is bound again.
const RETRY_LAST: Duration = Duration::from_secs(5);
/// Failed attempts before the first log line, some 150 ms together.
const QUIET_ATTEMPTS: u32 = 5;

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// A listener by its port, in one of its versions.
    #[derive(Debug)]
    struct Plain {
        bind: Bind,
        version: u32,
    }

    impl ListenerConfig for Plain {
        type Part = Self;

        fn name(_: &Self) -> &str {
            "plain"
        }

        fn scope(_: &Self, _: &str) -> scope::Listener {
            scope::Listener::Public
        }

        fn bind(part: &Self) -> &Bind {
            &part.bind
        }

        fn new(part: &Arc<Self>, _: Option<&Self>, _: &Observer) -> Arc<Self> {
            Arc::clone(part)
        }

        fn is_made_of(&self, part: &Arc<Self>) -> bool {
            std::ptr::eq(self, &raw const **part)
        }

        fn protocol(&self) -> Protocol {
            Protocol::Tcp
        }
    }

    fn plain(port: u16, version: u32) -> Arc<Plain> {
        Arc::new(Plain { bind: Bind::Tcp((Ipv4Addr::LOCALHOST, port).into()), version })
    }

    fn wanted(listeners: &[&Arc<Plain>]) -> BTreeMap<Bind, Arc<Plain>> {
        listeners.iter().map(|listener| (listener.bind.clone(), Arc::clone(listener))).collect()
    }

    /// A connection of a running listener.
    type Connection = watch::Receiver<ListenerState<Plain>>;

    /// A set whose listeners run, though nothing is bound, with one connection of each.
    fn running<const N: usize>(listeners: [&Arc<Plain>; N]) -> (Set<Bind, Plain>, [Connection; N]) {
        let mut set = Set::default();
        let connections = listeners.map(|listener| {
            let (state, connection) =
                watch::channel(ListenerState { config: Arc::clone(listener), stage: Stage::Running });
            let bind = listener.bind.clone();
            let stats = Arc::new(ListenerStats::new(scope::Listener::Public, bind.to_string(), false));
            let running = Running { name: "plain".into(), bind: bind.clone(), state, stats, socket_file: None };
            set.running.insert(bind, running);
            connection
        });
        (set, connections)
    }

    fn goes_by(connection: &Connection, config: &Arc<Plain>, stage: Stage) -> bool {
        let state = connection.borrow();
        Arc::ptr_eq(&state.config, config) && state.stage == stage
    }

    #[test]
    fn retired_listeners_follow_what_comes_after_them_until_their_connections_end() {
        let (stays, goes) = (plain(1, 1), plain(2, 1));
        let (mut set, [of_stays, mut of_goes]) = running([&stays, &goes]);
        set.retire(&wanted(&[&stays]));
        assert!(goes_by(&of_stays, &stays, Stage::Running) && goes_by(&of_goes, &goes, Stage::Draining));
        // Another takes its place. It is asked for those alone that have retired.
        let after = plain(3, 2);
        set.update_retired(|retired| (retired.version == 1).then_some(&after));
        assert!(goes_by(&of_stays, &stays, Stage::Running) && goes_by(&of_goes, &after, Stage::Draining));
        of_goes.mark_unchanged();
        // Nothing follows, or the same again: that concerns no connection.
        set.update_retired(|_| None);
        set.update_retired(|_| Some(&after));
        assert!(!of_goes.has_changed().unwrap() && goes_by(&of_goes, &after, Stage::Draining));
        assert_eq!((set.users(), set.retired.len()), (2, 1));
        drop(of_goes);
        set.retire(&wanted(&[&stays]));
        assert_eq!((set.users(), set.retired.len()), (1, 0));
    }

    #[test]
    fn all_listeners_follow_once_all_have_retired_and_none_starts_again() {
        let (one, two) = (plain(1, 1), plain(2, 1));
        let (mut set, [of_one, of_two]) = running([&one, &two]);
        set.advance(Stage::Draining);
        set.retire_all();
        let (next_one, next_two) = (plain(1, 2), plain(2, 2));
        let next = wanted(&[&next_one, &next_two]);
        set.update_retired(|retired| next.get(&retired.bind));
        assert!(goes_by(&of_one, &next_one, Stage::Draining) && goes_by(&of_two, &next_two, Stage::Draining));
        set.advance(Stage::Closing);
        assert!(goes_by(&of_one, &next_one, Stage::Closing) && goes_by(&of_two, &next_two, Stage::Closing));
        // A stage never goes back.
        set.advance(Stage::Draining);
        assert!(goes_by(&of_two, &next_two, Stage::Closing));
        assert!(set.running.is_empty());
    }
}
