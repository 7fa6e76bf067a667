//! Envoy's `%…%` operators, such as `%REQ(USER-AGENT)%`: in formats of access logs and in values of headers.
//!
//! A [`Template`] is read once, and then filled from a [`Record`] of what is known. All of it is pure.

mod operator;
mod record;
mod template;
mod time;

pub use operator::{HeaderNames, Operator, Value, is_known_to_envoy};
pub use record::{Record, Request, Response, Upstream};
pub use template::{BadTemplate, Piece, Template};
