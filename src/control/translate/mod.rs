//! The one place where the agent's wire types become domain values.
//!
//! Everything here is a pure function from what a stranger sent: it refuses or defaults, and never panics.

mod access_log;
pub(super) mod chain;
pub(super) mod definition;
pub(super) mod endpoints;
pub(super) mod intention;
pub(super) mod jwt;
pub(super) mod mesh;
mod metrics;
mod opaque;
mod permission;
mod route;
mod traces;

use std::net::IpAddr;

use crate::snapshot::Host;

/// A body that cannot be used as a whole, and why: the last good one stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Bad(pub(super) String);

/// Things an operator should know about a body that was used all the same.
#[derive(Debug, Default)]
pub(super) struct Notes(Vec<String>);

impl Notes {
    pub(super) fn push(&mut self, note: String) {
        self.0.push(note);
    }

    pub(super) fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.0)
    }
}

/// Namespace or partition to send with a query. The community edition refuses the parameter whatever its
/// value, so that the default one is sent only to an agent that is known to be of the other edition.
fn tenancy(name: &str, enterprise: bool) -> Option<String> {
    let implied = name.is_empty() || (!enterprise && name == "default");
    (!implied).then(|| name.to_owned())
}

/// The text, or `default` where the agent left it out.
fn or_default(name: &str) -> String {
    if name.is_empty() { "default".to_owned() } else { name.to_owned() }
}

/// A host as the agent writes it, with IPv6 addresses bare or in brackets; `None` if empty.
fn host(text: &str) -> Option<Host> {
    if text.is_empty() {
        return None;
    }
    Some(ip(text).map_or_else(|| Host::Name(text.to_owned()), Host::Ip))
}

fn ip(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok()
}
