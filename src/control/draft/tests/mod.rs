//! Drafts by their updates: what is wanted and what is published after each.

mod service;
mod upstreams;
mod whole;

use std::collections::BTreeSet;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

use super::*;
use crate::control::fixture::{Ca, TRUST_DOMAIN, chain, read, registration, roots, row, rows};
use crate::control::jwks_fetcher::Fetched;
use crate::control::query::{ChainQuery, EndpointsQuery, PreparedQuery};
use crate::control::translate::endpoints::instances;
use crate::fetch::FetchRequest;
use crate::snapshot::{Action, Bind, Decision, DefaultPolicy, Hits, InboundListener, OutboundKey, Target, Upstream};
use crate::tls::SpiffeId;

/// A draft with a short way to bring it news and to see what it wants and publishes.
struct Stage {
    draft: Draft,
    /// By what they are in words.
    wanted: BTreeMap<String, Query>,
    now: SystemTime,
}

impl Stage {
    fn new() -> Self {
        Self {
            draft: Draft::registered("web-sidecar-proxy".into(), false),
            wanted: BTreeMap::new(),
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
        let result = self.draft.apply(&update, self.now);
        for want in self.draft.wants() {
            match want {
                Want::Start(query) => {
                    let before = self.wanted.insert(query.to_string(), query);
                    assert_eq!(before, None, "it was asked already");
                }
                Want::Stop(query) => {
                    let before = self.wanted.remove(&query.to_string());
                    assert_eq!(before, Some(query), "it was not asked");
                }
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
        let policy = DefaultPolicy { action, source: "test".into(), hits: Hits::default() };
        self.apply(Update::DefaultPolicy { service: "web".into(), policy }).unwrap();
    }

    fn chain(&mut self, service: &str, wire: Value) -> Result<(), Bad> {
        self.apply(Update::Chain(chain_query(service), Box::new(read(wire))))
    }

    fn endpoints(&mut self, target: &str, values: &[Value]) {
        let query = endpoints_query(target);
        self.apply(Update::Endpoints { query, instances: instances(&rows(values)), filtered_by_acls: false }).unwrap();
    }

    fn wants(&self, names: &[&str]) {
        assert_eq!(
            self.wanted.keys().cloned().collect::<BTreeSet<_>>(),
            names.iter().map(ToString::to_string).collect()
        );
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
    let found = |(key, _): &(&OutboundKey, _)| key.destination == format!("service:{destination}");
    snapshot.outbound.iter().find(found).map(|(_, listener)| &listener.upstream)
}

/// The only inbound listener.
fn published(snapshot: &Snapshot) -> &Arc<InboundListener> {
    snapshot.inbound.values().next().unwrap()
}

fn awaited<'a>(snapshot: &'a Snapshot, destination: &str) -> Option<&'a FetchRequest> {
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
