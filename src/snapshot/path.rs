//! One spelling for each path, so that no other spelling gets round a rule.
//!
//! [`Normalization::path`] does what Envoy 1.40 does under Consul 1.22 and a little more, marked below. The
//! result is what rules see and what the app receives, and normalising it again changes nothing. The crate `percent-encoding` decodes every
//! escape; here most stay, and which ones is what rules depend on.

use std::borrow::Cow;

use http::HeaderMap;

/// `RequestNormalization` of the mesh config entry. Paths are normalised unless it says otherwise,
/// whatever Consul's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Normalization {
    /// Not `InsecureDisablePathNormalization`.
    pub path: bool,
    pub merge_slashes: bool,
    pub escaped_slashes: EscapedSlashes,
    pub underscores: Underscores,
}

/// `PathWithEscapedSlashesAction`: what to do about `%2F` and `%5C`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    #[default]
    Keep,
    Reject,
    Redirect,
    Forward,
}

/// `HeadersWithUnderscoresAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Underscores {
    #[default]
    Allow,
    Reject,
    Drop,
}

/// The result of normalising a request's path. Texts are path and query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NormalPath<'a> {
    Forward(Cow<'a, str>),
    /// Answer 307 with this location.
    Redirect(String),
}

/// A request that is answered with 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Neither begins with `/` nor is `*`.
    #[error("the path does not begin with a slash")]
    NotAbsolute,
    /// A control character, a space or a `#`.
    #[error("the path has a character that paths can't have")]
    BadCharacter,
    #[error("the path has an escaped NUL")]
    EscapedNul,
    #[error("the path has an escaped slash")]
    EscapedSlash,
    #[error("a header's name has an underscore")]
    Underscore,
}

impl Default for Normalization {
    fn default() -> Self {
        Self {
            path: true,
            merge_slashes: false,
            escaped_slashes: EscapedSlashes::default(),
            underscores: Underscores::default(),
        }
    }
}

impl Normalization {
    /// Targets go on as they came.
    pub const NONE: Self = Self {
        path: false,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Keep,
        underscores: Underscores::Allow,
    };

    /// Normalises the path of a request target in origin form. The query is left as it is.
    ///
    /// Dot segments are resolved (also with path parameters, `..;x`), `\` is `/`, escapes of unreserved
    /// characters are decoded, characters that a path can't hold are escaped, and so is a `%` that would begin
    /// an escape only after decoding (`%%36%31`). Beyond Envoy: the escapes that stay are in upper case (RFC
    /// 3986, 6.2.2.1), and a dot segment with parameters is one in every spelling.
    ///
    /// # Errors
    /// The request is to be refused.
    pub fn path<'a>(&self, target: &'a str) -> Result<NormalPath<'a>, BadRequest> {
        if target.bytes().any(|b| b.is_ascii_control() || matches!(b, b' ' | b'#')) {
            return Err(BadRequest::BadCharacter);
        }
        let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
        if path == "*" {
            return Ok(NormalPath::Forward(Cow::Borrowed(target)));
        }
        if !path.starts_with('/') {
            return Err(BadRequest::NotAbsolute);
        }
        if self.is_normal(path) {
            return Ok(NormalPath::Forward(Cow::Borrowed(target)));
        }
        let decoded = self.decode(path)?;
        let mut normal = if self.path { resolve_dots(&decoded.path) } else { decoded.path };
        if self.merge_slashes {
            merge_slashes(&mut normal);
        }
        if decoded.unescaped_slash && self.escaped_slashes == EscapedSlashes::Redirect {
            return Ok(NormalPath::Redirect(location(&normal, query)));
        }
        Ok(NormalPath::Forward(Cow::Owned(normal + query)))
    }

    /// Refuses or drops headers with `_` in their name, as asked for.
    ///
    /// # Errors
    /// The request is to be refused.
    pub fn headers(&self, headers: &mut HeaderMap) -> Result<(), BadRequest> {
        let bad = |headers: &HeaderMap| headers.keys().find(|name| name.as_str().contains('_')).cloned();
        match self.underscores {
            Underscores::Allow => Ok(()),
            Underscores::Reject => bad(headers).map_or(Ok(()), |_| Err(BadRequest::Underscore)),
            Underscores::Drop => {
                while let Some(name) = bad(headers) {
                    headers.remove(name);
                }
                Ok(())
            }
        }
    }

    /// Whether nothing is to be done, which is so for nearly all paths.
    fn is_normal(&self, path: &str) -> bool {
        if !self.path && !self.merge_slashes && self.escaped_slashes == EscapedSlashes::Keep {
            return true;
        }
        let plain = path.bytes().all(|b| b != b'%' && (!self.path || (b != b'\\' && !is_escaped_in_paths(b))));
        plain && !(self.path && path.contains("/.")) && !(self.merge_slashes && path.contains("//"))
    }

    fn decode(&self, path: &str) -> Result<Decoded, BadRequest> {
        let mut decoder = Decoder::default();
        let mut rest = path.as_bytes();
        while let Some((&byte, tail)) = rest.split_first() {
            rest = tail;
            match (byte, escaped_octet(byte, tail)) {
                (_, Some(octet)) => {
                    rest = &tail[2..];
                    self.escape(&mut decoder, octet, &tail[..2])?;
                }
                _ if !self.path => decoder.out.push(byte),
                _ => decoder.plain(byte),
            }
        }
        Ok(decoder.finish())
    }

    fn escape(&self, decoder: &mut Decoder, octet: u8, digits: &[u8]) -> Result<(), BadRequest> {
        let slash = matches!(octet, b'/' | b'\\');
        match self.escaped_slashes {
            EscapedSlashes::Reject if slash => return Err(BadRequest::EscapedSlash),
            EscapedSlashes::Redirect | EscapedSlashes::Forward if slash => {
                decoder.unescaped_slash = true;
                decoder.out.push(if self.path { b'/' } else { octet });
            }
            _ if !self.path => decoder.out.extend([b'%', digits[0], digits[1]]),
            _ if octet == 0 => return Err(BadRequest::EscapedNul),
            _ => decoder.octet(octet),
        }
        Ok(())
    }
}

