//! The draft of one upstream. It is built from its plan, its chain and the endpoints of its targets, and keeps the parts that did
//! not change.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::query::{ChainQuery, PreparedQuery, Query};
use super::translate::chain::{ChainPlan, Identity, Prepared, Sni, TargetPlan};
use super::translate::definition::{Source, UpstreamPlan};
use super::translate::endpoints::{self, Instance, View};
use super::translate::{Bad, Notes};
use crate::fetch::FetchRequests;
use crate::snapshot::{
    Endpoints, OutboundKey, OutboundListener, Protocol, Target, Transport, Upstream, UpstreamSettings,
};
use crate::tls::{self, Credentials, SpiffeId};

/// Inputs of building upstreams, besides their own plans.
pub(super) struct Mesh<'a> {
    pub(super) credentials: &'a Arc<Credentials>,
    pub(super) chains: &'a HashMap<ChainQuery, Arc<ChainPlan>>,
    pub(super) prepared: &'a HashMap<PreparedQuery, Prepared>,
    pub(super) instances: &'a mut HashMap<Query, Instances>,
    pub(super) notes: &'a mut Notes,
}

#[derive(Debug)]
pub(super) struct UpstreamDraft {
    plan: UpstreamPlan,
    /// The queries that it is built from.
    uses: Vec<Query>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The upstream in the snapshot before the first one is built.
    Unknown(Arc<OutboundListener>),
    Built(Box<Built>),
}

/// A listener of the snapshot with its upstream, and what it was built from.
#[derive(Debug)]
struct Built {
    listener: Arc<OutboundListener>,
    plan: UpstreamPlan,
    chain: Arc<ChainPlan>,
    credentials: Arc<Credentials>,
    /// One for each of the chain's plans.
    targets: Vec<Arc<Target>>,
}

/// The answer to a query for endpoints.
#[derive(Debug)]
pub(super) struct Instances {
    list: Arc<[Instance]>,
    /// As targets see them; seldom more than one.
    views: Vec<(View, Arc<Endpoints>)>,
    /// The names of the services that they stand in front of, as registrations spell them.
    services: BTreeSet<String>,
}

impl UpstreamDraft {
    pub(super) fn new(key: &OutboundKey, plan: UpstreamPlan, fetches: &FetchRequests) -> Self {
        let request = Arc::new(fetches.request());
        let unknown = OutboundListener::unknown(key.clone(), plan.name.clone(), Some(request));
        Self { plan, uses: Vec::new(), state: State::Unknown(Arc::new(unknown)) }
    }

    pub(super) fn plan(&self) -> &UpstreamPlan {
        &self.plan
    }

    /// Takes a plan; false if it is the one that it has.
    pub(super) fn set_plan(&mut self, plan: &UpstreamPlan) -> bool {
        let new = self.plan != *plan;
        if new {
            self.plan = plan.clone();
        }
        new
    }

    /// Sets the queries that it is built from, and returns those before.
    pub(super) fn set_uses(&mut self, uses: Vec<Query>) -> Vec<Query> {
        std::mem::replace(&mut self.uses, uses)
    }

    /// What the snapshot has; while something of a newer chain is still unknown, this is of an older one.
    pub(super) fn published(&self) -> &Arc<OutboundListener> {
        match &self.state {
            State::Unknown(listener) => listener,
            State::Built(built) => &built.listener,
        }
    }

    /// The queries that it uses, if a connection waits for it.
    pub(super) fn requested(&self) -> &[Query] {
        let waits = self.published().upstream.awaited.as_ref().is_some_and(|request| request.is_requested());
        if waits { &self.uses } else { &[] }
    }

    /// Connections need not wait any more, as the answer failed to come; true if they waited until now.
    pub(super) fn give_up(&mut self) -> bool {
        match &mut self.state {
            State::Unknown(listener) if listener.upstream.awaited.is_some() => {
                let (key, name) = (listener.key.clone(), listener.upstream.name.clone());
                *listener = Arc::new(OutboundListener::unknown(key, name, None));
                true
            }
            _ => false,
        }
    }

