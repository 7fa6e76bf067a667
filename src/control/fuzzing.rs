//! Checks of the agent's answers.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use http::HeaderMap;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::draft::{Draft, Update, Want};
use super::query::Query;
use super::translate::endpoints::instances;
use super::translate::{Notes, intention};
use crate::consul::api;
use crate::jwt::Verified;
use crate::snapshot::{Action, Decision, DefaultPolicy, Hits, Intentions, RequestView};
use crate::testing::ca::{Ca, TRUST_DOMAIN, uri};
use crate::tls::SpiffeId;

/// Answers of an agent, one in each line, of the endpoint that its first letter names.
pub fn agent(bytes: &[u8]) {
    let mut agent = Agent::new();
    agent.deliver(Update::Service(read(REGISTRATION).unwrap()));
    agent.deliver(Update::Mesh(None));
    agent.deliver(Update::Roots(read(&MESH.roots).unwrap()));
    agent.deliver(Update::Leaf { service: "web".into(), leaf: read(&MESH.leaf).unwrap() });
    agent.deliver(Update::Intentions { service: "web".into(), list: Vec::new() });
    agent.deliver(Update::DefaultPolicy { service: "web".into(), policy: policy(Action::Deny) });
    assert!(agent.published, "a whole state is published");
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Some((kind, json)) = line.split_first() {
            agent.answer(*kind, json);
        }
    }
}

const REGISTRATION: &[u8] = br#"{
    "Kind": "connect-proxy", "ID": "web-sidecar-proxy", "Service": "web-sidecar-proxy", "Port": 21000,
    "Proxy": {
        "DestinationServiceName": "web", "LocalServicePort": 8080, "Config": {"protocol": "http"},
        "Upstreams": [
            {"DestinationName": "db", "LocalBindPort": 9001},
            {"DestinationName": "q", "DestinationType": "prepared_query", "LocalBindPort": 9002}
        ]
    }
}"#;

struct Mesh {
    roots: Vec<u8>,
    leaf: Vec<u8>,
}

static MESH: LazyLock<Mesh> = LazyLock::new(|| {
    let ca = Ca::new();
    let leaf = ca.leaf("web");
    let roots = json!({"TrustDomain": TRUST_DOMAIN, "Roots": [{ "RootCert": ca.pem }]});
    let leaf = json!({"CertPEM": leaf.cert_pem, "PrivateKeyPEM": leaf.key_pem, "Service": "web"});
    Mesh { roots: roots.to_string().into(), leaf: leaf.to_string().into() }
});

/// What the control plane makes of answers, and what it asks.
struct Agent {
    draft: Draft,
    requested: HashSet<Query>,
    published: bool,
}

impl Agent {
    fn new() -> Self {
        let draft = Draft::registered("web-sidecar-proxy".into(), false);
        Self { draft, requested: HashSet::new(), published: false }
    }

    fn answer(&mut self, kind: u8, json: &[u8]) {
        let service = || "web".to_owned();
        let requested: Vec<Query> = self.requested.iter().cloned().collect();
        match kind {
            b's' => self.maybe(read(json).map(Update::Service)),
            b'r' => self.maybe(read(json).map(Update::Roots)),
            b'l' => self.maybe(read(json).map(|leaf| Update::Leaf { service: service(), leaf })),
            b'm' => self.maybe(read(json).map(|entry| Update::Mesh(Some(entry)))),
            b'i' => {
                unknown_fields_allow_nothing(json);
                self.maybe(read(json).map(|list| Update::Intentions { service: service(), list }));
            }
            _ => requested.into_iter().for_each(|query| self.maybe(answer(kind, query, json))),
        }
    }

    fn maybe(&mut self, update: Option<Update>) {
        if let Some(update) = update {
            self.deliver(update);
        }
    }

    fn deliver(&mut self, update: Update) {
        // Refused or not, the state stays whole.
        let _ = self.draft.apply(&update, SystemTime::now());
        for want in self.draft.wants() {
            match want {
                Want::Start(query) => assert!(self.requested.insert(query.clone()), "{query} was asked already"),
                Want::Stop(query) => assert!(self.requested.remove(&query), "{query} was not asked"),
            }
        }
        self.published |= self.draft.finish().is_some();
        let _ = self.draft.notes();
    }
}

/// An answer to what was asked, where it is of that kind.
fn answer(kind: u8, query: Query, json: &[u8]) -> Option<Update> {
    match (kind, query) {
        (b'c', Query::Chain(query)) => read(json).map(|chain| Update::Chain(query, chain)),
        (b'e', Query::Endpoints(query)) => read(json).map(|rows: Vec<api::CheckServiceNode>| Update::Endpoints {
            query,
            instances: instances(&rows),
            filtered_by_acls: false,
        }),
        (b'q', Query::PreparedQuery(query)) => read(json).map(|result| Update::PreparedQuery(query, result)),
        (b'j', Query::JwtProvider(name)) => read(json).map(|entry| Update::JwtProvider(name, Some(entry))),
        _ => None,
    }
}

fn read<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    serde_json::from_slice(json).ok()
}

fn policy(action: Action) -> DefaultPolicy {
    DefaultPolicy { action, source: String::new(), hits: Hits::default() }
}

/// Whatever field a newer Consul adds to an intention, nothing is allowed that was not allowed without it.
fn unknown_fields_allow_nothing(json: &[u8]) {
    let Ok(list) = serde_json::from_slice::<Value>(json) else { return };
    let Some(before) = allowed(&list) else { return };
    let mut paths = Vec::new();
    parts(&list, String::new(), &mut paths);
    for path in paths.iter().take(32) {
        let mut changed = list.clone();
        let Some(Value::Object(part)) = changed.pointer_mut(path) else { continue };
        part.insert("UnheardOf".into(), "x".into());
        let after = allowed(&changed).unwrap_or_default();
        assert!(after.iter().zip(&before).all(|(after, before)| *before || !after), "{path} of {list}");
    }
}

/// Where the parts of intentions are that say who may do what.
fn parts(value: &Value, path: String, paths: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                parts(item, format!("{path}/{place}"), paths);
            }
        }
        Value::Object(members) => {
            paths.push(path.clone());
            for name in ["Permissions", "HTTP", "Header", "JWT", "Providers", "VerifyClaims"] {
                members.get(name).into_iter().for_each(|member| parts(member, format!("{path}/{name}"), paths));
            }
        }
        _ => {}
    }
}

/// Whether each of some requests is allowed; `None` if the list can't be read.
fn allowed(list: &Value) -> Option<Vec<bool>> {
    let list: Vec<api::Intention> = serde_json::from_value(list.clone()).ok()?;
    let list = intention::intentions(&list, &mut Notes::default());
    let intentions = Arc::new(Intentions::new(list, policy(Action::Deny)));
    let headers: HeaderMap = [("x-a".parse().ok()?, "v".parse().ok()?)].into_iter().collect();
    let without = HeaderMap::new();
    let mut allowed = Vec::new();
    for service in ["web", "api"] {
        let peer = SpiffeId::parse(&uri(service)).ok()?;
        for (method, path) in [("GET", "/"), ("POST", "/a"), ("GET", "/admin/x"), ("DELETE", "/a/b")] {
            for headers in [&headers, &without] {
                let request =
                    RequestView { method, path, path_as_written: false, query: None, authority: "db", headers };
                let decision = intentions.decide_request(&peer, &request, &Verified::default());
                allowed.push(matches!(decision, Decision::Allow(_)));
            }
        }
    }
    Some(allowed)
}
