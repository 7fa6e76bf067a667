//! Which instance of a target a connection or request goes to, and what is remembered of each.
//!
//! [`Balancers`] belong to an upstream and one snapshot; what they remember goes on to the next. A connection or a
//! try of a request takes five steps:
//!
//! 1. [`Balancers::in_order`]: the targets, those that are up first.
//! 2. [`Balancer::admit`]: a permit for each limit that it counts towards, held as long as it does.
//! 3. [`Balancer::pick`]: an instance that was not tried yet. None: [`Balancer::no_endpoint_reason`] has the reason.
//! 4. [`Picked::report`], or for a relayed connection [`Picked::connected`] or [`Picked::closed_unanswered`]: how it went. A
//!    pick that is dropped without a word counts as nothing.
//! 5. Hold the [`InFlight`] to the end of the connection or of the response's body.
//!
//! Instances that do badly are kept from traffic in two ways. One that can't be reached is *put aside*: it comes last,
//! but it comes, as nothing was sent to it that could be lost; and `proxy/probe.rs` sees when it can be reached again.
//! One that answers with errors is *ejected*: it gets nothing for a while. After either, one connection or request alone
//! probes it. Unless it was said how many may be ejected ([`max_ejection_percent`]), an ejection never makes things
//! worse than the app's own answers: the last instance that is usable is not ejected, and one that is comes after all
//! others, but it comes.
//!
//! All of it is atomics, save a lock per target that is taken when an instance is ejected. A pick looks at a
//! few instances, however many there are, unless most of them are out. Time and randomness are arguments.
//!
//! [`max_ejection_percent`]: crate::snapshot::PassiveHealthCheck::max_ejection_percent

mod balancer;
mod budget;
mod instance;
mod latency;
mod pick;
mod report;
mod runtime;
#[cfg(test)]
mod tests;

pub use crate::observe::Clock;
pub use balancer::{Balancer, ProbePermit, Settings};
pub use budget::{Retry, RetryBudget};
pub use instance::{InFlight, Instance};
pub use report::{Picked, Report};
pub use runtime::{Balancers, OutboundRuntime, UpstreamRuntime};
