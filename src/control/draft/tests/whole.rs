//! What the whole draft publishes.

use super::*;

#[test]
fn the_first_snapshot_comes_when_it_is_whole_and_upstreams_are_not_waited_for() {
    let ca = Ca::new();
    let mut stage = Stage::new();
    stage.apply(Update::Failed(Query::Roots)).unwrap();
    stage.wants(&["registration of web-sidecar-proxy", "mesh config entry", "CA roots"]);
    stage.mesh(None);
    stage.service(registration(&[("db", 9191)]));
    stage.wants(&with_public(&["discovery chain of db"]));
    stage.publishes_nothing();
    stage.roots(&[&ca]).unwrap();
    stage.publishes_nothing();
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.publishes_nothing();
    stage.intentions(Value::Array(vec![]));
    stage.publishes_nothing();
    stage.default_policy(Action::Deny);
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    let first = stage.publishes();
    assert_eq!((first.version, first.outbound.len()), (1, 1));
    assert!(awaited(&first, "db").is_some() && targets(&first, "db").is_empty());
    let public = published(&first);
    assert_eq!(public.bind, Bind::Tcp("0.0.0.0:21000".parse().unwrap()));
    assert_eq!(public.service.name, "web");
    stage.publishes_nothing();

    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1"]));
    stage.publishes_nothing();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    assert_eq!(stage.draft.urgency(), Some(Urgency::Soon));
    let second = stage.publishes();
    assert_eq!(second.version, 2);
    assert!(Arc::ptr_eq(public, published(&second)));
    assert_eq!(addresses(&targets(&second, "db")[0]), ["10.0.0.5:21001"]);
    assert_eq!(targets(&second, "db")[0].connect_timeout, Duration::from_secs(7));
}

#[test]
fn nothing_is_published_before_the_mesh_entry_is_known_and_its_changes_are() {
    let ca = Ca::new();
    let mut stage = Stage::new();
    stage.service(registration(&[("db", 9191)]));
    stage.roots(&[&ca]).unwrap();
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.intentions(json!([]));
    stage.default_policy(Action::Deny);
    stage.publishes_nothing();
    stage.apply(Update::Failed(Query::Mesh)).unwrap();
    stage.publishes_nothing();
    stage.mesh(None);
    let first = stage.publishes();
    let public = published(&first);
    assert!(public.service.normalization.path && !public.service.sanitize_forwarded_cert);
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    let before = stage.publishes();

    // What is about requests leaves TLS alone, and tickets with it.
    stage.mesh(Some(json!({"HTTP": {"SanitizeXForwardedClientCert": true,
        "Incoming": {"RequestNormalization": {"MergeSlashes": true}}}})));
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    let now = stage.publishes();
    let public = published(&now);
    assert!(public.service.normalization.merge_slashes && public.service.sanitize_forwarded_cert);
    assert!(Arc::ptr_eq(&public.service.tls, &published(&before).service.tls));
    assert!(Arc::ptr_eq(&targets(&now, "db")[0], &targets(&before, "db")[0]));

    let tls = json!({"Incoming": {"TLSMinVersion": "TLSv1_3"}, "Outgoing": {"TLSMaxVersion": "TLSv1_2"}});
    stage.mesh(Some(json!({ "TLS": tls })));
    let strict = stage.publishes();
    assert!(!Arc::ptr_eq(&published(&strict).service.tls, &public.service.tls));
    assert!(!Arc::ptr_eq(targets(&strict, "db")[0].tls(), targets(&now, "db")[0].tls()));
    stage.mesh(Some(json!({ "TLS": tls })));
    stage.publishes_nothing();
    // A rotation keeps to it.
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.publishes();
    stage.mesh(None);
    stage.publishes();
}

