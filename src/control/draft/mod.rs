//! The half-built state: answers of the agent in, whole snapshots out. No IO, and the time is an argument.
//!
//! What an answer does not concern keeps its `Arc`: an answer about the endpoints of one service costs a
//! new target and a new upstream for each that uses it, and nothing for the others.

mod rules;
mod service;
#[cfg(test)]
mod tests;
mod update;
mod upstreams;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

pub(super) use update::{Update, Urgency, Want};

use self::service::ServiceDraft;
use self::update::Effects;
use self::upstreams::Upstreams;
use super::query::Query;
use super::translate::definition::{Definition, PublicPlan};
use super::translate::mesh::MeshSettings;
use super::translate::{Bad, definition, mesh};
use crate::access_log;
use crate::consul::api;
use crate::fetch::FetchRequests;
use crate::snapshot::{Bind, Exposed, InboundListener, MetricsSettings, Snapshot};
use crate::tls::Aead;
use crate::trace;

#[derive(Debug)]
pub(super) struct Draft {
    /// Of the registration; empty for a proxy that is defined by flags.
    proxy_id: String,
    /// Whether namespaces and partitions may be sent.
    enterprise: bool,
    /// Whether this process uses the tunnel at all.
    tunnel: bool,
    definition: Option<Definition>,
    /// `None` until the agent has said whether there is an entry.
    mesh: Option<MeshSettings>,
    /// Whether proxy-defaults turns audit mode on for the whole mesh. `None` until the agent has said; it is asked where the
    /// registration turns it on.
    audits_all: Option<bool>,
    aead: Aead,
    roots: Option<Arc<api::CaRoots>>,
    /// The services that the proxy stands for, by name: a sidecar's one.
    services: BTreeMap<String, ServiceDraft>,
    upstreams: Upstreams,
    exposed: BTreeMap<Bind, Arc<Exposed>>,
    access_log: Option<Arc<access_log::Settings>>,
    metrics: Arc<MetricsSettings>,
    traces: Arc<trace::Settings>,
    effects: Effects,
    last: Option<Arc<Snapshot>>,
    /// Notes that were given out, so that each is once.
    logged: HashSet<String>,
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
    pub(super) fn sealed_by(mut self, aead: Aead) -> Self {
        self.aead = aead;
        self.services.values_mut().for_each(|service| service.seal_by(aead));
        self
    }

    /// The same with the tunnel, or without it whatever the definition says.
    pub(super) fn with_tunnel(mut self, tunnel: bool) -> Self {
        self.tunnel = tunnel;
        if let Some(definition) = self.definition.take() {
            self.define(definition);
        }
        self
    }

    /// Without an id, the definition comes from elsewhere and is not asked for.
    fn new(proxy_id: Option<String>, enterprise: bool) -> Self {
        let id = proxy_id.clone().unwrap_or_default();
        let registered = proxy_id.map(|id| [Query::Service(id), Query::Mesh]);
        let first = registered.into_iter().flatten().chain([Query::Roots]);
        let effects = Effects { wants: first.map(Want::Start).collect(), ..Effects::default() };
        Self {
            proxy_id: id,
            enterprise,
            tunnel: true,
            definition: None,
            mesh: None,
            audits_all: None,
            aead: Aead::default(),
            roots: None,
            services: BTreeMap::new(),
            upstreams: Upstreams::default(),
            exposed: BTreeMap::new(),
            access_log: None,
            metrics: Arc::default(),
            traces: Arc::default(),
            effects,
            last: None,
            logged: HashSet::new(),
        }
    }

    /// Takes news in.
    ///
    /// # Errors
    /// When they can't be used; what was known before stays.
    pub(super) fn apply(&mut self, update: &Update, now: SystemTime) -> Result<(), Bad> {
        let effects = &mut self.effects;
        match update {
            Update::Service(service) => {
                let definition = definition::registered(service, self.enterprise, &mut effects.notes)?;
                self.define(definition);
            }
            Update::Roots(roots) => {
                if self.set_roots(roots) {
                    return self.refresh_identity(now);
                }
            }
            Update::Leaf { service, leaf } => {
                if self.services.get_mut(service).is_some_and(|service| service.set_leaf(leaf)) {
                    return self.refresh_identity(now);
                }
            }
            Update::Intentions { service, list } => {
                self.services.get_mut(service).into_iter().for_each(|service| service.intentions(list, effects));
            }
            Update::DefaultPolicy { service, policy } => {
                self.services.get_mut(service).into_iter().for_each(|service| service.default_policy(policy, effects));
            }
            Update::Chain(query, wire) => return self.upstreams.chain(query, wire, self.enterprise, effects),
            Update::Endpoints { query, instances, filtered_by_acls } => {
                self.upstreams.endpoints(&Query::Endpoints(query.clone()), instances, *filtered_by_acls, effects);
            }
            Update::PreparedQuery(query, result) => self.upstreams.prepared_query(query, result, effects),
            Update::Mesh(entry) => return self.mesh(entry.as_ref()),
            Update::ProxyDefaults(entry) => {
                let audits_all = entry.as_deref().is_some_and(definition::audits_all);
                if audits_all {
                    effects.notes.push(AUDITS_ALL.into());
                }
                self.set_audits_all(audits_all);
            }
            Update::JwtProvider(name, entry) => {
                let mut services = self.services.values_mut();
                return services.try_for_each(|service| service.jwt_provider(name, entry.as_deref(), effects));
            }
            Update::Keys(source, fetched) => {
                self.services.values_mut().for_each(|service| service.keys(source, fetched, effects));
            }
            Update::Failed(Query::JwtProvider(name)) => {
                self.services.values_mut().for_each(|service| service.miss_provider(name, effects));
            }
            // Before it is known, nothing is let through.
            Update::Failed(Query::ProxyDefaults) => {
                let audits_all = self.audits_all.unwrap_or(true);
                self.set_audits_all(audits_all);
            }
            Update::Failed(query) => self.upstreams.failed(query, effects),
        }
        Ok(())
    }