impl EscapedSlashes {
    /// Reads the setting. What is not known rejects: it was meant to be strict about something.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "" | "IMPLEMENTATION_SPECIFIC_DEFAULT" | "KEEP_UNCHANGED" => Self::Keep,
            "UNESCAPE_AND_REDIRECT" => Self::Redirect,
            "UNESCAPE_AND_FORWARD" => Self::Forward,
            _ => Self::Reject,
        }
    }
}

impl Underscores {
    /// As [`EscapedSlashes::parse`].
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "" | "ALLOW" => Self::Allow,
            "DROP_HEADER" => Self::Drop,
            _ => Self::Reject,
        }
    }
}

/// A path of a rule, in the spelling that requests have after normalisation. Dot segments and slashes
/// stay, as the text may be but the beginning of a path.
pub(super) fn canonical_rule(text: &str) -> String {
    let mut decoder = Decoder::default();
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match escaped_octet(byte, tail) {
            Some(octet) => {
                rest = &tail[2..];
                decoder.octet(octet);
            }
            None => decoder.plain(byte),
        }
    }
    decoder.finish().path
}

/// The laxest reading of a path: all escapes decoded, `\` as `/`, path parameters (`;…`) cut off, slashes merged. An
/// app that reads paths so would reach something else than the normalised path says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LaxPath<'a> {
    pub(super) path: Cow<'a, [u8]>,
    /// Dot segments come to light: the destination of such a path is not known.
    pub(super) hides_dots: bool,
}

impl<'a> LaxPath<'a> {
    pub(super) fn as_written(path: &'a str) -> Self {
        Self { path: Cow::Borrowed(path.as_bytes()), hides_dots: false }
    }
}

pub(super) fn lax(path: &str) -> LaxPath<'_> {
    let special = path.bytes().any(|b| matches!(b, b'%' | b';' | b'\\')) || path.contains("//") || path.contains("/.");
    if !special {
        return LaxPath::as_written(path);
    }
    let decoded = decode_all(path);
    let mut segments = decoded.split(|b| matches!(b, b'/' | b'\\')).map(name_of).peekable();
    let mut lax = LaxPath { path: Cow::Owned(Vec::with_capacity(decoded.len())), hides_dots: false };
    let out = lax.path.to_mut();
    while let Some(name) = segments.next() {
        lax.hides_dots |= matches!(name, b"." | b"..");
        out.extend_from_slice(name);
        if segments.peek().is_some() && out.last() != Some(&b'/') {
            out.push(b'/');
        }
    }
    lax
}

