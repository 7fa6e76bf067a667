//! Queries against an agent in this process.

use serde_json::json;

use super::*;
use crate::consul::watches::{Watch, Watches};
use crate::consul::{Instances, Settings, Token, api};
use crate::testing::{Agent, Fault, TempFile};

const ROOTS: &str = "/v1/agent/connect/ca/roots";
const MATCH: &str = "/v1/connect/intentions/match";
const LIMIT: Duration = Duration::from_secs(300);

fn watches(settings: &Settings) -> Watches {
    Watches::new(Client::new(settings).expect("the settings are good"))
}

fn roots(active: &str) -> serde_json::Value {
    json!({ "ActiveRootID": active })
}

struct Roots {
    events: mpsc::Receiver<Event<api::CaRoots>>,
    _watch: Watch,
}

fn watch_roots(watches: &Watches) -> Roots {
    let (sender, events) = mpsc::channel(16);
    Roots { events, _watch: watches.watch(Query::ca_roots(), sender, |event| event) }
}

impl Roots {
    async fn event(&mut self) -> Event<api::CaRoots> {
        tokio::time::timeout(LIMIT, self.events.recv()).await.expect("an event in time").expect("a running watch")
    }

    async fn value(&mut self) -> String {
        match self.event().await {
            Event::Value(answer) => answer.value.active_root_id,
            Event::Failed(error) => panic!("failed: {error}"),
        }
    }

    async fn failure(&mut self) -> Error {
        match self.event().await {
            Event::Value(answer) => panic!("no failure: {answer:?}"),
            Event::Failed(error) => error,
        }
    }

    /// The next value, whatever failures come before it.
    async fn value_at_last(&mut self) -> String {
        loop {
            if let Event::Value(answer) = self.event().await {
                return answer.value.active_root_id;
            }
        }
    }
}

/// Waits until `condition` holds.
async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("it happens in time");
}

fn last_index(agent: &Agent, path: &str) -> Option<String> {
    agent.requests(path).last().and_then(|seen| seen.param("index").map(str::to_string))
}

#[tokio::test(start_paused = true)]
async fn passes_on_what_changes_and_nothing_else() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&agent.settings()));
    assert_eq!(watch.value().await, "a");
    for _ in 0..3 {
        let before = agent.requests(ROOTS).len();
        agent.touch(ROOTS);
        until(|| agent.requests(ROOTS).len() > before).await;
    }
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value().await, "b");
    assert!(watch.events.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn ends_with_its_handle() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let watches = watches(&agent.settings());
    let mut watch = watch_roots(&watches);
    watch.value().await;
    until(|| last_index(&agent, ROOTS).is_some()).await;
    assert_eq!(agent.open_connections(), 1);
    drop(watch);
    until(|| agent.open_connections() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn starts_over_when_indexes_go_backwards() {
    let agent = Agent::start();
    for _ in 0..10 {
        agent.set(ROOTS, roots("a"));
    }
    let mut watch = watch_roots(&watches(&agent.settings()));
    assert_eq!(watch.value().await, "a");
    until(|| last_index(&agent, ROOTS).is_some()).await;
    agent.go_backwards();
    // The index is in the agent's future now, so the query ends with its wait.
    until(|| last_index(&agent, ROOTS).as_deref() == Some("2")).await;
    assert!(agent.requests(ROOTS).iter().skip(1).any(|seen| seen.param("index").is_none()));
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value().await, "b");
}

#[tokio::test(start_paused = true)]
async fn survives_refusals_and_rubbish() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&agent.settings()));
    assert_eq!(watch.value().await, "a");
    for (fault, says) in [
        (
            Fault::Status(500, "No cluster leader"),
            "answered GET /v1/agent/connect/ca/roots with 500: No cluster leader",
        ),
        (Fault::Status(503, ""), "answered GET /v1/agent/connect/ca/roots with 503"),
        (Fault::Rubbish, "something unreadable"),
    ] {
        until(|| last_index(&agent, ROOTS).is_some()).await;
        let before = agent.requests(ROOTS).len();
        // A query that waits does not see the fault until it is woken.
        agent.fault(Some(fault));
        let text = watch.failure().await.to_string();
        assert!(text.contains(says), "{text}");
        watch.failure().await;
        // The index that comes with a refusal is not taken.
        let after = agent.requests(ROOTS);
        assert!(after[before..].iter().all(|seen| seen.param("index").is_none()));
        agent.fault(None);
        until(|| last_index(&agent, ROOTS).is_some()).await;
    }
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value_at_last().await, "b");
}