    /// Tries again to use a leaf or roots that were refused, and notes when a leaf should have been renewed.
    ///
    /// # Errors
    /// When they still can't be used.
    pub(super) fn retry(&mut self, now: SystemTime) -> Result<(), Bad> {
        let mut is_behind = false;
        for service in self.services.values_mut() {
            is_behind |= service.check_age(now, &mut self.effects.notes);
        }
        if is_behind { self.refresh_identity(now) } else { Ok(()) }
    }

    /// The queries to start and to stop, in order, since the last call.
    pub(super) fn wants(&mut self) -> Vec<Want> {
        std::mem::take(&mut self.effects.wants)
    }

    /// Notified when a connection waits for an upstream that is not known yet.
    pub(super) fn fetch_requests(&self) -> FetchRequests {
        self.upstreams.fetch_requests()
    }

    /// The queries whose answers a connection waits for.
    pub(super) fn requested(&self) -> impl Iterator<Item = &Query> {
        self.upstreams.requested()
    }

    /// Whether there is something to publish, and how soon.
    pub(super) fn urgency(&self) -> Option<Urgency> {
        self.effects.urgency.filter(|_| self.is_whole())
    }

    /// The next snapshot, if the state is whole and differs from the last one.
    pub(super) fn finish(&mut self) -> Option<Arc<Snapshot>> {
        if !self.is_whole() {
            return None;
        }
        self.effects.urgency = None;
        for service in self.services.values_mut() {
            if let Err(bad) = service.build(self.mesh.as_ref()?, &mut self.effects.notes) {
                self.effects.notes.push(format!("public listener: {bad}"));
                return None;
            }
        }
        let caller = self.services.get(&self.definition.as_ref()?.service)?;
        let credentials = Arc::clone(caller.credentials()?);
        self.upstreams.build(&credentials, &mut self.effects.notes);
        let (mut inbound, mut former_inbound) = (BTreeMap::new(), Vec::new());
        for service in self.services.values() {
            let (present, former) = service.published();
            inbound.extend(present);
            former_inbound.extend(former);
        }
        let next = Snapshot {
            version: self.last.as_ref().map_or(1, |last| last.version + 1),
            proxy_id: self.proxy_id.clone(),
            inbound,
            former_inbound,
            outbound: self.upstreams.published(),
            exposed: self.exposed.clone(),
            access_log: self.access_log.clone(),
            metrics: Arc::clone(&self.metrics),
            traces: Arc::clone(&self.traces),
            credentials: Some(credentials),
        };
        if self.last.as_ref().is_some_and(|last| same(last, &next)) {
            return None;
        }
        let next = Arc::new(next);
        self.last = Some(Arc::clone(&next));
        Some(next)
    }

    /// New notes for the log.
    pub(super) fn notes(&mut self) -> Vec<String> {
        /// Notes that are remembered as logged. Beyond this number some are logged again.
        const REMEMBERED: usize = 10_000;
        if self.logged.len() > REMEMBERED {
            self.logged.clear();
        }
        self.effects.notes.take().into_iter().filter(|note| self.logged.insert(note.clone())).collect()
    }

    /// Whether all is known that anything is published with.
    fn is_whole(&self) -> bool {
        let knows_audit = !self.asks_for_audit() || self.audits_all.is_some() || self.last.is_some();
        self.definition.is_some()
            && self.mesh.is_some()
            && knows_audit
            && self.services.values().all(|service| service.is_whole(self.last.is_some()))
    }

    fn define(&mut self, mut new: Definition) {
        new.restrict_tunnel(self.tunnel);
        if self.definition.as_ref() == Some(&new) {
            return;
        }
        let asked = |audit: bool| if audit { vec![Query::ProxyDefaults] } else { Vec::new() };
        self.effects.ask(&asked(self.asks_for_audit()), asked(new.asks_for_audit()));
        if !new.asks_for_audit() {
            // It is not kept up to date from here on.
            self.audits_all = None;
        }
        self.define_service(&new);
        let is_same = |access_log: &Arc<access_log::Settings>| Some(&**access_log) == new.access_log.as_ref();
        if !self.access_log.as_ref().is_some_and(is_same) {
            self.access_log = new.access_log.clone().map(Arc::new);
        }
        if *self.metrics != new.metrics {
            self.metrics = Arc::new(new.metrics.clone());
        }
        if *self.traces != new.traces {
            self.traces = Arc::new(new.traces.clone());
        }
        let kept = |exposed: &Exposed| {
            let before = self.exposed.get(&exposed.bind).filter(|before| ***before == *exposed);
            before.map_or_else(|| Arc::new(exposed.clone()), Arc::clone)
        };
        self.exposed = new.exposed.values().map(|exposed| (exposed.bind.clone(), kept(exposed))).collect();
        self.upstreams.define(&new.upstreams, &mut self.effects);
        self.definition = Some(new);
        self.effects.publish(Urgency::Soon);
    }

