//! Connections that speak HTTP, whatever the requests on them mean.
//!
//! A [`pool`] keeps those that we made and sends requests over them, with a [`replay_body`] each. Under a codec on either
//! side lies a [`wire`], which gathers what it writes. On the server side the wire also looks at what is read
//! ([`http1_validator`], [`header_block`]) and at what its codec refuses ([`resets`]). HTTP/1 is hyper's. Of HTTP/2 the
//! frames are h2's, and what follows from them is decided here ([`client`], [`server`], [`flow`]). What a codec has
//! decoded says its length in one way ([`framing`]).

mod client;
mod flow;
pub(super) mod framing;
pub(super) mod header_block;
pub(super) mod http1_validator;
pub(super) mod incoming;
pub(super) mod messages;
mod outgoing;
pub(super) mod pool;
pub(super) mod replay_body;
pub(super) mod resets;
pub(super) mod server;
mod transport;
pub(super) mod turn;
pub(super) mod wire;

/// A head may have so many headers and bytes, as at Envoy; more is answered with 431.
pub(super) const HEADERS: usize = 100;
pub(super) const HEAD_SIZE: usize = 60 * 1024;

/// Read and write buffer of an HTTP/1 codec, in bytes. A head fits in.
pub(super) const HTTP1_BUFFER: usize = 128 * 1024;
/// Send buffer of an HTTP/2 stream, in bytes.
const SEND_BUFFER: usize = 128 * 1024;
/// Frames with a few bytes each take more memory than the bytes. A connection is ended where those that nobody has read
/// would take more than this, in bytes.
const SMALL_FRAMES: usize = 64 * 1024 * 1024;
