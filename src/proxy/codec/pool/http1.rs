//! A connection of HTTP/1 that requests go over, one at a time.

use std::future::Future;

use http::{Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::failure::{NoConnection, no_codec};
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::turn::Turn;
use crate::proxy::codec::wire::{PathWatch, WeakWire, Wire};
use crate::proxy::codec::{HEAD_SIZE, HEADERS, HTTP1_BUFFER};

/// A connection of HTTP/1.
pub(super) struct Http1 {
    pub sender: http1::SendRequest<ReplayBody>,
    /// Where the codec ends, the socket is to be closed, even if this is still held.
    pub wire: WeakWire,
}

impl Http1 {
    /// A connection on this wire, which keeps `guard` until it has ended.
    ///
    /// # Errors
    /// None that depends on the far end.
    pub(super) async fn new(wire: Wire, guard: impl Send + 'static) -> Result<Self, NoConnection> {
        let (sender, connection) = http1::Builder::new()
            .max_headers(HEADERS)
            .max_header_size(HEAD_SIZE)
            .max_buf_size(HTTP1_BUFFER)
            .handshake(TokioIo::new(wire.clone()))
            .await
            .map_err(no_codec)?;
        wire.read_to_end();
        let http1 = Self { sender, wire: wire.downgrade() };
        let turns = Turn::new(connection.with_upgrades(), wire.clone());
        tokio::spawn(async move {
            if turns.await.is_err() {
                // Who has half of a request would otherwise wait for the rest, or go on with its answer.
                wire.abort();
            }
            drop(guard);
        });
        Ok(http1)
    }

    pub(super) fn watch_path(&self, watch: PathWatch) {
        if let Some(wire) = self.wire.upgrade() {
            wire.watch_path(watch);
        }
    }

    pub(super) fn send(&mut self, request: Request<ReplayBody>) -> impl Future<Output = Answered> + use<> {
        use http_body::Body as _;
        // A far end that takes no more of a body for now confirms nothing either.
        let whole = request.body().is_end_stream();
        self.watch_path(if whole { PathWatch::Request } else { PathWatch::Upload });
        self.sender.try_send_request(request)
    }
}

/// The result of a request that hyper sends.
type Answered = Result<Response<hyper::body::Incoming>, hyper::client::conn::TrySendError<Request<ReplayBody>>>;
