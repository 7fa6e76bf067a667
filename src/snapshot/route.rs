//! Routers and splitters: which resolver an HTTP request is for, and how it goes there.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::hash::HashPolicy;
use super::pattern::Pattern;
use super::request::{HeaderMatch, RequestView, Text};
use super::resolver::{REQUEST_TIMEOUT, Resolver};
use crate::operators::{self, Record, Template};

/// Envoy's default for a stream without bytes in either direction.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// A node of a chain. Routers lead to splitters and resolvers, splitters to resolvers. `R` stands for the resolvers, so
/// that who builds a chain can first name them in another way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node<R = Arc<Resolver>> {
    Router(Vec<Route<R>>),
    Splitter(Splitter<R>),
    Resolver(R),
}

/// A route of a router; the first that matches is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route<R = Arc<Resolver>> {
    /// For the log.
    pub name: Arc<str>,
    pub matches: RouteMatch,
    /// Replaces what the path match consumed. Begins with a slash.
    pub prefix_rewrite: Option<String>,
    /// `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// `None` is no limit.
    pub idle_timeout: Option<Duration>,
    pub retries: Option<RetryPolicy>,
    pub request_edits: Edits,
    pub response_edits: Edits,
    pub next: Next<R>,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next<R = Arc<Resolver>> {
    Splitter(Splitter<R>),
    Resolver(R),
}

/// Which requests a route is for: all parts hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteMatch {
    pub path: PathMatch,
    pub headers: Vec<HeaderMatch>,
    pub query: Vec<QueryMatch>,
    /// Any of these, compared exactly; empty is any method.
    pub methods: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PathMatch {
    #[default]
    Any,
    Exact(Text),
    /// A plain prefix: `/adm` matches `/admin`.
    Prefix(Text),
    Regex(Pattern),
}

/// A condition on the first query parameter of a name, raw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryMatch {
    pub name: String,
    pub test: QueryTest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryTest {
    /// With or without a value.
    Present,
    Exact(String),
    Regex(Pattern),
}

/// Shares requests out by weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splitter<R = Arc<Resolver>> {
    legs: Vec<Leg<R>>,
    total: u64,
    /// Of the splitter's own load balancer: for all of its legs, as in Envoy.
    pub hash_policies: Vec<HashPolicy>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leg<R = Arc<Resolver>> {
    /// In proportion to the other legs; Consul's percentages come to two digits, so as hundredths.
    pub weight: u64,
    pub request_edits: Edits,
    pub response_edits: Edits,
    pub resolver: R,
}

/// Changes to headers: those of one config entry after those of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits(Vec<EntryEdits>);

/// The changes of one config entry, of which no value depends on another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct EntryEdits {
    remove: Vec<HeaderName>,
    add: Vec<(HeaderName, EditValue)>,
    set: Vec<(HeaderName, EditValue)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum EditValue {
    Fixed(HeaderValue),
    /// With operators.
    Template(Template),
}

/// When to try again, and how often. A policy without a condition would never apply and is not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub retries: u32,
    conditions: Vec<RetryOn>,
    statuses: Vec<u16>,
}

/// Envoy's conditions, as far as Consul takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryOn {
    /// Any 5xx, and no response at all.
    ServerError,
    /// 502, 503 and 504.
    GatewayError,
    Reset,
    /// A reset before the request was sent.
    ResetBeforeRequest,
    /// Also a connect that timed out.
    ConnectFailure,
    EnvoyRateLimited,
    /// 409.
    Retriable4xx,
    RefusedStream,
    /// A `grpc-status` in the response headers.
    Grpc(u32),
}

/// What went wrong with one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection to the instance.
    Connect,
    /// The stream was refused: the instance has not seen the request (`REFUSED_STREAM`, `GOAWAY`).
    Refused,
    /// Ended before any of the request was sent.
    ResetBeforeRequest,
    /// Ended later, before response headers.
    Reset,
}

