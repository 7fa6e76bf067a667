//! Log lines that any client of a port can cause: the first of each source and reason at once, then a count.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Limits such lines, however many connections and requests fail. Clones share what they count.
#[derive(Debug, Clone, Default)]
pub(super) struct LogLimit(Arc<Mutex<Lines>>);

/// Those of both directions: what strangers and peers cause, and what the local app does. Neither takes the other's room.
#[derive(Debug, Clone, Default)]
pub(super) struct LogLimits {
    pub inbound: LogLimit,
    pub audited: Audited,
    pub upstream: LogLimit,
}

/// Lines about what intentions deny and audit mode lets through.
#[derive(Debug, Clone, Default)]
pub(super) struct Audited(LogLimit);

/// A line of one kind about one thing: written at once, and then every few seconds at most.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Option<(Instant, u64)>>);

#[derive(Debug, Default)]
struct Lines {
    /// Source and reason of the lines that were written lately, with how often each came again.
    again: BTreeMap<(String, String), u64>,
    /// Those for which there was no room.
    others: u64,
    last_written: Option<Instant>,
}

/// Interval between two log lines with counts.
const PERIOD: Duration = Duration::from_secs(5);
/// Pairs of source and reason that are counted one by one in a period.
const KEPT: usize = 64;
/// Bytes of a source or reason that are kept: a reason may quote bytes of a peer.
const TEXT: usize = 256;

impl LogLimits {
    /// Writes the counts when their time has come. To be called about once a second.
    pub(super) fn write_counts(&self) {
        let now = Instant::now();
        for ((source, reason), count) in self.inbound.due(now) {
            tracing::info!(target: "proxy.inbound", source, reason, count, "Refused again, in the last {PERIOD:?}");
        }
        for ((source, reason), count) in self.audited.0.due(now) {
            tracing::warn!(target: "proxy.inbound", source, reason, count, "Audit mode: would deny again, in the last {PERIOD:?}");
        }
        for ((source, reason), count) in self.upstream.due(now) {
            tracing::warn!(target: "proxy.upstream", source, reason, count, "Failed again, in the last {PERIOD:?}");
        }
    }
}

impl Seldom {
    /// How many lines were kept back since the last one, if this one is to be written.
    pub(super) fn due(&self) -> Option<u64> {
        let (mut last, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        match &mut *last {
            Some((written, again)) if now < *written + PERIOD => {
                *again += 1;
                None
            }
            last => last.replace((now, 0)).map_or(Some(0), |(_, again)| Some(again)),
        }
    }
}

impl Audited {
    /// `what` is what was let through.
    pub(super) fn log(&self, source: impl fmt::Display, destination: &str, what: &str, reason: &str) {
        if self.0.is_first(&source, reason) {
            tracing::warn!(target: "proxy.inbound", %source, destination, reason, "Audit mode: would deny this {what}, and lets it through");
        }
    }
}

impl LogLimit {
    /// Whether the caller is to write its line. Otherwise it is counted, and [`LogLimits::write_counts`] writes the count.
    #[must_use]
    pub(super) fn is_first(&self, source: impl fmt::Display, reason: &str) -> bool {
        let mut lines = self.lines();
        let key = (cut(&source.to_string()), cut(reason));
        if let Some(again) = lines.again.get_mut(&key) {
            *again += 1;
            return false;
        }
        if lines.again.len() >= KEPT {
            lines.others += 1;
            return false;
        }
        lines.again.insert(key, 0);
        true
    }

    /// The counts that are to be logged now. What has not come again since the last time is forgotten.
    fn due(&self, now: Instant) -> Vec<((String, String), u64)> {
        let mut lines = self.lines();
        if lines.last_written.is_some_and(|written| now < written + PERIOD) {
            return Vec::new();
        }
        lines.last_written = Some(now);
        lines.again.retain(|_, again| *again > 0);
        let mut due: Vec<_> = lines.again.iter_mut().map(|(key, again)| (key.clone(), std::mem::take(again))).collect();
        let others = std::mem::take(&mut lines.others);
        if others > 0 {
            due.push((("others".to_owned(), format!("more than {KEPT} sources and reasons")), others));
        }
        due
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_as_a_count() {
        let (limit, start) = (LogLimit::default(), Instant::now());
        assert!(limit.due(start).is_empty());
        assert!(limit.is_first("10.0.0.1", "no certificate"));
        assert!(limit.is_first("10.0.0.1", "denied"));
        assert!(limit.is_first("10.0.0.2", "denied"));
        for _ in 0..999 {
            assert!(!limit.is_first("10.0.0.1", "denied"));
        }
        assert!(limit.due(start + PERIOD / 2).is_empty());
        assert_eq!(limit.due(start + PERIOD), [(("10.0.0.1".to_owned(), "denied".to_owned()), 999)]);
        assert!(!limit.is_first("10.0.0.1", "denied"));
        assert!(limit.is_first("10.0.0.2", "denied"));
        assert_eq!(limit.due(start + PERIOD * 2).len(), 1);
        assert!(limit.due(start + PERIOD * 3).is_empty());
        assert!(limit.is_first("10.0.0.1", "denied"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_comes_again_and_again_is_written_now_and_then() {
        let line = Seldom::default();
        assert_eq!(line.due(), Some(0));
        assert_eq!([line.due(), line.due()], [None, None]);
        tokio::time::advance(PERIOD).await;
        assert_eq!([line.due(), line.due()], [Some(2), None]);
    }

    #[test]
    fn many_sources_do_not_bring_many_lines() {
        let (limit, start) = (LogLimit::default(), Instant::now());
        assert!(limit.due(start).is_empty());
        let lines = (0..10_000).filter(|source| limit.is_first(source, &"é".repeat(1000))).count();
        assert_eq!(lines, KEPT);
        let due = limit.due(start + PERIOD);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0].1, 10_000 - KEPT as u64);
    }
}
