//! The control plane: asks the agent, and is the only writer of snapshots.
//!
//! [`run`] is one task. News come to it through one channel; each goes through `translate` into the
//! [`Draft`], which says what to ask next; when it is whole and has changed, a snapshot is published.

mod draft;
#[cfg(test)]
mod fixture;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod identity;
mod jwks_fetcher;
mod query;
mod tokens;
mod translate;
mod upstream;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::bail;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::draft::{Draft, Update, Urgency, Want};
use self::jwks_fetcher::{Keeper, KeySource};
use self::query::Query;
use crate::config::Mode;
use crate::consul::query::Event;
use crate::consul::watches::{Watch, Watches};
use crate::consul::{self, Client, api};
use crate::snapshot::{Action, DefaultPolicy, Snapshot};
use crate::tls::Aead;

/// In a stream of changes, this much quiet ends a burst…
const QUIET: Duration = Duration::from_millis(5);
/// …and this is the longest that a change waits, and the shortest time between snapshots in a stream.
const BURST: Duration = Duration::from_millis(50);
/// News on their way from the watches; those wait when there is no room.
const NEWS: usize = 256;
/// How often a refused leaf or refused roots are tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Time between attempts to reach the agent before anything is known.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a token that the agent does not know is waited for at the start. One that was just created has to reach
/// all servers, and an agent remembers for `acl.token_ttl`, 30 s by default, that it did not know a token.
const UNKNOWN_TOKEN_WAIT: Duration = Duration::from_secs(40);
/// How often a wait is told of again.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Keeps `publish` up to date with what the agent says, until nobody reads it any more. The value is `None`
/// until the first whole snapshot. `aead` is what its credentials seal TLS records with. Without `tunnel` each
/// connection has a TLS session of its own.
///
/// # Errors
/// What [`resolve_proxy_id`] fails with, flags that define no proxy, and a token that the agent refuses before
/// there was a first snapshot. Later a refusal changes nothing but the log.
pub async fn run(
    watches: Watches,
    agent: &consul::Settings,
    mode: &Mode,
    aead: Aead,
    tunnel: bool,
    publish: watch::Sender<Option<Arc<Snapshot>>>,
) -> anyhow::Result<()> {
    let enterprise = agent.scope.namespace.is_some() || agent.scope.partition.is_some();
    let draft = match mode {
        Mode::ProxyId(id) => Draft::registered(id.clone(), enterprise),
        Mode::SidecarFor(id) => Draft::registered(resolve_proxy_id(watches.client(), id).await?, enterprise),
        Mode::AdHoc(flags) => {
            let definition = translate::definition::ad_hoc(flags).map_err(|bad| anyhow::anyhow!("{bad}"))?;
            Draft::ad_hoc(definition)
        }
    }
    .sealed_by(aead)
    .with_tunnel(tunnel);
    let (sender, news) = mpsc::channel(NEWS);
    let (running, keepers) = (HashMap::new(), HashMap::new());
    let (registration, unknown_token) = (Registration::Unknown, UnknownToken::default());
    let control = Control { watches, running, keepers, sender, draft, registration, unknown_token };
    control.run(news, publish).await
}

/// Finds the id of the only sidecar that is registered for the service with the id `service_id`, whatever
/// its case. An agent that is not there yet is waited for without end.
///
/// # Errors
/// When there is none or more than one, or the agent refuses to say.
pub async fn resolve_proxy_id(client: &Client, service_id: &str) -> anyhow::Result<String> {
    let mut told: Option<Instant> = None;
    let mut unknown_token = UnknownToken::default();
    loop {
        match client.agent_services().await {
            Ok(services) => return only_sidecar(&services, service_id),
            Err(error) if unknown_token.may_become_known(&error) => {}
            Err(error) if !is_passing(&error) => bail!("can't look up the sidecar of {service_id}: {error}"),
            Err(error) => {
                if told.is_none_or(|at| at.elapsed() >= TELL_AGAIN) {
                    tracing::warn!("waiting for the agent, to look up the sidecar of {service_id}: {error}");
                    told = Some(Instant::now());
                }
            }
        }
        sleep(ASK_AGAIN).await;
    }
}

