//! The decision about a peer and request that have not come yet, made by the code of the data path.

use std::time::SystemTime;

use http::request::Parts;

use super::authorization;
use super::http::inbound;
use crate::snapshot::{Decision, Service};
use crate::tls::SpiffeId;

/// A decision that nothing comes of.
#[derive(Debug)]
pub struct Rehearsed<'a> {
    /// `None`: each request is judged by what it is, and none was given.
    pub allowed: Option<bool>,
    /// `None`: the request is refused for what it is, before it is judged.
    pub decision: Option<Decision<'a>>,
    /// One sentence.
    pub why: String,
    /// Providers, each with what is wrong with its token.
    pub tokens: Vec<(String, String)>,
}

/// Decides about a connection of such a peer, or about a request where the service speaks HTTP. What the header
/// `x-forwarded-client-cert` would hold is not known.
#[must_use]
pub fn rehearse<'a>(service: &'a Service, peer: &SpiffeId, request: Option<Parts>) -> Rehearsed<'a> {
    if let Some(request) = request.filter(|_| service.protocol.is_http()) {
        return rehearse_request(service, peer, request);
    }
    let decision = service.intentions.decide(peer);
    let undecided = service.protocol.is_http() && matches!(decision, Decision::EachRequest(_));
    let denial = authorization::reason(&decision).filter(|_| !undecided);
    Rehearsed {
        allowed: (!undecided).then_some(denial.is_none()),
        why: match denial {
            Some(reason) => format!("denied by {reason}"),
            None => decision.to_string(),
        },
        decision: Some(decision),
        tokens: Vec::new(),
    }
}

fn rehearse_request<'a>(service: &'a Service, peer: &SpiffeId, request: Parts) -> Rehearsed<'a> {
    match inbound::rehearse(service, peer, request, SystemTime::now()) {
        Ok((decision, verified)) => Rehearsed {
            allowed: Some(matches!(decision, Decision::Allow(_))),
            why: decision.to_string(),
            decision: Some(decision),
            tokens: verified.refusals().map(|(name, fault)| (name.to_owned(), fault.to_string())).collect(),
        },
        Err(fault) => Rehearsed {
            allowed: Some(false),
            decision: None,
            why: format!(
                "answered with {} whoever sends it: {}",
                fault.outcome.describe().status.as_u16(),
                fault.cause
            ),
            tokens: Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::proxy::fixture::service;
    use crate::snapshot::fixture::intention;
    use crate::snapshot::{
        Action, Conditions, DefaultPolicy, Hits, Intention, Intentions, PathRule, Permission, Protocol,
    };
    use crate::testing::ca::uri;

    #[test]
    fn it_is_what_the_data_plane_decides() {
        let path = Some(PathRule::prefix("/admin"));
        let admin = Conditions { path, ..Conditions::default() };
        let deny = Permission { action: Action::Deny, conditions: Some(admin), token: None };
        let all = Permission { action: Action::Allow, conditions: Some(Conditions::default()), token: None };
        let web = Intention { permissions: vec![deny, all], ..intention("web", None, 9) };
        let list = vec![web, intention("api", Some(Action::Allow), 9)];
        let default = DefaultPolicy { action: Action::Deny, source: "default policy".into(), hits: Hits::default() };
        let intentions = Intentions::new(list, default);
        let decide = |protocol, peer: &str, target: Option<&str>| {
            let mut service = service(protocol, ([127, 0, 0, 1], 1).into());
            service.intentions =
                std::sync::Arc::new(Intentions::new(intentions.list().to_vec(), intentions.default_policy().clone()));
            let request = target.map(|target| {
                let request = Request::builder().uri(target).header("host", "db");
                request.body(()).unwrap().into_parts().0
            });
            let rehearsed = rehearse(&service, &SpiffeId::parse(&uri(peer)).unwrap(), request);
            (rehearsed.allowed, rehearsed.why.clone())
        };
        let expect = |of: (Option<bool>, String), allowed, why: &str| {
            assert!(of.0 == allowed && of.1.starts_with(why), "{of:?}")
        };
        expect(
            decide(Protocol::Http, "web", Some("/x")),
            Some(true),
            "allowed by permission 2 (allow) of intention web => db",
        );
        // The path is normalised first, as for a request that comes.
        let denied = decide(Protocol::Http, "web", Some("/x/../%61dmin?y"));
        expect(denied, Some(false), "denied by permission 1 (deny) of intention web => db");
        expect(decide(Protocol::Http, "web", None), None, "left to requests by intention web => db");
        expect(
            decide(Protocol::Tcp, "web", Some("/x")),
            Some(false),
            "denied by intention web => db (permissions, precedence 9) has L7",
        );
        expect(decide(Protocol::Tcp, "api", None), Some(true), "allowed by intention api => db (allow, precedence 9)");
        expect(decide(Protocol::Http, "other", Some("/")), Some(false), "denied by default policy (deny)");
        expect(decide(Protocol::Http, "api", Some("/a%00")), Some(false), "answered with 400 whoever sends it");
    }
}
