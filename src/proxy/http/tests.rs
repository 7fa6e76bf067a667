//! Two sidecars in this process, with an app behind one and a client before the other.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, TE, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::access_log;
use crate::drain::Stage;
use crate::fetch::FetchRequests;
use crate::proxy::fixture::*;
use crate::snapshot::*;
use crate::testing::TempFile;
use crate::testing::ca::uri;

mod endings;
mod observer;

type AnyBody = BoxBody<Bytes, hyper::Error>;

/// All requests by one route with these settings.
fn routed(mut upstream: Upstream, change: impl FnOnce(&mut Route)) -> Upstream {
    let Node::Resolver(resolver) = upstream.chain.start else { unreachable!("it was built so") };
    let mut route = Route {
        name: "all".into(),
        matches: RouteMatch::default(),
        prefix_rewrite: None,
        request_timeout: Some(REQUEST_TIMEOUT),
        idle_timeout: Some(IDLE_TIMEOUT),
        sets_request_timeout: false,
        sets_idle_timeout: false,
        service: String::new(),
        retries: None,
        request_edits: Edits::default(),
        response_edits: Edits::default(),
        next: Next::Resolver(resolver),
    };
    change(&mut route);
    upstream.chain.start = Node::Router(vec![route]);
    upstream
}

/// A sidecar before the app, one before the client, and where the client connects.
struct Pair {
    server: Sidecar,
    client: Sidecar,
    at: SocketAddr,
}

async fn pair(protocol: Protocol, app: SocketAddr) -> Pair {
    pair_with(protocol, app, |upstream| upstream).await
}

async fn pair_with(protocol: Protocol, app: SocketAddr, change: impl FnOnce(Upstream) -> Upstream) -> Pair {
    let (mesh, at) = (free(), free());
    let server = Sidecar::start(with_service(mesh, service(protocol, app)));
    let client = Sidecar::start(with_upstream(at, change(upstream(protocol, &[mesh]))));
    listening(mesh).await;
    listening(at).await;
    Pair { server, client, at }
}

/// An app of either version of HTTP.
async fn app<F, R>(http2: bool, answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<AnyBody>> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            tokio::spawn(async move {
                let io = TokioIo::new(stream);
                if http2 {
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(io, service).await;
                } else {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(io, service).with_upgrades().await;
                }
            });
        }
    });
    at
}

fn text(text: impl Into<Bytes>) -> AnyBody {
    Full::new(text.into()).map_err(|never| match never {}).boxed()
}

fn ok(body: AnyBody) -> Response<AnyBody> {
    Response::new(body)
}

fn get(path: &str) -> Request<AnyBody> {
    request(Method::GET, path, text(""))
}

fn request(method: Method, path: &str, body: AnyBody) -> Request<AnyBody> {
    let uri = format!("http://shop.example{path}");
    Request::builder().method(method).uri(uri).header("host", "shop.example").body(body).unwrap()
}