/// Whether waiting may help: an agent that starts, stops or is overloaded.
fn is_passing(error: &consul::Error) -> bool {
    let server_side = matches!(error.kind(), consul::ErrorKind::Status { code, .. } if *code >= 500);
    error.is_transport() || error.is_rate_limited() || server_side
}

fn only_sidecar(services: &BTreeMap<String, api::AgentService>, service_id: &str) -> anyhow::Result<String> {
    let is_sidecar = |service: &api::AgentService| {
        let of = service.proxy.as_ref().map(|proxy| &proxy.destination_service_id);
        service.kind == "connect-proxy" && of.is_some_and(|of| of.to_lowercase() == service_id.to_lowercase())
    };
    let ids: Vec<&str> =
        services.iter().filter(|(_, service)| is_sidecar(service)).map(|(id, _)| id.as_str()).collect();
    match ids[..] {
        [id] => Ok(id.to_owned()),
        [] => bail!(
            "No sidecar proxy registered for {service_id}: register the service with a sidecar_service, or use a \
             token that may read it (service:read)"
        ),
        _ => bail!(
            "More than one sidecar proxy registered for {service_id}: {}. Start proxy with -proxy-id and one of them",
            ids.join(", ")
        ),
    }
}

/// Since when the agent does not know our token.
#[derive(Debug, Default)]
struct UnknownToken(Option<Instant>);

impl UnknownToken {
    /// Whether the error is of a token that may yet become known; says so the first time.
    fn may_become_known(&mut self, error: &consul::Error) -> bool {
        if !error.is_unknown_token() {
            return false;
        }
        let first = self.0.is_none();
        let since = *self.0.get_or_insert_with(Instant::now);
        if first {
            tracing::warn!(
                "the agent does not know the token: waiting for up to {} s, in case that it was created just now",
                UNKNOWN_TOKEN_WAIT.as_secs()
            );
        }
        since.elapsed() < UNKNOWN_TOKEN_WAIT
    }
}

struct Control {
    watches: Watches,
    running: HashMap<Query, Watch>,
    /// Key sets do not come from the agent.
    keepers: HashMap<KeySource, Keeper>,
    sender: mpsc::Sender<News>,
    draft: Draft,
    registration: Registration,
    unknown_token: UnknownToken,
}

enum News {
    Update(Update),
    Failed(Query, consul::Error),
}

/// What the log says about our registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Registration {
    Unknown,
    Known,
    Missing,
}

impl Control {
    async fn run(
        mut self,
        mut news: mpsc::Receiver<News>,
        publish: watch::Sender<Option<Arc<Snapshot>>>,
    ) -> anyhow::Result<()> {
        let mut pace = Pace::default();
        let fetch_requests = self.draft.fetch_requests();
        let mut requested = false;
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.ask_for_what_is_wanted();
            requested = requested && self.hurry();
            for note in self.draft.notes() {
                tracing::warn!("{note}");
            }
            let due = pace.due;
            if due.is_some_and(|due| due <= Instant::now()) {
                self.publish(&publish);
                pace.published(Instant::now());
                continue;
            }
            tokio::select! {
                () = publish.closed() => return Ok(()),
                // The sender is ours, so there is always a next.
                Some(first) = news.recv() => {
                    // Updates that came with it are of the same burst.
                    let burst = std::iter::once(first).chain(std::iter::from_fn(|| news.try_recv().ok()));
                    self.take_burst(burst, publish.borrow().is_none())?;
                }
                () = fetch_requests.notified() => {
                    requested = true;
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => continue,
                _ = retry.tick() => {
                    if let Err(bad) = self.draft.retry(SystemTime::now()) {
                        tracing::debug!("leaf or roots are still refused: {bad}");
                    }
                }
            }
            if let Some(urgency) = self.draft.urgency() {
                pace.changed(urgency, Instant::now());
            }
        }
    }

