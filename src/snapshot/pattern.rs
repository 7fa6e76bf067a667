//! Regular expressions of config entries, which are written for RE2 and match a whole value.

use std::fmt::{self, Write};

use regex::bytes::{Regex, RegexBuilder};

/// Largest compiled pattern, in bytes. Matching takes linear time whatever the pattern.
const SIZE_LIMIT: usize = 4 << 20;

/// A compiled pattern. It must match the whole value, as in Envoy.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

/// The text is no regular expression, a too large one, or one that this dialect can't express.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadPattern(String);

impl Pattern {
    /// Compiles a pattern for header values and query parameters.
    ///
    /// # Errors
    /// When the text is not valid RE2 syntax, or is one of the few things that RE2 knows and this does not:
    /// octal escapes, `\C`, and ranges that begin or end with `-`.
    pub fn new(text: &str) -> Result<Self, BadPattern> {
        Self::compile(text, false)
    }

    /// Compiles a pattern for paths, where the two spellings of an escape (`%2f`, `%2F`) are the same.
    ///
    /// # Errors
    /// As [`Pattern::new`].
    pub fn for_path(text: &str) -> Result<Self, BadPattern> {
        Self::compile(text, true)
    }

    /// Bytes that are not UTF-8 count as one unknown character each run, so that they can't hide the rest
    /// of a value from `.`.
    #[must_use]
    pub fn matches(&self, value: &[u8]) -> bool {
        match std::str::from_utf8(value) {
            Ok(_) => self.regex.is_match(value),
            Err(_) => self.regex.is_match(String::from_utf8_lossy(value).as_bytes()),
        }
    }

    fn compile(text: &str, path: bool) -> Result<Self, BadPattern> {
        let bad = |cause: String| BadPattern(format!("{text:?} is not a usable regular expression: {cause}"));
        let translated = Translator::new(text, path).run().map_err(|cause| bad(cause.to_owned()))?;
        let build = |pattern: &str| RegexBuilder::new(pattern).size_limit(SIZE_LIMIT).build();
        // Compiled alone, too: `a)|(b` would otherwise close the group that the anchors stand around.
        build(&translated).map_err(|error| bad(error.to_string()))?;
        let regex = build(&format!(r"\A(?:{translated})\z")).map_err(|error| bad(error.to_string()))?;
        Ok(Self { text: text.to_owned(), regex })
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text && self.regex.as_str() == other.regex.as_str()
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

/// As it was written.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Rewrites what RE2 and the `regex` crate read differently: the classes `\d`, `\w`, `\s` and `\b` are
/// ASCII in RE2; inside brackets it knows no nesting (`[[a]`) and no set operations (`[a&&b]`); `\<` is a
/// plain character, `\Q…\E` a literal, and `{` one too where no count follows.
struct Translator<'a> {
    rest: &'a str,
    out: String,
    path: bool,
}

impl<'a> Translator<'a> {
    fn new(text: &'a str, path: bool) -> Self {
        Self { rest: text, out: String::with_capacity(text.len() * 2), path }
    }

    fn run(mut self) -> Result<String, &'static str> {
        while let Some(c) = self.next() {
            match c {
                '\\' => self.escape(),
                '[' => self.class()?,
                '{' if !is_count(self.rest) => self.out.push_str(r"\{"),
                '%' if self.path => self.percent(),
                _ => self.out.push(c),
            }
        }
        Ok(self.out)
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        Some(c)
    }

    fn escape(&mut self) {
        match self.next() {
            Some('Q') => self.quoted(),
            Some(c @ ('b' | 'B')) => {
                let _ = write!(self.out, r"(?-u:\{c})");
            }
            other => self.escaped(other),
        }
    }

    /// What is alike inside and outside of brackets.
    fn escaped(&mut self, c: Option<char>) {
        match c {
            Some('d') => self.out.push_str("[0-9]"),
            Some('D') => self.out.push_str("[^0-9]"),
            Some('w') => self.out.push_str("[0-9A-Za-z_]"),
            Some('W') => self.out.push_str("[^0-9A-Za-z_]"),
            Some('s') => self.out.push_str(r"[\t\n\x0C\r\x20]"),
            Some('S') => self.out.push_str(r"[^\t\n\x0C\r\x20]"),
            Some(c @ ('<' | '>')) => self.out.push(c),
            Some(c) => self.out.extend(['\\', c]),
            None => self.out.push('\\'),
        }
    }

    fn quoted(&mut self) {
        let (literal, rest) = self.rest.split_once(r"\E").unwrap_or((self.rest, ""));
        self.out.push_str(&regex::escape(literal));
        self.rest = rest;
    }

    /// An escaped octet of a path, in either case.
    fn percent(&mut self) {
        self.out.push('%');
        let Some(digits) = self.rest.get(..2).filter(|two| two.bytes().all(|b| b.is_ascii_hexdigit())) else {
            return;
        };
        for digit in digits.chars() {
            let _ = write!(self.out, "[{}{}]", digit.to_ascii_lowercase(), digit.to_ascii_uppercase());
        }
        self.rest = &self.rest[2..];
    }

