//! The half-built state: answers of the agent in, whole snapshots out. No IO, and the time is an argument.
//!
//! What an answer does not concern keeps its `Arc`: an answer about the endpoints of one service costs a
//! new target and a new upstream for each that uses it, and nothing for the others.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use super::identity::Identity;
use super::keys::{Fetched, KeySource};
use super::query::{ChainQuery, EndpointsQuery, PreparedQuery, Query};
use super::tokens::Tokens;
use super::translate::chain::{ChainPlan, Prepared};
use super::translate::definition::{Definition, PublicPlan, Source};
use super::translate::endpoints::{instances, prepared};
use super::translate::mesh::MeshSettings;
use super::translate::{Bad, Notes, chain, definition, intention, jwt, mesh};
use super::upstream::{Instances, Mesh, UpstreamDraft};
use crate::access_log;
use crate::consul::api;
use crate::demand::Bell;
use crate::snapshot::{
    Bind, DefaultPolicy, Exposed, Intention, Intentions, Protocol, PublicListener, Snapshot, Upstream, UpstreamKey,
};
use crate::tls::{self, Aead, Credentials};

/// News from the agent, with the query that brought it.
#[derive(Debug)]
pub(super) enum Update {
    Service(Box<api::AgentService>),
    Roots(api::CaRoots),
    Leaf {
        service: String,
        leaf: Box<api::Leaf>,
    },
    Intentions {
        service: String,
        list: Vec<api::Intention>,
    },
    DefaultPolicy {
        service: String,
        policy: DefaultPolicy,
    },
    Chain(ChainQuery, Box<api::CompiledDiscoveryChain>),
    Endpoints {
        query: EndpointsQuery,
        rows: Vec<api::CheckServiceNode>,
        filtered_by_acls: bool,
    },
    PreparedQuery(PreparedQuery, Box<api::PreparedQueryResult>),
    Mesh(Option<api::MeshConfig>),
    JwtProvider(String, Option<Box<api::JwtProvider>>),
    Keys(KeySource, Fetched),
    /// The query could not be answered; it goes on.
    Failed(Query),
}

impl Update {
    /// The query that brought it.
    pub(super) fn source(&self) -> Query {
        match self {
            Self::Service(service) => Query::Service(service.id.clone()),
            Self::Roots(_) => Query::Roots,
            Self::Leaf { service, .. } => Query::Leaf(service.clone()),
            Self::Intentions { service, .. } => Query::Intentions(service.clone()),
            Self::DefaultPolicy { service, .. } => Query::DefaultPolicy(service.clone()),
            Self::Chain(query, _) => Query::Chain(query.clone()),
            Self::Endpoints { query, .. } => Query::Endpoints(query.clone()),
            Self::PreparedQuery(query, _) => Query::PreparedQuery(query.clone()),
            Self::Mesh(_) => Query::Mesh,
            Self::JwtProvider(name, _) => Query::JwtProvider(name.clone()),
            Self::Keys(source, _) => Query::Keys(source.clone()),
            Self::Failed(query) => query.clone(),
        }
    }
}

/// A change of what is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Want {
    Start(Query),
    Stop(Query),
}

/// How soon a change must be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// May be gathered with others for a moment.
    Soon,
    /// Decides who may talk to whom, or is waited for.
    Now,
}

#[derive(Debug)]
pub(super) struct Draft {
    /// Whether namespaces and partitions may be sent.
    enterprise: bool,
    /// Whether this process uses the tunnel at all.
    tunnel: bool,
    definition: Option<Definition>,
    /// `None` until the agent has said whether there is an entry.
    mesh: Option<MeshSettings>,
    identity: Identity,
    rules: Rules,
    tokens: Tokens,
    /// Chains and prepared queries, whose instances are beside.
    chains: HashMap<ChainQuery, Arc<ChainPlan>>,
    prepared: HashMap<PreparedQuery, Prepared>,
    /// By the query, for endpoints or of a prepared query, that brought them.
    instances: HashMap<Query, Instances>,
    /// Made of these credentials for these application protocols. It outlives changes of all else, as it holds the keys of the tickets
    /// that were given out.
    server: Option<(Arc<Credentials>, Alpn, Arc<tls::Server>)>,
    public: Option<Arc<PublicListener>>,
    /// The plan of the public listener that the registration no longer has. Whatever is still open on it is judged on.
    former: Option<PublicPlan>,
    exposed: BTreeMap<Bind, Arc<Exposed>>,
    access_log: Option<Arc<access_log::Settings>>,
    upstreams: BTreeMap<UpstreamKey, UpstreamDraft>,
    /// Rung by connections that wait for an upstream.
    bell: Bell,
    /// The upstreams that hang on a query. What nobody hangs on is not wanted.
    users: HashMap<Query, BTreeSet<UpstreamKey>>,
    unused: Vec<Query>,
    dirty: Dirty,
    wants: Vec<Want>,
    last: Option<Arc<Snapshot>>,
    notes: Notes,
    /// Notes that were given out, so that each is once.
    said: HashSet<String>,
}

/// What has to be built again, and how soon that must be seen.
#[derive(Debug, Default)]
struct Dirty {
    public: bool,
    upstreams: BTreeSet<UpstreamKey>,
    urgency: Option<Urgency>,
}

#[derive(Debug, Default)]
struct Rules {
    list: Option<Vec<Intention>>,
    default: Option<DefaultPolicy>,
    /// Of both; `None` until both are known.
    built: Option<Arc<Intentions>>,
}

impl Draft {
    /// A draft for a registered proxy. `enterprise` is whether namespaces or partitions are in use.
    pub(super) fn registered(proxy_id: String, enterprise: bool) -> Self {
        Self::new(Some(proxy_id), enterprise)
    }

    /// A draft for a proxy that is defined by flags.
    pub(super) fn ad_hoc(definition: Definition) -> Self {
        let mut draft = Self::new(None, false);
        // As Consul's own proxy with flags, which knows no config entries.
        draft.mesh = Some(MeshSettings::default());
        draft.define(definition);
        draft
    }

    /// The same with `aead` to seal TLS records. To be said before any credentials are there.
    pub(super) fn sealed_by(self, aead: Aead) -> Self {
        Self { identity: Identity::new(aead), ..self }
    }

    /// The same with the tunnel, or without it whatever the definition says. To be said before there is a definition.
    pub(super) fn with_tunnel(mut self, tunnel: bool) -> Self {
        self.tunnel = tunnel;
        if let Some(definition) = &mut self.definition {
            definition.restrict_tunnel(tunnel);
        }
        self
    }

    /// Without an id, the definition comes from elsewhere and is not asked for.
    fn new(proxy_id: Option<String>, enterprise: bool) -> Self {
        let registered = proxy_id.map(|id| [Query::Service(id), Query::Mesh]);
        let first = registered.into_iter().flatten().chain([Query::Roots]);
        Self {
            wants: first.map(Want::Start).collect(),
            enterprise,
            tunnel: true,
            definition: None,
            mesh: None,
            identity: Identity::default(),
            rules: Rules::default(),
            tokens: Tokens::default(),
            chains: HashMap::new(),
            prepared: HashMap::new(),
            instances: HashMap::new(),
            server: None,
            public: None,
            former: None,
            exposed: BTreeMap::new(),
            access_log: None,
            upstreams: BTreeMap::new(),
            bell: Bell::default(),
            users: HashMap::new(),
            unused: Vec::new(),
            dirty: Dirty::default(),
            last: None,
            notes: Notes::default(),
            said: HashSet::new(),
        }
    }

    /// Takes news in.
    ///
    /// # Errors
    /// When they can't be used; what was known before stays.
    pub(super) fn apply(&mut self, update: Update, now: SystemTime) -> Result<(), Bad> {
        match update {
            Update::Service(service) => {
                let definition = definition::registered(&service, self.enterprise, &mut self.notes)?;
                self.define(definition);
            }
            Update::Roots(roots) => {
                if self.identity.set_roots(roots) {
                    return self.refresh_identity(now);
                }
            }
            Update::Leaf { service, leaf } => {
                if self.is_ours(&service) && self.identity.set_leaf(*leaf) {
                    return self.refresh_identity(now);
                }
            }
            Update::Intentions { service, list } => {
                if self.is_ours(&service) {
                    let list = intention::intentions(&list, &mut self.notes);
                    self.rule(|rules| rules.list.replace(list.clone()).as_ref() != Some(&list));
                }
            }
            Update::DefaultPolicy { service, policy } => {
                if self.is_ours(&service) {
                    self.rule(|rules| rules.default.replace(policy.clone()).as_ref() != Some(&policy));
                }
            }
            Update::Chain(query, wire) => return self.chain(query, &wire),
            Update::Endpoints { query, rows, filtered_by_acls } => {
                self.endpoints(Query::Endpoints(query), &rows, filtered_by_acls);
            }
            Update::PreparedQuery(query, result) => self.prepared_query(query, &result),
            Update::Mesh(entry) => return self.mesh(entry.as_ref()),
            Update::JwtProvider(name, entry) => return self.jwt_provider(name, entry.as_deref()),
            Update::Keys(source, fetched) => {
                self.tokens.set_keys(source, fetched);
                self.refresh_tokens();
            }
            Update::Failed(query) => self.failed(query),
        }
        Ok(())
    }