/// Takes decoded and plain bytes and writes them as a normalised path has them.
#[derive(Default)]
struct Decoder {
    out: Vec<u8>,
    /// Where in `out` a `%` stands that began no escape in the original.
    lone_percents: Vec<usize>,
    unescaped_slash: bool,
}

struct Decoded {
    path: String,
    unescaped_slash: bool,
}

impl Decoder {
    fn octet(&mut self, octet: u8) {
        if octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'.' | b'_' | b'~') {
            self.out.push(octet);
        } else {
            self.escaped(octet);
        }
    }

    fn plain(&mut self, byte: u8) {
        match byte {
            b'%' => {
                self.lone_percents.push(self.out.len());
                self.out.push(b'%');
            }
            b'\\' => self.out.push(b'/'),
            _ if is_escaped_in_paths(byte) => self.escaped(byte),
            _ => self.out.push(byte),
        }
    }

    fn escaped(&mut self, octet: u8) {
        const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
        self.out.extend([b'%', DIGITS[usize::from(octet >> 4)], DIGITS[usize::from(octet & 15)]]);
    }

    /// Escapes each lone `%` that decoding has put in front of two hexadecimal digits.
    fn finish(mut self) -> Decoded {
        for &at in self.lone_percents.iter().rev() {
            if escaped_octet(b'%', &self.out[at + 1..]).is_some() {
                self.out.splice(at..=at, *b"%25");
            }
        }
        let path = String::from_utf8(self.out).unwrap_or_else(|bad| String::from_utf8_lossy(bad.as_bytes()).into());
        Decoded { path, unescaped_slash: self.unescaped_slash }
    }
}

/// The octet that `%` and the two digits at the start of `tail` stand for.
fn escaped_octet(byte: u8, tail: &[u8]) -> Option<u8> {
    let digit = |index: usize| char::from(*tail.get(index)?).to_digit(16);
    if byte != b'%' {
        return None;
    }
    u8::try_from(digit(0)? * 16 + digit(1)?).ok()
}

/// Characters that Envoy escapes in a path, and what is not ASCII.
fn is_escaped_in_paths(byte: u8) -> bool {
    !byte.is_ascii_graphic() || matches!(byte, b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}')
}

/// RFC 3986, 5.2.4. A segment's parameters do not keep it from being a dot segment.
fn resolve_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_in_dots = false;
    for segment in path.split('/').skip(1) {
        let name = segment.split(';').next().unwrap_or_default();
        ends_in_dots = matches!(name, "." | "..");
        match name {
            "." => {}
            ".." => drop(kept.pop()),
            _ => kept.push(segment),
        }
    }
    if ends_in_dots {
        kept.push("");
    }
    kept.iter().fold(String::with_capacity(path.len()), |path, segment| path + "/" + segment)
}

fn merge_slashes(path: &mut String) {
    let mut last = '\0';
    path.retain(|c| {
        let keep = c != '/' || last != '/';
        last = c;
        keep
    });
}

/// Of several slashes at the beginning one stays: `//host/` in a `Location` leads to another host.
fn location(path: &str, query: &str) -> String {
    format!("/{}{query}", path.trim_start_matches('/'))
}

