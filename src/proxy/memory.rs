//! Gives memory back to the system after many connections have ended, and after a change of the configuration.
//!
//! The C library's allocator keeps what it has once got, in pieces between what is still in use. A sidecar
//! that had five thousand connections for a minute would hold their memory for good, and one that has read
//! thousands of intentions that of their text.

/// Watches how many connections there are, and the configuration's version.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Most users since memory was last given back.
    peak: usize,
    before: usize,
    /// As of the last look, and as of when memory was last given back after a change.
    version: u64,
    settled: u64,
    /// Looks for which changes are left alone.
    pause: u32,
}

/// Ended connections from which memory is given back: a few MiB.
const WORTH_IT: usize = 256;
/// Looks between two changes that are cleared up after.
const PAUSE: u32 = 10;
/// As long as more than this end from one look to the next, others are about to: wait.
const STILL_ENDING: usize = 64;

impl Memory {
    /// Looks at the number of connections and the version, from time to time, and gives back what those that ended and
    /// what came before have left.
    pub(super) fn look(&mut self, now: usize, version: u64) {
        let (ended, settled) = (self.is_time(now), self.has_settled(version));
        if ended || settled {
            give_back();
        }
    }

    fn has_settled(&mut self, version: u64) -> bool {
        let rests = version == self.version;
        self.version = version;
        self.pause = self.pause.saturating_sub(1);
        let due = rests && version != self.settled && self.pause == 0;
        if due {
            (self.settled, self.pause) = (version, PAUSE);
        }
        due
    }

    fn is_time(&mut self, now: usize) -> bool {
        self.peak = self.peak.max(now);
        let ending = self.before.saturating_sub(now);
        self.before = now;
        let due = self.peak - now >= WORTH_IT && ending <= STILL_ENDING;
        if due {
            self.peak = now;
        }
        due
    }
}

/// Returns every free page of every arena.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn give_back() {
    // SAFETY: `malloc_trim` takes a number, touches only memory that the allocator knows to be free, and takes
    // the locks of the arenas itself; glibc documents it as safe to call from any thread (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Other allocators return memory by themselves, or not at all.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_when_many_have_ended_and_no_more_do() {
        let mut memory = Memory::default();
        let looks = [
            (10, false),
            (5000, false),
            (3000, false),
            (100, false),
            (90, true),
            (80, false),
            (400, false),
            (100, false),
            (100, true),
        ];
        for (now, expected) in looks {
            assert_eq!(memory.is_time(now), expected, "at {now}");
        }
    }

    #[test]
    fn memory_is_given_back_once_after_changes_and_not_after_each_of_many() {
        let mut memory = Memory::default();
        let looks = [(0, false), (1, false), (7, false), (7, true), (7, false), (8, false), (8, false)];
        for (version, expected) in looks {
            assert_eq!(memory.has_settled(version), expected, "at {version}");
        }
        let later = (0..PAUSE).filter(|_| memory.has_settled(8)).count();
        assert_eq!(later, 1);
    }

    #[test]
    fn what_is_in_use_survives() {
        let kept: Vec<Vec<u8>> = (0..1000).map(|i| vec![(i % 251) as u8; 10_000]).collect();
        give_back();
        assert!(kept.iter().enumerate().all(|(i, bytes)| bytes.iter().all(|&byte| byte == (i % 251) as u8)));
    }
}
