//! Routers and splitters: which resolver an HTTP request is for, and how it goes there.

use std::sync::Arc;
use std::time::Duration;

use super::edits::Edits;
use super::hash::HashPolicy;
use super::request::RequestView;
use super::resolver::{REQUEST_TIMEOUT, Resolver};
use super::retry::RetryPolicy;
use super::route_match::RouteMatch;

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
    /// The router sets it itself: for `explain` alone.
    pub sets_request_timeout: bool,
    /// The same of the idle timeout.
    pub sets_idle_timeout: bool,
    /// The service that the router's `Destination` names; empty: the router's own. For `explain` alone, as a
    /// `service-resolver` of it may redirect to another.
    pub service: String,
    pub retries: Option<RetryPolicy>,
    pub request_edits: Edits,
    pub response_edits: Edits,
    pub next: Next<R>,
}

/// The destination of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next<R = Arc<Resolver>> {
    Splitter(Splitter<R>),
    Resolver(R),
}

/// Shares requests out by weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splitter<R = Arc<Resolver>> {
    /// The service whose `service-splitter` it is.
    pub service: String,
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
    /// The service that the split names; empty: agents older than 1.10 do not say. For `explain` alone.
    pub service: String,
    pub resolver: R,
}

/// The route, resolver and settings that were chosen for a request.
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
    /// Chooses the next node for a request.
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
        Self {
            route: None,
            path: None,
            request_timeout: Some(REQUEST_TIMEOUT),
            idle_timeout: Some(IDLE_TIMEOUT),
            retries: None,
            request_edits: [Edits::NONE; 2],
            response_edits: [Edits::NONE; 2],
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
            sets_request_timeout: self.sets_request_timeout,
            sets_idle_timeout: self.sets_idle_timeout,
            service: self.service.clone(),
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
    pub fn new(service: String, legs: Vec<Leg<R>>, hash_policies: Vec<HashPolicy>) -> Option<Self> {
        let total = legs.iter().try_fold(0u64, |sum, leg| sum.checked_add(leg.weight))?;
        (total > 0).then_some(Self { service, legs, total, hash_policies })
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
            service: leg.service.clone(),
            resolver: resolver(&leg.resolver),
        };
        Splitter {
            service: self.service.clone(),
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http::HeaderMap;

    use super::*;
    use crate::operators::Record;
    use crate::snapshot::fixture::{exact, on_path, prefix, view};
    use crate::snapshot::{Chain, HashSource, PathMatch, Protocol};

    fn resolver() -> Arc<Resolver> {
        Arc::new(Resolver::new(Vec::new()))
    }

    fn chain(start: Node) -> Chain {
        Chain { service: "web".into(), protocol: Protocol::Http, start }
    }

    fn route(name: &str, matches: RouteMatch) -> Route {
        Route {
            name: name.into(),
            matches,
            prefix_rewrite: None,
            request_timeout: None,
            idle_timeout: None,
            sets_request_timeout: false,
            sets_idle_timeout: false,
            service: String::new(),
            retries: None,
            request_edits: Edits::default(),
            response_edits: Edits::default(),
            next: Next::Resolver(resolver()),
        }
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
        let leg = |resolver| Leg {
            weight: 1,
            request_edits: Edits::default(),
            response_edits: Edits::default(),
            service: String::new(),
            resolver,
        };
        let splitter = Splitter::new("web".into(), vec![leg(Arc::clone(&slow))], Vec::new()).unwrap();
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
                service: String::new(),
                resolver: resolver(),
            };
            Splitter::new("web".into(), vec![leg(8999), leg(1), leg(0), leg(1000)], Vec::new()).unwrap()
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
        assert!(Splitter::<Arc<Resolver>>::new(String::new(), Vec::new(), Vec::new()).is_none());
    }

    #[test]
    fn header_edits_of_a_leg_come_before_those_of_its_route() {
        let add = |value| Edits::new([], [("x-by", value)], []).unwrap();
        let hash = HashPolicy { source: HashSource::SourceIp, terminal: false };
        let leg = Leg {
            weight: 1,
            request_edits: add("leg"),
            response_edits: add("leg"),
            service: String::new(),
            resolver: resolver(),
        };
        let splitter = Splitter::new("web".into(), vec![leg], vec![hash.clone()]).unwrap();
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
            let known = Record::new(SystemTime::UNIX_EPOCH);
            edits.iter().for_each(|edits| edits.apply_to_request(&mut headers, &known));
            headers.get_all("x-by").iter().map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(applied(routed.request_edits), ["leg", "route"]);
        assert_eq!(applied(routed.response_edits), ["leg", "route"]);
        assert_eq!(routed.hash_policies, [hash]);
    }
}
