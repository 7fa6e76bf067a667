//! Access logs: one line for each request or connection, in a format made of Envoy's operators.
//!
//! [`Settings`] say what is written where, [`Format`] turns a [`Record`] into a line without its [`Secrets`] (pure), and
//! [`AccessLog`] writes lines without ever making the data path wait.

mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod secrets;
mod settings;
mod writer;

pub use format::{BadFormat, Format};
pub use secrets::Secrets;
pub use settings::{Settings, Sink};
pub use writer::{AccessLog, Active};

pub use crate::operators::{Record, Request, Response, Upstream};
