//! `-register`: keeps the proxy's own service registered while it runs (Consul 1.8.7 to 1.19.2,
//! `command/connect/proxy/register.go`).

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::config::AdHoc;
use crate::consul::Client;

/// A service that is registered with a check that has to be renewed.
pub struct Registration {
    client: Client,
    id: String,
    definition: Value,
}

/// Time to live of the registration's check: without a renewal for this long it turns critical.
const TTL: Duration = Duration::from_secs(30);
/// Interval between two renewals of the check.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Pause after a failed registration.
const RETRY: Duration = Duration::from_secs(2);
/// Attempts to deregister when the process ends.
const GOODBYES: u32 = 3;
/// Pause between two attempts to deregister.
const GOODBYE_PAUSE: Duration = Duration::from_millis(500);

impl Registration {
    /// The registration that the flags ask for, if they do.
    #[must_use]
    pub fn new(client: Client, flags: &AdHoc) -> Option<Self> {
        let register = flags.register.as_ref()?;
        let (listen, _) = flags.public.as_ref()?;
        let name = format!("{}-proxy", flags.service);
        let id = register.id_suffix.as_ref().map_or_else(|| name.clone(), |suffix| format!("{name}-{suffix}"));
        // The unspecified address is none that anybody could dial: the agent's own takes its place.
        let address = if listen.ip().is_unspecified() { String::new() } else { listen.ip().to_string() };
        let definition = json!({
            "Kind": "connect-proxy",
            "ID": id,
            "Name": name,
            "Address": address,
            "Port": listen.port(),
            "Proxy": { "DestinationServiceName": flags.service },
            "Check": {
                "CheckID": check_id(&id),
                "Name": "proxy heartbeat",
                "TTL": format!("{}s", TTL.as_secs()),
                "Status": "passing",
            },
        });
        Some(Self { client, id, definition })
    }

    /// Registers, and again whenever the agent has forgotten: a check that cannot be renewed shows that.
    pub async fn keep(&self) {
        let mut registered = false;
        loop {
            let result = if registered {
                self.client.pass_check(&check_id(&self.id)).await
            } else {
                self.client.register_service(&self.definition).await
            };
            let pause = match result {
                Ok(()) if registered => HEARTBEAT,
                Ok(()) => {
                    tracing::info!(target: "proxy", service = self.id, "Registered with the agent");
                    registered = true;
                    HEARTBEAT
                }
                Err(error) => {
                    tracing::warn!(target: "proxy", service = self.id, %error, "Registration failed; trying again");
                    registered = false;
                    RETRY
                }
            };
            sleep(pause).await;
        }
    }

    /// Deregisters.
    pub async fn end(&self) {
        for attempt in 1..=GOODBYES {
            match self.client.deregister_service(&self.id).await {
                Ok(()) => {
                    tracing::info!(target: "proxy", service = self.id, "Deregistered from the agent");
                    return;
                }
                Err(error) if attempt == GOODBYES => {
                    tracing::warn!(target: "proxy", service = self.id, %error, "Deregistration failed; the TTL check of the registration turns critical by itself");
                }
                Err(_) => sleep(GOODBYE_PAUSE).await,
            }
        }
    }
}

fn check_id(id: &str) -> String {
    format!("{id}-ttl")
}
