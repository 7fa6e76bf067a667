//! Consistent hashing: from a request to a number, and from the number to an instance.
//!
//! The hash is ten lines of our own (FNV-1a and SplitMix64): std promises no hash that stays the same from version to version, and sidecars
//! of several versions have to lead a client to the same instance. Nothing has to agree with Envoy's xxHash.

use std::net::IpAddr;
use std::time::Duration;

use http::header::COOKIE;
use http::{HeaderName, HeaderValue};

use super::address::Endpoint;
use super::request::RequestView;

/// How requests are shared out among the instances of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadBalancer {
    pub policy: Policy,
    /// Used with [`Policy::RingHash`] and [`Policy::Maglev`] alone.
    pub hash_policies: Vec<HashPolicy>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// None is set: ours to choose.
    #[default]
    Unset,
    RoundRobin,
    Random,
    /// Of so many random instances (at least two) the one with the fewest requests.
    LeastRequest {
        choices: u32,
    },
    /// Entries in the ring, at least and at most.
    RingHash {
        minimum: u64,
        maximum: u64,
    },
    Maglev,
}

/// One part of a request that its hash is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashPolicy {
    pub source: HashSource,
    /// The policies that follow count only if this one found nothing.
    pub terminal: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashSource {
    Header(HeaderName),
    Query(String),
    SourceIp,
    Cookie(CookieSource),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CookieSource {
    pub name: String,
    /// Given to clients that have none; `None`: only a cookie that is there counts.
    pub generate: Option<CookieAttributes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CookieAttributes {
    /// `None`: until the client's session ends.
    pub max_age: Option<Duration>,
    pub path: Option<String>,
}

/// The hash of a request by its policies.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RequestHash {
    /// `None`: no policy found anything, so that any instance will do.
    pub hash: Option<u64>,
    /// For the response: cookies that were made up.
    pub set_cookies: Vec<HeaderValue>,
}

/// Hashes a request by the policies in order. `random` becomes the value of a cookie that has to be made up; it must be
/// another one for each request.
#[must_use]
pub fn hash_request(
    policies: &[HashPolicy],
    request: &RequestView<'_>,
    source: Option<IpAddr>,
    random: u64,
) -> RequestHash {
    let mut result = RequestHash::default();
    for policy in policies {
        let found = match &policy.source {
            HashSource::Header(name) => hash_all(request.headers.get_all(name).iter().map(HeaderValue::as_bytes)),
            HashSource::Query(name) => request.query_parameter(name).map(|value| hash(value.as_bytes())),
            HashSource::SourceIp => source.map(|ip| hash(ip.to_canonical().to_string().as_bytes())),
            HashSource::Cookie(cookie) => cookie.hash(request, random, &mut result.set_cookies),
        };
        if let Some(found) = found {
            result.hash = Some(combine(result.hash, found));
        }
        if policy.terminal && result.hash.is_some() {
            break;
        }
    }
    result
}

impl CookieSource {
    fn hash(&self, request: &RequestView<'_>, random: u64, set: &mut Vec<HeaderValue>) -> Option<u64> {
        if let Some(value) = self.find(request) {
            return Some(hash(value));
        }
        let attributes = self.generate.as_ref()?;
        let value = format!("{random:016x}");
        set.extend(HeaderValue::try_from(attributes.set_cookie(&self.name, &value)));
        Some(hash(value.as_bytes()))
    }

    fn find<'a>(&self, request: &RequestView<'a>) -> Option<&'a [u8]> {
        let lines = request.headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
        lines.flat_map(|line| line.split(|b| *b == b';')).find_map(|pair| {
            let value = pair.trim_ascii().strip_prefix(self.name.as_bytes())?.strip_prefix(b"=")?;
            Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
        })
    }
}

impl CookieAttributes {
    fn set_cookie(&self, name: &str, value: &str) -> String {
        let max_age = self.max_age.map(|age| format!("; Max-Age={}", age.as_secs())).unwrap_or_default();
        let path = self.path.as_ref().map(|path| format!("; Path={path}")).unwrap_or_default();
        format!("{name}=\"{value}\"{max_age}{path}; HttpOnly")
    }
}

