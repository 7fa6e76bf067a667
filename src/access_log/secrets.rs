//! Redacts tokens in queries, cookies and headers.

use std::borrow::Cow;

use http::HeaderName;
use http::header::{AUTHORIZATION, PROXY_AUTHORIZATION};

use crate::jwt::Providers;

/// Where a request's tokens may be: where the providers of the listener look for them, and where everybody does
/// (`access_token`, RFC 6750, and the headers for credentials, RFC 9110).
#[derive(Debug, Clone, Copy, Default)]
pub struct Secrets<'a> {
    pub providers: Option<&'a Providers>,
}

/// Replaces a token.
const REDACTED: &str = "REDACTED";

impl Secrets<'_> {
    /// The text without the values of secret parameters, wherever in it a query or a cookie stands: in a path, in a
    /// `referer`, or percent-encoded within another parameter.
    #[must_use]
    pub fn hide<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut shown = String::new();
        let (mut copied, mut name, mut at) = (0, 0, 0);
        while at < text.len() {
            let (sign, length) = sign_at(text.as_bytes(), at);
            let after = at + length;
            if sign == b'=' && self.is_secret_parameter(&text[name..at]) {
                let end = value_end(text.as_bytes(), after, length > 1);
                shown.push_str(&text[copied..after]);
                shown.push_str(REDACTED);
                (copied, name, at) = (end, end, end);
                continue;
            }
            if ends_name(sign) {
                name = after;
            }
            at = after;
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        shown.push_str(&text[copied..]);
        Cow::Owned(shown)
    }

    /// The value of a header, or what stands for it.
    #[must_use]
    pub fn hide_header<'t>(&self, name: &HeaderName, value: &'t str) -> Cow<'t, str> {
        let holds_token = self.providers.is_some_and(|providers| providers.look_in_header(name));
        if holds_token || matches!(*name, AUTHORIZATION | PROXY_AUTHORIZATION) {
            return Cow::Borrowed(REDACTED);
        }
        self.hide(value)
    }

    fn is_secret_parameter(&self, name: &str) -> bool {
        let name = decoded(name);
        let is = |known: &str| known.as_bytes().eq_ignore_ascii_case(&name);
        is("access_token") || self.providers.is_some_and(|providers| providers.parameters_and_cookies().any(is))
    }
}

/// The character at a place of a text, and its length there: three where it is percent-encoded and of those that
/// structure a query.
fn sign_at(text: &[u8], at: usize) -> (u8, usize) {
    let encoded = text.get(at + 1..at + 3).filter(|_| text[at] == b'%').and_then(octet);
    match encoded {
        Some(sign) if sign == b'=' || ends_name(sign) => (sign, 3),
        _ => (text[at], 1),
    }
}

/// Whether a parameter's name begins behind this.
fn ends_name(sign: u8) -> bool {
    matches!(sign, b'?' | b'/' | b'=' | b'(' | b'[') || ends_value(sign)
}

fn ends_value(sign: u8) -> bool {
    matches!(sign, b'&' | b';' | b'#' | b',' | b'"' | b'\'' | b'<' | b'>') || sign.is_ascii_whitespace()
}

/// Where a value ends that begins at a place. An encoded sign ends only what an encoded sign began.
fn value_end(text: &[u8], mut at: usize, encoded: bool) -> usize {
    while at < text.len() {
        let (sign, length) = sign_at(text, at);
        if ends_value(sign) && (length == 1 || encoded) {
            return at;
        }
        at += length;
    }
    at
}

/// Without percent-encoding.
fn decoded(name: &str) -> Cow<'_, [u8]> {
    let name = name.as_bytes();
    if !name.contains(&b'%') {
        return Cow::Borrowed(name);
    }
    let mut out = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        let encoded = name.get(at + 1..at + 3).filter(|_| name[at] == b'%').and_then(octet);
        out.push(encoded.unwrap_or(name[at]));
        at += if encoded.is_some() { 3 } else { 1 };
    }
    Cow::Owned(out)
}

fn octet(digits: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(*digits.first()?)? * 16 + digit(*digits.get(1)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jwt::{Location, Provider};

    #[test]
    fn tokens_are_hidden_wherever_a_query_stands() {
        for (text, shown) in [
            ("/a?b=c", "/a?b=c"),
            ("/a?access_token=x.y.z", "/a?access_token=REDACTED"),
            ("/a?b=c&access_token=x/y+z==&d=e", "/a?b=c&access_token=REDACTED&d=e"),
            ("/a?access_token=1&access_token=2", "/a?access_token=REDACTED&access_token=REDACTED"),
            ("/a?ACCESS_token=x", "/a?ACCESS_token=REDACTED"),
            ("/a?acce%73s_tok%65n=x", "/a?acce%73s_tok%65n=REDACTED"),
            ("/a?access_token=x%26y", "/a?access_token=REDACTED"),
            ("/a?no_access_token=x", "/a?no_access_token=x"),
            ("/access_token=x/b", "/access_token=REDACTED"),
            ("https://a.example/#access_token=x&b=c", "https://a.example/#access_token=REDACTED&b=c"),
            ("/a?to=%2Fb%3Faccess_token%3Dx%26c%3Dd", "/a?to=%2Fb%3Faccess_token%3DREDACTED%26c%3Dd"),
            ("a=b; access_token=x; c=d", "a=b; access_token=REDACTED; c=d"),
            ("/a?access_token", "/a?access_token"),
            ("/a?access_token=", "/a?access_token=REDACTED"),
            ("/é?access_token=é&%", "/é?access_token=REDACTED&%"),
            ("%", "%"),
            ("", ""),
        ] {
            assert_eq!(Secrets::default().hide(text), shown, "{text}");
        }
    }

    #[test]
    fn providers_have_places_of_their_own() {
        let locations = vec![
            Location::QueryParameter("jwt".to_owned()),
            Location::Cookie("session".to_owned()),
            Location::Header { name: "x-token".parse().unwrap(), prefix: String::new(), forward: true },
        ];
        let provider = Provider {
            issuer: String::new(),
            audiences: Vec::new(),
            keys: None,
            refetch: None,
            locations,
            forwarding: None,
            clock_skew: crate::jwt::DEFAULT_CLOCK_SKEW,
        };
        let providers = Providers([("p".to_owned(), provider)].into());
        let secrets = Secrets { providers: Some(&providers) };
        assert_eq!(secrets.hide("/?jwt=a&x=b&access_token=c"), "/?jwt=REDACTED&x=b&access_token=REDACTED");
        let header = |name: &str, value| secrets.hide_header(&name.parse().unwrap(), value).into_owned();
        assert_eq!(header("cookie", "a=b;session=c"), "a=b;session=REDACTED");
        assert_eq!(header("x-token", "abc"), REDACTED);
        assert_eq!(header("authorization", "Bearer abc"), REDACTED);
        assert_eq!(header("referer", "http://a/?jwt=b"), "http://a/?jwt=REDACTED");
        assert_eq!(Secrets::default().hide("/?jwt=a"), "/?jwt=a");
    }
}
