//! Parts of trace headers, common to W3C and B3.

use http::{HeaderMap, HeaderName, HeaderValue};

/// The span in which a request was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    pub trace_id: u128,
    pub span_id: u64,
}

/// The result of reading one header format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found<T> {
    Nothing,
    /// The header is malformed, and is passed on unchanged.
    Bad,
    This(T),
}

impl<T> Found<T> {
    pub(super) fn this(self) -> Option<T> {
        match self {
            Self::This(this) => Some(this),
            Self::Nothing | Self::Bad => None,
        }
    }
}

/// The value of a header that is there once.
pub(super) fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Found<&'a [u8]> {
    let mut lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    match (lines.next(), lines.next()) {
        (None, _) => Found::Nothing,
        (Some(line), None) => Found::This(line),
        (Some(_), Some(_)) => Found::Bad,
    }
}

/// Up to 32 hexadecimal digits, and nothing else.
pub(super) fn hex(digits: &[u8]) -> Option<u128> {
    if digits.is_empty() || digits.len() > 32 {
        return None;
    }
    digits.iter().try_fold(0, |number, digit| Some(number << 4 | u128::from(char::from(*digit).to_digit(16)?)))
}

/// A header value of digits and dashes.
pub(super) fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