    /// Tries again to use a leaf or roots that were refused, and notes when a leaf should have been renewed.
    ///
    /// # Errors
    /// When they still can't be used.
    pub(super) fn retry(&mut self, now: SystemTime) -> Result<(), Bad> {
        if let Some(note) = self.identity.overdue(now) {
            self.notes.push(note);
        }
        if self.identity.is_behind() { self.refresh_identity(now) } else { Ok(()) }
    }

    /// What to ask from now on and what no more, in order, since the last call.
    pub(super) fn wants(&mut self) -> Vec<Want> {
        std::mem::take(&mut self.wants)
    }

    /// Rung when a connection waits for something that is not known yet.
    pub(super) fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// The queries whose answers a connection waits for.
    pub(super) fn called_for(&self) -> impl Iterator<Item = &Query> {
        self.upstreams.values().flat_map(UpstreamDraft::called_for)
    }

    /// Whether there is something to publish, and how soon.
    pub(super) fn urgency(&self) -> Option<Urgency> {
        self.dirty.urgency.filter(|_| self.whole().is_some())
    }

    /// The next snapshot, if the state is whole and differs from the last one.
    pub(super) fn finish(&mut self) -> Option<Arc<Snapshot>> {
        self.whole()?;
        if self.dirty.public {
            match self.public() {
                Ok(public) => self.public = public.map(Arc::new),
                Err(bad) => {
                    self.notes.push(format!("public listener: {bad}"));
                    self.dirty.urgency = None;
                    return None;
                }
            }
        }
        let mut mesh = Mesh {
            credentials: self.identity.credentials()?,
            chains: &self.chains,
            prepared: &self.prepared,
            instances: &mut self.instances,
            notes: &mut self.notes,
        };
        for key in &self.dirty.upstreams {
            if let Some(upstream) = self.upstreams.get_mut(key) {
                upstream.build(key, &mut mesh);
            }
        }
        self.dirty = Dirty::default();
        let published =
            |(key, upstream): (&UpstreamKey, &UpstreamDraft)| (key.clone(), Arc::clone(upstream.published()));
        let next = Snapshot {
            version: self.last.as_ref().map_or(1, |last| last.version + 1),
            public: self.public.clone().filter(|_| self.former.is_none()),
            former_public: self.public.clone().filter(|_| self.former.is_some()),
            upstreams: self.upstreams.iter().map(published).collect(),
            exposed: self.exposed.clone(),
            access_log: self.access_log.clone(),
        };
        if self.last.as_ref().is_some_and(|last| same(last, &next)) {
            return None;
        }
        let next = Arc::new(next);
        self.last = Some(Arc::clone(&next));
        Some(next)
    }

    /// What an operator should know and was not told yet.
    pub(super) fn notes(&mut self) -> Vec<String> {
        /// More different notes than this are the doing of an agent gone mad; then some are told again.
        const REMEMBERED: usize = 10_000;
        if self.said.len() > REMEMBERED {
            self.said.clear();
        }
        self.notes.take().into_iter().filter(|note| self.said.insert(note.clone())).collect()
    }

    /// Something if all is known that anything is published with. Without a public listener nobody asks
    /// intentions.
    fn whole(&self) -> Option<()> {
        let definition = self.definition.as_ref()?;
        self.identity.credentials()?;
        self.mesh.as_ref()?;
        // The first requests would find no token good.
        let tokens = self.last.is_some() || !self.tokens.are_waiting();
        (tokens && (self.rules.built.is_some() || definition.public.is_none())).then_some(())
    }

    fn public(&mut self) -> Result<Option<PublicListener>, Bad> {
        let Some(definition) = &self.definition else { return Ok(None) };
        let plan = definition.public.as_ref().or(self.former.as_ref());
        let parts = plan.zip(self.rules.built.as_ref()).zip(self.identity.credentials());
        let Some((((plan, intentions), credentials), mesh)) = parts.zip(self.mesh.as_ref()) else { return Ok(None) };
        // One that runs goes on, as denials must not wait; whoever needs a token is denied.
        if self.public.is_none() && self.tokens.have_refused() {
            return Ok(None);
        }
        let alpn = server_alpn(plan.protocol, plan.tunnel);
        let made = match &self.server {
            Some((of, offered, server)) if Arc::ptr_eq(of, credentials) && *offered == alpn => Ok(Arc::clone(server)),
            _ => credentials.server(alpn),
        };
        let tls = match (made, &self.server) {
            (Ok(server), _) => server,
            // New rules must not wait for new credentials that can't be used.
            (Err(error), Some((_, _, server))) => {
                self.notes.push(format!("public listener: its credentials stay what they were: {error}"));
                Arc::clone(server)
            }
            (Err(error), None) => return Err(Bad(error.to_string())),
        };
        self.server = Some((Arc::clone(credentials), alpn, Arc::clone(&tls)));
        Ok(Some(PublicListener {
            bind: plan.bind.clone(),
            service: definition.service.clone(),
            protocol: plan.protocol,
            local_app: plan.local_app.clone(),
            local_connect_timeout: plan.local_connect_timeout,
            local_request_timeout: plan.local_request_timeout,
            local_idle_timeout: plan.local_idle_timeout,
            handshake_timeout: plan.handshake_timeout,
            max_connections: plan.max_connections,
            tls,
            intentions: Arc::clone(intentions),
            normalization: mesh.normalization,
            sanitize_forwarded_cert: mesh.sanitize_forwarded_cert,
            tells_cause: plan.tells_cause,
            upgrades: plan.upgrades.clone(),
            token_providers: Arc::clone(self.tokens.built()),
        }))
    }

    fn is_ours(&self, service: &str) -> bool {
        self.definition.as_ref().is_some_and(|definition| definition.service == service)
    }

    fn define(&mut self, mut new: Definition) {
        new.restrict_tunnel(self.tunnel);
        if self.definition.as_ref() == Some(&new) {
            return;
        }
        let old = self.definition.take();
        let before = old.as_ref().map(|old| about_us(old, self.former.as_ref())).unwrap_or_default();
        if new.public.is_some() || old.as_ref().is_some_and(|old| old.service != new.service) {
            self.former = None;
        } else if let Some(public) = old.as_ref().and_then(|old| old.public.clone()) {
            self.former = Some(public);
        }
        self.ask(before, about_us(&new, self.former.as_ref()));
        if old.as_ref().is_some_and(|old| old.service != new.service) {
            self.identity.forget_service();
            self.server = None;
            self.rules = Rules::default();
        }
        if new.public.is_none() && self.former.is_none() {
            // Nobody keeps them up to date from here on.
            self.rules = Rules::default();
        }
        let is_same = |access_log: &Arc<access_log::Settings>| Some(&**access_log) == new.access_log.as_ref();
        if !self.access_log.as_ref().is_some_and(is_same) {
            self.access_log = new.access_log.clone().map(Arc::new);
        }
        let kept = |exposed: &Exposed| {
            let before = self.exposed.get(&exposed.bind).filter(|before| ***before == *exposed);
            before.map_or_else(|| Arc::new(exposed.clone()), Arc::clone)
        };
        self.exposed = new.exposed.values().map(|exposed| (exposed.bind.clone(), kept(exposed))).collect();
        self.dirty.public |= old.is_none_or(|old| old.public != new.public || old.service != new.service);
        let gone: Vec<UpstreamKey> =
            self.upstreams.keys().filter(|key| !new.upstreams.contains_key(key)).cloned().collect();
        for key in &gone {
            self.link(key, Vec::new());
            self.upstreams.remove(key);
        }
        for (key, plan) in &new.upstreams {
            let unchanged = match self.upstreams.get_mut(key) {
                Some(upstream) => !upstream.set_plan(plan),
                None => self.upstreams.insert(key.clone(), UpstreamDraft::new(key, plan.clone(), &self.bell)).is_some(),
            };
            if !unchanged {
                self.relink(key);
            }
        }
        self.sweep();
        self.definition = Some(new);
        self.want_tokens();
        self.touch(Urgency::Soon);
    }

