//! The agent's HTTP API, nothing about proxying.
//!
//! [`Query`] says what to ask, [`Client`] asks once, and [`watches::Watches`] keeps answers up to date.

pub mod api;
mod budget;
mod connect;
mod endpoint;
mod error;
mod failures;
mod files;
mod pace;
mod progress;
pub mod query;
mod schedule;
mod settings;
mod table;
mod token;
pub mod watches;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::{Bytes, BytesMut};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use reqwest::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode, Url, Version};
use tokio::sync::{Mutex, MutexGuard, Semaphore};

use connect::Connections;
pub use endpoint::{Chain, DefaultPolicy, Instances, Query};
use endpoint::{Request, Response};
pub use error::{Error, ErrorKind};
use files::Followed;
use progress::Requests;
pub use progress::{AnsweredBy, How, Kind, Progress, RequestCounts, RequestResult, UnderWay};
pub use settings::{Address, DEFAULT_CONNECTIONS, FEWEST_CONNECTIONS, Scope, Settings, TlsSettings, Token};

/// Longest body of an answer, in bytes.
const BODY_LIMIT: usize = 64 * 1024 * 1024;

/// Timeout of a request that does not block.
const PROMPT: Duration = Duration::from_secs(15);

/// Connections for requests that are asked once, such as a registration.
const ONE_OFF_CONNECTIONS: usize = 1;

/// Tasks that take turns until a connection is back in its pool.
const POOL_TASKS: usize = 4;

const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-consul-token");

/// Asks the agent as one scope. Clones share its token, and clients of all scopes share the transport.
#[derive(Clone)]
pub struct Client {
    transport: Arc<Transport>,
    caller: Arc<Caller>,
}

/// How the agent is reached, and what bounds that.
struct Transport {
    connections: Followed<Connections>,
    /// For error messages.
    address: String,
    https: bool,
    /// Whether answers come over HTTP/2, so that one connection carries all requests; one of the constants below.
    multiplexed: AtomicU8,
    /// Held while the first request of a connection is under way that may turn out to be such.
    opening: Mutex<()>,
    /// Whether the last answer is of an agent before 1.9. No is also what is said before the first.
    before_1_9: AtomicBool,
    basic_auth: Option<(String, Option<String>)>,
    max_connections: usize,
    one_off: Semaphore,
    requests: Requests,
}

/// A scope, with its token of this moment.
struct Caller {
    scope: Scope,
    token: Followed<Option<HeaderValue>>,
}

const UNKNOWN: u8 = 0;
const MULTIPLEXED: u8 = 1;
const NOT_MULTIPLEXED: u8 = 2;

/// A value with what the agent said about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer<T> {
    pub value: T,
    /// Rows may be missing that the token has no right to see; Consul 1.11 and later.
    pub filtered_by_acls: bool,
}

/// The agent's answer to the cheapest question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The address of the leader among the servers; empty when there is none.
    pub leader: String,
    /// Whether a header has the ACL default policy; Consul 1.9 and later.
    pub has_default_policy: bool,
    /// By our clock, around the answer.
    sent: SystemTime,
    received: SystemTime,
    /// By the agent's, in whole seconds.
    date: Option<SystemTime>,
}

impl Probe {
    /// How far our clock is from the agent's at least, and whether it is ahead. `None` where the agent says no time.
    #[must_use]
    pub fn clock_offset(&self) -> Option<(Duration, bool)> {
        let date = self.date?;
        if let Ok(ahead) = self.sent.duration_since(date + Duration::from_secs(1)) {
            return Some((ahead, true));
        }
        Some((date.duration_since(self.received).unwrap_or_default(), false))
    }
}

/// Which connections a request goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pool {
    Authorization,
    Shared,
    /// A new one.
    Fresh,
}

/// Where a blocking query takes up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Cursor {
    #[default]
    None,
    Index(u64),
    Hash(String),
}

