//! Counters, gauges and histograms that the data path adds to without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts up. It wraps after 2^64.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn increment(&self) {
        self.add(1);
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Goes up and down, and never below zero as long as each decrement follows its increment.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn decrement(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of every histogram's buckets but the last, in microseconds. In milliseconds they are those that Envoy
/// 1.40 has: dashboards compare both.
pub const BOUNDS: [u64; 19] = [
    500,
    1_000,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    600_000_000,
    1_800_000_000,
    3_600_000_000,
];

/// Times, in microseconds. The sum is exact, as Envoy's is not.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(micros, Ordering::Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> Times {
        Times {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed)),
            sum: self.sum.load(Ordering::Relaxed),
        }
    }
}

/// Of a value in microseconds.
pub(super) fn bucket(micros: u64) -> usize {
    BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS.len())
}

/// A histogram's counts at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    /// How many fell into each bucket, not cumulative. The last is everything above the last of [`BOUNDS`].
    pub buckets: [u64; BOUNDS.len() + 1],
    /// Microseconds.
    pub sum: u64,
}

impl Times {
    /// Of its buckets, in the order of [`Times::buckets`]; `None` if they are not as many. The sum is not known.
    #[must_use]
    pub fn of(buckets: &[u64]) -> Option<Self> {
        Some(Self { buckets: buckets.try_into().ok()?, sum: 0 })
    }

    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The bounds in microseconds (`None`: infinity), each with how many were not above it.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let bounds = BOUNDS.iter().copied().map(Some).chain([None]);
        bounds.zip(self.buckets).scan(0, |below, (bound, count)| {
            *below += count;
            Some((bound, *below))
        })
    }

    /// A quantile in microseconds, between 0 and 1, linear within its bucket; `None` without any value.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((q * count as f64).ceil() as u64).clamp(1, count);
        let mut below = 0;
        for (bucket, n) in self.buckets.iter().enumerate() {
            if below + n >= rank {
                let low = bucket.checked_sub(1).map_or(0, |before| BOUNDS[before]) as f64;
                let high = BOUNDS.get(bucket).map_or(low, |bound| *bound as f64);
                return Some(low + (high - low) * (rank - below) as f64 / *n as f64);
            }
            below += n;
        }
        None
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].wrapping_sub(earlier.buckets[bucket])),
            sum: self.sum.wrapping_sub(earlier.sum),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_into_the_first_bucket_that_is_not_below_it() {
        let histogram = Histogram::default();
        for micros in [0, 500, 501, 1_000, 3_600_000_000, 3_600_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let times = histogram.get();
        assert_eq!((times.buckets[0], times.buckets[1], times.buckets[18], times.buckets[19]), (2, 2, 1, 1));
        assert_eq!(times.sum, 7_200_002_002);
        assert_eq!(times.count(), 6);
        assert_eq!(times.cumulative().last(), Some((None, 6)));
        assert_eq!(times.cumulative().nth(1), Some((Some(1_000), 4)));
    }

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        assert_eq!(Times::default().quantile(0.5), None);
        let histogram = Histogram::default();
        (0..100).for_each(|n| histogram.observe(Duration::from_millis(if n < 90 { 2 } else { 40 })));
        let times = histogram.get();
        let millis = |q| times.quantile(q).map(|micros| micros / 1000.0).unwrap();
        assert!((1.0..=5.0).contains(&millis(0.5)) && (25.0..=50.0).contains(&millis(0.99)));
        assert!((millis(1.0) - 50.0).abs() < 1e-9);
        assert_eq!(times.since(&times), Times::default());
    }
}
