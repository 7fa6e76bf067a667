//! The ACL token, and the file it may live in.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use reqwest::header::HeaderValue;
use tokio::sync::watch;

use super::files::Followed;
use super::settings::Token;

/// Longest token file that is read, in bytes; a token has 36.
const FILE_LIMIT: u64 = 64 * 1024;

const RELOADED: &str = "The token file holds another token: all queries start anew with it";

/// Tells of another token.
pub(super) type Changes = watch::Receiver<Option<HeaderValue>>;

/// The token in force. One that came from a file follows the file.
pub(super) fn followed(token: &Token) -> anyhow::Result<Followed<Option<HeaderValue>>> {
    match token {
        Token::None => Ok(Followed::fixed(None)),
        Token::Fixed(token) => Ok(Followed::fixed(Some(header(token)?))),
        // A pipe gives its token once, and reading it again could block.
        Token::File(path) if !path.is_file() => Ok(Followed::fixed(Some(read(path)?))),
        Token::File(path) => {
            let file = path.clone();
            Followed::new(vec![path.clone()], RELOADED, move || read(&file).map(Some))
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
