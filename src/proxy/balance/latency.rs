//! How long an instance takes to answer, of late.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An exponentially weighted moving average that follows a rise at once and a fall in time ("peak EWMA").
///
/// How long it holds without a sample depends on how many samples agree on it. A level that one sample alone speaks
/// for, be it an instance's first one (cold caches) or an outlier (a pause to collect garbage), is half forgotten in
/// 35 ms; one that eight in a row have confirmed, in 4.4 s. So an instance that was slow once is tried again at once,
/// and one that is slow indeed is tried ever more seldom.
///
/// Lock-free: one word holds the average, the number of samples that agree and the time of the last one.
#[derive(Debug, Default)]
pub(super) struct Latency(AtomicU64);

/// What the word says.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Level {
    /// In microseconds; above zero. Its last eight bits are not kept.
    average: f32,
    /// Samples in a row that were near the average, at most [`SURE`].
    agreeing: u8,
    /// The low half of the milliseconds.
    then: u32,
}

impl Latency {
    /// Takes a sample at `now`, in milliseconds. One sample raises the average fourfold at most: a single slow
    /// answer says little, three in a row say enough.
    pub(super) fn record(&self, sample: Duration, now: u64) {
        let sample = micros(sample);
        self.update(now, |level| Some(level.map_or((sample, 0), |level| level.with(sample, now))));
    }

    /// As [`Latency::record`], for an answer that was an error: a quick one is no merit, and the first one says
    /// nothing.
    pub(super) fn record_error(&self, sample: Duration, now: u64) {
        let sample = micros(sample);
        let with = |level: Level| if sample > level.average { level.with(sample, now) } else { level.unchanged() };
        self.update(now, |level| level.map(with));
    }

    /// Microseconds; `None` as long as there was no sample. Without samples it falls towards nothing, so that an
    /// instance that was slow once is tried again.
    pub(super) fn estimate(&self, now: u64) -> Option<f32> {
        let level = Level::unpack(self.0.load(Ordering::Relaxed))?;
        Some(level.average * level.kept(now) + FLOOR)
    }

    /// Microseconds since the last sample; `None` as long as there was none.
    pub(super) fn silence(&self, now: u64) -> Option<f32> {
        let level = Level::unpack(self.0.load(Ordering::Relaxed))?;
        Some(level.elapsed(now) as f32 * 1e3)
    }

    fn update(&self, now: u64, next: impl Fn(Option<Level>) -> Option<(f32, u8)>) {
        let update = |word| {
            next(Level::unpack(word)).map(|(average, agreeing)| Level { average, agreeing, then: now as u32 }.pack())
        };
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }
}

impl Level {
    /// The average and the number of samples that agree on it, with one more.
    fn with(self, sample: f32, now: u64) -> (f32, u8) {
        let agreeing = if sample > self.average * NEAR {
            0
        } else if sample < self.average / NEAR {
            self.agreeing / 2
        } else {
            (self.agreeing + 1).min(SURE)
        };
        let kept = self.kept(now);
        let average = if sample > self.average {
            sample.min(self.average * RISE)
        } else {
            self.average * kept + sample * (1.0 - kept)
        };
        (average, agreeing)
    }

    fn unchanged(self) -> (f32, u8) {
        (self.average, self.agreeing)
    }

    /// The part of the average that is left after the time since.
    fn kept(self, now: u64) -> f32 {
        let time_constant = FIRST_TIME_CONSTANT * f32::from(1_u16 << self.agreeing);
        decay(self.elapsed(now) as f32 / time_constant)
    }

    /// Milliseconds since the last sample. Another thread's clock reading may be older than that.
    fn elapsed(self, now: u64) -> u32 {
        let elapsed = (now as u32).wrapping_sub(self.then);
        if elapsed > u32::MAX / 2 { 0 } else { elapsed }
    }

    fn pack(self) -> u64 {
        u64::from(self.average.to_bits() & !0xff | u32::from(self.agreeing)) << 32 | u64::from(self.then)
    }

    fn unpack(word: u64) -> Option<Self> {
        let bits = (word >> 32) as u32;
        let average = f32::from_bits(bits & !0xff);
        (average > 0.0).then_some(Self { average, agreeing: (bits as u8).min(SURE), then: word as u32 })
    }
}

/// How long those have waited who wait for an answer.
///
/// Lock-free: one word holds how many they are, and above that the sum of the times at which they began, in milliseconds,
/// whose upper bits are not kept.
#[derive(Debug, Default)]
pub(super) struct Waiting(AtomicU64);

impl Waiting {
    pub(super) fn begin(&self, now: u64) {
        self.0.fetch_add((now << COUNT) + 1, Ordering::Relaxed);
    }

    /// For one that began at `since`.
    pub(super) fn end(&self, since: u64) {
        self.0.fetch_sub((since << COUNT) + 1, Ordering::Relaxed);
    }

