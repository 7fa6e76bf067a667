//! L7 permissions: which requests of a source an intention allows.

use std::fmt;

use super::path::{LaxPath, canonical_rule, lax};
use super::pattern::{BadPattern, Pattern};
use super::request::{HeaderMatch, Lines, RequestView};
use crate::jwt::{Claims, Verified};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// One entry of an intention's list, of which the first that matches a request decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permission {
    pub action: Action,
    /// `None`: they can't be evaluated (a kind of matcher that is not known, a bad pattern). Then a deny matches
    /// every request and an allow none.
    pub conditions: Option<Conditions>,
    pub token: Option<TokenRequirement>,
}

/// Conditions on a request: all that are present must hold. An empty value matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    pub path: Option<PathRule>,
    /// Any of these; empty is any method. What denies does so in any letter case.
    pub methods: Vec<String>,
    pub headers: Vec<HeaderMatch>,
}

/// A condition on the path, without its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRule(Rule);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    Exact(RulePath),
    Prefix(RulePath),
    /// For normalised paths, where escapes have one spelling, and for paths as they are written.
    Regex(Pattern, Pattern),
}

/// The text of a rule in the forms in which a request's path is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RulePath {
    written: String,
    canonical: String,
    /// `None` where the rule itself names path parameters, which that form has lost.
    lax: Option<Vec<u8>>,
}

/// A valid token of any one of these providers, with certain claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRequirement {
    pub providers: Vec<ProviderRequirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderRequirement {
    /// Of the `jwt-provider` config entry.
    pub name: String,
    /// All of them must hold.
    pub claims: Vec<ClaimRequirement>,
}

/// A claim, found by its path through nested objects, is this text or a list that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRequirement {
    pub path: Vec<String>,
    pub value: String,
}

/// How a request's tokens stand to a requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Good,
    /// Of no listed provider is there a valid one.
    Missing,
    /// There is a valid one, but not with these claims.
    OtherClaims,
}

/// A request with the forms of its path that are worked out once for all permissions.
pub(super) struct Subject<'a> {
    request: &'a RequestView<'a>,
    lax: LaxPath<'a>,
    verified: &'a Verified,
}

impl<'a> Subject<'a> {
    pub(super) fn new(request: &'a RequestView<'a>, verified: &'a Verified) -> Self {
        let lax = if request.path_as_written { LaxPath::as_written(request.path) } else { lax(request.path) };
        Self { request, lax, verified }
    }
}

impl Permission {
    pub(super) fn matches(&self, subject: &Subject<'_>) -> bool {
        match &self.conditions {
            Some(conditions) => conditions.hold(subject, self.action),
            None => self.action == Action::Deny,
        }
    }
}

impl Conditions {
    /// Where a request can be read in several ways (lines of one header, spellings of a path), what denies needs
    /// one that matches, and what allows needs all to match.
    fn hold(&self, subject: &Subject<'_>, action: Action) -> bool {
        let lines = match action {
            Action::Allow => Lines::All,
            Action::Deny => Lines::Any,
        };
        let is_method = |method: &String| match action {
            Action::Allow => method == subject.request.method,
            Action::Deny => method.eq_ignore_ascii_case(subject.request.method),
        };
        (self.methods.is_empty() || self.methods.iter().any(is_method))
            && self.path.as_ref().is_none_or(|path| path.matches(subject, action))
            && self.headers.iter().all(|header| header.permits(subject.request, lines))
    }
}

impl PathRule {
    /// `exact`, `prefix` or `regex`, and the text as it is written in the intention.
    #[must_use]
    pub fn parts(&self) -> (&'static str, String) {
        match &self.0 {
            Rule::Exact(path) => ("exact", path.written.clone()),
            Rule::Prefix(path) => ("prefix", path.written.clone()),
            Rule::Regex(_, written) => ("regex", written.to_string()),
        }
    }
}

/// For people: `path begins with "/admin", method GET`.
impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.iter().map(ToString::to_string);
        let methods = (!self.methods.is_empty()).then(|| format!("method {}", self.methods.join(" or ")));
        let all: Vec<String> = path.chain(methods).chain(self.headers.iter().map(ToString::to_string)).collect();
        f.write_str(if all.is_empty() { "any request" } else { "" })?;
        f.write_str(&all.join(", "))
    }
}