fn decode_all(path: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        match escaped_octet(byte, tail) {
            Some(octet) => {
                out.push(octet);
                rest = &tail[2..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// A segment without its parameters.
fn name_of(segment: &[u8]) -> &[u8] {
    segment.split(|b| *b == b';').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEEP: Normalization = Normalization {
        path: true,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Keep,
        underscores: Underscores::Allow,
    };
    const FORWARD: Normalization = Normalization { escaped_slashes: EscapedSlashes::Forward, ..KEEP };
    const REDIRECT: Normalization = Normalization { escaped_slashes: EscapedSlashes::Redirect, ..KEEP };
    const REJECT: Normalization = Normalization { escaped_slashes: EscapedSlashes::Reject, ..KEEP };
    const MERGE: Normalization = Normalization { merge_slashes: true, ..KEEP };
    const RAW: Normalization = Normalization { path: false, ..KEEP };

    fn check(settings: Normalization, cases: &[(&str, &str)]) {
        for (target, expected) in cases {
            let got = match settings.path(target) {
                Ok(NormalPath::Forward(path)) => path.into_owned(),
                Ok(NormalPath::Redirect(location)) => format!("-> {location}"),
                Err(refusal) => format!("{refusal:?}"),
            };
            assert_eq!(&got, expected, "{target} under {settings:?}");
        }
    }

    #[test]
    fn paths_get_one_spelling() {
        check(
            KEEP,
            &[
                ("/", "/"),
                ("/a/../b", "/b"),
                ("/../../n/", "/n/"),
                ("/a/..", "/"),
                ("/a/.", "/a/"),
                ("/a/%2e%2E/b", "/b"),
                ("/a//../b", "/a/b"),
                ("/a//b", "/a//b"),
                ("/a\\b", "/a/b"),
                ("/..\\x", "/x"),
                ("/a%5cb", "/a%5Cb"),
                ("/a%2fb", "/a%2Fb"),
                ("/%61dmin", "/admin"),
                ("/%2d%5F%2e%7E", "/-_.~"),
                ("/a/..%2fb", "/a/..%2Fb"),
                ("/%25", "/%25"),
                ("/%2561dmin", "/%2561dmin"),
                ("/a/../b?x=%61/../", "/b?x=%61/../"),
                ("/a?", "/a?"),
                ("/\"<>^`{|}", "/%22%3C%3E%5E%60%7B%7C%7D"),
                ("/!$&'()*+,;=:@[]", "/!$&'()*+,;=:@[]"),
                ("/...", "/..."),
                // As it comes over HTTP/2, and as Envoy has it.
                ("/é?é", "/%C3%A9?é"),
                ("*", "*"),
            ],
        );
    }

    #[test]
    fn parameters_do_not_hide_dot_segments() {
        check(
            KEEP,
            &[
                ("/a/..;/b", "/b"),
                ("/a/..;x=1/b", "/b"),
                ("/a/.;/b", "/a/b"),
                ("/a/..;", "/"),
                ("/a/%2e%2e;/b", "/b"),
                ("/a;x/b", "/a;x/b"),
                ("/a/x..;/b", "/a/x..;/b"),
            ],
        );
    }

    #[test]
    fn a_percent_sign_makes_no_new_escape() {
        check(KEEP, &[("/%", "/%"), ("/%zz", "/%zz"), ("/%2", "/%2"), ("/100%?x", "/100%?x")]);
        check(KEEP, &[("/%%36%31dmin", "/%2561dmin"), ("/%%36%31%%36%31", "/%2561%2561")]);
        check(FORWARD, &[("/a%%32fb", "/a%252fb"), ("/a%25%32%66b", "/a%252fb")]);
    }

    #[test]
    fn slashes_are_merged_if_asked_for() {
        check(
            MERGE,
            &[("//", "/"), ("/a///b////c", "/a/b/c"), ("/a//../b", "/a/b"), ("//h/../a", "/a"), ("/?//", "/?//")],
        );
    }

    #[test]
    fn escaped_slashes_are_dealt_with_as_asked_for() {
        let paths = ["/a%2Fb", "/a%5cb?x=%2f", "/a%2f..%2fb", "/a/%2e%2e%2fb", "/%2f%2fevil.com/", "/a//b"];
        let table = |expected: [&'static str; 6]| paths.into_iter().zip(expected).collect::<Vec<_>>();
        check(
            REJECT,
            &table(["EscapedSlash", "EscapedSlash", "EscapedSlash", "EscapedSlash", "EscapedSlash", "/a//b"]),
        );
        check(FORWARD, &table(["/a/b", "/a/b?x=%2f", "/b", "/b", "///evil.com/", "/a//b"]));
        // Envoy would redirect to `///evil.com/`, which browsers take for another host.
        check(REDIRECT, &table(["-> /a/b", "-> /a/b?x=%2f", "-> /b", "-> /b", "-> /evil.com/", "/a//b"]));
    }

    #[test]
    fn without_normalisation_only_escaped_slashes_and_merging_count() {
        check(RAW, &[("/a/../%61%00?x", "/a/../%61%00?x"), ("/a%2fb", "/a%2fb"), ("/a\\b", "/a\\b")]);
        let raw = Normalization { merge_slashes: true, escaped_slashes: EscapedSlashes::Forward, ..RAW };
        check(raw, &[("/a%5c..%2Fb//c", "/a\\../b/c")]);
    }

    #[test]
    fn what_is_no_path_is_refused() {
        check(KEEP, &[("", "NotAbsolute"), ("a/b", "NotAbsolute"), ("\\a", "NotAbsolute"), ("?x", "NotAbsolute")]);
        check(
            KEEP,
            &[
                ("/a b", "BadCharacter"),
                ("/a#b", "BadCharacter"),
                ("/a?#", "BadCharacter"),
                ("/\u{7f}", "BadCharacter"),
            ],
        );
        check(KEEP, &[("/a%00b", "EscapedNul"), ("/a?%00", "/a?%00")]);
    }

    #[test]
    fn headers_with_underscores_are_dealt_with_as_asked_for() {
        let mut headers = HeaderMap::new();
        for name in ["x_role", "x-role", "a_b_c"] {
            headers.append(name, http::HeaderValue::from_static("admin"));
        }
        assert_eq!(KEEP.headers(&mut headers), Ok(()));
        assert_eq!(headers.len(), 3);
        let reject = Normalization { underscores: Underscores::Reject, ..KEEP };
        assert_eq!(reject.headers(&mut headers), Err(BadRequest::Underscore));
        assert_eq!(Normalization { underscores: Underscores::Drop, ..KEEP }.headers(&mut headers), Ok(()));
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-role"]);
        assert_eq!(reject.headers(&mut headers), Ok(()));
    }

    fn settings() -> impl Strategy<Value = Normalization> {
        let slashes = prop_oneof![
            Just(EscapedSlashes::Keep),
            Just(EscapedSlashes::Forward),
            Just(EscapedSlashes::Redirect),
            Just(EscapedSlashes::Reject)
        ];
        (any::<bool>(), any::<bool>(), slashes).prop_map(|(path, merge_slashes, escaped_slashes)| Normalization {
            path,
            merge_slashes,
            escaped_slashes,
            underscores: Underscores::Allow,
        })
    }

    /// Paths out of the pieces that spellings differ in.
    fn hostile_path() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "/", "/", "a", "admin", ".", "..", "%2e", "%2E", "%2f", "%5C", "\\", "%", "%25", "2", "5", "6", "1", "e",
            "F", "%61", "%36", "%31", ";", "%3b", "//", "%00", "%C3", "\"", "|", "~", "%7e", "*", "[",
        ]);
        prop::collection::vec(piece, 0..16).prop_map(|pieces| format!("/{}", pieces.concat()))
    }

    proptest! {
        #[test]
        fn normalising_again_changes_nothing(settings in settings(), path in hostile_path(), query in "(\\?[a-z%/.]{0,5})?") {
            if let Ok(NormalPath::Forward(once)) = settings.path(&(path + &query)) {
                prop_assert_eq!(settings.path(&once), Ok(NormalPath::Forward(Cow::Borrowed(&*once))));
            }
        }

        #[test]
        fn a_normalised_path_has_no_dot_segment_and_no_needless_escape(path in hostile_path()) {
            if let Ok(NormalPath::Forward(normal)) = KEEP.path(&path) {
                for segment in normal.split('/') {
                    let name = segment.split(';').next().unwrap_or_default();
                    prop_assert!(name != "." && name != "..", "{} in {}", segment, normal);
                }
                for (at, _) in normal.match_indices('%') {
                    let octet = escaped_octet(b'%', &normal.as_bytes()[at + 1..]);
                    let needless = octet.is_some_and(|o| o.is_ascii_alphanumeric() || b"-._~".contains(&o));
                    prop_assert!(!needless, "{}", normal);
                }
                prop_assert!(!normal.contains('\\'));
            }
        }

        #[test]
        fn what_the_laxest_app_would_reach_is_the_path_or_known_to_hide_dots(path in hostile_path()) {
            if let Ok(NormalPath::Forward(normal)) = (Normalization { merge_slashes: true, ..FORWARD }).path(&path) {
                let seen = lax(&normal);
                let decoded = String::from_utf8_lossy(&seen.path);
                prop_assert!(seen.hides_dots || !decoded.split('/').any(|s| s == "." || s == ".."), "{}", decoded);
            }
        }
    }
}
