//! The control plane: asks the agent, and is the only writer of snapshots.
//!
//! [`run`] is one task. Answers of the agent come to it through one channel; each goes through `translate` into the
//! [`Draft`], which says what to ask next; when it is whole and has changed, a snapshot is published.

mod audit;
mod draft;
#[cfg(test)]
mod fixture;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod identity;
mod jwks_fetcher;
mod pace;
mod query;
mod sources;
mod startup;
#[cfg(test)]
mod tests;
mod tokens;
mod translate;
mod upstream;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::bail;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use self::audit::AuditWarning;
use self::draft::{Draft, Update, Want};
use self::pace::Pace;
use self::query::Query;
pub use self::sources::Sources;
use self::sources::{Delivery, QueryResult, Subscription};
use self::startup::{HeldBack, Registration, UnknownToken, resolve_proxy_id};
use crate::config::Mode;
use crate::snapshot::Snapshot;
use crate::stats::Registry;
use crate::tls::Aead;

/// Capacity of the channel from the sources; they wait when it is full.
const DELIVERIES: usize = 256;
/// Interval between two attempts to use a refused leaf or refused roots.
const RETRY: Duration = Duration::from_secs(5);
/// Keeps `publish` up to date with what the agent says, until nobody reads it any more. The value is `None`
/// until the first whole snapshot. `aead` is what its credentials seal TLS records with. Without `tunnel` each
/// connection has a TLS session of its own. `stats` counts the answers that can't be used.
///
/// # Errors
/// What [`resolve_proxy_id`] fails with, flags that define no proxy, and a token that the agent refuses before
/// there was a first snapshot. Later a refusal changes nothing but the log.
pub async fn run(
    sources: Sources,
    mode: &Mode,
    aead: Aead,
    tunnel: bool,
    stats: Arc<Registry>,
    publish: watch::Sender<Option<Arc<Snapshot>>>,
) -> anyhow::Result<()> {
    let scope = sources.client().scope();
    let enterprise = scope.namespace.is_some() || scope.partition.is_some();
    let draft = match mode {
        Mode::ProxyId(id) => Draft::registered(id.clone(), enterprise),
        Mode::SidecarFor(id) => Draft::registered(resolve_proxy_id(sources.client(), id).await?, enterprise),
        Mode::AdHoc(flags) => {
            let definition = translate::definition::ad_hoc(flags).map_err(|bad| anyhow::anyhow!("{bad}"))?;
            Draft::ad_hoc(definition)
        }
    }
    .sealed_by(aead)
    .with_tunnel(tunnel);
    let (sender, deliveries) = mpsc::channel(DELIVERIES);
    let (registration, unknown_token) = (Registration::default(), UnknownToken::default());
    let (subscriptions, held_back) = (HashMap::new(), HeldBack::default());
    let control = Control { sources, subscriptions, held_back, sender, draft, registration, unknown_token, stats };
    control.run(deliveries, publish).await
}

struct Control {
    sources: Sources,
    subscriptions: HashMap<Query, Subscription>,
    held_back: HeldBack,
    sender: mpsc::Sender<Delivery>,
    draft: Draft,
    registration: Registration,
    unknown_token: UnknownToken,
    stats: Arc<Registry>,
}

