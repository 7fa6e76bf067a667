//! Compiled discovery chains: checked once, so that walking one always ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::definition::CONNECT_TIMEOUT;
use super::{Bad, Notes, or_default, route, tenancy};
use crate::consul::api;
use crate::control::query::{EndpointsQuery, PreparedQuery, Query};
use crate::snapshot::{
    Chain, Leg, LoadBalancer, Next, Node, Protocol, REQUEST_TIMEOUT, Resolver, Route, Splitter, Target,
};

/// A chain but for the credentials and the endpoints of its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct ChainPlan {
    service: String,
    pub(in crate::control) protocol: Protocol,
    /// Its resolvers are places in `resolvers`.
    start: Node<usize>,
    resolvers: Vec<ResolverPlan>,
    /// Those that a walk can reach.
    pub(in crate::control) targets: Vec<TargetPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ResolverPlan {
    /// Places in the plan's `targets`: the one that is meant, then those to fail over to.
    targets: Vec<usize>,
    load_balancer: LoadBalancer,
    request_timeout: Option<Duration>,
    is_configured: bool,
    sets_request_timeout: bool,
}

/// The part of a target that is known from the chain alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct TargetPlan {
    pub(in crate::control) id: String,
    pub(in crate::control) service: String,
    pub(in crate::control) partition: String,
    pub(in crate::control) datacenter: String,
    /// Of the chain.
    pub(in crate::control) customization_hash: String,
    pub(in crate::control) sni: Sni,
    /// Whom its instances may be.
    pub(in crate::control) identities: Vec<Identity>,
    pub(in crate::control) connect_timeout: Duration,
    pub(in crate::control) only_passing: bool,
    /// Empty, `none`, `local` or `remote`; it means something for other datacenters and partitions alone.
    pub(in crate::control) gateway_mode: String,
    /// The query of its instances; `None` for a target that cannot be reached at all.
    pub(in crate::control) instances: Option<Query>,
}

/// The server name to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Sni {
    Given(String),
    /// Chains do not know prepared queries, so that their names have to be put together.
    Query(PreparedQuery),
}

/// The part of a prepared query's answer besides its instances.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::control) struct Prepared {
    pub(in crate::control) identities: Vec<Identity>,
    /// Where the rows come from; empty before the first answer.
    pub(in crate::control) datacenter: String,
}

/// A service within our trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control) struct Identity {
    pub(in crate::control) partition: String,
    pub(in crate::control) namespace: String,
    pub(in crate::control) datacenter: String,
    pub(in crate::control) service: String,
}

impl ChainPlan {
    /// The one target of a prepared query, in the place of a chain.
    pub(in crate::control) fn of_query(
        query: &PreparedQuery,
        prepared: &Prepared,
        protocol: Protocol,
        connect_timeout: Duration,
    ) -> Self {
        let target = TargetPlan {
            id: query.name.clone(),
            service: query.name.clone(),
            partition: "default".to_owned(),
            datacenter: prepared.datacenter.clone(),
            customization_hash: String::new(),
            sni: Sni::Query(query.clone()),
            identities: prepared.identities.clone(),
            connect_timeout,
            only_passing: false,
            gateway_mode: String::new(),
            instances: Some(Query::PreparedQuery(query.clone())),
        };
        let resolver = ResolverPlan {
            targets: vec![0],
            load_balancer: LoadBalancer::default(),
            request_timeout: Some(REQUEST_TIMEOUT),
            is_configured: false,
            sets_request_timeout: false,
        };
        Self {
            service: query.name.clone(),
            protocol,
            start: Node::Resolver(0),
            resolvers: vec![resolver],
            targets: vec![target],
        }
    }