impl fmt::Display for PathRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Rule::Exact(path) => write!(f, "path is {:?}", path.written),
            Rule::Prefix(path) => write!(f, "path begins with {:?}", path.written),
            Rule::Regex(_, pattern) => write!(f, "path matches {:?}", pattern.to_string()),
        }
    }
}

impl PathRule {
    #[must_use]
    pub fn exact(path: &str) -> Self {
        Self(Rule::Exact(RulePath::new(path)))
    }

    /// A plain prefix: `/adm` matches `/admin`.
    #[must_use]
    pub fn prefix(path: &str) -> Self {
        Self(Rule::Prefix(RulePath::new(path)))
    }

    /// # Errors
    /// When the text is not a usable pattern.
    pub fn regex(text: &str) -> Result<Self, BadPattern> {
        let pattern = Pattern::for_path(text)?;
        // Without an escape in it both are the same, and share their memory.
        let written = if text.contains('%') { Pattern::new(text)? } else { pattern.clone() };
        Ok(Self(Rule::Regex(pattern, written)))
    }

    /// Where normalisation was turned off, the text as it is written is all that counts, as in Envoy. Otherwise an escaped
    /// slash may be a slash to the app: a deny also looks at the laxest reading, and where that
    /// reveals dot segments, nothing that is said about paths can allow.
    fn matches(&self, subject: &Subject<'_>, action: Action) -> bool {
        if subject.request.path_as_written {
            return self.matches_as_written(subject.request.path);
        }
        if subject.lax.hides_dots {
            return action == Action::Deny;
        }
        self.matches_path(subject.request.path) || (action == Action::Deny && self.matches_lax(&subject.lax.path))
    }

    fn matches_as_written(&self, path: &str) -> bool {
        match &self.0 {
            Rule::Exact(rule) => path == rule.written,
            Rule::Prefix(rule) => path.starts_with(&rule.written),
            Rule::Regex(_, written) => written.matches(path.as_bytes()),
        }
    }

    /// A rule also holds as it is written, which is how requests are spelt where escapes are in lower case.
    fn matches_path(&self, path: &str) -> bool {
        match &self.0 {
            Rule::Exact(rule) => path == rule.canonical || path == rule.written,
            Rule::Prefix(rule) => path.starts_with(&rule.canonical) || path.starts_with(&rule.written),
            Rule::Regex(pattern, _) => pattern.matches(path.as_bytes()),
        }
    }

    fn matches_lax(&self, path: &[u8]) -> bool {
        match &self.0 {
            Rule::Exact(rule) => rule.lax.as_deref() == Some(path),
            Rule::Prefix(rule) => rule.lax.as_ref().is_some_and(|rule| path.starts_with(rule)),
            Rule::Regex(pattern, _) => pattern.matches(path),
        }
    }
}

impl RulePath {
    fn new(path: &str) -> Self {
        let lax = (!path.contains(';')).then(|| lax(path).path.into_owned());
        Self { written: path.to_owned(), canonical: canonical_rule(path), lax }
    }
}

impl TokenRequirement {
    pub(super) fn check(&self, subject: &Subject<'_>) -> Token {
        let mut outcome = Token::Missing;
        for provider in &self.providers {
            match subject.verified.claims(&provider.name) {
                Some(claims) if provider.claims.iter().all(|claim| claim.holds(claims)) => return Token::Good,
                Some(_) => outcome = Token::OtherClaims,
                None => {}
            }
        }
        outcome
    }
}

