//! The identity, the intentions and the public listener of the service.

use super::*;

#[test]
fn without_a_port_there_is_no_public_listener_and_nothing_is_asked_for_it() {
    let ca = Ca::new();
    let mut stage = Stage::new();
    let mut registration = registration(&[("db", 9191)]);
    registration["Port"] = 0.into();
    stage.service(registration);
    stage.wants(&[PUBLIC[0], PUBLIC[1], PUBLIC[2], PUBLIC[3], "discovery chain of db"]);
    stage.mesh(None);
    stage.roots(&[&ca]).unwrap();
    stage.leaf("web", ca.leaf("web")).unwrap();
    assert!(stage.publishes().inbound.is_empty());
}

#[test]
fn a_port_that_vanishes_leaves_the_rules_for_what_is_still_open() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let with_port = registration(&[]);
    let mut without_port = with_port.clone();
    without_port["Port"] = 0.into();
    stage.service(without_port);
    stage.wants(&with_public(&[]));
    let former = stage.publishes();
    assert!(former.inbound.is_empty());
    assert_eq!(former.former_inbound[0].service.name, "web");
    stage.service(with_port);
    let again = stage.publishes();
    assert!(!again.inbound.is_empty() && again.former_inbound.is_empty());
}

#[test]
fn a_moved_listener_is_another_one_that_knows_all_at_once() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191)]));
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    stage.publishes();
    stage.service(registration(&[("db", 9292)]));
    let moved = stage.publishes();
    let keys: Vec<_> = moved.outbound.keys().map(|key| key.bind.to_string()).collect();
    assert_eq!(keys, ["127.0.0.1:9292"]);
    stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1"]));
    stage.service(registration(&[]));
    assert!(stage.publishes().outbound.is_empty());
    stage.wants(&PUBLIC);
}

#[test]
fn rotation_replaces_credentials_and_keeps_all_else() {
    let (old, new) = (Ca::new(), Ca::new());
    let mut stage = Stage::ready(&old);
    stage.service(registration(&[("db", 9191)]));
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    let before = stage.publishes();
    stage.roots(&[&new, &old]).unwrap();
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    let both = stage.publishes();
    stage.leaf("web", new.leaf("web")).unwrap();
    let after = stage.publishes();
    let (before, both, after) = (targets(&before, "db"), targets(&both, "db"), targets(&after, "db"));
    assert!(!Arc::ptr_eq(before[0].tls(), both[0].tls()));
    assert!(!Arc::ptr_eq(both[0].tls(), after[0].tls()));
    assert!(Arc::ptr_eq(&before[0].endpoints, &after[0].endpoints));
}

#[test]
fn a_bad_leaf_or_bad_roots_change_nothing_and_keep_out_nothing_good() {
    let (ca, other) = (Ca::new(), Ca::new());
    let mut stage = Stage::ready(&ca);
    let expired = ca.leaf_until("web", stage.now - Duration::from_secs(1));
    let mut broken = ca.leaf("web");
    broken["CertPEM"] = "rubbish".into();
    let mut mixed = ca.leaf("web");
    mixed["PrivateKeyPEM"] = ca.leaf("web")["PrivateKeyPEM"].clone();
    for leaf in [expired, broken, mixed, ca.leaf("db"), other.leaf("web"), json!({})] {
        assert!(stage.leaf("web", leaf.clone()).is_err(), "{leaf}");
    }
    stage.publishes_nothing();
    assert!(stage.roots(&[]).is_err());
    stage.publishes_nothing();
    // Each good one is used though the other is bad.
    stage.leaf("web", ca.leaf("web")).unwrap_err();
    stage.publishes();
    stage.leaf("web", json!({})).unwrap_err();
    stage.roots(&[&ca, &other]).unwrap_err();
    stage.publishes();
    stage.leaf("web", other.leaf("web")).unwrap();
    stage.publishes();
    // Roots that do not vouch for our leaf wait for the leaf that they do vouch for.
    stage.roots(&[&ca]).unwrap_err();
    stage.publishes();
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.publishes();
}

