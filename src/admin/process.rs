//! Figures of this process from the kernel (proc(5)).

use std::time::{SystemTime, UNIX_EPOCH};

/// Ticks per second of the times in `/proc` (`USER_HZ`), the same on every architecture of Linux.
const TICKS: f64 = 100.0;

/// Resident memory in bytes; 0 where it is not known.
pub(super) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// Seconds on a processor, of user and kernel together; 0 where it is not known.
pub(super) fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program stands in parentheses and may hold anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let ticks: f64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS
}

/// Open file descriptors, without the one of this reading; 0 where it is not known.
pub(super) fn descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64).saturating_sub(1)
}

/// Seconds since 1970; 0 for a time before.
pub(super) fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_of_this_process() {
        assert!(resident_bytes() > 100_000 && descriptors() >= 3);
        assert!((0.0..1e6).contains(&cpu_seconds()));
    }
}
