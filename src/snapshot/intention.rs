//! Intentions: who may talk to us.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;

use crate::tls::SpiffeId;

/// Stands for any name, in a source's namespace and name and in a destination.
const ANY: &str = "*";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// One intention that names us, or a wildcard, as destination.
///
/// Sources of a cluster peering or a sameness group are not among them: over HTTP their identities can't be
/// known, so such an intention matches nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intention {
    /// `default` when the intention names none. Partitions have no wildcard.
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
    /// In the order in which they decide.
    list: Vec<Intention>,
    by_source: BySource,
    default: DefaultPolicy,
}

/// Where in the list the first intention of each source is: by partition, then namespace, then name.
/// Nested, so that a look-up borrows its keys.
type BySource = HashMap<String, HashMap<String, HashMap<String, usize>>>;

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
    pub fn new(mut list: Vec<Intention>, default: DefaultPolicy) -> Self {
        // The agent sorts its answer so, but what decides first is too important to rest on that.
        list.sort_by(|a, b| a.order().cmp(&b.order()));
        let mut by_source = BySource::new();
        for (index, intention) in list.iter().enumerate() {
            let names = by_source.entry(intention.source_partition.clone()).or_default();
            let names = names.entry(intention.source_namespace.clone()).or_default();
            names.entry(intention.source.clone()).or_insert(index);
        }
        Self { list, by_source, default }
    }

    /// Decides about a peer whose certificate chains to our roots and is of our trust domain: the first
    /// intention whose source matches, else the default policy (Consul 1.19.2,
    /// `agent/structs/intention.go`).
    #[must_use]
    pub fn decide(&self, peer: &SpiffeId) -> Decision<'_> {
        match self.first_match(peer) {
            Some(intention) => match intention.action {
                Some(Action::Allow) => Decision::Allow(Decider::Intention(intention)),
                Some(Action::Deny) => Decision::Deny(Decider::Intention(intention)),
                None => Decision::EachRequest(intention),
            },
            None => self.default.decision(),
        }
    }

    /// The earliest in order of the (at most four) forms in which an intention can name this peer.
    fn first_match(&self, peer: &SpiffeId) -> Option<&Intention> {
        let namespaces = self.by_source.get(&peer.partition)?;
        let forms = [peer.namespace.as_str(), ANY];
        let names = forms.iter().filter_map(|namespace| namespaces.get(*namespace));
        let matches = names.flat_map(|names| [names.get(&peer.service), names.get(ANY)]);
        matches.flatten().min().and_then(|&index| self.list.get(index))
    }
}

impl Intention {
    /// Precedence first; ties as Consul breaks them.
    fn order(&self) -> impl Ord + '_ {
        (Reverse(self.precedence), &self.source_partition, &self.source_namespace, &self.source, &self.destination)
    }
}

impl DefaultPolicy {
    fn decision(&self) -> Decision<'_> {
        match self.action {
            Action::Allow => Decision::Allow(Decider::Default(self)),
            Action::Deny => Decision::Deny(Decider::Default(self)),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// The source is written as briefly as its partition and namespace allow: `web`, `team/web`, `part/team/web`.
impl fmt::Display for Intention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("intention ")?;
        if self.source_partition != "default" {
            write!(f, "{}/{}/", self.source_partition, self.source_namespace)?;
        } else if self.source_namespace != "default" {
            write!(f, "{}/", self.source_namespace)?;
        }
        write!(f, "{} => {} (", self.source, self.destination)?;
        match self.action {
            Some(action) => write!(f, "{action}")?,
            None => f.write_str("permissions")?,
        }
        write!(f, ", precedence {})", self.precedence)
    }
}

impl fmt::Display for DefaultPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.source, self.action)
    }
}

