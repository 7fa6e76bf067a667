//! All upstreams in the making, with the answers that they share. What no upstream uses is not asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::super::query::{ChainQuery, PreparedQuery, Query};
use super::super::translate::chain::{ChainPlan, Prepared};
use super::super::translate::definition::{Source, UpstreamPlan};
use super::super::translate::endpoints::{Instance, instances, prepared};
use super::super::translate::{Bad, Notes, chain};
use super::super::upstream::{Instances, Mesh, UpstreamDraft};
use super::update::{Effects, Urgency, Want};
use crate::consul::api;
use crate::fetch::FetchRequests;
use crate::snapshot::{OutboundKey, OutboundListener};
use crate::tls::Credentials;

#[derive(Debug, Default)]
pub(super) struct Upstreams {
    drafts: BTreeMap<OutboundKey, UpstreamDraft>,
    /// Chains and prepared queries, whose instances are beside.
    chains: HashMap<ChainQuery, Arc<ChainPlan>>,
    prepared: HashMap<PreparedQuery, Prepared>,
    /// By the query, for endpoints or of a prepared query, that brought them.
    instances: HashMap<Query, Instances>,
    /// The upstreams that use a query.
    users: HashMap<Query, BTreeSet<OutboundKey>>,
    unused: Vec<Query>,
    /// The upstreams that have to be built again.
    changed: BTreeSet<OutboundKey>,
    /// Requests of connections that wait for an upstream.
    fetches: FetchRequests,
}

impl Upstreams {
    /// Notified when a connection waits for an upstream that is not known yet.
    pub(super) fn fetch_requests(&self) -> FetchRequests {
        self.fetches.clone()
    }

    /// The queries whose answers a connection waits for.
    pub(super) fn requested(&self) -> impl Iterator<Item = &Query> {
        self.drafts.values().flat_map(UpstreamDraft::requested)
    }

    /// Makes the upstreams those of a definition.
    pub(super) fn define(&mut self, plans: &BTreeMap<OutboundKey, UpstreamPlan>, effects: &mut Effects) {
        let gone: Vec<OutboundKey> = self.drafts.keys().filter(|key| !plans.contains_key(key)).cloned().collect();
        for key in &gone {
            self.link(key, Vec::new(), effects);
            self.drafts.remove(key);
        }
        for (key, plan) in plans {
            let unchanged = match self.drafts.get_mut(key) {
                Some(upstream) => !upstream.set_plan(plan),
                None => self.drafts.insert(key.clone(), UpstreamDraft::new(key, plan.clone(), &self.fetches)).is_some(),
            };
            if !unchanged {
                self.relink(key, effects);
            }
        }
        self.remove_unused(effects);
    }

    /// Has each built again: something changed that all are built from.
    pub(super) fn change_all(&mut self) {
        self.changed.extend(self.drafts.keys().cloned());
    }

    /// Builds those that have to be built again, if all that they need is known.
    pub(super) fn build(&mut self, credentials: &Arc<Credentials>, notes: &mut Notes) {
        let mut mesh =
            Mesh { credentials, chains: &self.chains, prepared: &self.prepared, instances: &mut self.instances, notes };
        for key in std::mem::take(&mut self.changed) {
            if let Some(upstream) = self.drafts.get_mut(&key) {
                upstream.build(&key, &mut mesh);
            }
        }
    }

    pub(super) fn published(&self) -> BTreeMap<OutboundKey, Arc<OutboundListener>> {
        let published =
            |(key, upstream): (&OutboundKey, &UpstreamDraft)| (key.clone(), Arc::clone(upstream.published()));
        self.drafts.iter().map(published).collect()
    }

    pub(super) fn chain(
        &mut self,
        query: &ChainQuery,
        wire: &api::CompiledDiscoveryChain,
        enterprise: bool,
        effects: &mut Effects,
    ) -> Result<(), Bad> {
        let users = self.users_of(&Query::Chain(query.clone()));
        if users.is_empty() {
            return Ok(());
        }
        let plan = chain::plan(wire, enterprise, &mut effects.notes)?;
        if self.chains.get(query).is_some_and(|known| **known == plan) {
            return Ok(());
        }
        self.chains.insert(query.clone(), Arc::new(plan));
        for key in &users {
            self.relink(key, effects);
        }
        self.remove_unused(effects);
        effects.publish(self.urgency_of(&users));
        Ok(())
    }