/// A body whose frames are sent through a channel.
struct Frames(mpsc::UnboundedReceiver<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

fn channel() -> (mpsc::UnboundedSender<Frame<Bytes>>, AnyBody) {
    let (send, frames) = mpsc::unbounded_channel();
    (send, Frames(frames).boxed())
}

fn data(bytes: &'static str) -> Frame<Bytes> {
    Frame::data(bytes.into())
}

fn trailers(name: &'static str, value: &'static str) -> Frame<Bytes> {
    Frame::trailers([(name.parse().unwrap(), HeaderValue::from_static(value))].into_iter().collect())
}

/// A client of either version of HTTP, on one connection.
#[derive(Clone)]
enum Client {
    Http1(Arc<tokio::sync::Mutex<http1::SendRequest<AnyBody>>>),
    Http2(http2::SendRequest<AnyBody>),
}

impl Client {
    async fn http1(to: SocketAddr) -> Self {
        let io = TokioIo::new(TcpStream::connect(to).await.unwrap());
        let (sender, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self::Http1(Arc::new(tokio::sync::Mutex::new(sender)))
    }

    async fn http2(to: SocketAddr) -> Self {
        let io = TokioIo::new(TcpStream::connect(to).await.unwrap());
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        Self::Http2(sender)
    }

    async fn of(protocol: Protocol, to: SocketAddr) -> Self {
        if protocol == Protocol::Http { Self::http1(to).await } else { Self::http2(to).await }
    }

    async fn try_send(&self, request: Request<AnyBody>) -> hyper::Result<Response<Incoming>> {
        let sent = async {
            match self {
                Self::Http1(sender) => {
                    let mut sender = sender.lock().await;
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Self::Http2(sender) => sender.clone().send_request(request).await,
            }
        };
        timeout(TEST_TIMEOUT, sent).await.expect("an answer comes in time")
    }

    async fn send(&self, request: Request<AnyBody>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    /// Status and whole body.
    async fn ask(&self, request: Request<AnyBody>) -> (StatusCode, Bytes) {
        let (head, body) = self.send(request).await.into_parts();
        (head.status, body.collect().await.unwrap().to_bytes())
    }
}

const ALL: [Protocol; 3] = [Protocol::Http, Protocol::Http2, Protocol::Grpc];

#[tokio::test]
async fn bodies_and_trailers_stream_both_ways_in_every_version() {
    for protocol in ALL {
        let http2 = protocol != Protocol::Http;
        // Sends back each piece as it comes, and the trailers.
        let app = app(http2, |request| async move {
            assert!(request.headers().get(TE).is_some_and(|te| te == "trailers"));
            let (send, body) = channel();
            tokio::spawn(async move {
                let mut body = request.into_body();
                while let Some(Ok(frame)) = body.frame().await {
                    let _ = send.send(frame);
                }
            });
            let mut response = ok(body);
            response.headers_mut().insert("trailer", HeaderValue::from_static("x-end"));
            response
        })
        .await;
        let pair = pair(protocol, app).await;
        let client = Client::of(protocol, pair.at).await;
        let (send, body) = channel();
        let mut request = request(Method::POST, "/echo", body);
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        request.headers_mut().insert("trailer", HeaderValue::from_static("x-end"));
        send.send(data("first")).unwrap();
        let response = client.send(request).await;
        let mut body = response.into_body();
        for piece in ["first", "second", "third"] {
            if piece != "first" {
                send.send(data(piece)).unwrap();
            }
            let frame = timeout(TEST_TIMEOUT, body.frame()).await.unwrap().unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), piece, "{protocol:?}");
        }
        send.send(trailers("x-end", "well")).unwrap();
        drop(send);
        let end = timeout(TEST_TIMEOUT, body.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(end.into_trailers().unwrap()["x-end"], "well", "{protocol:?}");
        assert!(body.frame().await.is_none());
    }
}

#[tokio::test]
async fn one_listener_takes_both_versions_and_the_app_gets_its_own() {
    for (protocol, version) in [(Protocol::Http, Version::HTTP_11), (Protocol::Grpc, Version::HTTP_2)] {
        let app = app(protocol != Protocol::Http, |request| async move {
            let host = request.headers().get("host").map(|host| host.to_str().unwrap().to_owned());
            let host = host.or_else(|| request.uri().authority().map(ToString::to_string));
            ok(text(format!("{:?} {} {}", request.version(), host.unwrap(), request.uri().path())))
        })
        .await;
        let pair = pair(protocol, app).await;
        for client in [Client::http1(pair.at).await, Client::http2(pair.at).await] {
            let (status, body) = client.ask(get("/where")).await;
            assert_eq!((status, body), (StatusCode::OK, format!("{version:?} shop.example /where").into()));
        }
    }
}

#[tokio::test]
async fn what_is_for_one_hop_stays_there_and_what_the_app_must_know_is_added() {
    let app = app(false, |request| async move {
        let headers = request.headers();
        for gone in ["keep-alive", "proxy-connection", "x-hop", "upgrade", "http2-settings", "te"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
        assert_eq!(headers["x-forwarded-proto"], "http");
        assert_eq!(headers["x-request-id"].len(), 36);
        assert_eq!(headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"]);
        let element = headers["x-forwarded-client-cert"].to_str().unwrap();
        assert!(element.starts_with(&format!("By={}", uri("db"))) && element.ends_with(&format!("URI={}", uri("web"))));
        let mut response = ok(text("fine"));
        for (name, value) in [("connection", "x-hop, keep-alive"), ("x-hop", "1"), ("keep-alive", "timeout=5")] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    })
    .await;
    let pair = pair(Protocol::Http, app).await;
    let client = Client::http1(pair.at).await;
    let mut request = get("/");
    for (name, value) in [
        ("connection", "x-hop, upgrade, http2-settings"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAMAAABkAAQAAP__"),
        ("te", "gzip"),
        ("cookie", "a=1"),
        ("x-forwarded-client-cert", "By=spiffe://made/up"),
    ] {
        request.headers_mut().append(name, HeaderValue::from_static(value));
    }
    request.headers_mut().append("cookie", HeaderValue::from_static("b=2"));
    let response = client.send(request).await;
    assert_eq!(response.status(), StatusCode::OK);
    for gone in ["connection", "x-hop", "keep-alive", "server", "date"] {
        assert!(gone == "date" || !response.headers().contains_key(gone), "{gone}");
    }
}

#[tokio::test]
async fn an_upgraded_connection_carries_whatever_both_sides_say() {
    let app = app(false, |mut request| async move {
        assert_eq!(request.headers()[UPGRADE], "echo");
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut io = TokioIo::new(upgraded.await.unwrap());
            io.write_all(b"hello").await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(io);
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut response = ok(text(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static("echo"));
        response
    })
    .await;
    let pair = pair(Protocol::Http, app).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    let head = b"GET /chat HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n\0first";
    stream.write_all(head).await.unwrap();
    let mut answer = Vec::new();
    let read = async {
        while !answer.ends_with(b"hello\0first") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
        }
        assert!(answer.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&answer));
        stream.write_all(b"second").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"second");
    };
    timeout(TEST_TIMEOUT, read).await.unwrap();
}

#[tokio::test]
async fn an_upgraded_connection_is_cut_when_its_source_is_denied() {
    let app = app(false, |mut request| async move {
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            std::future::pending::<()>().await;
            drop(upgraded.await)
        });
        let mut response = ok(text(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static("echo"));
        response
    })
    .await;
    let (mesh, at) = (free(), free());
    let server = Sidecar::start(with_service(mesh, service(Protocol::Http, app)));
    let _client = Sidecar::start(with_upstream(at, upstream(Protocol::Http, &[mesh])));
    listening(mesh).await;
    listening(at).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let talk = async {
        while !answer.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
        }
        assert!(answer.starts_with(b"HTTP/1.1 101 "));
        let denying = Service { intentions: allowing(Action::Deny), ..service(Protocol::Http, app) };
        server.snapshot.send_replace(Some(Arc::new(with_service(mesh, denying))));
        assert_eq!(stream.read_buf(&mut answer).await.unwrap_or(0), 0);
    };
    timeout(TEST_TIMEOUT, talk).await.expect("the connection ends");
}

#[tokio::test]
async fn connections_are_used_again_and_a_limit_of_them_makes_requests_wait() {
    let (arrived, mut connections) = mpsc::unbounded_channel();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            arrived.send(()).unwrap();
            let service = service_fn(|_| async { Ok::<_, Infallible>(ok(text("here"))) });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    for max_connections in [None, Some(1)] {
        let limits = Limits { max_connections, ..Limits::default() };
        let pair = pair_with(Protocol::Http, at, |upstream| Upstream { limits, ..upstream }).await;
        let clients = [Client::http1(pair.at).await, Client::http1(pair.at).await, Client::http1(pair.at).await];
        for _ in 0..50 {
            for client in &clients {
                assert_eq!(client.ask(get("/")).await.0, StatusCode::OK);
            }
            let [a, b, c] = &clients;
            let together = tokio::join!(a.ask(get("/")), b.ask(get("/")), c.ask(get("/")));
            assert!([together.0, together.1, together.2].iter().all(|(status, _)| *status == StatusCode::OK));
        }
    }
    let mut made = 0;
    while connections.try_recv().is_ok() {
        made += 1;
    }
    assert!(made <= 12, "{made} connections to the app for six clients");
}

#[tokio::test]
async fn no_connection_at_all_is_an_overflow() {
    let app = app(false, |_| async { ok(text("here")) }).await;
    for limits in [
        Limits { max_connections: Some(0), ..Limits::default() },
        Limits { max_concurrent_requests: Some(0), ..Limits::default() },
        Limits { max_pending_requests: Some(0), ..Limits::default() },
    ] {
        let pair = pair_with(Protocol::Http, app, |upstream| Upstream { limits, ..upstream }).await;
        let response = Client::http1(pair.at).await.send(get("/")).await;
        assert_eq!(
            (response.status(), &response.headers()["x-envoy-overloaded"]),
            (StatusCode::SERVICE_UNAVAILABLE, &HeaderValue::from_static("true"))
        );
        assert!(response.into_body().collect().await.unwrap().to_bytes().ends_with(b"reset reason: overflow"));
    }
}

#[tokio::test]
async fn an_upgrade_that_the_app_declines_is_an_ordinary_request_and_the_last_one() {
    let app = app(false, |_| async { ok(text("no")) }).await;
    let pair = pair(Protocol::Http, app).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    let head = "GET /chat HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    stream.write_all(format!("{head}GET /smuggled HTTP/1.1\nHost: shop\n\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(TEST_TIMEOUT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nno"), "{answer}");
}

#[tokio::test]
async fn an_instance_that_is_gone_costs_no_request() {
    for protocol in ALL {
        let http2 = protocol != Protocol::Http;
        let app = app(http2, |_| async { ok(text("here")) }).await;
        let (gone, mesh, at) = (free(), free(), free());
        let _server = Sidecar::start(with_service(mesh, service(protocol, app)));
        let _client = Sidecar::start(with_upstream(at, upstream(protocol, &[gone, mesh])));
        listening(mesh).await;
        listening(at).await;
        let client = Client::of(protocol, at).await;
        for _ in 0..20 {
            assert_eq!(client.ask(request(Method::POST, "/", text("once"))).await.0, StatusCode::OK, "{protocol:?}");
        }
    }
}

#[tokio::test]
async fn a_sidecar_that_ends_between_requests_costs_none() {
    for protocol in ALL {
        let http2 = protocol != Protocol::Http;
        let app = app(http2, |_| async { ok(text("here")) }).await;
        let (first, second, at) = (free(), free(), free());
        let servers = [first, second].map(|mesh| Sidecar::start(with_service(mesh, service(protocol, app))));
        let requests = RequestSettings { expose_cause: true, ..RequestSettings::default() };
        let upstream = Upstream { requests, ..upstream(protocol, &[first, second]) };
        let _client = Sidecar::start(with_upstream(at, upstream));
        for listener in [first, second, at] {
            listening(listener).await;
        }
        let client = Client::of(protocol, at).await;
        for turn in 0..60 {
            if turn == 20 {
                servers[0].trigger.advance(Stage::Draining);
            }
            let response = client.send(request(Method::POST, "/", text("once"))).await;
            assert_eq!(response.status(), StatusCode::OK, "{protocol:?}: {:?}", response.headers());
            response.into_body().collect().await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_may_have_been_received_is_sent_again_only_when_asked_for() {
    for (asked, expected) in [(false, 1), (true, 3)] {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let app = app(false, move |request| {
            let count = Arc::clone(&counted);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(body, "kept");
                let mut response = ok(text("answer"));
                if count.fetch_add(1, Ordering::SeqCst) < 2 {
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                }
                response
            }
        })
        .await;
        let policy = RetryPolicy::new(3, vec![], vec![503]).filter(|_| asked);
        let pair = pair_with(Protocol::Http, app, |upstream| routed(upstream, |route| route.retries = policy)).await;
        let status = Client::http1(pair.at).await.ask(request(Method::POST, "/", text("kept"))).await.0;
        let wanted = if asked { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        assert_eq!((status, count.load(Ordering::SeqCst)), (wanted, expected));
    }
}

#[tokio::test]
async fn a_slow_answer_is_a_504_and_a_deadline_to_grpc() {
    for protocol in [Protocol::Http, Protocol::Grpc] {
        let app = app(protocol != Protocol::Http, |_| std::future::pending()).await;
        let limit = Some(Duration::from_millis(100));
        let pair = pair_with(protocol, app, |upstream| routed(upstream, |route| route.request_timeout = limit)).await;
        let mut request = get("/");
        let grpc = protocol == Protocol::Grpc;
        if grpc {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        }
        let response = Client::of(protocol, pair.at).await.send(request).await;
        if grpc {
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()["grpc-status"], "14");
            assert_eq!(response.headers()["grpc-message"], "upstream request timeout");
        } else {
            assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "upstream request timeout");
        }
    }
}

#[tokio::test]
async fn a_try_has_a_time_of_its_own_and_the_next_goes_elsewhere() {
    let slow = app(false, |_| std::future::pending()).await;
    let quick = app(false, |_| async { ok(text("quick")) }).await;
    let (first, second) = (free(), free());
    let _servers = [(first, slow), (second, quick)]
        .map(|(mesh, app)| Sidecar::start(with_service(mesh, service(Protocol::Http, app))));
    let requests = RequestSettings {
        per_try_timeout: Some(Duration::from_millis(700)),
        expose_cause: true,
        ..RequestSettings::default()
    };
    for asked in [false, true] {
        let at = free();
        let upstream = Upstream { requests: requests.clone(), ..upstream(Protocol::Http, &[first, second]) };
        let policy = RetryPolicy::new(1, vec![RetryOn::GatewayError], vec![]).filter(|_| asked);
        let _client = Sidecar::start(with_upstream(at, routed(upstream, |route| route.retries = policy)));
        listening(at).await;
        let client = Client::http1(at).await;
        let mut late = 0;
        for _ in 0..8 {
            let response = client.send(get("/")).await;
            if response.status() == StatusCode::GATEWAY_TIMEOUT {
                assert!(response.headers()["x-lictor-cause"].to_str().unwrap().contains("per_try_timeout"));
                late += 1;
            }
            response.into_body().collect().await.unwrap();
        }
        assert_eq!(late > 0, !asked, "{late} were late");
    }
}

#[tokio::test]
async fn a_connection_waits_until_it_is_known_where_its_upstream_leads() {
    let app = app(false, |_| async { ok(text("here")) }).await;
    let (mesh, at) = (free(), free());
    let _server = Sidecar::start(with_service(mesh, service(Protocol::Http, app)));
    let known = upstream(Protocol::Http, &[mesh]);
    let fetches = FetchRequests::default();
    let unknown = |awaited| Upstream::unknown(known.name.clone(), awaited);
    let client = Sidecar::start(with_upstream(at, unknown(Some(Arc::new(fetches.request())))));
    listening(at).await;
    let waiting = tokio::spawn(async move { Client::http1(at).await.send(get("/")).await.status() });
    fetches.notified().await;
    assert!(!waiting.is_finished());
    client.snapshot.send_replace(Some(Arc::new(with_upstream(at, known))));
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
}

#[tokio::test]
async fn a_connection_to_an_upstream_that_leads_nowhere_ends_at_once() {
    let at = free();
    let _client = Sidecar::start(with_upstream(at, Upstream::unknown("db".into(), None)));
    listening(at).await;
    let mut connection = TcpStream::connect(at).await.unwrap();
    assert_eq!(connection.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_new_denial_reaches_the_next_request_on_an_open_connection() {
    for protocol in ALL {
        let app = app(protocol != Protocol::Http, |_| async { ok(text("here")) }).await;
        let (mesh, at) = (free(), free());
        let server = Sidecar::start(with_service(mesh, service(protocol, app)));
        let _client = Sidecar::start(with_upstream(at, upstream(protocol, &[mesh])));
        listening(mesh).await;
        listening(at).await;
        let client = Client::of(protocol, at).await;
        assert_eq!(client.ask(get("/")).await.0, StatusCode::OK);
        let denying = Service { intentions: allowing(Action::Deny), ..service(protocol, app) };
        server.snapshot.send_replace(Some(Arc::new(with_service(mesh, denying))));
        let denied = async {
            loop {
                let (status, body) = client.ask(get("/")).await;
                if status == StatusCode::FORBIDDEN {
                    return body;
                }
            }
        };
        assert_eq!(timeout(TEST_TIMEOUT, denied).await.unwrap(), "RBAC: access denied");
        server.snapshot.send_replace(Some(Arc::new(with_service(mesh, service(protocol, app)))));
        let allowed = async { while client.ask(get("/")).await.0 != StatusCode::OK {} };
        timeout(TEST_TIMEOUT, allowed).await.unwrap();
    }
}

#[tokio::test]
async fn requests_in_flight_are_answered_when_both_sidecars_end_together() {
    for protocol in ALL {
        let (begun, mut begin) = mpsc::unbounded_channel();
        let go = Arc::new(tokio::sync::Notify::new());
        let gate = Arc::clone(&go);
        let app = app(protocol != Protocol::Http, move |_| {
            let (begun, gate) = (begun.clone(), Arc::clone(&gate));
            async move {
                let _ = begun.send(());
                gate.notified().await;
                ok(text("answered"))
            }
        })
        .await;
        let pair = pair(protocol, app).await;
        let client = Client::of(protocol, pair.at).await;
        let asked = tokio::spawn(async move { client.ask(get("/slow")).await });
        begin.recv().await.unwrap();
        pair.server.trigger.advance(Stage::Draining);
        pair.client.trigger.advance(Stage::Draining);
        let refused = async { while TcpStream::connect(pair.at).await.is_ok() {} };
        timeout(TEST_TIMEOUT, refused).await.expect("nothing new is accepted");
        go.notify_one();
        assert_eq!(asked.await.unwrap(), (StatusCode::OK, "answered".into()), "{protocol:?}");
        timeout(TEST_TIMEOUT, pair.client.trigger.drained()).await.expect("the client's sidecar is done");
        timeout(TEST_TIMEOUT, pair.server.trigger.drained()).await.expect("the server's sidecar is done");
    }
}

#[tokio::test]
async fn a_client_that_waits_for_a_go_ahead_gets_it() {
    let app =
        app(false, |request| async move { ok(text(request.into_body().collect().await.unwrap().to_bytes())) }).await;
    let pair = pair(Protocol::Http, app).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    let head =
        b"POST / HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut answer = Vec::new();
    let talk = async {
        while !answer.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
        }
        assert_eq!(answer, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(b"body").await.unwrap();
        answer.clear();
        stream.read_to_end(&mut answer).await.unwrap();
    };
    timeout(TEST_TIMEOUT, talk).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"\r\n\r\nbody"));
}

#[tokio::test]
async fn a_reader_that_stops_stops_the_writer() {
    for protocol in ALL {
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&sent);
        let app = app(protocol != Protocol::Http, move |_| {
            let sent = Arc::clone(&counted);
            async move { ok(Endless(sent).boxed()) }
        })
        .await;
        let pair = pair(protocol, app).await;
        let client = Client::of(protocol, pair.at).await;
        let response = client.send(get("/endless")).await;
        // It goes on for as long as buffers take it, then stands still.
        let mut before = usize::MAX;
        let still = async {
            while before != sent.load(Ordering::SeqCst) {
                before = sent.load(Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        };
        timeout(TEST_TIMEOUT, still).await.unwrap();
        assert!(before < 64 << 20, "{protocol:?}: {before} bytes are on their way");
        drop(response);
    }
}

/// Zeros without end, counted.
struct Endless(Arc<AtomicUsize>);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        const PIECE: &[u8] = &[0; 16 * 1024];
        self.0.fetch_add(PIECE.len(), Ordering::SeqCst);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(PIECE)))))
    }
}