/// Which instance a hash leads to, and which come next if that one can't be used. When an instance comes
/// or goes, most hashes lead where they led before.
#[derive(Debug, PartialEq, Eq)]
pub enum HashTable {
    Ring(Ring),
    Maglev(Maglev),
}

impl HashTable {
    /// `None` for other policies, and without instances.
    #[must_use]
    pub fn new(policy: Policy, endpoints: &[Endpoint]) -> Option<Self> {
        if endpoints.is_empty() {
            return None;
        }
        match policy {
            Policy::RingHash { minimum, maximum } => Some(Self::Ring(Ring::new(endpoints, minimum, maximum))),
            Policy::Maglev => Some(Self::Maglev(Maglev::new(endpoints))),
            _ => None,
        }
    }

    /// Indices of endpoints in the order to try them. Never empty; the same index comes again and again, so
    /// that a caller stops when it has seen enough.
    pub fn candidates(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let (start, table) = match self {
            Self::Ring(ring) => (ring.place(hash), &ring.indices),
            Self::Maglev(maglev) => (maglev.place(hash), &maglev.slots),
        };
        let (before, after) = table.split_at(start.min(table.len()));
        after.iter().chain(before).map(|index| *index as usize)
    }
}

/// Default size of a hash ring in Consul and Envoy.
pub const MINIMUM_RING: u64 = 1024;
/// Largest hash ring that Envoy accepts.
pub const MAXIMUM_RING: u64 = 8 << 20;

/// Points on a circle, some for each instance: a hash leads to the next point (Ketama).
#[derive(Debug, PartialEq, Eq)]
pub struct Ring {
    points: Vec<u64>,
    /// Of the endpoints, in step with `points`.
    indices: Vec<u32>,
}

impl Ring {
    /// At least `minimum` points, so that the lightest instance has its share of them. Its number is rounded up to a
    /// power of two: else each instance that comes or goes would move the points of all.
    fn new(endpoints: &[Endpoint], minimum: u64, maximum: u64) -> Self {
        let maximum = maximum.clamp(1, MAXIMUM_RING);
        let minimum = minimum.min(maximum);
        let weight = |endpoint: &Endpoint| u64::from(endpoint.weight.max(1));
        let total: u64 = endpoints.iter().map(weight).sum();
        let lightest = endpoints.iter().map(weight).min().unwrap_or(1);
        let least = (lightest * minimum).div_ceil(total).next_power_of_two();
        let size = (least * total / lightest).min(maximum);
        let mut ring = Vec::new();
        for (index, endpoint) in (0u32..).zip(endpoints) {
            let points = (u128::from(size) * u128::from(weight(endpoint)) / u128::from(total)).max(1);
            let key = hash(key(endpoint).as_bytes());
            ring.extend((0..points as u64).map(|point| (mix(key ^ mix(point)), index)));
        }
        ring.sort_unstable();
        Self {
            points: ring.iter().map(|(point, _)| *point).collect(),
            indices: ring.iter().map(|(_, index)| *index).collect(),
        }
    }

    fn place(&self, hash: u64) -> usize {
        self.points.partition_point(|point| *point < hash)
    }
}

/// A table that the instances fill by turns, each in an order of its own (Eisenbud et al., NSDI 2016).
#[derive(Debug, PartialEq, Eq)]
pub struct Maglev {
    slots: Vec<u32>,
}

/// Slots of a Maglev table, as in Envoy: a prime number.
const SLOTS: u64 = 65_537;

struct Filler {
    index: u32,
    weight: u64,
    /// The turn grows by the weight; at the heaviest one's it places.
    turn: u64,
    place: u64,
    skip: u64,
}

