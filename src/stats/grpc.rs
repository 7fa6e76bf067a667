//! gRPC calls by their method.
//!
//! A client names the method, and may name as many as it likes. A method has counts of its own once the server has answered
//! a call of it well, and there are [`METHODS`] of them at most for one destination.

use std::sync::OnceLock;

use super::value::Counter;

/// Methods of one destination that are counted.
const METHODS: usize = 64;
/// Longest path of a method that is counted, in bytes.
const LONGEST: usize = 256;
/// Number of gRPC status codes.
const STATUSES: usize = 17;

/// Calls of one destination; without a call it takes no memory.
#[derive(Debug, Default)]
pub struct Methods(OnceLock<Box<[OnceLock<Method>; METHODS]>>);

#[derive(Debug)]
struct Method {
    /// As in `/fgrpc.PingServer/Ping`.
    path: Box<str>,
    statuses: [Counter; STATUSES],
}

impl Methods {
    /// Counts a call that the server has answered with this status.
    pub fn count(&self, path: &str, status: u8) {
        let Some(method) = self.of(path, status == 0 && path.len() <= LONGEST) else { return };
        if let Some(counter) = method.statuses.get(usize::from(status)) {
            counter.increment();
        }
    }

    /// Where its counts are, or are from now on if it is known to be a method. Without a lock: a place that was taken
    /// stays so.
    fn of(&self, path: &str, is_known: bool) -> Option<&Method> {
        let places = match self.0.get() {
            Some(places) => places,
            None if is_known => self.0.get_or_init(|| Box::new([const { OnceLock::new() }; METHODS])),
            None => return None,
        };
        let first = usize::try_from(hash(path) % METHODS as u64).unwrap_or_default();
        for place in (first..METHODS).chain(0..first) {
            let method = match places[place].get() {
                Some(method) => method,
                None if is_known => places[place].get_or_init(|| Method {
                    path: path.into(),
                    statuses: std::array::from_fn(|_| Counter::default()),
                }),
                None => return None,
            };
            if *method.path == *path {
                return Some(method);
            }
        }
        None
    }

    /// Each method, as in `fgrpc.PingServer.Ping`, with its calls by status.
    #[must_use]
    pub fn get(&self) -> Vec<(String, [u64; STATUSES])> {
        let methods = self.0.get().into_iter().flat_map(|places| places.iter().filter_map(OnceLock::get));
        let counted = methods.map(|method| {
            let name = method.path.trim_start_matches('/').replace('/', ".");
            (name, std::array::from_fn(|status| method.statuses[status].get()))
        });
        let mut counted: Vec<_> = counted.collect();
        counted.sort();
        counted
    }
}

/// The names of the statuses as numbers.
pub const STATUS: [&str; STATUSES] =
    ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"];

/// FNV-1a.
fn hash(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_counted_once_it_was_answered_well() {
        let methods = Methods::default();
        methods.count("/a.B/C", 12);
        assert!(methods.get().is_empty() && methods.0.get().is_none());
        methods.count("/a.B/C", 0);
        methods.count("/a.B/C", 5);
        methods.count("/a.B/C", 99);
        let mut statuses = [0; STATUSES];
        (statuses[0], statuses[5]) = (1, 1);
        assert_eq!(methods.get(), [("a.B.C".to_owned(), statuses)]);
    }

    #[test]
    fn a_thousand_names_add_nothing_beyond_the_bound() {
        let methods = Methods::default();
        (0..1000).for_each(|number| methods.count(&format!("/a.B/Invented{number}"), 12));
        assert!(methods.get().is_empty());
        (0..1000).for_each(|number| methods.count(&format!("/a.B/C{number}"), 0));
        assert_eq!(methods.get().len(), METHODS);
    }
}