impl Client {
    /// Fails on files that cannot be read or used and on addresses that are none; nothing is sent yet.
    pub fn new(settings: &Settings) -> anyhow::Result<Self> {
        let transport = Transport {
            connections: connect::followed(settings)?,
            address: settings.address.to_string(),
            https: matches!(settings.address, Address::Tcp { https: true, .. }),
            multiplexed: AtomicU8::new(UNKNOWN),
            opening: Mutex::new(()),
            before_1_9: AtomicBool::new(false),
            basic_auth: settings.basic_auth.clone(),
            max_connections: settings.max_connections,
            one_off: Semaphore::new(ONE_OFF_CONNECTIONS),
            requests: Requests::default(),
        };
        Ok(Self { transport: Arc::new(transport), caller: Caller::new(settings.scope.clone())? })
    }

    /// A client of another scope over the same transport.
    ///
    /// # Errors
    /// When its token can't be read or used.
    pub fn for_scope(&self, scope: Scope) -> anyhow::Result<Self> {
        if scope == self.caller.scope {
            return Ok(self.clone());
        }
        Ok(Self { transport: Arc::clone(&self.transport), caller: Caller::new(scope)? })
    }

    /// The address of the agent.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.transport.address
    }

    /// What was sent to the agent so far, as whichever scope.
    #[must_use]
    pub fn requests(&self) -> RequestCounts {
        self.transport.requests.get()
    }

    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.caller.scope
    }

    /// Asks once, without waiting for a change.
    pub async fn fetch<T>(&self, query: &Query<T>) -> Result<Answer<T>, Error> {
        let response = self.one_off(&query.request).await?;
        self.decode(query, &response)
    }

    /// Whether the agent answers, and the facts in the headers of its answer.
    pub async fn probe(&self) -> Result<Probe, Error> {
        let request = Request::new(Method::GET, &["status", "leader"]);
        let sent = SystemTime::now();
        let response = self.one_off(&request).await?;
        let received = SystemTime::now();
        let leader = endpoint::json(&response.body).map_err(|cause| self.error(&request, ErrorKind::Decode(cause)))?;
        Ok(Probe { leader, has_default_policy: response.default_policy.is_some(), sent, date: response.date, received })
    }

    /// The version of the agent, as in `1.19.2`. It takes `agent:read`.
    pub async fn agent_version(&self) -> Result<String, Error> {
        let request = Request::new(Method::GET, &["agent", "self"]).needs("agent:read".into());
        let response = self.one_off(&request).await?;
        let about: serde_json::Value =
            endpoint::json(&response.body).map_err(|cause| self.error(&request, ErrorKind::Decode(cause)))?;
        Ok(about["Config"]["Version"].as_str().unwrap_or_default().to_owned())
    }

    /// Whether the agent knows the token. What it says of it, the token included, is not read.
    pub async fn token_is_known(&self) -> Result<(), Error> {
        self.one_off(&Request::new(Method::GET, &["acl", "token", "self"])).await.map(drop)
    }

    /// Every service that is registered with the agent and visible to the token, by its id.
    pub async fn agent_services(&self) -> Result<BTreeMap<String, api::AgentService>, Error> {
        let request = Request::new(Method::GET, &["agent", "services"]);
        let response = self.one_off(&request).await?;
        let services: Option<_> =
            endpoint::json(&response.body).map_err(|cause| self.error(&request, ErrorKind::Decode(cause)))?;
        Ok(services.unwrap_or_default())
    }

    /// Registers a service. The definition is sent as it is, in the spelling of Consul's API (`Kind`, `Port`…).
    pub async fn register_service(&self, definition: &serde_json::Value) -> Result<(), Error> {
        let request = Request::new(Method::PUT, &["agent", "service", "register"])
            .body(definition)
            .needs("service:write on the proxy's name and on that of its service".into());
        self.one_off(&request).await.map(drop)
    }

    pub async fn deregister_service(&self, id: &str) -> Result<(), Error> {
        let request = Request::new(Method::PUT, &["agent", "service", "deregister", id]);
        self.one_off(&request.needs(format!("service:write on the service of {id:?}"))).await.map(drop)
    }

    /// Renews a check that expires when it is not renewed.
    pub async fn pass_check(&self, check_id: &str) -> Result<(), Error> {
        let request = Request::new(Method::PUT, &["agent", "check", "pass", check_id]);
        self.one_off(&request.needs(format!("service:write on the service of check {check_id:?}"))).await.map(drop)
    }

    /// Whether table watches notice changes of these queries: they know one namespace and the leader's answers.
    fn has_tables(&self) -> bool {
        let Scope { stale, namespace, partition, .. } = self.scope();
        !stale && namespace.is_none() && partition.is_none()
    }

    fn is_multiplexed(&self) -> bool {
        self.transport.multiplexed.load(Ordering::Relaxed) == MULTIPLEXED
    }

    /// Whether the agent is known to be one before 1.9.
    fn is_before_1_9(&self) -> bool {
        self.transport.before_1_9.load(Ordering::Relaxed)
    }

    /// Whether the agent has no connection left for this host, as a request on a new one tells; `None` where connections
    /// are not what the agent runs out of.
    async fn is_crowded(&self) -> Option<bool> {
        self.transport.connections.current().fresh.as_ref()?;
        let request = Request::new(Method::GET, &["status", "leader"]);
        let answer = self.send(Pool::Fresh, &request, &Cursor::None, Duration::ZERO).await;
        Some(answer.is_err_and(|error| error.is_connection_limit()))
    }

    fn token_changes(&self) -> token::Changes {
        self.caller.token.changes()
    }

    /// Follows the files that the transport was made from, without end.
    async fn follow_transport(&self) {
        self.transport.connections.follow().await;
    }

    /// Follows the file of the token, without end.
    async fn follow_token(&self) {
        self.caller.token.follow().await;
    }

    /// Sends a request that does not block. One that the agent refuses is sent once more where the token
    /// file holds another token by now.
    async fn one_off(&self, request: &Request) -> Result<Response, Error> {
        let _turn = self.transport.one_off.acquire().await;
        let changes = self.caller.token.changes();
        match self.send(Pool::Shared, request, &Cursor::None, Duration::ZERO).await {
            Err(error) if error.is_forbidden() && changes.has_changed().unwrap_or(false) => {
                self.send(Pool::Shared, request, &Cursor::None, Duration::ZERO).await
            }
            result => result,
        }
    }

    fn decode<T>(&self, query: &Query<T>, response: &Response) -> Result<Answer<T>, Error> {
        let value = (query.decode)(response).map_err(|cause| self.error(&query.request, ErrorKind::Decode(cause)))?;
        Ok(Answer { value, filtered_by_acls: response.filtered_by_acls })
    }

    /// Sends one request. With a cursor, the agent answers when it has something newer, or after `wait`.
    async fn send(&self, pool: Pool, request: &Request, cursor: &Cursor, wait: Duration) -> Result<Response, Error> {
        if let Some(name) = request.path.iter().find(|segment| matches!(segment.as_str(), "." | "..")) {
            return Err(self.error(request, ErrorKind::Name(name.clone())));
        }
        let limit = match cursor {
            Cursor::None => PROMPT,
            // The agent adds up to a sixteenth, so that not all queries end at once.
            _ => wait + wait / 16 + Duration::from_secs(10),
        };
        let active = self.transport.requests.begin(Kind::of(request));
        let answer = match tokio::time::timeout(limit, self.exchange(pool, request, cursor, wait)).await {
            Ok(answer) => answer,
            Err(_) => Err(ErrorKind::Transport(format!("nothing came within {} s", limit.as_secs()))),
        };
        let answer = answer.and_then(|response| accept(request, response));
        if let Ok(response) = &answer {
            self.transport.before_1_9.store(table::is_before_1_9(response), Ordering::Relaxed);
        }
        active.end(RequestResult::of(&answer));
        match &answer {
            Err(ErrorKind::Status { code: 403, .. }) => self.caller.token.reload().await,
            Err(ErrorKind::Transport(_) | ErrorKind::Unreachable(_)) => {
                self.transport.multiplexed.store(UNKNOWN, Ordering::Relaxed);
                // The agent may have refused a certificate that was replaced meanwhile.
                self.transport.connections.reload().await;
            }
            _ => {}
        }
        answer.map_err(|kind| self.error(request, kind))
    }

    /// Where the first answer will tell whether one connection is enough, requests wait for it; one that blocks is never
    /// waited for.
    async fn opened(&self, wait: Duration) -> Option<MutexGuard<'_, ()>> {
        let is_unknown = || self.transport.multiplexed.load(Ordering::Relaxed) == UNKNOWN;
        if !self.transport.https || !wait.is_zero() || !is_unknown() {
            return None;
        }
        let opening = self.transport.opening.lock().await;
        Some(opening).filter(|_| is_unknown())
    }

    async fn exchange(
        &self,
        pool: Pool,
        request: &Request,
        cursor: &Cursor,
        wait: Duration,
    ) -> Result<Response, ErrorKind> {
        let connections = self.transport.connections.current();
        let client = match pool {
            Pool::Authorization => &connections.authorization,
            Pool::Shared => &connections.shared,
            Pool::Fresh => connections.fresh.as_ref().unwrap_or(&connections.shared),
        };
        let mut http = client.request(request.method.clone(), self.url(&connections, request, cursor, wait));
        if let Some(token) = self.caller.token.current() {
            http = http.header(TOKEN_HEADER, token);
        }
        if let Some((user, password)) = &self.transport.basic_auth {
            http = http.basic_auth(user, password.as_ref());
        }
        if let Some(host) = &connections.host {
            http = http.header(HOST, host);
        }
        if let Some(body) = &request.body {
            http = http.header(CONTENT_TYPE, HeaderValue::from_static("application/json")).body(body.clone());
        }
        if pool == Pool::Shared && wait >= schedule::CROWDED_WAIT && !self.transport.https {
            // Others of the host have a chance of it.
            http = http.header(CONNECTION, HeaderValue::from_static("close"));
        }
        let opening = self.opened(wait).await;
        let mut response = http.send().await?;
        let version = if response.version() == Version::HTTP_2 { MULTIPLEXED } else { NOT_MULTIPLEXED };
        self.transport.multiplexed.store(version, Ordering::Relaxed);
        drop(opening);
        let headers = std::mem::take(response.headers_mut());
        let answer = Response {
            status: response.status(),
            body: body(response).await?,
            // An agent never means zero.
            index: text(&headers, "x-consul-index").and_then(|index| index.parse().ok()).filter(|index| *index > 0),
            hash: text(&headers, "x-consul-contenthash").map(str::to_string).filter(|hash| !hash.is_empty()),
            stale: text(&headers, "x-consul-effective-consistency") == Some("stale"),
            default_policy: text(&headers, "x-consul-default-acl-policy").map(str::to_string),
            date: text(&headers, "date").and_then(|date| httpdate::parse_http_date(date).ok()),
            filtered_by_acls: text(&headers, "x-consul-results-filtered-by-acls") == Some("true"),
            from_cache: headers.contains_key("x-cache"),
        };
        // The connection goes back to the pool by way of tasks of its own. Whoever asks next should find it
        // there rather than make one more.
        for _ in 0..POOL_TASKS {
            tokio::task::yield_now().await;
        }
        Ok(answer)
    }

    fn url(&self, connections: &Connections, request: &Request, cursor: &Cursor, wait: Duration) -> Url {
        let mut url = connections.base.clone();
        let path = url.path().trim_end_matches('/').to_owned() + "/v1";
        let path = request.path.iter().fold(path, |path, segment| format!("{path}/{}", segment_of_path(segment)));
        url.set_path(&path);
        let params = self.params(request, cursor, wait);
        if !params.is_empty() {
            url.query_pairs_mut().extend_pairs(params);
        }
        url
    }

    fn params(&self, request: &Request, cursor: &Cursor, wait: Duration) -> Vec<(&'static str, String)> {
        let mut params = request.params.clone();
        let Scope { datacenter, namespace, partition, stale, .. } = self.scope();
        for (name, value) in [("dc", datacenter), ("ns", namespace), ("partition", partition)] {
            if let Some(value) = value.as_ref().filter(|_| request.params.iter().all(|(given, _)| *given != name)) {
                params.push((name, value.clone()));
            }
        }
        if request.stale && *stale {
            params.push(("stale", String::new()));
        }
        match cursor {
            Cursor::None => return params,
            Cursor::Index(index) => params.push(("index", index.to_string())),
            Cursor::Hash(hash) => params.push(("hash", hash.clone())),
        }
        params.push(("wait", format!("{}ms", wait.as_millis())));
        params
    }

    fn error(&self, request: &Request, kind: ErrorKind) -> Error {
        Error {
            request: request.to_string(),
            address: self.transport.address.clone(),
            needs: request.needs.clone(),
            kind,
        }
    }
}

