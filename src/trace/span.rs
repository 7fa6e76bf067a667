//! A finished span.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

/// Longest tag with text from a peer or the app, in bytes. Envoy cuts paths at this length too.
pub(super) const LONGEST: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Of the caller's sidecar.
    Client,
    /// Of the called one's.
    Server,
}

/// One request on its way through this sidecar, or one connection. Its size is bounded.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub kind: Kind,
    /// As Zipkin has it: the host, or what the connection is for.
    pub name: Box<str>,
    pub start: SystemTime,
    pub duration: Duration,
    pub is_error: bool,
    pub tags: Tags,
    pub(super) ids: Ids,
}

/// The ids of a span.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Ids {
    pub trace_id: u128,
    pub span_id: u64,
    pub parent_id: Option<u64>,
    /// The span that sent the request has the same id.
    pub is_shared: bool,
    /// `tracestate`, as it came.
    pub state: Option<Box<str>>,
}

impl Span {
    #[must_use]
    pub fn new(kind: Kind, name: &str, start: SystemTime, duration: Duration) -> Self {
        let (name, tags, ids) = (cut(name).into(), Tags::default(), Ids::default());
        Self { kind, name, start, duration, is_error: false, tags, ids }
    }
}

/// The tags of a span, under Envoy's names and ours.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tags(Vec<(&'static str, Cow<'static, str>)>);

impl Tags {
    /// A text of ours.
    pub fn fixed(&mut self, name: &'static str, value: &'static str) {
        self.0.push((name, Cow::Borrowed(value)));
    }

    /// A text that somebody else chose, up to a length.
    pub fn text(&mut self, name: &'static str, value: &str) {
        self.0.push((name, Cow::Owned(cut(value).to_owned())));
    }

    pub fn number(&mut self, name: &'static str, value: u64) {
        self.0.push((name, Cow::Owned(value.to_string())));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, &**value))
    }
}

/// The beginning of a text.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST)]
}