#[test]
fn exposed_paths_and_access_logs_come_with_the_registration() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let mut service = registration(&[]);
    let path = |port: u16, path: &str| json!({"ListenerPort": port, "Path": path, "LocalPathPort": 8080});
    service["Proxy"]["Expose"] = json!({"Paths": [path(21500, "/health"), path(21501, "/metrics")]});
    service["Proxy"]["AccessLogs"] = json!({"Enabled": true});
    stage.service(service.clone());
    let first = stage.publishes();
    assert_eq!((first.exposed.len(), first.access_log.is_some()), (2, true));
    service["Proxy"]["Expose"]["Paths"][1]["Path"] = "/stats".into();
    stage.service(service.clone());
    let second = stage.publishes();
    let kept = |bind: &str| {
        let bind = Bind::Tcp(bind.parse().unwrap());
        Arc::ptr_eq(&first.exposed[&bind], &second.exposed[&bind])
    };
    assert_eq!((kept("0.0.0.0:21500"), kept("0.0.0.0:21501")), (true, false));
    assert!(Arc::ptr_eq(first.access_log.as_ref().unwrap(), second.access_log.as_ref().unwrap()));
    service["Proxy"]["AccessLogs"]["Type"] = "stderr".into();
    stage.service(service);
    assert_ne!(stage.publishes().access_log, first.access_log);
    stage.service(registration(&[]));
    let last = stage.publishes();
    assert!(last.exposed.is_empty() && last.access_log.is_none());
}

#[test]
fn no_json_makes_it_panic() {
    let ca = Ca::new();
    let samples = [
        registration(&[("db", 9191), ("cache", 9192)]),
        roots(&[&ca]),
        ca.leaf("web"),
        json!([{"SourceName": "api", "Action": "allow", "Precedence": 9, "Permissions": [{"Action": "deny"}]}]),
        chain(&["db.dc1", "db.dc2"]),
        json!([row("10.0.0.5", 21001), row("db.internal", 21001)]),
        json!({"Service": "db", "Nodes": [row("::1", 1)], "Datacenter": "dc1"}),
        json!({"TLS": {"Incoming": {"TLSMinVersion": "TLSv1_3", "CipherSuites": ["x"]}}, "HTTP": {"Incoming": {}}}),
        serde_json::from_str(include_str!("../../../consul/testdata/1.19-jwt_provider.json")).unwrap(),
    ];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut stage = Stage::ready(&ca);
    for round in 0..3000 {
        let mut sample = samples[round % samples.len()].clone();
        for _ in 0..1 + round % 3 {
            mutate(&mut sample, &mut random);
        }
        let update = match round % samples.len() {
            0 => serde_json::from_value(sample).ok().map(Update::Service),
            1 => serde_json::from_value(sample).ok().map(Update::Roots),
            2 => {
                let leaf = serde_json::from_value(sample).ok();
                leaf.map(|leaf| Update::Leaf { service: "web".into(), leaf })
            }
            3 => {
                let list = serde_json::from_value(sample).ok();
                list.map(|list| Update::Intentions { service: "web".into(), list })
            }
            4 => serde_json::from_value(sample).ok().map(|wire| Update::Chain(chain_query("db"), wire)),
            5 => serde_json::from_value(sample).ok().map(|rows: Vec<api::CheckServiceNode>| Update::Endpoints {
                query: endpoints_query("db.dc1"),
                instances: instances(&rows),
                filtered_by_acls: false,
            }),
            7 => serde_json::from_value(sample).ok().map(Update::Mesh),
            8 => serde_json::from_value(sample).ok().map(|entry| Update::JwtProvider("okta".into(), entry)),
            _ => serde_json::from_value(sample)
                .ok()
                .map(|result| Update::PreparedQuery(PreparedQuery { name: "dbq".into(), datacenter: None }, result)),
        };
        if let Some(update) = update {
            let _ = stage.apply(update);
            let _ = stage.draft.finish();
            let _ = stage.draft.notes();
        }
    }
}

/// Puts something odd somewhere.
fn mutate(value: &mut Value, random: &mut u64) {
    let mut next = |bound: usize| {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        usize::try_from(*random % bound as u64).unwrap()
    };
    let stay = next(4) == 0;
    let (odd, child) = (next(12), next(1 << 16));
    match value {
        Value::Object(map) if !stay && !map.is_empty() => {
            let child = child % map.len();
            mutate(map.values_mut().nth(child).unwrap(), random);
        }
        Value::Array(items) if !stay && !items.is_empty() => {
            let child = child % items.len();
            mutate(&mut items[child], random);
        }
        _ => {
            *value = match odd {
                0 => Value::Null,
                1 => json!(-1),
                2 => json!(u64::MAX),
                3 => json!(1e308),
                4 => json!("é\u{0}%/../:"),
                5 => json!([]),
                6 => json!({}),
                7 => json!([[], {}]),
                8 => json!("9".repeat(40)),
                9 => json!(0),
                10 => json!(true),
                _ => json!(""),
            }
        }
    }
}
