//! What each request and connection costs before a byte moves, small and large: `cargo bench`.
//! Arguments select as in tests (`cargo bench pick`).

use std::sync::Arc;
use std::time::Duration;

use divan::{Bencher, black_box};
use http::{HeaderMap, HeaderValue};
use lictor::jwt::Verified;
use lictor::proxy::balance::{Balancer, Report, Settings};
use lictor::snapshot::{
    Action, Address, Chain, Conditions, Decision, DefaultPolicy, Edits, Endpoint, Endpoints, Hits, Host, IDLE_TIMEOUT,
    Intention, Intentions, MAXIMUM_RING, MINIMUM_RING, Next, Node, Normalization, PathMatch, PathRule, Permission,
    Policy, Protocol, REQUEST_TIMEOUT, RequestView, Resolver, Route, RouteMatch, Text,
};
use lictor::tls::SpiffeId;

fn main() {
    divan::main();
}

const SIZES: [usize; 2] = [10, 5_000];

const POLICIES: [(&str, Policy); 6] = [
    ("unset", Policy::Unset),
    ("least_request", Policy::LeastRequest { choices: 2 }),
    ("round_robin", Policy::RoundRobin),
    ("random", Policy::Random),
    ("ring_hash", Policy::RingHash { minimum: MINIMUM_RING, maximum: MAXIMUM_RING }),
    ("maglev", Policy::Maglev),
];

fn balanced() -> impl Iterator<Item = (&'static str, usize)> {
    POLICIES.iter().flat_map(|(name, _)| SIZES.map(|size| (*name, size)))
}

fn policy(name: &str) -> Policy {
    POLICIES.iter().find(|(known, _)| *known == name).map(|(_, policy)| *policy).unwrap_or_default()
}

fn endpoints(count: usize, weights: u32) -> Arc<Endpoints> {
    let endpoint = |number: u32| Endpoint {
        address: Address { host: Host::Ip((0x0a00_0000 + number).to_be_bytes().into()), port: 21_000 },
        weight: 1 + number % weights,
    };
    let usable: Vec<Endpoint> = (0..u32::try_from(count).unwrap_or(u32::MAX)).map(endpoint).collect();
    Arc::new(Endpoints { registered: usable.len(), usable })
}

fn balancer(name: &str, count: usize, weights: u32) -> Arc<Balancer> {
    let settings = Settings { policy: policy(name), http: true, ..Settings::default() };
    Balancer::new(&endpoints(count, weights), settings, None)
}

/// Picks an instance and reports, as each request does.
fn request(balancer: &Arc<Balancer>, now: u64) {
    let picked = balancer.pick(now, Some(fastrand::u64(..)), &[], |below| fastrand::u64(..below));
    if let Some(picked) = picked {
        drop(picked.report(Report::Success, Duration::from_millis(1), now));
    }
}

#[divan::bench(args = balanced(), threads = [1, 2])]
fn pick_and_report(bencher: Bencher<'_, '_>, (name, count): (&str, usize)) {
    let balancer = balancer(name, count, 1);
    bencher.bench(|| request(black_box(&balancer), 7));
}

#[divan::bench(args = balanced())]
fn pick_and_report_by_weight(bencher: Bencher<'_, '_>, (name, count): (&str, usize)) {
    let balancer = balancer(name, count, 10);
    bencher.bench(|| request(black_box(&balancer), 7));
}

#[divan::bench(args = balanced())]
fn pick_with_half_put_aside(bencher: Bencher<'_, '_>, (name, count): (&str, usize)) {
    let balancer = balancer(name, count, 1);
    for _ in 0..count / 2 {
        if let Some(picked) = balancer.pick(0, None, &[], |below| fastrand::u64(..below)) {
            drop(picked.report(Report::Unreachable, Duration::ZERO, 0));
        }
    }
    bencher.bench(|| request(black_box(&balancer), 7));
}

/// What a change of a target's endpoints costs.
#[divan::bench(args = balanced())]
fn take_over_new_endpoints(bencher: Bencher<'_, '_>, (name, count): (&str, usize)) {
    let before = balancer(name, count, 1);
    let settings = Settings { policy: policy(name), ..Settings::default() };
    let more = endpoints(count + 1, 1);
    bencher.bench(|| Balancer::new(black_box(&more), settings, Some(&before)));
}

