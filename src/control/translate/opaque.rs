//! Consul's opaque `Config` maps: weakly typed, spelled in several ways.
//!
//! The rules are those of Consul's decoder (`agent/xds/config`, `lib/decode` 1.19.2) with one difference:
//! one bad value takes the default alone, and does not keep the other keys from theirs.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Notes;
use crate::consul::api::GoDuration;

/// One opaque map, and where it stands, for the notes.
#[derive(Clone, Copy)]
pub(super) struct Opaque<'a> {
    map: Option<&'a Map<String, Value>>,
    place: &'a str,
}

impl<'a> Opaque<'a> {
    pub(super) fn new(map: Option<&'a Map<String, Value>>, place: &'a str) -> Self {
        Self { map, place }
    }

    /// The value of `key`, which is given in snake case, however the map spells it: `max_connections`,
    /// `MaxConnections`, `maxconnections`. The exact spelling wins, as registrations use it and what an
    /// agent merges in comes second. A `null` is as good as absent.
    fn value(&self, key: &str) -> Option<&'a Value> {
        let map = self.map?;
        let found = map.get(key).or_else(|| map.iter().find(|(name, _)| same_key(name, key)).map(|(_, value)| value));
        found.map(unwrap_single).filter(|value| !value.is_null())
    }

    /// A whole number that is not negative.
    pub(super) fn count(&self, key: &str, notes: &mut Notes) -> Option<u64> {
        let number = self.integer(key, notes)?;
        let count = u64::try_from(number).ok();
        if count.is_none() {
            self.bad(key, "a number that is not negative", notes);
        }
        count
    }

    /// A whole number, written as a number, a float without a fraction, a string or a bool.
    pub(super) fn integer(&self, key: &str, notes: &mut Notes) -> Option<i64> {
        let value = self.value(key)?;
        let number = integer(value);
        if number.is_none() {
            self.bad(key, "a whole number", notes);
        }
        number
    }

    /// True or false, as a bool, as text, or as 1 or 0.
    pub(super) fn switch(&self, key: &str, notes: &mut Notes) -> Option<bool> {
        let value = self.value(key)?;
        let switch = match value {
            Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
            Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
            value => match integer(value) {
                Some(0) => Some(false),
                Some(1) => Some(true),
                _ => None,
            },
        };
        if switch.is_none() {
            self.bad(key, "true or false", notes);
        }
        switch
    }

    /// A count of milliseconds; 0 is a value.
    pub(super) fn milliseconds(&self, key: &str, notes: &mut Notes) -> Option<Duration> {
        self.count(key, notes).map(Duration::from_millis)
    }

    /// A Go duration such as `1m30s`, or a number of nanoseconds, that is not negative.
    pub(super) fn duration(&self, key: &str, notes: &mut Notes) -> Option<Duration> {
        let value = self.value(key)?;
        let duration = duration(value);
        if duration.is_none() {
            self.bad(key, "a duration such as \"10s\"", notes);
        }
        duration
    }

    pub(super) fn text(&self, key: &str, notes: &mut Notes) -> Option<String> {
        match self.value(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => {
                self.bad(key, "a string", notes);
                None
            }
        }
    }

    /// A list of names, or one text with commas between them; empty when the key is absent.
    pub(super) fn names(&self, key: &str, notes: &mut Notes) -> Vec<String> {
        let trimmed = |text: &str| text.trim().to_owned();
        match self.value(key) {
            None => Vec::new(),
            Some(Value::String(text)) => text.split(',').map(trimmed).filter(|name| !name.is_empty()).collect(),
            Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
                items.iter().filter_map(Value::as_str).map(trimmed).filter(|name| !name.is_empty()).collect()
            }
            Some(_) => {
                self.bad(key, "a list of names", notes);
                Vec::new()
            }
        }
    }

    /// A map within this one; `place` names it in notes.
    pub(super) fn nested<'b>(&self, key: &str, place: &'b str, notes: &mut Notes) -> Opaque<'b>
    where
        'a: 'b,
    {
        let map = match self.value(key) {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(_) => {
                self.bad(key, "a map", notes);
                None
            }
        };
        Opaque { map, place }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    pub(super) fn place(&self) -> &'a str {
        self.place
    }

    pub(super) fn bad(&self, key: &str, wanted: &str, notes: &mut Notes) {
        notes.push(format!("{}: {key} is not {wanted}, so its default is used", self.place));
    }

    pub(super) fn note(&self, text: &str, notes: &mut Notes) {
        notes.push(format!("{}: {text}", self.place));
    }
}

