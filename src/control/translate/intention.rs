//! Intentions. What cannot be understood denies.

use super::permission::{permission, token};
use super::{Notes, or_default};
use crate::consul::api;
use crate::snapshot::{Action, Hits, Intention};

/// Reads the list that matches our service. The order is kept.
pub(in crate::control) fn intentions(list: &[api::Intention], notes: &mut Notes) -> Vec<Intention> {
    list.iter().filter_map(|wire| intention(wire, notes)).collect()
}

fn intention(wire: &api::Intention, notes: &mut Notes) -> Option<Intention> {
    let action = action(wire, notes);
    // A peer's services have a trust domain of their own, which our roots do not vouch for; members of a
    // sameness group are listed one by one besides. Neither can let a local service in.
    let foreign = !wire.source_peer.is_empty()
        || (!wire.source_sameness_group.is_empty() && action != Some(Action::Deny))
        || (wire.source_name.is_empty() && action != Some(Action::Deny));
    if foreign {
        return None;
    }
    let named = format!("{} => {}", wire.source_name, wire.destination_name);
    Some(Intention {
        source_partition: or_default(&wire.source_partition),
        source_namespace: or_default(&wire.source_ns),
        source: if wire.source_name.is_empty() { "*".to_owned() } else { wire.source_name.clone() },
        destination: wire.destination_name.clone(),
        action,
        permissions: wire.permissions.iter().map(|one| permission(one, &named, notes)).collect(),
        token: token(wire.jwt.as_ref()),
        precedence: u32::try_from(wire.precedence).unwrap_or(0),
        hits: Hits::default(),
    })
}

/// What the intention says; `None` where each request has to be judged.
fn action(wire: &api::Intention, notes: &mut Notes) -> Option<Action> {
    if let Some(field) = wire.unknown_field().filter(|_| wire.action != "deny") {
        notes.push(format!(
            "the intention {} => {} has a field {field:?} that is not known and may restrict it, so it denies",
            wire.source_name, wire.destination_name
        ));
        return Some(Action::Deny);
    }
    let source_known = matches!(wire.source_type.as_str(), "" | "consul");
    match wire.action.as_str() {
        "allow" | "" if source_known && !wire.permissions.is_empty() => None,
        "allow" if source_known && token(wire.jwt.as_ref()).is_some() => None,
        "allow" if source_known => Some(Action::Allow),
        "deny" => Some(Action::Deny),
        other => {
            notes.push(format!(
                "the intention {} => {} (action {other:?}, source type {:?}) is not understood, so it denies",
                wire.source_name, wire.destination_name, wire.source_type
            ));
            Some(Action::Deny)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Source and action of what becomes of one intention, and whether it was noted.
    fn read(wire: Value) -> (Option<(String, Option<Action>)>, bool) {
        let mut notes = Notes::default();
        let wire: api::Intention = serde_json::from_value(wire).unwrap();
        let read = intentions(&[wire], &mut notes).pop();
        (read.map(|intention| (intention.source, intention.action)), !notes.take().is_empty())
    }

    #[test]
    fn what_is_not_understood_denies() {
        let (allow, deny) = (Some(Action::Allow), Some(Action::Deny));
        let permissions = json!([{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]);
        for (wire, expected, noted) in [
            (json!({"Action": "allow"}), allow, false),
            (json!({"Action": "deny"}), deny, false),
            (json!({"Action": "allow", "SourceType": "consul"}), allow, false),
            (json!({"Permissions": permissions}), None, false),
            (json!({"Action": "allow", "JWT": {"Providers": [{"Name": "okta"}]}}), None, false),
            (json!({"Action": "deny", "Permissions": permissions}), deny, false),
            (json!({"Action": "allow", "Permissions": permissions}), None, false),
            (json!({}), deny, true),
            (json!({"Action": "", "Permissions": []}), deny, true),
            (json!({"JWT": {}}), deny, true),
            (json!({"Action": "ALLOW"}), deny, true),
            (json!({"Action": "perhaps"}), deny, true),
            (json!({"Action": "allow", "SourceType": "spiffe"}), deny, true),
            (json!({"Permissions": permissions, "SourceType": "spiffe"}), deny, true),
            (json!({"Action": "allow", "SourceCIDRs": ["10.0.0.0/8"]}), deny, true),
            (json!({"Permissions": permissions, "NotAfter": "2030-01-01T00:00:00Z"}), deny, true),
            (json!({"Action": "deny", "SourceCIDRs": ["10.0.0.0/8"]}), deny, false),
            (json!({"Action": "allow", "SourceCIDRs": [], "NotAfter": "", "Port": 0}), allow, false),
            (json!({"Action": "allow", "Hash": "x", "Meta": {"a": "b"}, "CreateIndex": 7}), allow, false),
        ] {
            let mut wire = wire;
            wire["SourceName"] = "web".into();
            assert_eq!(read(wire.clone()), (Some(("web".into(), expected)), noted), "{wire}");
        }
    }

    #[test]
    fn sources_that_cannot_be_local_let_nobody_in() {
        let deny = Some(("*".to_owned(), Some(Action::Deny)));
        for (wire, expected) in [
            (json!({"SourceName": "web", "SourcePeer": "east", "Action": "allow"}), None),
            (json!({"SourceName": "web", "SourcePeer": "east", "Action": "deny"}), None),
            (json!({"SourceName": "*", "SourceSamenessGroup": "all", "Action": "allow"}), None),
            (json!({"SourceName": "*", "SourceSamenessGroup": "all", "Action": "deny"}), deny.clone()),
            (json!({"Action": "allow"}), None),
            (json!({"Action": "deny"}), deny),
        ] {
            assert_eq!(read(wire.clone()).0, expected, "{wire}");
        }
    }
}
