//! Failures that go on, so that one that hits many queries is logged once, and another cause once more.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Error;
use super::endpoint::Request;

/// Shortest interval between two wake-ups of failed queries when the agent answers again.
const RECOVERY_SPACING: Duration = Duration::from_secs(1);

/// Causes that are remembered as logged.
const MOST_LOGGED: usize = 64;

#[derive(Clone, Default)]
pub(super) struct Failures {
    state: Arc<Mutex<State>>,
}

/// A query fails, for as long as this lives.
pub(super) struct Failing {
    class: String,
    failures: Failures,
}

#[derive(Default)]
struct State {
    /// Queries by the class of their failure.
    queries: HashMap<String, usize>,
    /// Classes that were logged since nothing failed. Causes may alternate.
    logged: HashSet<String>,
    recovered: Option<Instant>,
}

impl Failures {
    /// A query failed, again if it has a `former` failure.
    pub(super) fn enter(&self, former: Option<Failing>, error: &Error) -> Failing {
        let class = error.class();
        {
            let mut state = self.lock();
            *state.queries.entry(class.clone()).or_default() += 1;
            if state.logged.len() < MOST_LOGGED && state.logged.insert(class.clone()) {
                tracing::warn!("{error}");
            } else {
                tracing::debug!("{error}");
            }
        }
        drop(former);
        Failing { class, failures: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Failing {
    /// The query was answered. True when this is news of the agent being back. An agent that comes and goes is not news
    /// each time, for others ask at once when they hear it.
    pub(super) fn recover(self, request: &Request) -> bool {
        let mut state = self.failures.lock();
        if state.queries.get(&self.class) == Some(&1) {
            tracing::info!("The agent answers again: {request}");
        }
        let now = Instant::now();
        let is_new = state.recovered.is_none_or(|last| now.saturating_duration_since(last) >= RECOVERY_SPACING);
        if is_new {
            state.recovered = Some(now);
        }
        is_new
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let mut state = self.failures.lock();
        let Some(count) = state.queries.get_mut(&self.class) else { return };
        *count -= 1;
        if *count == 0 {
            state.queries.remove(&self.class);
        }
        if state.queries.is_empty() {
            state.logged.clear();
        }
    }
}