    fn publish(&mut self, publish: &watch::Sender<Option<Arc<Snapshot>>>) {
        if let Some(snapshot) = self.draft.finish() {
            announce(&snapshot, publish.borrow().is_none());
            publish.send_replace(Some(snapshot));
        }
    }

    /// `starting`: there was no snapshot yet, so that a token which the agent refuses is an error.
    fn take_burst(&mut self, burst: impl Iterator<Item = News>, starting: bool) -> anyhow::Result<()> {
        for news in burst.take(NEWS) {
            if let News::Failed(query, error) = &news
                && starting
                && query.is_essential()
                && error.is_forbidden()
                && !self.unknown_token.may_become_known(error)
            {
                bail!("the agent refuses the token: {error}");
            }
            self.take(news);
        }
        Ok(())
    }

    fn take(&mut self, news: News) {
        let update = match news {
            News::Update(update) => {
                if matches!(update, Update::Service(_)) {
                    self.registration = Registration::Known;
                }
                update
            }
            News::Failed(query, error) => {
                if let Query::Service(id) = &query {
                    self.registration_failed(id, &error);
                }
                Update::Failed(query)
            }
        };
        let source = update.source();
        if let Err(bad) = self.draft.apply(update, SystemTime::now()) {
            tracing::error!("{source}: the agent's answer can't be used, so nothing changes: {bad}");
        }
        // At once, as the next news may be about what is not wanted any more.
        self.ask_for_what_is_wanted();
    }

    /// A registration that is gone does not end us: it may be a reload of the agent's configuration, and the
    /// service behind us runs on.
    fn registration_failed(&mut self, id: &str, error: &consul::Error) {
        if !error.is_not_found() {
            return;
        }
        match std::mem::replace(&mut self.registration, Registration::Missing) {
            Registration::Missing => {}
            Registration::Unknown => tracing::warn!(
                "no proxy with the id {id} is registered with this agent: waiting for it; register it with \
                 `consul services register`, or give its id with -proxy-id"
            ),
            Registration::Known => tracing::warn!(
                "the registration {id} is gone from the agent: the last one that was read stays in use until it is back"
            ),
        }
    }

    /// Starts and stops watches, so that those run that the draft wants.
    fn ask_for_what_is_wanted(&mut self) {
        for want in self.draft.wants() {
            match want {
                Want::Start(Query::Keys(source)) => {
                    let keeper = self.keep(source.clone());
                    self.keepers.insert(source, keeper);
                }
                Want::Stop(Query::Keys(source)) => drop(self.keepers.remove(&source)),
                Want::Start(query) => {
                    if let Some(watch) = self.watch(&query) {
                        self.running.insert(query, watch);
                    }
                }
                Want::Stop(query) => drop(self.running.remove(&query)),
            }
        }
    }

    /// Moves the queries that a connection waits for to the front; false if no connection waits.
    fn hurry(&self) -> bool {
        let mut waits = false;
        for query in self.draft.requested() {
            waits = true;
            if let Some(watch) = self.running.get(query) {
                watch.hurry();
            }
        }
        waits
    }

    fn keep(&self, source: KeySource) -> Keeper {
        let named = source.clone();
        jwks_fetcher::keep(source, self.sender.clone(), move |fetched| {
            News::Update(Update::Keys(named.clone(), fetched))
        })
    }