impl fmt::Display for Decider<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention(intention) => intention.fmt(f),
            Self::Default(policy) => policy.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: Option<Action> = Some(Action::Allow);
    const DENY: Option<Action> = Some(Action::Deny);

    /// `source` is `[[partition/]namespace/]name`.
    fn intention(source: &str, destination: &str, action: Option<Action>, precedence: u32) -> Intention {
        let mut parts = source.rsplit('/');
        let mut part = || parts.next().unwrap_or("default").to_owned();
        Intention {
            source: part(),
            source_namespace: part(),
            source_partition: part(),
            destination: destination.to_owned(),
            action,
            precedence,
        }
    }

    fn peer(name: &str) -> SpiffeId {
        let path = match name.split('/').collect::<Vec<_>>()[..] {
            [partition, namespace, service] => format!("ap/{partition}/ns/{namespace}/dc/dc1/svc/{service}"),
            [namespace, service] => format!("ns/{namespace}/dc/dc1/svc/{service}"),
            _ => format!("ns/default/dc/dc1/svc/{name}"),
        };
        SpiffeId::parse(&format!("spiffe://td.consul/{path}")).unwrap()
    }

    /// What is decided about the peer, and by what.
    fn decide(list: &[Intention], default: Action, name: &str) -> String {
        let default = DefaultPolicy { action: default, source: "default policy".to_owned() };
        let intentions = Intentions::new(list.to_vec(), default);
        match intentions.decide(&peer(name)) {
            Decision::Allow(decider) => format!("allowed by {decider}"),
            Decision::Deny(decider) => format!("denied by {decider}"),
            Decision::EachRequest(intention) => format!("left to requests by {intention}"),
        }
    }

    #[test]
    fn the_highest_precedence_decides_whatever_the_order_of_the_answer() {
        let mut list = vec![
            intention("web", "db", ALLOW, 9),
            intention("*", "db", DENY, 8),
            intention("web", "*", DENY, 6),
            intention("*", "*", ALLOW, 5),
        ];
        for _ in 0..list.len() {
            list.rotate_left(1);
            assert_eq!(decide(&list, Action::Deny, "web"), "allowed by intention web => db (allow, precedence 9)");
            assert_eq!(decide(&list, Action::Allow, "api"), "denied by intention * => db (deny, precedence 8)");
        }
        list.retain(|i| i.destination == "*");
        assert_eq!(decide(&list, Action::Allow, "web"), "denied by intention web => * (deny, precedence 6)");
        assert_eq!(decide(&list, Action::Deny, "api"), "allowed by intention * => * (allow, precedence 5)");
    }

    #[test]
    fn without_a_match_the_default_policy_decides() {
        assert_eq!(decide(&[], Action::Allow, "web"), "allowed by default policy (allow)");
        assert_eq!(decide(&[], Action::Deny, "web"), "denied by default policy (deny)");
        let other = [intention("api", "db", ALLOW, 9)];
        assert_eq!(decide(&other, Action::Deny, "web"), "denied by default policy (deny)");
    }

    #[test]
    fn names_are_compared_exactly() {
        let list = [intention("web", "db", ALLOW, 9)];
        for name in ["Web", "we", "webb", "web.", "other/web", "other/default/web"] {
            assert_eq!(decide(&list, Action::Deny, name), "denied by default policy (deny)", "{name}");
        }
    }

    #[test]
    fn a_wildcard_stays_in_its_namespace_and_partition() {
        let list = [
            intention("team/web", "db", DENY, 9),
            intention("team/*", "db", ALLOW, 8),
            intention("*/*", "db", DENY, 7),
            intention("part/*/*", "db", ALLOW, 7),
        ];
        let check = |name: &str, expected: &str| assert_eq!(decide(&list, Action::Deny, name), expected, "{name}");
        check("team/web", "denied by intention team/web => db (deny, precedence 9)");
        check("team/api", "allowed by intention team/* => db (allow, precedence 8)");
        check("other/api", "denied by intention */* => db (deny, precedence 7)");
        check("part/team/web", "allowed by intention part/*/* => db (allow, precedence 7)");
        check("elsewhere/team/web", "denied by default policy (deny)");
    }

    #[test]
    fn permissions_leave_it_to_each_request() {
        let list = [intention("web", "db", None, 9), intention("*", "db", DENY, 8)];
        let expected = "left to requests by intention web => db (permissions, precedence 9)";
        assert_eq!(decide(&list, Action::Allow, "web"), expected);
    }

    #[test]
    fn of_two_alike_the_first_decides() {
        let list = [intention("web", "db", DENY, 9), intention("web", "db", ALLOW, 9)];
        assert_eq!(decide(&list, Action::Allow, "web"), "denied by intention web => db (deny, precedence 9)");
    }
}
