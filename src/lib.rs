//! Lictor, a sidecar proxy for Consul service mesh driven by the agent's HTTP API alone.
//!
//! # A bird's-eye view
//!
//! **agent → [`consul`] → [`control`] → [`snapshot`] → [`proxy`] → wire**, and data flows rightward only. One bit
//! goes the other way: that a connection waits for an upstream which is not known yet ([`fetch`]).
//!
//! * [`config`] turns the command line and the environment into checked settings.
//! * [`consul`] speaks the agent's HTTP API: one method per endpoint, and the loop that keeps a
//!   blocking query open. It knows nothing about proxying.
//! * [`tls`] is identity and mutual TLS: SPIFFE ids, credentials, verification.
//! * [`jwt`] verifies tokens of requests.
//! * [`operators`] fills in Envoy's `%…%`, for access logs and edits of headers.
//! * [`access_log`] turns requests that are over into lines, and writes them.
//! * `race` runs attempts of which one is to succeed; `resolve` finds and connects to what host names stand for.
//! * [`trace`] reads and writes the headers of traces, and sends spans.
//! * [`snapshot`] holds what the data plane knows at one instant. Values only: no IO, no clock, no
//!   randomness. Routing and intention decisions are pure functions here.
//! * [`observe`] is what is known of each connection and request, and the one place where the data plane tells it.
//! * [`control`] is the only writer of snapshots: it gathers the agent's answers and publishes whole ones.
//! * [`proxy`] is the data plane. It reads snapshots and never calls the agent.
//! * [`stats`] keeps the numbers of the data path; [`admin`] gives them out, with all else that people and probes ask.
//! * [`cli`] is the commands that ask a running sidecar, by its admin server.
//! * [`doctor`] looks for what keeps a sidecar from working, for the command of that name.
//! * [`app`] builds, wires, waits and drains. Only `main` and tests know it.
//!
//! # Invariants
//!
//! * The data plane never calls the agent, and waits for `control` only where an upstream was never known: with
//!   the agent gone, traffic goes on with what is known.
//! * Wire types stay in [`consul`] and `control::translate`. Keys and tokens are never printed.
//! * Unknown means no: no credentials, no handshake; no decision, no connection; not whole, not ready.
//! * Every wait has a limit or is raced against [`drain`]. Every task has an owner.

pub mod access_log;
pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod consul;
pub mod control;
pub mod doctor;
pub mod drain;
pub mod fetch;
pub mod jwt;
pub mod observe;
pub mod operators;
pub mod proxy;
mod race;
pub mod registration;
mod resolve;
pub mod snapshot;
pub mod stats;
pub mod telemetry;
pub mod tls;
pub mod trace;

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
#[cfg(test)]
mod layers;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(all(fuzzing, not(test)))]
pub(crate) mod testing {
    pub(crate) mod ca;
}
