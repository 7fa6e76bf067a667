//! Values that Go writes in a way of its own, and fields that are not known.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Names of fields that were present, carried a value, and are not known to this code.
///
/// A field with Go's zero value (`null`, `false`, `0`, `""`, `[]`, `{}`) says nothing and is not kept, as
/// an agent without `omitempty` on a new field sends it everywhere.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Unknown(Vec<String>);

impl Unknown {
    pub fn first(&self) -> Option<&str> {
        self.iter().next()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Takes the field `name` in, whose value comes next. They are in the order of their names.
    pub(super) fn read<'de, A: MapAccess<'de>>(&mut self, name: Cow<'_, str>, values: &mut A) -> Result<(), A::Error> {
        let Meaning(says_something) = values.next_value()?;
        if says_something && let Err(place) = self.0.binary_search_by(|known| known.as_str().cmp(&name)) {
            self.0.insert(place, name.into_owned());
        }
        Ok(())
    }
}

/// Whether a JSON value is something else than Go's zero value of its type.
struct Meaning(bool);

impl<'de> Deserialize<'de> for Meaning {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MeaningVisitor)
    }
}

struct MeaningVisitor;

impl<'de> Visitor<'de> for MeaningVisitor {
    type Value = Meaning;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Meaning, E> {
        Ok(Meaning(false))
    }

    fn visit_none<E>(self) -> Result<Meaning, E> {
        Ok(Meaning(false))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Meaning, E> {
        Ok(Meaning(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0.0))
    }

    fn visit_str<E>(self, value: &str) -> Result<Meaning, E> {
        Ok(Meaning(!value.is_empty()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Meaning, A::Error> {
        let mut some = false;
        while items.next_element::<IgnoredAny>()?.is_some() {
            some = true;
        }
        Ok(Meaning(some))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Meaning, A::Error> {
        let mut some = false;
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            some = true;
        }
        Ok(Meaning(some))
    }
}

/// A port as the agent gives it. Zero and numbers that are no port decode as "none", so that one odd row
/// does not make a whole list unreadable.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(u16);

impl Port {
    pub fn new(port: u16) -> Self {
        Self(port)
    }

    /// `None` for zero, which Consul takes as "no port".
    pub fn get(self) -> Option<u16> {
        (self.0 != 0).then_some(self.0)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        Ok(Self(number.as_u64().and_then(|number| u16::try_from(number).ok()).unwrap_or(0)))
    }
}

/// Text that must not be seen in logs, such as a private key.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Secret(empty)" } else { "Secret(redacted)" })
    }
}

/// A duration as Go writes it: text such as `1m30s`, or a number of nanoseconds. Consul mixes both, at
/// times for the same setting (a resolver's `ConnectTimeout` is text, its `RequestTimeout` a number).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration {
    nanoseconds: i64,
}

impl GoDuration {
    pub fn from_nanoseconds(nanoseconds: i64) -> Self {
        Self { nanoseconds }
    }

    pub fn nanoseconds(self) -> i64 {
        self.nanoseconds
    }

    /// `None` for zero, which Consul takes as "not set", and for less.
    pub fn positive(self) -> Option<Duration> {
        u64::try_from(self.nanoseconds).ok().filter(|nanoseconds| *nanoseconds > 0).map(Duration::from_nanos)
    }
}

/// The text or number is no duration, or is too long for one (about 292 years).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadDuration;

impl fmt::Display for BadDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a duration such as 10s, 500ms or 1m30s, or too long")
    }
}

impl std::error::Error for BadDuration {}

impl FromStr for GoDuration {
    type Err = BadDuration;

    /// As Go's `time.ParseDuration`, and empty text is zero.
    fn from_str(text: &str) -> Result<Self, BadDuration> {
        let (negative, mut rest) = match text.as_bytes().first() {
            None => return Ok(Self::default()),
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
        };
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(BadDuration);
        }
        let mut total: i128 = 0;
        while !rest.is_empty() {
            let (part, after) = duration_part(rest)?;
            total += part;
            if total > i128::from(i64::MAX) + i128::from(negative) {
                return Err(BadDuration);
            }
            rest = after;
        }
        let total = if negative { -total } else { total };
        i64::try_from(total).map(Self::from_nanoseconds).map_err(|_| BadDuration)
    }
}

/// Reads one number with its unit; gives nanoseconds and the rest of the text.
fn duration_part(text: &str) -> Result<(i128, &str), BadDuration> {
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(digits(text));
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(BadDuration);
    }
    let (unit, rest) = rest.split_at(rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len()));
    let scale = unit_nanoseconds(unit)?;
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse::<i64>().map_err(|_| BadDuration)?.into() };
    Ok((whole * scale + fraction_nanoseconds(fraction, scale), rest))
}

fn unit_nanoseconds(unit: &str) -> Result<i128, BadDuration> {
    match unit {
        "ns" => Ok(1),
        // The micro sign and the Greek letter are two characters that look alike; Go takes both.
        "us" | "\u{b5}s" | "\u{3bc}s" => Ok(1_000),
        "ms" => Ok(1_000_000),
        "s" => Ok(1_000_000_000),
        "m" => Ok(60_000_000_000),
        "h" => Ok(3_600_000_000_000),
        _ => Err(BadDuration),
    }
}

fn fraction_nanoseconds(fraction: &str, scale: i128) -> i128 {
    // An hour is 3.6e12 ns: digits past the fifteenth stay below a nanosecond whatever the unit.
    let digits = &fraction[..fraction.len().min(15)];
    let value = digits.bytes().fold(0_i128, |sum, digit| sum * 10 + i128::from(digit - b'0'));
    let divisor = (0..digits.len()).fold(1_i128, |product, _| product * 10);
    value * scale / divisor
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DurationVisitor)
    }
}

struct DurationVisitor;

impl Visitor<'_> for DurationVisitor {
    type Value = GoDuration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration, as text or as a number of nanoseconds")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, nanoseconds: i64) -> Result<GoDuration, E> {
        Ok(GoDuration::from_nanoseconds(nanoseconds))
    }

    fn visit_u64<E: de::Error>(self, nanoseconds: u64) -> Result<GoDuration, E> {
        i64::try_from(nanoseconds).map(GoDuration::from_nanoseconds).map_err(|_| E::custom(BadDuration))
    }

    fn visit_f64<E: de::Error>(self, nanoseconds: f64) -> Result<GoDuration, E> {
        // The bound is 2^63, which is exact in a float; the cast below it loses nothing but a fraction.
        let in_range = nanoseconds.is_finite() && nanoseconds.abs() < 9_223_372_036_854_775_808.0;
        in_range.then(|| GoDuration::from_nanoseconds(nanoseconds as i64)).ok_or_else(|| E::custom(BadDuration))
    }
}
