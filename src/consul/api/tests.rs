//! Recorded answers of several versions decode.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::*;

fn decode<T: for<'de> Deserialize<'de>>(json: &str) -> T {
    serde_json::from_str(json).expect("a recorded answer decodes")
}

#[test]
fn reads_a_service_of_1_8() {
    let service: AgentService = decode(include_str!("../testdata/1.8-agent_service.json"));
    assert_eq!(service.id, "web-sidecar-proxy");
    assert_eq!(service.kind, "connect-proxy");
    assert_eq!(service.content_hash, "4479404b0c275d0c");
    let proxy = service.proxy.expect("a proxy");
    assert_eq!(proxy.local_service_port.get(), Some(8080));
    assert_eq!(proxy.config["local_connect_timeout_ms"], 1000);
    assert_eq!(proxy.upstreams[0].config["limits"]["max_connections"], 7);
    assert_eq!(proxy.upstreams[1].destination_type, "prepared_query");
    assert_eq!(proxy.expose.paths[0].local_path_port.get(), Some(8080));
}

#[test]
fn reads_a_service_of_1_19() {
    let service: AgentService = decode(include_str!("../testdata/1.19-agent_service.json"));
    let proxy = service.proxy.expect("a proxy");
    assert!(proxy.access_logs.expect("access logs").enabled);
    let cache = proxy.upstreams.iter().find(|upstream| upstream.destination_name == "cache").expect("cache");
    assert_eq!(cache.local_bind_socket_path, "/tmp/cache.sock");
    assert_eq!(cache.local_bind_port.get(), None);
}

#[test]
fn reads_health_rows_and_queries() {
    let rows: Vec<CheckServiceNode> = decode(include_str!("../testdata/1.8-health.json"));
    assert_eq!(rows[0].service.weights, Some(Weights { passing: 10, warning: 1 }));
    assert_eq!(rows[0].service.address, "10.0.0.5");
    assert_eq!(rows[0].node.tagged_addresses["lan"], "127.0.0.1");
    assert!(rows[0].checks.iter().any(|check| check.check_id == "serfHealth" && check.status == "passing"));
    let result: PreparedQueryResult = decode(include_str!("../testdata/1.8-query.json"));
    assert_eq!((result.service.as_str(), result.datacenter.as_str()), ("db", "dc1"));
}