impl Caller {
    fn new(scope: Scope) -> anyhow::Result<Arc<Self>> {
        let token = token::followed(&scope.token).context("no ACL token")?;
        Ok(Arc::new(Self { scope, token }))
    }
}

/// Tells an answer from a refusal. A config entry that is missing is an answer, and so is one of a kind
/// that this agent has never heard of, save that it cannot be blocked on.
fn accept(request: &Request, mut response: Response) -> Result<Response, ErrorKind> {
    let refusal = match response.status {
        StatusCode::OK => return Ok(response),
        status => error::status(status.as_u16(), &response.body),
    };
    let ErrorKind::Status { code, text } = &refusal else { return Err(refusal) };
    if !request.may_be_missing {
        return Err(refusal);
    }
    if *code == 404 {
        return Ok(response);
    }
    if text.contains("invalid config entry kind") {
        response.index = None;
        return Ok(response);
    }
    Err(refusal)
}

async fn body(mut response: reqwest::Response) -> Result<Bytes, ErrorKind> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > BODY_LIMIT {
            return Err(ErrorKind::Decode(format!("it is longer than {} MiB", BODY_LIMIT / 1024 / 1024)));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// One segment of a path, with nothing in it that a parser of URLs would read otherwise or leave out: Consul takes names with
/// tabs and slashes.
fn segment_of_path(text: &str) -> PercentEncode<'_> {
    /// All but the unreserved characters (RFC 3986, 2.3).
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    utf8_percent_encode(text, ENCODED)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{self, Agent};

    fn client(settings: &Settings) -> Client {
        Client::new(settings).expect("the settings are good")
    }

    #[tokio::test]
    async fn a_new_connection_tells_whether_others_get_one() {
        let agent = Agent::start();
        let (authority, prefix) = (agent.tcp_address().await.to_string(), String::new());
        let over_tcp = client(&testing::settings(Address::Tcp { https: false, authority, prefix }));
        assert_eq!(over_tcp.is_crowded().await, Some(false));
        agent.limit_connections(0);
        assert_eq!(over_tcp.is_crowded().await, Some(true));
        // The agent does not count these.
        assert_eq!(client(&agent.settings()).is_crowded().await, None);
    }

    #[tokio::test]
    async fn sends_what_the_settings_say_and_nothing_else() {
        let agent = Agent::start();
        let instances =
            Instances { service: "db".into(), filter: Some("Meta.v == \"1 & 2\"".into()), ..Instances::default() };
        let path = "/v1/health/connect/db";
        agent.set(path, json!([]));

        let mut settings = agent.settings();
        client(&settings).fetch(&Query::health_connect(&instances)).await.expect("an answer");
        let seen = agent.requests(path).pop().expect("a request");
        assert_eq!(seen.params, BTreeMap::from([("filter".to_string(), "Meta.v == \"1 & 2\"".to_string())]));
        assert!(seen.token().is_none() && seen.headers.get("authorization").is_none());

        settings.scope.token = Token::Fixed("secret".into());
        settings.basic_auth = Some(("user".into(), Some("pass".into())));
        settings.scope.datacenter = Some("dc1".into());
        settings.scope.namespace = Some("ns1".into());
        settings.scope.partition = Some("p1".into());
        settings.scope.stale = true;
        let elsewhere = Instances { datacenter: Some("dc2".into()), ..instances };
        client(&settings).fetch(&Query::health_connect(&elsewhere)).await.expect("an answer");
        let seen = agent.requests(path).pop().expect("a request");
        let params = ["dc", "ns", "partition", "stale"].map(|name| seen.param(name));
        assert_eq!(params, [Some("dc2"), Some("ns1"), Some("p1"), Some("")]);
        assert_eq!(seen.token(), Some("secret"));
        assert_eq!(seen.headers["authorization"], "Basic dXNlcjpwYXNz");
        assert!(!format!("{settings:?}").contains("secret") && !format!("{settings:?}").contains("pass"));
    }

    #[tokio::test]
    async fn a_prefix_goes_before_the_path() {
        let agent = Agent::start();
        agent.set("/some/where/v1/agent/services", json!({ "web": { "ID": "web", "Service": "web" } }));
        let authority = agent.tcp_address().await.to_string();
        let address = Address::Tcp { https: false, authority, prefix: "/some/where".into() };
        let services = client(&testing::settings(address)).agent_services().await.expect("an answer");
        assert_eq!(services["web"].service, "web");
    }

    #[tokio::test]
    async fn registers_keeps_alive_and_deregisters() {
        let agent = Agent::start();
        let client = client(&agent.settings());
        client.register_service(&json!({ "Name": "web" })).await.expect("registered");
        client.pass_check("web-ttl").await.expect("passed");
        client.deregister_service("web/1").await.expect("deregistered");
        let seen = agent.requests("/v1/agent/service/register").pop().expect("a request");
        assert_eq!((seen.method, seen.body), (Method::PUT, Bytes::from_static(br#"{"Name":"web"}"#)));
        assert_eq!(agent.requests("/v1/agent/check/pass/web-ttl").len(), 1);
        assert_eq!(agent.requests("/v1/agent/service/deregister/web%2F1").len(), 1);
        client.deregister_service("a\tb\nc?d#e%f").await.expect("deregistered");
        assert_eq!(agent.requests("/v1/agent/service/deregister/a%09b%0Ac%3Fd%23e%25f").len(), 1);
    }

    #[tokio::test]
    async fn a_name_that_no_path_can_hold_is_not_asked_for() {
        let agent = Agent::start();
        for name in [".", ".."] {
            let instances = Instances { service: name.into(), ..Instances::default() };
            let error =
                client(&agent.settings()).fetch(&Query::health_connect(&instances)).await.expect_err("it can't be");
            assert!(error.to_string().ends_with("for a step between folders; give it another name"), "{error}");
        }
        let instances = Instances { service: "...".into(), ..Instances::default() };
        agent.set("/v1/health/connect/...", json!([]));
        client(&agent.settings()).fetch(&Query::health_connect(&instances)).await.expect("a name like others");
        assert_eq!(agent.count(|_| true), 1);
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_told_from_one_that_refuses() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let authority = listener.local_addr().expect("it is bound").to_string();
        drop(listener);
        let tcp = Address::Tcp { https: false, authority: authority.clone(), prefix: String::new() };
        for (address, named) in
            [(tcp, authority.as_str()), (Address::Unix("/nowhere/consul.sock".into()), "consul.sock")]
        {
            let error = client(&testing::settings(address)).agent_services().await.expect_err("nobody is there");
            assert!(error.is_unreachable(), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(named) && text.contains("GET /v1/agent/services"), "{text}");
            assert!(text.contains("is a Consul agent running there?"), "{text}");
        }
    }

    #[tokio::test]
    async fn a_refusal_says_what_is_needed() {
        let agent = Agent::start();
        agent.only_tokens(&["other"]);
        let error = client(&agent.settings()).fetch(&Query::ca_leaf("web")).await.expect_err("the token is not known");
        assert!(error.is_forbidden() && !error.is_not_found());
        assert!(
            error.to_string().ends_with("403: Permission denied; the token needs service:write on \"web\""),
            "{error}"
        );
    }

    #[test]
    fn the_text_of_a_wrapped_limit_is_recognised() {
        let error = |code, text: &str| Error {
            request: String::new(),
            address: String::new(),
            needs: String::new(),
            kind: ErrorKind::Status { code, text: text.into() },
        };
        assert!(error(429, "").is_rate_limited());
        assert!(error(500, "rpc error making call: Rate limit reached, try again later").is_rate_limited());
        assert!(!error(500, "No cluster leader").is_rate_limited());
    }

    #[test]
    fn settings_that_cannot_work_name_the_fault() {
        let mut no_token = testing::settings(Address::Unix("/x".into()));
        no_token.scope.token = Token::File("/nowhere/token".into());
        let address = Address::Tcp { https: true, authority: "127.0.0.1:1".into(), prefix: String::new() };
        let mut no_ca = testing::settings(address.clone());
        no_ca.tls.ca_file = Some("/nowhere/ca.pem".into());
        let mut no_key = testing::settings(address);
        no_key.tls.verify = false;
        no_key.tls.client_cert = Some("/nowhere/cert.pem".into());
        for (settings, says) in [
            (no_token, "cannot read the token file /nowhere/token"),
            (no_ca, "cannot read certificates from /nowhere/ca.pem"),
            (no_key, "a client certificate and its key must be given together"),
        ] {
            let error = Client::new(&settings).err().expect("it cannot work");
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
    }
}