#[test]
fn a_root_is_trusted_no_longer_than_it_is_listed() {
    let (old, new) = (Ca::new(), Ca::new());
    let trusted = |snapshot: &Snapshot| {
        [&old, &new].map(|ca| {
            let leaf = CertificateDer::from_pem_slice(ca.leaf("peer")["CertPEM"].as_str().unwrap().as_bytes()).unwrap();
            published(snapshot).service.tls.authenticate(Some(&[leaf]), SystemTime::now()).is_ok()
        })
    };
    let mut stage = Stage::ready(&old);
    stage.leaf("web", old.leaf("web")).unwrap();
    assert_eq!(trusted(&stage.publishes()), [true, false]);
    // Our own leaf is of the old root, and may be so for a while.
    stage.roots(&[&new]).unwrap_err();
    assert_eq!(trusted(&stage.publishes()), [false, false]);
    stage.draft.retry(stage.now).unwrap_err();
    stage.publishes_nothing();
    // Nor does a further leaf of the old root bring it back.
    stage.leaf("web", old.leaf("web")).unwrap_err();
    assert_eq!(trusted(&stage.publishes()), [false, false]);
    stage.leaf("web", new.leaf("web")).unwrap();
    assert_eq!(trusted(&stage.publishes()), [false, true]);
    // What lists nothing, can't be read, or is of another mesh, changes nothing.
    let mut another = roots(&[&old]);
    another["TrustDomain"] = "another.consul".into();
    for answer in [roots(&[]), json!({"TrustDomain": TRUST_DOMAIN, "Roots": [{"RootCert": "rubbish"}]}), another] {
        stage.apply(Update::Roots(read(answer))).unwrap_err();
        stage.publishes_nothing();
    }
    stage.roots(&[&old, &new]).unwrap();
    assert_eq!(trusted(&stage.publishes()), [true, true]);
}

#[test]
fn a_leaf_that_is_not_valid_yet_is_used_when_it_is() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let leaf = ca.leaf_until("web", stage.now + Duration::from_secs(7260));
    assert!(stage.leaf("web", leaf).is_err());
    assert!(stage.draft.retry(stage.now).is_err());
    stage.publishes_nothing();
    stage.now += Duration::from_secs(120);
    stage.draft.retry(stage.now).unwrap();
    stage.publishes();
    stage.draft.retry(stage.now).unwrap();
    stage.publishes_nothing();
}

#[test]
fn a_leaf_that_is_not_renewed_is_told_of_twice_and_the_next_is_used() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let start = stage.now;
    stage.leaf("web", ca.leaf_until("web", start + Duration::from_secs(3600))).unwrap();
    stage.publishes();
    drop(stage.draft.notes());
    // Of its two hours one is over.
    for (later, reported) in [
        (0, None),
        (3000, None),
        (3300, Some("expires at")),
        (3305, None),
        (3601, Some("expired at")),
        (9000, None),
        (0, None),
    ] {
        stage.draft.retry(start + Duration::from_secs(later)).unwrap();
        let notes: Vec<String> = stage.draft.notes();
        match reported {
            None => assert!(notes.is_empty(), "{later}: {notes:?}"),
            Some(words) => assert!(notes.len() == 1 && notes[0].contains(words), "{later}: {notes:?}"),
        }
    }
    stage.publishes_nothing();
    stage.now = start + Duration::from_secs(9000);
    stage.leaf("web", ca.leaf_until("web", start + Duration::from_secs(12_600))).unwrap();
    stage.publishes();
    stage.draft.retry(stage.now).unwrap();
    assert_eq!(stage.draft.notes(), [] as [String; 0]);
}

#[test]
fn intentions_are_urgent_and_leave_the_tls_server_alone() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let allow = json!([{"SourceName": "api", "DestinationName": "web", "Action": "allow", "Precedence": 9}]);
    stage.intentions(allow.clone());
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    let first = stage.publishes();
    stage.default_policy(Action::Allow);
    let second = stage.publishes();
    let (first, second) = (&published(&first).service, &published(&second).service);
    assert!(Arc::ptr_eq(&first.tls, &second.tls));
    let id = |service: &str| {
        let domain = crate::control::fixture::TRUST_DOMAIN;
        SpiffeId::parse(&format!("spiffe://{domain}/ns/default/dc/dc1/svc/{service}")).unwrap()
    };
    assert!(matches!(first.intentions.decide(&id("api")), Decision::Allow(_)));
    assert!(matches!(first.intentions.decide(&id("cron")), Decision::Deny(_)));
    assert!(matches!(second.intentions.decide(&id("cron")), Decision::Allow(_)));
    stage.intentions(allow);
    stage.publishes_nothing();
}

