//! Upstreams and the queries that they share.

use super::*;
use crate::config::{AdHoc, AdHocUpstream};

#[test]
fn upstreams_do_not_wait_for_each_other_and_share_what_is_the_same() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191), ("cache", 9192), ("alias", 9193)]));
    stage.chain("cache", chain(&["cache.dc1"])).unwrap();
    stage.chain("alias", chain(&["cache.dc1"])).unwrap();
    stage.wants(&with_public(&[
        "discovery chain of db",
        "discovery chain of cache",
        "discovery chain of alias",
        "endpoints of cache in dc1",
    ]));
    stage.endpoints("cache.dc1", &[row("10.0.0.6", 21002)]);
    let snapshot = stage.publishes();
    assert!(awaited(&snapshot, "db").is_some() && awaited(&snapshot, "cache").is_none());
    let shared = [&targets(&snapshot, "cache")[0], &targets(&snapshot, "alias")[0]];
    assert!(Arc::ptr_eq(&shared[0].endpoints, &shared[1].endpoints));
}

#[test]
fn a_change_of_endpoints_changes_nothing_else() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191), ("cache", 9192)]));
    stage.chain("db", chain(&["db.dc1", "db.dc2"])).unwrap();
    stage.chain("cache", chain(&["cache.dc1"])).unwrap();
    for target in ["db.dc1", "db.dc2", "cache.dc1"] {
        stage.endpoints(target, &[row("10.0.0.5", 21001)]);
    }
    let before = stage.publishes();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001), row("10.0.0.6", 21001)]);
    let after = stage.publishes();
    assert!(Arc::ptr_eq(published(&before), published(&after)));
    assert!(Arc::ptr_eq(upstream(&before, "cache").unwrap(), upstream(&after, "cache").unwrap()));
    let (before, after) = (targets(&before, "db"), targets(&after, "db"));
    assert!(!Arc::ptr_eq(&before[0], &after[0]));
    assert!(Arc::ptr_eq(before[0].tls(), after[0].tls()));
    assert!(Arc::ptr_eq(&before[1], &after[1]));
    assert_eq!(addresses(&after[0]), ["10.0.0.5:21001", "10.0.0.6:21001"]);

    // The same again, with another output of a check: nothing that concerns us.
    let mut same = [row("10.0.0.5", 21001), row("10.0.0.6", 21001)];
    same[0]["Checks"][0]["Output"] = "still alive".into();
    stage.endpoints("db.dc1", &same);
    assert_eq!(stage.draft.urgency(), None);
    stage.publishes_nothing();
}

#[test]
fn a_failed_query_counts_as_empty_only_before_its_first_answer() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191)]));
    stage.chain("db", chain(&["db.dc1", "db.dc2"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    assert!(awaited(&stage.publishes(), "db").is_some());
    stage.apply(Update::Failed(Query::Endpoints(endpoints_query("db.dc2")))).unwrap();
    let snapshot = stage.publishes();
    assert_eq!(targets(&snapshot, "db").iter().map(|t| addresses(t).len()).collect::<Vec<_>>(), [1, 0]);
    stage.apply(Update::Failed(Query::Endpoints(endpoints_query("db.dc1")))).unwrap();
    stage.apply(Update::Failed(Query::Chain(chain_query("db")))).unwrap();
    stage.publishes_nothing();
    stage.endpoints("db.dc1", &[]);
    let snapshot = stage.publishes();
    assert!(addresses(&targets(&snapshot, "db")[0]).is_empty());
}

#[test]
fn what_a_connection_waits_for_is_called_for_until_it_is_known() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191), ("cache", 9192)]));
    let snapshot = stage.publishes();
    let requested = |stage: &Stage| stage.draft.requested().map(ToString::to_string).collect::<BTreeSet<String>>();
    assert_eq!(requested(&stage), BTreeSet::new());
    awaited(&snapshot, "db").unwrap().request();
    assert_eq!(requested(&stage), ["discovery chain of db".to_owned()].into());
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    assert!(requested(&stage).contains("endpoints of db in dc1"));
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    assert_eq!(stage.draft.urgency(), Some(Urgency::Now));
    let snapshot = stage.publishes();
    assert_eq!(requested(&stage), BTreeSet::new());

    // Nobody waits for what can't be had; and what comes all the same is used.
    awaited(&snapshot, "cache").unwrap().request();
    stage.apply(Update::Failed(Query::Chain(chain_query("cache")))).unwrap();
    let snapshot = stage.publishes();
    assert!(awaited(&snapshot, "cache").is_none() && targets(&snapshot, "cache").is_empty());
    assert_eq!(requested(&stage), BTreeSet::new());
    stage.apply(Update::Failed(Query::Chain(chain_query("cache")))).unwrap();
    stage.publishes_nothing();
    stage.chain("cache", chain(&["cache.dc1"])).unwrap();
    stage.endpoints("cache.dc1", &[row("10.0.0.6", 21001)]);
    assert_eq!(addresses(&targets(&stage.publishes(), "cache")[0]), ["10.0.0.6:21001"]);
}

