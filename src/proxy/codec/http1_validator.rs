//! Refuses HTTP/1 requests that two parties could read in two ways, before the codec sees them.
//!
//! The codec is lenient in places (RFC 9112 lets it be): lines that end with a bare LF, a length beside a
//! transfer coding, a length said twice, spaces around chunk sizes. What it would make of them is sound, but
//! whoever stands behind us may make something else of the same bytes. So a request that is not written the
//! one way is refused: what follows the fault is replaced by bytes that the codec answers with 400, and in a
//! head, [`Http1Validator::rest`] follows, for the codec does not look at a head before it is complete.

use std::mem;

use crate::snapshot::Upgrades;

/// Follows the requests of one connection byte by byte.
#[derive(Debug, Default)]
pub(crate) struct Http1Validator {
    place: Place,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    head: Head,
    /// Heads that are complete.
    heads: u64,
    refused: Option<&'static str>,
    /// The bytes that replace everything behind the fault.
    poison: u8,
    /// The rest has been read.
    ended: bool,
    foreign: bool,
    /// Upgrades that the client may ask for.
    upgrades: Upgrades,
}

/// The part of a message that the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Place {
    /// A request line, or the empty line that some clients send before one.
    #[default]
    Start,
    Header,
    /// A body of so many more bytes.
    Length(u64),
    ChunkSize,
    /// A chunk with so many more bytes.
    Chunk(u64),
    /// The CR, then the LF, behind a chunk.
    ChunkCr,
    ChunkLf,
    Trailer,
    /// Whatever another protocol says: until the wire is released, or the connection closed.
    Upgraded,
}

/// The framing of the body, as read from the header lines so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Head {
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
}

/// Longest line that is validated, in bytes: the codec refuses heads of that size.
const LINE_LIMIT: usize = 64 * 1024;
const CHUNK_SIZE_LIMIT: usize = 256;

impl Http1Validator {
    /// For a client that may upgrade to these.
    #[must_use]
    pub(crate) fn new(upgrades: Upgrades) -> Self {
        Self { upgrades, ..Self::default() }
    }

    /// Why a request was refused. Nothing gets through after that.
    #[must_use]
    pub(crate) fn refused(&self) -> Option<&'static str> {
        self.refused
    }

    /// Whether the first line is of another protocol, which an answer in HTTP means nothing to. A broken preface
    /// of HTTP/2 is one (RFC 9113, 3.4).
    #[must_use]
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// The bytes to read after a refusal, whatever the client sends; then the end.
    pub(crate) fn rest(&mut self) -> &'static [u8] {
        if std::mem::replace(&mut self.ended, true) { b"" } else { b"\n\n" }
    }

    /// The number, from one on, of the request whose head has begun to come and is not complete.
    #[must_use]
    pub(crate) fn begun_head(&self) -> Option<u64> {
        let begun = self.place == Place::Header || (self.place == Place::Start && !self.line.is_empty());
        begun.then_some(self.heads + 1)
    }

    /// The number of requests that have come whole, if nothing of another has.
    #[must_use]
    pub(crate) fn whole_requests(&self) -> Option<u64> {
        (self.place == Place::Start && self.line.is_empty()).then_some(self.heads)
    }

    /// Whether more of a request's body is to come.
    #[must_use]
    pub(crate) fn awaits_body(&self) -> bool {
        !matches!(self.place, Place::Start | Place::Header | Place::Upgraded)
    }

    /// Looks at the bytes that come next and spoils them from the first fault on.
    pub(crate) fn validate(&mut self, bytes: &mut [u8]) {
        let mut at = 0;
        while at < bytes.len() && self.refused.is_none() {
            let waits_for_lf = self.line.last() == Some(&b'\r');
            match self.step(&bytes[at..]) {
                Ok(used) => at += used,
                Err(reason) => {
                    self.refused = Some(reason);
                    // A chunk extension may hold anything but an LF, and an LF ends it behind a CR.
                    self.poison = if self.place == Place::ChunkSize && !waits_for_lf { b'\n' } else { 0 };
                }
            }
        }
        if self.refused.is_some() {
            bytes[at..].fill(self.poison);
        }
    }

    /// Validates some of the bytes and returns how many.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        match self.place {
            Place::Start | Place::Header | Place::ChunkSize | Place::Trailer => self.step_line(bytes),
            Place::Length(left) => Ok(self.step_body(bytes, left, Place::Length, Place::Start)),
            Place::Chunk(left) => Ok(self.step_body(bytes, left, Place::Chunk, Place::ChunkCr)),
            Place::ChunkCr => self.step_byte(bytes, b'\r', Place::ChunkLf),
            Place::ChunkLf => self.step_byte(bytes, b'\n', Place::ChunkSize),
            Place::Upgraded => Ok(bytes.len()),
        }
    }

    fn step_body(&mut self, bytes: &[u8], left: u64, more: fn(u64) -> Place, done: Place) -> usize {
        let used = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let left = left - used as u64;
        self.place = if left == 0 { done } else { more(left) };
        used
    }

    fn step_byte(&mut self, bytes: &[u8], wanted: u8, next: Place) -> Result<usize, &'static str> {
        if bytes.first() != Some(&wanted) {
            return Err("a chunk is longer or shorter than its size");
        }
        self.place = next;
        Ok(1)
    }

    fn step_line(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let limit = if self.place == Place::ChunkSize { CHUNK_SIZE_LIMIT } else { LINE_LIMIT };
        if self.line.len() + end.unwrap_or(bytes.len()) > limit {
            return Err("a line is too long");
        }
        let Some(end) = end else {
            self.line.extend_from_slice(bytes);
            return Ok(bytes.len());
        };
        let begun = mem::take(&mut self.line);
        if begun.is_empty() {
            self.take_line(&bytes[..end])?;
        } else {
            self.take_line(&[&begun, &bytes[..end]].concat())?;
        }
        Ok(end + 1)
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), &'static str> {
        let line = line.strip_suffix(b"\r").ok_or("a line ends with a bare LF")?;
        if line.contains(&b'\r') {
            return Err("a CR stands alone");
        }
        self.place = match self.place {
            Place::Start if line.is_empty() => Place::Start,
            Place::Start => {
                self.foreign = self.heads == 0 && names_another_protocol(line);
                if !self.foreign {
                    check_request_line(line)?;
                }
                Place::Header
            }
            Place::Header if line.is_empty() => self.end_head(),
            Place::Header => {
                self.head.take(line, &self.upgrades)?;
                Place::Header
            }
            Place::ChunkSize => match chunk_size(line)? {
                0 => Place::Trailer,
                size => Place::Chunk(size),
            },
            Place::Trailer if line.is_empty() => Place::Start,
            place => place,
        };
        Ok(())
    }

    fn end_head(&mut self) -> Place {
        self.heads += 1;
        match mem::take(&mut self.head) {
            Head { upgrade: true, .. } => Place::Upgraded,
            Head { chunked: true, .. } => Place::ChunkSize,
            Head { length: None | Some(0), .. } => Place::Start,
            Head { length: Some(length), .. } => Place::Length(length),
        }
    }
}

