//! Whole control planes beside a fake agent.

use serde_json::{Value, json};

use super::fixture::{Ca, chain, registration, roots, row};
use super::startup::UNKNOWN_TOKEN_WAIT;
use super::*;
use crate::consul::watches::Watches;
use crate::consul::{Client, Scope, Settings, Token};
use crate::testing::{Agent, Fault};

/// Longest wait for something that should come at once.
const SOON: Duration = Duration::from_secs(10);

const SERVICE: &str = "/v1/agent/service/web-sidecar-proxy";
const ROOTS: &str = "/v1/agent/connect/ca/roots";
const LEAF: &str = "/v1/agent/connect/ca/leaf/web";
const INTENTIONS: &str = "/v1/connect/intentions/match";

type Published = watch::Receiver<Option<Arc<Snapshot>>>;

/// An agent with a sidecar of `web`, whose upstream `db` has one instance.
async fn agent(ca: &Ca) -> Agent {
    let agent = Agent::start();
    agent.set(SERVICE, registration(&[("db", 9191)]));
    agent.set(ROOTS, roots(&[ca]));
    agent.set(LEAF, ca.leaf("web"));
    agent.set(INTENTIONS, json!({"web": null}));
    let reason = "Default behavior configured by ACLs";
    agent.set("/v1/agent/connect/authorize", json!({"Authorized": false, "Reason": reason}));
    agent.set("/v1/discovery-chain/db", json!({"Chain": chain(&["db.dc1"])}));
    agent.set("/v1/health/connect/db", json!([row("10.0.0.5", 21001)]));
    agent
}

type Running = tokio::task::JoinHandle<anyhow::Result<()>>;

fn sources(settings: &Settings) -> Sources {
    Sources::new(Watches::new(Client::new(settings).expect("the settings are good")))
}

fn start(agent: &Agent, mode: Mode) -> (Running, Published) {
    start_over(sources(&agent.settings()), mode)
}

fn start_with(sources: Sources, proxy_id: &str) -> (Running, Published) {
    start_over(sources, Mode::ProxyId(proxy_id.into()))
}

fn start_over(sources: Sources, mode: Mode) -> (Running, Published) {
    let (publish, published) = watch::channel(None);
    let control = tokio::spawn(async move { run(sources, &mode, Aead::detect(), true, Arc::default(), publish).await });
    (control, published)
}

async fn until(published: &mut Published, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let there = published.wait_for(|snapshot| snapshot.as_deref().is_some_and(&wanted));
    let snapshot = tokio::time::timeout(SOON, there).await.expect("it is published soon").expect("control runs");
    snapshot.clone().expect("there is one")
}

fn endpoints(snapshot: &Snapshot, upstream: &str) -> usize {
    let found = snapshot.outbound.iter().find(|(key, _)| key.destination == upstream);
    found.map_or(0, |(_, listener)| listener.upstream.chain.targets().map(|target| target.endpoints.usable.len()).sum())
}