    /// Asks `now` in the place of `before`.
    fn ask(&mut self, before: Vec<Query>, now: Vec<Query>) {
        let gone: Vec<Query> = before.iter().filter(|query| !now.contains(query)).cloned().collect();
        let new = now.into_iter().filter(|query| !before.contains(query));
        self.wants.extend(gone.into_iter().map(Want::Stop));
        self.wants.extend(new.map(Want::Start));
    }

    fn refresh_identity(&mut self, now: SystemTime) -> Result<(), Bad> {
        let Some(definition) = &self.definition else { return Ok(()) };
        let (changed, refused) = self.identity.refresh(&definition.service, now);
        if changed {
            self.dirty.public = true;
            self.dirty.upstreams.extend(self.upstreams.keys().cloned());
            self.touch(Urgency::Now);
        }
        refused
    }

    /// Changes a rule; `change` says whether it did.
    fn rule(&mut self, change: impl FnOnce(&mut Rules) -> bool) {
        if !change(&mut self.rules) {
            return;
        }
        let known = self.rules.list.clone().zip(self.rules.default.clone());
        self.rules.built = known.map(|(list, default)| Arc::new(Intentions::new(list, default)));
        self.want_tokens();
        self.dirty.public = true;
        self.touch(Urgency::Now);
    }

    /// An entry that cannot be used leaves the last good one in force; before there was one, nothing is whole.
    fn mesh(&mut self, entry: Option<&api::MeshConfig>) -> Result<(), Bad> {
        let settings = mesh::settings(entry, &mut self.notes)?;
        if self.mesh.as_ref() == Some(&settings) {
            return Ok(());
        }
        if self.identity.set_policy(settings.tls.clone()) {
            self.dirty.upstreams.extend(self.upstreams.keys().cloned());
        }
        self.mesh = Some(settings);
        self.dirty.public = true;
        self.touch(Urgency::Now);
        Ok(())
    }

    /// An entry that cannot be used leaves the last good one in force; before there was one, no public listener is started.
    fn jwt_provider(&mut self, name: String, entry: Option<&api::JwtProvider>) -> Result<(), Bad> {
        let plan = entry.map(|entry| jwt::provider(entry, &mut self.notes)).transpose();
        let plan = plan.map_err(|Bad(cause)| {
            self.tokens.refuse_provider(&name);
            let waits = self.public.is_none() && self.tokens.have_refused();
            Bad(if waits { format!("{cause}; the public listener does not start before it can be") } else { cause })
        })?;
        if plan.is_none() {
            self.notes.push(format!(
                "an intention requires a token of jwt-provider {name}, which there is none of (or the agent is older \
                 than 1.16): such requests are denied"
            ));
        }
        let before = self.tokens.queries();
        self.tokens.set_provider(name, plan);
        self.ask(before, self.tokens.queries());
        self.refresh_tokens();
        if self.public.is_none() {
            self.dirty.public = true;
            self.touch(Urgency::Now);
        }
        Ok(())
    }

    /// Makes the token providers those that the intentions name. Bytes carry no tokens.
    fn want_tokens(&mut self) {
        let public =
            self.definition.as_ref().and_then(|definition| definition.public.as_ref()).or(self.former.as_ref());
        let http = public.is_some_and(|public| public.protocol.is_http());
        let list = self.rules.list.iter().flatten().filter(|_| http);
        let names = list.flat_map(Intention::providers).map(str::to_owned).collect();
        let before = self.tokens.queries();
        self.tokens.want(names);
        self.ask(before, self.tokens.queries());
        self.refresh_tokens();
    }

    fn refresh_tokens(&mut self) {
        if self.tokens.build() {
            self.dirty.public = true;
            self.touch(Urgency::Now);
        }
    }

    fn chain(&mut self, query: ChainQuery, wire: &api::CompiledDiscoveryChain) -> Result<(), Bad> {
        let users = self.users_of(&Query::Chain(query.clone()));
        if users.is_empty() {
            return Ok(());
        }
        let plan = chain::plan(wire, self.enterprise, &mut self.notes)?;
        if self.chains.get(&query).is_some_and(|known| **known == plan) {
            return Ok(());
        }
        self.chains.insert(query, Arc::new(plan));
        for key in &users {
            self.relink(key);
        }
        self.sweep();
        self.touch(self.urgency_of(&users));
        Ok(())
    }

    fn endpoints(&mut self, query: Query, rows: &[api::CheckServiceNode], filtered_by_acls: bool) {
        let users = self.users_of(&query);
        if users.is_empty() {
            return;
        }
        let known = self.instances.get(&query);
        if filtered_by_acls && rows.is_empty() && known.is_some_and(|known| !known.is_empty()) {
            self.notes.push(format!(
                "{query}: the agent hides every instance from our token, so those known before are kept; \
                 the token needs node:read and service:read"
            ));
            return;
        }
        let list = instances(rows);
        let changed = match self.instances.get_mut(&query) {
            Some(known) => known.set(list),
            None => self.instances.insert(query, Instances::new(list)).is_none(),
        };
        if changed {
            self.touch(self.urgency_of(&users));
            self.dirty.upstreams.extend(users);
        }
    }

    fn prepared_query(&mut self, query: PreparedQuery, result: &api::PreparedQueryResult) {
        let prepared = prepared(result);
        let key = Query::PreparedQuery(query.clone());
        self.endpoints(key.clone(), &result.nodes, false);
        if self.users.contains_key(&key) && self.prepared.get(&query) != Some(&prepared) {
            self.prepared.insert(query, prepared);
            self.dirty.upstreams.extend(self.users_of(&key));
            self.touch(Urgency::Soon);
        }
    }

    /// An answer that did not come changes nothing, unless there never was one: no upstream waits for ever
    /// for endpoints, as its other targets may have some.
    fn failed(&mut self, query: Query) {
        if let Query::JwtProvider(name) = &query {
            self.tokens.miss_provider(name);
            self.dirty.public |= self.public.is_none();
            self.touch(Urgency::Now);
        }
        if !self.users.contains_key(&query) {
            return;
        }
        match &query {
            Query::PreparedQuery(name) if !self.prepared.contains_key(name) => {
                self.prepared_query(name.clone(), &api::PreparedQueryResult::default());
            }
            Query::Endpoints(_) if !self.instances.contains_key(&query) => self.endpoints(query, &[], false),
            Query::Chain(chain) if !self.chains.contains_key(chain) => self.give_up(&query),
            _ => {}
        }
    }

    /// No connection waits for a chain that can't be had.
    fn give_up(&mut self, query: &Query) {
        let mut news = false;
        for key in self.users_of(query) {
            news |= self.upstreams.get_mut(&key).is_some_and(UpstreamDraft::give_up);
        }
        if news {
            self.touch(Urgency::Soon);
        }
    }

    /// How soon a change of these upstreams must be seen.
    fn urgency_of(&self, upstreams: &BTreeSet<UpstreamKey>) -> Urgency {
        let called = |key: &UpstreamKey| self.upstreams.get(key).is_some_and(|found| !found.called_for().is_empty());
        if upstreams.iter().any(called) { Urgency::Now } else { Urgency::Soon }
    }

    fn users_of(&self, query: &Query) -> BTreeSet<UpstreamKey> {
        self.users.get(query).cloned().unwrap_or_default()
    }

    /// Brings up to date what an upstream hangs on, and has it built again.
    fn relink(&mut self, key: &UpstreamKey) {
        let Some(upstream) = self.upstreams.get(key) else { return };
        let uses = match &upstream.plan().source {
            Source::PreparedQuery { query, .. } => vec![Query::PreparedQuery(query.clone())],
            Source::Chain(query) => {
                let targets = self.chains.get(query).into_iter().flat_map(|chain| &chain.targets);
                let instances = targets.filter_map(|target| target.instances.clone());
                std::iter::once(Query::Chain(query.clone())).chain(instances).collect()
            }
        };
        self.link(key, uses);
        self.dirty.upstreams.insert(key.clone());
    }

