//! Writing lines, on a thread of its own: a disk or a terminal that is slow costs lines, never a request's time.
//!
//! `tracing-appender` has such a thread too, but neither opens a file again that was moved away nor says how many lines it dropped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use super::secrets::Secrets;
use super::settings::{Settings, Sink};
use crate::operators::Record;

/// Lines that wait to be written; further ones are dropped.
const QUEUE: usize = 4096;
/// Interval between two checks whether the path names another file, and between two attempts to open a file.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Interval between two checks, at the end, whether all lines are written.
const POLL: Duration = Duration::from_millis(5);
/// Shortest interval between two log lines about dropped lines.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// The data plane's access log. Clones write to the same sink, which may be replaced at any time.
#[derive(Debug, Clone, Default)]
pub struct AccessLog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// `None` where nothing is logged.
    active: ArcSwapOption<Active>,
    /// Writers that may still have lines.
    writers: Mutex<Vec<JoinHandle<()>>>,
}

/// A log that is written.
#[derive(Debug)]
pub struct Active {
    settings: Arc<Settings>,
    queue: SyncSender<String>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Logs as `settings` say from now on; `None` is not at all. What was logged before is still written.
    pub fn set(&self, settings: Option<&Arc<Settings>>) {
        let current = self.0.active.load_full();
        let next = settings.and_then(|settings| match &current {
            Some(active) if Arc::ptr_eq(&active.settings, settings) => Some(Arc::clone(active)),
            // Two writers of one file would both write its end.
            Some(active) if active.settings.sink == settings.sink => Some(Arc::new(active.with(settings))),
            _ => self.start(settings).map(Arc::new),
        });
        self.0.active.store(next);
    }

    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.active.load().is_some()
    }

    /// Logs no more, and waits until what was logged is written, for `limit` at most.
    pub async fn close(&self, limit: Duration) {
        self.set(None);
        let end = tokio::time::Instant::now() + limit;
        while self.writers().iter().any(|writer| !writer.is_finished()) && tokio::time::Instant::now() < end {
            tokio::time::sleep(POLL).await;
        }
    }

    fn start(&self, settings: &Arc<Settings>) -> Option<Active> {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::<AtomicU64>::default();
        let writer = Writer { output: Output::new(&settings.sink), dropped: Arc::clone(&dropped), reported: None };
        match thread::Builder::new().name("access-log".into()).spawn(move || writer.run(&lines)) {
            Ok(thread) => {
                let mut writers = self.writers();
                writers.retain(|writer| !writer.is_finished());
                writers.push(thread);
                Some(Active { settings: Arc::clone(settings), queue, dropped })
            }
            Err(error) => {
                tracing::error!(target: "proxy", %error, "Cannot start the thread that writes the access log: nothing is logged");
                None
            }
        }
    }

    fn writers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.0.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The format of a request's log line, if it is logged at all.
    #[must_use]
    pub fn active(&self) -> Option<Arc<Active>> {
        self.0.active.load_full()
    }
}

