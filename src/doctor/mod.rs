//! Looks for what keeps a sidecar from working: the agent, the rights of the token, certificates, clocks, ports, instances.
//!
//! Each query that the sidecar needs is asked once, as the sidecar asks it. Nothing is changed, and no port is opened.

mod agent;
mod check;
mod host;
mod sidecar;
mod upstreams;

use std::collections::BTreeSet;

use serde_json::Value;

use self::check::Findings;
pub use self::check::{Check, Level};
use crate::consul::{self, Client};

/// A sidecar of this host that has answered.
#[derive(Debug)]
pub struct Running {
    /// Where its admin server listens, as written in `-admin-bind`.
    pub address: String,
    /// Its answer to `/status`.
    pub status: Value,
}

/// Which sidecar to look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    ProxyId(String),
    /// The id of the service.
    SidecarFor(String),
    /// What a running sidecar was started for, one or the other.
    Either(String),
}

impl Subject {
    fn id(&self) -> &str {
        let (Self::ProxyId(id) | Self::SidecarFor(id) | Self::Either(id)) = self;
        id
    }
}

impl Running {
    fn started_for(&self) -> &str {
        self.status["sidecar"]["started_for"].as_str().unwrap_or_default()
    }
}

/// All checks, in the order in which they depend on each other. Without a subject those of the running sidecars.
///
/// # Errors
/// When the settings can't be used: a token file or certificate that can't be read.
pub async fn examine(
    settings: &consul::Settings,
    subject: Option<Subject>,
    running: &[Running],
) -> anyhow::Result<Vec<Check>> {
    let client = Client::new(settings)?;
    let mut findings = Findings::default();
    host::limits(&mut findings);
    let answers = agent::examine(&client, settings, &mut findings).await;
    let subjects: BTreeSet<Subject> = match subject {
        Some(subject) => [subject].into(),
        None => running.iter().map(|one| Subject::Either(one.started_for().to_owned())).collect(),
    };
    if subjects.is_empty() {
        findings.warn(
            "sidecar",
            "none of this host was found, and none is named",
            "give -sidecar-for or -proxy-id to check the needs of one",
        );
    }
    for subject in subjects {
        findings.about = Some(subject.id().to_owned());
        sidecar::examine(&client, &subject, running, answers, &mut findings).await;
    }
    Ok(findings.checks)
}
