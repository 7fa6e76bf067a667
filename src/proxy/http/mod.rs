//! HTTP: requests one by one, between a codec on either side.
//!
//! [`serve`] runs the server side of a connection and hands each request to [`inbound`] or [`outbound`], which
//! decide by the configuration of that moment, put it into the form that the next hop wants ([`message`]) and
//! send it over a connection of a [`pool`]. Bodies pass through frame by frame ([`upload`], [`body`]). Below the codecs
//! lie the [`wire`], which gathers writes, and on the server side [`strict`] and [`blocks`].

mod app;
mod blocks;
mod body;
pub mod certificate;
pub mod expose;
pub mod inbound;
mod message;
pub mod note;
pub mod outbound;
mod patience;
pub mod pool;
mod refusal;
mod reply;
mod serve;
mod strict;
#[cfg(test)]
mod tests;
mod upgrade;
mod upload;
mod wire;

/// A head may have so many headers and bytes, as at Envoy; more is answered with 431.
const HEADERS: usize = 100;
const HEAD_SIZE: usize = 60 * 1024;

/// What one side of an HTTP/2 connection may send before the other has taken it, in bytes.
const STREAM_WINDOW: u32 = 512 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
