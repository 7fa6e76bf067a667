//! Asks an admin server: one request, one answer, bounded in time and size.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_util::either::Either;

use crate::telemetry::escape;

/// Timeout of a request, from the connection to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer, in bytes; a sidecar with a thousand upstreams answers with a few million.
const LARGEST: usize = 64 * 1024 * 1024;

/// Longest part of an error text of a server that is shown, in characters.
const SHOWN_TEXT: usize = 300;

/// The address of an admin server.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// The answer of an admin server.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
}

impl Address {
    /// Reads `host:port`, a port of this host, `unix:///path`, or the address of the dashboard as a browser shows it.
    ///
    /// # Errors
    /// When it is none of them, with what to write.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        if let Some(path) = text.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
            return Ok(Self::Unix(path.into()));
        }
        let rest = text.strip_prefix("http://").map_or(text, |rest| rest.trim_end_matches('/'));
        let (host, port) = rest.rsplit_once(':').unwrap_or(("", rest));
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let host = if bare.is_empty() { "127.0.0.1" } else { bare };
        match port.parse() {
            Ok(port) if port > 0 && !host.contains('/') => Ok(Self::Tcp(host.to_owned(), port)),
            _ => bail!("{text:?} is no address of an admin server: write host:port, port or unix:///path"),
        }
    }

    /// Asks for a path with a query, by GET.
    ///
    /// # Errors
    /// When there is no answer; a sentence that says what to do next.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<Answer> {
        block_on(self.request(path))?
    }

    /// # Errors
    /// As of [`Self::get`].
    pub(super) async fn request(&self, path: &str) -> anyhow::Result<Answer> {
        let answer = timeout(TIMEOUT, self.exchange(path)).await;
        answer.with_context(|| {
            format!(
                "the sidecar at {self} did not answer within {TIMEOUT:?}: it hangs, or something else listens there"
            )
        })?
    }

    async fn exchange(&self, path: &str) -> anyhow::Result<Answer> {
        let stream = self.connect().await.map_err(|error| self.unreachable(&error))?;
        let other = || format!("the program at {self} does not answer as an admin server does: check the address");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(other)?;
        // The server refuses other names than its own: a page of a browser could have been led there (DNS rebinding).
        let request = Request::get(path).header(http::header::HOST, "localhost");
        let request = request.body(Empty::<Bytes>::new()).context("the request cannot be built")?;
        let exchange = async move {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, LARGEST).collect().await.map_err(anyhow::Error::from_boxed)?;
            anyhow::Ok(Answer { status: head.status, body: body.to_bytes() })
        };
        // The connection ends when its sender does.
        let (answer, _) = tokio::join!(exchange, connection);
        answer.with_context(other)
    }

    async fn connect(&self) -> io::Result<Either<TcpStream, UnixStream>> {
        Ok(match self {
            Self::Tcp(host, port) => Either::Left(TcpStream::connect((host.as_str(), *port)).await?),
            Self::Unix(path) => Either::Right(UnixStream::connect(path).await?),
        })
    }

    fn unreachable(&self, error: &io::Error) -> anyhow::Error {
        let next = match error.kind() {
            io::ErrorKind::PermissionDenied => "run this as the user of the sidecar, or as root",
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                "no sidecar runs with this -admin-bind; `lictor status` without -admin shows those of this host"
            }
            _ => "check the address",
        };
        anyhow::anyhow!("can't connect to the admin server at {self} ({error}): {next}")
    }
}

/// As it is written in `-admin` and `-admin-bind`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{}]:{port}", escape(host)),
            Self::Tcp(host, port) => write!(f, "{}:{port}", escape(host)),
            Self::Unix(path) => write!(f, "unix://{}", escape(&path.to_string_lossy())),
        }
    }
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none, or the status is not 200: what the server said.
    pub(super) fn json(&self) -> anyhow::Result<Value> {
        self.ok()?;
        serde_json::from_slice(&self.body).context("the answer is no JSON: is this an admin server of lictor?")
    }

    /// # Errors
    /// When the status is not 200: what the server said.
    pub(super) fn ok(&self) -> anyhow::Result<()> {
        if self.status == StatusCode::OK {
            return Ok(());
        }
        // Another program may answer with a page of any length.
        let text = String::from_utf8_lossy(&self.body[..self.body.len().min(4 * SHOWN_TEXT)]);
        let message: String = text.trim().chars().take(SHOWN_TEXT).collect();
        match message.as_str() {
            "" => bail!("the answer is {}: is this an admin server of lictor?", self.status),
            message => bail!("{}", escape(message)),
        }
    }
}