    /// Microseconds, on average; `None` if nobody waits.
    pub(super) fn average(&self, now: u64) -> Option<f32> {
        let word = self.0.load(Ordering::Relaxed);
        let count = word & ((1 << COUNT) - 1);
        let sum = (now.wrapping_mul(count) << COUNT).wrapping_sub(word - count) >> COUNT;
        // Another thread's clock reading may be newer.
        let sum = if sum > u64::MAX >> (COUNT + 1) { 0 } else { sum };
        (count > 0).then(|| sum as f32 / count as f32 * 1e3)
    }
}

/// Bits of the number of those who wait: more than there can be connections.
const COUNT: u32 = 24;

/// e^-x, for x of zero or more, as the limit that it is: at most a tenth too high as long as it is above a thousandth.
/// `f32::exp` would be the program's only use of the C library's mathematics, which cost each process 0.3 MB.
fn decay(x: f32) -> f32 {
    (1.0 + x / 256.0).powi(-256)
}

fn micros(sample: Duration) -> f32 {
    (sample.as_secs_f32() * 1e6).max(1.0)
}

/// In milliseconds: after so long without a sample, 37 % of an average are left that one sample alone speaks for.
/// Twice as long for each that agrees.
const FIRST_TIME_CONSTANT: f32 = 50.0;
/// Agreeing samples after which an average is as sure as it gets, with a time constant of 6.4 s.
const SURE: u8 = 7;
/// Factor within which a sample agrees with the average.
const NEAR: f32 = 2.0;
const RISE: f32 = 4.0;
/// Added to every estimate, in microseconds: smaller differences are noise.
const FLOOR: f32 = 500.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_averaged_over_those_who_wait() {
        // From the start, and after years.
        for start in [0, 1 << 38, 1 << 45] {
            let waiting = Waiting::default();
            assert_eq!(waiting.average(start), None);
            (0..1000).for_each(|_| waiting.begin(start));
            assert_eq!(waiting.average(start), Some(0.0));
            assert_eq!(waiting.average(start + 100), Some(100_000.0));
            (0..1000).for_each(|_| waiting.begin(start + 100));
            assert_eq!(waiting.average(start + 300), Some(250_000.0));
            (0..1000).for_each(|_| waiting.end(start));
            assert_eq!(waiting.average(start + 300), Some(200_000.0));
            // A clock reading that is a little older.
            assert_eq!(waiting.average(start + 99), Some(0.0));
            (0..1000).for_each(|_| waiting.end(start + 100));
            assert_eq!(waiting.average(start + 300), None);
        }
    }

    fn millis(latency: &Latency, now: u64) -> f32 {
        (latency.estimate(now).unwrap() - FLOOR) / 1000.0
    }

    fn sure(average: Duration, now: u64) -> Latency {
        let latency = Latency::default();
        (0..10).for_each(|_| latency.record(average, now));
        latency
    }

    #[test]
    fn decays_exponentially() {
        assert_eq!((decay(0.0), decay(1e9)), (1.0, 0.0));
        for x in [0.001_f32, 0.1, 1.0, 3.0, 6.9] {
            let ratio = decay(x) / (-x).exp();
            assert!((0.999..1.1).contains(&ratio), "{x}: {ratio}");
        }
    }

    #[test]
    fn rises_at_once_and_falls_in_time() {
        let latency = sure(Duration::from_millis(10), 0);
        assert_eq!(Latency::default().estimate(0), None);
        assert!((millis(&latency, 0) - 10.0).abs() < 0.01);
        latency.record(Duration::from_millis(15), 1);
        assert!((millis(&latency, 1) - 15.0).abs() < 0.01);
        latency.record(Duration::from_millis(10), 6_401);
        assert!((11.0..13.0).contains(&millis(&latency, 6_401)), "{}", millis(&latency, 6_401));
        assert!(millis(&latency, 60_000) < 0.1);
    }

    #[test]
    fn what_one_sample_alone_says_is_soon_forgotten() {
        let cold = Latency::default();
        cold.record(Duration::from_secs(1), 0);
        let paused = sure(Duration::from_millis(10), 0);
        paused.record(Duration::from_secs(1), 0);
        assert!(millis(&cold, 0) > 999.0 && millis(&paused, 0) > 39.0);
        assert!(millis(&cold, 400) < 1.0 && millis(&paused, 400) < 1.0);
        // The next one is believed instead.
        cold.record(Duration::from_millis(10), 400);
        assert!(millis(&cold, 400) < 12.0);
    }

    #[test]
    fn the_more_samples_agree_the_longer_they_hold() {
        let latency = Latency::default();
        let mut now = 0;
        let mut half_lives = Vec::new();
        for _ in 0..9 {
            latency.record(Duration::from_secs(1), now);
            let half = (1..).find(|later| millis(&latency, now + later) < 500.0).unwrap();
            half_lives.push(half);
            now += half;
        }
        assert_eq!(half_lives, [35, 70, 139, 278, 556, 1111, 2222, 4443, 4443]);
        // It is quick again: each such sample makes the next one come sooner.
        latency.record(Duration::from_millis(10), now);
        assert!((1..1200).any(|later| millis(&latency, now + later) < 250.0));
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
        assert!(millis(&latency, 99) > 9.9);
    }
}
