//! Checks of what strangers send to the data plane: HTTP/1 heads and bodies, HTTP/2 frames, tunnels.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::codec::header_block::HeaderBlockProgress;
use super::codec::http1_validator::Http1Validator;
use super::codec::{HEAD_SIZE, HEADERS};
pub use super::tunnel::fuzzing::tunnel;
use crate::snapshot::Upgrades;

/// Sizes of the pieces in which bytes come.
const PIECES: [usize; 2] = [7, 1];

/// HTTP/1 requests: nobody reads others, or other bodies, than the codec behind [`Http1Validator`] does.
pub fn strict(bytes: &[u8]) {
    let whole = Judged::of(bytes, usize::MAX);
    let served = serve(&whole);
    assert!(served.len() <= whole.heads, "{} requests of {} heads", served.len(), whole.heads);
    for reader in READERS {
        let read = reader.read(bytes, served.len());
        assert_eq!(read.as_ref(), Some(&served), "{reader:?} reads other requests");
    }
    for piece in PIECES {
        let cut = Judged::of(bytes, piece);
        assert_eq!((cut.refused, serve(&cut)), (whole.refused, served.clone()), "in pieces of {piece}");
    }
}

/// What [`Http1Validator`] makes of a client's bytes.
struct Judged {
    through: Vec<u8>,
    piece: usize,
    refused: Option<&'static str>,
    /// Those that are complete, where that is known.
    heads: usize,
}

impl Judged {
    fn of(bytes: &[u8], piece: usize) -> Self {
        let mut strict = Http1Validator::default();
        let mut through = bytes.to_vec();
        through.chunks_mut(piece).for_each(|piece| strict.validate(piece));
        let refused = strict.refused();
        while refused.is_some() {
            match strict.rest() {
                b"" => break,
                rest => through.extend_from_slice(rest),
            }
        }
        let heads = strict.whole_requests().or(strict.begun_head()).map_or(usize::MAX, |heads| heads as usize);
        assert_eq!(refused.is_none(), through == bytes);
        Self { through, piece, refused, heads }
    }
}

/// The body of a request that came whole.
type Body = Vec<u8>;

