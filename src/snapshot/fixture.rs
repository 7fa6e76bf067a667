//! Values for tests: route matches, requests and intentions.

use http::{HeaderMap, HeaderValue};

use super::{Action, Hits, Intention, PathMatch, RequestView, RouteMatch, Text};

pub(super) fn exact(path: &str) -> PathMatch {
    PathMatch::Exact(Text::new(path, false))
}

pub(super) fn prefix(path: &str) -> PathMatch {
    PathMatch::Prefix(Text::new(path, false))
}

pub(super) fn on_path(path: PathMatch) -> RouteMatch {
    RouteMatch { path, ..RouteMatch::default() }
}

pub(super) fn view<'a>(method: &'a str, target: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    RequestView { method, path, path_as_written: false, query, authority: "db", headers }
}

pub(super) fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in list {
        map.append(*name, HeaderValue::from_static(value));
    }
    map
}

/// An intention for `db` in the default namespace, without permissions.
pub(crate) fn intention(source: &str, action: Option<Action>, precedence: u32) -> Intention {
    Intention {
        source_partition: "default".into(),
        source_namespace: "default".into(),
        source: source.into(),
        destination: "db".into(),
        action,
        permissions: Vec::new(),
        token: None,
        precedence,
        hits: Hits::default(),
    }
}
