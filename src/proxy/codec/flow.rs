//! Flow control of HTTP/2: how much the far end may send before somebody has read it (RFC 9113, 5.2).
//!
//! What a stream holds is never taken from what the streams of its connection share: the window of a connection is the
//! largest that there is, and the window of each stream is the limit. Streams begin with [`USUAL`]. The window grows
//! where a stream reads much of it in one round trip, which a PING measures: such a stream waits for the path. It
//! shrinks where a connection has many streams, so that a connection's streams together hold no more than a few times
//! [`TOGETHER`] when nobody reads. A window above that is lent by the thread, for as long as the connection has
//! streams: [`LENDING_LIMIT`] bytes at most.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

/// The window of a connection, in bytes: the largest (RFC 9113, 6.9.1).
pub(super) const CONNECTION: u32 = (1 << 31) - 1;

/// Initial window of a stream, in bytes.
pub(super) const USUAL: u32 = 512 * 1024;
/// Smallest window of a stream, in bytes.
const LEAST: u32 = 32 * 1024;
/// Largest window of a stream, in bytes: 400 MB/s over 50 ms.
const MOST: u32 = 32 * 1024 * 1024;
/// Sum of the windows of a connection's streams, in bytes, that needs no loan.
const TOGETHER: usize = 4 * 1024 * 1024;
/// Sum of the loans of a thread's connections, in bytes.
const LENDING_LIMIT: usize = 64 * 1024 * 1024;
/// Factor by which a window grows.
const GROWTH: u32 = 8;
/// Bytes of a stream from which its rate is measured.
const BULK: usize = 64 * 1024;
/// Measurements in a row without growth after which they become no rarer.
const STEADY: u32 = 8;

/// State shared by a connection and its streams.
#[derive(Debug)]
pub(crate) struct Meter {
    /// Streams.
    open: AtomicUsize,
    /// Streams at a time.
    limit: AtomicUsize,
    /// Notified when there is room again where there was none.
    freed: Arc<Notify>,
    /// Counts measurements.
    round: AtomicUsize,
    /// The most that one stream has read in this round.
    most_read: AtomicUsize,
    loan: AtomicUsize,
    lender: Lender,
}

#[derive(Debug)]
struct Lender(Arc<AtomicUsize>);

impl Default for Lender {
    fn default() -> Self {
        thread_local! {
            static OUT: OnceCell<Arc<AtomicUsize>> = const { OnceCell::new() };
        }
        Self(OUT.with(|out| Arc::clone(out.get_or_init(Arc::default))))
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self::limited(usize::MAX, Arc::default())
    }
}

impl Meter {
    /// For so many streams at a time. `freed` is notified when there is room again where there was none.
    #[must_use]
    pub(crate) fn limited(limit: usize, freed: Arc<Notify>) -> Self {
        Self {
            open: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
            freed,
            round: AtomicUsize::new(0),
            most_read: AtomicUsize::new(0),
            loan: AtomicUsize::new(0),
            lender: Lender::default(),
        }
    }

    pub(crate) fn limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    #[must_use]
    pub(crate) fn has_room(&self) -> bool {
        self.open() < self.limit.load(Ordering::Relaxed)
    }

    #[must_use]
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Borrows so much more; false if there is not so much.
    fn borrow(&self, more: usize) -> bool {
        let pooled = |out: usize| out.checked_add(more).filter(|out| *out <= LENDING_LIMIT);
        let pooled = self.lender.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pooled).is_ok();
        if pooled {
            self.loan.fetch_add(more, Ordering::Relaxed);
        }
        pooled
    }

    fn give_back(&self) {
        let loan = self.loan.swap(0, Ordering::Relaxed);
        self.lender.0.fetch_sub(loan, Ordering::Relaxed);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// A stream, counted until dropped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<Meter>);

impl Counted {
    #[must_use]
    pub(crate) fn new(meter: &Arc<Meter>) -> Self {
        meter.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(meter))
    }

    #[must_use]
    pub(crate) fn reader(&self) -> Reader {
        Reader { meter: Arc::clone(&self.0), round: 0, read: 0, all: 0 }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let open = self.0.open.fetch_sub(1, Ordering::Relaxed);
        if open == self.0.limit.load(Ordering::Relaxed) {
            self.0.freed.notify_waiters();
        }
        if open == 1 && self.0.loan.load(Ordering::Relaxed) > 0 {
            self.0.give_back();
        }
    }
}