impl ClaimRequirement {
    fn holds(&self, claims: &Claims) -> bool {
        match claims.at(&self.path) {
            Some(serde_json::Value::String(text)) => *text == self.value,
            Some(serde_json::Value::Array(list)) => list.iter().any(|item| item.as_str() == Some(&self.value)),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Decision, DefaultPolicy, Hits, Intention, Intentions, Text, ValueTest};
    use crate::tls::SpiffeId;
    use http::{HeaderMap, HeaderName, HeaderValue};
    use serde_json::json;

    fn permission(action: Action, conditions: Conditions) -> Permission {
        Permission { action, conditions: Some(conditions), token: None }
    }

    fn allow(conditions: Conditions) -> Permission {
        permission(Action::Allow, conditions)
    }

    fn deny(conditions: Conditions) -> Permission {
        permission(Action::Deny, conditions)
    }

    fn path(rule: PathRule) -> Conditions {
        Conditions { path: Some(rule), ..Conditions::default() }
    }

    fn header(name: &str, test: ValueTest, invert: bool) -> Conditions {
        Conditions { headers: vec![HeaderMatch::new(name, test, invert).unwrap()], ..Conditions::default() }
    }

    fn text(text: &str) -> Text {
        Text::new(text, false)
    }

    fn token(provider: &str, claims: &[(&str, &str)]) -> Option<TokenRequirement> {
        let claim = |(path, value): &(&str, &str)| ClaimRequirement {
            path: path.split('.').map(str::to_owned).collect(),
            value: (*value).to_owned(),
        };
        let claims = claims.iter().map(claim).collect();
        Some(TokenRequirement { providers: vec![ProviderRequirement { name: provider.to_owned(), claims }] })
    }

    /// An intention of `web` with these permissions, before a wide one that says the opposite of the default.
    struct Rules {
        permissions: Vec<Permission>,
        token: Option<TokenRequirement>,
        default: Action,
    }

    struct Request {
        method: &'static str,
        path: &'static str,
        as_written: bool,
        authority: &'static str,
        headers: Vec<(&'static str, &'static [u8])>,
        verified: Verified,
    }

    impl Default for Request {
        fn default() -> Self {
            Self {
                method: "",
                path: "",
                as_written: false,
                authority: "db.example:80",
                headers: Vec::new(),
                verified: Verified::default(),
            }
        }
    }

    fn get(path: &'static str) -> Request {
        Request { method: "GET", path, ..Request::default() }
    }

    fn with(headers: &[(&'static str, &'static [u8])]) -> Request {
        Request { headers: headers.to_vec(), ..get("/") }
    }

    impl Rules {
        fn new(permissions: Vec<Permission>, default: Action) -> Self {
            Self { permissions, token: None, default }
        }

        /// Whether the request is allowed, and the line that says why.
        fn judge(&self, request: &Request) -> (bool, String) {
            let intention = |source: &str, action, precedence| Intention {
                source_partition: "default".to_owned(),
                source_namespace: "default".to_owned(),
                source: source.to_owned(),
                destination: "db".to_owned(),
                action,
                permissions: Vec::new(),
                token: None,
                precedence,
                hits: Hits::default(),
            };
            let opposite = if self.default == Action::Allow { Action::Deny } else { Action::Allow };
            let web = Intention {
                permissions: self.permissions.clone(),
                token: self.token.clone(),
                ..intention("web", None, 9)
            };
            let default =
                DefaultPolicy { action: self.default, source: "default policy".to_owned(), hits: Hits::default() };
            let intentions = Intentions::new(vec![web, intention("*", Some(opposite), 8)], default);
            let mut headers = HeaderMap::new();
            for (name, value) in &request.headers {
                headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap());
            }
            let (path, query) = request.path.split_once('?').map_or((request.path, None), |(p, q)| (p, Some(q)));
            let view = RequestView {
                method: request.method,
                path,
                path_as_written: request.as_written,
                query,
                authority: request.authority,
                headers: &headers,
            };
            let peer = SpiffeId::parse("spiffe://td.consul/ns/default/dc/dc1/svc/web").unwrap();
            match intentions.decide_request(&peer, &view, &request.verified) {
                Decision::Allow(decider) => (true, decider.to_string()),
                Decision::Deny(decider) => (false, decider.to_string()),
                Decision::EachRequest(_) => panic!("a request was not decided"),
            }
        }

        fn check(&self, request: &Request, allowed: bool, why: &str) {
            let (got, line) = self.judge(request);
            assert!(got == allowed && line.starts_with(why), "{} {}: {got}, {line}", request.method, request.path);
        }
    }

    /// Judges one condition as a deny with default allow, and as an allow with default deny.
    fn check(conditions: &Conditions, request: &Request, denied: bool, allowed: bool) {
        let (open, _) = Rules::new(vec![deny(conditions.clone())], Action::Allow).judge(request);
        assert_eq!(!open, denied, "deny {conditions:?} of {} {:?}", request.path, request.headers);
        let (open, _) = Rules::new(vec![allow(conditions.clone())], Action::Deny).judge(request);
        assert_eq!(open, allowed, "allow {conditions:?} of {} {:?}", request.path, request.headers);
    }

