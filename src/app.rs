//! Builds, wires, waits and drains.

use crate::config::Config;

/// Runs the proxy until it is told to stop.
///
/// # Errors
///
/// When the proxy cannot be started.
pub async fn run(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("the proxy is not wired together yet")
}
