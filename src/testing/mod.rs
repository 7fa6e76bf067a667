//! What tests need, above all an agent that is none.

pub(crate) mod ca;

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::consul::{Address, Scope, Settings, TlsSettings};

/// An agent in this process, which keeps indexes as the real one does.
///
/// What it answers is set by path ([`set`](Self::set)); a path may be given with its query, without
/// `index`, `wait`, `hash` and `stale`, to distinguish it from the same path without.
///
/// It listens on a unix socket. The kernel delivers on such a socket within the call that writes, so a paused clock
/// never moves while something is on its way. With TCP it can.
pub(crate) struct Agent {
    shared: Arc<Shared>,
    socket: TempFile,
    accepting: AbortHandle,
}

struct Shared {
    state: Mutex<State>,
    /// Moves with every change of state.
    version: watch::Sender<u64>,
    open: AtomicUsize,
    most_open: AtomicUsize,
}

#[derive(Default)]
struct State {
    index: u64,
    answers: BTreeMap<String, Stored>,
    fault: Option<Fault>,
    /// Empty: every token will do.
    tokens: HashSet<String>,
    before_1_9: bool,
    default_policy: Option<&'static str>,
    requests: Vec<RecordedRequest>,
    /// Connections made under an older number are closed.
    generation: u64,
    /// So many connections are served, and others closed at once.
    connection_limit: Option<usize>,
    /// Connections that were closed at once.
    refused: usize,
    /// By the name of the table: its index.
    tables: BTreeMap<&'static str, u64>,
    without_tables: bool,
}

/// The table that the answer for `path` is made from.
fn table_of(path: &str) -> Option<&'static str> {
    if path.starts_with("/v1/health/") {
        Some(INSTANCES)
    } else if path.starts_with("/v1/config/") || path.starts_with("/v1/discovery-chain/") {
        Some(CONFIG_ENTRIES)
    } else {
        None
    }
}

/// The paths that have the index of a table.
pub(crate) const INSTANCES: &str = "/v1/internal/ui/services";
pub(crate) const CONFIG_ENTRIES: &str = "/v1/config/proxy-defaults";

#[derive(Clone)]
struct Stored {
    body: Bytes,
    index: u64,
}

/// A way not to answer.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Takes requests, also those that are waiting, and says nothing.
    Silent,
    Status(u16, &'static str),
    /// Success, with a body that is none.
    Rubbish,
}

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct RecordedRequest {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) params: BTreeMap<String, String>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl RecordedRequest {
    pub(crate) fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }

    pub(crate) fn token(&self) -> Option<&str> {
        self.headers.get("x-consul-token").and_then(|token| token.to_str().ok())
    }

    /// The path, with those parameters that say what is asked for.
    fn key(&self) -> String {
        const HOW: [&str; 4] = ["index", "wait", "hash", "stale"];
        let what = self.params.iter().filter(|(name, _)| !HOW.contains(&name.as_str()));
        let query = what.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&");
        if query.is_empty() { self.path.clone() } else { format!("{}?{query}", self.path) }
    }
}

impl Agent {
    pub(crate) fn start() -> Self {
        let socket = TempFile::unwritten();
        let listener = UnixListener::bind(socket.path()).expect("a socket can be made among temporary files");
        let shared = Arc::new(Shared {
            state: Mutex::new(State { index: 1, ..State::default() }),
            version: watch::Sender::new(0),
            open: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone())).abort_handle();
        Self { shared, socket, accepting }
    }

    /// Settings for a client of this agent.
    pub(crate) fn settings(&self) -> Settings {
        settings(Address::Unix(self.socket.path().to_path_buf()))
    }

    /// A TCP address that leads to this agent as well, for as long as the test runs.
    pub(crate) async fn tcp_address(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let socket = self.socket.path().to_path_buf();
        tokio::spawn(async move {
            while let Ok((mut inbound, _)) = listener.accept().await {
                let socket = socket.clone();
                tokio::spawn(async move {
                    let mut outbound = UnixStream::connect(socket).await?;
                    tokio::io::copy_bidirectional(&mut inbound, &mut outbound).await
                });
            }
        });
        address
    }

    /// Answers `path` with `body` from now on, and wakes queries for it. A path is one such as
    /// `/v1/agent/connect/ca/roots`.
    pub(crate) fn set(&self, path: &str, body: Value) {
        self.change(|state| {
            state.index += 1;
            let stored = Stored { body: body.to_string().into(), index: state.index };
            state.answers.insert(path.into(), stored);
            state.table_changed(path);
        });
    }

    /// The same, without a change of the table that it is made from.
    pub(crate) fn set_untold(&self, path: &str, body: Value) {
        self.change(|state| {
            let stored = Stored { body: body.to_string().into(), index: state.index };
            state.answers.insert(path.into(), stored);
        });
    }

    /// Moves the index of a table with nothing new in it.
    pub(crate) fn touch_table(&self, table: &'static str) {
        self.change(|state| {
            state.index += 1;
            state.tables.insert(table, state.index);
        });
    }

