//! Routes: the discovery chain of an HTTP upstream, and what leads to the local app.

use serde_json::{Value, json};

use super::names::{LOCAL_APP, PUBLIC_LISTENER, TYPES, exposed_cluster, limit, resolver_cluster, upstream_id};
use crate::snapshot::{
    Exposed, ExposedPath, HeaderMatch, Leg, Next, Node, OutboundListener, PathMatch, QueryMatch, QueryTest, Resolver,
    Route, RouteMatch, Service, Splitter, Text, ValueTest,
};

/// Whether the routes of an upstream are a resource of their own, which its listener names, as Consul has it: those that
/// config entries make. Others are a part of their listener.
pub(super) fn are_their_own(listener: &OutboundListener) -> bool {
    !matches!(listener.upstream.chain.start, Node::Resolver(_))
}

/// The message `RouteConfiguration` of an HTTP upstream; `None` where nothing is known of where it leads.
pub(super) fn of_upstream(listener: &OutboundListener) -> Option<Value> {
    let routes: Vec<Value> = match &listener.upstream.chain.start {
        Node::Router(routes) => routes.iter().map(route).collect(),
        Node::Splitter(splitter) => vec![any(action_of_splitter(splitter))],
        Node::Resolver(resolver) => {
            let mut action = action_of_resolver(resolver)?;
            action["timeout"] = json!(limit(resolver.request_timeout));
            vec![any(action)]
        }
    };
    Some(configuration(&upstream_id(listener), &routes))
}

pub(super) fn of_service(service: &Service) -> Value {
    let action = json!({ "cluster": LOCAL_APP, "timeout": limit(service.local_request_timeout) });
    configuration(PUBLIC_LISTENER, &[any(action)])
}

pub(super) fn of_exposed(name: &str, exposed: &Exposed) -> Value {
    let route = |(path, to): (&String, &ExposedPath)| {
        let timeout = limit(exposed.request_timeout);
        json!({ "match": { "path": path }, "route": { "cluster": exposed_cluster(&to.app), "timeout": timeout } })
    };
    configuration(name, &exposed.paths.iter().map(route).collect::<Vec<_>>())
}

fn configuration(name: &str, routes: &[Value]) -> Value {
    json!({
        "@type": format!("{TYPES}config.route.v3.RouteConfiguration"),
        "name": name,
        "virtual_hosts": [{ "name": name, "domains": ["*"], "routes": routes }],
    })
}

fn any(action: Value) -> Value {
    json!({ "match": { "prefix": "/" }, "route": action })
}

fn action_of_resolver(resolver: &Resolver) -> Option<Value> {
    resolver_cluster(resolver).map(|cluster| json!({ "cluster": cluster }))
}

/// Weights are in hundredths of a percent, as Consul has them: those of nested splitters are finer.
fn action_of_splitter(splitter: &Splitter) -> Value {
    let total = splitter.legs().iter().map(|leg| u128::from(leg.weight)).sum::<u128>().max(1);
    let weight = |leg: &Leg| u32::try_from(u128::from(leg.weight) * 10_000 / total).unwrap_or_default();
    let leg = |leg: &Leg| Some(json!({ "name": resolver_cluster(&leg.resolver)?, "weight": weight(leg) }));
    let legs = splitter.legs().iter().filter_map(leg);
    json!({ "weighted_clusters": { "clusters": legs.collect::<Vec<_>>() } })
}

fn route(route: &Route) -> Value {
    let mut action = match &route.next {
        Next::Splitter(splitter) => action_of_splitter(splitter),
        Next::Resolver(resolver) => action_of_resolver(resolver).unwrap_or_else(|| json!({})),
    };
    action["timeout"] = json!(limit(route.request_timeout));
    action["idle_timeout"] = json!(limit(route.idle_timeout));
    if let Some(rewrite) = &route.prefix_rewrite {
        action["prefix_rewrite"] = json!(rewrite);
    }
    if let Some(retries) = &route.retries {
        action["retry_policy"] = json!({ "num_retries": retries.retries });
    }
    json!({ "name": &*route.name, "match": matches(&route.matches), "route": action })
}

fn matches(route: &RouteMatch) -> Value {
    let mut matches = match &route.path {
        PathMatch::Any => json!({ "prefix": "/" }),
        PathMatch::Exact(text) => with_case(json!({ "path": text.to_string() }), text),
        PathMatch::Prefix(text) => with_case(json!({ "prefix": text.to_string() }), text),
        PathMatch::Regex(pattern) => json!({ "safe_regex": { "regex": pattern.to_string() } }),
    };
    let mut headers: Vec<Value> = route.headers.iter().map(header).collect();
    if !route.methods.is_empty() {
        let regex = json!({ "safe_regex": { "regex": route.methods.join("|") } });
        headers.push(json!({ "name": ":method", "string_match": regex }));
    }
    if !headers.is_empty() {
        matches["headers"] = json!(headers);
    }
    if !route.query.is_empty() {
        matches["query_parameters"] = json!(route.query.iter().map(parameter).collect::<Vec<_>>());
    }
    matches
}

fn with_case(mut value: Value, text: &Text) -> Value {
    if text.ignores_case() {
        value["case_sensitive"] = json!(false);
    }
    value
}

pub(super) fn header(header: &HeaderMatch) -> Value {
    let mut value = json!({ "name": header.name() });
    match header.test() {
        ValueTest::Present => value["present_match"] = json!(true),
        ValueTest::Exact(text) => value["string_match"] = string_match("exact", text),
        ValueTest::Prefix(text) => value["string_match"] = string_match("prefix", text),
        ValueTest::Suffix(text) => value["string_match"] = string_match("suffix", text),
        ValueTest::Contains(text) => value["string_match"] = string_match("contains", text),
        ValueTest::Regex(pattern) => {
            value["string_match"] = json!({ "safe_regex": { "regex": pattern.to_string() } });
        }
    }
    if header.is_inverted() {
        value["invert_match"] = json!(true);
    }
    value
}

fn string_match(kind: &str, text: &Text) -> Value {
    let mut value = json!({ kind: text.to_string() });
    if text.ignores_case() {
        value["ignore_case"] = json!(true);
    }
    value
}

fn parameter(query: &QueryMatch) -> Value {
    match &query.test {
        QueryTest::Present => json!({ "name": query.name, "present_match": true }),
        QueryTest::Exact(text) => json!({ "name": query.name, "string_match": { "exact": text } }),
        QueryTest::Regex(pattern) => {
            json!({ "name": query.name, "string_match": { "safe_regex": { "regex": pattern.to_string() } } })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_shown_as_envoy_has_them() {
        let header = HeaderMatch::new("A", ValueTest::Exact(Text::new("b", false)), true).unwrap();
        let conditions = RouteMatch {
            path: PathMatch::Prefix(Text::new("/x", true)),
            headers: vec![header],
            query: vec![QueryMatch { name: "q".into(), test: QueryTest::Present }],
            methods: vec!["GET".into(), "PUT".into()],
        };
        let expected = json!({
            "prefix": "/x",
            "case_sensitive": false,
            "headers": [
                { "name": "a", "string_match": { "exact": "b" }, "invert_match": true },
                { "name": ":method", "string_match": { "safe_regex": { "regex": "GET|PUT" } } },
            ],
            "query_parameters": [{ "name": "q", "present_match": true }],
        });
        assert_eq!(matches(&conditions), expected);
        assert_eq!(matches(&RouteMatch::default()), json!({ "prefix": "/" }));
    }
}