impl Control {
    async fn run(
        mut self,
        mut deliveries: mpsc::Receiver<Delivery>,
        publish: watch::Sender<Option<Arc<Snapshot>>>,
    ) -> anyhow::Result<()> {
        let (mut pace, mut audit) = (Pace::default(), AuditWarning::default());
        let fetch_requests = self.draft.fetch_requests();
        let mut requested = false;
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.ask_for_what_is_wanted();
        self.note_changes(&mut pace);
        loop {
            requested = requested && self.hurry();
            for note in self.draft.notes() {
                tracing::warn!("{note}");
            }
            let due = pace.due;
            if due.is_some_and(|due| due <= Instant::now()) {
                self.publish(&publish);
                audit.look(publish.borrow().as_deref(), Instant::now());
                pace.published(Instant::now());
                if self.held_back.until.is_some() && publish.borrow().is_some() {
                    // The listeners are bound first.
                    tokio::task::yield_now().await;
                    self.ask_what_was_held_back();
                }
                continue;
            }
            let held_until = self.held_back.until;
            tokio::select! {
                () = publish.closed() => return Ok(()),
                // The sender is ours, so there is always a next.
                Some(first) = deliveries.recv() => {
                    // Updates that came with it are of the same burst.
                    let burst = std::iter::once(first).chain(std::iter::from_fn(|| deliveries.try_recv().ok()));
                    self.take_burst(burst, publish.borrow().is_none())?;
                }
                () = fetch_requests.notified() => {
                    requested = true;
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => continue,
                () = sleep_until(held_until.unwrap_or_else(Instant::now)), if held_until.is_some() => {
                    self.ask_what_was_held_back();
                }
                _ = retry.tick() => {
                    audit.look(publish.borrow().as_deref(), Instant::now());
                    if let Err(bad) = self.draft.retry(SystemTime::now()) {
                        tracing::debug!("leaf or roots are still refused: {bad}");
                    }
                }
            }
            self.note_changes(&mut pace);
        }
    }

    fn note_changes(&self, pace: &mut Pace) {
        if let Some(urgency) = self.draft.urgency() {
            pace.changed(urgency, Instant::now());
        }
    }

    fn publish(&mut self, publish: &watch::Sender<Option<Arc<Snapshot>>>) {
        if let Some(snapshot) = self.draft.finish() {
            announce(&snapshot, publish.borrow().is_none());
            publish.send_replace(Some(snapshot));
        }
    }

    /// `starting`: there was no snapshot yet, so that a token which the agent refuses is an error.
    fn take_burst(&mut self, burst: impl Iterator<Item = Delivery>, starting: bool) -> anyhow::Result<()> {
        for Delivery { query, subscription, result } in burst.take(DELIVERIES) {
            if self.subscriptions.get(&query).is_none_or(|current| current.number != subscription) {
                continue;
            }
            if let QueryResult::Failed(error) = &result
                && starting
                && query.is_essential()
                && error.is_forbidden()
                && !self.unknown_token.may_become_known(error)
            {
                bail!("the agent refuses the token: {error}");
            }
            self.take(query, &result);
            // At once, as the next news may be about what is not wanted any more.
            self.ask_for_what_is_wanted();
        }
        Ok(())
    }

    fn take(&mut self, query: Query, result: &QueryResult) {
        match result {
            QueryResult::Update(update) => {
                if matches!(**update, Update::Service(_)) {
                    self.registration = Registration::Known;
                }
                self.apply(update);
            }
            QueryResult::Failed(error) => {
                if let Query::Service(id) = &query {
                    self.registration.failed(id, error);
                }
                self.apply(&Update::Failed(query));
            }
        }
    }

    fn apply(&mut self, update: &Update) {
        if let Err(bad) = self.draft.apply(update, SystemTime::now()) {
            let refused = &self.stats.refused;
            let count = if update.source().is_about_upstreams() { &refused.upstreams } else { &refused.others };
            count.increment();
            tracing::error!("{}: the agent's answer can't be used, so nothing changes: {bad}", update.source());
        }
    }

    /// Subscribes to what the draft wants, and to nothing else. What another draft knows of that already may have it want more.
    fn ask_for_what_is_wanted(&mut self) {
        loop {
            let wants = self.draft.wants();
            let wants = self.held_back.hold(wants, Instant::now());
            if !self.subscribe(wants) {
                return;
            }
        }
    }

    fn ask_what_was_held_back(&mut self) {
        let wants = self.held_back.release();
        if self.subscribe(wants) {
            self.ask_for_what_is_wanted();
        }
    }

    /// Starts and ends queries; says whether something was known of one already, and taken.
    fn subscribe(&mut self, wants: Vec<Want>) -> bool {
        let mut known = Vec::new();
        for want in wants {
            match want {
                Want::Start(query) => {
                    let (subscription, result) = self.sources.subscribe(&query, self.sender.clone());
                    known.extend(result.map(|result| (query.clone(), result)));
                    self.subscriptions.insert(query, subscription);
                }
                Want::Stop(query) => drop(self.subscriptions.remove(&query)),
            }
        }
        let any = !known.is_empty();
        for (query, result) in known {
            if self.subscriptions.contains_key(&query) {
                self.take(query, &result);
            }
        }
        any
    }

    /// Moves the queries that a connection waits for to the front; false if no connection waits.
    fn hurry(&self) -> bool {
        let mut waits = false;
        for query in self.draft.requested() {
            waits = true;
            if let Some(subscription) = self.subscriptions.get(query) {
                subscription.hurry();
            }
        }
        waits
    }
}

fn announce(snapshot: &Snapshot, first: bool) {
    let (version, upstreams) = (snapshot.version, snapshot.outbound.len());
    if first {
        tracing::info!(version, upstreams, "configuration is complete");
    } else {
        tracing::debug!(version, upstreams, "configuration has changed");
    }
}