#[tokio::test]
async fn every_printable_byte_goes_on_as_it_came() {
    let raw = Normalization { path: false, ..Normalization::default() };
    for protocol in [Protocol::Http, Protocol::Http2] {
        let http2 = protocol != Protocol::Http;
        let app =
            app(http2, |request| async move { ok(text(request.uri().path_and_query().unwrap().to_string())) }).await;
        let (mesh, at) = (free(), free());
        let service = Service { normalization: raw, ..service(protocol, app) };
        let _server = Sidecar::start(with_service(mesh, service));
        let _client = Sidecar::start(with_upstream(at, upstream(protocol, &[mesh])));
        listening(mesh).await;
        listening(at).await;
        let bytes: String = (b'!'..=b'~').filter(|byte| !b"#?".contains(byte)).map(char::from).collect();
        let target = format!("/{bytes}?{bytes}?");
        for client in [Client::http1(at).await, Client::http2(at).await] {
            assert_eq!(client.ask(get(&target)).await, (StatusCode::OK, target.clone().into()), "{protocol:?}");
        }
    }
}

#[tokio::test]
async fn a_target_is_normalised_where_it_is_judged_and_nowhere_else() {
    let app = app(false, |request| async move { ok(text(request.uri().path_and_query().unwrap().to_string())) }).await;
    for (path, arrives) in [(true, "/b/%5E%3C%3E?\"<>`%61"), (false, "/a/..\\%62/./^<>?\"<>`%61")] {
        let (mesh, at) = (free(), free());
        let normalization = Normalization { path, ..Normalization::default() };
        let _server = Sidecar::start(with_service(mesh, Service { normalization, ..service(Protocol::Http, app) }));
        let _client = Sidecar::start(with_upstream(at, upstream(Protocol::Http, &[mesh])));
        listening(mesh).await;
        listening(at).await;
        let client = Client::http1(at).await;
        assert_eq!(client.ask(get("/a/..\\%62/./^<>?\"<>`%61")).await, (StatusCode::OK, arrives.into()));
    }
}

