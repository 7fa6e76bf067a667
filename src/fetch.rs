//! Lets a connection that waits for an unknown upstream ask control to fetch it first.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// The end that fetches: notified by each of its requests.
#[derive(Debug, Clone, Default)]
pub struct FetchRequests(Arc<Notify>);

impl FetchRequests {
    /// A request that nobody has made yet.
    #[must_use]
    pub fn request(&self) -> FetchRequest {
        FetchRequest { requested: AtomicBool::new(false), fetcher: self.clone() }
    }

    /// Ends when a request was made since the last time.
    pub async fn notified(&self) {
        self.0.notified().await;
    }
}

/// One thing that can be requested.
pub struct FetchRequest {
    requested: AtomicBool,
    fetcher: FetchRequests,
}

impl FetchRequest {
    /// Has it fetched before all else. Only the first call has an effect.
    pub fn request(&self) {
        if !self.requested.swap(true, Ordering::Relaxed) {
            self.fetcher.0.notify_one();
        }
    }

    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for FetchRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FetchRequest").field(&self.is_requested()).finish()
    }
}
