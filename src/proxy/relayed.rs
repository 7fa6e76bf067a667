//! A connection as a relay sees it: it gives pieces of plaintext in the thread's [`Scratch`] and takes them from there.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};

use crate::tls::{Leftover, Piece, Scratch};

/// One side of a relay. A plain stream is one, and so is [`super::tunnel::MeshStream`].
///
/// The relay keeps `left`, what a stream without a buffer of its own did not take of the last piece. It is empty, and without
/// memory, most of the time.
pub(super) trait Relayed {
    /// Bytes that it puts in front of each piece that it writes. The piece is read with as much room.
    fn head(&self) -> usize {
        0
    }

    /// Reads once, and leaves room for `head` bytes in front of what came. An empty piece need not be the last.
    ///
    /// # Errors
    /// Those of this side.
    fn poll_piece(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, head: usize) -> Poll<io::Result<Piece>>;

    /// Whether nothing comes after `piece`, which was read last.
    fn is_last(&self, piece: Piece) -> bool;

    /// Whether it did not take all of the last piece: no other is written before [`Relayed::poll_left`] is ready.
    fn is_blocked(&self, left: &[u8]) -> bool;

    /// Writes what has not gone out yet.
    ///
    /// # Errors
    /// Those of this side.
    fn poll_left(&mut self, cx: &mut Context<'_>, left: &mut Leftover) -> Poll<io::Result<()>>;

    /// Writes a piece that is not empty, and keeps what is not taken at once. Not to be called while it is blocked.
    ///
    /// # Errors
    /// Those of this side.
    fn write_piece(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        piece: Piece,
        left: &mut Leftover,
    ) -> io::Result<()>;

    /// Ends the direction to it, behind what has been written; [`Relayed::poll_end`] sends that.
    ///
    /// # Errors
    /// Those of this side.
    fn end(&mut self, _: &mut Context<'_>, _: &mut Scratch) -> io::Result<()> {
        Ok(())
    }

    /// Sends the end. Not to be called while it is blocked.
    ///
    /// # Errors
    /// Those of this side.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

impl<S: AsyncRead + AsyncWrite + Unpin> Relayed for S {
    #[inline]
    fn poll_piece(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, head: usize) -> Poll<io::Result<Piece>> {
        scratch.poll_read(cx, self, head)
    }

    fn is_last(&self, piece: Piece) -> bool {
        piece.is_empty()
    }

    fn is_blocked(&self, left: &[u8]) -> bool {
        !left.is_empty()
    }

    #[inline]
    fn poll_left(&mut self, cx: &mut Context<'_>, left: &mut Leftover) -> Poll<io::Result<()>> {
        let sent = poll_write_all(cx, self, left)?;
        if sent < left.len() {
            left.advance(sent);
            return Poll::Pending;
        }
        *left = Leftover::default();
        Pin::new(self).poll_flush(cx)
    }

    #[inline]
    fn write_piece(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        piece: Piece,
        left: &mut Leftover,
    ) -> io::Result<()> {
        let plaintext = scratch.plaintext(piece);
        let sent = poll_write_all(cx, self, plaintext)?;
        left.extend_from_slice(&plaintext[sent..]);
        Ok(())
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_shutdown(cx)
    }
}

/// Writes as much as the stream takes now.
#[inline]
fn poll_write_all<W: AsyncWrite + Unpin>(cx: &mut Context<'_>, to: &mut W, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match Pin::new(&mut *to).poll_write(cx, &bytes[sent..])? {
            Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(count) => sent += count,
            Poll::Pending => break,
        }
    }
    Ok(sent)
}
