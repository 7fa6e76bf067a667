//! The intentions of one service, with what decides where none matches.

use std::sync::Arc;

use crate::snapshot::{DefaultPolicy, Intention, Intentions};

#[derive(Debug, Default)]
pub(super) struct Rules {
    list: Option<Vec<Intention>>,
    default: Option<DefaultPolicy>,
    /// Of both; `None` until both are known.
    built: Option<Arc<Intentions>>,
}

impl Rules {
    /// Takes the list of intentions; false if it is the one that is known.
    pub(super) fn set_list(&mut self, mut list: Vec<Intention>) -> bool {
        let new = self.list.as_ref() != Some(&list);
        if new {
            let known = self.list.iter().flatten();
            for intention in &mut list {
                // What they decided so far is counted on.
                if let Some(same) = known.clone().find(|known| known.is_of_same_services(intention)) {
                    intention.hits = same.hits.clone();
                }
            }
            self.list = Some(list);
            self.build();
        }
        new
    }

    /// Takes the default policy; false if it is the one that is known.
    pub(super) fn set_default(&mut self, mut default: DefaultPolicy) -> bool {
        let new = self.default.as_ref() != Some(&default);
        if new {
            if let Some(known) = &self.default {
                default.hits = known.hits.clone();
            }
            self.default = Some(default);
            self.build();
        }
        new
    }

    pub(super) fn built(&self) -> Option<&Arc<Intentions>> {
        self.built.as_ref()
    }

    /// The names of the jwt-providers that intentions ask for.
    pub(super) fn providers(&self) -> impl Iterator<Item = &str> {
        self.list.iter().flatten().flat_map(Intention::providers)
    }

    fn build(&mut self) {
        let known = self.list.clone().zip(self.default.clone());
        self.built = known.map(|(list, default)| Arc::new(Intentions::new(list, default)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Action, Hits};

    fn intention(source: &str, action: Action) -> Intention {
        Intention {
            source_partition: "default".into(),
            source_namespace: "default".into(),
            source: source.into(),
            destination: "db".into(),
            action: Some(action),
            permissions: Vec::new(),
            token: None,
            precedence: 9,
            hits: Hits::default(),
        }
    }

    #[test]
    fn what_a_rule_decided_is_counted_on_while_it_is_changed_and_goes_with_it() {
        let mut rules = Rules::default();
        let default =
            |source: &str| DefaultPolicy { action: Action::Deny, source: source.into(), hits: Hits::default() };
        assert!(rules.set_default(default("a")));
        assert!(rules.set_list(vec![intention("web", Action::Allow), intention("job", Action::Allow)]));
        let before = Arc::clone(rules.built().unwrap());
        before.list().iter().for_each(|intention| intention.hits.count(true));
        before.default_policy().hits.count(false);
        assert!(rules.set_list(vec![intention("web", Action::Deny), intention("cron", Action::Allow)]));
        assert!(rules.set_default(default("b")));
        let now = rules.built().unwrap();
        let counted: Vec<_> = now.list().iter().map(|one| (one.source.as_str(), one.hits.allowed())).collect();
        assert_eq!(counted, [("cron", 0), ("web", 1)]);
        assert_eq!(now.default_policy().hits.denied(), 1);
        assert!(rules.set_list(vec![intention("job", Action::Allow)]));
        assert_eq!(rules.built().unwrap().list()[0].hits.allowed(), 0);
        assert!(!rules.set_list(vec![intention("job", Action::Allow)]), "counts change nothing");
    }
}
