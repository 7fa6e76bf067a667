//! The agent: whether it answers, what it can do, its clock, and whether it knows the token.

use std::time::Duration;

use super::check::Findings;
use crate::consul::{self, Client, ErrorKind, Query, Token};

/// Results that the checks of a sidecar depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answers {
    /// The agent takes the questions of sidecars.
    pub(super) is_reachable: bool,
}

/// Offset between the clocks below which nothing is reported: the `Date` header has whole seconds, and the answer takes
/// a moment.
const CLOCK_CLOSE: Duration = Duration::from_secs(5);
/// Offset between the clocks from which certificates fail: Consul's are valid from a minute before they are made.
const CLOCK_FAR: Duration = Duration::from_secs(60);

pub(super) async fn examine(client: &Client, settings: &consul::Settings, findings: &mut Findings) -> Answers {
    let probe = match client.probe().await {
        Ok(probe) => probe,
        Err(error) => {
            findings.failed("agent", error);
            return Answers { is_reachable: false };
        }
    };
    let address = &settings.address;
    if probe.leader.is_empty() {
        findings.fail(
            "agent",
            format!("{address} answers, but the servers have no leader"),
            "see `consul operator raft list-peers` and the logs of the servers",
        );
    } else {
        let tls = match (address, settings.tls.verify) {
            (consul::Address::Tcp { https: true, .. }, true) => ", its certificate is verified",
            (consul::Address::Tcp { https: true, .. }, false) => ", and any certificate is accepted",
            _ => "",
        };
        findings.ok("agent", format!("{address} answers{tls}"));
    }
    clock(&probe, findings);
    version(client, probe.has_default_policy, findings).await;
    if !token(client, settings, findings).await {
        return Answers { is_reachable: false };
    }
    match client.fetch(&Query::ca_roots()).await {
        Ok(roots) => findings.ok(
            "service mesh",
            format!("enabled, {} roots of trust domain {}", roots.value.roots.len(), roots.value.trust_domain),
        ),
        Err(error) => findings.failed("service mesh", error),
    }
    Answers { is_reachable: true }
}

fn clock(probe: &consul::Probe, findings: &mut Findings) {
    let Some((offset, is_ahead)) = probe.clock_offset() else {
        findings.warn("clock", "the answer of the agent has no Date header", "compare the clocks by hand");
        return;
    };
    let word = if is_ahead { "ahead of" } else { "behind" };
    let found = format!("this host is {} s {word} the agent", offset.as_secs());
    let next =
        "set the clocks of all hosts by NTP: certificates of the mesh are valid from a minute before they are made";
    if offset >= CLOCK_FAR {
        findings.fail("clock", found, next);
    } else if offset >= CLOCK_CLOSE {
        findings.warn("clock", found, next);
    } else {
        findings.ok("clock", format!("within {} s of the agent's", CLOCK_CLOSE.as_secs()));
    }
}

async fn version(client: &Client, has_default_policy: bool, findings: &mut Findings) {
    let lacking = "no intentions by request (1.9) and no tokens of JWT providers (1.16)";
    match client.agent_version().await {
        Ok(version) => {
            let number =
                |place| version.split(['.', '-', '+']).nth(place).and_then(|part| part.parse().ok()).unwrap_or(0);
            match (number(0), number(1)) {
                newer if newer >= (1_u32, 16_u32) => {
                    findings.ok("agent version", format!("{version}, which has all that is used"))
                }
                newer if newer >= (1, 9) => {
                    findings.ok("agent version", format!("{version}: no tokens of JWT providers (1.16)"));
                }
                _ => {
                    findings.warn("agent version", format!("{version}: {lacking}"), "update Consul if those are needed")
                }
            }
        }
        // It takes agent:read, which no sidecar needs.
        Err(error) if error.is_forbidden() && has_default_policy => {
            findings
                .ok("agent version", "1.9 or later; the token may not read more (agent:read, which no sidecar needs)");
        }
        Err(error) if error.is_forbidden() => {
            findings.warn("agent version", format!("before 1.9: {lacking}"), "update Consul if those are needed");
        }
        Err(error) => findings.failed("agent version", error),
    }
}

/// Whether there is any use in asking with this token.
async fn token(client: &Client, settings: &consul::Settings, findings: &mut Findings) -> bool {
    let sends_one = settings.scope.token != Token::None;
    let Err(error) = client.token_is_known().await else {
        findings.ok(
            "token",
            if sends_one {
                "the agent knows it"
            } else {
                "none is given, so that the agent's own or the anonymous one counts"
            },
        );
        return true;
    };
    match error.kind() {
        _ if error.is_unknown_token() => {
            findings.failed("token", error);
            false
        }
        ErrorKind::Status { text, .. } if text.contains("ACL support disabled") => {
            findings.ok("token", "none is needed: ACLs are off");
            true
        }
        // Other errors: the queries themselves report them.
        _ => {
            findings.warn("token", error.to_string(), "see the queries below");
            true
        }
    }
}