    /// The chain, with a target for each of the plan's, in their order.
    pub(in crate::control) fn build(&self, targets: &[Arc<Target>]) -> Chain {
        let pick = |index: &usize| targets.get(*index).map(Arc::clone);
        let resolver = |plan: &ResolverPlan| {
            Arc::new(Resolver {
                targets: plan.targets.iter().filter_map(pick).collect(),
                load_balancer: plan.load_balancer.clone(),
                request_timeout: plan.request_timeout,
                is_configured: plan.is_configured,
                sets_request_timeout: plan.sets_request_timeout,
            })
        };
        let resolvers: Vec<Arc<Resolver>> = self.resolvers.iter().map(resolver).collect();
        let start = self.start.map(&|place: &usize| Arc::clone(&resolvers[*place]));
        Chain { service: self.service.clone(), protocol: self.protocol, start }
    }
}

/// Reads a chain.
///
/// # Errors
/// When it names a node or target that it does not hold, or has a node of a kind that is not known.
pub(in crate::control) fn plan(
    wire: &api::CompiledDiscoveryChain,
    enterprise: bool,
    notes: &mut Notes,
) -> Result<ChainPlan, Bad> {
    let mut walk = Walk {
        wire,
        enterprise,
        notes,
        resolvers: Vec::new(),
        resolver_places: BTreeMap::new(),
        targets: Vec::new(),
        places: BTreeMap::new(),
    };
    let start = walk.start()?;
    let (resolvers, targets) = (walk.resolvers, walk.targets);
    let protocol = Protocol::parse(&wire.protocol);
    if !protocol.is_http() && !matches!(start, Node::Resolver(_)) {
        return Err(Bad(format!("it routes requests, but its protocol is {:?}", wire.protocol)));
    }
    Ok(ChainPlan { service: wire.service_name.clone(), protocol, start, resolvers, targets })
}

/// Deepest nesting of splitters. Consul's compiler flattens them.
const MAX_SPLITTER_DEPTH: u32 = 3;

/// Legs of one splitter at most, nested ones included.
const MAX_LEGS: usize = 1000;

/// Visits what is reachable and numbers the resolvers and targets as they come.
struct Walk<'a> {
    wire: &'a api::CompiledDiscoveryChain,
    enterprise: bool,
    notes: &'a mut Notes,
    resolvers: Vec<ResolverPlan>,
    resolver_places: BTreeMap<&'a str, usize>,
    targets: Vec<TargetPlan>,
    places: BTreeMap<&'a str, usize>,
}

/// A leg of a splitter, and how many splitters lead to it. Its weight is in hundredths to the power of that.
struct FoundLeg {
    leg: Leg<usize>,
    depth: u32,
}

impl<'a> Walk<'a> {
    fn start(&mut self) -> Result<Node<usize>, Bad> {
        let node = self.node(&self.wire.start_node)?;
        match node.kind.as_str() {
            "router" => self.router(node).map(Node::Router),
            _ => Ok(match self.next(&self.wire.start_node)? {
                Next::Splitter(splitter) => Node::Splitter(splitter),
                Next::Resolver(resolver) => Node::Resolver(resolver),
            }),
        }
    }

