//! Every query of the process once, with its subscribers and its last answer.
//!
//! Drafts subscribe to queries. The same query of several drafts in one scope is sent once, and each of them gets the
//! answers. A draft that comes late gets the last answer at once. A query ends with its last subscription.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use super::draft::Update;
use super::jwks_fetcher::{self, Keeper};
use super::query::Query;
use super::translate::endpoints;
use crate::consul::query::Event;
use crate::consul::watches::{ScopeId, Watch, Watches};
use crate::consul::{self, AnsweredBy, Client, How, Progress};
use crate::snapshot::{Action, DefaultPolicy, Hits};
use crate::stats::agent::{AgentNow, AgentQuery};

/// Capacity of the channel of answers on their way to subscribers; queries wait when it is full.
const EVENTS: usize = 256;

/// The queries of one scope. Clones share everything, and those of another scope ask over the same transport.
#[derive(Clone)]
pub struct Sources {
    watches: Watches,
    running: Arc<Mutex<Running>>,
    events: mpsc::Sender<SourceEvent>,
}

#[derive(Default)]
struct Running {
    sources: HashMap<Key, Source>,
    /// Of the next source or subscription.
    next: u64,
}

/// Equal for what is asked once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    /// Absent for key sets, which are not asked of the agent.
    scope: Option<ScopeId>,
    query: Query,
}

/// A query that runs.
struct Source {
    number: u64,
    fetching: Fetching,
    /// By the number of the subscription.
    users: BTreeMap<u64, mpsc::Sender<Delivery>>,
    /// The last answer, or the last failure where there was no answer yet. State on disk would start here.
    last: Option<QueryResult>,
}

/// The task that keeps a source up to date until it is dropped.
enum Fetching {
    Agent(Watch),
    Keys { _keeper: Keeper },
}

/// An answer or failure of a query.
#[derive(Debug, Clone)]
pub(super) enum QueryResult {
    Update(Arc<Update>),
    /// The query goes on, and what it said before is as good as it was.
    Failed(consul::Error),
}

/// An answer of a source, on its way to its subscribers.
struct SourceEvent {
    key: Key,
    source: u64,
    result: QueryResult,
}

/// An answer for one subscriber.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) query: Query,
    /// The subscription that it is for, which may have ended meanwhile.
    pub(super) subscription: u64,
    pub(super) result: QueryResult,
}

/// A use of a query, until it is dropped.
#[must_use = "a query ends with its last subscription"]
pub(super) struct Subscription {
    pub(super) number: u64,
    key: Key,
    running: Arc<Mutex<Running>>,
}

impl Sources {
    /// Must be called within a runtime.
    #[must_use]
    pub fn new(watches: Watches) -> Self {
        let running = Arc::<Mutex<Running>>::default();
        let (events, all) = mpsc::channel(EVENTS);
        // It ends with the last of those that can send.
        tokio::spawn(pass_on(all, Arc::clone(&running)));
        Self { watches, running, events }
    }

    /// The queries of another scope.
    ///
    /// # Errors
    /// When the scope's token can't be read or used.
    pub fn for_scope(&self, scope: consul::Scope) -> anyhow::Result<Self> {
        Ok(Self { watches: self.watches.for_scope(scope)?, ..self.clone() })
    }

    #[must_use]
    pub fn client(&self) -> &Client {
        self.watches.client()
    }

    /// Everything that the agent is asked, as whichever scope, for those who look on.
    #[must_use]
    pub fn look(&self) -> AgentNow {
        let watches = {
            let running = lock(&self.running);
            let watch = |(key, source): (&Key, &Source)| match &source.fetching {
                Fetching::Agent(watch) => Some((key.query.to_string(), watch.progress())),
                Fetching::Keys { .. } => None,
            };
            running.sources.iter().filter_map(watch).collect::<Vec<_>>()
        };
        let tables =
            self.watches.tables().into_iter().map(|(table, progress)| (format!("changes of {table}"), progress));
        let mut queries: Vec<AgentQuery> =
            watches.into_iter().chain(tables).map(|(what, progress)| agent_query(what, progress)).collect();
        queries.sort_by(|a, b| (a.kind, &a.what).cmp(&(b.kind, &b.what)));
        let connections = self.watches.connections();
        let requests = self.client().requests();
        AgentNow {
            address: self.client().address().to_owned(),
            connections: connections.allowed,
            room: connections.room,
            queries,
            requests: requests.over.iter().map(|(kind, result, count)| (kind.word(), result.word(), *count)).collect(),
            requests_active: requests.active,
        }
    }