#[tokio::test]
async fn an_answer_that_switches_protocols_unasked_goes_no_further() {
    let switch = |_| async {
        let mut response = ok(text(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, HeaderValue::from_static("echo"));
        response
    };
    let app = app(false, switch).await;
    let pair = pair(Protocol::Http, app).await;
    for client in [Client::http1(pair.at).await, Client::http2(pair.at).await] {
        assert_eq!(client.ask(get("/")).await.0, StatusCode::BAD_GATEWAY);
    }
}

fn exposed(bind: SocketAddr, paths: &[(&str, SocketAddr, Protocol)]) -> Snapshot {
    let path = |(path, to, protocol): &(&str, SocketAddr, Protocol)| {
        let app = LocalApp::Tcp(address(*to));
        ((*path).to_owned(), ExposedPath { app, protocol: *protocol })
    };
    let bind = Bind::Tcp(bind);
    let exposed = Arc::new(Exposed {
        bind: bind.clone(),
        paths: paths.iter().map(path).collect(),
        connect_timeout: Duration::from_secs(5),
        request_timeout: Some(Duration::from_secs(15)),
        idle_timeout: None,
    });
    Snapshot { version: 1, exposed: [(bind, exposed)].into(), ..Snapshot::default() }
}

#[tokio::test]
async fn exposed_paths_and_no_others_are_reached_without_the_mesh() {
    let shown = |request: Request<Incoming>| async move {
        let certificate = request.headers().contains_key("x-forwarded-client-cert");
        ok(text(format!(
            "{} {} {certificate}",
            request.uri().path_and_query().unwrap(),
            request.headers().contains_key("upgrade")
        )))
    };
    let (plain, second) = (app(false, shown).await, app(true, shown).await);
    let at = free();
    let http = Protocol::Http;
    let sidecar = Sidecar::start(exposed(at, &[("/health", plain, http), ("/grpc", second, Protocol::Http2)]));
    listening(at).await;
    for client in [Client::http1(at).await, Client::http2(at).await] {
        for (path, expected) in [
            ("/health", Some("/health false false")),
            ("/health?full=1", Some("/health?full=1 false false")),
            ("/x/../health", Some("/health false false")),
            ("/grpc", Some("/grpc false false")),
            ("/health/", None),
            ("/healthy", None),
            ("/Health", None),
            ("/", None),
            ("/health/../admin", None),
        ] {
            let mut request = get(path);
            request.headers_mut().insert("x-forwarded-client-cert", HeaderValue::from_static("URI=spiffe://x/forged"));
            let (status, body) = client.ask(request).await;
            let wanted = expected.map_or((StatusCode::NOT_FOUND, ""), |text| (StatusCode::OK, text));
            assert_eq!((status, &body[..]), (wanted.0, wanted.1.as_bytes()), "{path}");
        }
    }
    // Another path takes the place of one on an open connection.
    let client = Client::http1(at).await;
    assert_eq!(client.ask(get("/health")).await.0, StatusCode::OK);
    sidecar.snapshot.send_replace(Some(Arc::new(exposed(at, &[("/ready", plain, http)]))));
    timeout(TEST_TIMEOUT, async { while client.ask(get("/ready")).await.0 != StatusCode::OK {} }).await.unwrap();
    assert_eq!(client.ask(get("/health")).await.0, StatusCode::NOT_FOUND);
}

fn logged(snapshot: Snapshot, file: &TempFile) -> Snapshot {
    const FORMAT: &str = "%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
         in=%BYTES_RECEIVED% out=%BYTES_SENT% %UPSTREAM_CLUSTER% %DYNAMIC_METADATA(consul:service)% %TRAILER(X-END)%";
    let settings = access_log::Settings {
        sink: access_log::Sink::File(file.path().into()),
        format: access_log::Format::text(FORMAT).unwrap(),
        refused_connections: true,
    };
    Snapshot { access_log: Some(Arc::new(settings)), ..snapshot }
}

#[tokio::test]
async fn requests_are_logged_on_both_sides_when_they_are_over() {
    let app = app(false, |request| async move {
        let (send, body) = channel();
        let fails = request.uri().path() == "/slow";
        let _ = request.into_body().collect().await;
        send.send(data("12345")).unwrap();
        if fails {
            std::future::pending::<()>().await;
        }
        ok(body)
    })
    .await;
    let (mesh, at) = (free(), free());
    let (near, far) = (TempFile::new(""), TempFile::new(""));
    let mut hurried = service(Protocol::Http, app);
    hurried.local_request_timeout = Some(Duration::from_secs(3));
    let server = Sidecar::start(logged(with_service(mesh, hurried), &far));
    let client = Sidecar::start(logged(with_upstream(at, upstream(Protocol::Http, &[mesh])), &near));
    listening(mesh).await;
    listening(at).await;
    let asker = Client::http1(at).await;
    assert_eq!(asker.ask(request(Method::POST, "/a?b=c", text("abc"))).await.0, StatusCode::OK);
    assert_eq!(asker.ask(get("/slow")).await.0, StatusCode::GATEWAY_TIMEOUT);
    server.snapshot.send_modify(|snapshot| {
        let denying = Service { intentions: allowing(Action::Deny), ..service(Protocol::Http, app) };
        let denying = Snapshot { version: 2, ..with_service(mesh, denying) };
        *snapshot = Some(Arc::new(logged(denying, &far)));
    });
    // The first that is denied may have been on its way to the app already.
    timeout(TEST_TIMEOUT, async { while asker.ask(get("/soon")).await.0 != StatusCode::FORBIDDEN {} }).await.unwrap();
    assert_eq!(asker.ask(get("/denied")).await.0, StatusCode::FORBIDDEN);
    drop((client, asker));

    let slow = "upstream request timeout".len();
    let denied = "RBAC: access denied".len();
    let (at_server, at_client) = ("local_app web -", "db.x.consul - -");
    let expected = |place: &str, server: bool| {
        let answered = if server { "UT response_timeout" } else { "- via_upstream" };
        let refused = if server { "- rbac_access_denied_matched_policy[none]" } else { "- via_upstream" };
        let denied_to = if server { "- web -" } else { place };
        let version = if server { "HTTP/2" } else { "HTTP/1.1" };
        [
            format!("POST /a?b=c {version} 200 - via_upstream in=3 out=5 {place}"),
            format!("GET /slow {version} 504 {answered} in=0 out={slow} {place}"),
            format!("GET /denied {version} 403 {refused} in=0 out={denied} {denied_to}"),
        ]
    };
    for (file, place, server) in [(&near, at_client, false), (&far, at_server, true)] {
        let wanted = expected(place, server);
        let written = async {
            loop {
                let text = std::fs::read_to_string(file.path()).unwrap();
                if wanted.iter().all(|line| text.lines().any(|written| written == line)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let in_time = timeout(TEST_TIMEOUT, written).await;
        assert!(in_time.is_ok(), "{wanted:#?} not in {}", std::fs::read_to_string(file.path()).unwrap());
    }
}

#[tokio::test]
async fn audit_mode_lets_nothing_through_while_a_provider_is_not_known() {
    let app = app(false, |_| async { ok(text("here")) }).await;
    let (mesh, at) = (free(), free());
    let okta = ProviderRequirement { name: "okta".into(), claims: Vec::new() };
    let intention = |token| Intention {
        source_partition: "default".into(),
        source_namespace: "default".into(),
        source: "*".into(),
        destination: "db".into(),
        action: None,
        permissions: vec![Permission { action: Action::Deny, conditions: None, token: None }],
        token,
        precedence: 9,
        hits: Hits::default(),
    };
    let policy = DefaultPolicy { action: Action::Deny, source: "test".into(), hits: Hits::default() };
    let audited = |token| Service {
        intentions: Arc::new(Intentions::new(vec![intention(token)], policy.clone())),
        audit: true,
        ..service(Protocol::Http, app)
    };
    let server = Sidecar::start(with_service(mesh, audited(None)));
    let _client = Sidecar::start(with_upstream(at, upstream(Protocol::Http, &[mesh])));
    listening(mesh).await;
    listening(at).await;
    let client = Client::http1(at).await;
    assert_eq!(client.ask(get("/")).await.0, StatusCode::OK);
    let needed = audited(Some(TokenRequirement { providers: vec![okta] }));
    server.snapshot.send_replace(Some(Arc::new(Snapshot { version: 2, ..with_service(mesh, needed) })));
    let closed = async { while client.ask(get("/")).await.0 != StatusCode::FORBIDDEN {} };
    timeout(TEST_TIMEOUT, closed).await.expect("it is denied in time");
}
