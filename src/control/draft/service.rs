//! What belongs to one service that the proxy stands for: its identity, its intentions, the providers of tokens that
//! these name, and the public listener that is built of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::super::identity::Identity;
use super::super::jwks_fetcher::{Fetched, KeySource};
use super::super::query::Query;
use super::super::tokens::Tokens;
use super::super::translate::definition::PublicPlan;
use super::super::translate::mesh::MeshSettings;
use super::super::translate::{Bad, Notes, intention, jwt};
use super::rules::Rules;
use super::update::{Effects, Urgency};
use crate::consul::api;
use crate::snapshot::{Bind, DefaultPolicy, InboundListener, Intentions, Protocol, Service};
use crate::tls::{self, Aead, Credentials, Policy};

/// Application protocols that a server offers.
type Alpn = &'static [&'static [u8]];

#[derive(Debug)]
pub(super) struct ServiceDraft {
    name: String,
    /// The plan of the public listener that the registration has now.
    plan: Option<PublicPlan>,
    /// The plan of the public listener that the registration no longer has. Connections that are still open on it follow
    /// its intentions.
    former: Option<PublicPlan>,
    identity: Identity,
    rules: Rules,
    tokens: Tokens,
    /// Made of these credentials for these application protocols. It outlives changes of all else, as it holds the keys of the tickets
    /// that were given out.
    server: Option<(Arc<Credentials>, Alpn, Arc<tls::Server>)>,
    public: Option<Arc<InboundListener>>,
    /// Whether the public listener has to be built again.
    changed: bool,
}

impl ServiceDraft {
    /// The service of that name, of which nothing is known yet. `aead` is what its credentials seal TLS records with.
    pub(super) fn new(name: String, aead: Aead, effects: &mut Effects) -> Self {
        let draft = Self {
            name,
            plan: None,
            former: None,
            identity: Identity::new(aead),
            rules: Rules::default(),
            tokens: Tokens::default(),
            server: None,
            public: None,
            changed: true,
        };
        effects.ask(&[], draft.queries());
        draft
    }

    /// Asks nothing about it any more.
    pub(super) fn end(self, effects: &mut Effects) {
        effects.ask(&self.queries(), Vec::new());
        effects.ask(&self.tokens.queries(), Vec::new());
    }

    /// Chooses the library that seals TLS records. To be said before any credentials are there.
    pub(super) fn seal_by(&mut self, aead: Aead) {
        self.identity = Identity::new(aead);
    }

    pub(super) fn credentials(&self) -> Option<&Arc<Credentials>> {
        self.identity.credentials()
    }

    /// Whether all is known that is published of the service. Without a public listener nobody asks intentions.
    pub(super) fn is_whole(&self, published_before: bool) -> bool {
        // The first requests would find no token good.
        let tokens = published_before || !self.tokens.are_waiting();
        tokens && self.credentials().is_some() && (self.rules.built().is_some() || self.plan.is_none())
    }

    /// The inbound listeners: (those that the registration has, the one that it no longer has).
    pub(super) fn published(&self) -> (BTreeMap<Bind, Arc<InboundListener>>, Vec<Arc<InboundListener>>) {
        let public = self.public.iter().map(Arc::clone);
        if self.former.is_none() {
            (public.map(|listener| (listener.bind.clone(), listener)).collect(), Vec::new())
        } else {
            (BTreeMap::new(), public.collect())
        }
    }

    /// Takes what the registration says of its public listener.
    pub(super) fn define(&mut self, plan: Option<&PublicPlan>, effects: &mut Effects) {
        let before = self.queries();
        let is_same = self.plan.as_ref() == plan;
        let earlier = std::mem::replace(&mut self.plan, plan.cloned());
        if self.plan.is_some() {
            self.former = None;
        } else if earlier.is_some() {
            // A registration that is gone has no service in audit mode.
            self.former = earlier.map(|plan| PublicPlan { audit: false, ..plan });
        }
        effects.ask(&before, self.queries());
        if self.open_plan().is_none() {
            // They are not kept up to date from here on.
            self.rules = Rules::default();
        }
        self.changed |= !is_same;
        self.want_tokens(effects);
    }

