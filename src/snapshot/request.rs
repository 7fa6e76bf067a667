//! An HTTP request as rules see it, and the tests of header values that routes and permissions share.

use std::borrow::Cow;
use std::{fmt, iter};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::authority::Canonical;
use super::path::lax;
use super::pattern::Pattern;

/// A request that is to be judged or routed. All of it is borrowed.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    pub method: &'a str,
    /// Normalised where the listener normalises; without the query.
    pub path: &'a str,
    /// Rules compare the path and the names of headers as they are written, as Envoy does where normalisation was turned off.
    pub path_as_written: bool,
    /// Raw, without the `?`.
    pub query: Option<&'a str>,
    /// The `:authority` or `Host`; empty if there is none.
    pub authority: &'a str,
    pub headers: &'a HeaderMap,
}

impl<'a> RequestView<'a> {
    #[must_use]
    pub fn path_and_query(&self) -> Cow<'a, str> {
        match self.query {
            Some(query) => Cow::Owned(format!("{}?{query}", self.path)),
            None => Cow::Borrowed(self.path),
        }
    }

    /// The raw value of the first parameter of that name, not percent-decoded, as Envoy takes it.
    #[must_use]
    pub fn query_parameter(&self, name: &str) -> Option<&'a str> {
        self.query?
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find_map(|(key, value)| (key == name).then_some(value))
    }
}

/// A condition on one header, or on what Envoy offers under a header's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatch {
    name: Name,
    test: ValueTest,
    /// For what a server may read in another way than it is written.
    otherwise: Vec<ValueTest>,
    invert: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueTest {
    Present,
    Exact(Text),
    Prefix(Text),
    Suffix(Text),
    Contains(Text),
    Regex(Pattern),
}

/// Text to compare with, of any ASCII case if so said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    bytes: Vec<u8>,
    ignore_case: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    Method,
    Path,
    Authority,
    Header(HeaderName),
}

/// How several lines of one header add up. Inversion comes first, line by line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lines {
    /// One line that passes is enough: for what is to be refused.
    Any,
    /// Every line must pass: for what is to be allowed.
    All,
}

impl HeaderMatch {
    /// `None` when no header can have that name, or it is a pseudo-header that requests are not judged by.
    #[must_use]
    pub fn new(name: &str, test: ValueTest, invert: bool) -> Option<Self> {
        let name = match name.to_ascii_lowercase().as_str() {
            ":method" => Name::Method,
            ":path" => Name::Path,
            ":authority" | "host" => Name::Authority,
            other => Name::Header(HeaderName::from_bytes(other.as_bytes()).ok()?),
        };
        let otherwise = test.otherwise(&name);
        Some(Self { name, test, otherwise, invert })
    }

    /// As Envoy calls it: a header's name in lower case, `:method`, `:path` or `:authority`.
    #[must_use]
    pub fn name(&self) -> &str {
        match &self.name {
            Name::Method => ":method",
            Name::Path => ":path",
            Name::Authority => ":authority",
            Name::Header(name) => name.as_str(),
        }
    }

    #[must_use]
    pub fn test(&self) -> &ValueTest {
        &self.test
    }

    #[must_use]
    pub fn is_inverted(&self) -> bool {
        self.invert
    }

    /// As Envoy 1.40 routes: any line that passes, and inverted, none.
    pub(super) fn routes(&self, request: &RequestView<'_>) -> bool {
        self.compare(request, if self.invert { Lines::All } else { Lines::Any }, false)
    }

    /// Whether the condition of a permission holds. What a server may read in another way than it is written (method,
    /// path, authority) is taken in every way where a match is what refuses: plainly in a deny, inverted in an allow.
    ///
    /// Some servers take `_` for `-` in names of headers, others leave such a header out: where there is one, what refuses
    /// needs one of these readings, and what allows needs both (RFC 3875, 4.1.18). Where normalisation was turned off, a name is
    /// the one that is written, as in Envoy.
    pub(super) fn permits(&self, request: &RequestView<'_>, lines: Lines) -> bool {
        let refuses = lines == Lines::Any;
        let holds = self.compare(request, lines, refuses != self.invert);
        match &self.name {
            Name::Header(name)
                if holds != refuses
                    && !request.path_as_written
                    && request.headers.keys().any(|other| is_taken_for(other, name)) =>
            {
                let taken = request.headers.iter().filter(|(other, _)| *other == name || is_taken_for(other, name));
                self.match_values(taken.map(|(_, value)| value.as_bytes()), lines)
            }
            _ => holds,
        }
    }

    /// Without the header, only an inverted test for its presence passes (Envoy 1.40).
    fn compare(&self, request: &RequestView<'_>, lines: Lines, every_way: bool) -> bool {
        let written = match &self.name {
            Name::Header(name) => {
                return self.match_values(request.headers.get_all(name).iter().map(HeaderValue::as_bytes), lines);
            }
            Name::Method => Cow::Borrowed(request.method),
            Name::Path => request.path_and_query(),
            Name::Authority if request.authority.is_empty() => return self.match_values(iter::empty(), lines),
            Name::Authority => Cow::Borrowed(request.authority),
        };
        let matches = self.test.passes(written.as_bytes()) || (every_way && self.matches_otherwise(request));
        matches != self.invert
    }

