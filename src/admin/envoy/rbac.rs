//! Intentions as the rules that Consul makes of them for Envoy.
//!
//! They show who may talk to us. What decides is in `snapshot`: requirements of tokens are left out here, as Consul has them in
//! filters of their own.

use serde_json::{Map, Value, json};

use super::names::TYPES;
use super::routes::header;
use crate::snapshot::{Action, Conditions, Intention, Intentions, Permission, Service};

/// The filter of a service of TCP.
pub(super) fn network(service: &Service) -> Value {
    json!({
        "name": "envoy.filters.network.rbac",
        "typed_config": {
            "@type": format!("{TYPES}extensions.filters.network.rbac.v3.RBAC"),
            "stat_prefix": "connect_authz",
            "rules": rules(&service.intentions, &service.tls.id().trust_domain, false),
        },
    })
}

/// The filter of a service of HTTP.
pub(super) fn http(service: &Service) -> Value {
    json!({
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": format!("{TYPES}extensions.filters.http.rbac.v3.RBAC"),
            "rules": rules(&service.intentions, &service.tls.id().trust_domain, true),
        },
    })
}

/// Exceptions from the default policy: allowed sources where it denies, denied sources where it allows.
fn rules(intentions: &Intentions, trust_domain: &str, is_http: bool) -> Value {
    let action = match intentions.default_policy().action {
        Action::Allow => Action::Deny,
        Action::Deny => Action::Allow,
    };
    let mut policies = Map::new();
    let mut principals = Vec::new();
    for (place, intention) in intentions.list().iter().enumerate() {
        let principal = || principal(intention, &intentions.list()[..place], trust_domain);
        // Permissions deny everything on a service of TCP.
        let whole = intention.action.or((!is_http).then_some(Action::Deny));
        if whole == Some(action) {
            principals.push(principal());
        }
        let permissions = if whole.is_none() { permissions(&intention.permissions, action) } else { Vec::new() };
        if !permissions.is_empty() {
            let name = format!("consul-intentions-layer7-{}", policies.len());
            policies.insert(name, json!({ "principals": [principal()], "permissions": permissions }));
        }
    }
    if !principals.is_empty() {
        let policy = json!({ "principals": principals, "permissions": [{ "any": true }] });
        policies.insert("consul-intentions-layer4".to_owned(), policy);
    }
    json!({ "action": if action == Action::Allow { "ALLOW" } else { "DENY" }, "policies": policies })
}

/// The source of an intention, but for those whom one before it decides about.
fn principal(intention: &Intention, before: &[Intention], trust_domain: &str) -> Value {
    let covers = |part: &str, other: &str| part == "*" || part == other;
    let excepted = before.iter().filter(|other| {
        other.source_partition == intention.source_partition
            && covers(&intention.source_namespace, &other.source_namespace)
            && covers(&intention.source, &other.source)
            && (&other.source_namespace, &other.source) != (&intention.source_namespace, &intention.source)
    });
    let excepted: Vec<Value> = excepted.map(|other| json!({ "not_id": id(other, trust_domain) })).collect();
    if excepted.is_empty() {
        return id(intention, trust_domain);
    }
    let ids = [id(intention, trust_domain)].into_iter().chain(excepted);
    json!({ "and_ids": { "ids": ids.collect::<Vec<_>>() } })
}

/// As a pattern of SPIFFE ids, in Consul's spelling.
fn id(intention: &Intention, trust_domain: &str) -> Value {
    let part = |name: &str| if name == "*" { "[^/]+".to_owned() } else { regex::escape(name) };
    let partition = match intention.source_partition.as_str() {
        "default" => String::new(),
        partition => format!("/ap/{}", regex::escape(partition)),
    };
    let regex = format!(
        "^spiffe://{}{partition}/ns/{}/dc/[^/]+/svc/{}$",
        regex::escape(trust_domain),
        part(&intention.source_namespace),
        part(&intention.source)
    );
    json!({ "authenticated": { "principal_name": { "safe_regex": { "regex": regex } } } })
}