#[test]
fn answers_about_what_we_are_not_any_more_are_ignored() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let mut renamed = registration(&[]);
    renamed["Proxy"]["DestinationServiceName"] = "shop".into();
    stage.service(renamed);
    stage.wants(&[
        PUBLIC[0],
        PUBLIC[1],
        PUBLIC[2],
        "leaf certificate of shop",
        "intentions of shop",
        "default policy of shop",
    ]);
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.intentions(json!([]));
    stage.default_policy(Action::Allow);
    stage.publishes_nothing();
    stage.leaf("shop", ca.leaf("shop")).unwrap();
    stage.publishes_nothing();
    stage.apply(Update::Intentions { service: "shop".into(), list: Vec::new() }).unwrap();
    let policy = DefaultPolicy { action: Action::Deny, source: "test".into(), hits: Hits::default() };
    stage.apply(Update::DefaultPolicy { service: "shop".into(), policy }).unwrap();
    assert_eq!(published(&stage.publishes()).service.name, "shop");
    // Nobody asked for these.
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    stage.publishes_nothing();
}

/// A registration that speaks HTTP.
fn http_registration() -> Value {
    let mut service = registration(&[]);
    service["Proxy"]["Config"] = json!({"protocol": "http"});
    service
}

fn provider(remote: bool) -> Option<Box<api::JwtProvider>> {
    let set = if remote {
        json!({"Remote": {"URI": "https://example.com/keys"}})
    } else {
        json!({"Local": {"JWKS": "eyJrZXlzIjpbXX0="}})
    };
    Some(Box::new(read(json!({"Name": "okta", "Issuer": "us", "JSONWebKeySet": set}))))
}

#[test]
fn token_providers_are_those_that_intentions_name() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(http_registration());
    stage.publishes();
    let jwt = |name: &str| json!({"Providers": [{"Name": name}]});
    stage.intentions(json!([
        {"SourceName": "api", "Action": "allow", "JWT": jwt("okta"), "Precedence": 9},
        {"SourceName": "app", "Permissions": [{"Action": "allow", "JWT": jwt("other")}], "Precedence": 9},
        {"SourceName": "cat", "Permissions": [{"Action": "deny", "JWT": jwt("okta")}], "Precedence": 9},
    ]));
    stage.wants(&with_public(&["jwt-provider okta", "jwt-provider other"]));
    let names = |snapshot: &Snapshot| {
        let providers = &published(snapshot).service.token_providers;
        let name = |(name, provider): (&String, &crate::jwt::Provider)| (name.clone(), provider.keys.is_some());
        providers.0.iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(&stage.publishes()), []);
    let bring = |stage: &mut Stage, name: &str, entry| stage.apply(Update::JwtProvider(name.into(), entry));
    bring(&mut stage, "okta", provider(false)).unwrap();
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    assert_eq!(names(&stage.publishes()), [("okta".into(), true)]);
    bring(&mut stage, "other", None).unwrap();
    assert!(stage.draft.notes().iter().any(|note| note.contains("jwt-provider other")));
    stage.publishes_nothing();

    // Keys that are elsewhere are asked for, and those that came last are kept.
    bring(&mut stage, "okta", provider(true)).unwrap();
    stage.wants(&with_public(&["jwt-provider okta", "jwt-provider other", "key set of https://example.com/keys"]));
    assert_eq!(names(&stage.publishes()), [("okta".into(), false)]);
    let Some(Query::Keys(source)) = stage.wanted.get("key set of https://example.com/keys").cloned() else {
        panic!("no keys are wanted")
    };
    let keys = Arc::new(crate::jwt::KeySet::parse(br#"{"keys": []}"#).unwrap());
    let fetched = || Fetched { keys: Arc::clone(&keys), refetch: crate::jwt::Refetch::default() };
    stage.apply(Update::Keys(source.clone(), fetched())).unwrap();
    assert_eq!(names(&stage.publishes()), [("okta".into(), true)]);
    assert!(bring(&mut stage, "okta", Some(Box::new(read(json!({"Name": "okta"}))))).is_err());
    stage.publishes_nothing();

    // Gone is gone, and so it is for whoever speaks no HTTP.
    bring(&mut stage, "okta", None).unwrap();
    assert_eq!(names(&stage.publishes()), []);
    bring(&mut stage, "okta", provider(true)).unwrap();
    stage.publishes();
    stage.service(registration(&[]));
    stage.wants(&with_public(&[]));
    assert_eq!(names(&stage.publishes()), []);
    bring(&mut stage, "okta", provider(false)).unwrap();
    stage.apply(Update::Keys(source, fetched())).unwrap();
    stage.publishes_nothing();
}

#[test]
fn demands_that_are_not_known_keep_the_public_listener_from_starting() {
    let ca = Ca::new();
    let mut stage = Stage::new();
    let mut service = registration(&[]);
    service["Proxy"]["Config"] = json!({"protocol": "http"});
    stage.service(service);
    let entry = || Some(read(json!({"TLS": {"Incoming": {"TLSMinVersion": "TLSv1_4"}}})));
    assert!(stage.apply(Update::Mesh(entry())).is_err());
    stage.roots(&[&ca]).unwrap();
    stage.leaf("web", ca.leaf("web")).unwrap();
    let jwt = json!({"Providers": [{"Name": "okta"}]});
    stage.intentions(json!([{"SourceName": "*", "Action": "allow", "JWT": jwt, "Precedence": 8}]));
    stage.default_policy(Action::Deny);
    stage.publishes_nothing();
    stage.mesh(None);
    // Nothing was said of the provider yet.
    stage.publishes_nothing();
    let provider = |new: &str| {
        let keys = json!({"Local": {"JWKS": "eyJrZXlzIjpbXX0="}});
        let entry = read(json!({"Name": "okta", "JSONWebKeySet": keys, "New": new}));
        Update::JwtProvider("okta".into(), Some(Box::new(entry)))
    };
    assert!(stage.apply(provider("x")).unwrap_err().0.contains("does not start"));
    assert!(stage.publishes().inbound.is_empty());
    stage.apply(provider("")).unwrap();
    assert!(!stage.publishes().inbound.is_empty());
    // What runs stays as it is.
    assert!(stage.apply(provider("x")).is_err() && stage.apply(Update::Mesh(entry())).is_err());
    stage.publishes_nothing();
}

/// The registration of `web` with audit mode on, by itself or as the agent merges it.
fn audited() -> Value {
    let mut registration = registration(&[]);
    registration["Proxy"]["Config"] = json!({"lictor_intentions_audit": true});
    registration
}

fn proxy_defaults(stage: &mut Stage, entry: Option<Value>) {
    stage.apply(Update::ProxyDefaults(entry.map(|entry| Box::new(read(entry))))).unwrap();
}

#[test]
fn audit_mode_is_followed_both_ways_and_begins_once_it_is_known_not_to_be_for_all() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(audited());
    stage.wants(&with_public(&["proxy-defaults config entry"]));
    stage.publishes_nothing();
    proxy_defaults(&mut stage, None);
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    assert!(published(&stage.publishes()).service.audit);
    stage.service(registration(&[]));
    stage.wants(&PUBLIC);
    assert!(!published(&stage.publishes()).service.audit);
    stage.service(audited());
    stage.publishes_nothing();
}