    /// Builds it, if all that it needs is known.
    pub(super) fn build(&mut self, key: &OutboundKey, mesh: &mut Mesh<'_>) {
        let Some(chain) = self.chain(mesh) else { return };
        let endpoints: Option<Vec<_>> =
            chain.targets.iter().map(|target| mesh.endpoints(&self.plan.name, target)).collect();
        let Some(endpoints) = endpoints else { return };
        let mut targets = Vec::with_capacity(endpoints.len());
        for (plan, endpoints) in chain.targets.iter().zip(endpoints) {
            let expected = mesh.expected(plan);
            match self.target(plan, &expected, endpoints, chain.protocol, mesh.credentials) {
                Ok(target) => targets.push(target),
                Err(bad) => return mesh.notes.push(format!("upstream {}: {bad}", self.plan.name)),
            }
        }
        if self.is_built_from(&chain, &targets) {
            return;
        }
        let upstream = Arc::new(Upstream {
            name: self.plan.name.clone(),
            chain: chain.build(&targets),
            settings: self.settings(),
            limits: self.plan.limits,
            passive_health_check: self.plan.passive_health_check,
            requests: self.plan.requests.clone(),
            awaited: None,
        });
        let listener = Arc::new(OutboundListener { key: key.clone(), upstream });
        let (plan, credentials) = (self.plan.clone(), Arc::clone(mesh.credentials));
        self.state = State::Built(Box::new(Built { listener, plan, chain, credentials, targets }));
    }

    fn settings(&self) -> UpstreamSettings {
        match &self.plan.source {
            Source::Chain(ChainQuery { overrides, .. }) => UpstreamSettings {
                is_query: false,
                protocol: overrides.protocol.is_some(),
                connect_timeout: overrides.connect_timeout.is_some(),
            },
            // Nothing else can say it.
            Source::PreparedQuery { .. } => UpstreamSettings { is_query: true, protocol: true, connect_timeout: true },
        }
    }

    fn chain(&self, mesh: &Mesh<'_>) -> Option<Arc<ChainPlan>> {
        match &self.plan.source {
            Source::Chain(query) => mesh.chains.get(query).map(Arc::clone),
            Source::PreparedQuery { query, protocol, connect_timeout } => {
                let prepared = mesh.prepared.get(query)?;
                let chain = ChainPlan::of_query(query, prepared, *protocol, *connect_timeout);
                let before = self.built().map(|built| &built.chain).filter(|before| ***before == chain);
                Some(before.map_or_else(|| Arc::new(chain), Arc::clone))
            }
        }
    }

    /// The target as it is, or a new one with as much of the old as still holds.
    fn target(
        &self,
        plan: &TargetPlan,
        expected: &[SpiffeId],
        endpoints: Arc<Endpoints>,
        protocol: Protocol,
        credentials: &Arc<Credentials>,
    ) -> Result<Arc<Target>, Bad> {
        let tunnel = self.plan.tunnel;
        let same = |built: &&Built| {
            let settings = (built.chain.protocol, built.plan.tunnel);
            Arc::ptr_eq(&built.credentials, credentials) && settings == (protocol, tunnel)
        };
        let before = self.built().filter(same);
        let before = before.and_then(|built| {
            let mut targets = built.chain.targets.iter().zip(&built.targets);
            targets.find(|(before, _)| *before == plan).map(|(_, target)| target)
        });
        let before = before.filter(|target| target.tls().expected() == expected);
        match before {
            Some(target) if Arc::ptr_eq(&target.endpoints, &endpoints) => Ok(Arc::clone(target)),
            Some(target) => Ok(Arc::new(new_target(plan, Arc::clone(target.tls()), endpoints))),
            None => {
                let tls = client(plan, expected.to_vec(), protocol, tunnel, credentials)?;
                Ok(Arc::new(new_target(plan, tls, endpoints)))
            }
        }
    }

    fn built(&self) -> Option<&Built> {
        match &self.state {
            State::Unknown(_) => None,
            State::Built(built) => Some(built),
        }
    }

    fn is_built_from(&self, chain: &Arc<ChainPlan>, targets: &[Arc<Target>]) -> bool {
        self.built().is_some_and(|built| {
            Arc::ptr_eq(&built.chain, chain)
                && built.plan == self.plan
                && built.targets.iter().zip(targets).all(|(a, b)| Arc::ptr_eq(a, b))
        })
    }
}

impl Mesh<'_> {
    /// The endpoints of a target as we see them; `None` while they are not known.
    fn endpoints(&mut self, upstream: &str, target: &TargetPlan) -> Option<Arc<Endpoints>> {
        let Some(query) = &target.instances else { return Some(Arc::default()) };
        let us = self.credentials.id();
        // A prepared query that was never answered names no datacenter.
        let elsewhere = !target.datacenter.is_empty() && target.datacenter != us.datacenter;
        let wan = elsewhere || target.partition != us.partition;
        if wan && !matches!(target.gateway_mode.as_str(), "" | "none") {
            self.notes.push(format!(
                "upstream {upstream}: {} in {} is behind a mesh gateway (mode {}), which is not supported yet, so it \
                 has no usable instance",
                target.service, target.datacenter, target.gateway_mode
            ));
            return Some(Arc::default());
        }
        Some(self.instances.get_mut(query)?.view(View { wan, only_passing: target.only_passing }))
    }
}

