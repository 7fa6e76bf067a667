//! How it went with an instance that was picked, and the ejection that may follow.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::balancer::{Balancer, Shared, is_of_late, note};
use super::instance::{InFlight, Instance};
use crate::observe::Event;

/// How a try of a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// An answer that is no fault of the instance, 4xx included.
    Success,
    /// A 5xx, or a gRPC status that says as much.
    ServerError,
    /// Connected, but no answer: reset, broken, timed out.
    Reset,
    /// No connection, so that nothing was sent.
    Unreachable,
}

/// An instance that was chosen, until it is known how it went.
#[derive(Debug)]
pub struct Picked {
    balancer: Arc<Balancer>,
    in_flight: InFlight,
    probe: Probe,
    /// Below 100: an ejection is enforced if its chance in percent is above.
    die: u64,
}

/// Which gates of its instance a pick alone may open. Dropped, it leaves them to another.
#[derive(Debug, Default)]
pub(super) struct Probe {
    instance: Option<Arc<Instance>>,
    aside: bool,
    circuit: bool,
}

impl Picked {
    #[must_use]
    pub fn instance(&self) -> &Arc<Instance> {
        self.in_flight.instance()
    }

    /// A connection that is relayed was made, and the app has it. How it goes on says nothing of the instance.
    #[must_use]
    pub fn connected(self, now: u64) -> InFlight {
        note(&self.balancer.shared.answered, now);
        self.succeeded(now);
        self.over()
    }

    /// A connection that is relayed was made, and ended by the instance's side at once without a byte. That speaks
    /// against the instance only where others do otherwise: there are services that are like that.
    #[must_use]
    pub fn closed_unanswered(self, now: u64) -> InFlight {
        if is_of_late(&self.balancer.shared.answered, now) {
            self.in_flight.instance().state.left_unanswered(now, self.probe.aside);
        }
        self.over()
    }

    /// Nothing can be said of how it went.
    #[must_use]
    pub fn without_result(self) -> InFlight {
        self.over()
    }

    fn over(mut self) -> InFlight {
        self.in_flight.answered();
        self.in_flight
    }

    /// How a request went, and how long it took from being sent (on a connection that was ready, as connecting would
    /// make new instances look slow) to the head of its response. The result is to be held until the
    /// response's body is done.
    ///
    /// [`Report::ServerError`] and [`Report::Reset`] count towards an ejection. It is decided at once and not on a
    /// sweep. [`Report::Unreachable`] counts with them, but alone it only puts the instance aside.
    pub fn report(self, outcome: Report, latency: Duration, now: u64) -> InFlight {
        let instance = self.in_flight.instance();
        let state = &instance.state;
        match outcome {
            Report::Success => {
                state.latency.record(latency, now);
                self.succeeded(now);
            }
            Report::ServerError | Report::Reset => {
                state.latency.record_error(latency, now);
                state.reached();
                self.failed(now, outcome == Report::Reset);
            }
            Report::Unreachable => state.could_not_be_reached(now, self.probe.aside),
        }
        self.over()
    }

    fn succeeded(&self, now: u64) {
        let instance = self.in_flight.instance();
        instance.state.succeeded();
        // What was under way when it was ejected says nothing of now.
        if self.probe.circuit {
            instance.state.returns(now);
            tracing::info!(target: "proxy.upstream", instance = %instance.address, "An ejected instance is back");
        }
    }

    /// `gone`: there was no answer.
    fn failed(&self, now: u64, gone: bool) {
        let instance = self.in_flight.instance();
        let check = &self.balancer.settings.passive_health_check;
        let enforced = self.die < u64::from(check.enforcing_consecutive_5xx);
        if self.probe.circuit || (instance.state.fails_too_often(check.max_failures) && enforced) {
            self.balancer.eject(instance, now, self.probe.circuit, gone);
        }
    }
}

impl Balancer {
    pub(super) fn picked(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        probe: Probe,
        now: u64,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Picked {
        let certain = matches!(self.settings.passive_health_check.enforcing_consecutive_5xx, 0 | 100..);
        let die = if certain { 0 } else { random(100) };
        Picked { balancer: Arc::clone(self), in_flight: InFlight::new(instance, now), probe, die }
    }

    /// Ejects an instance, unless too many are.
    fn eject(&self, instance: &Instance, now: u64, probe: bool, gone: bool) {
        let _ejecting = self.shared.ejecting.lock().unwrap_or_else(PoisonError::into_inner);
        if !probe && !instance.state.circuit.lets_in(now) {
            return;
        }
        if !self.may_be_ejected(instance, now, gone) {
            if probe {
                instance.state.circuit.open();
            }
            self.shared.observer.observe(Event::NotEjected(&self.shared.stats));
            return;
        }
        let time = instance.state.eject(now, &self.settings.passive_health_check, probe);
        tracing::warn!(target: "proxy.upstream", instance = %instance.address, seconds = time.as_secs(), "An instance is ejected for its errors");
        let Shared { observer, target, stats, .. } = &*self.shared;
        observer.observe(Event::Ejected { target, stats, instance: &instance.address, time });
    }

    /// Where nothing is said: as many as give no answer, but of those that answer with errors, which may be the requests'
    /// own, few. Never the last that can be used.
    fn may_be_ejected(&self, instance: &Instance, now: u64, gone: bool) -> bool {
        let others = || self.instances.iter().filter(|other| !other.is_same(instance));
        let ejected = 1 + others().filter(|other| !other.state.circuit.lets_in(now)).count();
        let within = |percent: u32| ejected * 100 <= self.instances.len().saturating_mul(percent as usize);
        match self.settings.passive_health_check.max_ejection_percent {
            Some(percent) => within(percent),
            None => (gone || ejected == 1 || within(EJECTED)) && others().any(|other| other.is_fit(now)),
        }
    }
}

impl Probe {
    pub(super) fn new(instance: &Arc<Instance>, aside: bool, circuit: bool) -> Self {
        Self { instance: (aside || circuit).then(|| Arc::clone(instance)), aside, circuit }
    }

    pub(super) fn with_circuit(mut self, instance: &Arc<Instance>) -> Self {
        self.instance = Some(Arc::clone(instance));
        self.circuit = true;
        self
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(instance) = &self.instance {
            if self.aside {
                instance.state.aside.abandon();
            }
            if self.circuit {
                instance.state.circuit.abandon();
            }
        }
    }
}

/// Default of `max_ejection_percent`, in percent, as in Envoy.
const EJECTED: u32 = 10;