    fn class(&mut self) -> Result<(), &'static str> {
        self.out.push('[');
        if self.rest.starts_with('^') {
            self.next();
            self.out.push('^');
        }
        if self.rest.starts_with(']') {
            self.next();
            self.out.push_str(r"\]");
        }
        while let Some(c) = self.next() {
            match c {
                ']' => {
                    self.out.push(']');
                    return Ok(());
                }
                '[' => self.posix_class(),
                '-' if self.rest.starts_with('-') => return Err("a range may not begin or end with '-'"),
                '&' | '~' => self.out.extend(['\\', c]),
                '\\' => {
                    let next = self.next();
                    self.escaped(next);
                }
                _ => self.out.push(c),
            }
        }
        Err("a class is not closed")
    }

    /// `[:alpha:]` and the like; any other bracket within brackets is a plain character.
    fn posix_class(&mut self) {
        let name = self.rest.strip_prefix(':').and_then(|rest| rest.split_once(":]")).map(|(name, _)| name);
        match name.filter(|name| name.trim_start_matches('^').bytes().all(|b| b.is_ascii_lowercase())) {
            Some(name) => {
                let _ = write!(self.out, "[:{name}:]");
                self.rest = &self.rest[name.len() + 3..];
            }
            None => self.out.push_str(r"\["),
        }
    }
}

/// Whether what follows a `{` makes it a repetition: `3}`, `3,}`, `3,5}`.
fn is_count(rest: &str) -> bool {
    let Some((count, _)) = rest.split_once('}') else { return false };
    let (low, high) = count.split_once(',').unwrap_or((count, ""));
    !low.is_empty() && low.bytes().chain(high.bytes()).all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pattern: &str, matching: &[&str], others: &[&str]) {
        let compiled = Pattern::new(pattern).unwrap();
        for value in matching {
            assert!(compiled.matches(value.as_bytes()), "{pattern} matches {value}");
        }
        for value in others {
            assert!(!compiled.matches(value.as_bytes()), "{pattern} does not match {value}");
        }
    }

    #[test]
    fn the_whole_value_must_match() {
        check("a|b", &["a", "b"], &["", "ab", "xa", "bx", "a\n"]);
        check("(?m)^a$", &["a"], &["a\nb", "b\na"]);
        check("/v[0-9]+/.*", &["/v1/", "/v12/x/y"], &["/v1", "/vx/", "x/v1/"]);
    }

    #[test]
    fn what_re2_reads_in_its_own_way_is_read_so() {
        check(r"\d+", &["12"], &["٣"]);
        check(r"\w", &["a", "_"], &["é"]);
        check(r"[\w.]+", &["a.b"], &["é"]);
        check(r"[^\d]", &["x", "é"], &["1"]);
        check(r"\s", &[" ", "\t"], &["\u{a0}", "\u{b}"]);
        check(r"\bé\B?a", &[], &["éa"]);
        check("[[a]", &["[", "a"], &["b"]);
        check("[a[b]]", &["a]", "[]", "b]"], &["a", "b"]);
        check("[a&&b]", &["a", "&", "b"], &["c"]);
        check("[]a]", &["]", "a"], &["b"]);
        check("[^]a]", &["b"], &["]", "a"]);
        check("[[:alpha:]-]+", &["a-b"], &["1"]);
        check("[[:alpha]", &["[", ":", "a"], &["b"]);
        check(r"\<b\>", &["<b>"], &["b"]);
        check("a{b}", &["a{b}"], &["ab"]);
        check("a{,2}", &["a{,2}"], &["aa"]);
        check("a{1,2}", &["a", "aa"], &["aaa"]);
        check(r"\Qa.b\E.", &["a.bc"], &["axbc"]);
        check("(?i)admin", &["ADMIN", "Admin"], &["admins"]);
    }

    #[test]
    fn bytes_that_are_no_text_hide_nothing() {
        let pattern = Pattern::new("admin.*").unwrap();
        assert!(pattern.matches(b"admin\xff"));
        assert!(pattern.matches(b"admin\xff\xfe x"));
        assert!(!pattern.matches(b"\xffadmin"));
    }

    #[test]
    fn escapes_in_a_path_have_two_spellings() {
        let pattern = Pattern::for_path("/a%2fb/%C3%a9").unwrap();
        assert!(pattern.matches(b"/a%2Fb/%C3%A9"));
        assert!(pattern.matches(b"/a%2fb/%c3%a9"));
        assert!(!pattern.matches(b"/a%2gb/%c3%a9"));
        assert!(!Pattern::new("%2f").unwrap().matches(b"%2F"));
    }

    #[test]
    fn what_can_not_be_read_is_refused() {
        for pattern in ["(", ")", "a)|(b", "[a", "a{3,1}", r"\1", "(?=a)", "*", "[+--]", r"\", "((a{999}){999}){999}"] {
            assert!(Pattern::new(pattern).is_err(), "{pattern}");
        }
    }
}