/// A list of one stands for its element.
fn unwrap_single(value: &Value) -> &Value {
    match value {
        Value::Array(items) if items.len() == 1 => &items[0],
        _ => value,
    }
}

fn same_key(name: &str, key: &str) -> bool {
    let plain = |text: &'_ str| text.bytes().filter(|&b| b != b'_').map(|b| b.to_ascii_lowercase()).collect::<Vec<_>>();
    plain(name) == plain(key)
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
        Value::String(text) if text.is_empty() => Some(0),
        Value::String(text) => text.parse().ok(),
        Value::Bool(flag) => Some(i64::from(*flag)),
        _ => None,
    }
}

/// A float as the integer it stands for; a fraction is cut off, as Go's decoder does.
fn whole(number: f64) -> Option<i64> {
    /// Largest integer up to which a double is exact (2^53).
    const EXACT: f64 = 9_007_199_254_740_992.0;
    (number.is_finite() && number.abs() <= EXACT).then_some(number as i64)
}

/// A Go duration as text, or a number of nanoseconds; below zero is none.
fn duration(value: &Value) -> Option<Duration> {
    let text = match value {
        Value::String(text) => text.parse::<GoDuration>().ok(),
        _ => None,
    };
    let nanoseconds = text.map_or_else(|| integer(value), |duration| Some(duration.nanoseconds()))?;
    u64::try_from(nanoseconds).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_match_whatever_their_spelling_and_the_exact_one_wins() {
        let config = json!({"Max_Connections": 1, "maxPendingRequests": "7", "max_x": 1, "MaxX": 2});
        let config = Opaque::new(config.as_object(), "config");
        let mut notes = Notes::default();
        assert_eq!(config.count("max_connections", &mut notes), Some(1));
        assert_eq!(config.count("max_pending_requests", &mut notes), Some(7));
        assert_eq!(config.count("max_x", &mut notes), Some(1));
        assert_eq!(config.count("absent", &mut notes), None);
        assert_eq!(notes.take(), Vec::<String>::new());
    }

    #[test]
    fn numbers_are_read_loosely() {
        for (value, expected) in [
            (json!(5000), Some(5000)),
            (json!(5000.0), Some(5000)),
            (json!(1.9), Some(1)),
            (json!("5000"), Some(5000)),
            (json!(""), Some(0)),
            (json!(true), Some(1)),
            (json!([7]), Some(7)),
            (json!(-1), None),
            (json!(1e300), None),
            (json!("5s"), None),
            (json!([1, 2]), None),
            (json!({}), None),
        ] {
            let config = json!({ "key": value });
            let mut notes = Notes::default();
            assert_eq!(Opaque::new(config.as_object(), "config").count("key", &mut notes), expected, "{value}");
            assert_eq!(notes.take().len(), usize::from(expected.is_none()), "{value}");
        }
    }

    #[test]
    fn durations_are_strings_or_nanoseconds() {
        for (value, expected) in [
            (json!("1m30s"), Some(Duration::from_secs(90))),
            (json!(10_000_000_000_u64), Some(Duration::from_secs(10))),
            (json!(3e9), Some(Duration::from_secs(3))),
            (json!("500"), Some(Duration::from_nanos(500))),
            (json!("0"), Some(Duration::ZERO)),
            (json!("-1s"), None),
            (json!(-1), None),
            (json!("soon"), None),
            (json!({}), None),
        ] {
            assert_eq!(duration(&value), expected, "{value}");
        }
    }
}
