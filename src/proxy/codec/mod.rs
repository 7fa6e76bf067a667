//! Connections that speak HTTP, whatever the requests on them mean.
//!
//! A [`pool`] keeps those that we made and sends requests over them, with an [`upload`] each. Under a codec on either
//! side lies a [`wire`], which gathers what it writes; on the server side the wire looks over what is read as well
//! ([`strict`], [`blocks`]). What a codec has decoded says its length in one way ([`framing`]).

mod blocks;
pub mod framing;
pub mod pool;
mod strict;
pub mod upload;
pub mod wire;

/// A head may have so many headers and bytes, as at Envoy; more is answered with 431.
pub const HEADERS: usize = 100;
pub const HEAD_SIZE: usize = 60 * 1024;

/// What one side of an HTTP/2 connection may send before the other has taken it, in bytes.
pub const STREAM_WINDOW: u32 = 512 * 1024;
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
