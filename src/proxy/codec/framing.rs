//! The framing of a message by its headers, checked where the message was decoded.
//!
//! A codec finds the end of a message by one header and passes all of them on. Whoever is next might go by another
//! one, and see the end elsewhere (RFC 9112, 6.3). So a message that says its length in more than one way is not
//! passed on, whichever versions of HTTP lie on either side: a request is answered with 400, a response with 502, as
//! by Envoy.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderName, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};

/// Checks that there is one length at most: one number, or the chunked coding alone.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(version: Version, headers: &HeaderMap) -> Result<(), &'static str> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (lengths.next(), codings.next()) {
        (None, None) => return Ok(()),
        (Some(_), Some(_)) => return Err(TWICE),
        (None, Some(_)) if version == Version::HTTP_10 => return Err("HTTP/1.0 has no transfer-encoding"),
        (Some(length), None) if !is_number(length) => return Err("content-length is no number"),
        (None, Some(coding)) if !coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {
            return Err("transfer-encoding is not chunked");
        }
        _ => {}
    }
    if lengths.next().is_some() || codings.next().is_some() { Err(TWICE) } else { Ok(()) }
}

/// Checks a response, and takes out the length zero of one that has no body by its status, which need not say so and
/// may not (RFC 9110, 8.6).
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_response<B>(response: &mut Response<B>) -> Result<(), &'static str> {
    check(response.version(), response.headers())?;
    let (status, headers) = (response.status(), response.headers_mut());
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        if headers.contains_key(TRANSFER_ENCODING) {
            return Err("a response without a body has a transfer-encoding");
        }
        if headers.remove(CONTENT_LENGTH).is_some_and(|length| length.as_bytes().iter().any(|digit| *digit != b'0')) {
            return Err("a response without a body has a content-length");
        }
    }
    Ok(())
}

/// Checks that no value begins or ends with a space or a tab. HTTP/1 has these around values and does not count them,
/// HTTP/2 calls them malformed (RFC 9113, 8.2.1): what has them on one hop would be another value on the next.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_values(version: Version, headers: &HeaderMap) -> Result<(), &'static str> {
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let is_padded = |value: &HeaderValue| is_blank(value.as_bytes().first()) || is_blank(value.as_bytes().last());
    if version == Version::HTTP_2 && headers.values().any(is_padded) {
        return Err("a header's value has spaces around it");
    }
    Ok(())
}

/// Takes out of trailers what may only stand before a body (RFC 9110, 6.5.1): what would frame another message, where
/// trailers are joined with the headers, or name another host or client.
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    for name in NOT_IN_TRAILERS {
        trailers.remove(name);
    }
}

/// As Envoy reads it: no sign, no list, no spaces.
fn is_number(length: &HeaderValue) -> bool {
    let digits = length.as_bytes();
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
}

const TWICE: &str = "the length of the body is given twice";

const NOT_IN_TRAILERS: [HeaderName; 10] = [
    CONNECTION,
    CONTENT_LENGTH,
    HOST,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("x-forwarded-client-cert"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    const LENGTH: &str = "content-length";
    const CODING: &str = "transfer-encoding";

    #[test]
    fn a_message_says_its_length_once() {
        for clear in [&[][..], &[("x", "1")], &[(LENGTH, "0")], &[(LENGTH, "18")], &[(CODING, "Chunked")]] {
            assert_eq!(check(Version::HTTP_11, &headers(clear)), Ok(()), "{clear:?}");
        }
        for unclear in [
            &[(LENGTH, "5"), (CODING, "chunked")][..],
            &[(CODING, "chunked"), (LENGTH, "5")],
            &[(LENGTH, "5"), (LENGTH, "5")],
            &[(LENGTH, "5"), (LENGTH, "6")],
            &[(LENGTH, "5, 5")],
            &[(LENGTH, "+5")],
            &[(LENGTH, "")],
            &[(LENGTH, "0x5")],
            &[(CODING, "chunked"), (CODING, "chunked")],
            &[(CODING, "gzip, chunked")],
            &[(CODING, "gzip"), (CODING, "chunked")],
            &[(CODING, "identity")],
            &[(CODING, "")],
        ] {
            assert!(check(Version::HTTP_11, &headers(unclear)).is_err(), "{unclear:?}");
        }
        assert!(check(Version::HTTP_10, &headers(&[(CODING, "chunked")])).is_err());
    }

    #[test]
    fn a_status_without_a_body_has_no_length() {
        let judge = |status: u16, lines: &[(&'static str, &'static str)]| {
            let mut response = Response::builder().status(status).body(()).unwrap();
            *response.headers_mut() = headers(lines);
            check_response(&mut response).map(|()| response.headers().len())
        };
        for status in [101, 204] {
            assert_eq!(judge(status, &[(LENGTH, "0")]), Ok(0));
            assert!(judge(status, &[(LENGTH, "5")]).is_err());
            assert!(judge(status, &[(CODING, "chunked")]).is_err());
        }
        for status in [200, 205, 304] {
            assert_eq!(judge(status, &[(LENGTH, "5")]), Ok(1));
            assert_eq!(judge(status, &[(CODING, "chunked")]), Ok(1));
        }
    }

    #[test]
    fn values_have_no_spaces_around_them_in_http2() {
        for (value, clear) in [("", true), ("a b", true), (" a", false), ("a\t", false), (" ", false)] {
            let headers = headers(&[("x-a", "1"), ("x-b", value)]);
            assert_eq!(check_values(Version::HTTP_2, &headers).is_ok(), clear, "{value:?}");
            assert!(check_values(Version::HTTP_11, &headers).is_ok());
        }
    }

    #[test]
    fn trailers_do_not_frame_another_message() {
        let mut trailers =
            headers(&[(LENGTH, "5"), (LENGTH, "6"), ("host", "a"), ("grpc-status", "0"), ("x-end", "1")]);
        clean_trailers(&mut trailers);
        assert_eq!(trailers, headers(&[("grpc-status", "0"), ("x-end", "1")]));
    }
}
