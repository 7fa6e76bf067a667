//! Records of connections and requests, and the one observer that receives them.
//!
//! The data plane fills a [`ConnectionRecord`] for each connection and a [`RequestRecord`] for each request, and tells an
//! [`Observer`] of [`Event`]s on their way. Readers of the observer, such as the access log, turn them into lines, counts or
//! spans. How something ended is an [`Outcome`]: one table says all that derives from it.

mod access;
mod attempt;
mod clock;
mod connect_error;
mod connection;
mod event;
mod metrics;
mod observer;
mod outcome;
mod problems;
mod request;
mod spans;

pub use attempt::{Attempt, AttemptResult, Attempts, Destination};
pub use clock::Clock;
pub use connect_error::{ConnectError, LocalAppProblem};
pub use connection::{ConnectionInfo, ConnectionRecord, Direction, Listener};
pub use event::{Event, Overflowed};
pub use metrics::{listener_name, target_name};
pub use observer::Observer;
pub use outcome::{Description, Fault, Outcome, Repeatable, Side};
pub use problems::{KEPT, Problem, Problems};
pub use request::{CopiedHeaders, RequestRecord};