    /// The running queries of all scopes, by name.
    #[cfg(test)]
    pub(super) fn running_queries(&self) -> std::collections::BTreeSet<String> {
        lock(&self.running).sources.keys().map(|key| key.query.to_string()).collect()
    }

    /// Sends `deliveries` what the query says from now on. What is known of it already is given at once.
    pub(super) fn subscribe(
        &self,
        query: &Query,
        deliveries: mpsc::Sender<Delivery>,
    ) -> (Subscription, Option<QueryResult>) {
        let scope = if matches!(query, Query::Keys(_)) { None } else { Some(self.watches.scope_id()) };
        let key = Key { scope, query: query.clone() };
        let mut running = lock(&self.running);
        let (number, own) = (running.next, running.next + 1);
        running.next += 2;
        let source = running.sources.entry(key.clone()).or_insert_with(|| Source {
            number: own,
            fetching: self.start(&key, own),
            users: BTreeMap::new(),
            last: None,
        });
        source.users.insert(number, deliveries);
        let last = source.last.clone();
        drop(running);
        (Subscription { number, key, running: Arc::clone(&self.running) }, last)
    }

    fn start(&self, key: &Key, source: u64) -> Fetching {
        let new = NewSource { sources: self, key: key.clone(), source };
        match key.query.clone() {
            Query::Service(id) => {
                new.agent(consul::Query::agent_service(&id), |answer| Update::Service(Box::new(answer.value)))
            }
            Query::Roots => new.agent(consul::Query::ca_roots(), |answer| Update::Roots(answer.value)),
            Query::Leaf(service) => new.agent(consul::Query::ca_leaf(&service), move |answer| Update::Leaf {
                service: service.clone(),
                leaf: Box::new(answer.value),
            }),
            Query::Intentions(service) => new.agent(consul::Query::intentions(&service), move |answer| {
                Update::Intentions { service: service.clone(), list: answer.value }
            }),
            Query::DefaultPolicy(service) => new.agent(consul::Query::default_policy(&service), move |answer| {
                Update::DefaultPolicy { service: service.clone(), policy: default_policy(answer.value) }
            }),
            Query::Chain(chain) => new.agent(consul::Query::discovery_chain(&chain), move |answer| {
                Update::Chain(chain.clone(), Box::new(answer.value))
            }),
            Query::Endpoints(instances) => {
                new.agent(consul::Query::health_connect(&instances), move |answer| Update::Endpoints {
                    query: instances.clone(),
                    // Shared by all who ask, and smaller than what the agent says.
                    instances: endpoints::instances(&answer.value),
                    filtered_by_acls: answer.filtered_by_acls,
                })
            }
            Query::PreparedQuery(prepared) => {
                let query = consul::Query::prepared_query(&prepared.name, prepared.datacenter.as_deref());
                new.agent(query, move |answer| Update::PreparedQuery(prepared.clone(), Box::new(answer.value)))
            }
            Query::Mesh => new.agent(consul::Query::mesh_config(), |answer| Update::Mesh(answer.value)),
            Query::ProxyDefaults => {
                new.agent(consul::Query::proxy_defaults(), |answer| Update::ProxyDefaults(answer.value.map(Box::new)))
            }
            Query::JwtProvider(name) => new.agent(consul::Query::jwt_provider(&name), move |answer| {
                Update::JwtProvider(name.clone(), answer.value.map(Box::new))
            }),
            Query::Keys(set) => {
                let NewSource { key, source, .. } = new;
                let named = set.clone();
                let keeper = jwks_fetcher::keep(set, self.events.clone(), move |fetched| {
                    let result = QueryResult::Update(Arc::new(Update::Keys(named.clone(), fetched)));
                    SourceEvent { key: key.clone(), source, result }
                });
                Fetching::Keys { _keeper: keeper }
            }
        }
    }
}