#[tokio::test(start_paused = true)]
async fn reopens_a_request_that_is_stuck() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&agent.settings()));
    assert_eq!(watch.value().await, "a");
    until(|| last_index(&agent, ROOTS).is_some()).await;
    let start = Instant::now();
    agent.fault(Some(Fault::Silent));
    let error = watch.failure().await;
    assert!(error.is_transport() && !error.is_unreachable(), "{error}");
    // Soon after the start nothing blocks for long; later it is for a minute.
    assert!((Duration::from_secs(10)..Duration::from_secs(80)).contains(&start.elapsed()), "{:?}", start.elapsed());
    agent.fault(None);
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value_at_last().await, "b");
}

#[tokio::test(start_paused = true)]
async fn is_back_as_soon_as_the_agent_is() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&agent.settings()));
    assert_eq!(watch.value().await, "a");
    until(|| last_index(&agent, ROOTS).is_some()).await;
    agent.disconnect();
    assert!(watch.failure().await.is_transport());
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value_at_last().await, "b");
}

#[tokio::test(start_paused = true)]
async fn a_hot_table_is_asked_at_a_bounded_rate() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&agent.settings()));
    watch.value().await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        agent.touch(ROOTS);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // Ten at once and then one each 10 ms: roots are of what is followed promptly.
    let asked = agent.requests(ROOTS).len();
    assert!((400..=515).contains(&asked), "{asked} requests");
}

#[tokio::test(start_paused = true)]
async fn blocks_on_the_hash_of_a_service() {
    const PATH: &str = "/v1/agent/service/web-sidecar-proxy";
    let agent = Agent::start();
    let watches = watches(&agent.settings());
    let (sender, mut events) = mpsc::channel(16);
    let _watch = watches.watch(Query::agent_service("web-sidecar-proxy"), sender, |event| match event {
        Event::Value(answer) => answer.value.port.get(),
        Event::Failed(error) => {
            assert!(error.is_not_found());
            None
        }
    });
    assert_eq!(events.recv().await, Some(None));
    agent.set(PATH, json!({ "Port": 1 }));
    while events.recv().await.expect("a running watch") != Some(1) {}
    until(|| agent.requests(PATH).last().is_some_and(|seen| seen.param("hash").is_some())).await;
    agent.set(PATH, json!({ "Port": 2 }));
    assert_eq!(events.recv().await, Some(Some(2)));
}