    /// Makes the services those of a definition.
    fn define_service(&mut self, new: &Definition) {
        let gone: Vec<String> = self.services.keys().filter(|name| **name != new.service).cloned().collect();
        for name in gone {
            self.services.remove(&name).into_iter().for_each(|service| service.end(&mut self.effects));
        }
        let service = self.services.entry(new.service.clone()).or_insert_with_key(|name| {
            let mut service = ServiceDraft::new(name.clone(), self.aead, &mut self.effects);
            if let Some(mesh) = &self.mesh {
                service.set_policy(mesh.tls.clone());
            }
            if let Some(roots) = &self.roots {
                service.set_roots(Arc::clone(roots));
            }
            service
        });
        let may_audit = self.audits_all == Some(false);
        let public = new.public.as_ref().map(|plan| PublicPlan { audit: plan.audit && may_audit, ..plan.clone() });
        service.define(public.as_ref(), &mut self.effects);
    }

    fn asks_for_audit(&self) -> bool {
        self.definition.as_ref().is_some_and(Definition::asks_for_audit)
    }

    /// Audit mode is for a service that says so by itself. What the agent merges cannot be told apart, so that an entry for
    /// all turns it off.
    fn set_audits_all(&mut self, audits_all: bool) {
        if self.audits_all.replace(audits_all) == Some(audits_all) {
            return;
        }
        if let Some(definition) = self.definition.take() {
            self.define_service(&definition);
            self.definition = Some(definition);
        }
        self.effects.publish(Urgency::Now);
    }

    /// Takes new roots; false if they are those that all services have.
    fn set_roots(&mut self, roots: &api::CaRoots) -> bool {
        if self.roots.as_deref() == Some(roots) {
            return false;
        }
        let roots = Arc::new(roots.clone());
        self.roots = Some(Arc::clone(&roots));
        let mut new = false;
        for service in self.services.values_mut() {
            new |= service.set_roots(Arc::clone(&roots));
        }
        new
    }

    fn refresh_identity(&mut self, now: SystemTime) -> Result<(), Bad> {
        let (mut changed, mut refused) = (false, Ok(()));
        for service in self.services.values_mut() {
            let (other, problem) = service.refresh_identity(now);
            changed |= other;
            refused = refused.and(problem);
        }
        if changed {
            self.upstreams.change_all();
            self.effects.publish(Urgency::Now);
        }
        refused
    }

    /// An entry that cannot be used leaves the last good one in force; before there was one, nothing is whole.
    fn mesh(&mut self, entry: Option<&api::MeshConfig>) -> Result<(), Bad> {
        let settings = mesh::settings(entry, &mut self.effects.notes)?;
        if self.mesh.as_ref() == Some(&settings) {
            return Ok(());
        }
        for service in self.services.values_mut() {
            if service.set_policy(settings.tls.clone()) {
                self.upstreams.change_all();
            }
        }
        self.mesh = Some(settings);
        self.effects.publish(Urgency::Now);
        Ok(())
    }
}

const AUDITS_ALL: &str = "proxy-defaults sets lictor_intentions_audit, which would let through what intentions deny in the \
                          whole mesh: it is not followed, and intentions are enforced; set it in the registration of \
                          each service that is to be audited";

/// Whether two snapshots have the same parts. Those that did not change kept their `Arc`.
fn same(a: &Snapshot, b: &Snapshot) -> bool {
    let same_former = |(a, b): (&Arc<InboundListener>, &Arc<InboundListener>)| Arc::ptr_eq(a, b);
    same_parts(&a.inbound, &b.inbound)
        && a.former_inbound.len() == b.former_inbound.len()
        && a.former_inbound.iter().zip(&b.former_inbound).all(same_former)
        && same_parts(&a.outbound, &b.outbound)
        && same_parts(&a.exposed, &b.exposed)
        && a.access_log.as_ref().map(Arc::as_ptr) == b.access_log.as_ref().map(Arc::as_ptr)
        && Arc::ptr_eq(&a.metrics, &b.metrics)
        && Arc::ptr_eq(&a.traces, &b.traces)
        && a.credentials.as_ref().map(Arc::as_ptr) == b.credentials.as_ref().map(Arc::as_ptr)
}

fn same_parts<K: Eq, P>(a: &BTreeMap<K, Arc<P>>, b: &BTreeMap<K, Arc<P>>) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((key_a, a), (key_b, b))| key_a == key_b && Arc::ptr_eq(a, b))
}