impl Mesh<'_> {
    /// The identities that a target may show: those of the chain, however the registrations of its instances spell the
    /// service. Consul finds instances whatever the case, and a certificate names the service as it was registered.
    fn expected(&self, plan: &TargetPlan) -> Vec<SpiffeId> {
        let instances = plan.instances.as_ref().and_then(|query| self.instances.get(query));
        let services = instances.map(|instances| &instances.services).into_iter().flatten();
        let spelled = |identity: &Identity, service: &str| SpiffeId {
            trust_domain: self.credentials.id().trust_domain.clone(),
            partition: identity.partition.clone(),
            namespace: identity.namespace.clone(),
            datacenter: identity.datacenter.clone(),
            service: service.to_owned(),
        };
        let mut expected: Vec<SpiffeId> =
            plan.identities.iter().map(|identity| spelled(identity, &identity.service)).collect();
        for service in services {
            let lower = service.to_lowercase();
            for identity in &plan.identities {
                if identity.service != *service && identity.service.to_lowercase() == lower {
                    expected.push(spelled(identity, service));
                }
            }
        }
        expected
    }
}

impl Instances {
    pub(super) fn new(list: Arc<[Instance]>) -> Self {
        let services = services(&list);
        Self { list, views: Vec::new(), services }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Takes a new list; says whether any target sees a change. What looks the same stays the same `Arc`.
    pub(super) fn set(&mut self, list: &Arc<[Instance]>) -> bool {
        let services = services(list);
        let mut changed = services != self.services;
        (self.list, self.services) = (Arc::clone(list), services);
        for (view, endpoints) in &mut self.views {
            let new = endpoints::endpoints(&self.list, *view);
            if **endpoints != new {
                *endpoints = Arc::new(new);
                changed = true;
            }
        }
        changed
    }

    fn view(&mut self, view: View) -> Arc<Endpoints> {
        if let Some((_, endpoints)) = self.views.iter().find(|(known, _)| *known == view) {
            return Arc::clone(endpoints);
        }
        let endpoints = Arc::new(endpoints::endpoints(&self.list, view));
        self.views.push((view, Arc::clone(&endpoints)));
        endpoints
    }
}

fn services(list: &[Instance]) -> BTreeSet<String> {
    let mut services = BTreeSet::new();
    for instance in list {
        if !instance.service.is_empty() && !services.contains(&instance.service) {
            services.insert(instance.service.clone());
        }
    }
    services
}

fn new_target(plan: &TargetPlan, tls: Arc<tls::Client>, endpoints: Arc<Endpoints>) -> Target {
    Target {
        id: plan.id.clone(),
        service: plan.service.clone(),
        datacenter: plan.datacenter.clone(),
        customization_hash: plan.customization_hash.clone(),
        transport: Transport::Mesh(tls),
        connect_timeout: plan.connect_timeout,
        endpoints,
    }
}

/// Connects to the target alone: what its instances may be is decided by the chain, not by who answers.
fn client(
    plan: &TargetPlan,
    expected: Vec<SpiffeId>,
    protocol: Protocol,
    tunnel: bool,
    credentials: &Credentials,
) -> Result<Arc<tls::Client>, Bad> {
    let us = credentials.id();
    let sni = match &plan.sni {
        Sni::Given(name) => name.clone(),
        Sni::Query(PreparedQuery { name, datacenter }) => {
            let datacenter = datacenter.as_ref().unwrap_or(&us.datacenter);
            format!("{name}.default.{datacenter}.query.{}", us.trust_domain)
        }
    };
    let alpn: &[&[u8]] = match protocol {
        // Consul's own proxies offer none. A server that refuses a name it does not know is asked again without.
        Protocol::Tcp if tunnel => tls::TUNNELS,
        Protocol::Tcp => &[],
        Protocol::Http => &[b"h2", b"http/1.1"],
        Protocol::Http2 | Protocol::Grpc => &[b"h2"],
    };
    credentials.client(&sni, expected, alpn).map_err(|error| Bad(error.to_string()))
}
