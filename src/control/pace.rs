//! When the next snapshot is published.

use std::time::Duration;

use tokio::time::Instant;

use super::draft::Urgency;

/// Time without a change after which a burst of changes is published.
const QUIET: Duration = Duration::from_millis(5);
/// Longest time that a change waits, and shortest time between two snapshots in a stream of changes.
const BURST: Duration = Duration::from_millis(50);

/// When to publish: at once when it is quiet or urgent, else when a burst ends or has gone on for too long.
#[derive(Debug, Default)]
pub(super) struct Pace {
    published: Option<Instant>,
    /// Since when there is something to publish.
    since: Option<Instant>,
    /// When the next snapshot is due, if anything has changed.
    pub(super) due: Option<Instant>,
}

impl Pace {
    pub(super) fn changed(&mut self, urgency: Urgency, now: Instant) {
        let quiet = self.since.is_none() && self.published.is_none_or(|at| now.duration_since(at) >= BURST);
        let since = *self.since.get_or_insert(now);
        let due = if urgency == Urgency::Now || quiet { now } else { (now + QUIET).min(since + BURST) };
        self.due = Some(due);
    }

    pub(super) fn published(&mut self, now: Instant) {
        *self = Self { published: Some(now), since: None, due: None };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_change_is_published_at_once_and_a_stream_in_bursts() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut pace = Pace::default();
        pace.changed(Urgency::Soon, at(0));
        assert_eq!(pace.due, Some(at(0)));
        pace.published(at(0));
        assert_eq!(pace.due, None);

        // Each change of a stream puts it off, but not for ever.
        for now in (2..=48).step_by(2) {
            pace.changed(Urgency::Soon, at(now));
            assert_eq!(pace.due, Some(at((now + 5).min(52))), "{now}");
        }
        pace.changed(Urgency::Now, at(49));
        assert_eq!(pace.due, Some(at(49)));
        pace.published(at(49));

        pace.changed(Urgency::Soon, at(99));
        assert_eq!(pace.due, Some(at(99)));
    }
}