impl Head {
    /// Takes in one header line. Names and values as such are the codec's to check.
    fn take(&mut self, line: &[u8], upgrades: &Upgrades) -> Result<(), &'static str> {
        // Nearly all names differ in their first letter.
        if !matches!(line.first(), Some(b'c' | b'C' | b't' | b'T' | b'u' | b'U')) {
            return Ok(());
        }
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().unwrap_or_default();
        let value = parts.next().unwrap_or_default().trim_ascii();
        if name.eq_ignore_ascii_case(b"content-length") {
            if self.length.is_some() || self.chunked {
                return Err("the length of the body is given twice");
            }
            self.length = Some(decimal(value).ok_or("content-length is no number")?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.length.is_some() || self.chunked {
                return Err("the length of the body is given twice");
            }
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err("transfer-encoding is not chunked");
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            // Of what it may not upgrade to nothing is forwarded, so that such a client goes on with HTTP/1.
            self.upgrade |= value.split(|byte| *byte == b',').any(|protocol| upgrades.allow(protocol.trim_ascii()));
        }
        Ok(())
    }
}

/// Whether a line has three words, as a request line does, of which the last is no version of HTTP.
fn names_another_protocol(line: &[u8]) -> bool {
    let mut words = line.split(|byte| *byte == b' ');
    let version = words.nth(2);
    words.next().is_none() && version.is_some_and(|version| !version.starts_with(b"HTTP/"))
}