    fn node(&self, key: &str) -> Result<&'a api::ChainNode, Bad> {
        self.wire.nodes.get(key).ok_or_else(|| Bad(format!("it has no node {key:?}, to which it leads")))
    }

    fn router(&mut self, node: &'a api::ChainNode) -> Result<Vec<Route<usize>>, Bad> {
        let mut routes = Vec::with_capacity(node.routes.len());
        for (number, wire) in (1..).zip(&node.routes) {
            let next = self.next(&wire.next_node)?;
            let name = format!("{number} of {}", node.name);
            routes.push(route::route(&wire.definition, name, next, self.notes)?);
        }
        if routes.is_empty() {
            return Err(Bad(format!("its router {:?} has no routes", node.name)));
        }
        Ok(routes)
    }

    /// What a route can lead to, as a chain can start with it.
    fn next(&mut self, key: &'a str) -> Result<Next<usize>, Bad> {
        let node = self.node(key)?;
        match node.kind.as_str() {
            "splitter" => self.splitter(node).map(Next::Splitter),
            "resolver" => self.resolver(key, node).map(Next::Resolver),
            kind => Err(Bad(format!("its node {key:?} is of the kind {kind:?}, which is not known there"))),
        }
    }

    fn splitter(&mut self, node: &'a api::ChainNode) -> Result<Splitter<usize>, Bad> {
        let mut found = Vec::new();
        self.legs(node, &Leg { weight: 1, ..Leg::default() }, 1, &mut found)?;
        let depth = found.iter().map(|found| found.depth).max().unwrap_or_default();
        let scaled = |FoundLeg { leg, depth: own }| Leg { weight: leg.weight * 10_000_u64.pow(depth - own), ..leg };
        let legs = found.into_iter().map(scaled).collect();
        let hash_policies = route::load_balancer(node.load_balancer.as_ref(), self.notes)?.hash_policies;
        let service = service_of(&node.name, &self.wire.partition).to_owned();
        Splitter::new(service, legs, hash_policies)
            .ok_or_else(|| Bad(format!("its splitter {:?} has no weights", node.name)))
    }

    /// Finds the legs of a splitter that is itself behind the leg `outer`.
    fn legs(
        &mut self,
        node: &'a api::ChainNode,
        outer: &Leg<usize>,
        depth: u32,
        found: &mut Vec<FoundLeg>,
    ) -> Result<(), Bad> {
        if depth > MAX_SPLITTER_DEPTH || found.len() + node.splits.len() > MAX_LEGS {
            return Err(Bad(format!("its splitter {:?} is too deep or has too many legs", node.name)));
        }
        for wire in &node.splits {
            let next = self.node(&wire.next_node)?;
            let mut leg = within(outer, wire, self.notes)?;
            if let Some(definition) = &wire.definition {
                let own = service_of(&node.name, &self.wire.partition);
                leg.service = if definition.service.is_empty() { own } else { &definition.service }.to_owned();
            }
            match next.kind.as_str() {
                "splitter" => self.legs(next, &leg, depth + 1, found)?,
                "resolver" => {
                    leg.resolver = self.resolver(&wire.next_node, next)?;
                    found.push(FoundLeg { leg, depth });
                }
                kind => return Err(Bad(format!("its splitter {:?} leads to a node of the kind {kind:?}", node.name))),
            }
        }
        Ok(())
    }

    fn resolver(&mut self, key: &'a str, node: &'a api::ChainNode) -> Result<usize, Bad> {
        if let Some(place) = self.resolver_places.get(key) {
            return Ok(*place);
        }
        let resolver = node.resolver.as_ref().ok_or_else(|| Bad(format!("its resolver {key:?} is empty")))?;
        let failover = resolver.failover.iter().flat_map(|failover| &failover.targets);
        let ids = std::iter::once(&resolver.target).chain(failover);
        let plan = ResolverPlan {
            targets: ids.map(|id| self.target(id, resolver)).collect::<Result<_, _>>()?,
            load_balancer: route::load_balancer(node.load_balancer.as_ref(), self.notes)?,
            request_timeout: route::timeout(resolver.request_timeout, REQUEST_TIMEOUT),
            is_configured: !resolver.is_default,
            sets_request_timeout: resolver.request_timeout.nanoseconds() != 0,
        };
        let place = self.resolvers.len();
        self.resolvers.push(plan);
        self.resolver_places.insert(key, place);
        Ok(place)
    }

    fn target(&mut self, id: &'a str, resolver: &api::ChainResolver) -> Result<usize, Bad> {
        if let Some(place) = self.places.get(id) {
            return Ok(*place);
        }
        let wire = self.wire.targets.get(id).ok_or_else(|| Bad(format!("it has no target {id:?}")))?;
        let target = self.target_plan(id, wire, resolver)?;
        let place = self.targets.len();
        self.targets.push(target);
        self.places.insert(id, place);
        Ok(place)
    }

    fn target_plan(
        &mut self,
        id: &str,
        wire: &api::ChainTarget,
        resolver: &api::ChainResolver,
    ) -> Result<TargetPlan, Bad> {
        // A target of a peer has no datacenter.
        let missing = [("service", wire.service.is_empty()), ("SNI", wire.sni.is_empty())]
            .into_iter()
            .chain([("datacenter", wire.datacenter.is_empty() && wire.peer.is_empty())])
            .find(|(_, missing)| *missing);
        if let Some((what, _)) = missing {
            return Err(Bad(format!("its target {id:?} has no {what}")));
        }
        if !wire.peer.is_empty() {
            self.notes.push(format!(
                "target {} of peer {}: not supported, as the agent's HTTP API does not offer a peer's roots",
                wire.service, wire.peer
            ));
        }
        Ok(TargetPlan {
            id: id.to_owned(),
            service: wire.service.clone(),
            partition: or_default(&wire.partition),
            datacenter: wire.datacenter.clone(),
            customization_hash: self.wire.customization_hash.clone(),
            sni: Sni::Given(wire.sni.clone()),
            identities: vec![Identity {
                partition: or_default(&wire.partition),
                namespace: or_default(&wire.namespace),
                datacenter: wire.datacenter.clone(),
                service: wire.service.clone(),
            }],
            connect_timeout: wire
                .connect_timeout
                .positive()
                .or_else(|| resolver.connect_timeout.positive())
                .unwrap_or(CONNECT_TIMEOUT),
            only_passing: wire.subset.only_passing,
            // A service outside the mesh is never reached through a gateway.
            gateway_mode: if wire.external { String::new() } else { wire.mesh_gateway.mode.clone() },
            instances: wire.peer.is_empty().then(|| {
                Query::Endpoints(EndpointsQuery {
                    service: wire.service.clone(),
                    datacenter: Some(wire.datacenter.clone()),
                    namespace: tenancy(&wire.namespace, self.enterprise),
                    partition: tenancy(&wire.partition, self.enterprise),
                    peer: None,
                    filter: Some(wire.subset.filter.clone()).filter(|filter| !filter.is_empty()),
                })
            }),
        })
    }
}

