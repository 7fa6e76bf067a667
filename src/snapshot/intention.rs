//! Intentions: who may talk to us.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::time::SystemTime;

use super::hits::Hits;
use super::permission::{Action, Permission, Subject, Token, TokenRequirement};
use super::request::RequestView;
use crate::jwt::{Providers, Verified};
use crate::tls::SpiffeId;

/// Matches any name, in a source's namespace and name and in a destination.
const ANY: &str = "*";

/// One intention that names us, or a wildcard, as destination.
///
/// Sources of a cluster peering or a sameness group are not among them: over HTTP their identities can't be
/// known, so such an intention matches nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    /// `default` when the intention names none. Partitions have no wildcard.
    pub source_partition: String,
    /// `*` matches any.
    pub source_namespace: String,
    /// `*` matches any.
    pub source: String,
    /// As the intention names it (`*` included): for the log.
    pub destination: String,
    /// `None`: only HTTP requests can be judged, by `permissions`, `token` or both.
    pub action: Option<Action>,
    /// The first that matches a request decides. Empty beside a `token`: every request with that token is allowed.
    pub permissions: Vec<Permission>,
    /// A token requirement for every request.
    pub token: Option<TokenRequirement>,
    /// 1 to 9; higher decides first.
    pub precedence: u32,
    /// What it decided so far, as long as there is an intention of its source and destination.
    pub hits: Hits,
}

/// The decision where no intention matches, and its source in the agent's answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultPolicy {
    pub action: Action,
    /// For the log: "default policy of the agent's ACLs", …
    pub source: String,
    /// What it decided so far.
    pub hits: Hits,
}

/// All intentions that match the local service, ready for decisions that do not cost in proportion to
/// their number.
#[derive(Debug, PartialEq, Eq)]
pub struct Intentions {
    /// In the order in which they decide.
    list: Vec<Intention>,
    by_source: BySource,
    default: DefaultPolicy,
    /// One of them judges requests by what they are.
    has_request_rules: bool,
}

/// Where in the list the first intention of each source is: by partition, then namespace, then name.
/// Nested, so that a look-up borrows its keys.
type BySource = HashMap<String, HashMap<String, HashMap<String, usize>>>;