/// Counts what is read of one stream.
#[derive(Debug)]
pub(crate) struct Reader {
    meter: Arc<Meter>,
    round: usize,
    /// In this round.
    read: usize,
    all: usize,
}

impl Reader {
    pub(crate) fn read(&mut self, bytes: usize) {
        self.all = self.all.saturating_add(bytes);
        if self.all < BULK {
            return;
        }
        let round = self.meter.round.load(Ordering::Relaxed);
        if self.round != round {
            (self.round, self.read) = (round, 0);
        }
        self.read = self.read.saturating_add(bytes);
        self.meter.most_read.fetch_max(self.read, Ordering::Relaxed);
    }
}

/// The window of a connection's streams.
#[derive(Debug)]
pub(super) struct Windows {
    meter: Arc<Meter>,
    window: u32,
    /// The window announced to the peer.
    announced: u32,
    /// The most streams at a time so far.
    streams: usize,
    /// Whether a measurement is under way; `None` where none is made.
    measures: Option<bool>,
    /// Measurements in a row without growth.
    steady: u32,
}

impl Windows {
    /// `adapt`: the path is measured, by PINGs. Where it is not, the window only shrinks.
    #[must_use]
    pub(super) fn new(meter: Arc<Meter>, adapt: bool) -> Self {
        Self { meter, window: USUAL, announced: USUAL, streams: 0, measures: adapt.then_some(false), steady: 0 }
    }

    /// The window, if it is to be another than was announced to the far end.
    #[must_use]
    pub(super) fn unannounced(&self) -> Option<u32> {
        (self.window != self.announced).then_some(self.window)
    }

    pub(super) fn announced(&mut self, window: u32) {
        self.announced = window;
    }

    /// To be called when something came: keeps the window within its limit, and says whether a PING is wanted that
    /// measures.
    pub(super) fn look(&mut self) -> bool {
        let streams = self.meter.open();
        if streams > self.streams || self.window as usize > TOGETHER {
            self.streams = self.streams.max(streams);
            self.window = self.window.min(within(TOGETHER + self.meter.loan.load(Ordering::Relaxed), streams));
        }
        let Some(measures @ false) = &mut self.measures else { return false };
        let worth = (self.window as usize / 2) << self.steady;
        if self.window >= MOST || self.meter.most_read.load(Ordering::Relaxed) < worth.max(BULK) {
            return false;
        }
        *measures = true;
        self.begin_round();
        true
    }

    /// The PING that measures was answered. `share`: how much of its time the path takes; for the rest, it waited behind
    /// what is in buffers. What is read in that time needs no larger window: it would only fill the buffers.
    pub(super) fn measured(&mut self, share: f64) {
        let Some(measures @ true) = &mut self.measures else { return };
        *measures = false;
        let read = (self.meter.most_read.load(Ordering::Relaxed) as f64 * share) as usize;
        self.begin_round();
        // The far end learns of half a window at a time, and answers a PING before it sends what it just learned of.
        let grown = if read >= self.window as usize / 3 { self.grown() } else { self.window };
        if grown > self.window {
            (self.window, self.steady) = (grown, 0);
        } else {
            self.steady = (self.steady + 1).min(STEADY);
        }
    }

    fn begin_round(&self) {
        self.meter.most_read.store(0, Ordering::Relaxed);
        self.meter.round.fetch_add(1, Ordering::Relaxed);
    }

    /// The largest that it may grow to now, with a loan if need be.
    fn grown(&mut self) -> u32 {
        let streams = self.meter.open().max(1);
        self.streams = streams;
        let mut wanted = self.window.saturating_mul(GROWTH).min(MOST);
        while wanted > self.window {
            let more = (wanted as usize * streams).saturating_sub(TOGETHER + self.meter.loan.load(Ordering::Relaxed));
            if more == 0 || self.meter.borrow(more) {
                break;
            }
            wanted /= 2;
        }
        wanted
    }
}

/// The largest window with which so many streams stay within a limit together.
fn within(limit: usize, streams: usize) -> u32 {
    let each = u32::try_from(limit / streams.max(1)).unwrap_or(u32::MAX).clamp(LEAST, MOST);
    1 << each.ilog2()
}

