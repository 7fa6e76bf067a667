//! Permissions of intentions. What cannot be understood fails closed.

use super::Notes;
use crate::consul::api;
use crate::snapshot::{
    Action, ClaimRequirement, Conditions, HeaderMatch, PathRule, Pattern, Permission, ProviderRequirement, Text,
    TokenRequirement, ValueTest,
};

/// Reads one permission of the intention that is named so for the notes.
pub(super) fn permission(wire: &api::IntentionPermission, intention: &str, notes: &mut Notes) -> Permission {
    let action = if wire.action == "allow" { Action::Allow } else { Action::Deny };
    let conditions = conditions(wire).map_err(|cause| {
        let effect = if action == Action::Allow { "allows nothing" } else { "denies everything" };
        notes.push(format!("a permission of the intention {intention} {effect}, as {cause}"));
    });
    Permission { action, conditions: conditions.ok(), token: token(wire.jwt.as_ref()) }
}

/// Reads a requirement. Without providers it requires nothing; with something in it that is not known it is
/// one that no token meets.
pub(super) fn token(wire: Option<&api::IntentionJwt>) -> Option<TokenRequirement> {
    let wire = wire?;
    if wire.unknown_field().is_some() {
        return Some(TokenRequirement { providers: Vec::new() });
    }
    let claim =
        |claim: &api::IntentionJwtClaim| ClaimRequirement { path: claim.path.clone(), value: claim.value.clone() };
    let provider = |provider: &api::IntentionJwtProvider| ProviderRequirement {
        name: provider.name.clone(),
        claims: provider.verify_claims.iter().map(claim).collect(),
    };
    let providers: Vec<_> = wire.providers.iter().map(provider).collect();
    (!providers.is_empty()).then_some(TokenRequirement { providers })
}

fn conditions(wire: &api::IntentionPermission) -> Result<Conditions, String> {
    if let Some(field) = wire.unknown_field() {
        return Err(format!("its field {field:?} is not known"));
    }
    let Some(http) = &wire.http else { return Ok(Conditions::default()) };
    Ok(Conditions {
        path: path(http)?,
        methods: http.methods.clone(),
        headers: http.header.iter().map(header).collect::<Result<_, _>>()?,
    })
}

fn path(http: &api::IntentionHttp) -> Result<Option<PathRule>, String> {
    match (http.path_exact.as_str(), http.path_prefix.as_str(), http.path_regex.as_str()) {
        ("", "", "") => Ok(None),
        (exact, "", "") => Ok(Some(PathRule::exact(exact))),
        ("", prefix, "") => Ok(Some(PathRule::prefix(prefix))),
        ("", "", regex) => PathRule::regex(regex).map(Some).map_err(|bad| bad.to_string()),
        _ => Err("it has several conditions on the path".to_owned()),
    }
}