/// Where a request goes and how.
#[derive(Debug)]
pub struct Routed<'a> {
    /// `None`: the chain has no router.
    pub route: Option<&'a Route>,
    /// The rewritten path with the query; `None` leaves them.
    pub path: Option<String>,
    /// The whole request with all retries; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// A stream without bytes either way; `None` is no limit.
    pub idle_timeout: Option<Duration>,
    pub retries: Option<&'a RetryPolicy>,
    /// To be applied in this order.
    pub request_edits: [&'a Edits; 2],
    /// To be applied in this order.
    pub response_edits: [&'a Edits; 2],
    pub resolver: &'a Arc<Resolver>,
    pub hash_policies: &'a [HashPolicy],
}

impl Node {
    /// Where a request goes from here.
    pub(super) fn routed<'a>(&'a self, request: &RequestView<'_>, random: u64) -> Option<Routed<'a>> {
        match self {
            Node::Router(routes) => routes.iter().find(|route| route.matches.matches(request))?.routed(request, random),
            Node::Splitter(splitter) => splitter.routed(random),
            Node::Resolver(resolver) => {
                Some(Routed { request_timeout: resolver.request_timeout, ..Routed::to(resolver) })
            }
        }
    }
}

impl<'a> Routed<'a> {
    fn to(resolver: &'a Arc<Resolver>) -> Self {
        const NONE: &Edits = &Edits(Vec::new());
        Self {
            route: None,
            path: None,
            request_timeout: Some(REQUEST_TIMEOUT),
            idle_timeout: Some(IDLE_TIMEOUT),
            retries: None,
            request_edits: [NONE; 2],
            response_edits: [NONE; 2],
            resolver,
            hash_policies: &resolver.load_balancer.hash_policies,
        }
    }
}

impl Route {
    /// A leg's edits come before the route's, both ways (Envoy 1.40).
    fn routed<'a>(&'a self, request: &RequestView<'_>, random: u64) -> Option<Routed<'a>> {
        let next = match &self.next {
            Next::Splitter(splitter) => splitter.routed(random)?,
            Next::Resolver(resolver) => Routed::to(resolver),
        };
        Some(Routed {
            route: Some(self),
            path: self.prefix_rewrite.as_ref().map(|rewrite| self.matches.path.rewrite(request, rewrite)),
            request_timeout: self.request_timeout,
            idle_timeout: self.idle_timeout,
            retries: self.retries.as_ref(),
            request_edits: [next.request_edits[0], &self.request_edits],
            response_edits: [next.response_edits[0], &self.response_edits],
            ..next
        })
    }
}

impl RouteMatch {
    fn matches(&self, request: &RequestView<'_>) -> bool {
        (self.methods.is_empty() || self.methods.iter().any(|method| method == request.method))
            && self.path.matches(request.path)
            && self.headers.iter().all(|header| header.routes(request))
            && self.query.iter().all(|query| query.matches(request))
    }
}

impl PathMatch {
    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(text) => text.equals(path.as_bytes()),
            Self::Prefix(text) => text.starts(path.as_bytes()),
            Self::Regex(pattern) => pattern.matches(path.as_bytes()),
        }
    }

    /// Consul refuses a rewrite beside a regex; such a match would consume nothing.
    fn rewrite(&self, request: &RequestView<'_>, to: &str) -> String {
        let consumed = match self {
            // Consul has the route match the prefix `/` then.
            Self::Any => 1,
            Self::Exact(_) => request.path.len(),
            Self::Prefix(text) => text.len(),
            Self::Regex(_) => 0,
        };
        let rest = request.path.get(consumed..).unwrap_or_default();
        match request.query {
            Some(query) => [to, rest, "?", query].concat(),
            None => [to, rest].concat(),
        }
    }
}

impl QueryMatch {
    fn matches(&self, request: &RequestView<'_>) -> bool {
        let Some(value) = request.query_parameter(&self.name) else { return false };
        match &self.test {
            QueryTest::Present => true,
            QueryTest::Exact(text) => text == value,
            QueryTest::Regex(pattern) => pattern.matches(value.as_bytes()),
        }
    }
}

impl<R> Node<R> {
    /// The same with other resolvers.
    pub fn map<S>(&self, resolver: &impl Fn(&R) -> S) -> Node<S> {
        match self {
            Self::Router(routes) => Node::Router(routes.iter().map(|route| route.map(resolver)).collect()),
            Self::Splitter(splitter) => Node::Splitter(splitter.map(resolver)),
            Self::Resolver(own) => Node::Resolver(resolver(own)),
        }
    }
}

