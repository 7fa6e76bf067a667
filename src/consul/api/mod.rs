//! The agent's JSON, spelled as the agent spells it.
//!
//! Decoding is lenient, because shapes change with every Consul line and Go drops empty fields or sends
//! them as `null`: every field has a default, `null` is the default, and unknown fields are ignored. The
//! exception are the parts of an intention that decide who may do what: those keep the names of fields they
//! do not know ([`Unknown`]), so that a reader can fail closed on a matcher newer than this code.

#[macro_use]
mod wire;

mod agent;
mod chain;
mod entries;
mod intention;
mod jwt;
#[cfg(test)]
mod tests;
mod value;

pub use self::agent::*;
pub use self::chain::*;
pub use self::entries::*;
pub use self::intention::*;
pub use self::jwt::*;
pub use self::value::{BadDuration, GoDuration, Port, Secret, Unknown};
pub use self::wire::Opaque;