/// A method, a target and a version with a space between each (RFC 9112, 3). What a target may hold is what Envoy takes.
fn check_request_line(line: &[u8]) -> Result<(), &'static str> {
    let mut words = line.splitn(3, |byte| *byte == b' ');
    let (_, target) = (words.next(), words.next().unwrap_or_default());
    let version = words.next().ok_or("the request line has no version")?;
    if target.is_empty() {
        return Err("the request line has no target");
    }
    if target.contains(&b'#') {
        return Err("the request target has a fragment");
    }
    if !target.iter().all(u8::is_ascii_graphic) {
        return Err("the request target has a byte that is not printable ASCII");
    }
    if version.contains(&b' ') {
        return Err("the request target has a space");
    }
    if !matches!(version, b"HTTP/1.1" | b"HTTP/1.0") {
        return Err("the version is neither HTTP/1.1 nor HTTP/1.0");
    }
    Ok(())
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The size before a chunk, with extensions or without (RFC 9112, 7.1).
fn chunk_size(line: &[u8]) -> Result<u64, &'static str> {
    const BAD: &str = "a chunk size is no number";
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
    if digits.is_empty() || digits.len() > 16 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(BAD);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| BAD)?;
    u64::from_str_radix(digits, 16).map_err(|_| BAD)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes as they come through in pieces of a size, and why they were refused.
    fn judged(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<&'static str>) {
        let mut strict = Http1Validator::default();
        let mut through = bytes.to_vec();
        through.chunks_mut(piece).for_each(|piece| strict.validate(piece));
        (through, strict.refused())
    }

    fn refusal(request: &str) -> Option<&'static str> {
        let (through, refused) = judged(request.as_bytes(), usize::MAX);
        assert_eq!(refused.is_none(), through == request.as_bytes(), "{request:?}");
        refused
    }

    #[test]
    fn clear_requests_go_through_one_after_the_other() {
        let head = "POST / HTTP/1.1\r\nHost: a\r\n";
        let requests = [
            format!("{head}\r\n"),
            format!("\r\n{head}content-length:  5 \r\n\r\n\n\r\n\n\n"),
            format!(
                "{head}Transfer-Encoding: CHUNKED\r\n\r\n5;a=\"b\"\r\n\n\r\n\n\n\r\n0a\r\n0123456789\r\n0\r\nX: 1\r\n\r\n"
            ),
            format!("{head}Content-Length: 0\r\n\r\n"),
            format!("{head}Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"),
        ];
        assert_eq!(refusal(&requests.concat()), None);
        assert!(refusal(&format!("{}GET / HTTP/1.1\n", requests.concat())).is_some());
    }

    #[test]
    fn what_follows_an_upgrade_is_not_looked_at() {
        for protocols in ["websocket", "WebSocket", "h2c, websocket"] {
            assert_eq!(
                refusal(&format!("GET / HTTP/1.1\r\nUpgrade: {protocols}\r\n\r\n\n\n\r\r")),
                None,
                "{protocols}"
            );
        }
    }

    #[test]
    fn what_follows_an_upgrade_that_is_not_forwarded_is_a_request() {
        for protocols in ["h2c", "TLS/1.2", "chat", "websockets", ""] {
            let request = format!("GET / HTTP/1.1\r\nUpgrade: {protocols}\r\n\r\nGET / HTTP/1.1\n");
            assert!(refusal(&request).is_some(), "{protocols}");
        }
        let mut named = Http1Validator::new(Upgrades::new(["chat".to_owned()]));
        named.validate(&mut b"GET / HTTP/1.1\r\nUpgrade: chat/2\r\n\r\n\n".to_vec());
        assert_eq!(named.refused(), None);
    }

    #[test]
    fn a_target_is_what_envoy_takes_for_one() {
        for byte in 0..=255 {
            let line = [b"GET /a", &[byte][..], b"?", &[byte], b"b HTTP/1.1\r\n"].concat();
            let refused = judged(&line, usize::MAX).1;
            assert_eq!(refused.is_none(), matches!(byte, b'!' | b'"' | b'$'..=b'~'), "{byte:#x} {refused:?}");
        }
        for line in [
            "GET /",
            "GET / ",
            "GET / HTTP/1.2",
            "GET / http/1.1",
            "GET  HTTP/1.1",
            "GET / x HTTP/1.1",
            "GET /  HTTP/1.1",
        ] {
            assert!(refusal(&format!("GET / HTTP/1.1\r\n\r\n{line}\r\n")).is_some(), "{line}");
        }
    }

    #[test]
    fn nothing_after_a_fault_gets_through() {
        let (through, refused) = judged(b"GET / HTTP/1.1\r\nA: b\nHost: a\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n", 7);
        assert!(refused.is_some() && !String::from_utf8_lossy(&through).contains("smuggled"));
        let mut strict = Http1Validator::default();
        strict.validate(&mut b"\n".to_vec());
        assert_eq!((strict.rest(), strict.rest()), (&b"\n\n"[..], &b""[..]));
    }

    #[test]
    fn a_head_is_begun_until_its_last_byte() {
        let mut strict = Http1Validator::default();
        strict.validate(&mut b"GET / HTTP/1.1\r\n\r\n".to_vec());
        assert_eq!(strict.begun_head(), None);
        strict.validate(&mut b"GE".to_vec());
        assert_eq!(strict.begun_head(), Some(2));
        strict.validate(&mut b"T / HTTP/1.1\r\nHost: a\r\n".to_vec());
        assert_eq!(strict.begun_head(), Some(2));
        strict.validate(&mut b"\r\n".to_vec());
        assert_eq!(strict.begun_head(), None);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_bytes_are_cut(
            parts in prop::collection::vec(prop::sample::select(&PARTS[..]), 0..24),
            piece in 1usize..40,
        ) {
            let bytes = parts.concat();
            let whole = judged(bytes.as_bytes(), usize::MAX);
            let cut = judged(bytes.as_bytes(), piece);
            prop_assert_eq!(whole.1, cut.1);
            if whole.1.is_none() {
                prop_assert_eq!(whole.0, cut.0);
            }
        }
    }

    const PARTS: [&str; 18] = [
        "GET / HTTP/1.1\r\n",
        "Host: a\r\n",
        "\r\n",
        "\r",
        "\n",
        "Content-Length: 3\r\n",
        "content-length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "abc",
        "3\r\n",
        "0\r\n",
        "3;x=y\r\n",
        " ",
        "Upgrade: websocket\r\n",
        "X-A: b\r\n",
        "fff\r\n",
        "\0",
        "transfer-encoding : chunked\r\n",
    ];
}
