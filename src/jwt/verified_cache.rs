//! Signatures that were found good, so that a token that comes with each request is checked once.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::digest::{SHA256, digest};

/// Tokens whose signature is good under one key set; with the set, they are forgotten. That is all that is remembered:
/// whether a token has expired or is for us is looked at each time.
///
/// Of tokens the digest is kept. There are at most twice [`MOST`], the latest ones: only who holds tokens of the
/// issuer can fill it.
#[derive(Default)]
pub(super) struct VerifiedCache(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    recent: HashSet<Digest>,
    older: HashSet<Digest>,
}

type Digest = [u8; 32];

/// What names a token.
pub(super) fn digest_of(token: &str) -> Digest {
    let mut name = Digest::default();
    name.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    name
}

impl VerifiedCache {
    pub(super) fn has(&self, token: &Digest) -> bool {
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if generations.recent.contains(token) {
            return true;
        }
        let known = generations.older.contains(token);
        if known {
            generations.add(*token);
        }
        known
    }

    pub(super) fn add(&self, token: Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add(token);
    }
}

impl Generations {
    fn add(&mut self, token: Digest) {
        if self.recent.len() >= MOST {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(token);
    }
}

/// A copy of a key set begins with nothing.
impl Clone for VerifiedCache {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// It says nothing of the keys.
impl PartialEq for VerifiedCache {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for VerifiedCache {}

impl fmt::Debug for VerifiedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerifiedCache")
    }
}

/// Entries of one generation, some 100 KB of memory.
const MOST: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_and_no_more() {
        let cache = VerifiedCache::default();
        let token = |number: usize| digest_of(&number.to_string());
        (0..10 * MOST).for_each(|number| {
            // One is used all the time.
            assert!(number == 0 || cache.has(&token(0)), "{number}");
            cache.add(token(number));
        });
        let known = (0..10 * MOST).filter(|number| cache.has(&token(*number))).count();
        assert!((MOST..=2 * MOST).contains(&known), "{known}");
        let generations = cache.0.lock().unwrap();
        assert!(generations.recent.len() <= MOST && generations.older.len() <= MOST);
    }
}
