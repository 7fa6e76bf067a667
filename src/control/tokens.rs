//! What verifies tokens, in the making: the providers that intentions name, and their keys.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::keys::{Fetched, KeySource};
use super::query::Query;
use super::translate::jwt::ProviderPlan;
use crate::jwt::{Provider, Providers};

#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// The providers that are named.
    wanted: BTreeSet<String>,
    /// Those of them that there are.
    plans: BTreeMap<String, ProviderPlan>,
    keys: HashMap<KeySource, Fetched>,
    built: Arc<Providers>,
}

impl Tokens {
    /// What it hangs on.
    pub(super) fn queries(&self) -> Vec<Query> {
        let entries = self.wanted.iter().cloned().map(Query::JwtProvider);
        // Two providers may share a set.
        let sources: HashSet<&KeySource> = self.plans.values().filter_map(|plan| plan.keys.as_ref()).collect();
        entries.chain(sources.into_iter().cloned().map(Query::Keys)).collect()
    }

    /// Takes the names of the providers that matter from now on.
    pub(super) fn want(&mut self, names: BTreeSet<String>) {
        self.plans.retain(|name, _| names.contains(name));
        self.wanted = names;
        self.forget_keys();
    }

    /// Takes what became of a provider; `None` is that there is none of that name.
    pub(super) fn set_provider(&mut self, name: String, plan: Option<ProviderPlan>) {
        match plan {
            Some(plan) if self.wanted.contains(&name) => drop(self.plans.insert(name, plan)),
            _ => drop(self.plans.remove(&name)),
        }
        self.forget_keys();
    }

    pub(super) fn set_keys(&mut self, source: KeySource, fetched: Fetched) {
        if self.is_used(&source) {
            self.keys.insert(source, fetched);
        }
    }

    /// Builds the providers; true if they are not what they were.
    pub(super) fn build(&mut self) -> bool {
        let provider = |plan: &ProviderPlan| {
            let Some(source) = &plan.keys else { return plan.provider.clone() };
            let fetched = self.keys.get(source);
            Provider {
                keys: fetched.map(|fetched| Arc::clone(&fetched.keys)),
                refetch: fetched.map(|fetched| fetched.refetch.clone()),
                ..plan.provider.clone()
            }
        };
        let new = Providers(self.plans.iter().map(|(name, plan)| (name.clone(), provider(plan))).collect());
        let changed = *self.built != new;
        if changed {
            self.built = Arc::new(new);
        }
        changed
    }

    pub(super) fn built(&self) -> &Arc<Providers> {
        &self.built
    }

    fn is_used(&self, source: &KeySource) -> bool {
        self.plans.values().any(|plan| plan.keys.as_ref() == Some(source))
    }

    /// Nobody keeps keys up to date that no provider uses.
    fn forget_keys(&mut self) {
        let mut keys = std::mem::take(&mut self.keys);
        keys.retain(|source, _| self.is_used(source));
        self.keys = keys;
    }
}