    /// Makes `uses` what an upstream hangs on.
    fn link(&mut self, key: &UpstreamKey, uses: Vec<Query>) {
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        for query in &uses {
            let users = self.users.entry(query.clone()).or_insert_with(|| {
                self.wants.push(Want::Start(query.clone()));
                BTreeSet::new()
            });
            users.insert(key.clone());
        }
        for query in upstream.set_uses(uses.clone()).into_iter().filter(|query| !uses.contains(query)) {
            if let Some(users) = self.users.get_mut(&query)
                && users.remove(key)
                && users.is_empty()
            {
                self.unused.push(query);
            }
        }
    }

    /// Forgets what nobody hangs on any more. This comes after all links are made: what moves from one
    /// upstream to another is not forgotten, as the agent would not tell it again.
    fn sweep(&mut self) {
        for query in std::mem::take(&mut self.unused) {
            if self.users.get(&query).is_none_or(|users| !users.is_empty()) {
                continue;
            }
            self.users.remove(&query);
            self.instances.remove(&query);
            match &query {
                Query::Chain(chain) => drop(self.chains.remove(chain)),
                Query::PreparedQuery(prepared) => drop(self.prepared.remove(prepared)),
                _ => {}
            }
            self.wants.push(Want::Stop(query));
        }
    }

    fn touch(&mut self, urgency: Urgency) {
        self.dirty.urgency = self.dirty.urgency.max(Some(urgency));
    }
}

/// Application protocols that a server offers.
type Alpn = &'static [&'static [u8]];

/// What the definition alone makes us ask. Who neither has a public listener nor had one needs no rules.
fn about_us(definition: &Definition, former: Option<&PublicPlan>) -> Vec<Query> {
    let service = &definition.service;
    let rules = [Query::Intentions(service.clone()), Query::DefaultPolicy(service.clone())];
    let rules = rules.into_iter().filter(|_| definition.public.is_some() || former.is_some());
    std::iter::once(Query::Leaf(service.clone())).chain(rules).collect()
}

/// What Envoy's public listener offers under Consul 1.14 and later, and what two of ours speak.
fn server_alpn(protocol: Protocol, tunnel: bool) -> Alpn {
    match protocol {
        Protocol::Tcp if tunnel => tls::TUNNELS,
        Protocol::Tcp => &[],
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => &[b"h2", b"http/1.1"],
    }
}