fn header(wire: &api::IntentionHeader) -> Result<HeaderMatch, String> {
    let text = |text: &str| Text::new(text, wire.ignore_case);
    let kinds = [
        (&wire.exact, ValueTest::Exact(text(&wire.exact))),
        (&wire.prefix, ValueTest::Prefix(text(&wire.prefix))),
        (&wire.suffix, ValueTest::Suffix(text(&wire.suffix))),
        (&wire.contains, ValueTest::Contains(text(&wire.contains))),
    ];
    let mut tests: Vec<ValueTest> =
        kinds.into_iter().filter(|(value, _)| !value.is_empty()).map(|(_, test)| test).collect();
    if !wire.regex.is_empty() {
        tests.push(ValueTest::Regex(Pattern::new(&wire.regex).map_err(|bad| bad.to_string())?));
    }
    if wire.present {
        tests.push(ValueTest::Present);
    }
    match <[ValueTest; 1]>::try_from(tests) {
        Ok([test]) => HeaderMatch::new(&wire.name, test, wire.invert)
            .ok_or_else(|| format!("requests can't be judged by a header {:?}", wire.name)),
        Err(_) => Err(format!("its condition on the header {:?} is none, or several", wire.name)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The permission, and how often something was noted.
    fn read(wire: Value) -> (Permission, usize) {
        let mut notes = Notes::default();
        let wire: api::IntentionPermission = serde_json::from_value(wire).unwrap();
        (permission(&wire, "web => db", &mut notes), notes.take().len())
    }

    fn check(http: Value, expected: Conditions) {
        let (permission, notes) = read(json!({"Action": "allow", "HTTP": http}));
        assert_eq!((permission.conditions, notes), (Some(expected), 0), "{http}");
    }

    #[test]
    fn every_kind_of_condition_is_read() {
        let path = |path| Conditions { path: Some(path), ..Conditions::default() };
        check(json!({"PathExact": "/a"}), path(PathRule::exact("/a")));
        check(json!({"PathPrefix": "/a"}), path(PathRule::prefix("/a")));
        check(json!({"PathRegex": "/a.*"}), path(PathRule::regex("/a.*").unwrap()));
        check(json!({"Methods": ["GET"]}), Conditions { methods: vec!["GET".to_owned()], ..Conditions::default() });
        let text = |ignore_case| Text::new("v", ignore_case);
        for (wire, test, invert) in [
            (json!({"Present": true}), ValueTest::Present, false),
            (json!({"Present": true, "Invert": true}), ValueTest::Present, true),
            (json!({"Exact": "v"}), ValueTest::Exact(text(false)), false),
            (json!({"Prefix": "v", "IgnoreCase": true}), ValueTest::Prefix(text(true)), false),
            (json!({"Suffix": "v"}), ValueTest::Suffix(text(false)), false),
            (json!({"Contains": "v", "IgnoreCase": true}), ValueTest::Contains(text(true)), false),
            (json!({"Regex": "v", "Invert": true}), ValueTest::Regex(Pattern::new("v").unwrap()), true),
        ] {
            let mut wire = wire;
            wire["Name"] = "X-A".into();
            let headers = vec![HeaderMatch::new("x-a", test, invert).unwrap()];
            check(json!({"Header": [wire]}), Conditions { headers, ..Conditions::default() });
        }
    }

    #[test]
    fn what_is_not_understood_has_no_conditions_and_is_told_of() {
        for http in [
            json!({"PathTemplate": "/{a}"}),
            json!({"PathExact": "/a", "PathPrefix": "/b"}),
            json!({"PathRegex": "("}),
            json!({"Header": [{"Name": "a"}]}),
            json!({"Header": [{"Name": "a", "Glob": "x*"}]}),
            json!({"Header": [{"Name": "a", "Exact": "x", "Prefix": "y"}]}),
            json!({"Header": [{"Name": "a", "Regex": "["}]}),
            json!({"Header": [{"Name": "a b", "Exact": "x"}]}),
            json!({"Header": [{"Name": ":scheme", "Exact": "x"}]}),
        ] {
            for (wire, action) in [("allow", Action::Allow), ("deny", Action::Deny), ("log", Action::Deny)] {
                let (permission, notes) = read(json!({"Action": wire, "HTTP": http}));
                assert_eq!((permission.action, permission.conditions, notes), (action, None, 1), "{http}");
            }
        }
    }

    #[test]
    fn token_requirements_are_read() {
        let jwt = json!({"Providers": [{"Name": "okta", "VerifyClaims": [{"Path": ["a", "b"], "Value": "c"}]}]});
        let (permission, _) = read(json!({"Action": "allow", "JWT": jwt}));
        assert_eq!(permission.conditions, Some(Conditions::default()));
        let claims = vec![ClaimRequirement { path: vec!["a".to_owned(), "b".to_owned()], value: "c".to_owned() }];
        let providers = vec![ProviderRequirement { name: "okta".to_owned(), claims }];
        assert_eq!(permission.token, Some(TokenRequirement { providers }));
        assert_eq!(read(json!({"Action": "allow", "JWT": {"Providers": null}})).0.token, None);
        let (unknown, notes) = read(json!({"Action": "allow", "JWT": {"Issuers": ["x"]}}));
        assert_eq!((unknown.token, notes), (Some(TokenRequirement { providers: Vec::new() }), 1));
    }
}
