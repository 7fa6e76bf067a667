//! The agent's endpoints that can be queried and watched: one constructor for each.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::api;

/// Interval between two executions of a prepared query, which cannot block.
const PREPARED_QUERY_PERIOD: Duration = Duration::from_secs(10);

/// Interval between two requests for the default policy, which changes with the agent's configuration alone.
const DEFAULT_POLICY_PERIOD: Duration = Duration::from_secs(60);

/// A read whose answer is a `T`. Two queries with the same [`key`](Self::key) ask the same.
pub struct Query<T> {
    pub(super) request: Request,
    pub(super) flow: Flow,
    pub(super) priority: Priority,
    /// The table that the answer is made from, where there is such.
    pub(super) table: Option<Table>,
    /// Whether the table notices every change of this answer.
    pub(super) covered: fn(&T) -> bool,
    pub(super) decode: fn(&Response) -> Result<T, String>,
}

/// The order of queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Priority {
    /// Decides who may connect. It has a connection that nothing else uses.
    Authorization,
    /// Our own configuration: registration, certificates, default policy.
    Identity,
    /// Configuration of upstreams.
    Upstream,
}

/// A table that many answers are made from: one watch notices changes of all of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Table {
    /// Nodes, services and checks of a datacenter, by default our own.
    Instances(Option<String>),
    /// Config entries of all kinds.
    ConfigEntries,
}

/// How an answer is followed by a newer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// Blocks on `X-Consul-Index`.
    Index,
    /// Blocks on the content hash.
    Hash,
    /// Blocks on the index of the matched list, or on that of the table where an agent before 1.9 gives none.
    Intentions,
    /// Fetched again when its table has changed.
    Table,
    /// Cannot block.
    Poll(Duration),
}

#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: Method,
    /// Segments after `/v1`, not yet encoded.
    pub(super) path: Vec<String>,
    pub(super) params: Vec<(&'static str, String)>,
    pub(super) body: Option<Bytes>,
    /// The rights that the token needs, for the error message.
    pub(super) needs: String,
    /// Whether a stale answer will do where the settings ask for such.
    pub(super) stale: bool,
    /// Whether "not found" is an answer.
    pub(super) may_be_missing: bool,
}

/// An answer as it came.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    pub(super) index: Option<u64>,
    pub(super) hash: Option<String>,
    /// A server that is not the leader may have answered. Lists of config entries never say so.
    pub(super) stale: bool,
    /// `X-Consul-Default-ACL-Policy`, Consul 1.9 and later.
    pub(super) default_policy: Option<String>,
    /// `Date`: the agent's clock, in whole seconds.
    pub(super) date: Option<SystemTime>,
    /// `X-Consul-Results-Filtered-By-ACLs`, Consul 1.11 and later.
    pub(super) filtered_by_acls: bool,
    /// `X-Cache`: the agent keeps the answer up to date for all who ask.
    pub(super) from_cache: bool,
}

/// The default policy: the agent's decision about connections that no intention matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultPolicy {
    pub allow: bool,
    /// Where this is known from, for logs.
    pub source: String,
}

/// Which instances of a service to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instances {
    pub service: String,
    /// Another datacenter than our own.
    pub datacenter: Option<String>,
    pub namespace: Option<String>,
    pub partition: Option<String>,
    /// A peering that the service is imported from; Consul 1.13 and later.
    pub peer: Option<String>,
    /// An expression of Consul's filter language.
    pub filter: Option<String>,
}

/// Which discovery chain to compile, and with what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Chain {
    pub service: String,
    /// Compiled as though for this datacenter, by our own servers.
    pub datacenter: Option<String>,
    pub namespace: Option<String>,
    pub partition: Option<String>,
    pub overrides: api::ChainOverrides,
}

impl Request {
    pub(super) fn new(method: Method, path: &[&str]) -> Self {
        Self {
            method,
            path: path.iter().map(ToString::to_string).collect(),
            params: Vec::new(),
            body: None,
            needs: String::new(),
            stale: false,
            may_be_missing: false,
        }
    }

    pub(super) fn needs(mut self, rights: String) -> Self {
        self.needs = rights;
        self
    }

    pub(super) fn body(mut self, body: &impl serde::Serialize) -> Self {
        self.body = Some(serde_json::to_vec(body).unwrap_or_default().into());
        self
    }

    pub(super) fn param(mut self, name: &'static str, value: Option<&str>) -> Self {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            self.params.push((name, value.to_string()));
        }
        self
    }

    fn stale(mut self) -> Self {
        self.stale = true;
        self
    }
}