    /// For values that can be read in one way only.
    fn check_both(conditions: &Conditions, request: &Request, matches: bool) {
        check(conditions, request, matches, matches);
    }

    #[test]
    fn the_first_permission_that_matches_decides_and_then_the_default_policy() {
        let rules = |default| {
            let permissions = vec![
                deny(path(PathRule::prefix("/admin"))),
                allow(Conditions { methods: vec!["GET".to_owned(), "HEAD".to_owned()], ..Conditions::default() }),
                deny(path(PathRule::exact("/never"))),
            ];
            Rules::new(permissions, default)
        };
        let intention = "of intention web => db (permissions, precedence 9)";
        let post = Request { method: "POST", path: "/x", ..Request::default() };
        rules(Action::Allow).check(&get("/admin/x"), false, &format!("permission 1 (deny) {intention}"));
        rules(Action::Deny).check(&get("/never"), true, &format!("permission 2 (allow) {intention}"));
        // Not the wider intention of `*`, which says the opposite.
        rules(Action::Allow).check(&post, true, "default policy (allow), as no permission of intention web");
        rules(Action::Deny).check(&post, false, "default policy (deny), as no permission of intention web");
    }

    #[test]
    fn paths_are_compared_without_their_query_and_with_case() {
        let exact = path(PathRule::exact("/admin"));
        for (target, matches) in [("/admin", true), ("/admin?x=/y", true), ("/Admin", false), ("/admin/", false)] {
            check_both(&exact, &get(target), matches);
        }
        let prefix = path(PathRule::prefix("/adm"));
        for (target, matches) in [("/adm", true), ("/admin/x", true), ("/ad", false), ("/x/adm", false)] {
            check_both(&prefix, &get(target), matches);
        }
        let regex = path(PathRule::regex("/v[0-9]/.*").unwrap());
        for (target, matches) in [("/v1/x", true), ("/v1/?x", true), ("/v1", false), ("/x/v1/", false)] {
            check_both(&regex, &get(target), matches);
        }
    }

    #[test]
    fn another_spelling_of_a_path_gets_round_no_rule() {
        let rules = [PathRule::exact("/admin/x"), PathRule::prefix("/admin/"), PathRule::regex("/admin/.+").unwrap()];
        for rule in rules {
            for spelling in ["/admin%2Fx", "/admin%5Cx", "//admin//x", "/admin;v=1/x", "/admin/;a/x", "/%2Fadmin/x"] {
                check(
                    &path(rule.clone()),
                    &get(spelling),
                    true,
                    spelling.starts_with("/admin/") && rule != PathRule::exact("/admin/x"),
                );
            }
        }
        // Where it leads depends on the app: whatever is said about paths denies and does not allow.
        for hidden in
            ["/public/..%2Fadmin", "/public%2F..%2F..%2Fadmin", "/public/x%5C..%5Cadmin", "/public/..%3B/admin"]
        {
            check(&path(PathRule::prefix("/public")), &get(hidden), true, false);
            check(&path(PathRule::exact("/else")), &get(hidden), true, false);
            check(&Conditions::default(), &get(hidden), true, true);
        }
        // An escaped slash that hides nothing is left to those who want it.
        check(&path(PathRule::regex("/repo/[^/]+").unwrap()), &get("/repo/a%2Fb"), true, true);
        check(&path(PathRule::exact("/repo/a%2fb")), &get("/repo/a%2Fb"), true, true);
    }

    #[test]
    fn the_path_of_a_rule_may_have_any_spelling_too() {
        for written in ["/caf%c3%a9", "/café", "/%63af%C3%A9"] {
            check_both(&path(PathRule::exact(written)), &get("/caf%C3%A9"), true);
            check_both(&path(PathRule::prefix(written)), &get("/caf%C3%A9/x"), true);
        }
        check_both(&path(PathRule::regex("/caf%c3%a9").unwrap()), &get("/caf%C3%A9"), true);
        check_both(&path(PathRule::exact("/a;v=1")), &get("/a"), false);
        check_both(&path(PathRule::exact("/a;v=1")), &get("/a;v=1"), true);
    }