impl Active {
    fn with(&self, settings: &Arc<Settings>) -> Self {
        Self { settings: Arc::clone(settings), queue: self.queue.clone(), dropped: Arc::clone(&self.dropped) }
    }

    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has the record's line written. Never waits: without room in the queue the line is dropped and counted.
    pub fn log(&self, record: &Record<'_>, secrets: Secrets<'_>) {
        let line = self.settings.format.line(record, secrets);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send(line) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Writer {
    output: Output,
    dropped: Arc<AtomicU64>,
    reported: Option<Instant>,
}

impl Writer {
    /// Writes until every sender is gone.
    fn run(mut self, lines: &Receiver<String>) {
        loop {
            match lines.recv_timeout(LOOK_AGAIN) {
                Ok(line) => {
                    if self.output.write(line.as_bytes()).is_err() {
                        self.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.report_dropped();
        }
    }

    fn report_dropped(&mut self) {
        if self.dropped.load(Ordering::Relaxed) == 0 || self.reported.is_some_and(|at| at.elapsed() < REPORT_INTERVAL) {
            return;
        }
        self.reported = Some(Instant::now());
        let lines = self.dropped.swap(0, Ordering::Relaxed);
        tracing::warn!(target: "proxy", lines, "Access log lines were dropped: the sink is too slow or can't be written to");
    }
}

enum Output {
    Stdout,
    Stderr,
    File(LogFile),
}

/// A file that log rotation may move away.
struct LogFile {
    path: PathBuf,
    file: Option<File>,
    looked: Option<Instant>,
    /// Whether it was logged that it can't be opened.
    failing: bool,
}

impl Output {
    fn new(sink: &Sink) -> Self {
        match sink {
            Sink::Stdout => Self::Stdout,
            Sink::Stderr => Self::Stderr,
            Sink::File(path) => Self::File(LogFile { path: path.clone(), file: None, looked: None, failing: false }),
        }
    }

    /// One write for each line, so that lines of several writers stay whole.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().write_all(line),
            Self::Stderr => io::stderr().write_all(line),
            Self::File(file) => file.write(line),
        }
    }
}

impl LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.looked.is_none_or(|at| at.elapsed() >= LOOK_AGAIN) {
            self.looked = Some(Instant::now());
            self.look();
        }
        match &mut self.file {
            Some(file) => file.write_all(line),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Opens the file unless it is open already.
    fn look(&mut self) {
        if self.file.as_ref().is_some_and(|file| is_at(file, &self.path)) {
            return;
        }
        match OpenOptions::new().append(true).create(true).open(&self.path) {
            Ok(file) => (self.file, self.failing) = (Some(file), false),
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(target: "proxy", path = %self.path.display(), %error, "Cannot open the access log; trying again every second");
            }
            Err(_) => {}
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: io::Result<std::fs::Metadata>| metadata.ok().map(|found| (found.dev(), found.ino()));
    identity(file.metadata()).is_some_and(|open| Some(open) == identity(std::fs::metadata(path)))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::access_log::Format;
    use crate::testing::TempFile;

    /// Longest wait for something that should come within a second.
    const SOON: Duration = Duration::from_secs(15);

    fn settings(path: &Path, text: &str) -> Arc<Settings> {
        let format = Format::text(text).unwrap();
        Arc::new(Settings { sink: Sink::File(path.into()), format, refused_connections: true })
    }

    fn until(mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < SOON, "not soon");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn record() -> Record<'static> {
        Record::new(UNIX_EPOCH)
    }

    #[test]
    fn lines_are_appended_and_a_changed_format_counts_at_once() {
        let file = TempFile::new("before\n");
        let log = AccessLog::default();
        assert!(log.active().is_none());
        log.set(Some(&settings(file.path(), "one %RESPONSE_CODE%")));
        log.active().unwrap().log(&record(), Secrets::default());
        log.set(Some(&settings(file.path(), "two")));
        log.active().unwrap().log(&record(), Secrets::default());
        until(|| std::fs::read_to_string(file.path()).unwrap() == "before\none 0\ntwo\n");
        log.set(None);
        assert!(log.active().is_none());
    }

    #[tokio::test]
    async fn what_was_logged_is_written_before_the_end() {
        let file = TempFile::new("");
        let log = AccessLog::default();
        log.set(Some(&settings(file.path(), "line")));
        for _ in 0..1000 {
            log.active().unwrap().log(&record(), Secrets::default());
        }
        log.close(SOON).await;
        assert_eq!(std::fs::read_to_string(file.path()).unwrap().lines().count(), 1000);
    }

    #[test]
    fn a_rotated_file_is_opened_anew() {
        let file = TempFile::new("");
        let log = AccessLog::default();
        log.set(Some(&settings(file.path(), "line")));
        let active = log.active().unwrap();
        active.log(&record(), Secrets::default());
        until(|| std::fs::read_to_string(file.path()).unwrap() == "line\n");
        let old = TempFile::new("");
        std::fs::rename(file.path(), old.path()).unwrap();
        until(|| {
            active.log(&record(), Secrets::default());
            std::fs::read_to_string(file.path()).is_ok_and(|text| text.starts_with("line\n"))
        });
        assert!(std::fs::read_to_string(old.path()).unwrap().starts_with("line\n"));
    }

    #[test]
    fn a_sink_that_blocks_costs_lines_and_no_time() {
        let (queue, lines) = sync_channel(2);
        let settings = settings(Path::new("/nowhere"), "line");
        let active = Active { settings, queue, dropped: Arc::default() };
        for _ in 0..10 {
            active.log(&record(), Secrets::default());
        }
        assert_eq!(active.dropped.load(Ordering::Relaxed), 8);
        drop(lines);
        active.log(&record(), Secrets::default());
        assert_eq!(active.dropped.load(Ordering::Relaxed), 9);
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_tried_again() {
        let directory = TempFile::new("");
        std::fs::remove_file(directory.path()).unwrap();
        let path = directory.path().join("log");
        let log = AccessLog::default();
        log.set(Some(&settings(&path, "line")));
        let active = log.active().unwrap();
        active.log(&record(), Secrets::default());
        std::fs::create_dir(directory.path()).unwrap();
        until(|| {
            active.log(&record(), Secrets::default());
            path.exists()
        });
        std::fs::remove_dir_all(directory.path()).unwrap();
    }
}