/// In words, as in `instances in dc2`.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instances(None) => f.write_str("instances"),
            Self::Instances(Some(datacenter)) => write!(f, "instances in {datacenter}"),
            Self::ConfigEntries => f.write_str("config entries"),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} /v1/{}", self.method, self.path.join("/"))?;
        for (number, (name, value)) in self.params.iter().enumerate() {
            write!(f, "{}{name}={value}", if number == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

impl<T> Query<T> {
    /// The same for two queries that ask the same.
    pub fn key(&self) -> String {
        match &self.request.body {
            Some(body) => format!("{} {}", self.request, String::from_utf8_lossy(body)),
            None => self.request.to_string(),
        }
    }
}

impl<T: DeserializeOwned> Query<T> {
    fn json(request: Request, flow: Flow) -> Self {
        let (priority, table) = (Priority::Upstream, None);
        Self { request, flow, priority, table, covered: |_| true, decode: |response| json(&response.body) }
    }

    fn identity(mut self) -> Self {
        self.priority = Priority::Identity;
        self
    }

    /// A config entry, or `None` where there is none of this name, or no such kind in the agent's version.
    fn entry(kind: &str, name: &str, needs: String) -> Query<Option<T>> {
        let mut request = get(&["config", kind, name]).needs(needs).stale();
        request.may_be_missing = true;
        let decode = |response: &Response| match response.status {
            StatusCode::OK => json(&response.body).map(Some),
            _ => Ok(None),
        };
        let (priority, table) = (Priority::Upstream, Some(Table::ConfigEntries));
        Query { request, flow: Flow::Table, priority, table, covered: |_| true, decode }
    }
}

impl Query<api::AgentService> {
    /// A registered service, by its id. Not found is an error.
    pub fn agent_service(id: &str) -> Self {
        let request = get(&["agent", "service", id]).needs(format!("service:read on the service of {id:?}"));
        Self::json(request, Flow::Hash).identity()
    }
}

impl Query<api::CaRoots> {
    pub fn ca_roots() -> Self {
        Self::json(get(&["agent", "connect", "ca", "roots"]), Flow::Index).identity()
    }
}

impl Query<api::Leaf> {
    /// Our certificate for a service, by its name.
    pub fn ca_leaf(service: &str) -> Self {
        let request = get(&["agent", "connect", "ca", "leaf", service]);
        Self::json(request.needs(format!("service:write on {service:?}")), Flow::Index).identity()
    }
}

impl Query<Vec<api::Intention>> {
    /// The intentions with this service as their destination, wildcards included, in order of precedence.
    pub fn intentions(service: &str) -> Self {
        let request = get(&["connect", "intentions", "match"])
            .param("by", Some("destination"))
            .param("name", Some(service))
            .needs(format!("intention:read on {service:?}"));
        let decode = |response: &Response| {
            let mut lists: BTreeMap<String, Option<Vec<api::Intention>>> = json(&response.body)?;
            match (lists.pop_first(), lists.is_empty()) {
                (Some((_, list)), true) => Ok(list.unwrap_or_default()),
                // An empty list means "nobody is denied by intention": an answer about another name, or
                // about none, must not pass for it.
                _ => Err("not exactly one list of intentions".into()),
            }
        };
        let (flow, priority) = (Flow::Intentions, Priority::Authorization);
        Self { request, flow, priority, table: None, covered: |_| true, decode }
    }
}

impl Query<api::CompiledDiscoveryChain> {
    pub fn discovery_chain(chain: &Chain) -> Self {
        let path = ["discovery-chain", &chain.service];
        let request = match chain.overrides.is_empty() {
            true => get(&path),
            false => Request::new(Method::POST, &path).body(&chain.overrides),
        };
        let request = request
            .param("compile-dc", chain.datacenter.as_deref())
            .param("ns", chain.namespace.as_deref())
            .param("partition", chain.partition.as_deref())
            .needs(format!("service:read on {:?}", chain.service))
            .stale();
        let decode = |response: &Response| {
            json::<api::DiscoveryChainResponse>(&response.body)?.chain.ok_or_else(|| "no chain in it".to_string())
        };
        let table = is_default_tenancy(&chain.namespace, &chain.partition).then_some(Table::ConfigEntries);
        let (flow, priority) = (Flow::Table, Priority::Upstream);
        Self { request, flow, priority, table, covered: is_of_default_tenancy, decode }
    }
}

impl Query<Vec<api::CheckServiceNode>> {
    /// The instances of a service that are in the mesh: sidecars, natives and terminating gateways.
    pub fn health_connect(instances: &Instances) -> Self {
        Self::health("connect", instances)
    }

    /// The ordinary instances of a service, such as mesh gateways by their name.
    pub fn health_service(instances: &Instances) -> Self {
        Self::health("service", instances)
    }

    fn health(what: &str, instances: &Instances) -> Self {
        let request = get(&["health", what, &instances.service])
            .param("dc", instances.datacenter.as_deref())
            .param("ns", instances.namespace.as_deref())
            .param("partition", instances.partition.as_deref())
            .param("peer", instances.peer.as_deref())
            .param("filter", instances.filter.as_deref())
            .needs(format!("service:read on {:?} and node:read", instances.service))
            .stale();
        let local = is_default_tenancy(&instances.namespace, &instances.partition) && instances.peer.is_none();
        let table = local.then(|| Table::Instances(instances.datacenter.clone()));
        Self { table, ..Self::json(request, Flow::Table) }
    }
}

impl Query<api::PreparedQueryResult> {
    /// Executes a prepared query for instances in the mesh.
    pub fn prepared_query(name: &str, datacenter: Option<&str>) -> Self {
        let request = get(&["query", name, "execute"])
            .param("connect", Some("true"))
            .param("dc", datacenter)
            .needs(format!("query:read on {name:?}, and service:read and node:read on what it finds"))
            .stale();
        Self::json(request, Flow::Poll(PREPARED_QUERY_PERIOD))
    }
}

impl Query<Option<api::MeshConfig>> {
    pub fn mesh_config() -> Self {
        Query::entry("mesh", "mesh", String::new())
    }
}

impl Query<Option<api::ProxyDefaults>> {
    pub fn proxy_defaults() -> Self {
        Query::entry("proxy-defaults", "global", String::new())
    }
}

impl Query<Option<api::JwtProvider>> {
    pub fn jwt_provider(name: &str) -> Self {
        Query::entry("jwt-provider", name, "mesh:read, or service:write on any service".into())
    }
}

impl Query<DefaultPolicy> {
    /// What becomes of a connection to `service` that no intention decides on.
    ///
    /// No endpoint tells, so the agent is asked to decide on a source that nobody made an intention for,
    /// and its reason says whether the default decided. The source is of a namespace that there is none of,
    /// so that in the community edition not even `*` matches it (Consul 1.8.7, 1.19.2 and 1.22). Newer agents
    /// send the ACL default policy as a header with every answer. Where an intention of the Enterprise edition
    /// for all namespaces decided, that header must do. Neither: deny.
    ///
    /// With ACLs off, 1.19.2 and 1.22 authorize by default even where `acl.default_policy` is "deny", while
    /// they configure Envoy to deny. So a header that denies goes before a default that ACLs configure. It
    /// does not go before `default_intention_policy` (1.18 and later), which was set for intentions alone.
    pub fn default_policy(service: &str) -> Self {
        let probe = serde_json::json!({
            "Target": service,
            "ClientCertURI": "spiffe://probe.consul/ns/lictor-default-policy-probe/dc/dc1/svc/lictor-default-policy-probe",
            "ClientCertSerial": "01",
        });
        let request = Request::new(Method::POST, &["agent", "connect", "authorize"]).body(&probe);
        Self {
            request: request.needs(format!("service:write on {service:?}")),
            flow: Flow::Poll(DEFAULT_POLICY_PERIOD),
            priority: Priority::Identity,
            table: None,
            covered: |_| true,
            decode: default_policy,
        }
    }
}

fn default_policy(response: &Response) -> Result<DefaultPolicy, String> {
    const BY_ACLS: [&str; 2] = ["Default behavior configured by ACLs", "ACLs disabled, access is allowed by default"];
    const BY_INTENTION_POLICY: &str = "Default intention policy";
    let api::Authorization { authorized, reason } = json(&response.body)?;
    let header = response.default_policy.as_deref();
    let by_acls = BY_ACLS.contains(&reason.as_str());
    if reason == BY_INTENTION_POLICY || by_acls && header != Some("deny") {
        return Ok(DefaultPolicy { allow: authorized, source: reason });
    }
    // Either no default decided, or the ACL default policy is "deny".
    Ok(match header {
        Some("allow") => DefaultPolicy { allow: true, source: "Default ACL policy".into() },
        Some("deny") => DefaultPolicy { allow: false, source: "Default ACL policy".into() },
        _ => DefaultPolicy { allow: false, source: "Default not known".into() },
    })
}

/// Whether nothing but the default namespace and partition is asked about. Table watches know no others.
fn is_default_tenancy(namespace: &Option<String>, partition: &Option<String>) -> bool {
    namespace.is_none() && partition.is_none()
}

/// Whether a chain leads nowhere but where its table watch looks.
fn is_of_default_tenancy(chain: &api::CompiledDiscoveryChain) -> bool {
    let default = |name: &String| name.is_empty() || name == "default";
    chain.targets.values().all(|target| default(&target.namespace) && default(&target.partition))
}

fn get(path: &[&str]) -> Request {
    Request::new(Method::GET, path)
}

pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}
