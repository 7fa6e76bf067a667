//! How long an instance takes to answer, of late.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An exponentially weighted moving average that follows a rise at once and a fall in time ("peak EWMA").
/// Lock-free: one word holds the average (microseconds, as the bits of an `f32`) and the time of the last
/// sample (the low half of the milliseconds).
#[derive(Debug, Default)]
pub struct Latency(AtomicU64);

impl Latency {
    /// Takes a sample at `now`, in milliseconds. One sample raises the average fourfold at most: a single slow
    /// answer says little, three in a row say enough.
    pub fn record(&self, sample: Duration, now: u64) {
        let sample = micros(sample);
        let next = |average: f32, kept: f32| {
            if sample > average { sample.min(average * RISE) } else { average * kept + sample * (1.0 - kept) }
        };
        self.update(now, |last| Some(last.map_or(sample, |(average, then)| next(average, kept(then, now)))));
    }

    /// As [`Latency::record`], for an answer that was an error: a quick one is no merit, and the first one says
    /// nothing.
    pub fn record_error(&self, sample: Duration, now: u64) {
        let sample = micros(sample);
        self.update(now, |last| last.map(|(average, _)| average.max(sample.min(average * RISE))));
    }

    /// Microseconds; `None` as long as there was no sample. Without samples it falls towards nothing, so that an
    /// instance that was slow once is tried again.
    pub fn estimate(&self, now: u64) -> Option<f32> {
        let (average, then) = unpack(self.0.load(Ordering::Relaxed))?;
        Some(average * kept(then, now) + FLOOR)
    }

    fn update(&self, now: u64, next: impl Fn(Option<(f32, u32)>) -> Option<f32>) {
        let update = |word| next(unpack(word)).map(|average| pack(average, now));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }
}

fn micros(sample: Duration) -> f32 {
    (sample.as_secs_f32() * 1e6).max(1.0)
}

/// The part of an average that is left after the time since.
fn kept(then: u32, now: u64) -> f32 {
    let elapsed = (now as u32).wrapping_sub(then);
    // Another thread's clock reading may be older than the last sample's.
    if elapsed > u32::MAX / 2 { 1.0 } else { (-(elapsed as f32) / TIME_CONSTANT).exp() }
}

fn pack(average: f32, now: u64) -> u64 {
    u64::from(average.to_bits()) << 32 | u64::from(now as u32)
}

fn unpack(word: u64) -> Option<(f32, u32)> {
    let average = f32::from_bits((word >> 32) as u32);
    (average > 0.0).then_some((average, word as u32))
}

/// In milliseconds: after so long without a sample, 37 % of the average are left.
const TIME_CONSTANT: f32 = 10_000.0;
const RISE: f32 = 4.0;
/// In microseconds, added to every estimate: differences below are noise.
const FLOOR: f32 = 500.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(latency: &Latency, now: u64) -> f32 {
        (latency.estimate(now).unwrap() - FLOOR) / 1000.0
    }

    #[test]
    fn rises_at_once_and_falls_in_time() {
        let latency = Latency::default();
        assert_eq!(latency.estimate(0), None);
        latency.record(Duration::from_millis(10), 0);
        assert!((millis(&latency, 0) - 10.0).abs() < 0.01);
        latency.record(Duration::from_millis(30), 1);
        assert!((millis(&latency, 1) - 30.0).abs() < 0.01);
        latency.record(Duration::from_millis(10), 10_001);
        assert!((15.0..20.0).contains(&millis(&latency, 10_001)), "{}", millis(&latency, 10_001));
        assert!(millis(&latency, 60_000) < 1.0);
    }

    #[test]
    fn one_outlier_raises_it_by_a_bounded_factor() {
        let latency = Latency::default();
        latency.record(Duration::from_millis(1), 0);
        latency.record(Duration::from_secs(10), 0);
        assert!((millis(&latency, 0) - 4.0).abs() < 0.01);
    }

    #[test]
    fn a_quick_error_is_no_merit_and_a_slow_one_counts() {
        let latency = Latency::default();
        latency.record(Duration::from_millis(10), 0);
        latency.record_error(Duration::from_micros(50), 5_000);
        assert!(millis(&latency, 5_000) > 9.9);
        latency.record_error(Duration::from_millis(20), 5_000);
        assert!(millis(&latency, 5_000) > 19.9);
        let fresh = Latency::default();
        fresh.record_error(Duration::from_millis(20), 0);
        assert_eq!(fresh.estimate(0), None);
    }

    #[test]
    fn a_reading_of_the_clock_that_is_a_little_older_changes_nothing() {
        let latency = Latency::default();
        latency.record(Duration::from_millis(10), 100);
        assert!((millis(&latency, 99) - 10.0).abs() < 0.01);
        latency.record(Duration::from_millis(1), 99);
        assert!(millis(&latency, 100) > 9.9);
    }
}
