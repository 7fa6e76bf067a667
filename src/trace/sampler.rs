//! Which traces are recorded.

/// Decides about traces that begin here, and perhaps about those of callers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Whether the caller's sampling decision is kept.
    pub respects_caller: bool,
    /// Part of the traces that begin here, from 0 to 1.
    pub ratio: f64,
    /// The same of those that `x-client-trace-id` asks for.
    pub requested_ratio: f64,
}

impl Sampler {
    /// Callers decide, and of what begins here this part is recorded.
    #[must_use]
    pub const fn of_roots(ratio: f64) -> Self {
        Self { respects_caller: true, ratio, requested_ratio: 1.0 }
    }

    /// Whether a trace that begins here is recorded. All who go by the same part decide alike by its id.
    #[must_use]
    pub(super) fn begins(&self, trace_id: u128, requested: bool) -> bool {
        let ratio = if requested { self.requested_ratio.max(self.ratio) } else { self.ratio };
        if ratio >= 1.0 {
            return true;
        }
        // As other implementations do: by 63 bits of the id's right half.
        #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
        let place = (trace_id as u64 >> 1) as f64;
        place < ratio * SCALE
    }

    /// Whether a decision is passed on: where all or no traces begin here, there was none to make.
    #[must_use]
    pub(super) fn draws(&self) -> bool {
        self.ratio > 0.0 && self.ratio < 1.0
    }
}

/// 2^63.
const SCALE: f64 = 9_223_372_036_854_775_808.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_all_ids_is_recorded() {
        let ids: Vec<u128> = (0..1000).map(|n| u128::from(n * (u64::MAX / 1000))).collect();
        let recorded = |sampler: Sampler, requested| ids.iter().filter(|id| sampler.begins(**id, requested)).count();
        assert_eq!(recorded(Sampler::of_roots(0.0), false), 0);
        assert_eq!(recorded(Sampler::of_roots(0.0), true), 1000);
        assert_eq!(recorded(Sampler::of_roots(1.0), false), 1000);
        assert!((249..=251).contains(&recorded(Sampler::of_roots(0.25), false)));
        assert_eq!(recorded(Sampler { requested_ratio: 0.0, ..Sampler::of_roots(0.0) }, true), 0);
        assert!(Sampler::of_roots(0.5).draws() && !Sampler::of_roots(0.0).draws() && !Sampler::of_roots(1.0).draws());
    }
}
