//! HTTP: requests one by one, between a codec on either side.
//!
//! [`serve`] runs the server side of a connection and hands each request to [`inbound`] or [`outbound`], which
//! decide by the configuration of that moment, put it into the form that the next hop wants ([`message`]) and
//! send it over a connection of a pool. Bodies pass through frame by frame, those of responses as a [`body`]. What
//! lies below, connections and what they carry, is [`codec`](super::codec).

mod app;
mod body;
mod bridge;
pub(super) mod certificate;
mod deadlines;
mod departure;
mod exchange;
pub(super) mod expose;
mod grpc;
pub(super) mod inbound;
mod instance_dial;
mod known;
mod message;
pub(super) mod ongoing;
pub(super) mod outbound;
pub(super) mod request_record;
mod responder;
mod serve;
#[cfg(test)]
mod tests;
mod upgrade;
