//! Gives memory back to the system after many connections have ended.
//!
//! The C library's allocator keeps what it has once got, in pieces between what is still in use. A sidecar
//! that had five thousand connections for a minute would hold their memory for good.

/// Watches how many connections there are.
#[derive(Debug, Default)]
pub struct Memory {
    /// Most users since memory was last given back.
    peak: usize,
    before: usize,
}

/// Connections that must have ended to be worth it: a few MiB.
const WORTH_IT: usize = 256;
/// As long as more than this end from one look to the next, others are about to: wait.
const STILL_ENDING: usize = 64;

impl Memory {
    /// Looks at the number of connections, from time to time, and gives back what those that ended have left.
    pub fn look(&mut self, now: usize) {
        if self.is_time(now) {
            give_back();
        }
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
    fn what_is_in_use_survives() {
        let kept: Vec<Vec<u8>> = (0..1000).map(|i| vec![(i % 251) as u8; 10_000]).collect();
        give_back();
        assert!(kept.iter().enumerate().all(|(i, bytes)| bytes.iter().all(|&byte| byte == (i % 251) as u8)));
    }
}