#[test]
fn endpoints_that_only_acls_hide_are_kept() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191)]));
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    let hidden =
        || Update::Endpoints { query: endpoints_query("db.dc1"), instances: Arc::new([]), filtered_by_acls: true };
    stage.apply(hidden()).unwrap();
    assert!(addresses(&targets(&stage.publishes(), "db")[0]).is_empty());
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    stage.publishes();
    assert_eq!(stage.draft.notes(), Vec::<String>::new());
    stage.apply(hidden()).unwrap();
    stage.apply(hidden()).unwrap();
    stage.publishes_nothing();
    let notes = stage.draft.notes();
    assert!(notes.len() == 1 && notes[0].contains("node:read"), "{notes:?}");
}

#[test]
fn a_new_chain_takes_over_when_its_targets_are_known_and_a_bad_one_never() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191)]));
    stage.chain("db", chain(&["db.dc1"])).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    let before = stage.publishes();

    stage.chain("db", chain(&["db2.dc1", "db.dc1"])).unwrap();
    stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1", "endpoints of db2 in dc1"]));
    stage.publishes_nothing();
    stage.endpoints("db2.dc1", &[row("10.0.0.7", 21001)]);
    let after = stage.publishes();
    assert_eq!(addresses(&targets(&after, "db")[0]), ["10.0.0.7:21001"]);
    assert!(Arc::ptr_eq(&targets(&before, "db")[0], &targets(&after, "db")[1]));

    for break_it in [
        |chain: &mut Value| chain["StartNode"] = "nowhere".into(),
        |chain: &mut Value| chain["Nodes"]["resolver:start"]["Type"] = "teleporter".into(),
        |chain: &mut Value| chain["Nodes"]["resolver:start"]["Resolver"] = Value::Null,
        |chain: &mut Value| chain["Nodes"]["resolver:start"]["Resolver"]["Target"] = "nobody".into(),
        |chain: &mut Value| chain["Targets"]["db.dc1"]["SNI"] = "".into(),
        |chain: &mut Value| chain["Targets"]["db.dc1"]["Service"] = Value::Null,
        |chain: &mut Value| chain["Targets"] = Value::Null,
    ] {
        let mut bad = chain(&["db.dc1"]);
        break_it(&mut bad);
        assert!(stage.chain("db", bad.clone()).is_err(), "{bad}");
    }
    stage.publishes_nothing();
    stage.wants(&with_public(&["discovery chain of db", "endpoints of db in dc1", "endpoints of db2 in dc1"]));
}

#[test]
fn a_service_may_show_the_name_that_its_instances_were_registered_with() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("payapi", 9191)]));
    stage.chain("payapi", chain(&["payapi.dc1"])).unwrap();
    let named = |name: &str| {
        let mut row = row("10.0.0.5", 21001);
        row["Service"]["Proxy"] = json!({ "DestinationServiceName": name });
        row
    };
    let expected = |stage: &mut Stage, names: &[&str]| {
        let rows: Vec<Value> = names.iter().map(|name| named(name)).collect();
        stage.endpoints("payapi.dc1", &rows);
        let snapshot = stage.publishes();
        let upstream = &snapshot.outbound.values().next().unwrap().upstream;
        let target = upstream.chain.targets().next().unwrap();
        target.tls().expected().iter().map(|id| id.service.clone()).collect::<Vec<_>>()
    };
    assert_eq!(expected(&mut stage, &["PayApi", "PAYAPI", "payapi"]), ["payapi", "PAYAPI", "PayApi"]);
    assert_eq!(expected(&mut stage, &["PayApi", "payapi2", "other", ""]), ["payapi", "PayApi"]);
    // The same addresses, another spelling.
    assert_eq!(expected(&mut stage, &["PaYaPi", "payapi2", "other", ""]), ["payapi", "PaYaPi"]);
}