#[test]
fn audit_mode_for_the_whole_mesh_is_not_followed_and_said() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(audited());
    let for_all = json!({"Config": {"LictorIntentionsAudit": "true"}});
    for entry in [for_all.clone(), json!({"Config": {"lictor_intentions_audit": false}})] {
        proxy_defaults(&mut stage, Some(entry));
        stage.publishes_nothing();
    }
    assert!(stage.draft.notes().iter().any(|note| note.contains("it is not followed")));
    proxy_defaults(&mut stage, Some(json!({"Config": {"protocol": "http"}})));
    assert!(published(&stage.publishes()).service.audit);
    stage.apply(Update::Failed(Query::ProxyDefaults)).unwrap();
    stage.publishes_nothing();
    proxy_defaults(&mut stage, Some(for_all));
    assert!(!published(&stage.publishes()).service.audit);
}

#[test]
fn audit_mode_is_known_before_the_first_connection_is_decided_and_off_where_that_cannot_be_asked() {
    let ca = Ca::new();
    let mut stage = Stage::new();
    stage.service(audited());
    stage.mesh(None);
    stage.roots(&[&ca]).unwrap();
    stage.leaf("web", ca.leaf("web")).unwrap();
    stage.intentions(json!([]));
    stage.default_policy(Action::Deny);
    stage.publishes_nothing();
    stage.apply(Update::Failed(Query::ProxyDefaults)).unwrap();
    assert!(!published(&stage.publishes()).service.audit);
}

#[test]
fn what_is_open_on_a_listener_that_is_gone_is_audited_no_more() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(audited());
    proxy_defaults(&mut stage, None);
    assert!(published(&stage.publishes()).service.audit);
    let mut without_port = audited();
    without_port["Port"] = 0.into();
    stage.service(without_port);
    assert!(!stage.publishes().former_inbound[0].service.audit);
}
