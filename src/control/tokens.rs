//! The draft of the token providers: those that intentions name, with their keys.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::jwks_fetcher::{Fetched, KeySource};
use super::query::Query;
use super::translate::jwt::ProviderPlan;
use crate::jwt::{Provider, Providers};

#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// The providers that are named.
    wanted: BTreeSet<String>,
    /// Those of them that there are.
    plans: BTreeMap<String, ProviderPlan>,
    /// Those whose entry can't be used, and never could: who may do what is not known.
    refused: BTreeSet<String>,
    /// Those of which there is no entry, or none that we may read.
    absent: BTreeSet<String>,
    keys: HashMap<KeySource, Fetched>,
    built: Arc<Providers>,
}

impl Tokens {
    /// The queries that it is built from.
    pub(super) fn queries(&self) -> Vec<Query> {
        let entries = self.wanted.iter().cloned().map(Query::JwtProvider);
        // Two providers may share a set.
        let sources: HashSet<&KeySource> = self.plans.values().filter_map(|plan| plan.keys.as_ref()).collect();
        entries.chain(sources.into_iter().cloned().map(Query::Keys)).collect()
    }

    /// Takes the names of the providers that matter from now on.
    pub(super) fn want(&mut self, names: BTreeSet<String>) {
        self.plans.retain(|name, _| names.contains(name));
        self.refused.retain(|name| names.contains(name));
        self.absent.retain(|name| names.contains(name));
        self.wanted = names;
        self.forget_keys();
    }

    /// Takes what became of a provider; `None` is that there is none of that name.
    pub(super) fn set_provider(&mut self, name: String, plan: Option<ProviderPlan>) {
        if !self.wanted.contains(&name) {
            return;
        }
        self.refused.remove(&name);
        self.absent.remove(&name);
        match plan {
            Some(plan) => drop(self.plans.insert(name, plan)),
            None => {
                self.plans.remove(&name);
                self.absent.insert(name);
            }
        }
        self.forget_keys();
    }

    /// The entry of a provider can't be used, so that the last one stays.
    pub(super) fn refuse_provider(&mut self, name: &str) {
        if self.wanted.contains(name) && !self.plans.contains_key(name) {
            self.absent.remove(name);
            self.refused.insert(name.to_owned());
        }
    }

    /// The entry of a provider can't be read, so that the last one stays.
    pub(super) fn miss_provider(&mut self, name: &str) {
        if self.are_waiting_for(name) {
            self.absent.insert(name.to_owned());
        }
    }

    /// Whether there is a provider whose entry could never be used.
    pub(super) fn have_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Whether nothing is known yet of some provider.
    pub(super) fn are_waiting(&self) -> bool {
        self.wanted.iter().any(|name| self.are_waiting_for(name))
    }

    fn are_waiting_for(&self, name: &str) -> bool {
        self.wanted.contains(name)
            && !(self.plans.contains_key(name) || self.refused.contains(name) || self.absent.contains(name))
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

    /// Drops keys that no provider uses: they would not be kept up to date.
    fn forget_keys(&mut self) {
        let mut keys = std::mem::take(&mut self.keys);
        keys.retain(|source, _| self.is_used(source));
        self.keys = keys;
    }
}