fn peer(service: &str) -> SpiffeId {
    let uri = format!("spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/{service}");
    SpiffeId::parse(&uri).expect("a SPIFFE id of a service")
}

fn intention(source: &str, permissions: Vec<Permission>) -> Intention {
    Intention {
        source_partition: "default".into(),
        source_namespace: "default".into(),
        source: source.into(),
        destination: "db".into(),
        action: permissions.is_empty().then_some(Action::Allow),
        permissions,
        token: None,
        precedence: 9,
        hits: Hits::default(),
    }
}

fn list(count: usize) -> Vec<Intention> {
    (0..count).map(|number| intention(&format!("service-{number}"), Vec::new())).collect()
}

fn intentions(list: Vec<Intention>) -> Intentions {
    Intentions::new(list, DefaultPolicy { action: Action::Deny, source: "default".into(), hits: Hits::default() })
}

const INTENTIONS: [usize; 2] = [10, 10_000];

#[divan::bench(args = INTENTIONS)]
fn decide(bencher: Bencher<'_, '_>, count: usize) {
    let intentions = intentions(list(count));
    let peer = peer(&format!("service-{}", count / 2));
    bencher.bench(|| matches!(intentions.decide(black_box(&peer)), Decision::Allow(_)));
}

/// What a change of the intentions costs.
#[divan::bench(args = INTENTIONS)]
fn take_over_new_intentions(bencher: Bencher<'_, '_>, count: usize) {
    bencher.with_inputs(|| list(count)).bench_values(intentions);
}

fn headers() -> HeaderMap {
    let names = ["host", "user-agent", "accept", "accept-encoding", "x-request-id", "x-forwarded-for"];
    names.into_iter().map(|name| (name.parse().expect("a name"), HeaderValue::from_static("a value"))).collect()
}

fn request_for<'a>(path: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    RequestView { method: "GET", path, path_as_written: false, query: Some("a=b&c=d"), authority: "db", headers }
}

#[divan::bench(args = [1, 10, 100])]
fn decide_request_by_the_last_permission(bencher: Bencher<'_, '_>, count: usize) {
    let permission = |number| {
        let path = Some(PathRule::prefix(&format!("/api/{number}/")));
        Permission {
            action: Action::Allow,
            conditions: Some(Conditions { path, ..Conditions::default() }),
            token: None,
        }
    };
    let intentions = intentions(vec![intention("web", (0..count).map(permission).collect())]);
    let (peer, headers, path) = (peer("web"), headers(), format!("/api/{}/things/7", count - 1));
    let request = request_for(&path, &headers);
    let verified = Verified::default();
    bencher.bench(|| {
        let decision = intentions.decide_request(black_box(&peer), black_box(&request), &verified);
        matches!(decision, Decision::Allow(_))
    });
}

#[divan::bench(args = [1, 10, 100])]
fn route_by_the_last_route(bencher: Bencher<'_, '_>, count: usize) {
    let resolver = Arc::new(Resolver::new(Vec::new()));
    let route = |number| {
        let path = PathMatch::Prefix(Text::new(&format!("/api/{number}/"), false));
        Route {
            name: "".into(),
            matches: RouteMatch { path, ..RouteMatch::default() },
            prefix_rewrite: None,
            request_timeout: Some(REQUEST_TIMEOUT),
            idle_timeout: Some(IDLE_TIMEOUT),
            sets_request_timeout: false,
            sets_idle_timeout: false,
            service: String::new(),
            retries: None,
            request_edits: Edits::default(),
            response_edits: Edits::default(),
            next: Next::Resolver(Arc::clone(&resolver)),
        }
    };
    let start = Node::Router((0..count).map(route).collect());
    let chain = Chain { service: "api".into(), protocol: Protocol::Http, start };
    let (headers, path) = (headers(), format!("/api/{}/things/7", count - 1));
    let request = request_for(&path, &headers);
    bencher.bench(|| chain.route(black_box(&request), 7).is_some());
}

#[divan::bench(args = ["/api/v1/things/7?q=a", "/api/%76%31//things/./x/../7%2fa?q=a"])]
fn normalise(bencher: Bencher<'_, '_>, path: &str) {
    let normalization = Normalization { merge_slashes: true, ..Normalization::default() };
    bencher.bench(|| normalization.path(black_box(path)).is_ok());
}