/// The service that a router or splitter is named after: its namespace follows, and since Consul 1.11 its partition, which
/// chains then have as well.
fn service_of<'a>(node: &'a str, partition: &str) -> &'a str {
    let without_last = |name: &'a str| name.rsplit_once('.').map_or(name, |(rest, _)| rest);
    if partition.is_empty() { without_last(node) } else { without_last(without_last(node)) }
}

/// A leg of a nested splitter: a part of the outer leg's share, with its edits inside the outer ones.
fn within(outer: &Leg<usize>, wire: &api::ChainSplit, notes: &mut Notes) -> Result<Leg<usize>, Bad> {
    let definition = wire.definition.as_ref();
    let request = route::edits(definition.and_then(|definition| definition.request_headers.as_ref()), notes)?;
    let response = route::edits(definition.and_then(|definition| definition.response_headers.as_ref()), notes)?;
    // A percentage is at most 10000 hundredths, which also keeps the product of all depths within bounds.
    let hundredths = (wire.weight * 100.0).round().clamp(0.0, 10_000.0);
    Ok(Leg {
        weight: outer.weight * hundredths as u64,
        request_edits: outer.request_edits.clone().then(&request),
        response_edits: response.then(&outer.response_edits),
        service: String::new(),
        resolver: outer.resolver,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::snapshot::{
        CookieAttributes, CookieSource, HashPolicy, HashSource, Policy, RetryOn, RetryPolicy, Routed,
    };
    use crate::snapshot::{Edits, RequestView};

    fn read(wire: Value) -> (Result<ChainPlan, Bad>, usize) {
        let mut notes = Notes::default();
        let wire: api::CompiledDiscoveryChain = serde_json::from_value(wire).unwrap();
        (plan(&wire, false, &mut notes), notes.take().len())
    }

    fn resolver(target: &str) -> Value {
        json!({"Type": "resolver", "Name": target, "Resolver": {"ConnectTimeout": "5s", "Target": target}})
    }

    fn split(legs: Value) -> Value {
        json!({"Type": "splitter", "Name": "s", "Splits": legs})
    }

    /// A chain of the targets `a`, `b` and `c`, each with a resolver of its name, and these nodes besides.
    fn chain(start: &str, nodes: Value) -> Value {
        let mut nodes = nodes;
        let mut targets = json!({});
        for name in ["a", "b", "c"] {
            targets[name] = json!({"ID": name, "Service": name, "Datacenter": "dc1", "SNI": format!("{name}.sni")});
            if nodes.get(name).is_none() {
                nodes[name] = resolver(name);
            }
        }
        json!({"Protocol": "http", "StartNode": start, "Nodes": nodes, "Targets": targets})
    }

    fn good(wire: Value) -> ChainPlan {
        let (plan, notes) = read(wire);
        assert_eq!(notes, 0);
        plan.unwrap()
    }

    /// Index of the resolver's first target, by weight.
    fn weights(plan: &ChainPlan) -> Vec<(String, u64)> {
        let Node::Splitter(splitter) = &plan.start else { panic!("no splitter: {:?}", plan.start) };
        let name = |leg: &Leg<usize>| plan.targets[plan.resolvers[leg.resolver].targets[0]].id.clone();
        splitter.legs().iter().map(|leg| (name(leg), leg.weight)).collect()
    }

    #[test]
    fn a_router_is_read_with_all_that_its_routes_say() {
        let destination = json!({
            "PrefixRewrite": "v2/", "RequestTimeout": "3s", "IdleTimeout": "-1s", "NumRetries": 4,
            "RetryOnConnectFailure": true, "RetryOnStatusCodes": [502], "RetryOn": ["reset", "new-condition"],
            "RequestHeaders": {"Set": {"x-a": "1"}, "Remove": ["x-b"]}, "ResponseHeaders": {"Add": {"x-c": "2"}},
        });
        let matches = json!({"HTTP": {
            "PathPrefix": "/V1/", "CaseInsensitive": true, "Methods": ["GET"],
            "Header": [{"Name": "x-h", "Exact": "1"}, {"Name": "skipped"}], "QueryParam": [{"Name": "q", "Present": true}],
        }});
        let nodes = json!({"r": {"Type": "router", "Name": "db", "Routes": [
            {"Definition": {"Match": matches, "Destination": destination}, "NextNode": "a"},
            {"Definition": {"Match": {"HTTP": {"PathPrefix": "/"}}}, "NextNode": "b"},
        ]}});
        let (plan, notes) = read(chain("r", nodes));
        let plan = plan.unwrap();
        assert_eq!(notes, 1);
        let Node::Router(routes) = &plan.start else { panic!("no router") };
        assert_eq!(&*routes[0].name, "1 of db");
        assert_eq!(routes[0].prefix_rewrite.as_deref(), Some("/v2/"));
        assert_eq!((routes[0].request_timeout, routes[0].idle_timeout), (Some(Duration::from_secs(3)), None));
        let conditions = vec![RetryOn::Reset, RetryOn::ConnectFailure];
        assert_eq!(routes[0].retries, RetryPolicy::new(4, conditions, vec![502]));
        assert_eq!(routes[0].request_edits, Edits::new(["x-b"], [], [("x-a", "1")]).unwrap());
        assert_eq!(routes[0].response_edits, Edits::new([], [("x-c", "2")], []).unwrap());
        let idle = Some(Duration::from_secs(300));
        assert_eq!((routes[1].request_timeout, routes[1].idle_timeout), (Some(REQUEST_TIMEOUT), idle));
        assert_eq!(routes[1].retries, None);
        let chain = plan.build(&[]);
        let mut headers = http::HeaderMap::new();
        headers.insert("x-h", http::HeaderValue::from_static("1"));
        let request = RequestView {
            method: "GET",
            path: "/v1/x",
            path_as_written: false,
            query: Some("q"),
            authority: "db",
            headers: &headers,
        };
        let taken =
            |request| chain.route(&request, 0).map(|Routed { route, path, .. }| (route.unwrap().name.clone(), path));
        assert_eq!(taken(request), Some(("1 of db".into(), Some("/v2/x?q".to_owned()))));
        assert_eq!(taken(RequestView { query: None, ..request }), Some(("2 of db".into(), None)));
    }

    #[test]
    fn weights_are_read_to_two_digits_and_nested_splitters_flattened() {
        let flat = split(json!([{"Weight": 99.99, "NextNode": "a"}, {"Weight": 0.01, "NextNode": "b"}]));
        let plan = good(chain("s", json!({"s": flat})));
        assert_eq!(weights(&plan), [("a".to_owned(), 9999), ("b".to_owned(), 1)]);
        let inner = split(json!([{"Weight": 25, "NextNode": "b"}, {"Weight": 75, "NextNode": "c"}]));
        let outer = split(json!([{"Weight": 60, "NextNode": "a"}, {"Weight": 40, "NextNode": "i"}]));
        let plan = good(chain("s", json!({"s": outer, "i": inner})));
        let expected = [("a", 60_000_000), ("b", 10_000_000), ("c", 30_000_000)];
        assert_eq!(weights(&plan), expected.map(|(name, weight)| (name.to_owned(), weight)));
    }

    #[test]
    fn edits_of_an_inner_leg_stay_inside_those_of_the_outer() {
        let definition = |value: &str| {
            let add = json!({"Add": {"x-by": value}});
            json!({"RequestHeaders": add, "ResponseHeaders": add})
        };
        let inner = split(json!([{"Weight": 100, "NextNode": "a", "Definition": definition("inner")}]));
        let outer = split(json!([{"Weight": 100, "NextNode": "i", "Definition": definition("outer")}]));
        let plan = good(chain("s", json!({"s": outer, "i": inner})));
        let Node::Splitter(splitter) = &plan.start else { panic!("no splitter") };
        let add = |value| Edits::new([], [("x-by", value)], []).unwrap();
        assert_eq!(splitter.legs()[0].request_edits, add("outer").then(&add("inner")));
        assert_eq!(splitter.legs()[0].response_edits, add("inner").then(&add("outer")));
    }

    #[test]
    fn a_load_balancer_is_read_with_its_defaults() {
        let check = |wire: Value, policy| {
            let mut node = resolver("a");
            node["LoadBalancer"] = wire;
            let plan = good(chain("a", json!({"a": node})));
            assert_eq!(plan.resolvers[0].load_balancer.policy, policy);
            plan.resolvers[0].load_balancer.hash_policies.clone()
        };
        check(json!({}), Policy::Unset);
        check(json!({"Policy": "random"}), Policy::Random);
        check(json!({"Policy": "round_robin"}), Policy::RoundRobin);
        check(json!({"Policy": "least_request"}), Policy::LeastRequest { choices: 2 });
        check(
            json!({"Policy": "least_request", "LeastRequestConfig": {"ChoiceCount": 5}}),
            Policy::LeastRequest { choices: 5 },
        );
        check(json!({"Policy": "ring_hash"}), Policy::RingHash { minimum: 1024, maximum: 8 << 20 });
        let ring = json!({"MinimumRingSize": 10, "MaximumRingSize": 20});
        check(json!({"Policy": "ring_hash", "RingHashConfig": ring}), Policy::RingHash { minimum: 10, maximum: 20 });
        let policies = json!([
            {"Field": "header", "FieldValue": "X-User", "Terminal": true},
            {"Field": "cookie", "FieldValue": "sid", "CookieConfig": {"TTL": 60_000_000_000_i64, "Path": "/x"}},
            {"Field": "cookie", "FieldValue": "sid", "CookieConfig": {"Session": true}},
            {"Field": "cookie", "FieldValue": "sid", "CookieConfig": {"Path": "/"}},
            {"Field": "query_parameter", "FieldValue": "q"},
            {"SourceIP": true},
        ]);
        let cookie = |generate| HashSource::Cookie(CookieSource { name: "sid".to_owned(), generate });
        let lasting = CookieAttributes { max_age: Some(Duration::from_secs(60)), path: Some("/x".to_owned()) };
        let mut expected = vec![
            HashSource::Header(http::HeaderName::from_static("x-user")),
            cookie(Some(lasting)),
            cookie(Some(CookieAttributes::default())),
            cookie(None),
            HashSource::Query("q".to_owned()),
            HashSource::SourceIp,
        ]
        .into_iter()
        .map(|source| HashPolicy { source, terminal: false })
        .collect::<Vec<_>>();
        expected[0].terminal = true;
        assert_eq!(check(json!({"Policy": "maglev", "HashPolicies": policies}), Policy::Maglev), expected);
    }

    #[test]
    fn a_resolvers_request_timeout_may_be_unset_and_none() {
        for (wire, expected) in [
            (json!(0), Some(REQUEST_TIMEOUT)),
            (json!(2_000_000_000_i64), Some(Duration::from_secs(2))),
            (json!("2s"), Some(Duration::from_secs(2))),
            (json!(-1), None),
        ] {
            let mut node = resolver("a");
            node["Resolver"]["RequestTimeout"] = wire;
            assert_eq!(good(chain("a", json!({"a": node}))).resolvers[0].request_timeout, expected);
        }
    }

    #[test]
    fn nodes_that_share_a_resolver_share_it_in_the_plan() {
        let nodes = json!({"r": {"Type": "router", "Name": "db", "Routes": [{"NextNode": "a"}, {"NextNode": "a"}]}});
        let plan = good(chain("r", nodes));
        assert_eq!((plan.resolvers.len(), plan.targets.len()), (1, 1));
    }

    #[test]
    fn a_chain_that_can_not_be_walked_is_refused() {
        let router = |definition: Value, next: &str| json!({"r": {"Type": "router", "Name": "db", "Routes": [{"Definition": definition, "NextNode": next}]}});
        let on = |http: Value| router(json!({"Match": {"HTTP": http}}), "a");
        let splitter = |next: &str| json!({"s": split(json!([{"Weight": 100, "NextNode": next}]))});
        let edit = json!({"Destination": {"RequestHeaders": {"Set": {"content-length": "1"}}}});
        let mut tcp = chain("s", splitter("a"));
        tcp["Protocol"] = "tcp".into();
        let mut looped = splitter("s");
        looped["r"] = json!({"Type": "router", "Name": "db", "Routes": [{"NextNode": "s"}]});
        for wire in [
            chain("nowhere", json!({})),
            chain("r", router(json!({}), "nowhere")),
            chain("r", router(json!({}), "r")),
            chain("r", json!({"r": {"Type": "router", "Name": "db"}})),
            chain("r", on(json!({"PathRegex": "("}))),
            chain("r", on(json!({"Header": [{"Name": "a", "Regex": "["}]}))),
            chain("r", on(json!({"Header": [{"Name": "a b", "Exact": "x"}]}))),
            chain("r", router(edit, "a")),
            chain("r", looped),
            chain("s", splitter("s")),
            chain("s", splitter("nowhere")),
            chain("s", json!({"s": split(json!([]))})),
            chain("s", json!({"s": split(json!([{"Weight": 0, "NextNode": "a"}]))})),
            chain("x", json!({"x": {"Type": "teleporter"}})),
            chain("x", json!({"x": {"Type": "resolver"}})),
            chain("x", json!({"x": resolver("nowhere")})),
            tcp,
        ] {
            assert!(read(wire.clone()).0.is_err(), "{wire}");
        }
    }
}