/// The outcome for one connection, with what decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision<'a> {
    Allow(Decider<'a>),
    Deny(Decider<'a>),
    /// The deciding intention has permissions: each request is judged. On a TCP listener that means deny.
    EachRequest(&'a Intention),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decider<'a> {
    Intention(&'a Intention),
    Default(&'a DefaultPolicy),
    /// The permission at this place of the intention's list.
    Permission(&'a Intention, usize),
    /// The request lacks a token that the intention, or its permission at this place, requires.
    Token(&'a Intention, Option<usize>),
    /// The intention, or one of its permissions, names a token provider that is not known.
    UnknownProvider(&'a Intention),
    /// The intention decides about its source, but none of its permissions matches the request.
    NoPermission(&'a Intention, &'a DefaultPolicy),
}

impl Intentions {
    #[must_use]
    pub fn new(mut list: Vec<Intention>, default: DefaultPolicy) -> Self {
        // The agent sorts its answer so, but what decides first is too important to rest on that.
        list.sort_by(|a, b| a.order().cmp(&b.order()));
        let mut by_source = BySource::new();
        for (index, intention) in list.iter().enumerate() {
            let names = by_source.entry(intention.source_partition.clone()).or_default();
            let names = names.entry(intention.source_namespace.clone()).or_default();
            names.entry(intention.source.clone()).or_insert(index);
        }
        let has_request_rules = list.iter().any(|intention| intention.action.is_none());
        Self { list, by_source, default, has_request_rules }
    }

    /// Decides about a peer whose certificate chains to our roots and is of our trust domain: the first
    /// intention whose source matches, else the default policy (Consul 1.19.2,
    /// `agent/structs/intention.go`).
    #[must_use]
    pub fn decide(&self, peer: &SpiffeId) -> Decision<'_> {
        match self.first_match(peer) {
            Some(intention) => match intention.action {
                Some(Action::Allow) => Decision::Allow(Decider::Intention(intention)),
                Some(Action::Deny) => Decision::Deny(Decider::Intention(intention)),
                None => Decision::EachRequest(intention),
            },
            None => self.default.decision(Decider::Default(&self.default)),
        }
    }

    /// Decides about one request of such a peer, with the tokens that were verified, of the providers that
    /// [`Intention::providers`] names.
    ///
    /// Stricter than Consul's Envoy in this: what allows and lacks its token is a denial, also where the default
    /// policy would allow; a deny for certain claims can't be escaped by leaving the token out.
    #[must_use]
    pub fn decide_request(&self, peer: &SpiffeId, request: &RequestView<'_>, verified: &Verified) -> Decision<'_> {
        match self.decide(peer) {
            Decision::EachRequest(intention) => self.decide_by(intention, &Subject::new(request, verified)),
            decision => decision,
        }
    }

    /// Verifies the tokens that matter for one request of such a peer, and decides about it. What is allowed
    /// goes on with the headers that [`Providers::pass_on`] makes of it.
    ///
    /// An intention that names an unknown provider denies all requests, also those of permissions without a token: the
    /// client could forge the provider's forwarding header, which is not known either. Consul's Envoy keeps its earlier
    /// rules then, as Consul generates no listener (Consul 1.19.2, `agent/xds/jwt_authn.go`).
    #[must_use]
    pub fn verify_and_decide(
        &self,
        peer: &SpiffeId,
        request: &RequestView<'_>,
        providers: &Providers,
        now: SystemTime,
    ) -> (Decision<'_>, Verified) {
        let intention = match self.decide(peer) {
            Decision::EachRequest(intention) => intention,
            decision => return (decision, Verified::default()),
        };
        let verified = providers.verify(intention.providers(), request.headers, request.query, now);
        if verified.lacks_provider() {
            return (Decision::Deny(Decider::UnknownProvider(intention)), verified);
        }
        let decision = self.decide_by(intention, &Subject::new(request, &verified));
        (decision, verified)
    }

    /// In the order in which they decide.
    #[must_use]
    pub fn list(&self) -> &[Intention] {
        &self.list
    }

    /// What decides where none of them matches.
    #[must_use]
    pub fn default_policy(&self) -> &DefaultPolicy {
        &self.default
    }

    /// Whether requests of any source are judged by what they are.
    #[must_use]
    pub fn has_request_rules(&self) -> bool {
        self.has_request_rules
    }

    /// Whether what decides about such a peer's requests looks at their headers, or at tokens.
    #[must_use]
    pub fn look_at_headers(&self, peer: &SpiffeId) -> bool {
        let looks = |permission: &Permission| {
            let headers = permission.conditions.as_ref().is_some_and(|conditions| !conditions.headers.is_empty());
            headers || permission.token.is_some()
        };
        match self.decide(peer) {
            Decision::EachRequest(intention) => intention.token.is_some() || intention.permissions.iter().any(looks),
            Decision::Allow(_) | Decision::Deny(_) => false,
        }
    }

    /// An intention with permissions uses up its source: what none of them matches is left to the default
    /// policy, not to the next intention.
    fn decide_by<'a>(&'a self, intention: &'a Intention, subject: &Subject<'_>) -> Decision<'a> {
        if intention.token.as_ref().is_some_and(|token| token.check(subject) != Token::Good) {
            return Decision::Deny(Decider::Token(intention, None));
        }
        if intention.permissions.is_empty() && intention.token.is_some() {
            return Decision::Allow(Decider::Intention(intention));
        }
        let mut permissions = intention.permissions.iter().enumerate();
        match permissions.find(|(_, permission)| permission.matches(subject)) {
            Some((place, permission)) => self.decide_by_token(intention, place, permission, subject),
            None => self.default.decision(Decider::NoPermission(intention, &self.default)),
        }
    }

    fn decide_by_token<'a>(
        &'a self,
        intention: &'a Intention,
        place: usize,
        permission: &Permission,
        subject: &Subject<'_>,
    ) -> Decision<'a> {
        let token = permission.token.as_ref().map_or(Token::Good, |token| token.check(subject));
        let decider = match token {
            Token::Good => Decider::Permission(intention, place),
            Token::Missing | Token::OtherClaims => Decider::Token(intention, Some(place)),
        };
        match (permission.action, token) {
            (Action::Allow, Token::Good) => Decision::Allow(decider),
            // A deny for some claims is not about a token with others; no later permission is tried, as in Envoy.
            (Action::Deny, Token::OtherClaims) => {
                self.default.decision(Decider::NoPermission(intention, &self.default))
            }
            (Action::Allow | Action::Deny, _) => Decision::Deny(decider),
        }
    }

    /// The earliest in order of the (at most four) forms in which an intention can name this peer.
    fn first_match(&self, peer: &SpiffeId) -> Option<&Intention> {
        let namespaces = self.by_source.get(&peer.partition)?;
        let forms = [peer.namespace.as_str(), ANY];
        let names = forms.iter().filter_map(|namespace| namespaces.get(*namespace));
        let matches = names.flat_map(|names| [names.get(&peer.service), names.get(ANY)]);
        matches.flatten().min().and_then(|&index| self.list.get(index))
    }
}

impl Decision<'_> {
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow(_))
    }

    /// The count of the rule that decided.
    #[must_use]
    pub fn hits(&self) -> &Hits {
        match self {
            Self::Allow(decider) | Self::Deny(decider) => match decider {
                Decider::Intention(intention)
                | Decider::Permission(intention, _)
                | Decider::Token(intention, _)
                | Decider::UnknownProvider(intention)
                | Decider::NoPermission(intention, _) => &intention.hits,
                Decider::Default(policy) => &policy.hits,
            },
            Self::EachRequest(intention) => &intention.hits,
        }
    }
}

impl Intention {
    /// Whether both are about the same source and destination.
    #[must_use]
    pub fn is_of_same_services(&self, other: &Self) -> bool {
        fn names(of: &Intention) -> [&String; 4] {
            [&of.source_partition, &of.source_namespace, &of.source, &of.destination]
        }
        names(self) == names(other)
    }

    /// The source, as briefly as its partition and namespace allow: `web`, `team/web`, `part/team/web`.
    #[must_use]
    pub fn source_words(&self) -> String {
        if self.source_partition != "default" {
            format!("{}/{}/{}", self.source_partition, self.source_namespace, self.source)
        } else if self.source_namespace != "default" {
            format!("{}/{}", self.source_namespace, self.source)
        } else {
            self.source.clone()
        }
    }

    /// Names of the providers whose tokens a request may need; often none, and at times one twice.
    pub fn providers(&self) -> impl Iterator<Item = &str> {
        let permissions = self.permissions.iter().filter_map(|permission| permission.token.as_ref());
        let requirements = self.token.iter().chain(permissions);
        requirements.flat_map(|token| &token.providers).map(|provider| provider.name.as_str())
    }

    /// Precedence first; ties as Consul breaks them.
    fn order(&self) -> impl Ord + '_ {
        (Reverse(self.precedence), &self.source_partition, &self.source_namespace, &self.source, &self.destination)
    }
}