    pub(super) fn endpoints(
        &mut self,
        query: &Query,
        instances: &Arc<[Instance]>,
        filtered_by_acls: bool,
        effects: &mut Effects,
    ) {
        let users = self.users_of(query);
        if users.is_empty() {
            return;
        }
        let known = self.instances.get(query);
        if filtered_by_acls && instances.is_empty() && known.is_some_and(|known| !known.is_empty()) {
            effects.notes.push(format!(
                "{query}: the agent hides every instance from our token, so those known before are kept; \
                 the token needs node:read and service:read"
            ));
            return;
        }
        let changed = match self.instances.get_mut(query) {
            Some(known) => known.set(instances),
            None => self.instances.insert(query.clone(), Instances::new(Arc::clone(instances))).is_none(),
        };
        if changed {
            effects.publish(self.urgency_of(&users));
            self.changed.extend(users);
        }
    }

    pub(super) fn prepared_query(
        &mut self,
        query: &PreparedQuery,
        result: &api::PreparedQueryResult,
        effects: &mut Effects,
    ) {
        let prepared = prepared(result);
        let key = Query::PreparedQuery(query.clone());
        self.endpoints(&key, &instances(&result.nodes), false, effects);
        if self.users.contains_key(&key) && self.prepared.get(query) != Some(&prepared) {
            self.prepared.insert(query.clone(), prepared);
            self.changed.extend(self.users_of(&key));
            effects.publish(Urgency::Soon);
        }
    }

    /// An answer that did not come changes nothing, unless there never was one: no upstream waits for ever
    /// for endpoints, as its other targets may have some.
    pub(super) fn failed(&mut self, query: &Query, effects: &mut Effects) {
        if !self.users.contains_key(query) {
            return;
        }
        match query {
            Query::PreparedQuery(name) if !self.prepared.contains_key(name) => {
                self.prepared_query(name, &api::PreparedQueryResult::default(), effects);
            }
            Query::Endpoints(_) if !self.instances.contains_key(query) => {
                self.endpoints(query, &Arc::from([]), false, effects)
            }
            Query::Chain(chain) if !self.chains.contains_key(chain) => self.give_up(query, effects),
            _ => {}
        }
    }

    /// No connection waits for a chain that can't be had.
    fn give_up(&mut self, query: &Query, effects: &mut Effects) {
        let mut any_given_up = false;
        for key in self.users_of(query) {
            any_given_up |= self.drafts.get_mut(&key).is_some_and(UpstreamDraft::give_up);
        }
        if any_given_up {
            effects.publish(Urgency::Soon);
        }
    }

    /// How soon a change of these upstreams must be published.
    fn urgency_of(&self, upstreams: &BTreeSet<OutboundKey>) -> Urgency {
        let requested = |key: &OutboundKey| self.drafts.get(key).is_some_and(|found| !found.requested().is_empty());
        if upstreams.iter().any(requested) { Urgency::Now } else { Urgency::Soon }
    }

    fn users_of(&self, query: &Query) -> BTreeSet<OutboundKey> {
        self.users.get(query).cloned().unwrap_or_default()
    }

    /// Brings up to date what an upstream uses, and has it built again.
    fn relink(&mut self, key: &OutboundKey, effects: &mut Effects) {
        let Some(upstream) = self.drafts.get(key) else { return };
        let uses = match &upstream.plan().source {
            Source::PreparedQuery { query, .. } => vec![Query::PreparedQuery(query.clone())],
            Source::Chain(query) => {
                let targets = self.chains.get(query).into_iter().flat_map(|chain| &chain.targets);
                let instances = targets.filter_map(|target| target.instances.clone());
                std::iter::once(Query::Chain(query.clone())).chain(instances).collect()
            }
        };
        self.link(key, uses, effects);
        self.changed.insert(key.clone());
    }

    /// Makes `uses` what an upstream uses.
    fn link(&mut self, key: &OutboundKey, uses: Vec<Query>, effects: &mut Effects) {
        let Some(upstream) = self.drafts.get_mut(key) else { return };
        for query in &uses {
            let users = self.users.entry(query.clone()).or_insert_with(|| {
                effects.wants.push(Want::Start(query.clone()));
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

    /// Forgets what no upstream uses any more. This comes after all links are made: what moves from one
    /// upstream to another is not forgotten, as the agent would not tell it again.
    fn remove_unused(&mut self, effects: &mut Effects) {
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
            effects.wants.push(Want::Stop(query));
        }
    }
}
