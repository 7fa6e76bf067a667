//! Says that audit mode is on: at the start, whenever it is turned on, and again and again while it is.

use std::time::Duration;

use tokio::time::Instant;

use crate::snapshot::Snapshot;

/// Time between two warnings.
const PERIOD: Duration = Duration::from_secs(5 * 60);

/// When the last warning was given; `None` while the mode is off.
#[derive(Debug, Default)]
pub(super) struct AuditWarning(Option<Instant>);

impl AuditWarning {
    /// To be called with each snapshot that is published, and now and then.
    pub(super) fn look(&mut self, snapshot: Option<&Snapshot>, now: Instant) {
        let inbound = snapshot.into_iter().flat_map(|snapshot| snapshot.inbound.values());
        let audited: Vec<&str> =
            inbound.filter(|listener| listener.service.audit).map(|listener| listener.service.name.as_str()).collect();
        self.warn_of(&audited, now);
    }

    fn warn_of(&mut self, audited: &[&str], now: Instant) {
        if audited.is_empty() {
            if self.0.take().is_some() {
                tracing::warn!("Audit mode is off: intentions are enforced");
            }
        } else if self.0.is_none_or(|warned| now >= warned + PERIOD) {
            self.0 = Some(now);
            tracing::warn!(
                services = audited.join(", "),
                "AUDIT MODE IS ON: what intentions deny is let through and logged as \"would deny\"; \
                 `lictor intentions suggest` writes the intentions that are missing, and taking lictor_intentions_audit out \
                 of the registration enforces them"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_at_once_and_then_every_few_minutes() {
        let (on, off, start) = (&["db"][..], &[][..], Instant::now());
        let mut warning = AuditWarning::default();
        let mut warned = |audited: &[&str], after| {
            warning.warn_of(audited, start + after);
            warning.0.map(|at| at - start)
        };
        let (zero, later) = (Duration::ZERO, PERIOD / 2);
        assert_eq!(warned(off, zero), None);
        assert_eq!(warned(on, zero), Some(zero));
        assert_eq!(warned(on, later), Some(zero), "not again so soon");
        assert_eq!(warned(on, PERIOD), Some(PERIOD));
        assert_eq!(warned(off, PERIOD), None);
        assert_eq!(warned(on, PERIOD + later), Some(PERIOD + later), "at once when it is turned on again");
    }
}