impl DefaultPolicy {
    fn decision<'a>(&self, decider: Decider<'a>) -> Decision<'a> {
        match self.action {
            Action::Allow => Decision::Allow(decider),
            Action::Deny => Decision::Deny(decider),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl fmt::Display for Intention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "intention {} => {} (", self.source_words(), self.destination)?;
        match self.action {
            Some(action) => write!(f, "{action}")?,
            None if self.permissions.is_empty() => f.write_str("allow with token")?,
            None => f.write_str("permissions")?,
        }
        write!(f, ", precedence {})", self.precedence)
    }
}

impl fmt::Display for DefaultPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.source, self.action)
    }
}

impl fmt::Display for Decision<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow(decider) => write!(f, "allowed by {decider}"),
            Self::Deny(decider) => write!(f, "denied by {decider}"),
            Self::EachRequest(intention) => write!(f, "left to requests by {intention}"),
        }
    }
}

impl fmt::Display for Decider<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention(intention) => intention.fmt(f),
            Self::Default(policy) => policy.fmt(f),
            Self::Permission(intention, place) => {
                let action = intention.permissions.get(*place).map_or(Action::Deny, |permission| permission.action);
                write!(f, "permission {} ({action}) of {intention}", place + 1)
            }
            Self::Token(intention, None) => write!(f, "want of a token that {intention} requires"),
            Self::Token(intention, Some(place)) => {
                write!(f, "want of a token that permission {} of {intention} requires", place + 1)
            }
            Self::UnknownProvider(intention) => write!(f, "want of a token provider that {intention} names"),
            Self::NoPermission(intention, policy) => {
                write!(f, "{policy}, as no permission of {intention} matches")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Conditions;

    const ALLOW: Option<Action> = Some(Action::Allow);
    const DENY: Option<Action> = Some(Action::Deny);

    /// `source` is `[[partition/]namespace/]name`.
    fn intention(source: &str, destination: &str, action: Option<Action>, precedence: u32) -> Intention {
        let mut parts = source.rsplit('/');
        let mut part = || parts.next().unwrap_or("default").to_owned();
        Intention {
            source: part(),
            source_namespace: part(),
            source_partition: part(),
            destination: destination.to_owned(),
            action,
            permissions: Vec::new(),
            token: None,
            precedence,
            hits: Hits::default(),
        }
    }

    fn peer(name: &str) -> SpiffeId {
        let path = match name.split('/').collect::<Vec<_>>()[..] {
            [partition, namespace, service] => format!("ap/{partition}/ns/{namespace}/dc/dc1/svc/{service}"),
            [namespace, service] => format!("ns/{namespace}/dc/dc1/svc/{service}"),
            _ => format!("ns/default/dc/dc1/svc/{name}"),
        };
        SpiffeId::parse(&format!("spiffe://td.consul/{path}")).unwrap()
    }

    /// What is decided about the peer, and by what.
    fn decide(list: &[Intention], default: Action, name: &str) -> String {
        let default = DefaultPolicy { action: default, source: "default policy".to_owned(), hits: Hits::default() };
        let intentions = Intentions::new(list.to_vec(), default);
        intentions.decide(&peer(name)).to_string()
    }

    #[test]
    fn the_highest_precedence_decides_whatever_the_order_of_the_answer() {
        let mut list = vec![
            intention("web", "db", ALLOW, 9),
            intention("*", "db", DENY, 8),
            intention("web", "*", DENY, 6),
            intention("*", "*", ALLOW, 5),
        ];
        for _ in 0..list.len() {
            list.rotate_left(1);
            assert_eq!(decide(&list, Action::Deny, "web"), "allowed by intention web => db (allow, precedence 9)");
            assert_eq!(decide(&list, Action::Allow, "api"), "denied by intention * => db (deny, precedence 8)");
        }
        list.retain(|i| i.destination == "*");
        assert_eq!(decide(&list, Action::Allow, "web"), "denied by intention web => * (deny, precedence 6)");
        assert_eq!(decide(&list, Action::Deny, "api"), "allowed by intention * => * (allow, precedence 5)");
    }

    #[test]
    fn without_a_match_the_default_policy_decides() {
        assert_eq!(decide(&[], Action::Allow, "web"), "allowed by default policy (allow)");
        assert_eq!(decide(&[], Action::Deny, "web"), "denied by default policy (deny)");
        let other = [intention("api", "db", ALLOW, 9)];
        assert_eq!(decide(&other, Action::Deny, "web"), "denied by default policy (deny)");
    }

    #[test]
    fn names_are_compared_exactly() {
        let list = [intention("web", "db", ALLOW, 9)];
        for name in ["Web", "we", "webb", "web.", "other/web", "other/default/web"] {
            assert_eq!(decide(&list, Action::Deny, name), "denied by default policy (deny)", "{name}");
        }
    }

    #[test]
    fn a_wildcard_stays_in_its_namespace_and_partition() {
        let list = [
            intention("team/web", "db", DENY, 9),
            intention("team/*", "db", ALLOW, 8),
            intention("*/*", "db", DENY, 7),
            intention("part/*/*", "db", ALLOW, 7),
        ];
        let check = |name: &str, expected: &str| assert_eq!(decide(&list, Action::Deny, name), expected, "{name}");
        check("team/web", "denied by intention team/web => db (deny, precedence 9)");
        check("team/api", "allowed by intention team/* => db (allow, precedence 8)");
        check("other/api", "denied by intention */* => db (deny, precedence 7)");
        check("part/team/web", "allowed by intention part/*/* => db (allow, precedence 7)");
        check("elsewhere/team/web", "denied by default policy (deny)");
    }

    #[test]
    fn permissions_leave_it_to_each_request() {
        let everything = Permission { action: Action::Allow, conditions: Some(Conditions::default()), token: None };
        let web = Intention { permissions: vec![everything], ..intention("web", "db", None, 9) };
        let list = [web, intention("*", "db", DENY, 8)];
        let expected = "left to requests by intention web => db (permissions, precedence 9)";
        assert_eq!(decide(&list, Action::Allow, "web"), expected);
    }

    #[test]
    fn tokens_are_verified_of_those_who_need_them() {
        use std::sync::Arc;
        use std::time::{Duration, UNIX_EPOCH};

        use aws_lc_rs::hmac;
        use base64::Engine as _;
        use base64::engine::general_purpose::URL_SAFE_NO_PAD;

        use crate::jwt::{KeySet, Provider, Refusal};
        use crate::snapshot::ProviderRequirement;

        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#), URL_SAFE_NO_PAD.encode(r#"{"exp":1000}"#));
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, b"secret"), signed.as_bytes());
        let token = format!("Bearer {signed}.{}", URL_SAFE_NO_PAD.encode(signature));
        let keys = KeySet::parse(br#"{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}"#).unwrap();
        let provider = Provider {
            issuer: String::new(),
            audiences: Vec::new(),
            keys: Some(Arc::new(keys)),
            refetch: None,
            locations: Vec::new(),
            forwarding: None,
            clock_skew: Duration::from_secs(30),
        };
        let known = Providers([("okta".to_owned(), provider)].into());
        let requirement = ProviderRequirement { name: "okta".to_owned(), claims: Vec::new() };
        let token_needed = TokenRequirement { providers: vec![requirement] };
        let web = Intention { token: Some(token_needed.clone()), ..intention("web", "db", None, 9) };
        let methods = |method: &str| Some(Conditions { methods: vec![method.to_owned()], ..Conditions::default() });
        let post = Permission { action: Action::Allow, conditions: methods("POST"), token: Some(token_needed) };
        let get = Permission { action: Action::Allow, conditions: methods("GET"), token: None };
        let open = Intention { permissions: vec![post, get], ..intention("open", "db", None, 9) };
        let default =
            DefaultPolicy { action: Action::Allow, source: "default policy".to_owned(), hits: Hits::default() };
        let intentions = Intentions::new(vec![web, open, intention("api", "db", ALLOW, 9)], default);
        let decide = |name: &str, token: Option<&str>, providers: &Providers, now| {
            let headers =
                token.map(|token| (http::header::AUTHORIZATION, token.parse().unwrap())).into_iter().collect();
            let request = RequestView {
                method: "GET",
                path: "/",
                path_as_written: false,
                query: None,
                authority: "db",
                headers: &headers,
            };
            let (decision, verified) = intentions.verify_and_decide(&peer(name), &request, providers, now);
            let refusal = verified.refusals().next().map(|(_, refusal)| refusal);
            (matches!(decision, Decision::Allow(_)), refusal)
        };
        assert_eq!(decide("web", Some(&token), &known, now), (true, None));
        assert_eq!(decide("web", None, &known, now), (false, Some(Refusal::Missing)));
        let late = now + Duration::from_secs(30);
        assert_eq!(decide("web", Some(&token), &known, late), (false, Some(Refusal::Expired)));
        let unknown = (false, Some(Refusal::UnknownProvider));
        assert_eq!(decide("web", Some(&token), &Providers::default(), now), unknown);
        assert_eq!(decide("open", None, &known, now), (true, Some(Refusal::Missing)));
        assert_eq!(decide("open", None, &Providers::default(), now), unknown);
        assert_eq!(decide("api", None, &Providers::default(), now), (true, None));
        assert_eq!(decide("api", None, &known, now), (true, None));
        assert_eq!(decide("api", Some("Bearer rubbish"), &known, now), (true, None));
    }

    #[test]
    fn of_two_alike_the_first_decides() {
        let list = [intention("web", "db", DENY, 9), intention("web", "db", ALLOW, 9)];
        assert_eq!(decide(&list, Action::Allow, "web"), "denied by intention web => db (deny, precedence 9)");
    }

    #[test]
    fn thousands_of_intentions_are_told_apart() {
        let mut list: Vec<_> = (0..10_000).map(|n| intention(&format!("web-{n}"), "db", ALLOW, 9)).collect();
        list.push(intention("*", "db", DENY, 8));
        let intentions = Intentions::new(
            list,
            DefaultPolicy { action: Action::Allow, source: String::new(), hits: Hits::default() },
        );
        assert!(matches!(intentions.decide(&peer("web-9999")), Decision::Allow(_)));
        assert!(matches!(intentions.decide(&peer("web-10000")), Decision::Deny(_)));
    }
}