impl Maglev {
    fn new(endpoints: &[Endpoint]) -> Self {
        let heaviest = endpoints.iter().map(|endpoint| u64::from(endpoint.weight.max(1))).max().unwrap_or(1);
        let mut fillers: Vec<Filler> = (0u32..).zip(endpoints).map(Filler::new).collect();
        let mut slots: Vec<Option<u32>> = vec![None; SLOTS as usize];
        let mut left = slots.len();
        while left > 0 {
            for filler in &mut fillers {
                if left > 0 && filler.is_next(heaviest) {
                    filler.fill(&mut slots);
                    left -= 1;
                }
            }
        }
        Self { slots: slots.into_iter().flatten().collect() }
    }

    fn place(&self, hash: u64) -> usize {
        (hash % SLOTS) as usize
    }
}

impl Filler {
    fn new((index, endpoint): (u32, &Endpoint)) -> Self {
        let key = hash(key(endpoint).as_bytes());
        let weight = u64::from(endpoint.weight.max(1));
        Self { index, weight, turn: 0, place: key % SLOTS, skip: mix(key) % (SLOTS - 1) + 1 }
    }

    fn is_next(&mut self, heaviest: u64) -> bool {
        self.turn += self.weight;
        let next = self.turn >= heaviest;
        if next {
            self.turn -= heaviest;
        }
        next
    }

    /// Takes its next slot that is free. One is: the size is prime, so that every skip visits all.
    fn fill(&mut self, slots: &mut [Option<u32>]) {
        while let Some(slot) = slots.get_mut(self.place as usize) {
            self.place = (self.place + self.skip) % SLOTS;
            if slot.is_none() {
                *slot = Some(self.index);
                return;
            }
        }
    }
}

fn key(endpoint: &Endpoint) -> String {
    endpoint.address.to_string()
}

/// In any order, as lines of one header that differ in order mean the same instance.
fn hash_all<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<u64> {
    values.map(hash).fold(None, |sum: Option<u64>, one| Some(sum.unwrap_or_default().wrapping_add(one)))
}

fn combine(sum: Option<u64>, next: u64) -> u64 {
    sum.map_or(next, |sum| sum.rotate_left(1) ^ next)
}

