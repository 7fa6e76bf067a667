//! How exchanges end that do not come to their end by themselves.

use tokio::time::{Instant, sleep};

use super::*;

/// Millis are enough for what is expected to happen, and short enough to wait for.
const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What an app saw of its exchanges: answers that are being streamed, and how many it was told to give up.
struct Watched {
    at: SocketAddr,
    streams: mpsc::UnboundedReceiver<mpsc::UnboundedSender<Frame<Bytes>>>,
}

impl Watched {
    /// Answers with a stream that the test fills, and reads the request's body meanwhile.
    async fn start(http2: bool) -> Self {
        let (arrived, streams) = mpsc::unbounded_channel();
        let at = app(http2, move |request| {
            let arrived = arrived.clone();
            async move {
                let (send, body) = channel();
                let _ = arrived.send(send);
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    while let Some(Ok(_)) = body.frame().await {}
                });
                ok(body)
            }
        })
        .await;
        Self { at, streams }
    }

    async fn next(&mut self) -> mpsc::UnboundedSender<Frame<Bytes>> {
        timeout(TEST_TIMEOUT, self.streams.recv()).await.unwrap().unwrap()
    }
}

fn deny(pair: &Pair, protocol: Protocol, app: SocketAddr, intentions: Arc<Intentions>) {
    pair.server.snapshot.send_modify(|snapshot| {
        let Some(Bind::Tcp(mesh)) = snapshot.as_ref().unwrap().inbound.keys().next().cloned() else { unreachable!() };
        let service = Service { intentions, ..service(protocol, app) };
        *snapshot = Some(Arc::new(Snapshot { version: 2, ..with_service(mesh, service) }));
    });
}

/// What `web` may ask for, and everything else is denied.
fn only(path: &str) -> Arc<Intentions> {
    let conditions = Conditions { path: Some(PathRule::exact(path)), ..Conditions::default() };
    let permission = Permission { action: Action::Allow, conditions: Some(conditions), token: None };
    let intention = Intention {
        source_partition: "default".into(),
        source_namespace: "default".into(),
        source: "web".into(),
        destination: "db".into(),
        action: None,
        permissions: vec![permission],
        token: None,
        precedence: 9,
        hits: Hits::default(),
    };
    Arc::new(Intentions::new(
        vec![intention],
        DefaultPolicy { action: Action::Deny, source: "test".into(), hits: Hits::default() },
    ))
}

async fn first_frame(response: Response<Incoming>) -> Incoming {
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    let frame = timeout(TEST_TIMEOUT, body.frame()).await.unwrap().unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "first");
    body
}

#[tokio::test]
async fn a_stream_from_a_source_that_is_denied_now_breaks_off() {
    for protocol in ALL {
        let mut app = Watched::start(protocol != Protocol::Http).await;
        let pair = pair(protocol, app.at).await;
        let client = Client::of(protocol, pair.at).await;
        let (upload, sent) = channel();
        let mut request = request(Method::POST, "/", sent);
        if protocol == Protocol::Grpc {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        }
        upload.send(data("a beginning")).unwrap();
        let (response, stream) = tokio::join!(client.send(request), async {
            let stream = app.next().await;
            stream.send(data("first")).unwrap();
            stream
        });
        let mut body = first_frame(response).await;
        deny(&pair, protocol, app.at, allowing(Action::Deny));
        let end = timeout(TEST_TIMEOUT, body.frame()).await.unwrap();
        if protocol == Protocol::Grpc {
            let trailers = end.unwrap().unwrap().into_trailers().unwrap();
            assert_eq!(trailers["grpc-status"], "7");
        } else {
            assert!(end.unwrap().is_err(), "{protocol:?}: it must not look whole");
        }
        // An app that still writes learns of it so.
        let ends = async {
            while stream.send(data("more")).is_ok() {
                sleep(ms(20)).await;
            }
        };
        timeout(TEST_TIMEOUT, ends).await.expect("the app's side ends too");
    }
}

