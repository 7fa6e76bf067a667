//! The ACL token, and the file it may live in.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::header::HeaderValue;
use tokio::sync::watch;

use super::settings::Token;

const POLL_PERIOD: Duration = Duration::from_secs(1);

/// Longest token file that is read, in bytes; a token has 36.
const FILE_LIMIT: u64 = 64 * 1024;

/// Tells of another token.
pub(super) type Changes = watch::Receiver<Option<HeaderValue>>;

/// The token in force. One that came from a file follows the file.
pub(super) struct TokenSource {
    file: Option<PathBuf>,
    current: watch::Sender<Option<HeaderValue>>,
    warned: AtomicBool,
}

impl TokenSource {
    pub(super) fn new(token: &Token) -> anyhow::Result<Self> {
        let (value, file) = match token {
            Token::None => (None, None),
            Token::Fixed(token) => (Some(header(token)?), None),
            Token::File(path) => (Some(read(path)?), Some(path)),
        };
        // A pipe gives its token once, and reading it again could block.
        let file = file.filter(|path| path.is_file()).cloned();
        Ok(Self { file, current: watch::Sender::new(value), warned: AtomicBool::new(false) })
    }

    pub(super) fn current(&self) -> Option<HeaderValue> {
        self.current.borrow().clone()
    }

    pub(super) fn changes(&self) -> Changes {
        self.current.subscribe()
    }

    pub(super) fn follows_file(&self) -> bool {
        self.file.is_some()
    }

    /// Follows the file without end. Content is compared rather than times: the file is tiny, and a
    /// mounted secret is replaced by way of links, with times that need not move.
    pub(super) async fn follow(&self) {
        loop {
            tokio::time::sleep(POLL_PERIOD).await;
            self.reload().await;
        }
    }

    /// Reads the file again; true when it holds another token. When it cannot be read, or is empty, as it
    /// is while it is being written, the last token stays in force.
    pub(super) async fn reload(&self) -> bool {
        let Some(path) = self.file.clone() else { return false };
        let read = match tokio::task::spawn_blocking(move || read(&path)).await {
            Ok(read) => read,
            Err(_) => return false,
        };
        match read {
            Ok(token) => {
                self.warned.store(false, Ordering::Relaxed);
                let replaced = self.current.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(&token);
                    *current = Some(token);
                    changed
                });
                if replaced {
                    tracing::info!("The token file holds another token: all queries start anew with it");
                }
                replaced
            }
            Err(error) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!("{error:#}; the last token stays in use");
                }
                false
            }
        }
    }
}

fn read(path: &Path) -> anyhow::Result<HeaderValue> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(FILE_LIMIT).read_to_string(&mut text))
        .with_context(|| format!("cannot read the token file {}", path.display()))?;
    let token = text.trim();
    if token.is_empty() {
        bail!("the token file {} is empty", path.display());
    }
    header(token).with_context(|| format!("in the token file {}", path.display()))
}

fn header(token: &str) -> anyhow::Result<HeaderValue> {
    // The cause is dropped: nothing that quotes a token may come near a log.
    let Ok(mut value) = HeaderValue::from_str(token.trim()) else {
        bail!("the token has characters that no token has");
    };
    value.set_sensitive(true);
    Ok(value)
}