#[test]
fn reads_roots_and_leaf() {
    let roots: CaRoots = decode(include_str!("../testdata/1.19-roots.json"));
    assert!(roots.trust_domain.ends_with(".consul"));
    assert!(roots.roots[0].active && roots.roots[0].intermediate_certs.is_empty());
    let leaf: Leaf = decode(r#"{"CertPEM":"a","PrivateKeyPEM":"sekret","ServiceURI":"spiffe://x/svc/web"}"#);
    assert_eq!(leaf.private_key_pem.expose(), "sekret");
    assert!(!format!("{leaf:?}").contains("sekret"));
}

#[test]
fn reads_intentions() {
    type Matched = BTreeMap<String, Option<Vec<Intention>>>;
    let old: Matched = decode(include_str!("../testdata/1.8-match.json"));
    assert_eq!(old["nope"], None);
    assert_eq!(old["db"].as_ref().expect("rows")[0].action, "allow");
    let new: Matched = decode(include_str!("../testdata/1.19-match.json"));
    let row = &new["db"].as_ref().expect("rows")[0];
    assert_eq!((row.action.as_str(), row.precedence), ("", 9));
    let permission = &row.permissions[0];
    assert_eq!(permission.unknown_field(), None);
    assert!(permission.http.as_ref().expect("http").header[0].invert);
    let claims = &permission.jwt.as_ref().expect("jwt").providers[0].verify_claims;
    assert_eq!((claims[0].path[0].as_str(), claims[0].value.as_str()), ("role", "admin"));
    assert_eq!(row.jwt.as_ref().expect("jwt").unknown_field(), None);
}

#[test]
fn notices_matchers_it_does_not_know() {
    for (json, unknown) in [
        (r#"{"Action":"allow","HTTP":{"PathExact":"/a"}}"#, None),
        (r#"{"Action":"allow","HTTP":{"PathGlob":"/a*"}}"#, Some("PathGlob")),
        (r#"{"Action":"allow","HTTP":{"PathGlob":"","New":null,"Old":[],"Map":{},"No":false,"Zero":0}}"#, None),
        (
            r#"{"Action":"allow","HTTP":{"Header":[{"Name":"x","Present":true},{"Name":"y","Range":[1]}]}}"#,
            Some("Range"),
        ),
        (r#"{"Action":"allow","GRPC":{"Service":"x"}}"#, Some("GRPC")),
        (r#"{"Action":"allow","JWT":{"Providers":[{"Name":"x","Scopes":["a"]}]}}"#, Some("Scopes")),
        (r#"{"Action":"allow","JWT":{"Providers":[{"VerifyClaims":[{"Regex":"a"}]}]}}"#, Some("Regex")),
    ] {
        let permission: IntentionPermission = decode(json);
        assert_eq!(permission.unknown_field(), unknown, "{json}");
    }
}

#[test]
fn reads_chains() {
    for json in [include_str!("../testdata/1.8-chain.json"), include_str!("../testdata/1.19-chain.json")] {
        let chain = decode::<DiscoveryChainResponse>(json).chain.expect("a chain");
        let start = &chain.nodes[&chain.start_node];
        assert_eq!(start.kind, "router");
        let destination = start.routes[0].definition.destination.as_ref().expect("a destination");
        assert_eq!(destination.request_timeout.positive(), Some(Duration::from_secs(15)));
        assert_eq!((destination.num_retries, &destination.retry_on_status_codes[..]), (3, &[503][..]));
        let http = start.routes[0].definition.matches.http.as_ref().expect("a match");
        assert!(http.header[0].present && http.header[0].invert);
        let splitter = &chain.nodes[&start.routes[1].next_node];
        assert_eq!(splitter.splits[0].weight, 90.5);
        let resolver = chain.nodes[&splitter.splits[0].next_node].resolver.as_ref().expect("a resolver");
        assert_eq!(resolver.connect_timeout.positive(), Some(Duration::from_millis(2500)));
        assert!(chain.targets[&resolver.target].subset.only_passing);
        assert_eq!(resolver.failover.as_ref().expect("failover").targets.len(), 1);
    }
}

#[test]
fn reads_what_only_newer_chains_have() {
    let chain = decode::<DiscoveryChainResponse>(include_str!("../testdata/1.19-chain.json")).chain.expect("a chain");
    let node = &chain.nodes["resolver:v1.db.default.default.dc1"];
    assert_eq!(node.resolver.as_ref().expect("a resolver").request_timeout.positive(), Some(Duration::from_secs(7)));
    let policies = &node.load_balancer.as_ref().expect("a load balancer").hash_policies;
    let cookie = policies[0].cookie_config.as_ref().expect("a cookie");
    assert_eq!(cookie.ttl.positive(), Some(Duration::from_secs(30)));
    assert!(policies[1].source_ip && policies[1].terminal);
}

#[test]
fn reads_config_entries() {
    let mesh: MeshConfig = decode(include_str!("../testdata/1.19-mesh.json"));
    assert_eq!(mesh.tls.expect("tls").incoming.expect("incoming").tls_min_version, "TLSv1_2");
    let defaults: ProxyDefaults = decode(include_str!("../testdata/1.19-proxy_defaults.json"));
    assert_eq!(defaults.config["protocol"], "http");
    let provider: JwtProvider = decode(include_str!("../testdata/1.19-jwt_provider.json"));
    let remote = provider.json_web_key_set.expect("keys").remote.expect("remote keys");
    assert_eq!(remote.cache_duration.positive(), Some(Duration::from_secs(300)));
    assert_eq!(provider.clock_skew_seconds, 30);
}

#[test]
fn takes_null_for_nothing_and_ignores_the_unknown() {
    let json = r#"{"ID":null,"Tags":null,"Meta":null,"Port":null,"Weights":null,"Connect":null,"New":{"a":[1]},
        "Proxy":{"Config":null,"Upstreams":null,"MeshGateway":null,"Expose":null,"TransparentProxy":null}}"#;
    let expected = AgentService { proxy: Some(Proxy::default()), ..AgentService::default() };
    assert_eq!(decode::<AgentService>(json), expected);
}

#[test]
fn a_number_that_is_no_port_is_no_port() {
    for (json, port) in [("0", None), ("65535", Some(65535)), ("65536", None), ("-1", None), ("1.5", None)] {
        assert_eq!(decode::<Port>(json).get(), port, "{json}");
    }
}

#[test]
fn reads_durations_as_go_does() {
    const SECOND: i64 = 1_000_000_000;
    for (json, nanoseconds) in [
        (r#""""#, Some(0)),
        (r#""0""#, Some(0)),
        (r#""3s""#, Some(3 * SECOND)),
        (r#""1m30s""#, Some(90 * SECOND)),
        (r#""1.5h""#, Some(5400 * SECOND)),
        (r#"".5s""#, Some(SECOND / 2)),
        (r#""5.s""#, Some(5 * SECOND)),
        (r#""250µs""#, Some(250_000)),
        (r#""-2s""#, Some(-2 * SECOND)),
        (r#""2562047h47m16.854775807s""#, Some(i64::MAX)),
        (r#""-2562047h47m16.854775808s""#, Some(i64::MIN)),
        (r#""2562047h47m16.854775808s""#, None),
        (r#""9999999999999999999h""#, None),
        (r#""9223372036854775807h9223372036854775807h""#, None),
        (r#""3""#, None),
        (r#""s""#, None),
        (r#"".s""#, None),
        (r#""-""#, None),
        (r#""3 s""#, None),
        (r#""3d""#, None),
        (r#""1sé""#, None),
        ("7000000000", Some(7 * SECOND)),
        ("9223372036854775808", None),
        ("1.5e9", Some(1_500_000_000)),
        ("1e300", None),
        ("true", None),
    ] {
        let duration = serde_json::from_str::<GoDuration>(json).ok().map(GoDuration::nanoseconds);
        assert_eq!(duration, nanoseconds, "{json}");
    }
}

#[test]
fn overrides_are_sent_only_when_set() {
    let text = |overrides: &ChainOverrides| serde_json::to_string(overrides).expect("plain JSON");
    assert_eq!(text(&ChainOverrides::default()), "{}");
    let all = ChainOverrides {
        protocol: Some("http".into()),
        mesh_gateway_mode: Some("local".into()),
        connect_timeout: Some(Duration::from_millis(2500)),
    };
    assert_eq!(
        text(&all),
        r#"{"OverrideConnectTimeout":"2500ms","OverrideMeshGateway":{"Mode":"local"},"OverrideProtocol":"http"}"#
    );
}