/// A path with its query.
pub(super) fn url(path: &str, query: &[(&str, &str)]) -> String {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
    let pairs = query.iter().map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, KEPT)));
    format!("{path}?{}", pairs.collect::<Vec<_>>().join("&"))
}

/// Runs what waits for others, in this thread.
///
/// # Errors
/// When the system gives no runtime.
pub(super) fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let output = runtime.block_on(future);
    // A name that is still being looked up in a thread of its own shall not keep the process.
    runtime.shutdown_background();
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// The result of an answer, with the request that led to it.
    fn answered(answer: &'static [u8]) -> (anyhow::Result<Answer>, String) {
        let path = std::env::temp_dir().join(format!("lictor-ask-{:x}", fastrand::u64(..)));
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let answer = Address::Unix(path.clone()).get("/status?x=1");
        std::fs::remove_file(path).unwrap();
        (answer, server.join().unwrap())
    }

    #[test]
    fn an_address_is_written_as_in_admin_bind() {
        let tcp = |host: &str, port| Address::Tcp(host.to_owned(), port);
        for (text, expected, shown) in [
            ("19000", tcp("127.0.0.1", 19000), "127.0.0.1:19000"),
            (":19000", tcp("127.0.0.1", 19000), "127.0.0.1:19000"),
            ("localhost:1", tcp("localhost", 1), "localhost:1"),
            ("http://127.0.0.2:5/", tcp("127.0.0.2", 5), "127.0.0.2:5"),
            ("[::1]:7", tcp("::1", 7), "[::1]:7"),
            ("unix:///run/a b.sock", Address::Unix("/run/a b.sock".into()), "unix:///run/a b.sock"),
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!((&address, address.to_string().as_str()), (&expected, shown));
        }
        for bad in ["", "x", "host:", "host:0", "host:70000", "unix://x", "https://h:1"] {
            let error = Address::parse(bad).expect_err(bad).to_string();
            assert!(error.contains("write host:port, port or unix:///path"), "{error}");
        }
    }

    #[test]
    fn answers_are_read_whole() {
        let (answer, request) = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{\"a\": 1}");
        assert_eq!(answer.unwrap().json().unwrap()["a"], 1);
        assert!(request.starts_with("GET /status?x=1 HTTP/1.1\r\nhost: localhost\r\n"), "{request}");
    }

    #[test]
    fn what_was_refused_is_told_in_the_words_of_the_server_and_is_harmless() {
        let (answer, _) = answered(b"HTTP/1.1 404 Not Found\r\nContent-Length: 11\r\n\r\nno \x1b[2Jsuch");
        assert_eq!(answer.unwrap().json().unwrap_err().to_string(), "no \\u{1b}[2Jsuch");
        let page = [&b"HTTP/1.1 404 Not Found\r\nContent-Length: 100000\r\n\r\n"[..], &[b'<'; 100_000]].concat();
        let (answer, _) = answered(page.leak());
        assert_eq!(
            answer.unwrap().json().unwrap_err().to_string(),
            "<".repeat(SHOWN_TEXT),
            "a page of another program"
        );
        let (answer, _) = answered(b"SSH-2.0-OpenSSH\r\n");
        assert!(answer.unwrap_err().to_string().contains("does not answer as an admin server does"));
        let error = Address::Unix("/nowhere/x.sock".into()).get("/").unwrap_err().to_string();
        assert!(error.contains("`lictor status` without -admin shows"), "{error}");
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(
            url("/explain", &[("upstream", "a b"), ("header", "x: \u{e4}&=")]),
            "/explain?upstream=a%20b&header=x%3A%20%C3%A4%26%3D"
        );
    }
}
