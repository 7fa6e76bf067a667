//! Intentions: who may talk to us.

use std::fmt;

use crate::tls::SpiffeId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// One intention that names us, or a wildcard, as destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    pub source_partition: String,
    /// `*` matches any.
    pub source_namespace: String,
    /// `*` matches any.
    pub source: String,
    /// As the intention names it (`*` included): for the log.
    pub destination: String,
    /// `None`: it carries permissions that only HTTP requests can be judged by.
    pub action: Option<Action>,
    /// 1 to 9; higher decides first.
    pub precedence: u32,
}

/// What decides when no intention matches, and how the agent told us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultPolicy {
    pub action: Action,
    /// For the log: "default policy of the agent's ACLs", …
    pub source: String,
}

/// All intentions that match the local service, ready for decisions that do not cost in proportion to
/// their number.
#[derive(Debug, PartialEq, Eq)]
pub struct Intentions {
    list: Vec<Intention>,
    default: DefaultPolicy,
}

/// The outcome for one connection, with what decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision<'a> {
    Allow(Decider<'a>),
    Deny(Decider<'a>),
    /// The deciding intention has permissions: each request is judged. On a TCP listener that means deny.
    EachRequest(&'a Intention),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decider<'a> {
    Intention(&'a Intention),
    Default(&'a DefaultPolicy),
}

impl Intentions {
    #[must_use]
    pub fn new(list: Vec<Intention>, default: DefaultPolicy) -> Self {
        Self { list, default }
    }

    #[must_use]
    pub fn decide(&self, _peer: &SpiffeId) -> Decision<'_> {
        Decision::Deny(Decider::Default(&self.default))
    }
}

impl fmt::Display for Decider<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention(i) => {
                write!(f, "intention {} => {} (precedence {})", i.source, i.destination, i.precedence)
            }
            Self::Default(policy) => f.write_str(&policy.source),
        }
    }
}
