//! Demand: whoever waits for what is not known yet tells those that fetch it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Rung by every demand of a fetcher; wakes it.
#[derive(Debug, Clone, Default)]
pub struct Bell(Arc<Notify>);

impl Bell {
    /// Something that can be called for.
    #[must_use]
    pub fn demand(&self) -> Demand {
        Demand { called: AtomicBool::new(false), bell: self.clone() }
    }

    /// Ends when something was called for since the last time.
    pub async fn rung(&self) {
        self.0.notified().await;
    }
}

/// One thing that can be called for.
pub struct Demand {
    called: AtomicBool,
    bell: Bell,
}

impl Demand {
    /// Somebody waits for it. Calling again changes nothing.
    pub fn call(&self) {
        if !self.called.swap(true, Ordering::Relaxed) {
            self.bell.0.notify_one();
        }
    }

    #[must_use]
    pub fn is_called(&self) -> bool {
        self.called.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Demand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Demand").field(&self.is_called()).finish()
    }
}