#[tokio::test]
async fn requests_under_way_are_judged_by_their_own_values() {
    for protocol in ALL {
        let mut app = Watched::start(protocol != Protocol::Http).await;
        let pair = pair(protocol, app.at).await;
        let mut open = Vec::new();
        for path in ["/kept", "/cut"] {
            let client = Client::of(protocol, pair.at).await;
            let (response, stream) = tokio::join!(client.send(get(path)), async {
                let stream = app.next().await;
                stream.send(data("first")).unwrap();
                stream
            });
            open.push((first_frame(response).await, stream, client));
        }
        deny(&pair, protocol, app.at, only("/kept"));
        let (mut cut, stream, _) = open.pop().unwrap();
        assert!(timeout(TEST_TIMEOUT, cut.frame()).await.unwrap().unwrap().is_err());
        timeout(TEST_TIMEOUT, stream.closed()).await.unwrap();
        let (mut kept, stream, _) = open.pop().unwrap();
        stream.send(data("second")).unwrap();
        let second = timeout(TEST_TIMEOUT, kept.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(second.into_data().unwrap(), "second");
    }
}

#[tokio::test]
async fn a_request_that_waits_for_its_answer_gets_a_refusal_when_it_is_denied() {
    for protocol in ALL {
        let (arrived, mut requests) = mpsc::unbounded_channel();
        let at = app(protocol != Protocol::Http, move |_| {
            let arrived = arrived.clone();
            async move {
                arrived.send(()).unwrap();
                std::future::pending().await
            }
        })
        .await;
        let pair = pair(protocol, at).await;
        let client = Client::of(protocol, pair.at).await;
        let (answer, ()) = tokio::join!(client.ask(get("/")), async {
            requests.recv().await.unwrap();
            deny(&pair, protocol, at, allowing(Action::Deny));
        });
        assert_eq!(answer.0, StatusCode::FORBIDDEN, "{protocol:?}");
    }
}

/// Sidecars whose time for an answer is short on both sides.
async fn hurried(protocol: Protocol, app: SocketAddr, time: Duration, idle: Duration) -> Pair {
    let (mesh, at) = (free(), free());
    let mut service = service(protocol, app);
    (service.local_request_timeout, service.local_idle_timeout) = (Some(time), Some(idle));
    let server = Sidecar::start(with_service(mesh, service));
    let upstream = routed(upstream(protocol, &[mesh]), |route| {
        (route.request_timeout, route.idle_timeout) = (Some(time), Some(idle));
    });
    let client = Sidecar::start(with_upstream(at, upstream));
    listening(mesh).await;
    listening(at).await;
    Pair { server, client, at }
}

#[tokio::test]
async fn the_time_for_an_answer_begins_when_the_request_is_complete() {
    for protocol in ALL {
        let (arrived, mut requests) = mpsc::unbounded_channel();
        let at = app(protocol != Protocol::Http, move |request| {
            let arrived = arrived.clone();
            async move {
                let whole = request.into_body().collect().await.unwrap().to_bytes();
                arrived.send(whole.len()).unwrap();
                if whole.ends_with(b"stall") { std::future::pending().await } else { ok(text("thanks")) }
            }
        })
        .await;
        let pair = hurried(protocol, at, ms(3000), ms(60_000)).await;
        let client = Client::of(protocol, pair.at).await;
        let (upload, body) = channel();
        let slow = tokio::spawn(async move { client.ask(request(Method::POST, "/", body)).await });
        for _ in 0..6 {
            upload.send(data("piece")).unwrap();
            sleep(ms(700)).await;
        }
        drop(upload);
        assert_eq!(slow.await.unwrap(), (StatusCode::OK, "thanks".into()), "{protocol:?}");
        assert_eq!(requests.recv().await, Some(30));
        let client = Client::of(protocol, pair.at).await;
        let (status, _) = client.ask(request(Method::POST, "/", text("stall"))).await;
        assert_eq!(status, StatusCode::GATEWAY_TIMEOUT, "{protocol:?}");
    }
}

#[tokio::test]
async fn an_upload_that_stands_still_ends_with_the_idle_time() {
    for protocol in ALL {
        let at = app(protocol != Protocol::Http, |request| async move {
            let _ = request.into_body().collect().await;
            ok(text("never"))
        })
        .await;
        let pair = hurried(protocol, at, ms(300), ms(1000)).await;
        let client = Client::of(protocol, pair.at).await;
        let (upload, body) = channel();
        upload.send(data("piece")).unwrap();
        let (status, _) = client.ask(request(Method::POST, "/", body)).await;
        assert_eq!(status, StatusCode::REQUEST_TIMEOUT, "{protocol:?}");
        drop(upload);
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_does_not_hold_the_app_for_ever() {
    for (protocol, time, idle) in
        ALL.into_iter().flat_map(|protocol| [(protocol, ms(1000), ms(60_000)), (protocol, ms(60_000), ms(1000))])
    {
        let mut app = Watched::start(protocol != Protocol::Http).await;
        let pair = hurried(protocol, app.at, time, idle).await;
        let client = Client::of(protocol, pair.at).await;
        let (response, stream) = tokio::join!(client.send(get("/")), app.next());
        let flood = stream.clone();
        let filled = tokio::spawn(async move {
            for _ in 0..400 {
                if flood.send(Frame::data(vec![b'x'; 64 * 1024].into())).is_err() {
                    return;
                }
            }
        });
        timeout(TEST_TIMEOUT, stream.closed()).await.expect("the app's side ends");
        filled.await.unwrap();
        assert!(timeout(TEST_TIMEOUT, response.into_body().collect()).await.unwrap().is_err());
    }
}

/// An app that says when it is asked and when nobody waits for its answer any more.
async fn patient(http2: bool, answer_after: Duration) -> (SocketAddr, mpsc::UnboundedReceiver<&'static str>) {
    struct Gone(mpsc::UnboundedSender<&'static str>);
    impl Drop for Gone {
        fn drop(&mut self) {
            let _ = self.0.send("over");
        }
    }
    let (arrived, events) = mpsc::unbounded_channel();
    let at = app(http2, move |_| {
        let gone = Gone(arrived.clone());
        async move {
            gone.0.send("requested").unwrap();
            sleep(answer_after).await;
            ok(text("late"))
        }
    })
    .await;
    (at, events)
}

#[tokio::test]
async fn what_a_client_asked_for_that_is_gone_is_given_up_and_one_that_sends_no_more_is_answered() {
    for (protocol, resets) in [(Protocol::Http, true), (Protocol::Http, false), (Protocol::Grpc, false)] {
        let (at, mut events) = patient(protocol != Protocol::Http, TEST_TIMEOUT * 2).await;
        let pair = hurried(protocol, at, TEST_TIMEOUT * 2, TEST_TIMEOUT * 2).await;
        let mut stream = TcpStream::connect(pair.at).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n").await.unwrap();
        assert_eq!(timeout(TEST_TIMEOUT, events.recv()).await.unwrap(), Some("requested"));
        let since = Instant::now();
        if resets {
            crate::proxy::socket::Socket::tcp(stream).abort();
        } else {
            drop(stream);
        }
        assert_eq!(timeout(TEST_TIMEOUT / 2, events.recv()).await.expect("it is given up"), Some("over"));
        assert!(since.elapsed() < TEST_TIMEOUT / 2);
    }
    let (at, _told) = patient(false, ms(2500)).await;
    let pair = pair(Protocol::Http, at).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(TEST_TIMEOUT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("late"), "{answer}");
}

/// One answer on a connection of HTTP/1: head, and a body of the length that the head says.
async fn answer(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let read = async {
        loop {
            let text = String::from_utf8_lossy(&answer).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
                if body.len() >= length.parse().unwrap() {
                    return;
                }
            }
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "{text}");
        }
    };
    timeout(TEST_TIMEOUT, read).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn after_an_early_answer_the_connection_goes_on_or_the_answer_says_that_it_does_not() {
    let app = app(false, |_| async { ok(text("fine")) }).await;
    let pair = pair_with(Protocol::Http, app, |upstream| {
        routed(upstream, |route| route.matches.path = PathMatch::Exact(Text::new("/fine", false)))
    })
    .await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    // Refused with all of the body there, or on its way.
    for late in [false, true] {
        let (head, body) = ("POST /none HTTP/1.1\r\nHost: shop\r\nContent-Length: 20000\r\n\r\n", "x".repeat(20_000));
        stream.write_all(head.as_bytes()).await.unwrap();
        if late {
            sleep(ms(50)).await;
        }
        stream.write_all(body.as_bytes()).await.unwrap();
        let refused = answer(&mut stream).await;
        assert!(refused.starts_with("HTTP/1.1 404") && !refused.contains("connection: close"), "{refused}");
        stream.write_all(b"GET /fine HTTP/1.1\r\nHost: shop\r\n\r\n").await.unwrap();
        assert!(answer(&mut stream).await.ends_with("fine"));
    }
    // Too long to be read for nothing, or never sent: said so.
    for head in ["Content-Length: 10000000", "Content-Length: 5\r\nExpect: 100-continue", "Transfer-Encoding: chunked"]
    {
        let mut stream = TcpStream::connect(pair.at).await.unwrap();
        stream.write_all(format!("POST /none HTTP/1.1\r\nHost: shop\r\n{head}\r\n\r\n").as_bytes()).await.unwrap();
        let refused = answer(&mut stream).await;
        assert!(refused.starts_with("HTTP/1.1 404") && refused.contains("connection: close"), "{refused}");
        let mut rest = Vec::new();
        timeout(TEST_TIMEOUT, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert!(rest.is_empty());
    }
}

#[tokio::test]
async fn an_answer_of_the_app_before_the_request_is_whole_says_that_it_is_the_last() {
    let app = app(false, |_| async { ok(text("early")) }).await;
    let pair = pair(Protocol::Http, app).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
    let early = answer(&mut stream).await;
    assert!(early.contains("connection: close"), "{early}");
}