    /// Answers nothing about tables, or does again.
    pub(crate) fn without_tables(&self, without: bool) {
        self.change(|state| state.without_tables = without);
    }

    /// Connections that were closed at once.
    pub(crate) fn refused_connections(&self) -> usize {
        self.shared.lock().refused
    }

    /// Answers `path` with 404 from now on.
    pub(crate) fn remove(&self, path: &str) {
        self.change(|state| {
            state.index += 1;
            state.answers.remove(path);
            state.table_changed(path);
        });
    }

    /// Moves the index of `path` and wakes queries for it, with nothing new in it.
    pub(crate) fn touch(&self, path: &str) {
        self.change(|state| {
            state.index += 1;
            let index = state.index;
            state.answers.get_mut(path).expect("the path was set").index = index;
        });
    }

    /// As after the restore of an older server: all indexes are lower, and everybody still waits.
    pub(crate) fn go_backwards(&self) {
        let mut state = self.shared.lock();
        state.index = 2;
        for stored in state.answers.values_mut() {
            stored.index = 2;
        }
        state.tables.values_mut().for_each(|index| *index = 2);
    }

    /// Answers nothing but this, until `None` is set.
    pub(crate) fn fault(&self, fault: Option<Fault>) {
        self.change(|state| state.fault = fault);
    }

    /// Refuses requests with other tokens.
    pub(crate) fn only_tokens(&self, tokens: &[&str]) {
        self.change(|state| state.tokens = tokens.iter().map(ToString::to_string).collect());
    }

    /// Matched intentions come without an index.
    pub(crate) fn before_1_9(&self) {
        self.change(|state| state.before_1_9 = true);
    }

    /// The header that agents from 1.9 on send.
    pub(crate) fn default_policy(&self, policy: &'static str) {
        self.change(|state| state.default_policy = Some(policy));
    }

    /// Closes every connection, as an agent does that stops.
    pub(crate) fn disconnect(&self) {
        self.change(|state| state.generation += 1);
    }

    /// Serves so many connections, and hangs up on others as Consul 1.8 does.
    pub(crate) fn limit_connections(&self, limit: usize) {
        self.change(|state| state.connection_limit = Some(limit));
    }

    pub(crate) fn open_connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    pub(crate) fn most_connections(&self) -> usize {
        self.shared.most_open.load(Ordering::SeqCst)
    }

    /// The requests for a path, oldest first.
    pub(crate) fn requests(&self, path: &str) -> Vec<RecordedRequest> {
        self.shared.lock().requests.iter().filter(|seen| seen.path == path).cloned().collect()
    }