    /// Watches what the agent knows; `None` for what it does not.
    fn watch(&self, query: &Query) -> Option<Watch> {
        Some(match query.clone() {
            Query::Service(id) => {
                self.start(query, consul::Query::agent_service(&id), |answer| Update::Service(Box::new(answer.value)))
            }
            Query::Roots => self.start(query, consul::Query::ca_roots(), |answer| Update::Roots(answer.value)),
            Query::Leaf(service) => self.start(query, consul::Query::ca_leaf(&service), move |answer| Update::Leaf {
                service: service.clone(),
                leaf: Box::new(answer.value),
            }),
            Query::Intentions(service) => self.start(query, consul::Query::intentions(&service), move |answer| {
                Update::Intentions { service: service.clone(), list: answer.value }
            }),
            Query::DefaultPolicy(service) => {
                self.start(query, consul::Query::default_policy(&service), move |answer| Update::DefaultPolicy {
                    service: service.clone(),
                    policy: default_policy(answer.value),
                })
            }
            Query::Chain(chain) => self.start(query, consul::Query::discovery_chain(&chain), move |answer| {
                Update::Chain(chain.clone(), Box::new(answer.value))
            }),
            Query::Endpoints(instances) => {
                self.start(query, consul::Query::health_connect(&instances), move |answer| Update::Endpoints {
                    query: instances.clone(),
                    rows: answer.value,
                    filtered_by_acls: answer.filtered_by_acls,
                })
            }
            Query::PreparedQuery(prepared) => {
                let asked = consul::Query::prepared_query(&prepared.name, prepared.datacenter.as_deref());
                self.start(query, asked, move |answer| Update::PreparedQuery(prepared.clone(), Box::new(answer.value)))
            }
            Query::Mesh => self.start(query, consul::Query::mesh_config(), |answer| Update::Mesh(answer.value)),
            Query::JwtProvider(name) => self.start(query, consul::Query::jwt_provider(&name), move |answer| {
                Update::JwtProvider(name.clone(), answer.value.map(Box::new))
            }),
            Query::Keys(_) => return None,
        })
    }

    fn start<T, F>(&self, query: &Query, asked: consul::Query<T>, update: F) -> Watch
    where
        T: Send + 'static,
        F: Fn(consul::Answer<T>) -> Update + Send + 'static,
    {
        let query = query.clone();
        self.watches.watch(asked, self.sender.clone(), move |event| match event {
            Event::Value(answer) => News::Update(update(answer)),
            Event::Failed(error) => News::Failed(query.clone(), error),
        })
    }
}

fn default_policy(wire: consul::DefaultPolicy) -> DefaultPolicy {
    let action = if wire.allow { Action::Allow } else { Action::Deny };
    DefaultPolicy { action, source: wire.source }
}

fn announce(snapshot: &Snapshot, first: bool) {
    let (version, upstreams) = (snapshot.version, snapshot.upstreams.len());
    if first {
        tracing::info!(version, upstreams, "configuration is complete");
    } else {
        tracing::debug!(version, upstreams, "configuration has changed");
    }
}

/// When to publish: at once when it is quiet or urgent, else when a burst ends or has gone on for too long.
#[derive(Debug, Default)]
struct Pace {
    published: Option<Instant>,
    /// Since when there is something to publish.
    since: Option<Instant>,
    due: Option<Instant>,
}

impl Pace {
    fn changed(&mut self, urgency: Urgency, now: Instant) {
        let quiet = self.since.is_none() && self.published.is_none_or(|at| now.duration_since(at) >= BURST);
        let since = *self.since.get_or_insert(now);
        let due = if urgency == Urgency::Now || quiet { now } else { (now + QUIET).min(since + BURST) };
        self.due = Some(due);
    }

