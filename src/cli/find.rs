//! Finds the sidecars that a command is about.

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::Value;
use tokio::task::JoinSet;

use super::client::{self, Address, Answer};
use crate::admin::{Announced, announced};
use crate::telemetry::escape;

/// Which sidecar, for all commands.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Which sidecar to ask, and how to answer")]
pub(super) struct Target {
    /// Where its admin server listens: host:port, a port of this host, or unix:///path. The default is to find the
    /// sidecars of this host, which are those of this user; for root, all.
    #[arg(long, value_name = "address")]
    pub(super) admin: Option<String>,
    /// Name of its service, or the id that it was started with, where several run on this host.
    #[arg(long, value_name = "name")]
    pub(super) service: Option<String>,
    /// Answer with JSON. The default is false.
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false)]
    pub(super) json: bool,
}

/// A sidecar that has answered.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub(super) address: Address,
    /// Its latest answer to `/status`.
    pub(super) status: Value,
}

/// Sidecars that were found, and what kept others from being asked, each a sentence.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) sidecars: Vec<Sidecar>,
    pub(super) faults: Vec<String>,
}

impl Target {
    /// All that the flags speak of, at least one, in the order of their services.
    ///
    /// # Errors
    /// When there is none: a sentence that says what to do next.
    pub(super) fn all(&self) -> anyhow::Result<Found> {
        let mut found = match self.address()? {
            Some(address) => Found { sidecars: vec![client::block_on(Sidecar::fetch(address))??], faults: Vec::new() },
            None => client::block_on(look())??,
        };
        if let Some(wanted) = self.service() {
            let others: Vec<String> = found.sidecars.iter().map(Sidecar::title).collect();
            found.sidecars.retain(|sidecar| sidecar.is_named(wanted));
            if found.sidecars.is_empty() {
                bail!(
                    "no sidecar of {wanted:?} was found; there are: {}{}",
                    if others.is_empty() { "none".to_owned() } else { others.join(", ") },
                    also(&found.faults)
                );
            }
        }
        if found.sidecars.is_empty() {
            bail!(
                "no sidecar was found on this host: start one, or give -admin if its admin server listens in another \
                 container or belongs to another user (a sidecar with -admin-bind off has none){}",
                also(&found.faults)
            );
        }
        found.sidecars.sort_by(|a, b| (a.name(), &a.address).cmp(&(b.name(), &b.address)));
        // A sidecar that has just ended may have left its port to another one, which answers twice then.
        found.sidecars.dedup_by(|a, b| a.address == b.address);
        Ok(found)
    }

    /// The one that the flags speak of.
    ///
    /// # Errors
    /// When there is none, or several: a sentence that says what to do next.
    pub(super) fn one(&self) -> anyhow::Result<Sidecar> {
        self.one_that(|_| true)
    }

    /// The one that the flags speak of; where these are several, the one of them that the question fits.
    ///
    /// # Errors
    /// As of [`Self::one`].
    pub(super) fn one_that(&self, fits: impl Fn(&Sidecar) -> bool) -> anyhow::Result<Sidecar> {
        let mut found = self.all()?.sidecars;
        if found.iter().any(&fits) {
            found.retain(fits);
        }
        if found.len() > 1 {
            let all: Vec<String> = found.iter().map(Sidecar::title).collect();
            bail!("several sidecars were found: choose one by -service or -admin; there are: {}", all.join(", "));
        }
        found.pop().context("no sidecar was found")
    }

    /// Whether the flags or the environment name a sidecar.
    pub(super) fn is_chosen(&self) -> bool {
        self.service().is_some() || self.address().is_ok_and(|address| address.is_some())
    }

    fn address(&self) -> anyhow::Result<Option<Address>> {
        let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let (text, from) =
            match (given(&self.admin), std::env::var("LICTOR_ADMIN").ok().filter(|text| !text.is_empty())) {
                (Some(flag), _) => (flag, "-admin"),
                (None, Some(variable)) => (variable, "LICTOR_ADMIN"),
                (None, None) => return Ok(None),
            };
        Address::parse(&text).context(from).map(Some)
    }

    fn service(&self) -> Option<&str> {
        self.service.as_deref().filter(|name| !name.is_empty())
    }
}

fn also(faults: &[String]) -> String {
    faults.iter().map(|fault| format!("; {fault}")).collect()
}

async fn look() -> anyhow::Result<Found> {
    let announced = announced().await.context("can't look for sidecars of this host: give -admin")?;
    let mut requests = JoinSet::new();
    let mut found = Found::default();
    let mut strangers = 0;
    for one in announced {
        match one {
            Announced::OtherUser(_) => strangers += 1,
            Announced::At(address) => {
                requests.spawn(async move { Sidecar::fetch(Address::parse(&address)?).await });
            }
        }
    }
    while let Some(answer) = requests.join_next().await {
        match answer? {
            Ok(sidecar) => found.sidecars.push(sidecar),
            Err(error) => found.faults.push(format!("{error:#}")),
        }
    }
    if strangers > 0 {
        found.faults.push(format!(
            "{strangers} sidecars of other users are not shown: run this as root to see them, or give -admin"
        ));
    }
    Ok(found)
}

impl Sidecar {
    /// # Errors
    /// When what answers, if anything, is no sidecar; a sentence that says what to do next.
    pub(super) async fn fetch(address: Address) -> anyhow::Result<Self> {
        let status = address.request("/status").await?.json().ok();
        let status = status.filter(|status| status["sidecar"].is_object());
        let status = status.with_context(|| {
            format!("the program at {address} is no admin server of lictor, or of an older version: check the address")
        })?;
        Ok(Self { address, status })
    }

    /// Asks for a path with a query (`client::url`).
    ///
    /// # Errors
    /// When there is no answer; a sentence that says what to do next.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.address.get(path)
    }

    /// Its service; before that is known, the name or id that it was started for.
    pub(super) fn name(&self) -> &str {
        let about = &self.status["sidecar"];
        about["service"].as_str().or_else(|| about["started_for"].as_str()).unwrap_or_default()
    }

    /// Name and address, harmless on a terminal.
    pub(super) fn title(&self) -> String {
        format!("{} ({})", escape(self.name()), self.address)
    }

    fn is_named(&self, wanted: &str) -> bool {
        let about = &self.status["sidecar"];
        about["service"] == wanted || about["started_for"] == wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_is_named_by_its_service_or_by_what_it_was_started_for() {
        let sidecar = |status| Sidecar { address: Address::Tcp("127.0.0.1".into(), 1), status };
        let ready = sidecar(serde_json::json!({ "sidecar": { "service": "web", "started_for": "web-1" } }));
        assert!(ready.is_named("web") && ready.is_named("web-1") && !ready.is_named("we"));
        assert_eq!(ready.title(), "web (127.0.0.1:1)");
        let unready = sidecar(serde_json::json!({ "sidecar": { "service": null, "started_for": "w\u{1b}" } }));
        assert_eq!(unready.title(), "w\\u{1b} (127.0.0.1:1)");
    }
}
