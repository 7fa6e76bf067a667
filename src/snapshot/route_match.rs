//! Which requests a route is for.

use std::fmt;

use super::pattern::Pattern;
use super::request::{HeaderMatch, RequestView, Text};

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

impl RouteMatch {
    pub(super) fn matches(&self, request: &RequestView<'_>) -> bool {
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
    pub(super) fn rewrite(&self, request: &RequestView<'_>, to: &str) -> String {
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

/// For people: `path begins with "/v2"`.
impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any path"),
            Self::Exact(text) => write!(f, "path is {:?}", text.to_string()),
            Self::Prefix(text) => write!(f, "path begins with {:?}", text.to_string()),
            Self::Regex(pattern) => write!(f, "path matches {:?}", pattern.to_string()),
        }
    }
}

/// For people: `query q is "x"`.
impl fmt::Display for QueryMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "query {:?} ", self.name)?;
        match &self.test {
            QueryTest::Present => f.write_str("is there"),
            QueryTest::Exact(text) => write!(f, "is {text:?}"),
            QueryTest::Regex(pattern) => write!(f, "matches {:?}", pattern.to_string()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::ValueTest;
    use crate::snapshot::fixture::{exact, headers, on_path, prefix, view};

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
}
