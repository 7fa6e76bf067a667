//! Whether a peer of the public listener may still be served, for everything that it has open.
//!
//! What begins needs an identity that is valid now and a decision that allows it now. What is open ends when a newer
//! state of the intentions denies it, also while its listener is no longer wanted or a drain goes on. That an identity
//! runs out ends nothing that is open, as in Envoy: peers renew theirs while connections go on.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use super::listener::Live;
use crate::drain::Stage;
use crate::snapshot::{Decision, PublicListener};
use crate::tls::SpiffeId;

/// What a connection of bytes, and whatever it was upgraded to, may no longer go on for.
pub enum Revoked {
    Denied(Arc<PublicListener>, String),
    /// The drain time is over.
    Drained,
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denied(..) => "denied while open",
            Self::Drained => "closed at the end of the drain time",
        })
    }
}

/// Ends when an open connection must.
pub async fn revoked(live: &mut watch::Receiver<Live<PublicListener>>, peer: &SpiffeId) -> Revoked {
    loop {
        if live.changed().await.is_err() {
            return Revoked::Drained;
        }
        let (listener, stage) = {
            let now = live.borrow_and_update();
            (Arc::clone(&now.part), now.stage)
        };
        if stage >= Stage::Closing {
            return Revoked::Drained;
        }
        if let Some(reason) = denial(&listener, peer) {
            return Revoked::Denied(listener, reason);
        }
    }
}

/// Why the peer may not have a connection of bytes, if it may not.
pub fn denial(listener: &PublicListener, peer: &SpiffeId) -> Option<String> {
    match listener.intentions.decide(peer) {
        Decision::Allow(_) => None,
        Decision::Deny(decider) => Some(decider.to_string()),
        // Only requests can be judged by permissions; a TCP listener sees none.
        Decision::EachRequest(intention) => {
            Some(format!("{intention} has L7 permissions, which deny everything on a tcp service"))
        }
    }
}