fn same(a: &Snapshot, b: &Snapshot) -> bool {
    let same_upstream =
        |((key_a, a), (key_b, b)): ((_, &Arc<Upstream>), (_, &Arc<Upstream>))| key_a == key_b && Arc::ptr_eq(a, b);
    let same_exposed =
        |((key_a, a), (key_b, b)): ((_, &Arc<Exposed>), (_, &Arc<Exposed>))| key_a == key_b && Arc::ptr_eq(a, b);
    a.public.as_ref().map(Arc::as_ptr) == b.public.as_ref().map(Arc::as_ptr)
        && a.former_public.as_ref().map(Arc::as_ptr) == b.former_public.as_ref().map(Arc::as_ptr)
        && a.access_log.as_ref().map(Arc::as_ptr) == b.access_log.as_ref().map(Arc::as_ptr)
        && a.exposed.len() == b.exposed.len()
        && a.exposed.iter().zip(&b.exposed).all(same_exposed)
        && a.upstreams.len() == b.upstreams.len()
        && a.upstreams.iter().zip(&b.upstreams).all(same_upstream)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::control::fixture::{Ca, chain, read, registration, roots, row, rows};
    use crate::demand::Demand;
    use crate::snapshot::{Action, Bind, Decision, Target};
    use crate::tls::SpiffeId;

    /// A draft with a short way to bring it news and to see what it wants and publishes.
    struct Stage {
        draft: Draft,
        wanted: BTreeSet<String>,
        now: SystemTime,
    }

    impl Stage {
        fn new() -> Self {
            Self {
                draft: Draft::registered("web-sidecar-proxy".into(), false),
                wanted: BTreeSet::new(),
                now: SystemTime::now(),
            }
        }

        /// One that has published a first snapshot, without upstreams.
        fn ready(ca: &Ca) -> Self {
            let mut stage = Self::new();
            stage.service(registration(&[]));
            stage.mesh(None);
            stage.roots(&[ca]).unwrap();
            stage.leaf("web", ca.leaf("web")).unwrap();
            stage.intentions(json!([]));
            stage.default_policy(Action::Deny);
            stage.publishes();
            stage
        }

        fn apply(&mut self, update: Update) -> Result<(), Bad> {
            let result = self.draft.apply(update, self.now);
            for want in self.draft.wants() {
                match want {
                    Want::Start(query) => assert!(self.wanted.insert(query.to_string()), "{query} was asked already"),
                    Want::Stop(query) => assert!(self.wanted.remove(&query.to_string()), "{query} was not asked"),
                }
            }
            result
        }

        fn service(&mut self, registration: Value) {
            self.apply(Update::Service(Box::new(read(registration)))).unwrap();
        }

        fn roots(&mut self, cas: &[&Ca]) -> Result<(), Bad> {
            self.apply(Update::Roots(read(roots(cas))))
        }

        fn leaf(&mut self, service: &str, leaf: Value) -> Result<(), Bad> {
            self.apply(Update::Leaf { service: service.into(), leaf: Box::new(read(leaf)) })
        }

        fn mesh(&mut self, entry: Option<Value>) {
            self.apply(Update::Mesh(entry.map(read))).unwrap();
        }

        fn intentions(&mut self, list: Value) {
            self.apply(Update::Intentions { service: "web".into(), list: read(list) }).unwrap();
        }

        fn default_policy(&mut self, action: Action) {
            let policy = DefaultPolicy { action, source: "test".into() };
            self.apply(Update::DefaultPolicy { service: "web".into(), policy }).unwrap();
        }

        fn chain(&mut self, service: &str, wire: Value) -> Result<(), Bad> {
            self.apply(Update::Chain(chain_query(service), Box::new(read(wire))))
        }

        fn endpoints(&mut self, target: &str, values: &[Value]) {
            let query = endpoints_query(target);
            self.apply(Update::Endpoints { query, rows: rows(values), filtered_by_acls: false }).unwrap();
        }

        fn wants(&self, names: &[&str]) {
            assert_eq!(self.wanted, names.iter().map(ToString::to_string).collect());
        }

        fn publishes(&mut self) -> Arc<Snapshot> {
            assert!(self.draft.urgency().is_some());
            let snapshot = self.draft.finish().expect("a snapshot");
            assert_eq!(self.draft.urgency(), None);
            snapshot
        }

        fn publishes_nothing(&mut self) {
            assert!(self.draft.finish().is_none());
        }
    }

    fn chain_query(service: &str) -> ChainQuery {
        ChainQuery { service: service.into(), ..ChainQuery::default() }
    }

    /// `service.datacenter`.
    fn endpoints_query(target: &str) -> EndpointsQuery {
        let (service, datacenter) = target.split_once('.').unwrap();
        EndpointsQuery { service: service.into(), datacenter: Some(datacenter.into()), ..EndpointsQuery::default() }
    }

    fn upstream<'a>(snapshot: &'a Snapshot, destination: &str) -> Option<&'a Arc<Upstream>> {
        let found = |(key, _): &(&UpstreamKey, _)| key.destination == format!("service:{destination}");
        snapshot.upstreams.iter().find(found).map(|(_, upstream)| upstream)
    }

    fn awaited<'a>(snapshot: &'a Snapshot, destination: &str) -> Option<&'a Demand> {
        upstream(snapshot, destination).unwrap().awaited.as_deref()
    }

    fn targets<'a>(snapshot: &'a Snapshot, destination: &str) -> &'a [Arc<Target>] {
        upstream(snapshot, destination).unwrap().chain.connection_targets()
    }

    fn addresses(target: &Target) -> Vec<String> {
        target.endpoints.usable.iter().map(|endpoint| endpoint.address.to_string()).collect()
    }

    const PUBLIC: [&str; 6] = [
        "registration of web-sidecar-proxy",
        "mesh config entry",
        "CA roots",
        "leaf certificate of web",
        "intentions of web",
        "default policy of web",
    ];

    fn with_public<'a>(more: &[&'a str]) -> Vec<&'a str> {
        PUBLIC.iter().chain(more).copied().collect()
    }

    #[test]
    fn the_first_snapshot_comes_when_it_is_whole_and_upstreams_are_not_waited_for() {
        let ca = Ca::new();
        let mut stage = Stage::new();
        stage.apply(Update::Failed(Query::Roots)).unwrap();
        stage.wants(&["registration of web-sidecar-proxy", "mesh config entry", "CA roots"]);
        stage.mesh(None);
        stage.service(registration(&[("db", 9191)]));
        stage.wants(&with_public(&["discovery chain of db"]));
        stage.publishes_nothing();
        stage.roots(&[&ca]).unwrap();
        stage.publishes_nothing();
        stage.leaf("web", ca.leaf("web")).unwrap();
        stage.publishes_nothing();
        stage.intentions(Value::Array(vec![]));
        stage.publishes_nothing();
        stage.default_policy(Action::Deny);
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        let first = stage.publishes();
        assert_eq!((first.version, first.upstreams.len()), (1, 1));
        assert!(awaited(&first, "db").is_some() && targets(&first, "db").is_empty());
        let public = first.public.as_ref().unwrap();
        assert_eq!(public.bind, Bind::Tcp("0.0.0.0:21000".parse().unwrap()));
        assert_eq!(public.service, "web");
        stage.publishes_nothing();

        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1"]));
        stage.publishes_nothing();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        assert_eq!(stage.draft.urgency(), Some(Urgency::Soon));
        let second = stage.publishes();
        assert_eq!(second.version, 2);
        assert!(Arc::ptr_eq(public, second.public.as_ref().unwrap()));
        assert_eq!(addresses(&targets(&second, "db")[0]), ["10.0.0.5:21001"]);
        assert_eq!(targets(&second, "db")[0].connect_timeout, Duration::from_secs(7));
    }

    #[test]
    fn without_a_port_there_is_no_public_listener_and_nothing_is_asked_for_it() {
        let ca = Ca::new();
        let mut stage = Stage::new();
        let mut registration = registration(&[("db", 9191)]);
        registration["Port"] = 0.into();
        stage.service(registration);
        stage.wants(&[PUBLIC[0], PUBLIC[1], PUBLIC[2], PUBLIC[3], "discovery chain of db"]);
        stage.mesh(None);
        stage.roots(&[&ca]).unwrap();
        stage.leaf("web", ca.leaf("web")).unwrap();
        assert!(stage.publishes().public.is_none());
    }

    #[test]
    fn a_port_that_vanishes_leaves_the_rules_for_what_is_still_open() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let with_port = registration(&[]);
        let mut without_port = with_port.clone();
        without_port["Port"] = 0.into();
        stage.service(without_port);
        stage.wants(&with_public(&[]));
        let former = stage.publishes();
        assert!(former.public.is_none());
        assert_eq!(former.former_public.as_ref().unwrap().service, "web");
        stage.service(with_port);
        let again = stage.publishes();
        assert!(again.public.is_some() && again.former_public.is_none());
    }

    #[test]
    fn upstreams_do_not_wait_for_each_other_and_share_what_is_the_same() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191), ("cache", 9192), ("alias", 9193)]));
        stage.chain("cache", chain(&["cache.dc1"])).unwrap();
        stage.chain("alias", chain(&["cache.dc1"])).unwrap();
        stage.wants(&with_public(&[
            "discovery chain of db",
            "discovery chain of cache",
            "discovery chain of alias",
            "endpoints of cache in dc1",
        ]));
        stage.endpoints("cache.dc1", &[row("10.0.0.6", 21002)]);
        let snapshot = stage.publishes();
        assert!(awaited(&snapshot, "db").is_some() && awaited(&snapshot, "cache").is_none());
        let shared = [&targets(&snapshot, "cache")[0], &targets(&snapshot, "alias")[0]];
        assert!(Arc::ptr_eq(&shared[0].endpoints, &shared[1].endpoints));
    }

    #[test]
    fn a_change_of_endpoints_changes_nothing_else() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191), ("cache", 9192)]));
        stage.chain("db", chain(&["db.dc1", "db.dc2"])).unwrap();
        stage.chain("cache", chain(&["cache.dc1"])).unwrap();
        for target in ["db.dc1", "db.dc2", "cache.dc1"] {
            stage.endpoints(target, &[row("10.0.0.5", 21001)]);
        }
        let before = stage.publishes();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001), row("10.0.0.6", 21001)]);
        let after = stage.publishes();
        assert!(Arc::ptr_eq(before.public.as_ref().unwrap(), after.public.as_ref().unwrap()));
        assert!(Arc::ptr_eq(upstream(&before, "cache").unwrap(), upstream(&after, "cache").unwrap()));
        let (before, after) = (targets(&before, "db"), targets(&after, "db"));
        assert!(!Arc::ptr_eq(&before[0], &after[0]));
        assert!(Arc::ptr_eq(&before[0].tls, &after[0].tls));
        assert!(Arc::ptr_eq(&before[1], &after[1]));
        assert_eq!(addresses(&after[0]), ["10.0.0.5:21001", "10.0.0.6:21001"]);

        // The same again, with another output of a check: nothing that concerns us.
        let mut same = [row("10.0.0.5", 21001), row("10.0.0.6", 21001)];
        same[0]["Checks"][0]["Output"] = "still alive".into();
        stage.endpoints("db.dc1", &same);
        assert_eq!(stage.draft.urgency(), None);
        stage.publishes_nothing();
    }

    #[test]
    fn a_failed_query_counts_as_empty_only_before_its_first_answer() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191)]));
        stage.chain("db", chain(&["db.dc1", "db.dc2"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        assert!(awaited(&stage.publishes(), "db").is_some());
        stage.apply(Update::Failed(Query::Endpoints(endpoints_query("db.dc2")))).unwrap();
        let snapshot = stage.publishes();
        assert_eq!(targets(&snapshot, "db").iter().map(|t| addresses(t).len()).collect::<Vec<_>>(), [1, 0]);
        stage.apply(Update::Failed(Query::Endpoints(endpoints_query("db.dc1")))).unwrap();
        stage.apply(Update::Failed(Query::Chain(chain_query("db")))).unwrap();
        stage.publishes_nothing();
        stage.endpoints("db.dc1", &[]);
        let snapshot = stage.publishes();
        assert!(addresses(&targets(&snapshot, "db")[0]).is_empty());
    }

    #[test]
    fn what_a_connection_waits_for_is_called_for_until_it_is_known() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191), ("cache", 9192)]));
        let snapshot = stage.publishes();
        let called_for =
            |stage: &Stage| stage.draft.called_for().map(ToString::to_string).collect::<BTreeSet<String>>();
        assert_eq!(called_for(&stage), BTreeSet::new());
        awaited(&snapshot, "db").unwrap().call();
        assert_eq!(called_for(&stage), ["discovery chain of db".to_owned()].into());
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        assert!(called_for(&stage).contains("endpoints of db in dc1"));
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        let snapshot = stage.publishes();
        assert_eq!(called_for(&stage), BTreeSet::new());

        // Nobody waits for what can't be had; and what comes all the same is used.
        awaited(&snapshot, "cache").unwrap().call();
        stage.apply(Update::Failed(Query::Chain(chain_query("cache")))).unwrap();
        let snapshot = stage.publishes();
        assert!(awaited(&snapshot, "cache").is_none() && targets(&snapshot, "cache").is_empty());
        assert_eq!(called_for(&stage), BTreeSet::new());
        stage.apply(Update::Failed(Query::Chain(chain_query("cache")))).unwrap();
        stage.publishes_nothing();
        stage.chain("cache", chain(&["cache.dc1"])).unwrap();
        stage.endpoints("cache.dc1", &[row("10.0.0.6", 21001)]);
        assert_eq!(addresses(&targets(&stage.publishes(), "cache")[0]), ["10.0.0.6:21001"]);
    }

    #[test]
    fn endpoints_that_only_acls_hide_are_kept() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191)]));
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        let hidden =
            || Update::Endpoints { query: endpoints_query("db.dc1"), rows: Vec::new(), filtered_by_acls: true };
        stage.apply(hidden()).unwrap();
        assert!(addresses(&targets(&stage.publishes(), "db")[0]).is_empty());
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        stage.publishes();
        assert_eq!(stage.draft.notes(), Vec::<String>::new());
        stage.apply(hidden()).unwrap();
        stage.apply(hidden()).unwrap();
        stage.publishes_nothing();
        let notes = stage.draft.notes();
        assert!(notes.len() == 1 && notes[0].contains("node:read"), "{notes:?}");
    }

    #[test]
    fn a_new_chain_takes_over_when_its_targets_are_known_and_a_bad_one_never() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191)]));
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        let before = stage.publishes();

        stage.chain("db", chain(&["db2.dc1", "db.dc1"])).unwrap();
        stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1", "endpoints of db2 in dc1"]));
        stage.publishes_nothing();
        stage.endpoints("db2.dc1", &[row("10.0.0.7", 21001)]);
        let after = stage.publishes();
        assert_eq!(addresses(&targets(&after, "db")[0]), ["10.0.0.7:21001"]);
        assert!(Arc::ptr_eq(&targets(&before, "db")[0], &targets(&after, "db")[1]));

        for break_it in [
            |chain: &mut Value| chain["StartNode"] = "nowhere".into(),
            |chain: &mut Value| chain["Nodes"]["resolver:start"]["Type"] = "teleporter".into(),
            |chain: &mut Value| chain["Nodes"]["resolver:start"]["Resolver"] = Value::Null,
            |chain: &mut Value| chain["Nodes"]["resolver:start"]["Resolver"]["Target"] = "nobody".into(),
            |chain: &mut Value| chain["Targets"]["db.dc1"]["SNI"] = "".into(),
            |chain: &mut Value| chain["Targets"]["db.dc1"]["Service"] = Value::Null,
            |chain: &mut Value| chain["Targets"] = Value::Null,
        ] {
            let mut bad = chain(&["db.dc1"]);
            break_it(&mut bad);
            assert!(stage.chain("db", bad.clone()).is_err(), "{bad}");
        }
        stage.publishes_nothing();
        stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1", "endpoints of db2 in dc1"]));
    }

    #[test]
    fn a_moved_listener_is_another_one_that_knows_all_at_once() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191)]));
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        stage.publishes();
        stage.service(registration(&[("db", 9292)]));
        let moved = stage.publishes();
        let keys: Vec<_> = moved.upstreams.keys().map(|key| key.bind.to_string()).collect();
        assert_eq!(keys, ["127.0.0.1:9292"]);
        stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1"]));
        stage.service(registration(&[]));
        assert!(stage.publishes().upstreams.is_empty());
        stage.wants(&PUBLIC);
    }

    #[test]
    fn rotation_replaces_credentials_and_keeps_all_else() {
        let (old, new) = (Ca::new(), Ca::new());
        let mut stage = Stage::ready(&old);
        stage.service(registration(&[("db", 9191)]));
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        let before = stage.publishes();
        stage.roots(&[&new, &old]).unwrap();
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        let both = stage.publishes();
        stage.leaf("web", new.leaf("web")).unwrap();
        let after = stage.publishes();
        let (before, both, after) = (targets(&before, "db"), targets(&both, "db"), targets(&after, "db"));
        assert!(!Arc::ptr_eq(&before[0].tls, &both[0].tls));
        assert!(!Arc::ptr_eq(&both[0].tls, &after[0].tls));
        assert!(Arc::ptr_eq(&before[0].endpoints, &after[0].endpoints));
    }

    #[test]
    fn a_bad_leaf_or_bad_roots_change_nothing_and_keep_out_nothing_good() {
        let (ca, other) = (Ca::new(), Ca::new());
        let mut stage = Stage::ready(&ca);
        let expired = ca.leaf_until("web", stage.now - Duration::from_secs(1));
        let mut broken = ca.leaf("web");
        broken["CertPEM"] = "rubbish".into();
        let mut mixed = ca.leaf("web");
        mixed["PrivateKeyPEM"] = ca.leaf("web")["PrivateKeyPEM"].clone();
        for leaf in [expired, broken, mixed, ca.leaf("db"), other.leaf("web"), json!({})] {
            assert!(stage.leaf("web", leaf.clone()).is_err(), "{leaf}");
        }
        stage.publishes_nothing();
        assert!(stage.roots(&[]).is_err());
        stage.publishes_nothing();
        // Each good one is used though the other is bad.
        stage.leaf("web", ca.leaf("web")).unwrap_err();
        stage.publishes();
        stage.leaf("web", json!({})).unwrap_err();
        stage.roots(&[&ca, &other]).unwrap_err();
        stage.publishes();
        stage.leaf("web", other.leaf("web")).unwrap();
        stage.publishes();
        // Roots that do not vouch for our leaf wait for the leaf that they do vouch for.
        stage.roots(&[&ca]).unwrap_err();
        stage.publishes_nothing();
        stage.leaf("web", ca.leaf("web")).unwrap();
        stage.publishes();
    }

    #[test]
    fn a_leaf_that_is_not_valid_yet_is_used_when_it_is() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let leaf = ca.leaf_until("web", stage.now + Duration::from_secs(7260));
        assert!(stage.leaf("web", leaf).is_err());
        assert!(stage.draft.retry(stage.now).is_err());
        stage.publishes_nothing();
        stage.now += Duration::from_secs(120);
        stage.draft.retry(stage.now).unwrap();
        stage.publishes();
        stage.draft.retry(stage.now).unwrap();
        stage.publishes_nothing();
    }

    #[test]
    fn a_leaf_that_is_not_renewed_is_told_of_twice_and_the_next_is_used() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let start = stage.now;
        stage.leaf("web", ca.leaf_until("web", start + Duration::from_secs(3600))).unwrap();
        stage.publishes();
        drop(stage.draft.notes());
        // Of its two hours one is over.
        for (later, told) in [
            (0, None),
            (3000, None),
            (3300, Some("expires at")),
            (3305, None),
            (3601, Some("expired at")),
            (9000, None),
            (0, None),
        ] {
            stage.draft.retry(start + Duration::from_secs(later)).unwrap();
            let notes: Vec<String> = stage.draft.notes();
            match told {
                None => assert!(notes.is_empty(), "{later}: {notes:?}"),
                Some(words) => assert!(notes.len() == 1 && notes[0].contains(words), "{later}: {notes:?}"),
            }
        }
        stage.publishes_nothing();
        stage.now = start + Duration::from_secs(9000);
        stage.leaf("web", ca.leaf_until("web", start + Duration::from_secs(12_600))).unwrap();
        stage.publishes();
        stage.draft.retry(stage.now).unwrap();
        assert_eq!(stage.draft.notes(), [] as [String; 0]);
    }

    #[test]
    fn a_service_may_show_the_name_that_its_instances_were_registered_with() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("payapi", 9191)]));
        stage.chain("payapi", chain(&["payapi.dc1"])).unwrap();
        let named = |name: &str| {
            let mut row = row("10.0.0.5", 21001);
            row["Service"]["Proxy"] = json!({ "DestinationServiceName": name });
            row
        };
        let expected = |stage: &mut Stage, names: &[&str]| {
            let rows: Vec<Value> = names.iter().map(|name| named(name)).collect();
            stage.endpoints("payapi.dc1", &rows);
            let snapshot = stage.publishes();
            let upstream = snapshot.upstreams.values().next().unwrap();
            let target = upstream.chain.targets().next().unwrap();
            target.tls.expected().iter().map(|id| id.service.clone()).collect::<Vec<_>>()
        };
        assert_eq!(expected(&mut stage, &["PayApi", "PAYAPI", "payapi"]), ["payapi", "PAYAPI", "PayApi"]);
        assert_eq!(expected(&mut stage, &["PayApi", "payapi2", "other", ""]), ["payapi", "PayApi"]);
        // The same addresses, another spelling.
        assert_eq!(expected(&mut stage, &["PaYaPi", "payapi2", "other", ""]), ["payapi", "PaYaPi"]);
    }

    #[test]
    fn intentions_are_urgent_and_leave_the_tls_server_alone() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let allow = json!([{"SourceName": "api", "DestinationName": "web", "Action": "allow", "Precedence": 9}]);
        stage.intentions(allow.clone());
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        let first = stage.publishes();
        stage.default_policy(Action::Allow);
        let second = stage.publishes();
        let (first, second) = (first.public.as_ref().unwrap(), second.public.as_ref().unwrap());
        assert!(Arc::ptr_eq(&first.tls, &second.tls));
        let id = |service: &str| {
            let domain = crate::control::fixture::TRUST_DOMAIN;
            SpiffeId::parse(&format!("spiffe://{domain}/ns/default/dc/dc1/svc/{service}")).unwrap()
        };
        assert!(matches!(first.intentions.decide(&id("api")), Decision::Allow(_)));
        assert!(matches!(first.intentions.decide(&id("cron")), Decision::Deny(_)));
        assert!(matches!(second.intentions.decide(&id("cron")), Decision::Allow(_)));
        stage.intentions(allow);
        stage.publishes_nothing();
    }

    #[test]
    fn answers_about_what_we_are_not_any_more_are_ignored() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let mut renamed = registration(&[]);
        renamed["Proxy"]["DestinationServiceName"] = "shop".into();
        stage.service(renamed);
        stage.wants(&[
            PUBLIC[0],
            PUBLIC[1],
            PUBLIC[2],
            "leaf certificate of shop",
            "intentions of shop",
            "default policy of shop",
        ]);
        stage.leaf("web", ca.leaf("web")).unwrap();
        stage.intentions(json!([]));
        stage.default_policy(Action::Allow);
        stage.publishes_nothing();
        stage.leaf("shop", ca.leaf("shop")).unwrap();
        stage.publishes_nothing();
        stage.apply(Update::Intentions { service: "shop".into(), list: Vec::new() }).unwrap();
        let policy = DefaultPolicy { action: Action::Deny, source: "test".into() };
        stage.apply(Update::DefaultPolicy { service: "shop".into(), policy }).unwrap();
        assert_eq!(stage.publishes().public.as_ref().unwrap().service, "shop");
        // Nobody asked for these.
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        stage.publishes_nothing();
    }

    #[test]
    fn what_can_only_be_reached_by_a_gateway_or_a_peering_has_no_endpoints() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(registration(&[("db", 9191)]));
        let mut wire = chain(&["db.dc1", "db.dc2", "db.dc3", "far.dc1"]);
        for (target, mode) in [("db.dc1", "local"), ("db.dc2", "local"), ("db.dc3", "none")] {
            wire["Targets"][target]["MeshGateway"] = json!({ "Mode": mode });
        }
        wire["Targets"]["far.dc1"]["Peer"] = "east".into();
        stage.chain("db", wire).unwrap();
        let queries = ["endpoints of db in dc1", "endpoints of db in dc2", "endpoints of db in dc3"];
        stage.wants(&with_public(&[&["discovery chain of db"][..], &queries].concat()));
        let mut instance = row("10.0.0.5", 21001);
        instance["Service"]["TaggedAddresses"] = json!({"wan": {"Address": "203.0.113.5", "Port": 443}});
        for target in ["db.dc1", "db.dc2", "db.dc3"] {
            stage.endpoints(target, std::slice::from_ref(&instance));
        }
        let snapshot = stage.publishes();
        let found: Vec<_> = targets(&snapshot, "db").iter().map(|target| addresses(target).join(" ")).collect();
        assert_eq!(found, ["10.0.0.5:21001", "", "203.0.113.5:443", ""]);
        let notes = stage.draft.notes();
        assert_eq!(notes.iter().filter(|note| note.contains("mesh gateway")).count(), 1, "{notes:?}");
        assert_eq!(notes.iter().filter(|note| note.contains("peer east")).count(), 1, "{notes:?}");
    }

    #[test]
    fn a_prepared_query_is_one_target_wherever_its_rows_are() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let mut service = registration(&[]);
        service["Proxy"]["Upstreams"] =
            json!([{"DestinationType": "prepared_query", "DestinationName": "dbq", "LocalBindPort": 9191}]);
        stage.service(service);
        stage.wants(&with_public(&["prepared query dbq"]));
        let query = PreparedQuery { name: "dbq".into(), datacenter: None };
        let answer = |rows: &[Value], datacenter: &str| {
            let result = json!({"Service": "db", "Nodes": rows, "Datacenter": datacenter});
            Update::PreparedQuery(query.clone(), Box::new(read(result)))
        };
        stage.apply(Update::Failed(Query::PreparedQuery(query.clone()))).unwrap();
        let only = |snapshot: &Snapshot| {
            Arc::clone(&snapshot.upstreams.values().next().unwrap().chain.connection_targets()[0])
        };
        assert!(addresses(&only(&stage.publishes())).is_empty());
        let mut instance = row("10.0.0.5", 21001);
        instance["Service"]["Proxy"] = json!({"DestinationServiceName": "db"});
        stage.apply(answer(std::slice::from_ref(&instance), "dc1")).unwrap();
        let near = only(&stage.publishes());
        assert_eq!(addresses(&near), ["10.0.0.5:21001"]);
        // A failover of the query: other identities and wide-area addresses.
        instance["Node"]["Datacenter"] = "dc2".into();
        instance["Service"]["TaggedAddresses"] = json!({"wan": {"Address": "203.0.113.5", "Port": 443}});
        stage.apply(answer(&[instance], "dc2")).unwrap();
        let far = only(&stage.publishes());
        assert_eq!(addresses(&far), ["203.0.113.5:443"]);
        assert!(!Arc::ptr_eq(&near.tls, &far.tls));
        stage.apply(Update::Failed(Query::PreparedQuery(query.clone()))).unwrap();
        stage.publishes_nothing();
    }

    #[test]
    fn nothing_is_published_before_the_mesh_entry_is_known_and_its_changes_are() {
        let ca = Ca::new();
        let mut stage = Stage::new();
        stage.service(registration(&[("db", 9191)]));
        stage.roots(&[&ca]).unwrap();
        stage.leaf("web", ca.leaf("web")).unwrap();
        stage.intentions(json!([]));
        stage.default_policy(Action::Deny);
        stage.publishes_nothing();
        stage.apply(Update::Failed(Query::Mesh)).unwrap();
        stage.publishes_nothing();
        stage.mesh(None);
        let first = stage.publishes();
        let public = first.public.as_ref().unwrap();
        assert!(public.normalization.path && !public.sanitize_forwarded_cert);
        stage.chain("db", chain(&["db.dc1"])).unwrap();
        stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
        let before = stage.publishes();

        // What is about requests leaves TLS alone, and tickets with it.
        stage.mesh(Some(json!({"HTTP": {"SanitizeXForwardedClientCert": true,
            "Incoming": {"RequestNormalization": {"MergeSlashes": true}}}})));
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        let now = stage.publishes();
        let public = now.public.as_ref().unwrap();
        assert!(public.normalization.merge_slashes && public.sanitize_forwarded_cert);
        assert!(Arc::ptr_eq(&public.tls, &before.public.as_ref().unwrap().tls));
        assert!(Arc::ptr_eq(&targets(&now, "db")[0], &targets(&before, "db")[0]));

        let tls = json!({"Incoming": {"TLSMinVersion": "TLSv1_3"}, "Outgoing": {"TLSMaxVersion": "TLSv1_2"}});
        stage.mesh(Some(json!({ "TLS": tls })));
        let strict = stage.publishes();
        assert!(!Arc::ptr_eq(&strict.public.as_ref().unwrap().tls, &public.tls));
        assert!(!Arc::ptr_eq(&targets(&strict, "db")[0].tls, &targets(&now, "db")[0].tls));
        stage.mesh(Some(json!({ "TLS": tls })));
        stage.publishes_nothing();
        // A rotation keeps to it.
        stage.leaf("web", ca.leaf("web")).unwrap();
        stage.publishes();
        stage.mesh(None);
        stage.publishes();
    }

    /// A registration that speaks HTTP.
    fn http_registration() -> Value {
        let mut service = registration(&[]);
        service["Proxy"]["Config"] = json!({"protocol": "http"});
        service
    }

    fn provider(remote: bool) -> Option<Box<api::JwtProvider>> {
        let set = if remote {
            json!({"Remote": {"URI": "https://example.com/keys"}})
        } else {
            json!({"Local": {"JWKS": "eyJrZXlzIjpbXX0="}})
        };
        Some(Box::new(read(json!({"Name": "okta", "Issuer": "us", "JSONWebKeySet": set}))))
    }

    #[test]
    fn token_providers_are_those_that_intentions_name() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        stage.service(http_registration());
        stage.publishes();
        let jwt = |name: &str| json!({"Providers": [{"Name": name}]});
        stage.intentions(json!([
            {"SourceName": "api", "Action": "allow", "JWT": jwt("okta"), "Precedence": 9},
            {"SourceName": "app", "Permissions": [{"Action": "allow", "JWT": jwt("other")}], "Precedence": 9},
            {"SourceName": "cat", "Permissions": [{"Action": "deny", "JWT": jwt("okta")}], "Precedence": 9},
        ]));
        stage.wants(&with_public(&["jwt-provider okta", "jwt-provider other"]));
        let names = |snapshot: &Snapshot| {
            let providers = &snapshot.public.as_ref().unwrap().token_providers;
            let name = |(name, provider): (&String, &crate::jwt::Provider)| (name.clone(), provider.keys.is_some());
            providers.0.iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(&stage.publishes()), []);
        let bring = |stage: &mut Stage, name: &str, entry| stage.apply(Update::JwtProvider(name.into(), entry));
        bring(&mut stage, "okta", provider(false)).unwrap();
        assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
        assert_eq!(names(&stage.publishes()), [("okta".into(), true)]);
        bring(&mut stage, "other", None).unwrap();
        assert!(stage.draft.notes().iter().any(|note| note.contains("jwt-provider other")));
        stage.publishes_nothing();

        // Keys that are elsewhere are asked for, and those that came last are kept.
        bring(&mut stage, "okta", provider(true)).unwrap();
        stage.wants(&with_public(&["jwt-provider okta", "jwt-provider other", "key set of https://example.com/keys"]));
        assert_eq!(names(&stage.publishes()), [("okta".into(), false)]);
        let Query::Keys(source) = stage.draft.tokens.queries().pop().unwrap() else { panic!("no keys are wanted") };
        let keys = Arc::new(crate::jwt::KeySet::parse(br#"{"keys": []}"#).unwrap());
        let fetched = || Fetched { keys: Arc::clone(&keys), refetch: crate::jwt::Refetch::default() };
        stage.apply(Update::Keys(source.clone(), fetched())).unwrap();
        assert_eq!(names(&stage.publishes()), [("okta".into(), true)]);
        assert!(bring(&mut stage, "okta", Some(Box::new(read(json!({"Name": "okta"}))))).is_err());
        stage.publishes_nothing();

        // Gone is gone, and so it is for whoever speaks no HTTP.
        bring(&mut stage, "okta", None).unwrap();
        assert_eq!(names(&stage.publishes()), []);
        bring(&mut stage, "okta", provider(true)).unwrap();
        stage.publishes();
        stage.service(registration(&[]));
        stage.wants(&with_public(&[]));
        assert_eq!(names(&stage.publishes()), []);
        bring(&mut stage, "okta", provider(false)).unwrap();
        stage.apply(Update::Keys(source, fetched())).unwrap();
        stage.publishes_nothing();
    }

    #[test]
    fn demands_that_are_not_known_keep_the_public_listener_from_starting() {
        let ca = Ca::new();
        let mut stage = Stage::new();
        let mut service = registration(&[]);
        service["Proxy"]["Config"] = json!({"protocol": "http"});
        stage.service(service);
        let entry = || Some(read(json!({"TLS": {"Incoming": {"TLSMinVersion": "TLSv1_4"}}})));
        assert!(stage.apply(Update::Mesh(entry())).is_err());
        stage.roots(&[&ca]).unwrap();
        stage.leaf("web", ca.leaf("web")).unwrap();
        let jwt = json!({"Providers": [{"Name": "okta"}]});
        stage.intentions(json!([{"SourceName": "*", "Action": "allow", "JWT": jwt, "Precedence": 8}]));
        stage.default_policy(Action::Deny);
        stage.publishes_nothing();
        stage.mesh(None);
        // Nothing was said of the provider yet.
        stage.publishes_nothing();
        let provider = |new: &str| {
            let keys = json!({"Local": {"JWKS": "eyJrZXlzIjpbXX0="}});
            let entry = read(json!({"Name": "okta", "JSONWebKeySet": keys, "New": new}));
            Update::JwtProvider("okta".into(), Some(Box::new(entry)))
        };
        assert!(stage.apply(provider("x")).unwrap_err().0.contains("does not start"));
        assert!(stage.publishes().public.is_none());
        stage.apply(provider("")).unwrap();
        assert!(stage.publishes().public.is_some());
        // What runs stays as it is.
        assert!(stage.apply(provider("x")).is_err() && stage.apply(Update::Mesh(entry())).is_err());
        stage.publishes_nothing();
    }

    #[test]
    fn exposed_paths_and_access_logs_come_with_the_registration() {
        let ca = Ca::new();
        let mut stage = Stage::ready(&ca);
        let mut service = registration(&[]);
        let path = |port: u16, path: &str| json!({"ListenerPort": port, "Path": path, "LocalPathPort": 8080});
        service["Proxy"]["Expose"] = json!({"Paths": [path(21500, "/health"), path(21501, "/metrics")]});
        service["Proxy"]["AccessLogs"] = json!({"Enabled": true});
        stage.service(service.clone());
        let first = stage.publishes();
        assert_eq!((first.exposed.len(), first.access_log.is_some()), (2, true));
        service["Proxy"]["Expose"]["Paths"][1]["Path"] = "/stats".into();
        stage.service(service.clone());
        let second = stage.publishes();
        let kept = |bind: &str| {
            let bind = Bind::Tcp(bind.parse().unwrap());
            Arc::ptr_eq(&first.exposed[&bind], &second.exposed[&bind])
        };
        assert_eq!((kept("0.0.0.0:21500"), kept("0.0.0.0:21501")), (true, false));
        assert!(Arc::ptr_eq(first.access_log.as_ref().unwrap(), second.access_log.as_ref().unwrap()));
        service["Proxy"]["AccessLogs"]["Type"] = "stderr".into();
        stage.service(service);
        assert_ne!(stage.publishes().access_log, first.access_log);
        stage.service(registration(&[]));
        let last = stage.publishes();
        assert!(last.exposed.is_empty() && last.access_log.is_none());
    }

    #[test]
    fn no_json_makes_it_panic() {
        let ca = Ca::new();
        let samples = [
            registration(&[("db", 9191), ("cache", 9192)]),
            roots(&[&ca]),
            ca.leaf("web"),
            json!([{"SourceName": "api", "Action": "allow", "Precedence": 9, "Permissions": [{"Action": "deny"}]}]),
            chain(&["db.dc1", "db.dc2"]),
            json!([row("10.0.0.5", 21001), row("db.internal", 21001)]),
            json!({"Service": "db", "Nodes": [row("::1", 1)], "Datacenter": "dc1"}),
            json!({"TLS": {"Incoming": {"TLSMinVersion": "TLSv1_3", "CipherSuites": ["x"]}}, "HTTP": {"Incoming": {}}}),
            serde_json::from_str(include_str!("../consul/testdata/1.19-jwt_provider.json")).unwrap(),
        ];
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut stage = Stage::ready(&ca);
        for round in 0..3000 {
            let mut sample = samples[round % samples.len()].clone();
            for _ in 0..1 + round % 3 {
                mutate(&mut sample, &mut random);
            }
            let update = match round % samples.len() {
                0 => serde_json::from_value(sample).ok().map(Update::Service),
                1 => serde_json::from_value(sample).ok().map(Update::Roots),
                2 => {
                    let leaf = serde_json::from_value(sample).ok();
                    leaf.map(|leaf| Update::Leaf { service: "web".into(), leaf })
                }
                3 => {
                    let list = serde_json::from_value(sample).ok();
                    list.map(|list| Update::Intentions { service: "web".into(), list })
                }
                4 => serde_json::from_value(sample).ok().map(|wire| Update::Chain(chain_query("db"), wire)),
                5 => serde_json::from_value(sample).ok().map(|rows| Update::Endpoints {
                    query: endpoints_query("db.dc1"),
                    rows,
                    filtered_by_acls: false,
                }),
                7 => serde_json::from_value(sample).ok().map(Update::Mesh),
                8 => serde_json::from_value(sample).ok().map(|entry| Update::JwtProvider("okta".into(), entry)),
                _ => serde_json::from_value(sample).ok().map(|result| {
                    Update::PreparedQuery(PreparedQuery { name: "dbq".into(), datacenter: None }, result)
                }),
            };
            if let Some(update) = update {
                let _ = stage.apply(update);
                let _ = stage.draft.finish();
                let _ = stage.draft.notes();
            }
        }
    }

    /// Puts something odd somewhere.
    fn mutate(value: &mut Value, random: &mut u64) {
        let mut next = |bound: usize| {
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            usize::try_from(*random % bound as u64).unwrap()
        };
        let stay = next(4) == 0;
        let (odd, child) = (next(12), next(1 << 16));
        match value {
            Value::Object(map) if !stay && !map.is_empty() => {
                let child = child % map.len();
                mutate(map.values_mut().nth(child).unwrap(), random);
            }
            Value::Array(items) if !stay && !items.is_empty() => {
                let child = child % items.len();
                mutate(&mut items[child], random);
            }
            _ => {
                *value = match odd {
                    0 => Value::Null,
                    1 => json!(-1),
                    2 => json!(u64::MAX),
                    3 => json!(1e308),
                    4 => json!("é\u{0}%/../:"),
                    5 => json!([]),
                    6 => json!({}),
                    7 => json!([[], {}]),
                    8 => json!("9".repeat(40)),
                    9 => json!(0),
                    10 => json!(true),
                    _ => json!(""),
                }
            }
        }
    }
}
