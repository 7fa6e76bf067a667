//! Files that are followed: what was made of them is made anew when they change.

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

/// Interval between two checks of the files.
const POLL_PERIOD: Duration = Duration::from_secs(1);

/// Longest file that is read, in bytes.
const FILE_LIMIT: u64 = 4 * 1024 * 1024;

/// Most files of a directory that are read.
const MOST_FILES: usize = 1024;

/// A value that is made of files. While they cannot be used, as when only half of them is written, the last value
/// stays.
pub(super) struct Followed<T> {
    current: watch::Sender<T>,
    source: Option<Source<T>>,
    state: Mutex<State>,
}

struct Source<T> {
    paths: Vec<PathBuf>,
    make: Arc<dyn Fn() -> anyhow::Result<T> + Send + Sync>,
    /// For the log: what is done with new content.
    reloaded: &'static str,
}

struct State {
    contents: Option<u64>,
    warned: bool,
}

impl<T: Send + Sync + 'static> Followed<T> {
    /// A value that stays as it is.
    pub(super) fn fixed(value: T) -> Self {
        let state = Mutex::new(State { contents: None, warned: false });
        Self { current: watch::Sender::new(value), source: None, state }
    }

    /// What `make` makes of `paths`, files or directories of files. `reloaded` is logged when it was made anew.
    ///
    /// # Errors
    /// Those of `make`.
    pub(super) fn new(
        paths: Vec<PathBuf>,
        reloaded: &'static str,
        make: impl Fn() -> anyhow::Result<T> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        // Contents before the value: what changes in between is noticed.
        let contents = contents(&paths).ok();
        let current = watch::Sender::new(make()?);
        let state = Mutex::new(State { contents, warned: false });
        Ok(Self { current, source: Some(Source { paths, make: Arc::new(make), reloaded }), state })
    }

    pub(super) fn changes(&self) -> watch::Receiver<T> {
        self.current.subscribe()
    }

    /// Follows the files without end. Content is compared rather than times: the files are small, and a mounted secret
    /// is replaced by way of links, with times that need not move.
    pub(super) async fn follow(&self) {
        if self.source.is_none() {
            return;
        }
        loop {
            tokio::time::sleep(POLL_PERIOD).await;
            self.reload().await;
        }
    }

    /// Reads the files again, and makes the value anew if they have changed.
    pub(super) async fn reload(&self) {
        let Some(source) = &self.source else { return };
        let before = self.lock().contents;
        let (paths, make) = (source.paths.clone(), source.make.clone());
        let read = tokio::task::spawn_blocking(move || {
            let contents = contents(&paths)?;
            let value = if Some(contents) == before { None } else { Some(make()?) };
            Ok((contents, value))
        });
        // The runtime is stopping.
        let Ok(read) = read.await else { return };
        self.take(source, read);
    }

    fn take(&self, source: &Source<T>, read: anyhow::Result<(u64, Option<T>)>) {
        let mut state = self.lock();
        match read {
            Ok((contents, value)) => {
                *state = State { contents: Some(contents), warned: false };
                if let Some(value) = value {
                    tracing::info!("{}", source.reloaded);
                    self.current.send_replace(value);
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut state.warned, true) {
                    tracing::warn!("{error:#}; the files read before stay in use");
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Followed<T> {
    pub(super) fn current(&self) -> T {
        self.current.borrow().clone()
    }
}

/// A fingerprint of what is in these files, or in the files of these directories.
fn contents(paths: &[PathBuf]) -> anyhow::Result<u64> {
    let mut hasher = DefaultHasher::new();
    for path in paths {
        if path.is_dir() {
            for file in files_of(path)? {
                (&file, read(&file)?).hash(&mut hasher);
            }
        } else {
            read(path)?.hash(&mut hasher);
        }
    }
    Ok(hasher.finish())
}

/// The files of a directory, in the order of their names.
pub(super) fn files_of(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("cannot read the directory {}", directory.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    anyhow::ensure!(files.len() <= MOST_FILES, "there are more than {MOST_FILES} files in {}", directory.display());
    Ok(files)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_LIMIT).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(bytes)
}