impl<R> Route<R> {
    fn map<S>(&self, resolver: &impl Fn(&R) -> S) -> Route<S> {
        Route {
            name: self.name.clone(),
            matches: self.matches.clone(),
            prefix_rewrite: self.prefix_rewrite.clone(),
            request_timeout: self.request_timeout,
            idle_timeout: self.idle_timeout,
            retries: self.retries.clone(),
            request_edits: self.request_edits.clone(),
            response_edits: self.response_edits.clone(),
            next: match &self.next {
                Next::Splitter(splitter) => Next::Splitter(splitter.map(resolver)),
                Next::Resolver(own) => Next::Resolver(resolver(own)),
            },
        }
    }
}

impl<R> Splitter<R> {
    /// `None` when there is no leg with a weight.
    #[must_use]
    pub fn new(legs: Vec<Leg<R>>, hash_policies: Vec<HashPolicy>) -> Option<Self> {
        let total = legs.iter().try_fold(0u64, |sum, leg| sum.checked_add(leg.weight))?;
        (total > 0).then_some(Self { legs, total, hash_policies })
    }

    #[must_use]
    pub fn legs(&self) -> &[Leg<R>] {
        &self.legs
    }

    fn map<S>(&self, resolver: &impl Fn(&R) -> S) -> Splitter<S> {
        let leg = |leg: &Leg<R>| Leg {
            weight: leg.weight,
            request_edits: leg.request_edits.clone(),
            response_edits: leg.response_edits.clone(),
            resolver: resolver(&leg.resolver),
        };
        Splitter {
            legs: self.legs.iter().map(leg).collect(),
            total: self.total,
            hash_policies: self.hash_policies.clone(),
        }
    }
}

impl Splitter {
    fn routed(&self, random: u64) -> Option<Routed<'_>> {
        let leg = self.pick(random)?;
        let to = Routed::to(&leg.resolver);
        Some(Routed {
            request_edits: [&leg.request_edits, to.request_edits[1]],
            response_edits: [&leg.response_edits, to.response_edits[1]],
            hash_policies: &self.hash_policies,
            ..to
        })
    }

    /// The legs lie one after the other on a line as long as all weights; the number is a point on it.
    fn pick(&self, random: u64) -> Option<&Leg> {
        let mut point = u64::try_from((u128::from(random) * u128::from(self.total)) >> 64).ok()?;
        self.legs.iter().find(|leg| {
            let here = point < leg.weight;
            point = point.saturating_sub(leg.weight);
            here
        })
    }
}

impl Edits {
    /// Reads one entry's changes, which Envoy makes in this order. `%…%` in values are Envoy's operators.
    ///
    /// # Errors
    /// Names a header that can't be edited, as it frames the message or is no header, or a value that can't be sent
    /// or has an operator that Envoy does not know.
    pub fn new<'a>(
        remove: impl IntoIterator<Item = &'a str>,
        add: impl IntoIterator<Item = (&'a str, &'a str)>,
        set: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, BadEdit> {
        let valued = |(name, text)| Ok((editable(name)?, value(name, text)?));
        // A value of nothing is not sent.
        let sent = |edit: &Result<(HeaderName, EditValue), BadEdit>| !matches!(edit, Ok((_, EditValue::Fixed(value))) if value.is_empty());
        let edits = EntryEdits {
            remove: remove.into_iter().map(editable).collect::<Result<_, _>>()?,
            add: add.into_iter().map(valued).filter(sent).collect::<Result<_, _>>()?,
            set: set.into_iter().map(valued).filter(sent).collect::<Result<_, _>>()?,
        };
        Ok(if edits.is_empty() { Self::default() } else { Self(vec![edits]) })
    }

    /// These changes, then those.
    #[must_use]
    pub fn then(mut self, next: &Self) -> Self {
        self.0.extend_from_slice(&next.0);
        self
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Operators in values that are never known here, so that nothing stands in their place.
    pub fn unknown_operators(&self) -> impl Iterator<Item = &str> {
        self.templates().flat_map(Template::unknown)
    }

    /// Whether values depend on the exchange.
    #[must_use]
    pub fn have_operators(&self) -> bool {
        self.templates().next().is_some()
    }

    fn templates(&self) -> impl Iterator<Item = &Template> {
        let values = self.0.iter().flat_map(|edits| edits.add.iter().chain(&edits.set));
        values.filter_map(|(_, value)| value.template())
    }

    /// Makes the changes to the headers of a request. `known` is what operators stand for, but for those headers.
    pub fn apply_to_request(&self, headers: &mut HeaderMap, known: &Record<'_>) {
        for edits in &self.0 {
            edits.apply(headers, |template, headers| {
                let mut record = known.clone();
                if let Some(request) = &mut record.request {
                    request.headers = headers;
                }
                template.text(&record)
            });
        }
    }

    /// The same for a response.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, known: &Record<'_>) {
        for edits in &self.0 {
            edits.apply(headers, |template, headers| {
                let mut record = known.clone();
                if let Some(response) = &mut record.response {
                    response.headers = headers;
                }
                template.text(&record)
            });
        }
    }
}

