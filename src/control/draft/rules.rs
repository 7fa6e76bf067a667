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
    pub(super) fn set_list(&mut self, list: Vec<Intention>) -> bool {
        let new = self.list.as_ref() != Some(&list);
        if new {
            self.list = Some(list);
            self.build();
        }
        new
    }

    /// Takes the default policy; false if it is the one that is known.
    pub(super) fn set_default(&mut self, default: DefaultPolicy) -> bool {
        let new = self.default.as_ref() != Some(&default);
        if new {
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
