//! Queries that are kept open, with what they share.

use std::sync::{Arc, Weak};

use tokio::sync::mpsc;

use super::alarm::Alarms;
use super::query::{Asker, Event, Watch};
use super::slots::Slots;
use super::{Client, ONE_OFF_CONNECTIONS, Query, ringer};

/// Watches that share connections to the agent. Dropping the last clone leaves running watches alone.
#[derive(Clone)]
pub struct Watches {
    asker: Arc<Asker>,
}

impl Watches {
    /// Watches that open no more connections than the client's settings allow, less a few that are kept
    /// for requests of other kinds. Must be called within a runtime.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let slots = Slots::new(client.inner.max_connections.saturating_sub(ONE_OFF_CONNECTIONS));
        let alarms = client.has_alarms().then(|| Alarms::new(slots.clone()));
        let follower = client.inner.token.follows_file().then(|| {
            let client = client.clone();
            tokio::spawn(async move { client.inner.token.follow().await })
        });
        let asker = Arc::new_cyclic(|asker: &Weak<Asker>| {
            let keeper = alarms.clone().map(|alarms| tokio::spawn(ringer::keep(alarms, asker.clone())));
            Asker::new(client, slots, alarms, follower.into_iter().chain(keeper).collect())
        });
        Self { asker }
    }

    #[must_use]
    pub fn client(&self) -> &Client {
        &self.asker.client
    }

    /// Asks `query` from now on, and sends what `wrap` makes of its events. The watch ends with its handle
    /// or with the receiver.
    pub fn watch<T, U, F>(&self, query: Query<T>, events: mpsc::Sender<U>, wrap: F) -> Watch
    where
        T: Send + 'static,
        U: Send + 'static,
        F: Fn(Event<T>) -> U + Send + 'static,
    {
        self.asker.watch(query, events, wrap)
    }

    #[cfg(test)]
    pub(super) fn alarms(&self) -> Option<&Arc<Alarms>> {
        self.asker.alarms.as_ref()
    }
}