#[tokio::test]
async fn what_the_agent_says_is_published_and_followed() {
    let ca = Ca::new();
    let agent = agent(&ca).await;
    let (control, mut published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
    let first = until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    let before = first.inbound.values().next().cloned().expect("a public listener");

    agent.set(INTENTIONS, json!({"web": [{"SourceName": "api", "Action": "allow", "Precedence": 9}]}));
    let next =
        until(&mut published, |s| s.inbound.values().any(|p| p.service.intentions != before.service.intentions)).await;
    assert!(Arc::ptr_eq(next.outbound.values().next().unwrap(), first.outbound.values().next().unwrap()));

    agent.set("/v1/discovery-chain/cache", json!({"Chain": chain(&["cache.dc1"])}));
    agent.set("/v1/health/connect/cache", json!([row("10.0.0.6", 1), row("10.0.0.7", 1)]));
    agent.set(SERVICE, registration(&[("db", 9191), ("cache", 9192)]));
    let next = until(&mut published, |snapshot| endpoints(snapshot, "service:cache") == 2).await;

    // Rubbish, silence and a deregistration change nothing; afterwards all is caught up with.
    agent.fault(Some(Fault::Rubbish));
    agent.fault(Some(Fault::Status(500, "No cluster leader")));
    agent.disconnect();
    agent.remove(SERVICE);
    agent.set("/v1/health/connect/cache", json!([]));
    agent.fault(None);
    let last = until(&mut published, |snapshot| endpoints(snapshot, "service:cache") == 0).await;
    assert_eq!(last.outbound.keys().collect::<Vec<_>>(), next.outbound.keys().collect::<Vec<_>>());

    drop(published);
    tokio::time::timeout(SOON, control).await.expect("control ends with its readers").unwrap().unwrap();
}

/// Chains that the agent was asked for.
fn chains_asked(agent: &Agent) -> usize {
    agent.count(|seen| seen.path.starts_with("/v1/discovery-chain/"))
}

/// The clock stands still while anything is left to do, so that nothing is held back for too long.
#[tokio::test(start_paused = true)]
async fn many_upstreams_are_asked_about_once_the_first_snapshot_is_there() {
    for (upstreams, are_held_back) in [(16, false), (17, true)] {
        let ca = Ca::new();
        let agent = agent(&ca).await;
        // No answer that can be used, so that there is no first snapshot.
        agent.set(INTENTIONS, json!({}));
        let names: Vec<String> = (0..upstreams).map(|number| format!("s{number}")).collect();
        let ports = names.iter().zip(9300..).map(|(name, port)| (name.as_str(), port)).collect::<Vec<_>>();
        agent.set(SERVICE, registration(&ports));
        let (_control, mut published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
        let asked = async {
            while agent.requests(INTENTIONS).is_empty() || agent.requests(LEAF).is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, asked).await.expect("what we are is asked first");
        assert!(!are_held_back || chains_asked(&agent) == 0);
        if !are_held_back {
            let asked = async {
                while chains_asked(&agent) < upstreams {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(SOON, asked).await.expect("few are asked about at once");
            continue;
        }
        agent.set(INTENTIONS, json!({"web": null}));
        agent.set("/v1/discovery-chain/s16", json!({"Chain": chain(&["db.dc1"])}));
        until(&mut published, |snapshot| endpoints(snapshot, "service:s16") == 1).await;
    }
}

#[tokio::test(start_paused = true)]
async fn upstreams_are_not_held_back_for_long() {
    let ca = Ca::new();
    let agent = agent(&ca).await;
    agent.set(INTENTIONS, json!({}));
    let names: Vec<String> = (0..40).map(|number| format!("s{number}")).collect();
    let ports = names.iter().zip(9300..).map(|(name, port)| (name.as_str(), port)).collect::<Vec<_>>();
    agent.set(SERVICE, registration(&ports));
    let (_control, _published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
    let asked = async {
        while chains_asked(&agent) < 40 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, asked).await.expect("they are asked about all the same");
}

#[tokio::test]
async fn flags_alone_make_a_proxy() {
    let ca = Ca::new();
    let agent = agent(&ca).await;
    let flags = crate::config::AdHoc {
        service: "web".into(),
        upstreams: vec![crate::config::AdHocUpstream {
            name: "db".into(),
            prepared_query: false,
            bind: "127.0.0.1:9191".parse().unwrap(),
        }],
        public: None,
        register: None,
    };
    let (_control, mut published) = start(&agent, Mode::AdHoc(flags));
    let snapshot = until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    assert!(snapshot.inbound.is_empty());
    assert!(agent.requests(INTENTIONS).is_empty());
    assert!(agent.requests(SERVICE).is_empty());
}

#[tokio::test]
async fn an_agent_that_does_not_answer_yet_is_waited_for() {
    let ca = Ca::new();
    let agent = agent(&ca).await;
    let services: Value = json!({"web-sidecar-proxy": {
        "Kind": "connect-proxy", "Proxy": {"DestinationServiceID": "web"}}});
    agent.set("/v1/agent/services", services);
    agent.fault(Some(Fault::Status(500, "No cluster leader")));
    let (_control, mut published) = start(&agent, Mode::SidecarFor("WEB".into()));
    let requested = async {
        while agent.requests("/v1/agent/services").is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, requested).await.unwrap();
    agent.fault(None);
    until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
}

#[tokio::test]
async fn an_agent_that_refuses_ends_the_search_for_the_sidecar() {
    let agent = Agent::start();
    agent.fault(Some(Fault::Status(403, "Permission denied")));
    let (control, _published) = start(&agent, Mode::SidecarFor("web".into()));
    let error = tokio::time::timeout(SOON, control).await.unwrap().unwrap().unwrap_err().to_string();
    assert!(error.contains("web") && error.contains("Permission denied"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_not_known_is_waited_for_and_not_forever() {
    for mode in [Mode::SidecarFor("web".into()), Mode::ProxyId("web-sidecar-proxy".into())] {
        let agent = Agent::start();
        agent.fault(Some(Fault::Status(403, "ACL not found")));
        let (control, _published) = start(&agent, mode);
        let began = Instant::now();
        let error = tokio::time::timeout(UNKNOWN_TOKEN_WAIT * 2, control).await.unwrap().unwrap().unwrap_err();
        assert!(error.to_string().contains("ACL not found"), "{error}");
        assert!(began.elapsed() >= UNKNOWN_TOKEN_WAIT, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_token_that_becomes_known_is_enough() {
    let ca = Ca::new();
    let agent = agent(&ca).await;
    agent.fault(Some(Fault::Status(403, "ACL not found")));
    let (_control, mut published) = start(&agent, Mode::ProxyId("web-sidecar-proxy".into()));
    let requested = async {
        while agent.requests(SERVICE).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, requested).await.unwrap();
    agent.fault(None);
    until(&mut published, |snapshot| endpoints(snapshot, "service:db") == 1).await;
}

const API_SERVICE: &str = "/v1/agent/service/api-sidecar-proxy";

/// The agent of a sidecar of `web` and one of `api`, which have an upstream in common.
async fn agent_of_two(ca: &Ca) -> Agent {
    let agent = agent(ca).await;
    let mut api = registration(&[("db", 9192)]);
    api["ID"] = "api-sidecar-proxy".into();
    api["Port"] = 21001.into();
    api["Proxy"]["DestinationServiceName"] = "api".into();
    agent.set(API_SERVICE, api);
    agent.set("/v1/agent/connect/ca/leaf/api", ca.leaf("api"));
    agent
}

#[tokio::test]
async fn two_sidecars_in_one_process_share_what_is_the_same() {
    let ca = Ca::new();
    let agent = agent_of_two(&ca).await;
    let sources = sources(&agent.settings());
    let (_web, mut web) = start_with(sources.clone(), "web-sidecar-proxy");
    until(&mut web, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    let alone = sources.running_queries();

    let (api_control, mut api) = start_with(sources.clone(), "api-sidecar-proxy");
    let snapshot = until(&mut api, |snapshot| endpoints(snapshot, "service:db") == 1).await;
    assert_eq!(snapshot.inbound.values().next().map(|public| public.service.name.as_str()), Some("api"));
    // The late one was told what the other had asked.
    let fetches = |path: &str| agent.count(|seen| seen.path == path && seen.param("index").is_none());
    assert_eq!(fetches(ROOTS), 1);
    let own: Vec<String> = sources.running_queries().difference(&alone).cloned().collect();
    let expected = ["default policy", "intentions", "leaf certificate"].map(|what| format!("{what} of api"));
    assert_eq!(own[..3], expected);
    assert_eq!(own[3..], ["registration of api-sidecar-proxy"]);

    // News of what they share reach both.
    agent.set("/v1/health/connect/db", json!([row("10.0.0.5", 1), row("10.0.0.6", 1)]));
    until(&mut web, |snapshot| endpoints(snapshot, "service:db") == 2).await;
    until(&mut api, |snapshot| endpoints(snapshot, "service:db") == 2).await;

    // The end of one ends what it alone asked.
    drop(api);
    tokio::time::timeout(SOON, api_control).await.expect("it ends with its readers").unwrap().unwrap();
    assert_eq!(sources.running_queries(), alone);
    agent.set("/v1/health/connect/db", json!([]));
    until(&mut web, |snapshot| endpoints(snapshot, "service:db") == 0).await;
}

#[tokio::test]
async fn no_sidecar_is_told_what_another_token_may_see() {
    let ca = Ca::new();
    let agent = agent_of_two(&ca).await;
    agent.only_tokens(&["first"]);
    let mut settings = agent.settings();
    settings.scope.token = Token::Fixed("first".into());
    let sources = sources(&settings);
    let (_web, mut web) = start_with(sources.clone(), "web-sidecar-proxy");
    until(&mut web, |snapshot| endpoints(snapshot, "service:db") == 1).await;

    let other = Scope { token: Token::Fixed("second".into()), ..Scope::default() };
    let (control, api) = start_with(sources.for_scope(other).unwrap(), "api-sidecar-proxy");
    let error = tokio::time::timeout(SOON, control).await.unwrap().unwrap().unwrap_err().to_string();
    assert!(error.contains("Permission denied") && !error.contains("second"), "{error}");
    assert!(api.borrow().is_none());
    assert!(agent.count(|seen| seen.token() == Some("second")) > 0);
    // And the other goes on.
    agent.set("/v1/health/connect/db", json!([]));
    until(&mut web, |snapshot| endpoints(snapshot, "service:db") == 0).await;
}