    pub(super) fn set_roots(&mut self, roots: Arc<api::CaRoots>) -> bool {
        self.identity.set_roots(roots)
    }

    pub(super) fn set_leaf(&mut self, leaf: &api::Leaf) -> bool {
        self.identity.set_leaf(leaf)
    }

    /// Takes what the mesh asks of TLS; says whether that made other credentials of those that we have.
    pub(super) fn set_policy(&mut self, policy: Policy) -> bool {
        self.changed = true;
        self.identity.set_policy(policy)
    }

    /// Makes credentials of the newest leaf and roots; says whether they changed, and what is wrong with the newest.
    pub(super) fn refresh_identity(&mut self, now: SystemTime) -> (bool, Result<(), Bad>) {
        let (changed, refused) = self.identity.refresh(&self.name, now);
        self.changed |= changed;
        (changed, refused)
    }

    /// Notes a leaf that should have been renewed; says whether a leaf or roots were refused that may be good by now.
    pub(super) fn check_age(&mut self, now: SystemTime, notes: &mut Notes) -> bool {
        if let Some(note) = self.identity.overdue(now) {
            notes.push(note);
        }
        self.identity.is_behind()
    }

    pub(super) fn intentions(&mut self, list: &[api::Intention], effects: &mut Effects) {
        let list = intention::intentions(list, &mut effects.notes);
        if self.rules.set_list(list) {
            self.refresh_rules(effects);
        }
    }

    pub(super) fn default_policy(&mut self, policy: &DefaultPolicy, effects: &mut Effects) {
        if self.rules.set_default(policy.clone()) {
            self.refresh_rules(effects);
        }
    }

    /// An entry that cannot be used leaves the last good one in force; before there was one, no public listener is started.
    pub(super) fn jwt_provider(
        &mut self,
        name: &str,
        entry: Option<&api::JwtProvider>,
        effects: &mut Effects,
    ) -> Result<(), Bad> {
        let plan = entry.map(|entry| jwt::provider(entry, &mut effects.notes)).transpose();
        let plan = plan.map_err(|Bad(cause)| {
            self.tokens.refuse_provider(name);
            let waits = self.public.is_none() && self.tokens.have_refused();
            Bad(if waits { format!("{cause}; the public listener does not start before it can be") } else { cause })
        })?;
        if plan.is_none() {
            effects.notes.push(format!(
                "an intention requires a token of jwt-provider {name}, which does not exist (or the agent is older than \
                 1.16): all requests that this intention decides about are denied"
            ));
        }
        let before = self.tokens.queries();
        self.tokens.set_provider(name.to_owned(), plan);
        effects.ask(&before, self.tokens.queries());
        self.refresh_tokens(effects);
        if self.public.is_none() {
            self.changed = true;
            effects.publish(Urgency::Now);
        }
        Ok(())
    }

    /// The entry of a provider could not be read.
    pub(super) fn miss_provider(&mut self, name: &str, effects: &mut Effects) {
        self.tokens.miss_provider(name);
        self.changed |= self.public.is_none();
        effects.publish(Urgency::Now);
    }

    pub(super) fn keys(&mut self, source: &KeySource, fetched: &Fetched, effects: &mut Effects) {
        self.tokens.set_keys(source.clone(), fetched.clone());
        self.refresh_tokens(effects);
    }

    /// Builds the public listener again if anything changed that it is made of.
    ///
    /// # Errors
    /// When the credentials make no TLS server and there is no earlier one.
    pub(super) fn build(&mut self, mesh: &MeshSettings, notes: &mut Notes) -> Result<(), Bad> {
        if self.changed {
            self.public = self.public_listener(mesh, notes)?.map(Arc::new);
            self.changed = false;
        }
        Ok(())
    }

    fn public_listener(&mut self, mesh: &MeshSettings, notes: &mut Notes) -> Result<Option<InboundListener>, Bad> {
        let parts = self.open_plan().cloned().zip(self.rules.built().cloned()).zip(self.credentials().cloned());
        let Some(((plan, intentions), credentials)) = parts else { return Ok(None) };
        // One that runs goes on, as denials must not wait; requests that need a token are denied.
        if self.public.is_none() && self.tokens.have_refused() {
            return Ok(None);
        }
        let tls = self.tls_server(&credentials, server_alpn(plan.protocol, plan.tunnel), notes)?;
        Ok(Some(listener(plan, self.name.clone(), tls, intentions, mesh, &self.tokens)))
    }

