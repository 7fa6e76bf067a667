//! `traceparent` and `tracestate` (W3C Trace Context, level 1 and what later ones may add).

use http::{HeaderMap, HeaderName, HeaderValue};

use super::fields::{Found, Parent, hex, single, value};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Flag of `traceparent`: the caller records the trace.
pub(super) const SAMPLED: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct W3c {
    pub parent: Parent,
    pub flags: u8,
}

impl W3c {
    pub(super) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }
}

pub(super) fn read(headers: &HeaderMap) -> Found<W3c> {
    match single(headers, &TRACEPARENT) {
        Found::Nothing => Found::Nothing,
        Found::Bad => Found::Bad,
        Found::This(text) => parse(text).map_or(Found::Bad, Found::This),
    }
}

pub(super) fn write(headers: &mut HeaderMap, this: Parent, flags: u8) {
    headers.insert(TRACEPARENT, value(&format!("00-{:032x}-{:016x}-{flags:02x}", this.trace_id, this.span_id)));
}

/// What goes with a trace of which nothing came is of another one.
pub(super) fn begin(headers: &mut HeaderMap) {
    headers.remove(TRACESTATE);
}

/// The vendors' part, where it is no longer than everybody passes on.
pub(super) fn state(headers: &HeaderMap) -> Option<Box<str>> {
    const LONGEST: usize = 512;
    let line = headers.get(TRACESTATE).map(HeaderValue::as_bytes).filter(|line| line.len() <= LONGEST)?;
    std::str::from_utf8(line).ok().filter(|line| !line.is_empty()).map(Into::into)
}

/// Digits are in lower case. A version that is not known yet may go on behind a dash.
fn parse(text: &[u8]) -> Option<W3c> {
    const LENGTH: usize = 55;
    let version = hex(text.get(..2)?)?;
    let ends = match text.get(LENGTH) {
        None => text.len() == LENGTH,
        Some(next) => version != 0 && *next == b'-',
    };
    let text = text.get(..LENGTH).filter(|text| ends && !text.iter().any(u8::is_ascii_uppercase))?;
    if version == 0xff || [2, 35, 52].iter().any(|dash| text[*dash] != b'-') {
        return None;
    }
    let parent = Parent { trace_id: hex(&text[3..35])?, span_id: u64::try_from(hex(&text[36..52])?).ok()? };
    let flags = u8::try_from(hex(&text[53..])?).ok()?;
    (parent.trace_id != 0 && parent.span_id != 0).then_some(W3c { parent, flags })
}