    #[test]
    fn header_values_are_tested_one_by_one() {
        let tests: [(ValueTest, &[&str], &[&str]); 6] = [
            (ValueTest::Present, &["", "x"], &[]),
            (ValueTest::Exact(text("admin")), &["admin"], &["Admin", "admin,user", "adminx", ""]),
            (ValueTest::Prefix(text("ad")), &["ad", "admin"], &["Admin", "a", "xad"]),
            (ValueTest::Suffix(text("in")), &["in", "admin"], &["admiN", "n", "inx"]),
            (ValueTest::Contains(text("dm")), &["dm", "admin"], &["d", "aDmin"]),
            (ValueTest::Regex(Pattern::new("a.*n").unwrap()), &["admin", "an"], &["xan", "ann!"]),
        ];
        for (test, matching, others) in tests {
            for (values, matches) in [(matching, true), (others, false)] {
                for value in values {
                    let request = with(&[("x-role", value.as_bytes())]);
                    check_both(&header("X-Role", test.clone(), false), &request, matches);
                    check_both(&header("x-role", test.clone(), true), &request, !matches);
                }
            }
            // Absent, only an inverted test for presence passes.
            check_both(&header("x-role", test.clone(), false), &get("/"), false);
            check_both(&header("x-role", test.clone(), true), &get("/"), test == ValueTest::Present);
        }
    }

    #[test]
    fn case_is_ignored_if_asked_for() {
        let fold = |text: &str| Text::new(text, true);
        for test in [
            ValueTest::Exact(fold("aDmin")),
            ValueTest::Prefix(fold("AD")),
            ValueTest::Suffix(fold("IN")),
            ValueTest::Contains(fold("DMI")),
        ] {
            check_both(&header("x-role", test.clone(), false), &with(&[("x-role", b"AdMiN")]), true);
            check_both(&header("x-role", test, false), &with(&[("x-role", b"user")]), false);
        }
    }

    #[test]
    fn of_several_lines_one_is_enough_to_deny_and_all_are_needed_to_allow() {
        let admin = |invert| header("x-role", ValueTest::Exact(text("admin")), invert);
        let mixed = with(&[("x-role", b"user"), ("x-role", b"admin")]);
        check(&admin(false), &mixed, true, false);
        check(&admin(true), &mixed, true, false);
        check_both(&admin(false), &with(&[("x-role", b"admin"), ("x-role", b"admin")]), true);
        check_both(&admin(true), &with(&[("x-role", b"user"), ("x-role", b"guest")]), true);
    }

    #[test]
    fn values_may_be_any_bytes() {
        let admin = header("x-role", ValueTest::Prefix(text("admin")), false);
        check_both(&admin, &with(&[("x-role", b"admin\xff\xfe")]), true);
        let regex = header("x-role", ValueTest::Regex(Pattern::new("admin.*").unwrap()), false);
        check_both(&regex, &with(&[("x-role", b"admin\xff\xfe")]), true);
    }

    #[test]
    fn an_underscore_in_a_name_may_be_a_dash_to_a_server_or_nothing() {
        let role = |test, invert| header("x-role", test, invert);
        let exact = |value| ValueTest::Exact(text(value));
        check(&role(exact("admin"), false), &with(&[("x_role", b"admin")]), true, false);
        check(&role(exact("admin"), false), &with(&[("x-role", b"user"), ("x_role", b"admin")]), true, false);
        check(&role(exact("user"), false), &with(&[("x-role", b"user"), ("x_role", b"admin")]), true, false);
        check(&role(ValueTest::Present, false), &with(&[("x_role", b"1")]), true, false);
        check(&role(ValueTest::Present, true), &with(&[("x_role", b"1")]), true, false);
        check_both(&role(ValueTest::Present, true), &with(&[("x.role", b"1")]), true);
        check(&header("x_role", exact("admin"), false), &with(&[("x-role", b"admin")]), true, false);
        // Unless everything is to be taken as it is written.
        let as_written = Request { as_written: true, ..with(&[("x-role", b"user"), ("x_role", b"admin")]) };
        check_both(&role(exact("admin"), false), &as_written, false);
        check_both(&role(exact("user"), false), &as_written, true);
    }

    #[test]
    fn pseudo_headers_and_the_host_can_be_tested() {
        check_both(&header("Host", ValueTest::Prefix(text("db.")), false), &get("/"), true);
        check_both(&header(":authority", ValueTest::Exact(text("db.example:80")), false), &get("/"), true);
        check_both(&header(":method", ValueTest::Exact(text("GET")), false), &get("/"), true);
        check_both(&header(":path", ValueTest::Exact(text("/a?b")), false), &get("/a?b"), true);
        assert_eq!(HeaderMatch::new(":scheme", ValueTest::Present, false), None);
        assert_eq!(HeaderMatch::new("a b", ValueTest::Present, false), None);
    }