/// The first that matches decides, so that those before it are excepted.
fn permissions(list: &[Permission], action: Action) -> Vec<Value> {
    let of_action = list.iter().enumerate().filter(|(_, permission)| permission.action == action);
    let rule = |(place, permission): (usize, &Permission)| {
        let own = conditions(permission.conditions.as_ref()?);
        let others = list[..place].iter().filter(|other| other.action != action);
        let others = others.filter_map(|other| Some(json!({ "not_rule": conditions(other.conditions.as_ref()?) })));
        let rules: Vec<Value> = [own].into_iter().chain(others).collect();
        Some(json!({ "and_rules": { "rules": rules } }))
    };
    of_action.filter_map(rule).collect()
}

fn conditions(conditions: &Conditions) -> Value {
    let path = conditions.path.iter().map(|path| {
        let (kind, text) = path.parts();
        let matcher = if kind == "regex" { json!({ "safe_regex": { "regex": text } }) } else { json!({ kind: text }) };
        json!({ "url_path": { "path": matcher } })
    });
    let methods = (!conditions.methods.is_empty()).then(|| {
        let regex = json!({ "safe_regex": { "regex": conditions.methods.join("|") } });
        json!({ "header": { "name": ":method", "string_match": regex } })
    });
    let headers = conditions.headers.iter().map(|one| json!({ "header": header(one) }));
    let rules: Vec<Value> = path.chain(methods).chain(headers).collect();
    if rules.is_empty() { json!({ "any": true }) } else { json!({ "and_rules": { "rules": rules } }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::fixture::intention;
    use crate::snapshot::{DefaultPolicy, Hits, PathRule};

    fn id_of(source: &str) -> Value {
        let regex = format!("^spiffe://td\\.consul/ns/default/dc/[^/]+/svc/{source}$");
        json!({ "authenticated": { "principal_name": { "safe_regex": { "regex": regex } } } })
    }

    #[test]
    fn who_is_allowed_but_for_those_who_are_denied_before() {
        let default = |action| DefaultPolicy { action, source: String::new(), hits: Hits::default() };
        let list = || vec![intention("web", Some(Action::Deny), 9), intention("*", Some(Action::Allow), 8)];
        let ours = rules(&Intentions::new(list(), default(Action::Deny)), "td.consul", true);
        let others = json!({ "and_ids": { "ids": [id_of("[^/]+"), { "not_id": id_of("web") }] } });
        let policy = json!({ "principals": [others], "permissions": [{ "any": true }] });
        assert_eq!(ours, json!({ "action": "ALLOW", "policies": { "consul-intentions-layer4": policy } }));
        let ours = rules(&Intentions::new(list(), default(Action::Allow)), "td.consul", true);
        let policy = json!({ "principals": [id_of("web")], "permissions": [{ "any": true }] });
        assert_eq!(ours, json!({ "action": "DENY", "policies": { "consul-intentions-layer4": policy } }));
    }

    #[test]
    fn permissions_are_rules_of_their_own_and_nothing_on_tcp() {
        let allow = |path: &str| Conditions { path: Some(PathRule::prefix(path)), ..Conditions::default() };
        let permission = |action, path| Permission { action, conditions: Some(allow(path)), token: None };
        let mut web = intention("web", None, 9);
        web.permissions = vec![permission(Action::Deny, "/admin"), permission(Action::Allow, "/")];
        let default = DefaultPolicy { action: Action::Deny, source: String::new(), hits: Hits::default() };
        let intentions = Intentions::new(vec![web], default);
        let path = |path: &str| json!({ "and_rules": { "rules": [{ "url_path": { "path": { "prefix": path } } }] } });
        let rule = json!({ "and_rules": { "rules": [path("/"), { "not_rule": path("/admin") }] } });
        let policy = json!({ "principals": [id_of("web")], "permissions": [rule] });
        let expected = json!({ "action": "ALLOW", "policies": { "consul-intentions-layer7-0": policy } });
        assert_eq!(rules(&intentions, "td.consul", true), expected);
        assert_eq!(rules(&intentions, "td.consul", false), json!({ "action": "ALLOW", "policies": {} }));
    }
}
