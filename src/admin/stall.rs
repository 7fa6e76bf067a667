//! A connection whose reader has to go on: without this, clients that read nothing keep all places of a listener for good.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Time for which a client may read nothing of an answer: Envoy's idle timeout of a stream.
pub(super) const STALL_TIME: Duration = Duration::from_secs(300);

/// Ends with an error when the peer has taken no byte for [`STALL_TIME`].
pub(super) struct StallLimit<S> {
    stream: S,
    /// Since a write or flush has been waiting.
    waits: Option<Pin<Box<Sleep>>>,
}

impl<S> StallLimit<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self { stream, waits: None }
    }

    fn limit<T>(&mut self, cx: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.waits = None;
            return progress;
        }
        ready!(self.waits.get_or_insert_with(|| Box::pin(sleep(STALL_TIME))).as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, format!("the client read nothing for {STALL_TIME:?}"))))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StallLimit<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StallLimit<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.limit(cx, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.limit(cx, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.stream).poll_flush(cx);
        self.limit(cx, progress)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.limit(cx, progress)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::Full;
    use hyper::Response;
    use hyper::body::Bytes;
    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::admin::{HEAD_TIMEOUT, serve_http};

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";

    /// Serves a body of this length; its end is the connection's.
    async fn served(length: usize, client: impl AsyncFnOnce(&mut tokio::io::DuplexStream)) -> Duration {
        let (mut near, far) = duplex(1024);
        let answer = service_fn(move |_| async move {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![b'x'; length]))))
        });
        let start = Instant::now();
        let serving = timeout(10 * STALL_TIME, serve_http(far, answer));
        let (ended, ()) = tokio::join!(serving, client(&mut near));
        assert!(ended.is_ok(), "the connection has its place for good");
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_loses_its_place() {
        let took = served(1 << 20, async |client| client.write_all(REQUEST).await.unwrap()).await;
        assert!((STALL_TIME..2 * STALL_TIME).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_gets_the_whole_answer() {
        let took = served(8 * 1024, async |client| {
            client.write_all(REQUEST).await.unwrap();
            let mut bytes = [0; 1024];
            let mut all = 0;
            while all < 8 * 1024 {
                sleep(STALL_TIME / 2).await;
                all += client.read(&mut bytes).await.unwrap();
            }
        });
        assert!(took.await > 3 * STALL_TIME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_no_further_request_loses_its_place() {
        let took = served(1, async |client| client.write_all(REQUEST).await.unwrap()).await;
        assert!(took <= 2 * HEAD_TIMEOUT, "{took:?}");
    }
}