impl EntryEdits {
    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty() && self.set.is_empty()
    }

    /// What is removed is not there any more when values are made; and no value sees another (Envoy 1.40). One that comes
    /// to nothing is left out, and leaves what was there.
    fn apply(&self, headers: &mut HeaderMap, fill: impl Fn(&Template, &HeaderMap) -> String) {
        for name in &self.remove {
            headers.remove(name);
        }
        let templates = self.add.iter().chain(&self.set).filter_map(|(_, value)| value.template());
        let made: Vec<Option<HeaderValue>> = templates
            .map(|template| HeaderValue::from_bytes(fill(template, headers).as_bytes()).ok())
            .map(|value| value.filter(|value| !value.is_empty()))
            .collect();
        let mut made = made.into_iter();
        let mut value = |value: &EditValue| match value {
            EditValue::Fixed(value) => Some(value.clone()),
            EditValue::Template(_) => made.next().flatten(),
        };
        for (name, edit) in &self.add {
            value(edit).map(|value| headers.append(name, value));
        }
        for (name, edit) in &self.set {
            value(edit).map(|value| headers.insert(name, value));
        }
    }
}

impl EditValue {
    fn template(&self) -> Option<&Template> {
        match self {
            Self::Template(template) => Some(template),
            Self::Fixed(_) => None,
        }
    }
}

/// A header edit that can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadEdit(String);

fn editable(name: &str) -> Result<HeaderName, BadEdit> {
    let framing = [CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE];
    HeaderName::from_bytes(name.as_bytes())
        .ok()
        .filter(|name| !framing.contains(name))
        .ok_or_else(|| BadEdit(format!("the header {name:?} can't be edited")))
}

fn value(name: &str, text: &str) -> Result<EditValue, BadEdit> {
    let bad = |why: &dyn fmt::Display| BadEdit(format!("the value of the header {name:?} can't be sent: {why}"));
    let template = Template::read(text).map_err(|error| bad(&error))?;
    if let Some(operator) = template.unknown().find(|operator| !operators::is_known_to_envoy(operator)) {
        return Err(bad(&format_args!("there is no operator %{operator}%")));
    }
    match template.fixed() {
        Some(text) => HeaderValue::try_from(text).map(EditValue::Fixed).map_err(|error| bad(&error)),
        None if HeaderValue::try_from(text).is_err() => Err(bad(&"it has characters that no header has")),
        None => Ok(EditValue::Template(template)),
    }
}

impl RetryPolicy {
    /// Envoy's reading of a route's fields: without a condition nothing is tried again, and without a number
    /// once.
    #[must_use]
    pub fn new(retries: u32, conditions: Vec<RetryOn>, statuses: Vec<u16>) -> Option<Self> {
        let some = !conditions.is_empty() || !statuses.is_empty();
        some.then_some(Self { retries: retries.max(1), conditions, statuses })
    }

    /// Whether a response with these headers is to be tried again.
    #[must_use]
    pub fn retries_response(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        if headers.contains_key("x-envoy-ratelimited") {
            return self.conditions.contains(&RetryOn::EnvoyRateLimited);
        }
        let grpc_status = || headers.get("grpc-status")?.to_str().ok()?.parse::<u32>().ok();
        self.statuses.contains(&status.as_u16())
            || self.conditions.iter().any(|condition| match condition {
                RetryOn::ServerError => status.is_server_error(),
                RetryOn::GatewayError => matches!(status.as_u16(), 502..=504),
                RetryOn::Retriable4xx => status == StatusCode::CONFLICT,
                RetryOn::Grpc(code) => grpc_status() == Some(*code),
                _ => false,
            })
    }

