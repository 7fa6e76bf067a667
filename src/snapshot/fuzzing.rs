//! Checks of request targets: no spelling of a path gets round a rule.

use std::sync::LazyLock;

use super::{
    Action, Conditions, Decision, DefaultPolicy, EscapedSlashes, Hits, Intention, Intentions, NormalPath,
    Normalization, PathRule, Permission, RequestView, Underscores,
};
use crate::jwt::Verified;
use crate::tls::SpiffeId;
use http::HeaderMap;

static PEER: LazyLock<SpiffeId> = LazyLock::new(|| SpiffeId::parse("spiffe://td/ns/default/dc/dc1/svc/web").unwrap());

/// `/admin` is denied and the rest allowed, in each way to say so.
static DENY: LazyLock<[Intentions; 2]> = LazyLock::new(|| {
    [PathRule::prefix("/admin"), PathRule::regex("/admin([/;].*)?").unwrap()].map(|rule| rules(rule, Action::Deny))
});

/// `/public/` is allowed and the rest denied.
static ALLOW: LazyLock<[Intentions; 2]> = LazyLock::new(|| {
    [PathRule::prefix("/public/"), PathRule::regex("/public/.*").unwrap()].map(|rule| rules(rule, Action::Allow))
});

/// A request target.
pub fn path(target: &[u8]) {
    let Ok(target) = std::str::from_utf8(target) else { return };
    for settings in all_settings() {
        let Ok(NormalPath::Forward(normal)) = settings.path(target) else { continue };
        let again = settings.path(&normal);
        assert_eq!(again, Ok(NormalPath::Forward((*normal).into())), "{target:?} under {settings:?}");
        if settings.path {
            rules_hold(&normal);
        }
    }
}

/// However an app reads the path, it reaches nothing that is denied, and with an allow only what is allowed.
fn rules_hold(normal: &str) {
    let path = normal.split('?').next().unwrap_or_default();
    for reached in [read_laxly(path), read_strictly(path)] {
        if reached.first().is_some_and(|first| first == b"admin") {
            assert!(!DENY.iter().any(|rules| allows(rules, path)), "{path} reaches {reached:?}");
        }
        if reached.first().is_none_or(|first| first != b"public") {
            assert!(!ALLOW.iter().any(|rules| allows(rules, path)), "{path} reaches {reached:?}");
        }
    }
}

/// As an app that decodes first, knows no difference between slashes, cuts off parameters and resolves dots.
fn read_laxly(path: &str) -> Vec<Vec<u8>> {
    let decoded = decode(path.as_bytes());
    let mut reached: Vec<Vec<u8>> = Vec::new();
    for segment in decoded.split(|b| matches!(b, b'/' | b'\\')) {
        match segment.split(|b| *b == b';').next().unwrap_or_default() {
            b"" | b"." => {}
            b".." => drop(reached.pop()),
            name => reached.push(name.to_vec()),
        }
    }
    reached
}

/// As an app that splits first and then decodes each segment.
fn read_strictly(path: &str) -> Vec<Vec<u8>> {
    path.split('/').filter(|segment| !segment.is_empty()).map(|segment| decode(segment.as_bytes())).collect()
}

fn decode(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        let octet = digits
            .filter(|digits| bytes[at] == b'%' && digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.push(octet.unwrap_or(bytes[at]));
        at += if octet.is_some() { 3 } else { 1 };
    }
    out
}

fn allows(rules: &Intentions, path: &str) -> bool {
    let headers = HeaderMap::new();
    let request =
        RequestView { method: "GET", path, path_as_written: false, query: None, authority: "db", headers: &headers };
    matches!(rules.decide_request(&PEER, &request, &Verified::default()), Decision::Allow(_))
}

fn rules(rule: PathRule, action: Action) -> Intentions {
    let conditions = Conditions { path: Some(rule), ..Conditions::default() };
    let permission = Permission { action, conditions: Some(conditions), token: None };
    let intention = Intention {
        source_partition: "default".to_owned(),
        source_namespace: "default".to_owned(),
        source: "web".to_owned(),
        destination: "db".to_owned(),
        action: None,
        permissions: vec![permission],
        token: None,
        precedence: 9,
        hits: Hits::default(),
    };
    let opposite = if action == Action::Allow { Action::Deny } else { Action::Allow };
    Intentions::new(vec![intention], DefaultPolicy { action: opposite, source: String::new(), hits: Hits::default() })
}

fn all_settings() -> impl Iterator<Item = Normalization> {
    let slashes =
        [EscapedSlashes::Keep, EscapedSlashes::Reject, EscapedSlashes::Redirect, EscapedSlashes::Forward].into_iter();
    slashes.flat_map(|escaped_slashes| {
        [(true, false), (true, true), (false, false), (false, true)].map(|(path, merge_slashes)| Normalization {
            path,
            merge_slashes,
            escaped_slashes,
            underscores: Underscores::Allow,
        })
    })
}
