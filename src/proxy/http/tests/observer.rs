//! What the observer is told.

use super::*;

/// Waits until the observer of a sidecar was told all of these, in this order, whatever else it was told.
async fn observed(sidecar: &Sidecar, expected: &[&str]) {
    let all_seen = async {
        loop {
            let events = sidecar.observer.recorded();
            let mut rest = events.iter();
            if expected.iter().all(|event| rest.any(|seen| seen.starts_with(event))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let in_time = timeout(TEST_TIMEOUT, all_seen).await;
    assert!(in_time.is_ok(), "{expected:#?} not in {:#?}", sidecar.observer.recorded());
}

#[tokio::test]
async fn the_observer_is_told_of_each_step_of_a_request_with_access_logs_off() {
    let app = app(false, |_| async move { ok(text("x")) }).await;
    let pair = pair(Protocol::Http, app).await;
    let asker = Client::http1(pair.at).await;
    assert_eq!(asker.ask(get("/a?b")).await.0, StatusCode::OK);
    drop(asker);
    let client = [
        "accepted Outbound",
        "request /a?b",
        "attempt",
        "connect db.x.consul",
        "connected",
        "attempt Responded(200)",
        "response 200",
        "finished Ended",
        "connection ",
    ];
    observed(&pair.client, &client).await;
    let server = [
        "accepted Inbound",
        "handshake",
        "request /a?b",
        "decided ",
        "attempt",
        "connect local_app",
        "connected",
        "attempt Responded(200)",
        "response 200",
        "finished Ended",
    ];
    observed(&pair.server, &server).await;
}

#[tokio::test]
async fn the_observer_is_told_what_failed_and_at_which_limit() {
    let app = app(false, |_| async move { ok(text("x")) }).await;
    // Nobody listens there.
    let instance = free();
    let gone =
        pair_with(Protocol::Http, app, |known| Upstream { name: known.name, ..upstream(Protocol::Http, &[instance]) });
    let gone = gone.await;
    assert_eq!(Client::http1(gone.at).await.ask(get("/gone")).await.0, StatusCode::SERVICE_UNAVAILABLE);
    let failed = [
        "request /gone",
        "attempt",
        "connect db.x.consul",
        "not connected: ",
        "attempt Failed { outcome: Unreachable",
        "response 503",
        "finished Unreachable",
    ];
    observed(&gone.client, &failed).await;

    let limits = Limits { max_concurrent_requests: Some(0), ..Limits::default() };
    let limited = pair_with(Protocol::Http, app, |upstream| Upstream { limits, ..upstream }).await;
    assert_eq!(Client::http1(limited.at).await.ask(get("/limited")).await.0, StatusCode::SERVICE_UNAVAILABLE);
    let overflow = "overflow of max_concurrent_requests of db";
    observed(&limited.client, &["request /limited", overflow, "response 503", "finished Overflow"]).await;
}

#[tokio::test]
async fn a_problem_keeps_the_beginning_of_a_path_and_no_query() {
    let app = app(false, |_| async move { ok(text("x")) }).await;
    let limits = Limits { max_concurrent_requests: Some(0), ..Limits::default() };
    let limited = pair_with(Protocol::Http, app, |upstream| Upstream { limits, ..upstream }).await;
    let target = format!("/{}?access_token=secret", "a".repeat(20_000));
    assert_eq!(Client::http1(limited.at).await.ask(get(&target)).await.0, StatusCode::SERVICE_UNAVAILABLE);
    observed(&limited.client, &["finished Overflow"]).await;
    let [problem] = &limited.client.observer.problems().newest()[..] else { panic!("one problem") };
    let what = problem.what.as_deref().unwrap();
    assert!(what.starts_with("GET /aaa") && what.len() < 1_000, "{} bytes", what.len());
    assert!(!problem.cause.contains("secret"), "{}", problem.cause);
}

#[tokio::test]
async fn the_observer_is_told_of_connections_of_bytes_and_of_their_denial() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(b"hello").await;
        }
    });
    let pair = pair(Protocol::Tcp, app).await;
    let mut answer = Vec::new();
    let mut asker = TcpStream::connect(pair.at).await.unwrap();
    asker.shutdown().await.unwrap();
    timeout(TEST_TIMEOUT, asker.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"hello");
    observed(&pair.client, &["accepted Outbound", "connect db.x.consul", "connected", "connection Ended"]).await;
    let served = ["accepted Inbound", "handshake", "decided ", "connect local_app", "connected", "connection Ended"];
    observed(&pair.server, &served).await;

    let Some(Bind::Tcp(mesh)) =
        pair.server.snapshot.borrow().as_ref().and_then(|now| now.inbound.keys().next().cloned())
    else {
        unreachable!("it has a public listener on TCP");
    };
    let denying = Service { intentions: allowing(Action::Deny), ..service(Protocol::Tcp, app) };
    pair.server.snapshot.send_replace(Some(Arc::new(Snapshot { version: 2, ..with_service(mesh, denying) })));
    let denied = async {
        while !pair.server.observer.recorded().iter().any(|event| event == "connection Denied") {
            let mut asker = TcpStream::connect(pair.at).await.unwrap();
            let _ = asker.shutdown().await;
            let _ = asker.read_to_end(&mut Vec::new()).await;
        }
    };
    timeout(TEST_TIMEOUT, denied).await.expect("it is denied in time");
    observed(&pair.server, &["accepted Inbound", "decided ", "connection Denied"]).await;
    // The same in audit mode, and enforced again.
    let audited = Service { intentions: allowing(Action::Deny), audit: true, ..service(Protocol::Tcp, app) };
    pair.server.snapshot.send_replace(Some(Arc::new(Snapshot { version: 3, ..with_service(mesh, audited) })));
    let let_through = async {
        let mut answer = Vec::new();
        while answer != b"hello" {
            answer.clear();
            let mut asker = TcpStream::connect(pair.at).await.unwrap();
            let _ = asker.shutdown().await;
            let _ = asker.read_to_end(&mut answer).await;
        }
    };
    timeout(TEST_TIMEOUT, let_through).await.expect("it is let through in time");
    observed(&pair.server, &["accepted Inbound", "would deny: ", "connect local_app", "connection Ended"]).await;
}