    fn with_host(authority: &'static str) -> Request {
        Request { authority, ..get("/") }
    }

    #[test]
    fn a_deny_of_an_authority_is_for_every_spelling_of_it_and_an_allow_for_the_one_written() {
        let others = [
            "ADMIN.example",
            "admin.example.",
            "admin.example:80",
            "admin.example:443",
            "admin.example:",
            "Admin.Example.:080",
        ];
        let regex = |text| ValueTest::Regex(Pattern::new(text).unwrap());
        let tests = || {
            [
                ValueTest::Exact(text("admin.example")),
                ValueTest::Prefix(text("admin.ex")),
                ValueTest::Suffix(text(".example")),
                ValueTest::Contains(text("min.exam")),
                regex(r"admin\.[a-z]+"),
            ]
        };
        for test in tests() {
            check_both(&header("host", test.clone(), false), &with_host("admin.example"), true);
            check_both(&header("host", test.clone(), true), &with_host("admin.example"), false);
            check_both(&header("host", test.clone(), false), &with_host("public.test"), false);
            check_both(&header("host", test.clone(), true), &with_host("public.test"), true);
        }
        for other in others {
            check(
                &header(":authority", ValueTest::Exact(text("admin.example")), false),
                &with_host(other),
                true,
                false,
            );
            check(&header(":authority", regex(r"admin\.[a-z]+"), false), &with_host(other), true, false);
            // "Not this host" refuses in a deny what is not written so, and allows nothing that may be it.
            check(&header(":authority", ValueTest::Exact(text("admin.example")), true), &with_host(other), true, false);
        }
        // The rule may have any spelling too.
        for written in others {
            for test in
                [ValueTest::Exact(text(written)), ValueTest::Suffix(text(written)), ValueTest::Prefix(text(written))]
            {
                check(&header("host", test, false), &with_host("admin.example"), true, false);
            }
        }
        // Servers that hold several hosts look at the name alone.
        let rule = |test| header("host", test, false);
        check(&rule(ValueTest::Exact(text("admin.example"))), &with_host("admin.example:8080"), true, false);
        check(&rule(ValueTest::Exact(text("admin.example:8080"))), &with_host("admin.example"), false, false);
        check(&rule(ValueTest::Exact(text("Admin.Example:8080"))), &with_host("admin.example.:8080"), true, false);
    }

    #[test]
    fn a_deny_of_spellings_is_not_one_of_every_authority() {
        let regex = |text| ValueTest::Regex(Pattern::new(text).unwrap());
        for (test, denied) in [
            (ValueTest::Contains(text(":")), "db.example:80"),
            (ValueTest::Suffix(text(".")), "db.example."),
            (ValueTest::Suffix(text(":80")), "db.example:80"),
            (regex(".*[A-Z].*"), "DB.example"),
            (regex(".*:[0-9]+"), "db.example:81"),
        ] {
            check_both(&header("host", test.clone(), false), &with_host(denied), true);
            check_both(&header("host", test, false), &with_host("db.example"), false);
        }
        let lower = header(":method", regex(".*[a-z].*"), false);
        check_both(&lower, &Request { method: "get", ..get("/") }, true);
        check_both(&lower, &get("/"), false);
    }

    #[test]
    fn a_deny_of_a_method_is_for_any_letter_case() {
        let post = Conditions { methods: vec!["POST".to_owned()], ..Conditions::default() };
        let named = header(":method", ValueTest::Exact(text("POST")), false);
        for (method, allowed) in [("POST", true), ("post", false), ("Post", false)] {
            let request = Request { method, ..get("/") };
            check(&post, &request, true, allowed);
            check(&named, &request, true, allowed);
        }
        let request = Request { method: "post", ..get("/") };
        check(&header(":method", ValueTest::Exact(text("POST")), true), &request, true, false);
    }