    /// Whether a try that brought no response is to be tried again.
    #[must_use]
    pub fn retries_failure(&self, failure: Failure) -> bool {
        self.conditions.iter().any(|condition| match condition {
            // To Envoy a try without a response is a 503 of the instance.
            RetryOn::ServerError | RetryOn::GatewayError | RetryOn::Reset => true,
            RetryOn::ResetBeforeRequest => matches!(failure, Failure::ResetBeforeRequest | Failure::Connect),
            RetryOn::ConnectFailure => failure == Failure::Connect,
            RetryOn::RefusedStream => failure == Failure::Refused,
            _ => false,
        })
    }
}

impl RetryOn {
    /// Reads a condition as Consul and Envoy spell it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "5xx" => Self::ServerError,
            "gateway-error" => Self::GatewayError,
            "reset" => Self::Reset,
            "reset-before-request" => Self::ResetBeforeRequest,
            "connect-failure" => Self::ConnectFailure,
            "envoy-ratelimited" => Self::EnvoyRateLimited,
            "retriable-4xx" => Self::Retriable4xx,
            "refused-stream" => Self::RefusedStream,
            "cancelled" => Self::Grpc(1),
            "deadline-exceeded" => Self::Grpc(4),
            "resource-exhausted" => Self::Grpc(8),
            "internal" => Self::Grpc(13),
            "unavailable" => Self::Grpc(14),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::operators::Request;
    use crate::snapshot::{Chain, HashSource, Protocol, ValueTest};

    fn resolver() -> Arc<Resolver> {
        Arc::new(Resolver::new(Vec::new()))
    }

    fn chain(start: Node) -> Chain {
        Chain { protocol: Protocol::Http, start }
    }

    fn route(name: &str, matches: RouteMatch) -> Route {
        Route {
            name: name.into(),
            matches,
            prefix_rewrite: None,
            request_timeout: None,
            idle_timeout: None,
            retries: None,
            request_edits: Edits::default(),
            response_edits: Edits::default(),
            next: Next::Resolver(resolver()),
        }
    }

    fn exact(path: &str) -> PathMatch {
        PathMatch::Exact(Text::new(path, false))
    }

    fn prefix(path: &str) -> PathMatch {
        PathMatch::Prefix(Text::new(path, false))
    }

    fn on_path(path: PathMatch) -> RouteMatch {
        RouteMatch { path, ..RouteMatch::default() }
    }

