//! B3, Zipkin's headers: one (`b3`) or several (`x-b3-…`), and trace ids of 64 or 128 bits.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::fields::{Found, Parent, hex, single, value};

const SINGLE: HeaderName = HeaderName::from_static("b3");
const TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const PARENT_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct B3 {
    pub parent: Option<Parent>,
    pub grandparent: Option<u64>,
    /// `None`: the next proxy decides.
    pub sampled: Option<bool>,
    pub form: Form,
}

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Form {
    pub single: bool,
    /// Trace ids have 64 bits.
    pub short: bool,
    /// The caller wants all of the trace, whatever sampling says.
    pub debug: bool,
}

pub(super) fn read(headers: &HeaderMap) -> Found<B3> {
    match single(headers, &SINGLE) {
        Found::Nothing => {}
        Found::Bad => return Found::Bad,
        Found::This(line) => return parse(line).map_or(Found::Bad, Found::This),
    }
    let fields = [TRACE_ID, SPAN_ID, PARENT_ID, SAMPLED, FLAGS].map(|name| single(headers, &name));
    if fields.iter().all(|field| *field == Found::Nothing) {
        return Found::Nothing;
    }
    gather(fields).map_or(Found::Bad, Found::This)
}

/// A span within the same trace; `above` is the one that it lies under. `sampled` is whether it is recorded.
pub(super) fn write(headers: &mut HeaderMap, form: Form, this: Parent, above: Option<u64>, sampled: bool) {
    let mut id = format!("{:032x}", this.trace_id);
    if form.short {
        id.replace_range(..16, "");
    }
    let state = match (form.debug, sampled) {
        (true, _) => "d",
        (false, true) => "1",
        (false, false) => "0",
    };
    if form.single {
        let _ = write!(id, "-{:016x}-{state}", this.span_id);
        if let Some(above) = above {
            let _ = write!(id, "-{above:016x}");
        }
        headers.insert(SINGLE, value(&id));
        return;
    }
    headers.insert(TRACE_ID, value(&id));
    headers.insert(SPAN_ID, value(&format!("{:016x}", this.span_id)));
    if let Some(above) = above {
        headers.insert(PARENT_ID, value(&format!("{above:016x}")));
    }
    // The flag of debugging implies it.
    if !form.debug {
        headers.insert(SAMPLED, HeaderValue::from_static(state));
    }
}

/// `{trace id}-{span id}-{state}-{parent id}`, of which the last two may be missing, or the state alone.
fn parse(line: &[u8]) -> Option<B3> {
    let mut parts = line.split(|byte| *byte == b'-');
    let first = parts.next()?;
    let Some(span) = parts.next() else {
        let (sampled, debug) = decision(first)?;
        let form = Form { single: true, short: false, debug };
        return Some(B3 { parent: None, grandparent: None, sampled: Some(sampled), form });
    };
    let (state, above) = (parts.next(), parts.next());
    if parts.next().is_some() {
        return None;
    }
    let (sampled, debug) = match state.map(decision) {
        None => (None, false),
        Some(sampling) => sampling.map(|(sampled, debug)| (Some(sampled), debug))?,
    };
    let (parent, short) = ids(first, span)?;
    let grandparent = above.map(|above| span_id(above).ok_or(())).transpose().ok()?;
    Some(B3 { parent: Some(parent), grandparent, sampled, form: Form { single: true, short, debug } })
}

fn gather([trace, span, above, sampled, flags]: [Found<&[u8]>; 5]) -> Option<B3> {
    let field = |field| match field {
        Found::Nothing => Some(None),
        Found::Bad => None,
        Found::This(text) => Some(Some(text)),
    };
    let ids = match (field(trace)?, field(span)?) {
        (None, None) => None,
        (Some(trace), Some(span)) => Some(ids(trace, span)?),
        _ => return None,
    };
    let debug = field(flags)? == Some(b"1");
    let sampling = match field(sampled)? {
        None => None,
        Some(text) => Some(decision(text)?),
    };
    let debug = debug || sampling.is_some_and(|(_, debug)| debug);
    let grandparent = field(above)?.and_then(span_id);
    let form = Form { single: false, short: ids.is_some_and(|(_, short)| short), debug };
    let sampled = if debug { Some(true) } else { sampling.map(|(sampled, _)| sampled) };
    Some(B3 { parent: ids.map(|(parent, _)| parent), grandparent, sampled, form })
}

/// With whether the trace id is a short one.
fn ids(trace: &[u8], span: &[u8]) -> Option<(Parent, bool)> {
    let length = trace.len();
    let trace_id = hex(trace).filter(|id| *id != 0 && matches!(length, 16 | 32))?;
    Some((Parent { trace_id, span_id: span_id(span)? }, length == 16))
}

fn span_id(text: &[u8]) -> Option<u64> {
    let id = hex(text).filter(|id| *id != 0 && text.len() == 16)?;
    u64::try_from(id).ok()
}

/// Whether to record, and all of it.
fn decision(text: &[u8]) -> Option<(bool, bool)> {
    match text {
        b"1" => Some((true, false)),
        b"d" => Some((true, true)),
        b"0" => Some((false, false)),
        _ if text.eq_ignore_ascii_case(b"true") => Some((true, false)),
        _ if text.eq_ignore_ascii_case(b"false") => Some((false, false)),
        _ => None,
    }
}
