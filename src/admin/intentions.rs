//! `/intentions/check`: whether a source may reach the service, and by which rule.

use http::request::Parts;
use http::{Request, StatusCode, Uri};
use serde_json::{Value, json};

use super::explain::headers;
use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use crate::proxy::{Rehearsed, rehearse};
use crate::snapshot::{Decider, Decision, DefaultPolicy, Intention, Permission, TokenRequirement};
use crate::tls::SpiffeId;

/// `from` (`web`, `namespace/web`, `partition/namespace/web`, or an identity), and for a request `method`, `path` and
/// `header` (`name: value`, one a line). No value of a header is shown.
pub(super) fn check(state: &State, query: &Query) -> Reply {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let Some(listener) = snapshot.inbound.values().next() else {
        let text = "the sidecar has no public listener yet, so no service can reach it; see `lictor status`\n";
        return reply::status(StatusCode::CONFLICT, text);
    };
    let Some(us) = snapshot.credentials.as_ref().map(|credentials| credentials.id()) else {
        return reply::status(StatusCode::CONFLICT, "the sidecar has no certificate yet\n");
    };
    let service = &*listener.service;
    let parsed = source(query.get("from").map_or("", String::as_str), us)
        .and_then(|peer| Ok((peer, request(query, &service.name)?)));
    let (peer, request) = match parsed {
        Ok(parsed) => parsed,
        Err(fault) => return reply::status(StatusCode::BAD_REQUEST, format!("{fault}\n")),
    };
    let shown = request.as_ref().map(|request| format!("{} {}", request.method, request.uri.path()));
    let rehearsed = rehearse(service, &peer, request);
    let tokens = rehearsed.tokens.iter().map(|(provider, fault)| json!({ "provider": provider, "fault": fault }));
    reply::json(&json!({
        "from": peer.to_string(),
        "source": peer.service,
        "destination": service.name,
        "protocol": format!("{:?}", service.protocol).to_lowercase(),
        "request": shown,
        "allowed": rehearsed.allowed,
        "audit": service.audit,
        "why": rehearsed.why,
        "rule": rule(&rehearsed),
        "tokens": tokens.collect::<Vec<_>>(),
    }))
}

/// # Errors
/// When it names no service of this mesh; a sentence.
fn source(text: &str, us: &SpiffeId) -> Result<SpiffeId, String> {
    if text.starts_with("spiffe://") {
        let peer = SpiffeId::parse(text).map_err(|bad| bad.to_string())?;
        if peer.trust_domain != us.trust_domain {
            return Err(format!("{text} is of another trust domain than {}: no handshake succeeds", us.trust_domain));
        }
        return Ok(peer);
    }
    let (partition, namespace, service) = match text.split('/').collect::<Vec<_>>()[..] {
        [service] => ("default", "default", service),
        [namespace, service] => ("default", namespace, service),
        [partition, namespace, service] => (partition, namespace, service),
        _ => ("", "", ""),
    };
    if [partition, namespace, service].iter().any(|part| part.is_empty() || *part == "*") {
        return Err(format!(
            "{text:?} is no source: write from=web, from=namespace/web or from=partition/namespace/web"
        ));
    }
    Ok(SpiffeId {
        trust_domain: us.trust_domain.clone(),
        partition: partition.to_owned(),
        namespace: namespace.to_owned(),
        datacenter: us.datacenter.clone(),
        service: service.to_owned(),
    })
}

/// The request that is asked about, if one is.
///
/// # Errors
/// When it is none; a sentence.
fn request(query: &Query, service: &str) -> Result<Option<Parts>, String> {
    let of = |key: &str| query.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let (method, path, lines) = (of("method"), of("path"), of("header"));
    if method.or(path).or(lines).is_none() {
        return Ok(None);
    }
    let method = method.unwrap_or("GET");
    let uri: Uri = path.unwrap_or("/").parse().map_err(|_| "the path is none: it begins with a slash".to_owned())?;
    let request = Request::builder().method(method).uri(uri).body(());
    let mut request = request.map_err(|_| format!("{method:?} is no method"))?.into_parts().0;
    request.headers = headers(lines.unwrap_or_default()).map_err(|fault| fault.trim_end().to_owned())?;
    if let (false, Ok(host)) = (request.headers.contains_key(http::header::HOST), service.parse()) {
        request.headers.insert(http::header::HOST, host);
    }
    Ok(Some(request))
}

/// The deciding rule, in parts.
fn rule(rehearsed: &Rehearsed<'_>) -> Value {
    let decider = match &rehearsed.decision {
        None => return json!({ "kind": "request" }),
        Some(Decision::EachRequest(intention)) => {
            return json!({ "kind": "permissions", "intention": self::intention(intention) });
        }
        Some(Decision::Allow(decider) | Decision::Deny(decider)) => decider,
    };
    match decider {
        Decider::Intention(one) => json!({ "kind": "intention", "intention": intention(one) }),
        Decider::Default(policy) => json!({ "kind": "default", "default": default(policy) }),
        Decider::Permission(one, place) => {
            json!({ "kind": "permission", "intention": intention(one), "permission": permission(one, *place) })
        }
        Decider::Token(one, place) => json!({
            "kind": "token",
            "intention": intention(one),
            "permission": place.map(|place| permission(one, place)),
        }),
        Decider::UnknownProvider(one) => json!({ "kind": "unknown_provider", "intention": intention(one) }),
        Decider::NoPermission(one, policy) => {
            json!({ "kind": "no_permission", "intention": intention(one), "default": default(policy) })
        }
    }
}

fn intention(one: &Intention) -> Value {
    json!({
        "source": one.source,
        "source_namespace": one.source_namespace,
        "source_partition": one.source_partition,
        "destination": one.destination,
        "action": one.action.map(|action| action.to_string()),
        "precedence": one.precedence,
        "permissions": one.permissions.len(),
        "token_of": one.token.as_ref().map(providers),
    })
}

/// Numbered from 1, as in texts.
fn permission(one: &Intention, place: usize) -> Value {
    let about = one.permissions.get(place);
    let conditions = |permission: &Permission| {
        permission
            .conditions
            .as_ref()
            .map_or_else(|| "conditions that cannot be evaluated".to_owned(), ToString::to_string)
    };
    json!({
        "number": place + 1,
        "action": about.map(|permission| permission.action.to_string()),
        "conditions": about.map(conditions),
        "token_of": about.and_then(|permission| permission.token.as_ref()).map(providers),
    })
}

fn providers(token: &TokenRequirement) -> Vec<&str> {
    token.providers.iter().map(|provider| provider.name.as_str()).collect()
}

fn default(policy: &DefaultPolicy) -> Value {
    json!({ "action": policy.action.to_string(), "source": policy.source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_named_as_briefly_as_intentions_name_it() {
        let us = SpiffeId::parse("spiffe://td.consul/ns/default/dc/dc1/svc/db").unwrap();
        for (text, expected) in [
            ("web", "spiffe://td.consul/ns/default/dc/dc1/svc/web"),
            ("team/web", "spiffe://td.consul/ns/team/dc/dc1/svc/web"),
            ("p/team/web", "spiffe://td.consul/ap/p/ns/team/dc/dc1/svc/web"),
            ("spiffe://td.consul/ns/a/dc/dc2/svc/b", "spiffe://td.consul/ns/a/dc/dc2/svc/b"),
        ] {
            assert_eq!(source(text, &us).unwrap().to_string(), expected);
        }
        for bad in ["", "*", "a//b", "a/b/c/d", "spiffe://x", "spiffe://other/ns/a/dc/d/svc/b"] {
            source(bad, &us).expect_err(bad);
        }
    }
}