/// FNV-1a, mixed; the same on every machine and in every version.
fn hash(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Address, Host};
    use http::HeaderMap;

    fn endpoints(weights: &[u32]) -> Vec<Endpoint> {
        let endpoint = |(port, weight): (u16, &u32)| {
            let address = Address { host: Host::Ip([127, 0, 0, 1].into()), port };
            Endpoint { address, weight: *weight }
        };
        (8000..).zip(weights).map(endpoint).collect()
    }

    const RING: Policy = Policy::RingHash { minimum: MINIMUM_RING, maximum: MAXIMUM_RING };

    fn shares(policy: Policy, endpoints: &[Endpoint]) -> Vec<usize> {
        let table = HashTable::new(policy, endpoints).unwrap();
        let mut shares = vec![0; endpoints.len()];
        for point in 0..10_000 {
            shares[table.candidates(mix(point)).next().unwrap()] += 1;
        }
        shares
    }

    #[test]
    fn hashes_are_shared_out_by_weight() {
        for policy in [RING, Policy::Maglev] {
            let shares = shares(policy, &endpoints(&[1, 1, 2, 4]));
            for (share, expected) in shares.iter().zip([1250, 1250, 2500, 5000]) {
                assert!(share.abs_diff(expected) < expected / 5, "{policy:?}: {shares:?}");
            }
        }
    }

    #[test]
    fn most_hashes_stay_where_they_were_when_an_instance_goes() {
        for policy in [RING, Policy::Maglev] {
            let all = endpoints(&[1; 10]);
            let (before, after) = (HashTable::new(policy, &all).unwrap(), HashTable::new(policy, &all[..9]).unwrap());
            let first = |table: &HashTable, point| table.candidates(mix(point)).next().unwrap();
            let moved = (0..10_000).filter(|&point| first(&before, point) != first(&after, point)).count();
            assert!(moved < 1700, "{policy:?} moved {moved} of 10000");
        }
    }

    #[test]
    fn every_instance_is_a_candidate_in_the_end() {
        for policy in [RING, Policy::Maglev, Policy::RingHash { minimum: 1, maximum: 1 }] {
            let table = HashTable::new(policy, &endpoints(&[1, 128, 7])).unwrap();
            for point in [0, 1, u64::MAX, mix(7)] {
                let mut seen: Vec<usize> = table.candidates(point).collect();
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen, [0, 1, 2], "{policy:?}");
            }
        }
        assert_eq!(HashTable::new(RING, &[]), None);
        assert_eq!(HashTable::new(Policy::Random, &endpoints(&[1])), None);
        assert!(HashTable::new(Policy::RingHash { minimum: u64::MAX, maximum: 10 }, &endpoints(&[1, 2])).is_some());
    }

    fn policy(source: HashSource) -> HashPolicy {
        HashPolicy { source, terminal: false }
    }

    fn header(name: &'static str) -> HashPolicy {
        policy(HashSource::Header(HeaderName::from_static(name)))
    }

    fn cookie(generate: Option<CookieAttributes>) -> HashPolicy {
        policy(HashSource::Cookie(CookieSource { name: "sid".to_owned(), generate }))
    }

    fn hashed(policies: &[HashPolicy], list: &[(&'static str, &'static str)], query: Option<&str>) -> RequestHash {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_static(value));
        }
        let request =
            RequestView { method: "GET", path: "/", path_as_written: false, query, authority: "db", headers: &headers };
        hash_request(policies, &request, Some([127, 0, 0, 1].into()), 7)
    }

    #[test]
    fn what_is_missing_adds_nothing() {
        let both = [header("x-user"), policy(HashSource::Query("u".to_owned()))];
        assert_eq!(hashed(&both, &[], None), RequestHash::default());
        let user = hashed(&both, &[("x-user", "a")], None);
        assert!(user.hash.is_some());
        assert_eq!(user, hashed(&both[..1], &[("x-user", "a")], Some("u=b")));
        assert_ne!(user, hashed(&both, &[("x-user", "b")], None));
        assert_ne!(user, hashed(&both, &[("x-user", "a")], Some("u=b")));
        assert!(hashed(&both, &[], Some("x=y&u=b")).hash.is_some());
    }

    #[test]
    fn a_terminal_policy_ends_the_walk_if_it_found_something() {
        let terminal = HashPolicy { terminal: true, ..header("x-user") };
        let policies = [terminal, policy(HashSource::SourceIp)];
        let user = hashed(&policies[..1], &[("x-user", "a")], None);
        assert_eq!(hashed(&policies, &[("x-user", "a")], None), user);
        assert_eq!(hashed(&policies, &[], None), hashed(&policies[1..], &[], None));
    }

    #[test]
    fn the_order_of_lines_does_not_matter() {
        let one = hashed(&[header("x-user")], &[("x-user", "a"), ("x-user", "b")], None);
        assert_eq!(one, hashed(&[header("x-user")], &[("x-user", "b"), ("x-user", "a")], None));
    }

    #[test]
    fn a_session_cookie_is_made_up_once_and_found_again() {
        let session = cookie(Some(CookieAttributes::default()));
        let made = hashed(std::slice::from_ref(&session), &[], None);
        assert_eq!(made.set_cookies, ["sid=\"0000000000000007\"; HttpOnly"]);
        let sent = [("cookie", "a=b; sid=\"0000000000000007\"")];
        let again = hashed(&[session], &sent, None);
        assert_eq!((again.hash, again.set_cookies.len()), (made.hash, 0));
        let lasting = CookieAttributes { max_age: Some(Duration::from_secs(60)), path: Some("/x".to_owned()) };
        let made = hashed(&[cookie(Some(lasting))], &[("cookie", "xsid=1; sidx=2")], None);
        assert_eq!(made.set_cookies, ["sid=\"0000000000000007\"; Max-Age=60; Path=/x; HttpOnly"]);
        assert_eq!(hashed(&[cookie(None)], &[], None), RequestHash::default());
        assert_eq!(hashed(&[cookie(None)], &[("cookie", "sid=0000000000000007")], None).hash, again.hash);
    }
}