    /// Whether a server that reads the request in another way sees what the test is for.
    fn matches_otherwise(&self, request: &RequestView<'_>) -> bool {
        let passes = |reading: &[u8]| self.otherwise.iter().any(|test| test.passes(reading));
        match &self.name {
            Name::Method => passes(request.method.to_ascii_uppercase().as_bytes()),
            Name::Authority => {
                let authority = Canonical::of(request.authority);
                passes(authority.as_str().as_bytes()) || passes(authority.name().as_bytes())
            }
            Name::Path if !request.path_as_written => {
                let lax = lax(request.path);
                let query = request.query.map(|query| [b"?", query.as_bytes()].concat()).unwrap_or_default();
                lax.hides_dots || passes(&[&lax.path[..], &query].concat())
            }
            Name::Path | Name::Header(_) => false,
        }
    }

    fn match_values<'v>(&self, mut values: impl Iterator<Item = &'v [u8]>, lines: Lines) -> bool {
        let Some(first) = values.next() else {
            return self.invert && self.test == ValueTest::Present;
        };
        let mut passes = iter::once(first).chain(values).map(|value| self.test.passes(value) != self.invert);
        match lines {
            Lines::Any => passes.any(|pass| pass),
            Lines::All => passes.all(|pass| pass),
        }
    }
}

/// Whether another name is this one where `_` and `-` are the same.
fn is_taken_for(other: &HeaderName, name: &HeaderName) -> bool {
    let dashed = |byte| if byte == b'_' { b'-' } else { byte };
    let (other, name) = (other.as_str().as_bytes(), name.as_str().as_bytes());
    other.len() == name.len() && other != name && other.iter().zip(name).all(|(a, b)| dashed(*a) == dashed(*b))
}

impl ValueTest {
    fn passes(&self, value: &[u8]) -> bool {
        match self {
            Self::Present => true,
            Self::Exact(text) => text.equals(value),
            Self::Prefix(text) => text.starts(value),
            Self::Suffix(text) => text.ends(value),
            Self::Contains(text) => text.is_in(value),
            Self::Regex(pattern) => pattern.matches(value),
        }
    }

    /// The tests for other readings of what has such a name, which have one spelling where the value may have several.
    fn otherwise(&self, name: &Name) -> Vec<Self> {
        match name {
            Name::Header(_) => Vec::new(),
            Name::Path => vec![self.clone()],
            Name::Method => vec![self.clone().ignoring_case()],
            Name::Authority => [Some(self.clone().ignoring_case()), self.canonical()].into_iter().flatten().collect(),
        }
    }

    /// A pattern stays as it is: it may be about letter case.
    fn ignoring_case(self) -> Self {
        let any_case = |text: Text| Text { ignore_case: true, ..text };
        match self {
            Self::Exact(text) => Self::Exact(any_case(text)),
            Self::Prefix(text) => Self::Prefix(any_case(text)),
            Self::Suffix(text) => Self::Suffix(any_case(text)),
            Self::Contains(text) => Self::Contains(any_case(text)),
            Self::Present | Self::Regex(_) => self,
        }
    }

    /// For an authority: where the text ends in what makes no difference, the test without that.
    fn canonical(&self) -> Option<Self> {
        let canonical = |text: &Text| {
            let canonical = Canonical::of(&String::from_utf8_lossy(&text.bytes)).as_str().to_owned();
            let differs = !canonical.is_empty() && !canonical.as_bytes().eq_ignore_ascii_case(&text.bytes);
            differs.then(|| Text::new(&canonical, false))
        };
        match self {
            Self::Exact(text) | Self::Prefix(text) => canonical(text).map(Self::Exact),
            Self::Suffix(text) | Self::Contains(text) => canonical(text).map(Self::Suffix),
            Self::Present | Self::Regex(_) => None,
        }
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.bytes))
    }
}

/// For people: `header x-beta is "1"`.
impl fmt::Display for HeaderMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.invert { "not: " } else { "" };
        write!(f, "{not}header {} ", self.name())?;
        match &self.test {
            ValueTest::Present => f.write_str("is there"),
            ValueTest::Exact(text) => write!(f, "is {:?}", text.to_string()),
            ValueTest::Prefix(text) => write!(f, "begins with {:?}", text.to_string()),
            ValueTest::Suffix(text) => write!(f, "ends with {:?}", text.to_string()),
            ValueTest::Contains(text) => write!(f, "contains {:?}", text.to_string()),
            ValueTest::Regex(pattern) => write!(f, "matches {:?}", pattern.to_string()),
        }
    }
}

impl Text {
    #[must_use]
    pub fn new(text: &str, ignore_case: bool) -> Self {
        Self { bytes: text.as_bytes().to_vec(), ignore_case }
    }

    #[must_use]
    pub fn ignores_case(&self) -> bool {
        self.ignore_case
    }

    pub(super) fn equals(&self, value: &[u8]) -> bool {
        if self.ignore_case { value.eq_ignore_ascii_case(&self.bytes) } else { value == self.bytes }
    }

    pub(super) fn starts(&self, value: &[u8]) -> bool {
        value.get(..self.bytes.len()).is_some_and(|head| self.equals(head))
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn ends(&self, value: &[u8]) -> bool {
        value.len().checked_sub(self.bytes.len()).is_some_and(|start| self.equals(&value[start..]))
    }

    fn is_in(&self, value: &[u8]) -> bool {
        self.bytes.is_empty() || value.windows(self.bytes.len()).any(|window| self.equals(window))
    }
}