    /// How many recorded requests match.
    pub(crate) fn count(&self, matches: impl Fn(&RecordedRequest) -> bool) -> usize {
        self.shared.lock().requests.iter().filter(|seen| matches(seen)).count()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.version.send_modify(|version| *version += 1);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A file that is there for as long as this lives.
pub(crate) struct TempFile(PathBuf);

impl TempFile {
    pub(crate) fn new(text: &str) -> Self {
        let file = Self::unwritten();
        file.write(text);
        file
    }

    /// Its path alone. What is made there is removed in the end.
    fn unwritten() -> Self {
        let number = RandomState::new().build_hasher().finish();
        Self(std::env::temp_dir().join(format!("lictor-test-{}-{number:x}", std::process::id())))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, text: &str) {
        std::fs::write(&self.0, text).expect("a temporary file can be written");
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Settings for an agent at `address`, with all else left out.
pub(crate) fn settings(address: Address) -> Settings {
    Settings { address, basic_auth: None, tls: TlsSettings::default(), scope: Scope::default(), max_connections: 4 }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let limit = shared.lock().connection_limit;
        if limit.is_some_and(|limit| shared.open.load(Ordering::SeqCst) >= limit) {
            shared.lock().refused += 1;
            continue;
        }
        let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_open.fetch_max(open, Ordering::SeqCst);
        let shared = shared.clone();
        connections.spawn(async move {
            let generation = shared.lock().generation;
            let service = service_fn(|request| answer(shared.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            let mut version = shared.version.subscribe();
            tokio::select! {
                _ = connection => {}
                _ = version.wait_for(|_| shared.lock().generation != generation) => {}
            }
            shared.open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let params = url_params(head.uri.query().unwrap_or_default());
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let seen =
        RecordedRequest { method: head.method, path: head.uri.path().into(), params, headers: head.headers, body };
    shared.lock().requests.push(seen.clone());
    let mut version = shared.version.subscribe();
    let wait = seen.param("wait").and_then(|wait| wait.strip_suffix("ms")).and_then(|wait| wait.parse().ok());
    let deadline = tokio::time::sleep(Duration::from_millis(wait.unwrap_or(300_000)));
    tokio::pin!(deadline);
    let mut wait_expired = false;
    loop {
        version.mark_unchanged();
        if let Some(response) = shared.lock().try_answer(&seen, wait_expired) {
            return Ok(response);
        }
        tokio::select! {
            _ = version.changed() => {}
            () = &mut deadline, if !wait_expired => wait_expired = true,
        }
    }
}

fn url_params(query: &str) -> BTreeMap<String, String> {
    let url = format!("http://agent/?{query}");
    let url = reqwest::Url::parse(&url).expect("a query that was sent");
    url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn table_changed(&mut self, path: &str) {
        if let Some(table) = table_of(path) {
            self.tables.insert(table, self.index);
        }
    }

    /// `None` while the request has to wait; `wait_expired` when it has waited for as long as it asked.
    fn try_answer(&self, seen: &RecordedRequest, wait_expired: bool) -> Option<Response<Full<Bytes>>> {
        match self.fault {
            Some(Fault::Silent) => return None,
            Some(Fault::Status(code, text)) => return Some(refusal(code, text)),
            Some(Fault::Rubbish) => return Some(Response::new(Full::new("<html>".into()))),
            None => {}
        }
        if !self.tokens.is_empty() && !seen.token().is_some_and(|token| self.tokens.contains(token)) {
            return Some(refusal(403, "Permission denied"));
        }
        if [INSTANCES, CONFIG_ENTRIES].contains(&seen.path.as_str()) && !self.answers.contains_key(&seen.path) {
            return self.table(seen, wait_expired);
        }
        let table = seen.path == "/v1/connect/intentions";
        let stored = self.answers.get(&seen.key()).or_else(|| self.answers.get(&seen.path)).cloned();
        let matched = |path: &str| path.starts_with("/v1/connect/intentions");
        let intentions = || self.answers.iter().filter(|(path, _)| matched(path)).map(|(_, stored)| stored.index).max();
        let stored = stored.or_else(|| table.then(|| Stored { body: "[]".into(), index: intentions().unwrap_or(1) }));
        let Some(stored) = stored else { return self.missing(seen, wait_expired) };
        let hash = format!("{:016x}", stored.index);
        let by_hash = seen.path.starts_with("/v1/agent/service/");
        let index = if seen.path == "/v1/connect/intentions/match" && self.before_1_9 {
            intentions().unwrap_or(stored.index)
        } else {
            stored.index
        };
        let asked_index = seen.param("index").and_then(|index| index.parse().ok()).unwrap_or(0);
        let waits = if by_hash { seen.param("hash") == Some(&hash) } else { asked_index >= index };
        if waits && !wait_expired {
            return None;
        }
        let mut response = Response::builder();
        if by_hash {
            response = response.header("X-Consul-ContentHash", hash);
        } else if !(self.before_1_9 && seen.path == "/v1/connect/intentions/match") {
            response = response.header("X-Consul-Index", index);
        }
        if let Some(policy) = self.default_policy {
            response = response.header("X-Consul-Default-ACL-Policy", policy);
        }
        Some(response.body(Full::new(stored.body)).expect("the parts are valid"))
    }

    /// The index of a table, with nothing in it.
    fn table(&self, seen: &RecordedRequest, wait_expired: bool) -> Option<Response<Full<Bytes>>> {
        if self.without_tables {
            return Some(refusal(404, "not found"));
        }
        let index = self.tables.get(seen.path.as_str()).copied().unwrap_or(1);
        let asked_index = seen.param("index").and_then(|index| index.parse().ok()).unwrap_or(0);
        if asked_index >= index && !wait_expired {
            return None;
        }
        let response = Response::builder().header("X-Consul-Index", index).body(Full::new("[]".into()));
        Some(response.expect("the parts are valid"))
    }

    fn missing(&self, seen: &RecordedRequest, wait_expired: bool) -> Option<Response<Full<Bytes>>> {
        let asked_index: u64 = seen.param("index").and_then(|index| index.parse().ok()).unwrap_or(0);
        if seen.path.starts_with("/v1/config/") {
            if asked_index >= self.index && !wait_expired {
                return None;
            }
            let mut response = refusal(404, "Config entry not found");
            response.headers_mut().insert("X-Consul-Index", self.index.into());
            return Some(response);
        }
        if seen.path.starts_with("/v1/agent/service/") && seen.method == Method::GET {
            return Some(refusal(404, "unknown service ID"));
        }
        if seen.method == Method::PUT {
            return Some(Response::new(Full::default()));
        }
        if seen.path == "/v1/agent/connect/authorize" {
            let body = json!({"Authorized": false, "Reason": "Default behavior configured by ACLs"});
            return Some(Response::new(Full::new(body.to_string().into())));
        }
        Some(refusal(404, "not found"))
    }
}

/// A refusal carries an index, as the real one's can: nobody must take it.
fn refusal(code: u16, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = StatusCode::from_u16(code).expect("a status code");
    response.headers_mut().insert("X-Consul-Index", 1.into());
    response
}