/// Sends PINGs one at a time, for all measurements of a connection.
pub(super) struct Pings {
    ping_pong: Option<h2::PingPong>,
    /// When the one was sent that is on its way.
    sent: Option<Instant>,
    /// The shortest round trip so far: what the path takes by itself.
    shortest: Duration,
}

impl Pings {
    #[must_use]
    pub(super) fn new(ping_pong: Option<h2::PingPong>) -> Self {
        Self { ping_pong, sent: None, shortest: Duration::MAX }
    }

    /// Sends one, if none is on its way.
    pub(super) fn send(&mut self) {
        if self.sent.is_none()
            && let Some(ping_pong) = &mut self.ping_pong
        {
            self.sent = ping_pong.send_ping(h2::Ping::opaque()).is_ok().then(Instant::now);
        }
    }

    /// If one was answered just now: the shortest round trip so far, as a part of this one (0 to 1).
    pub(super) fn answered(&mut self, cx: &mut Context<'_>) -> Option<f64> {
        let (sent, ping_pong) = (self.sent?, self.ping_pong.as_mut()?);
        let Poll::Ready(Ok(_)) = ping_pong.poll_pong(cx) else { return None };
        self.sent = None;
        let took = sent.elapsed().max(Duration::from_micros(1));
        self.shortest = self.shortest.min(took);
        Some(self.shortest.as_secs_f64() / took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> (Arc<Meter>, Windows) {
        let meter = Arc::new(Meter::default());
        (Arc::clone(&meter), Windows::new(meter, true))
    }

    /// One stream reads `bytes` in each of `rounds` round trips.
    fn reads(windows: &mut Windows, reader: &mut Reader, bytes: usize, rounds: usize) {
        for _ in 0..rounds {
            reader.read(bytes);
            if windows.look() {
                reader.read(bytes);
                windows.measured(1.0);
            }
        }
    }

    #[test]
    fn a_window_grows_where_the_path_is_the_limit() {
        let (meter, mut windows) = windows();
        let stream = Counted::new(&meter);
        let mut reader = stream.reader();
        reads(&mut windows, &mut reader, 100 * 1024, 50);
        assert_eq!(windows.unannounced(), None, "a slow reader needs no more");
        for grown in [GROWTH * USUAL, MOST] {
            let window = windows.window as usize;
            reads(&mut windows, &mut reader, window, 1 << STEADY);
            assert_eq!(windows.unannounced(), Some(grown));
        }
        assert_eq!(meter.loan.load(Ordering::Relaxed), MOST as usize - TOGETHER);
        drop(stream);
        assert_eq!(meter.lender.0.load(Ordering::Relaxed), 0, "a loan ends with the last stream");
        windows.look();
        assert_eq!(windows.window as usize, TOGETHER);
    }

    #[test]
    fn a_window_does_not_grow_where_buffers_are_full() {
        let (meter, mut windows) = windows();
        let stream = Counted::new(&meter);
        let mut reader = stream.reader();
        for _ in 0..1 << STEADY {
            reader.read(USUAL as usize);
            if windows.look() {
                reader.read(USUAL as usize);
                windows.measured(0.1);
            }
        }
        assert_eq!(windows.unannounced(), None);
    }

    #[test]
    fn many_streams_hold_little_each() {
        let (meter, mut windows) = windows();
        let mut streams = Vec::new();
        let mut held = 0;
        for _ in 0..256 {
            streams.push(Counted::new(&meter));
            windows.look();
            held += windows.window as usize;
        }
        assert_eq!(windows.window, LEAST);
        // Those that came first may have filled a window that was larger then.
        assert!(held <= 5 * TOGETHER, "{held}");
    }

    #[test]
    fn a_thread_lends_so_much_and_no_more() {
        let lender = Lender::default();
        let mut connections = Vec::new();
        for _ in 0..8 {
            let meter = Arc::new(Meter::default());
            let mut windows = Windows::new(Arc::clone(&meter), true);
            let stream = Counted::new(&meter);
            let mut reader = stream.reader();
            for _ in 0..4 {
                let window = windows.window as usize;
                reads(&mut windows, &mut reader, window, 1 << STEADY);
            }
            assert!(lender.0.load(Ordering::Relaxed) <= LENDING_LIMIT);
            connections.push((stream, windows.window));
        }
        assert_eq!(connections[0].1, MOST);
        assert_eq!(connections[7].1 as usize, TOGETHER);
    }
}