/// The bodies of the requests that the codec reads whole.
fn serve(judged: &Judged) -> Vec<Body> {
    let bodies: Arc<Mutex<Vec<Body>>> = Arc::default();
    let service = service_fn(|request: Request<Incoming>| {
        let bodies = Arc::clone(&bodies);
        async move {
            // As our server: what follows was not looked at.
            let upgrades = Upgrades::default();
            let may =
                |line: &HeaderValue| line.as_bytes().split(|b| *b == b',').any(|it| upgrades.allow(it.trim_ascii()));
            let leaves = request.headers().get_all(UPGRADE).iter().any(may);
            // No request makes a tunnel here.
            let connects = request.method() == Method::CONNECT;
            let status = if connects { StatusCode::METHOD_NOT_ALLOWED } else { StatusCode::OK };
            if let Ok(body) = request.into_body().collect().await {
                bodies.lock().unwrap().push(body.to_bytes().to_vec());
            }
            let mut response = Response::new(Empty::<Bytes>::new());
            *response.status_mut() = status;
            if leaves {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let client = TokioIo::new(Client { bytes: &judged.through, piece: judged.piece });
    let mut http = http1::Builder::new();
    http.auto_date_header(false).header_read_timeout(None).max_headers(HEADERS).max_header_size(HEAD_SIZE);
    // Sends and reads are never pending, so that it ends by itself.
    let mut connection = pin!(http.half_close(true).serve_connection(client, service));
    let mut cx = Context::from_waker(Waker::noop());
    let ended = (0..=judged.through.len() * 4 + 64).any(|_| connection.as_mut().poll(&mut cx).is_ready());
    assert!(ended, "the codec waits for nothing");
    let mut bodies = bodies.lock().unwrap();
    std::mem::take(&mut *bodies)
}

/// Sends its bytes, takes everything and ends.
struct Client<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl AsyncRead for Client<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (now, later) = self.bytes.split_at(self.bytes.len().min(self.piece).min(to.remaining()));
        to.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Somebody else who reads the same bytes, and is lenient where RFC 9112 lets it be or where servers have been.
#[derive(Debug)]
struct Reader {
    /// A transfer coding beats a length.
    coding_first: bool,
    /// Of several lengths the last counts.
    last_length: bool,
    /// A space may stand before a colon.
    spaced_colon: bool,
    /// A line that begins with a space goes on with the one before.
    folds: bool,
}

const READERS: [Reader; 3] = [
    Reader { coding_first: true, last_length: false, spaced_colon: true, folds: false },
    Reader { coding_first: false, last_length: true, spaced_colon: true, folds: true },
    Reader { coding_first: true, last_length: true, spaced_colon: false, folds: true },
];

impl Reader {
    /// The bodies of so many requests; `None` where there are fewer.
    fn read(&self, mut bytes: &[u8], count: usize) -> Option<Vec<Body>> {
        let mut bodies = Vec::new();
        while bodies.len() < count {
            let mut line = take_line(&mut bytes)?;
            while line.is_empty() {
                line = take_line(&mut bytes)?;
            }
            let (length, chunked) = self.head(&mut bytes)?;
            bodies.push(if chunked && (self.coding_first || length.is_none()) {
                chunks(&mut bytes)?
            } else {
                take(&mut bytes, length.unwrap_or(0))?.to_vec()
            });
        }
        Some(bodies)
    }

    /// The length that a head gives, and whether it says that chunks follow.
    fn head(&self, bytes: &mut &[u8]) -> Option<(Option<usize>, bool)> {
        let mut lines: Vec<Vec<u8>> = Vec::new();
        loop {
            let line = take_line(bytes)?;
            match lines.last_mut() {
                _ if line.is_empty() => break,
                Some(last) if self.folds && matches!(line[0], b' ' | b'\t') => last.extend_from_slice(line),
                _ => lines.push(line.to_vec()),
            }
        }
        let (mut length, mut chunked) = (None, false);
        for line in &lines {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            let name = if self.spaced_colon { name.trim_ascii() } else { name };
            if name.eq_ignore_ascii_case(b"content-length") && (length.is_none() || self.last_length) {
                length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).or(length);
            }
            if name.eq_ignore_ascii_case(b"transfer-encoding") {
                chunked |= value.to_ascii_lowercase().windows(7).any(|word| word == b"chunked");
            }
        }
        Some((length, chunked))
    }
}

fn chunks(bytes: &mut &[u8]) -> Option<Body> {
    let mut body = Vec::new();
    loop {
        let line = take_line(bytes)?.trim_ascii();
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let size = usize::from_str_radix(std::str::from_utf8(&line[..digits]).ok()?, 16).ok()?;
        if size == 0 {
            while !take_line(bytes)?.is_empty() {}
            return Some(body);
        }
        body.extend_from_slice(take(bytes, size)?);
        take_line(bytes)?;
    }
}

/// A line without its end, which may be a bare LF.
fn take_line<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let line = take(bytes, end + 1)?;
    let line = &line[..end];
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

/// HTTP/2 frames: whether a header block is open does not depend on how they are cut.
pub fn blocks(bytes: &[u8]) {
    let preface = usize::from(bytes.first().copied().unwrap_or(0) % 32);
    for piece in [usize::MAX, 7, 1] {
        let mut blocks = HeaderBlockProgress::after(preface);
        let mut seen = 0;
        bytes.chunks(piece).for_each(|piece| {
            blocks.follow(piece);
            seen += piece.len();
            // Looking again at all that came is slow, so not after each byte of much.
            if bytes.len() <= 512 || seen == bytes.len() {
                assert_eq!(blocks.begun_head(), begun_head(&bytes[..seen], preface), "after {seen} bytes");
            }
        });
    }
}

/// The same, read from all that came.
fn begun_head(mut bytes: &[u8], preface: usize) -> Option<u64> {
    const HEADERS: u8 = 1;
    const CONTINUATION: u8 = 9;
    const END_HEADERS: u8 = 4;
    let (mut begun, mut open) = (0, false);
    let skipped = take(&mut bytes, preface);
    let mut frame = |bytes: &mut &[u8]| -> ControlFlow<()> {
        let Some(&[a, b, c, kind, flags, ..]) = take(bytes, 9) else { return ControlFlow::Break(()) };
        let is_block = matches!(kind, HEADERS | CONTINUATION);
        begun += u64::from(kind == HEADERS);
        open |= is_block;
        if take(bytes, u32::from_be_bytes([0, a, b, c]) as usize).is_none() {
            return ControlFlow::Break(());
        }
        if is_block {
            open = flags & END_HEADERS == 0;
        }
        ControlFlow::Continue(())
    };
    if skipped.is_some() {
        while frame(&mut bytes).is_continue() {}
    }
    open.then_some(begun)
}