    /// The TLS server that there is, or a new one where the credentials or the protocols changed.
    fn tls_server(
        &mut self,
        credentials: &Arc<Credentials>,
        alpn: Alpn,
        notes: &mut Notes,
    ) -> Result<Arc<tls::Server>, Bad> {
        let made = match &self.server {
            Some((of, offered, server)) if Arc::ptr_eq(of, credentials) && *offered == alpn => Ok(Arc::clone(server)),
            _ => credentials.server(alpn),
        };
        let tls = match (made, &self.server) {
            (Ok(server), _) => server,
            // New rules must not wait for new credentials that can't be used.
            (Err(error), Some((_, _, server))) => {
                notes.push(format!(
                    "public listener: the new credentials can't be used, so the earlier ones stay in use: {error}"
                ));
                Arc::clone(server)
            }
            (Err(error), None) => return Err(Bad(error.to_string())),
        };
        self.server = Some((Arc::clone(credentials), alpn, Arc::clone(&tls)));
        Ok(tls)
    }

    fn refresh_rules(&mut self, effects: &mut Effects) {
        self.want_tokens(effects);
        self.changed = true;
        effects.publish(Urgency::Now);
    }

    /// Makes the token providers those that the intentions name. Bytes carry no tokens.
    fn want_tokens(&mut self, effects: &mut Effects) {
        let http = self.open_plan().is_some_and(|public| public.protocol.is_http());
        let names = self.rules.providers().filter(|_| http).map(str::to_owned).collect();
        let before = self.tokens.queries();
        self.tokens.want(names);
        effects.ask(&before, self.tokens.queries());
        self.refresh_tokens(effects);
    }

    fn refresh_tokens(&mut self, effects: &mut Effects) {
        if self.tokens.build() {
            self.changed = true;
            effects.publish(Urgency::Now);
        }
    }

    /// What the service's name makes us ask. A service that has no public listener and had none needs no rules.
    fn queries(&self) -> Vec<Query> {
        let name = &self.name;
        let rules = [Query::Intentions(name.clone()), Query::DefaultPolicy(name.clone())];
        let rules = rules.into_iter().filter(|_| self.open_plan().is_some());
        std::iter::once(Query::Leaf(name.clone())).chain(rules).collect()
    }

    /// The plan of the listener that connections may be open on.
    fn open_plan(&self) -> Option<&PublicPlan> {
        self.plan.as_ref().or(self.former.as_ref())
    }
}

fn listener(
    plan: PublicPlan,
    service: String,
    tls: Arc<tls::Server>,
    intentions: Arc<Intentions>,
    mesh: &MeshSettings,
    tokens: &Tokens,
) -> InboundListener {
    let service = Service {
        name: service,
        protocol: plan.protocol,
        tls,
        intentions,
        local_app: plan.local_app,
        local_connect_timeout: plan.local_connect_timeout,
        local_request_timeout: plan.local_request_timeout,
        local_idle_timeout: plan.local_idle_timeout,
        normalization: mesh.normalization,
        upgrades: plan.upgrades,
        sanitize_forwarded_cert: mesh.sanitize_forwarded_cert,
        expose_cause: plan.expose_cause,
        audit: plan.audit,
        share_denial_rule: plan.share_denial_rule,
        token_providers: Arc::clone(tokens.built()),
    };
    InboundListener {
        bind: plan.bind,
        handshake_timeout: plan.handshake_timeout,
        max_connections: plan.max_connections,
        service: Arc::new(service),
    }
}

/// What Envoy's public listener offers under Consul 1.14 and later, and what two of ours speak.
fn server_alpn(protocol: Protocol, tunnel: bool) -> Alpn {
    match protocol {
        Protocol::Tcp if tunnel => tls::TUNNELS,
        Protocol::Tcp => &[],
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => &[b"h2", b"http/1.1"],
    }
}