    fn view<'a>(method: &'a str, target: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        RequestView { method, path, path_as_written: false, query, authority: "db", headers }
    }

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in list {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    fn check(matches: &RouteMatch, method: &str, target: &str, list: &[(&'static str, &'static str)], expected: bool) {
        let headers = headers(list);
        assert_eq!(
            matches.matches(&view(method, target, &headers)),
            expected,
            "{matches:?}: {method} {target} {list:?}"
        );
    }

    #[test]
    fn paths_are_matched() {
        let fold = |path| Text::new(path, true);
        let table: [(PathMatch, &[&str], &[&str]); 6] = [
            (PathMatch::Any, &["/", "/x?y"], &[]),
            (exact("/a"), &["/a", "/a?b"], &["/a/", "/A", "/"]),
            (prefix("/adm"), &["/adm", "/admin", "/adm/x"], &["/Adm", "/ad", "/x/adm"]),
            (
                PathMatch::Regex(Pattern::for_path("/v[12]/.*").unwrap()),
                &["/v1/x"],
                &["/v1", "/v3/x", "/V1/x", "/x/v1/x"],
            ),
            (PathMatch::Exact(fold("/Ab")), &["/ab", "/AB"], &["/abc"]),
            (PathMatch::Prefix(fold("/Ab")), &["/ABc"], &["/a"]),
        ];
        for (path, matching, others) in table {
            let matches = on_path(path);
            matching.iter().for_each(|target| check(&matches, "GET", target, &[], true));
            others.iter().for_each(|target| check(&matches, "GET", target, &[], false));
        }
    }

    #[test]
    fn methods_are_matched() {
        let matches = RouteMatch { methods: vec!["GET".to_owned(), "PUT".to_owned()], ..RouteMatch::default() };
        check(&matches, "PUT", "/", &[], true);
        check(&matches, "POST", "/", &[], false);
        check(&matches, "get", "/", &[], false);
    }

    #[test]
    fn any_line_of_a_header_may_match_and_inverted_none() {
        let admin = |invert| RouteMatch {
            headers: vec![HeaderMatch::new("x-role", ValueTest::Exact(Text::new("admin", false)), invert).unwrap()],
            ..RouteMatch::default()
        };
        let both = [("x-role", "user"), ("x-role", "admin")];
        check(&admin(false), "GET", "/", &both, true);
        check(&admin(true), "GET", "/", &both, false);
        check(&admin(false), "GET", "/", &both[..1], false);
        check(&admin(true), "GET", "/", &both[..1], true);
        check(&admin(true), "GET", "/", &[], false);
    }

    #[test]
    fn the_first_query_parameter_of_a_name_is_matched_raw() {
        let query =
            |test| RouteMatch { query: vec![QueryMatch { name: "q".to_owned(), test }], ..RouteMatch::default() };
        for target in ["/?q", "/?q=", "/?a=b&q=1"] {
            check(&query(QueryTest::Present), "GET", target, &[], true);
        }
        for target in ["/", "/?", "/?Q", "/?a=q", "/?qq=1"] {
            check(&query(QueryTest::Present), "GET", target, &[], false);
        }
        let exact = query(QueryTest::Exact("a b".to_owned()));
        check(&exact, "GET", "/?q=a%20b", &[], false);
        let exact = query(QueryTest::Exact("1".to_owned()));
        check(&exact, "GET", "/?q=1&q=2", &[], true);
        check(&exact, "GET", "/?q=2&q=1", &[], false);
        let regex = query(QueryTest::Regex(Pattern::new("[0-9]+").unwrap()));
        check(&regex, "GET", "/?q=12", &[], true);
        check(&regex, "GET", "/?q=12x", &[], false);
    }

    #[test]
    fn the_first_route_that_matches_is_taken_and_the_path_rewritten() {
        let rewriting =
            |path, rewrite: &str| Route { prefix_rewrite: Some(rewrite.to_owned()), ..route(rewrite, on_path(path)) };
        let chain = chain(Node::Router(vec![
            rewriting(exact("/old"), "/new"),
            rewriting(prefix("/foo/"), "/"),
            rewriting(prefix("/foo"), "/bar"),
            route("plain", on_path(prefix("/plain"))),
            rewriting(PathMatch::Any, "/all/"),
        ]));
        for (target, name, path) in [
            ("/old?a=b", "/new", Some("/new?a=b")),
            ("/foo/x", "/", Some("/x")),
            ("/foox?", "/bar", Some("/barx?")),
            ("/plain?x", "plain", None),
            ("/", "/all/", Some("/all/")),
            ("/y", "/all/", Some("/all/y")),
            ("*", "/all/", Some("/all/")),
        ] {
            let headers = HeaderMap::new();
            let routed = chain.route(&view("GET", target, &headers), 0).unwrap();
            assert_eq!((&*routed.route.unwrap().name, routed.path.as_deref()), (name, path), "{target}");
        }
        let none = self::chain(Node::Router(vec![route("x", on_path(exact("/x")))]));
        assert!(none.route(&view("GET", "/", &HeaderMap::new()), 0).is_none());
    }

    #[test]
    fn a_resolvers_request_timeout_counts_where_the_chain_starts_with_it() {
        let slow = Arc::new(Resolver { request_timeout: None, ..Resolver::new(Vec::new()) });
        let headers = HeaderMap::new();
        let timeout = |start| chain(start).route(&view("GET", "/", &headers), 0).map(|routed| routed.request_timeout);
        assert_eq!(timeout(Node::Resolver(Arc::clone(&slow))), Some(None));
        assert_eq!(timeout(Node::Resolver(resolver())), Some(Some(REQUEST_TIMEOUT)));
        let leg =
            |resolver| Leg { weight: 1, request_edits: Edits::default(), response_edits: Edits::default(), resolver };
        let splitter = Splitter::new(vec![leg(Arc::clone(&slow))], Vec::new()).unwrap();
        assert_eq!(timeout(Node::Splitter(splitter)), Some(Some(REQUEST_TIMEOUT)));
        let second = Some(Duration::from_secs(1));
        let routed = Route { request_timeout: second, next: Next::Resolver(slow), ..route("x", RouteMatch::default()) };
        assert_eq!(timeout(Node::Router(vec![routed])), Some(second));
    }

    #[test]
    fn splits_are_in_proportion_and_the_same_number_takes_the_same_leg() {
        let build = || {
            let leg = |weight| Leg {
                weight,
                request_edits: Edits::default(),
                response_edits: Edits::default(),
                resolver: resolver(),
            };
            Splitter::new(vec![leg(8999), leg(1), leg(0), leg(1000)], Vec::new()).unwrap()
        };
        let (splitter, reread) = (build(), build());
        let pick = |splitter: &Splitter, random| {
            let leg = splitter.pick(random).unwrap();
            splitter.legs().iter().position(|other| std::ptr::eq(other, leg)).unwrap()
        };
        let mut counts = [0; 4];
        let step = u64::MAX / 10_000;
        for point in 0..10_000 {
            let random = point * step + step / 2;
            counts[pick(&splitter, random)] += 1;
            assert_eq!(pick(&splitter, random), pick(&reread, random));
        }
        assert_eq!(counts, [8999, 1, 0, 1000]);
        assert_eq!((pick(&splitter, 0), pick(&splitter, u64::MAX)), (0, 3));
        assert!(Splitter::<Arc<Resolver>>::new(Vec::new(), Vec::new()).is_none());
    }

    fn apply(edits: &Edits, headers: &mut HeaderMap) {
        edits.apply_to_request(headers, &Record::new(SystemTime::UNIX_EPOCH));
    }

    #[test]
    fn header_edits_of_a_leg_come_before_those_of_its_route() {
        let add = |value| Edits::new([], [("x-by", value)], []).unwrap();
        let hash = HashPolicy { source: HashSource::SourceIp, terminal: false };
        let leg = Leg { weight: 1, request_edits: add("leg"), response_edits: add("leg"), resolver: resolver() };
        let splitter = Splitter::new(vec![leg], vec![hash.clone()]).unwrap();
        let chain = chain(Node::Router(vec![Route {
            request_edits: add("route"),
            response_edits: add("route"),
            next: Next::Splitter(splitter),
            ..route("x", RouteMatch::default())
        }]));
        let headers = HeaderMap::new();
        let routed = chain.route(&view("GET", "/", &headers), 0).unwrap();
        let applied = |edits: [&Edits; 2]| {
            let mut headers = HeaderMap::new();
            edits.iter().for_each(|edits| apply(edits, &mut headers));
            headers.get_all("x-by").iter().map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(applied(routed.request_edits), ["leg", "route"]);
        assert_eq!(applied(routed.response_edits), ["leg", "route"]);
        assert_eq!(routed.hash_policies, [hash]);
    }

    #[test]
    fn edits_remove_then_add_then_set() {
        let edits = Edits::new(["x-a", "X-B"], [("x-a", "1"), ("x-c", "50%%")], [("x-c", "2"), ("x-d", "3")]).unwrap();
        let mut map = headers(&[("x-a", "0"), ("x-a", "00"), ("x-b", "0"), ("x-c", "0"), ("x-e", "0")]);
        apply(&edits, &mut map);
        assert_eq!(map, headers(&[("x-a", "1"), ("x-c", "2"), ("x-d", "3"), ("x-e", "0")]));
        let mut map = HeaderMap::new();
        apply(&Edits::new([], [("x-c", "50%%")], []).unwrap().then(&Edits::new(["x-a"], [], []).unwrap()), &mut map);
        assert_eq!(map, headers(&[("x-c", "50%")]));
        for (name, value) in [("content-length", "1"), (":path", "/"), ("a b", ""), ("Host", "x"), ("x", "a\nb")] {
            assert!(Edits::new([], [(name, value)], []).is_err(), "{name}");
        }
    }

    /// As Envoy 1.40 does with them.
    #[test]
    fn operators_in_values_of_edits() {
        let found = headers(&[("x-in", "in"), ("x-two", "1"), ("x-two", "2"), ("x-old", "old")]);
        let edited = |remove: &[&str], set: &[(&str, &str)]| {
            let edits = Edits::new(remove.iter().copied(), [], set.iter().copied()).unwrap();
            let mut map = found.clone();
            let (protocol, headers) = ("HTTP/1.1", &HeaderMap::new());
            let request = Request { protocol, method: "GET", path: "/a?b=c", authority: "db.local", headers };
            edits.apply_to_request(&mut map, &Record { request: Some(request), ..Record::new(SystemTime::UNIX_EPOCH) });
            map
        };
        for (value, expected) in [
            ("%PROTOCOL%", Some("HTTP/1.1")),
            ("%REQ(x-in)%", Some("in")),
            ("%REQ(X-None?x-in):1%", Some("i")),
            ("%REQ(x-two)%", Some("1")),
            ("%REQ(:PATH)%", Some("/a?b=c")),
            ("%REQ(:METHOD)% %REQ(:AUTHORITY)%", Some("GET db.local")),
            ("a%REQ(x-none)%b", Some("ab")),
            ("%REQ(x-none)%", None),
            ("", None),
            ("%HOSTNAME%", None),
            ("%%%PROTOCOL%%%", Some("%HTTP/1.1%")),
        ] {
            let expected: Vec<_> = expected.into_iter().collect();
            let map = edited(&[], &[("x-new", value)]);
            assert_eq!(map.get_all("x-new").iter().collect::<Vec<_>>(), expected, "{value}");
        }
        // What has no value leaves what was there; no value sees another; what is removed is not seen.
        let map = edited(&[], &[("x-old", "%REQ(x-none)%"), ("x-in", "new"), ("x-copy", "%REQ(x-in)%")]);
        assert_eq!(
            (&map["x-old"], &map["x-in"], &map["x-copy"]),
            (&"old".parse().unwrap(), &"new".parse().unwrap(), &"in".parse().unwrap())
        );
        assert!(!edited(&["x-in"], &[("x-copy", "%REQ(x-in)%")]).contains_key("x-copy"));
        let unknown = Edits::new([], [("x", "%HOSTNAME%%PROTOCOL%")], []).unwrap();
        assert_eq!(unknown.unknown_operators().collect::<Vec<_>>(), ["HOSTNAME"]);
        for refused in [
            "%",
            "50% off",
            "%UNKNOWN%",
            "%REQ(x",
            "%protocol%",
            "% PROTOCOL %",
            "%%%",
            "%REQ(a b)%",
            "%REQ%",
            "%REQ()%",
        ] {
            assert!(Edits::new([], [("x", refused)], []).is_err(), "{refused}");
        }
    }

    #[test]
    fn retries_happen_on_their_conditions_alone() {
        assert_eq!(RetryPolicy::new(3, Vec::new(), Vec::new()), None);
        assert_eq!(RetryPolicy::new(0, vec![RetryOn::Reset], Vec::new()).map(|policy| policy.retries), Some(1));
        let on = |condition: &str| RetryPolicy::new(1, vec![RetryOn::parse(condition).unwrap()], Vec::new()).unwrap();
        let all = [500, 502, 503, 504, 409, 429];
        let retried = |policy: &RetryPolicy| {
            let retried =
                |status: &&u16| policy.retries_response(StatusCode::from_u16(**status).unwrap(), &HeaderMap::new());
            all.iter().filter(retried).copied().collect::<Vec<_>>()
        };
        assert_eq!(retried(&on("5xx")), [500, 502, 503, 504]);
        assert_eq!(retried(&on("gateway-error")), [502, 503, 504]);
        assert_eq!(retried(&on("retriable-4xx")), [409]);
        assert_eq!(retried(&on("reset")), [0; 0]);
        assert_eq!(retried(&RetryPolicy::new(1, Vec::new(), vec![429, 500]).unwrap()), [500, 429]);
        let failures = [Failure::Connect, Failure::Refused, Failure::ResetBeforeRequest, Failure::Reset];
        let after = |condition| failures.map(|failure| on(condition).retries_failure(failure));
        for condition in ["5xx", "gateway-error", "reset"] {
            assert_eq!(after(condition), [true; 4], "{condition}");
        }
        assert_eq!(after("connect-failure"), [true, false, false, false]);
        assert_eq!(after("refused-stream"), [false, true, false, false]);
        assert_eq!(after("reset-before-request"), [true, false, true, false]);
        assert_eq!(after("unavailable"), [false; 4]);
        let grpc = headers(&[("grpc-status", "14")]);
        assert!(on("unavailable").retries_response(StatusCode::OK, &grpc));
        assert!(!on("internal").retries_response(StatusCode::OK, &grpc));
        let limited = headers(&[("x-envoy-ratelimited", "true")]);
        assert!(!on("5xx").retries_response(StatusCode::SERVICE_UNAVAILABLE, &limited));
        assert!(on("envoy-ratelimited").retries_response(StatusCode::SERVICE_UNAVAILABLE, &limited));
        assert_eq!(RetryOn::parse("retriable-status-codes"), None);
    }
}