    #[test]
    fn a_condition_on_the_path_as_a_header_is_not_got_round_either() {
        let admin = |invert| header(":path", ValueTest::Prefix(text("/admin/")), invert);
        for spelling in ["/admin%2Fx", "//admin//x?y", "/admin;v=1/x", "/public/..%2Fadmin/"] {
            check(&admin(false), &get(spelling), true, false);
            check(&admin(true), &get(spelling), true, false);
        }
        check_both(&admin(false), &get("/admin/x?y"), true);
        check_both(&admin(true), &get("/else"), true);
    }

    #[test]
    fn where_normalisation_was_turned_off_a_path_counts_as_it_is_written() {
        let written = |path| Request { as_written: true, ..get(path) };
        let rules = [PathRule::exact("/admin/x"), PathRule::prefix("/admin/"), PathRule::regex("/admin/.+").unwrap()];
        for rule in rules {
            check_both(&path(rule.clone()), &written("/admin/x"), true);
            for spelling in
                ["/admin%2Fx", "//admin//x", "/x/../admin/x", "/%61dmin/x", "/admin;v=1/x", "/a\\..\\admin/x"]
            {
                check_both(&path(rule.clone()), &written(spelling), false);
            }
        }
        check_both(&path(PathRule::regex("/a%2fb").unwrap()), &written("/a%2Fb"), false);
        check_both(&path(PathRule::exact("/%61")), &written("/%61"), true);
        check_both(&path(PathRule::exact("/%61")), &written("/a"), false);
        check_both(&header(":path", ValueTest::Prefix(text("/admin")), false), &written("//admin"), false);
    }

    #[test]
    fn what_can_not_be_evaluated_fails_closed() {
        let unknown = |action| Permission { action, conditions: None, token: None };
        Rules::new(vec![unknown(Action::Deny)], Action::Allow).check(&get("/"), false, "permission 1 (deny)");
        let rules = Rules::new(vec![unknown(Action::Allow), deny(path(PathRule::exact("/x")))], Action::Deny);
        rules.check(&get("/x"), false, "permission 2");
        rules.check(&get("/"), false, "default policy");
    }

    #[test]
    fn a_permission_that_requires_a_token_allows_with_it_alone() {
        let admins =
            || Permission { token: token("okta", &[("perms.role", "admin")]), ..allow(path(PathRule::exact("/"))) };
        let request = |claims| Request { verified: Verified::of(&[("okta", claims)]), ..get("/") };
        for default in [Action::Allow, Action::Deny] {
            let rules = Rules::new(vec![admins(), allow(Conditions::default())], default);
            rules.check(&request(json!({"perms": {"role": "admin"}})), true, "permission 1");
            rules.check(&request(json!({"perms": {"role": ["user", "admin"]}})), true, "permission 1");
            for claims in [
                json!({}),
                json!({"perms": {"role": "user"}}),
                json!({"perms": "admin"}),
                json!({"perms": {"role": 1}}),
            ] {
                rules.check(&request(claims), false, "want of a token that permission 1");
            }
            rules.check(&get("/"), false, "want of a token that permission 1");
            rules.check(&Request { verified: Verified::of(&[("auth0", json!({}))]), ..get("/") }, false, "want of");
            rules.check(&get("/else"), true, "permission 2");
        }
    }

    #[test]
    fn a_deny_for_some_claims_is_not_escaped_without_a_token() {
        let guests = Permission { token: token("okta", &[("role", "guest")]), ..deny(Conditions::default()) };
        let rules = Rules::new(vec![guests], Action::Allow);
        let request = |role: &str| Request { verified: Verified::of(&[("okta", json!({"role": role}))]), ..get("/") };
        rules.check(&request("guest"), false, "permission 1");
        rules.check(&request("staff"), true, "default policy");
        rules.check(&get("/"), false, "want of a token");
    }

    #[test]
    fn a_token_that_the_intention_requires_is_needed_besides() {
        let verified = || Request { verified: Verified::of(&[("okta", json!({"a": "b"}))]), ..get("/") };
        let mut rules = Rules::new(Vec::new(), Action::Allow);
        rules.token = token("okta", &[]);
        rules.check(&get("/"), false, "want of a token that intention web => db (allow with token, precedence 9)");
        rules.check(&verified(), true, "intention web => db (allow with token, precedence 9)");
        rules.permissions.push(deny(path(PathRule::exact("/"))));
        rules.check(&verified(), false, "permission 1");
        rules.check(&get("/else"), false, "want of a token");
    }
}