#[tokio::test(start_paused = true)]
async fn waits_for_config_entries_that_are_missing() {
    const PATH: &str = "/v1/config/proxy-defaults/global";
    let agent = Agent::start();
    let watches = watches(&agent.settings());
    let (sender, mut events) = mpsc::channel(16);
    let _watch = watches.watch(Query::proxy_defaults(), sender, |event| match event {
        Event::Value(answer) => answer.value.map(|entry| entry.mode),
        Event::Failed(error) => panic!("{error}"),
    });
    assert_eq!(events.recv().await, Some(None));
    agent.set(PATH, json!({ "Mode": "transparent" }));
    assert_eq!(events.recv().await, Some(Some("transparent".into())));
    agent.remove(PATH);
    assert_eq!(events.recv().await, Some(None));
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_the_agent_does_not_know_is_missing() {
    let agent = Agent::start();
    agent.fault(Some(Fault::Status(500, "invalid config entry kind: mesh")));
    let client = Client::new(&agent.settings()).expect("the settings are good");
    assert_eq!(client.fetch(&Query::mesh_config()).await.expect("an answer").value, None);
}

async fn intentions_reach_us(before_1_9: bool) {
    let agent = Agent::start();
    if before_1_9 {
        agent.before_1_9();
    }
    agent.set(MATCH, json!({ "db": null }));
    let watches = watches(&agent.settings());
    let (sender, mut events) = mpsc::channel(16);
    let _watch = watches.watch(Query::intentions("db"), sender, |event| match event {
        Event::Value(answer) => answer.value.len(),
        Event::Failed(error) => panic!("{error}"),
    });
    assert_eq!(events.recv().await, Some(0));
    for count in 1..5 {
        // Also when it changes while the table's index is being asked for.
        if count % 2 == 0 {
            until(|| last_index(&agent, MATCH).is_some()).await;
        }
        let start = Instant::now();
        agent.set(MATCH, json!({ "db": vec![json!({ "Action": "deny" }); count] }));
        assert_eq!(events.recv().await, Some(count));
        assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
    }
    // Changes of others wake us, and must not make us spin.
    let before = agent.requests(MATCH).len();
    agent.set("/v1/connect/intentions", json!([{}]));
    tokio::time::sleep(Duration::from_secs(300)).await;
    let asked = agent.requests(MATCH).len() - before;
    assert!((4..20).contains(&asked), "{asked} requests");
    assert!(events.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn intentions_reach_us_by_their_own_index() {
    intentions_reach_us(false).await;
}

#[tokio::test(start_paused = true)]
async fn intentions_reach_us_by_the_index_of_the_table() {
    intentions_reach_us(true).await;
}

/// The lists of an agent before 1.9 can be long, and cost it much.
#[tokio::test]
async fn an_agent_that_is_known_to_be_before_1_9_lists_intentions_once_at_the_start() {
    let agent = Agent::start();
    agent.before_1_9();
    agent.set(MATCH, json!({ "db": null }));
    agent.set(ROOTS, roots("a"));
    let watches = watches(&agent.settings());
    watches.client().fetch(&Query::ca_roots()).await.expect("an answer");
    let (sender, mut events) = mpsc::channel(16);
    let _watch = watches.watch(Query::intentions("db"), sender, drop);
    events.recv().await.expect("it runs");
    until(|| last_index(&agent, MATCH).is_some()).await;
    assert_eq!(agent.requests(MATCH).iter().filter(|seen| seen.param("index").is_none()).count(), 1);
    let tables = agent.requests("/v1/connect/intentions");
    assert_eq!(tables.len(), 1);
    assert_eq!(tables[0].param("filter"), Some("ID == \"\""), "nothing of the table is sent");
}

#[tokio::test]
async fn an_answer_about_no_name_is_no_empty_list_of_intentions() {
    let agent = Agent::start();
    let client = Client::new(&agent.settings()).expect("the settings are good");
    for body in [json!({}), json!(null), json!({ "db": [], "web": [] })] {
        agent.set(MATCH, body);
        assert!(client.fetch(&Query::intentions("db")).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn many_watches_share_few_connections() {
    const SERVICES: usize = 300;
    let agent = Agent::start();
    let path = |number: usize| format!("/v1/health/connect/s{number}");
    let rows = |count: usize| json!(vec![json!({}); count]);
    agent.set(ROOTS, roots("a"));
    for number in 0..SERVICES {
        agent.set(&path(number), rows(1));
    }
    let settings = agent.settings();
    let watches = watches(&settings);
    let mut always = watch_roots(&watches);
    let (sender, mut events) = mpsc::channel(16);
    let start = Instant::now();
    let _watches: Vec<_> = (0..SERVICES)
        .map(|number| {
            let instances = Instances { service: format!("s{number}"), ..Instances::default() };
            watches.watch(Query::health_connect(&instances), sender.clone(), move |event| match event {
                Event::Value(answer) => (number, answer.value.len()),
                Event::Failed(error) => panic!("{error}"),
            })
        })
        .collect();
    for _ in 0..SERVICES {
        assert_eq!(events.recv().await.expect("running watches").1, 1);
    }
    assert_eq!(always.value().await, "a");
    assert!(start.elapsed() < Duration::from_secs(1), "first answers took {:?}", start.elapsed());
    // Each of them sees a change when its turn comes, and those that are always on at once.
    let start = Instant::now();
    for number in 0..SERVICES {
        agent.set(&path(number), rows(2));
    }
    for _ in 0..SERVICES {
        assert_eq!(events.recv().await.expect("running watches").1, 2);
    }
    assert!(start.elapsed() < Duration::from_secs(25), "a cycle took {:?}", start.elapsed());
    until(|| last_index(&agent, ROOTS).is_some()).await;
    let start = Instant::now();
    agent.set(ROOTS, roots("b"));
    assert_eq!(always.value().await, "b");
    // Roots rotate where there is no room.
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    let most = agent.most_connections();
    assert!(most <= settings.max_connections, "{most} connections");
}

#[tokio::test(start_paused = true)]
async fn makes_do_with_the_connections_that_the_agent_has() {
    const SERVICES: usize = 40;
    let agent = Agent::start();
    agent.limit_connections(2);
    agent.set(ROOTS, roots("a"));
    agent.set("/v1/health/connect/db", json!([]));
    let watches = watches(&agent.settings());
    let (sender, mut events) = mpsc::channel(16);
    let _watches: Vec<_> = (0..SERVICES)
        .map(|number| {
            let query = Query::health_connect(&Instances { service: "db".into(), ..Instances::default() });
            watches.watch(query, sender.clone(), move |event| matches!(event, Event::Value(_)).then_some(number))
        })
        .collect();
    let mut always = watch_roots(&watches);
    assert_eq!(always.value_at_last().await, "a");
    let mut served = std::collections::HashSet::new();
    while served.len() < SERVICES {
        served.extend(events.recv().await.expect("running watches"));
    }
    // From here on these are enough, whatever tries out whether there are more by now.
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let mut slowest = Duration::ZERO;
    for round in 0..20 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let start = Instant::now();
        agent.set(ROOTS, roots(&round.to_string()));
        assert_eq!(always.value_at_last().await, round.to_string());
        slowest = slowest.max(start.elapsed());
    }
    assert!(slowest < Duration::from_secs(8), "{slowest:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_new_need_not_wait_for_what_blocks() {
    let agent = Agent::start();
    agent.set(ROOTS, roots("a"));
    let paths = ["/v1/agent/service/web", "/v1/agent/connect/ca/leaf/a", "/v1/agent/connect/ca/leaf/b"];
    paths.iter().for_each(|path| agent.set(path, json!({})));
    let watches = watches(&agent.settings());
    let (sender, mut events) = mpsc::channel(16);
    let _service = watches.watch(Query::agent_service("web"), sender.clone(), |_| ());
    let _leaves = ["a", "b"].map(|name| watches.watch(Query::ca_leaf(name), sender.clone(), |_| ()));
    for _ in paths {
        events.recv().await.expect("running watches");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = Instant::now();
    let mut watch = watch_roots(&watches);
    assert_eq!(watch.value().await, "a");
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_somebody_waits_for_is_asked_first() {
    const SERVICES: usize = 50;
    let agent = Agent::start();
    let mut settings = agent.settings();
    settings.max_connections = 4;
    agent.set("/v1/health/connect/db", json!([]));
    let watches = watches(&settings);
    let (sender, mut events) = mpsc::channel(SERVICES);
    let query = || Query::health_connect(&Instances { service: "db".into(), ..Instances::default() });
    let all: Vec<_> = (0..SERVICES)
        .map(|number| {
            watches.watch(query(), sender.clone(), move |event| matches!(event, Event::Value(_)).then_some(number))
        })
        .collect();
    all[SERVICES - 1].hurry();
    let mut before = 0;
    while events.recv().await.expect("running watches").expect("an answer") != SERVICES - 1 {
        before += 1;
    }
    assert!(before < 5, "{before} were asked before it");
}

#[tokio::test(start_paused = true)]
async fn another_token_starts_queries_anew() {
    let agent = Agent::start();
    let file = TempFile::new("first");
    let mut settings = agent.settings();
    settings.scope.token = Token::File(file.path().to_path_buf());
    agent.set(ROOTS, roots("a"));
    let mut watch = watch_roots(&watches(&settings));
    assert_eq!(watch.value().await, "a");
    until(|| last_index(&agent, ROOTS).is_some()).await;
    file.write(" second\n");
    let with = |token: &'static str| agent.requests(ROOTS).into_iter().filter(move |seen| seen.token() == Some(token));
    until(|| with("second").next().is_some()).await;
    assert!(with("second").next().expect("one came").param("index").is_none());
    // Neither an empty file nor a missing one is another token.
    file.write("");
    tokio::time::sleep(Duration::from_secs(3)).await;
    std::fs::remove_file(file.path()).expect("it was there");
    tokio::time::sleep(Duration::from_secs(3)).await;
    agent.set(ROOTS, roots("b"));
    assert_eq!(watch.value().await, "b");
    until(|| agent.requests(ROOTS).last().is_some_and(|seen| seen.token() == Some("second"))).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_read_again() {
    let agent = Agent::start();
    agent.only_tokens(&["second"]);
    agent.set(ROOTS, roots("a"));
    let file = TempFile::new("first");
    let mut settings = agent.settings();
    settings.scope.token = Token::File(file.path().to_path_buf());
    let client = Client::new(&settings).expect("the settings are good");
    let error = client.fetch(&Query::ca_roots()).await.expect_err("the token is not known");
    assert!(error.is_forbidden() && !error.to_string().contains("first"), "{error}");
    file.write("second");
    assert_eq!(client.fetch(&Query::ca_roots()).await.expect("an answer").value.active_root_id, "a");
}

#[tokio::test(start_paused = true)]
async fn the_default_policy_is_that_of_the_probe_else_of_the_header_else_deny() {
    const AUTHORIZE: &str = "/v1/agent/connect/authorize";
    let agent = Agent::start();
    let client = Client::new(&agent.settings()).expect("the settings are good");
    let by_intention = json!({ "Authorized": true, "Reason": "Matched intention: ALLOW default/* => default/db" });
    for (answer, header, allow) in [
        (json!({ "Authorized": false, "Reason": "Default intention policy" }), Some("allow"), false),
        (json!({ "Authorized": true, "Reason": "Default intention policy" }), Some("deny"), true),
        (json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" }), None, true),
        (json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" }), Some("deny"), false),
        (json!({ "Authorized": false, "Reason": "Default behavior configured by ACLs" }), Some("allow"), false),
        (json!({ "Authorized": true, "Reason": "ACLs disabled, access is allowed by default" }), Some("deny"), false),
        (by_intention.clone(), None, false),
        (by_intention.clone(), Some("allow"), true),
        (by_intention, Some("deny"), false),
    ] {
        let case = format!("{answer} {header:?}");
        agent.set(AUTHORIZE, answer);
        agent.default_policy(header.unwrap_or(""));
        let policy = client.fetch(&Query::default_policy("db")).await.expect("an answer").value;
        assert_eq!(policy.allow, allow, "{case}");
    }
}