/// A source in the making.
struct NewSource<'a> {
    sources: &'a Sources,
    key: Key,
    source: u64,
}

impl NewSource<'_> {
    fn agent<T, F>(self, query: consul::Query<T>, update: F) -> Fetching
    where
        T: Send + 'static,
        F: Fn(consul::Answer<T>) -> Update + Send + 'static,
    {
        let Self { sources, key, source } = self;
        Fetching::Agent(sources.watches.watch(query, sources.events.clone(), move |event| {
            let result = match event {
                Event::Value(answer) => QueryResult::Update(Arc::new(update(answer))),
                Event::Failed(error) => QueryResult::Failed(error),
            };
            SourceEvent { key: key.clone(), source, result }
        }))
    }
}

impl Subscription {
    /// A connection waits for the first answer: it is asked for before those of others.
    pub(super) fn hurry(&self) {
        if let Some(Source { fetching: Fetching::Agent(watch), .. }) = lock(&self.running).sources.get(&self.key) {
            watch.hurry();
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        let Some(source) = running.sources.get_mut(&self.key) else { return };
        source.users.remove(&self.number);
        if source.users.is_empty() {
            running.sources.remove(&self.key);
        }
    }
}

impl Running {
    /// Keeps the answer of a source; returns its subscribers.
    fn keep(&mut self, event: &SourceEvent) -> Vec<(u64, mpsc::Sender<Delivery>)> {
        // One that has ended may have had something on its way.
        let Some(source) = self.sources.get_mut(&event.key).filter(|source| source.number == event.source) else {
            return Vec::new();
        };
        if matches!(event.result, QueryResult::Update(_)) || !matches!(source.last, Some(QueryResult::Update(_))) {
            source.last = Some(event.result.clone());
        }
        source.users.iter().map(|(number, deliveries)| (*number, deliveries.clone())).collect()
    }
}

/// Passes events on to all users, in order.
async fn pass_on(mut all: mpsc::Receiver<SourceEvent>, running: Arc<Mutex<Running>>) {
    while let Some(event) = all.recv().await {
        let users = lock(&running).keep(&event);
        for (subscription, deliveries) in users {
            let (query, result) = (event.key.query.clone(), event.result.clone());
            // A user that is gone needs no news.
            let _ = deliveries.send(Delivery { query, subscription, result }).await;
        }
    }
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

fn agent_query(what: String, progress: Progress) -> AgentQuery {
    let (how, table) = match progress.how {
        How::Blocks => ("blocks", None),
        How::Table(table) => ("table", Some(table)),
        How::Periodic => ("periodic", None),
    };
    let blocks_for = progress.under_way.and_then(|under_way| under_way.blocks_for);
    let state = match (progress.under_way, blocks_for) {
        (Some(_), Some(_)) => "blocked",
        (Some(_), None) => "asking",
        (None, _) => "waiting",
    };
    AgentQuery {
        what,
        request: progress.request,
        kind: progress.kind.word(),
        how,
        table,
        state,
        under_way: progress.under_way.map(|under_way| under_way.since.as_secs_f64()),
        blocks_for: blocks_for.map(|time| time.as_secs_f64()),
        rotates: progress.under_way.is_some_and(|under_way| under_way.rotates),
        next: progress.next.map(|time| time.as_secs_f64()),
        age: progress.age.map(|time| time.as_secs_f64()),
        index: progress.index,
        answered_by: progress.answered_by.map(AnsweredBy::word),
        is_failing: progress.is_failing,
        error: progress.error.map(|(error, ago)| (error, ago.as_secs_f64())),
        requests: progress.requests,
        errors: progress.errors,
    }
}

fn default_policy(wire: consul::DefaultPolicy) -> DefaultPolicy {
    let action = if wire.allow { Action::Allow } else { Action::Deny };
    DefaultPolicy { action, source: wire.source, hits: Hits::default() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::fixture::{Ca, roots};
    use super::super::jwks_fetcher::KeySource;
    use super::*;
    use crate::testing::{Agent, Fault, TempFile};

    /// Longest wait for something that should come at once.
    const SOON: Duration = Duration::from_secs(10);
    const ROOTS: &str = "/v1/agent/connect/ca/roots";

    fn sources(agent: &Agent) -> Sources {
        Sources::new(Watches::new(Client::new(&agent.settings()).expect("the settings are good")))
    }

    /// A user, with the answer that it got at once.
    struct User {
        deliveries: mpsc::Receiver<Delivery>,
        subscription: Subscription,
        known: Option<QueryResult>,
    }

    impl User {
        fn of(sources: &Sources, query: &Query) -> Self {
            let (sender, deliveries) = mpsc::channel(8);
            let (subscription, known) = sources.subscribe(query, sender);
            Self { deliveries, subscription, known }
        }

        async fn next(&mut self) -> QueryResult {
            let delivery = tokio::time::timeout(SOON, self.deliveries.recv())
                .await
                .expect("an answer comes soon")
                .expect("it runs");
            assert_eq!(delivery.subscription, self.subscription.number);
            delivery.result
        }
    }

    #[tokio::test]
    async fn a_late_user_is_told_at_once_and_a_query_ends_with_its_last() {
        let agent = Agent::start();
        agent.set(ROOTS, roots(&[&Ca::new()]));
        let sources = sources(&agent);
        let mut first = User::of(&sources, &Query::Roots);
        assert!(first.known.is_none());
        assert!(matches!(first.next().await, QueryResult::Update(_)));
        let mut second = User::of(&sources, &Query::Roots);
        assert!(matches!(&second.known, Some(QueryResult::Update(update)) if matches!(**update, Update::Roots(_))));
        assert_eq!(agent.count(|seen| seen.path == ROOTS && seen.param("index").is_none()), 1);

        drop(first);
        agent.set(ROOTS, roots(&[&Ca::new()]));
        assert!(matches!(second.next().await, QueryResult::Update(_)));
        drop(second);
        assert!(sources.running_queries().is_empty());
        assert!(User::of(&sources, &Query::Roots).known.is_none(), "nothing old is told again");
    }

    #[tokio::test]
    async fn all_users_hear_of_a_failure_and_a_late_one_of_the_last_before_any_answer() {
        let agent = Agent::start();
        agent.fault(Some(Fault::Status(500, "No cluster leader")));
        let sources = sources(&agent);
        let query = Query::JwtProvider("okta".into());
        let [mut first, mut second] = [(); 2].map(|()| User::of(&sources, &query));
        second.subscription.hurry();
        for user in [&mut first, &mut second] {
            assert!(matches!(user.next().await, QueryResult::Failed(_)));
        }
        assert!(matches!(User::of(&sources, &query).known, Some(QueryResult::Failed(_))));
        agent.set("/v1/config/jwt-provider/okta", json!({ "Name": "okta" }));
        agent.fault(None);
        while matches!(first.next().await, QueryResult::Failed(_)) {}
        assert!(matches!(User::of(&sources, &query).known, Some(QueryResult::Update(_))));
    }

    #[tokio::test]
    async fn scopes_share_key_sets_and_nothing_that_the_agent_says() {
        let agent = Agent::start();
        agent.set(ROOTS, roots(&[&Ca::new()]));
        let sources = sources(&agent);
        let token = consul::Token::Fixed("secret".into());
        let others = sources.for_scope(consul::Scope { token, ..consul::Scope::default() }).expect("a good token");
        let file = TempFile::new(&json!({ "keys": [] }).to_string());
        let keys = Query::Keys(KeySource::File(file.path().into()));
        for query in [Query::Roots, keys.clone()] {
            let mut user = User::of(&sources, &query);
            assert!(matches!(user.next().await, QueryResult::Update(_)));
            let mut other = User::of(&others, &query);
            assert_eq!(other.known.is_some(), query == keys);
            if query == Query::Roots {
                assert!(matches!(other.next().await, QueryResult::Update(_)));
                assert_eq!(
                    agent.requests(ROOTS).last().and_then(|seen| seen.token().map(str::to_owned)).as_deref(),
                    Some("secret")
                );
            }
        }
    }
}
