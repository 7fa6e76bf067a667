//! Reads the trace context from a request's headers.

use http::HeaderMap;

use super::fields::{Found, Parent};
use super::{b3, w3c};

/// The caller's trace context, and the header formats in which it is passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// Nothing, or (`Some`) whether to trace, and nothing of a trace.
    Nothing(Option<bool>),
    /// It belongs to a trace. `sampled` is `None` where the next proxy decides.
    Trace { parent: Parent, grandparent: Option<u64>, sampled: Option<bool>, forms: Forms },
    /// The trace that it belongs to is not known.
    Unknown,
}

/// Forms of headers that a trace is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Forms {
    /// With the flags of `traceparent`.
    pub w3c: Option<u8>,
    pub b3: Option<b3::Form>,
}

/// Both forms are read. Of two traces the one that is recorded counts, and W3C's before B3's; the other goes on as it is.
pub(super) fn read(headers: &HeaderMap) -> Caller {
    let (w3c, b3) = (w3c::read(headers), b3::read(headers));
    let is_bad = w3c == Found::Bad || b3 == Found::Bad;
    let (w3c, b3) = (w3c.this(), b3.this());
    // Only B3 says what lies above the caller's span.
    let above = |parent| b3.filter(|found| found.parent == Some(parent)).and_then(|found| found.grandparent);
    let of_w3c = w3c.map(|found| (found.parent, above(found.parent), Some(found.is_sampled())));
    let of_b3 = b3.and_then(|found| Some((found.parent?, found.grandparent, found.sampled)));
    let sampled = [of_w3c, of_b3].into_iter().flatten().find(|(_, _, sampled)| *sampled == Some(true));
    let Some((parent, grandparent, sampled)) = sampled.or(of_w3c).or(of_b3) else {
        return if is_bad { Caller::Unknown } else { Caller::Nothing(b3.and_then(|found| found.sampled)) };
    };
    let is_same = |other: Parent| other.trace_id == parent.trace_id;
    let forms = Forms {
        w3c: w3c.filter(|found| is_same(found.parent)).map(|found| found.flags),
        b3: b3.filter(|found| found.parent.is_some_and(is_same)).map(|found| found.form),
    };
    Caller::Trace { parent, grandparent, sampled, forms }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let line = |(name, value): &(&str, &str)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        lines.iter().map(line).collect()
    }

    fn id(text: &str) -> u128 {
        u128::from_str_radix(text, 16).unwrap()
    }

    #[test]
    fn either_form_names_the_trace() {
        let w3c = format!("00-{ID}-00f067aa0ba902b7-01");
        let short = &ID[16..];
        for (lines, trace, sampled, forms) in [
            (vec![("traceparent", &*w3c)], ID, Some(true), (true, false)),
            (vec![("traceparent", &w3c.replace("-01", "-00"))], ID, Some(false), (true, false)),
            (
                vec![("x-b3-traceid", ID), ("x-b3-spanid", "00f067aa0ba902b7"), ("x-b3-sampled", "1")],
                ID,
                Some(true),
                (false, true),
            ),
            (
                vec![("x-b3-traceid", short), ("x-b3-spanid", "00f067aa0ba902b7"), ("x-b3-sampled", "0")],
                short,
                Some(false),
                (false, true),
            ),
            (vec![("x-b3-traceid", short), ("x-b3-spanid", "00f067aa0ba902b7")], short, None, (false, true)),
            (
                vec![("x-b3-traceid", short), ("x-b3-spanid", "00f067aa0ba902b7"), ("x-b3-flags", "1")],
                short,
                Some(true),
                (false, true),
            ),
            (vec![("b3", &format!("{short}-00f067aa0ba902b7-1"))], short, Some(true), (false, true)),
            (vec![("b3", &format!("{ID}-00f067aa0ba902b7-d-05e3ac9a4f6e3b90"))], ID, Some(true), (false, true)),
            (vec![("b3", &format!("{ID}-00f067aa0ba902b7"))], ID, None, (false, true)),
            // A sampled one before one that is not.
            (
                vec![("traceparent", &w3c.replace("-01", "-00")), ("b3", &format!("{short}-00f067aa0ba902b7-1"))],
                short,
                Some(true),
                (false, true),
            ),
            // The same trace in both forms, and two.
            (vec![("traceparent", &w3c), ("b3", &format!("{ID}-00f067aa0ba902b7-1"))], ID, Some(true), (true, true)),
            (
                vec![("traceparent", &w3c), ("b3", &format!("{short}-00f067aa0ba902b7-1"))],
                ID,
                Some(true),
                (true, false),
            ),
            // A form that is bad does not spoil the other.
            (
                vec![("traceparent", "00-x"), ("b3", &format!("{short}-00f067aa0ba902b7-1"))],
                short,
                Some(true),
                (false, true),
            ),
            (vec![("traceparent", &w3c), ("b3", "?")], ID, Some(true), (true, false)),
        ] {
            let Caller::Trace { parent, sampled: decision, forms: found, .. } = read(&headers(&lines)) else {
                panic!("{lines:?}")
            };
            assert_eq!((parent.trace_id, parent.span_id), (id(trace), 0x00f0_67aa_0ba9_02b7), "{lines:?}");
            assert_eq!((decision, (found.w3c.is_some(), found.b3.is_some())), (sampled, forms), "{lines:?}");
        }
    }

    #[test]
    fn a_decision_may_come_without_a_trace() {
        for (lines, decision) in [
            (vec![], None),
            (vec![("tracestate", "a=b"), ("baggage", "c=d")], None),
            (vec![("b3", "0")], Some(false)),
            (vec![("b3", "1")], Some(true)),
            (vec![("b3", "d")], Some(true)),
            (vec![("x-b3-sampled", "0")], Some(false)),
            (vec![("x-b3-sampled", "true")], Some(true)),
        ] {
            assert_eq!(read(&headers(&lines)), Caller::Nothing(decision), "{lines:?}");
        }
    }

    #[test]
    fn what_has_no_meaning_is_none() {
        let good = format!("00-{ID}-00f067aa0ba902b7-01");
        let ids = [("x-b3-traceid", ID), ("x-b3-spanid", "00f067aa0ba902b7")];
        let long = "a".repeat(60_000);
        for lines in [
            vec![("traceparent", "")],
            vec![("traceparent", &good[..54])],
            vec![("traceparent", &*format!("{good}-x"))],
            vec![("traceparent", &good.replace("00-4", "ff-4"))],
            vec![("traceparent", &good.to_uppercase())],
            vec![("traceparent", &good.replace(ID, &"0".repeat(32)))],
            vec![("traceparent", &good.replace("00f067aa0ba902b7", "0000000000000000"))],
            vec![("traceparent", &good.replace("-01", "-0x"))],
            vec![("traceparent", &good.replace("00f067aa0ba902b7", "+0f067aa0ba902b7"))],
            vec![("traceparent", &good), ("traceparent", &good)],
            vec![("traceparent", &long)],
            vec![("b3", "")],
            vec![("b3", &long)],
            vec![("b3", "x")],
            vec![("b3", ID)],
            vec![("b3", &format!("{ID}-00f067aa0ba902b7-x"))],
            vec![("b3", &format!("{ID}-00f067aa0ba902b7-1-1"))],
            vec![("b3", &format!("{ID}-00f067aa0ba902b7-1-00f067aa0ba902b7-1"))],
            vec![("b3", &format!("{}-00f067aa0ba902b7-1", &ID[1..]))],
            vec![ids[0]],
            vec![ids[1]],
            vec![ids[0], ids[1], ("x-b3-sampled", "maybe")],
            vec![ids[0], ids[0], ids[1]],
            vec![ids[0], ("x-b3-spanid", "0000000000000000")],
        ] {
            assert_eq!(read(&headers(&lines)), Caller::Unknown, "{lines:?}");
        }
        // A newer version may say more behind what we know.
        let newer = good.replace("00-4", "cc-4");
        for line in [newer.clone(), format!("{newer}-what-comes-then")] {
            assert!(matches!(read(&headers(&[("traceparent", &line)])), Caller::Trace { .. }), "{line}");
        }
        assert_eq!(read(&headers(&[("traceparent", &format!("{newer}x"))])), Caller::Unknown);
    }
}