    fn published(&mut self, now: Instant) {
        *self = Self { published: Some(now), since: None, due: None };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::fixture::{Ca, chain, registration, roots, row};
    use super::*;
    use crate::testing::{Agent, Fault};

    /// Longest wait for something that should come at once.
    const SOON: Duration = Duration::from_secs(10);

    const SERVICE: &str = "/v1/agent/service/web-sidecar-proxy";
    const ROOTS: &str = "/v1/agent/connect/ca/roots";
    const LEAF: &str = "/v1/agent/connect/ca/leaf/web";
    const INTENTIONS: &str = "/v1/connect/intentions/match";

    type Published = watch::Receiver<Option<Arc<Snapshot>>>;

    /// An agent with a sidecar of `web`, whose upstream `db` has one instance.
    async fn agent(ca: &Ca) -> Agent {
        let agent = Agent::start();
        agent.set(SERVICE, registration(&[("db", 9191)]));
        agent.set(ROOTS, roots(&[ca]));
        agent.set(LEAF, ca.leaf("web"));
        agent.set(INTENTIONS, json!({"web": null}));
        let reason = "Default behavior configured by ACLs";
        agent.set("/v1/agent/connect/authorize", json!({"Authorized": false, "Reason": reason}));
        agent.set("/v1/discovery-chain/db", json!({"Chain": chain(&["db.dc1"])}));
        agent.set("/v1/health/connect/db", json!([row("10.0.0.5", 21001)]));
        agent
    }

    fn start(agent: &Agent, mode: Mode) -> (tokio::task::JoinHandle<anyhow::Result<()>>, Published) {
        let settings = agent.settings();
        let (publish, published) = watch::channel(None);
        let control = tokio::spawn(async move {
            let watches = Watches::new(Client::new(&settings)?);
            run(watches, &settings, &mode, Aead::detect(), true, publish).await
        });
        (control, published)
    }

    async fn until(published: &mut Published, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let there = published.wait_for(|snapshot| snapshot.as_deref().is_some_and(&wanted));
        let snapshot = tokio::time::timeout(SOON, there).await.expect("it is published soon").expect("control runs");
        snapshot.clone().expect("there is one")
    }

    fn endpoints(snapshot: &Snapshot, upstream: &str) -> usize {
        let found = snapshot.upstreams.iter().find(|(key, _)| key.destination == upstream);
        found.map_or(0, |(_, upstream)| upstream.chain.targets().map(|target| target.endpoints.usable.len()).sum())
    }

    #[tokio::test]
    async fn what_the_agent_says_is_published_and_followed() {
        let ca = Ca::new();
        let agent = agent(&ca).await;
        let (control, mut published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
        let first = until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
        let before = first.public.clone().expect("a public listener");

        agent.set(INTENTIONS, json!({"web": [{"SourceName": "api", "Action": "allow", "Precedence": 9}]}));
        let next =
            until(&mut published, |s| s.public.as_ref().is_some_and(|p| p.intentions != before.intentions)).await;
        assert!(Arc::ptr_eq(next.upstreams.values().next().unwrap(), first.upstreams.values().next().unwrap()));

        agent.set("/v1/discovery-chain/cache", json!({"Chain": chain(&["cache.dc1"])}));
        agent.set("/v1/health/connect/cache", json!([row("10.0.0.6", 1), row("10.0.0.7", 1)]));
        agent.set(SERVICE, registration(&[("db", 9191), ("cache", 9192)]));
        let next = until(&mut published, |snapshot| endpoints(snapshot, "service:cache") == 2).await;

        // Rubbish, silence and a deregistration change nothing; afterwards all is caught up with.
        agent.fault(Some(Fault::Rubbish));
        agent.fault(Some(Fault::Status(500, "No cluster leader")));
        agent.disconnect();
        agent.remove(SERVICE);
        agent.set("/v1/health/connect/cache", json!([]));
        agent.fault(None);
        let last = until(&mut published, |snapshot| endpoints(snapshot, "service:cache") == 0).await;
        assert_eq!(last.upstreams.keys().collect::<Vec<_>>(), next.upstreams.keys().collect::<Vec<_>>());

        drop(published);
        tokio::time::timeout(SOON, control).await.expect("control ends with its readers").unwrap().unwrap();
    }

    #[tokio::test]
    async fn flags_alone_make_a_proxy() {
        let ca = Ca::new();
        let agent = agent(&ca).await;
        let flags = crate::config::AdHoc {
            service: "web".into(),
            upstreams: vec![crate::config::AdHocUpstream {
                name: "db".into(),
                prepared_query: false,
                bind: "127.0.0.1:9191".parse().unwrap(),
            }],
            public: None,
            register: None,
        };
        let (_control, mut published) = start(&agent, Mode::AdHoc(flags));
        let snapshot = until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
        assert!(snapshot.public.is_none());
        assert!(agent.requests(INTENTIONS).is_empty());
        assert!(agent.requests(SERVICE).is_empty());
    }

    #[tokio::test]
    async fn an_agent_that_does_not_answer_yet_is_waited_for() {
        let ca = Ca::new();
        let agent = agent(&ca).await;
        let services: Value = json!({"web-sidecar-proxy": {
            "Kind": "connect-proxy", "Proxy": {"DestinationServiceID": "web"}}});
        agent.set("/v1/agent/services", services);
        agent.fault(Some(Fault::Status(500, "No cluster leader")));
        let (_control, mut published) = start(&agent, Mode::SidecarFor("WEB".into()));
        let asked = async {
            while agent.requests("/v1/agent/services").is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, asked).await.unwrap();
        agent.fault(None);
        until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    }

    #[tokio::test]
    async fn an_agent_that_refuses_ends_the_search_for_the_sidecar() {
        let agent = Agent::start();
        agent.fault(Some(Fault::Status(403, "Permission denied")));
        let (control, _published) = start(&agent, Mode::SidecarFor("web".into()));
        let error = tokio::time::timeout(SOON, control).await.unwrap().unwrap().unwrap_err().to_string();
        assert!(error.contains("web") && error.contains("Permission denied"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_is_not_known_is_waited_for_and_not_forever() {
        for mode in [Mode::SidecarFor("web".into()), Mode::ProxyId("web-sidecar-proxy".into())] {
            let agent = Agent::start();
            agent.fault(Some(Fault::Status(403, "ACL not found")));
            let (control, _published) = start(&agent, mode);
            let began = Instant::now();
            let error = tokio::time::timeout(UNKNOWN_TOKEN_WAIT * 2, control).await.unwrap().unwrap().unwrap_err();
            assert!(error.to_string().contains("ACL not found"), "{error}");
            assert!(began.elapsed() >= UNKNOWN_TOKEN_WAIT, "{:?}", began.elapsed());
        }
    }

    #[tokio::test]
    async fn a_token_that_becomes_known_is_enough() {
        let ca = Ca::new();
        let agent = agent(&ca).await;
        agent.fault(Some(Fault::Status(403, "ACL not found")));
        let (_control, mut published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
        let asked = async {
            while agent.requests(SERVICE).is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, asked).await.unwrap();
        agent.fault(None);
        until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    }

    #[test]
    fn a_lone_change_is_published_at_once_and_a_stream_in_bursts() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut pace = Pace::default();
        pace.changed(Urgency::Soon, at(0));
        assert_eq!(pace.due, Some(at(0)));
        pace.published(at(0));
        assert_eq!(pace.due, None);

        // Each change of a stream puts it off, but not for ever.
        for now in (2..=48).step_by(2) {
            pace.changed(Urgency::Soon, at(now));
            assert_eq!(pace.due, Some(at((now + 5).min(52))), "{now}");
        }
        pace.changed(Urgency::Now, at(49));
        assert_eq!(pace.due, Some(at(49)));
        pace.published(at(49));

        pace.changed(Urgency::Soon, at(99));
        assert_eq!(pace.due, Some(at(99)));
    }

    #[test]
    fn the_only_sidecar_of_a_service_is_found_whatever_the_case() {
        let service = |kind: &str, of: &str| json!({"Kind": kind, "Proxy": {"DestinationServiceID": of}});
        let services: BTreeMap<String, api::AgentService> = serde_json::from_value(json!({
            "web": {"ID": "web"},
            "web-sidecar-proxy": service("connect-proxy", "Web"),
            "web-gateway": service("mesh-gateway", "web"),
            "db-1": service("connect-proxy", "db"),
            "db-2": service("connect-proxy", "db"),
        }))
        .unwrap();
        assert_eq!(only_sidecar(&services, "wEB").unwrap(), "web-sidecar-proxy");
        let none = only_sidecar(&services, "cache").unwrap_err().to_string();
        assert!(none.contains("No sidecar proxy registered for cache"), "{none}");
        let several = only_sidecar(&services, "db").unwrap_err().to_string();
        assert!(several.contains("More than one sidecar proxy registered for db: db-1, db-2"), "{several}");
        assert!(several.contains("Start proxy with -proxy-id"), "{several}");
    }
}