#[test]
fn what_can_only_be_reached_by_a_gateway_or_a_peering_has_no_endpoints() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    stage.service(registration(&[("db", 9191)]));
    let mut wire = chain(&["db.dc1", "db.dc2", "db.dc3", "far.dc1"]);
    for (target, mode) in [("db.dc1", "local"), ("db.dc2", "local"), ("db.dc3", "none")] {
        wire["Targets"][target]["MeshGateway"] = json!({ "Mode": mode });
    }
    wire["Targets"]["far.dc1"]["Peer"] = "east".into();
    stage.chain("db", wire).unwrap();
    let queries = ["endpoints of db in dc1", "endpoints of db in dc2", "endpoints of db in dc3"];
    stage.wants(&with_public(&[&["discovery chain of db"][..], &queries].concat()));
    let mut instance = row("10.0.0.5", 21001);
    instance["Service"]["TaggedAddresses"] = json!({"wan": {"Address": "203.0.113.5", "Port": 443}});
    for target in ["db.dc1", "db.dc2", "db.dc3"] {
        stage.endpoints(target, std::slice::from_ref(&instance));
    }
    let snapshot = stage.publishes();
    let found: Vec<_> = targets(&snapshot, "db").iter().map(|target| addresses(target).join(" ")).collect();
    assert_eq!(found, ["10.0.0.5:21001", "", "203.0.113.5:443", ""]);
    let notes = stage.draft.notes();
    assert_eq!(notes.iter().filter(|note| note.contains("mesh gateway")).count(), 1, "{notes:?}");
    assert_eq!(notes.iter().filter(|note| note.contains("peer east")).count(), 1, "{notes:?}");
}

#[test]
fn a_prepared_query_is_one_target_wherever_its_rows_are() {
    let ca = Ca::new();
    let mut stage = Stage::ready(&ca);
    let mut service = registration(&[]);
    service["Proxy"]["Upstreams"] =
        json!([{"DestinationType": "prepared_query", "DestinationName": "dbq", "LocalBindPort": 9191}]);
    stage.service(service);
    stage.wants(&with_public(&["prepared query dbq"]));
    let query = PreparedQuery { name: "dbq".into(), datacenter: None };
    let answer = |rows: &[Value], datacenter: &str| {
        let result = json!({"Service": "db", "Nodes": rows, "Datacenter": datacenter});
        Update::PreparedQuery(query.clone(), Box::new(read(result)))
    };
    stage.apply(Update::Failed(Query::PreparedQuery(query.clone()))).unwrap();
    let only = |snapshot: &Snapshot| {
        Arc::clone(&snapshot.outbound.values().next().unwrap().upstream.chain.connection_targets()[0])
    };
    assert!(addresses(&only(&stage.publishes())).is_empty());
    let mut instance = row("10.0.0.5", 21001);
    instance["Service"]["Proxy"] = json!({"DestinationServiceName": "db"});
    stage.apply(answer(std::slice::from_ref(&instance), "dc1")).unwrap();
    let near = only(&stage.publishes());
    assert_eq!(addresses(&near), ["10.0.0.5:21001"]);
    // A failover of the query: other identities and wide-area addresses.
    instance["Node"]["Datacenter"] = "dc2".into();
    instance["Service"]["TaggedAddresses"] = json!({"wan": {"Address": "203.0.113.5", "Port": 443}});
    stage.apply(answer(&[instance], "dc2")).unwrap();
    let far = only(&stage.publishes());
    assert_eq!(addresses(&far), ["203.0.113.5:443"]);
    assert!(!Arc::ptr_eq(near.tls(), far.tls()));
    stage.apply(Update::Failed(Query::PreparedQuery(query.clone()))).unwrap();
    stage.publishes_nothing();
}

#[test]
fn without_the_tunnel_upstreams_that_flags_define_offer_none() {
    let ca = Ca::new();
    let bind = "127.0.0.1:9191".parse().unwrap();
    let upstreams = vec![AdHocUpstream { name: "db".into(), prepared_query: false, bind }];
    let flags = AdHoc { service: "web".into(), upstreams, public: None, register: None };
    let draft = Draft::ad_hoc(definition::ad_hoc(&flags).unwrap()).with_tunnel(false);
    let mut stage = Stage { draft, ..Stage::new() };
    stage.roots(&[&ca]).unwrap();
    stage.leaf("web", ca.leaf("web")).unwrap();
    let overrides = api::ChainOverrides { protocol: Some("tcp".into()), ..Default::default() };
    let query = ChainQuery { service: "db".into(), overrides, ..ChainQuery::default() };
    stage.apply(Update::Chain(query, Box::new(read(chain(&["db.dc1"]))))).unwrap();
    stage.endpoints("db.dc1", &[row("10.0.0.5", 21001)]);
    let snapshot = stage.publishes();
    assert_eq!(targets(&snapshot, "db")[0].tls().config().alpn_protocols, Vec::<Vec<u8>>::new());
}
