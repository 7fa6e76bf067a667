//! One request with all its tries: which instance, on which connection, and whether another try may follow.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::body::ResponseTail;
use super::deadlines::{Deadlines, TimedOut};
use super::instance_dial::{Dial, Unconnected};
use super::message::Head;
use super::request_record::RequestRecorder;
use crate::observe::AttemptResult;
use crate::proxy::balance::{Balancer, Clock, Instance, OutboundRuntime, Picked, Report, Retry, UpstreamRuntime};
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::pool::{Failed, PoolKey, PooledConnection, Version};
use crate::proxy::codec::replay_body::{BodyProgress, ReplayBody};
use crate::proxy::dial::Pace;
use crate::proxy::limits::{Limit, Overflow, Permit};
use crate::proxy::listener::ListenerState;
use crate::proxy::outcome::{Fault, Outcome, no_response};
use crate::proxy::probe;
use crate::race::{Next, Race};
use crate::snapshot::{Failure, Protocol, Routed, Target};

/// One request with all its tries.
pub(super) struct Exchange<'a> {
    plan: &'a UpstreamRuntime,
    routed: &'a Routed<'a>,
    state: &'a watch::Receiver<ListenerState<OutboundRuntime>>,
    clock: Clock,
    hash: Option<u64>,
    record: &'a mut RequestRecorder,
    /// The target whose instances are being connected to.
    current: Option<Current<'a>>,
    /// The target that the request was sent to last.
    sent_to: Option<&'a Arc<Target>>,
    /// The instances with a connection attempt in progress.
    connecting: Vec<Arc<Instance>>,
    /// The instances that failed or answered with an error.
    tried: Vec<Arc<Instance>>,
    /// Of these, those that could not be connected to since the last configured retry.
    unreachable: Vec<Arc<Instance>>,
    /// Why, one by one.
    reasons: Vec<String>,
    /// Configured retries that are left, and the one that is under way.
    retries: u32,
    retry: Option<Retry>,
}

/// A request that can be sent again.
struct Again<'a> {
    head: Option<Head>,
    /// `None`: the request has no body.
    upload: Option<&'a BodyProgress>,
}

/// The result of one try.
enum Tried {
    Response(Response<Incoming>, ResponseTail),
    /// To be tried again, with this.
    Again(Head, ReplayBody),
}

impl<'a> Exchange<'a> {
    #[must_use]
    pub(super) fn new(
        plan: &'a UpstreamRuntime,
        routed: &'a Routed<'a>,
        state: &'a watch::Receiver<ListenerState<OutboundRuntime>>,
        clock: Clock,
        hash: Option<u64>,
        record: &'a mut RequestRecorder,
    ) -> Self {
        Self {
            plan,
            routed,
            state,
            clock,
            hash,
            record,
            current: None,
            sent_to: None,
            connecting: Vec::new(),
            tried: Vec::new(),
            unreachable: Vec::new(),
            reasons: Vec::new(),
            retries: routed.retries.map_or(0, |policy| policy.retries),
            retry: None,
        }
    }

    /// Sends the request until a try is final.
    ///
    /// # Errors
    /// Why there is no response.
    pub(super) async fn run(
        mut self,
        mut head: Head,
        mut body: ReplayBody,
        upload: Option<&BodyProgress>,
    ) -> Result<(Response<Incoming>, ResponseTail), Fault> {
        self.plan.balancers.budget.request(self.clock.now());
        self.record.uploads(upload);
        let limits = (self.routed.request_timeout, self.routed.idle_timeout);
        let mut deadlines = Deadlines::new(limits.0, limits.1, upload);
        loop {
            deadlines.try_for(self.plan.upstream.requests.per_try_timeout);
            let mut race = Race::new();
            let connected = self.connect(&mut race, head.upgrades());
            let connected = deadlines.run_until(connected).await;
            self.leave(race);
            let (picked, pooled) = match connected {
                Ok(connected) => connected?,
                Err(expired @ TimedOut::Try) => {
                    self.took_too_long(&Fault::from(expired));
                    continue;
                }
                Err(expired) => return Err(expired.into()),
            };
            match self.send(picked, pooled, head, body, upload, &mut deadlines).await? {
                Tried::Response(response, mut rest) => {
                    deadlines.try_for(None);
                    if let Some(upload) = upload {
                        upload.settle();
                    }
                    rest.deadlines = Some(deadlines);
                    return Ok((response, rest));
                }
                Tried::Again(again, rest) => (head, body) = (again, rest),
            }
        }
    }

    /// A connection to an instance, each being tried beside those of the same target that are slow. Those that could not
    /// be connected to come again only where a retry of that is configured: whatever else there is needs none, as nothing
    /// was sent.
    async fn connect(
        &mut self,
        race: &mut Race<(Picked, PooledConnection), Unconnected>,
        alone: bool,
    ) -> Result<(Picked, PooledConnection), Fault> {
        self.current = None;
        loop {
            let fault = match self.choose(false) {
                Ok((first, until)) => {
                    self.begin_attempt(&first);
                    if !alone && let Some(pooled) = self.current.as_ref().and_then(|current| current.reuse(&first)) {
                        return Ok((first, pooled));
                    }
                    let (mut first, mut fault) = (Some((first, until)), None);
                    let won = race.run(|failed| self.next(&mut first, failed, alone, &mut fault)).await;
                    self.connecting.clear();
                    match (won, fault) {
                        (Some(won), _) => return Ok(won),
                        // A limit is no fault of the instance, and would be reached elsewhere too.
                        (None, Some(overflow)) => return Err(overflow),
                        (None, None) => self.choose(false).err().unwrap_or_else(|| self.exhausted()),
                    }
                }
                Err(fault) => fault,
            };
            let policy = self.routed.retries.filter(|_| self.retries > 0 && !self.unreachable.is_empty());
            if !policy.is_some_and(|policy| policy.retries_failure(Failure::Connect)) || !self.may_retry().await {
                return Err(fault);
            }
        }
    }

    /// The next step while connection attempts are in progress.
    fn next(
        &mut self,
        first: &mut Option<(Picked, Instant)>,
        failed: Option<Unconnected>,
        alone: bool,
        overflow: &mut Option<Fault>,
    ) -> Next<(Picked, PooledConnection), Unconnected> {
        if let Some(Unconnected { instance, fault }) = failed {
            self.end_attempt(&instance, (&fault).into());
            if fault.outcome == Outcome::Overflow {
                *overflow = Some(fault);
                return Next::Stop;
            }
            self.connecting.retain(|one| !Arc::ptr_eq(one, &instance));
            self.unreachable.push(Arc::clone(&instance));
            self.reasons.push(format!("{} {}", instance.address, fault.cause));
            if let Some(current) = &self.current {
                probe::begin(self.state, current.target, &instance, self.clock);
            }
        }
        let chosen = match first.take() {
            Some(first) => Ok(first),
            None => self.choose(!self.connecting.is_empty()).inspect(|(picked, _)| self.begin_attempt(picked)),
        };
        let (Ok((picked, until)), Some(current)) = (chosen, &mut self.current) else { return Next::Wait };
        if let Err(reached) = current.enter() {
            *overflow = Some(reached.into());
            return Next::Stop;
        }
        let instance = Arc::clone(picked.instance());
        self.tried.push(Arc::clone(&instance));
        self.connecting.push(instance);
        let upstream = &self.plan.upstream;
        let dial = Dial {
            target: Arc::clone(current.target),
            balancer: Arc::clone(current.balancer),
            until,
            alone,
            only_http2: upstream.chain.protocol != Protocol::Http,
            may_wait: upstream.limits.max_connections != Some(0),
        };
        Next::Begin(Box::pin(dial.connect(picked, self.clock)), current.pace.stagger())
    }

    /// Lets what is still being connected to come to its end: into the pool, or put aside.
    fn leave(&self, race: Race<(Picked, PooledConnection), Unconnected>) {
        let Some(current) = self.current.as_ref().filter(|_| race.is_on()) else { return };
        let (state, target, clock) = (self.state.clone(), Arc::clone(current.target), self.clock);
        race.finish(move |ended| match ended {
            Ok((picked, pooled)) => {
                picked.instance().is_back();
                pooled.put_back();
            }
            Err(Unconnected { instance, .. }) => probe::begin(&state, &target, &instance, clock),
        });
    }

    /// Those that were being connected to took too long for one try.
    fn took_too_long(&mut self, fault: &Fault) {
        for instance in std::mem::take(&mut self.connecting) {
            self.end_attempt(&instance, fault.into());
            self.reasons.push(format!("{} {}", instance.address, fault.cause));
            self.unreachable.push(instance);
        }
    }

    fn begin_attempt(&mut self, picked: &Picked) {
        if let Some(current) = &self.current {
            self.record.attempt(picked.instance().destination(current.target));
        }
    }

    fn end_attempt(&mut self, instance: &Instance, result: AttemptResult) {
        self.record.attempt_ended(|destination| destination.is_instance(&instance.address), || result);
    }

    /// One instance of the first target that has one, in the order of failover, and until when it may take; `beside`
    /// others of the same target alone.
    fn choose(&mut self, beside: bool) -> Result<(Picked, Instant), Fault> {
        if self.reasons.len() >= ATTEMPTS {
            return Err(self.exhausted());
        }
        let (plan, now) = (self.plan, self.clock.now());
        let mut overflow = None;
        for (target, balancer) in plan.balancers.in_order(&self.routed.resolver.targets, now) {
            let current = self.current.as_mut().filter(|current| Arc::ptr_eq(current.balancer, balancer));
            if beside && current.is_none() {
                continue;
            }
            let mut entered = None;
            let current = match current {
                Some(current) => current,
                None => match balancer.admit(Limit::ConcurrentRequests) {
                    Ok(permit) => entered.insert(Current::new(target, balancer, permit)),
                    Err(reached) => {
                        overflow = Some(reached);
                        continue;
                    }
                },
            };
            let Some(until) = current.pace.until(balancer, current.begun) else { continue };
            let pick = |tried: &[Arc<Instance>]| balancer.pick(now, self.hash, tried, |below| fastrand::u64(..below));
            // What was asked to be tried again may go to the same instance, if there is no other.
            let picked = pick(&self.tried).or_else(|| self.retry.as_ref().and_then(|_| pick(&self.unreachable)));
            if let Some(picked) = picked {
                current.begun += 1;
                if entered.is_some() {
                    self.current = entered;
                }
                return Ok((picked, until));
            }
        }
        Err(overflow.map_or_else(|| self.exhausted(), Fault::from))
    }

    fn exhausted(&self) -> Fault {
        if !self.reasons.is_empty() {
            let cause = format!("no instance could be used: {}", self.reasons.join(", "));
            return Fault::new(Outcome::Unreachable, cause);
        }
        let targets = self.plan.balancers.in_order(&self.routed.resolver.targets, self.clock.now());
        let reasons = targets.iter().map(|(target, balancer)| format!("{}: {}", target, balancer.no_endpoint_reason()));
        Fault::new(Outcome::NoInstance, reasons.collect::<Vec<_>>().join("; "))
    }

    fn give_up(&mut self, instance: Arc<Instance>, why: &str) {
        self.reasons.push(format!("{} {why}", instance.address));
        self.tried.push(instance);
    }

    /// Sends the request and judges what comes of it.
    async fn send(
        &mut self,
        picked: Picked,
        pooled: PooledConnection,
        head: Head,
        body: ReplayBody,
        upload: Option<&BodyProgress>,
        deadlines: &mut Deadlines,
    ) -> Result<Tried, Fault> {
        let permit = self.current.take().map(|Current { target, permit, .. }| {
            self.sent_to = Some(target);
            permit
        });
        let authority = head.authority.clone();
        let reused = pooled.reused;
        // What may be sent twice: streams can be refused, idle connections can be closing, retries be asked for.
        let may_go_again = pooled.version() == Version::Http2 || self.retries > 0 || (reused && head.is_safe());
        let again = Again { head: may_go_again.then(|| head.clone()), upload };
        let request = head.into_request(pooled.version(), body)?;
        self.record.sent(picked.instance().stats());
        let sent = Instant::now();
        let answered = deadlines.run_until(pooled.send(request)).await;
        let (latency, now) = (sent.elapsed(), self.clock.now());
        match answered {
            Ok(Ok((response, held))) => {
                let error = is_server_error(&response);
                let outcome = if error { Report::ServerError } else { Report::Success };
                let in_flight = picked.report(outcome, latency, now);
                self.end_attempt(in_flight.instance(), AttemptResult::Responded(response.status().as_u16()));
                let policy = self.routed.retries.filter(|_| self.retries > 0);
                if policy.is_some_and(|policy| policy.retries_response(response.status(), response.headers()))
                    && let Some((head, body)) = again.take()
                    && self.retry(in_flight.instance(), &format!("answered {}", response.status())).await
                {
                    self.record.answer_retried(in_flight.instance().stats(), response.status());
                    return Ok(Tried::Again(head, body));
                }
                Ok(Tried::Response(response, ResponseTail::new(held, Some((in_flight, permit)))))
            }
            Ok(Err(failed)) => self.after_failure(picked, failed, again, authority, reused).await,
            Err(expired) => self.after_expiry(picked, expired, again, latency).await,
        }
    }

    async fn after_expiry(
        &mut self,
        picked: Picked,
        expired: TimedOut,
        again: Again<'_>,
        latency: Duration,
    ) -> Result<Tried, Fault> {
        let instance = Arc::clone(picked.instance());
        // What the client broke off says nothing of the instance.
        if expired != TimedOut::Upload {
            picked.report(Report::Reset, latency, self.clock.now());
        }
        let fault = Fault::from(expired);
        self.end_attempt(&instance, (&fault).into());
        let policy = self.routed.retries.filter(|_| expired == TimedOut::Try && self.retries > 0);
        if policy.is_some_and(|policy| policy.retries_response(StatusCode::GATEWAY_TIMEOUT, &HeaderMap::new()))
            && let Some((head, body)) = again.take()
            && self.retry(&instance, &fault.cause).await
        {
            return Ok(Tried::Again(head, body));
        }
        Err(fault)
    }

    async fn after_failure(
        &mut self,
        picked: Picked,
        mut failed: Failed,
        again: Again<'_>,
        authority: HeaderValue,
        reused: bool,
    ) -> Result<Tried, Fault> {
        let (instance, now) = (Arc::clone(picked.instance()), self.clock.now());
        let cause = failed.describe();
        let broken = no_response(&instance.address, &failed);
        self.end_attempt(&instance, (&broken).into());
        if again.upload.is_some_and(BodyProgress::is_broken) {
            return Err(Fault::new(Outcome::BadRequest, format!("the request's body broke off: {cause}")));
        }
        // Nothing of it has been sent: this is no retry, and no fault of the instance if the connection was old.
        if let Some(request) = failed.request.take() {
            self.reasons.push(format!("{} closed the connection: {cause}", instance.address));
            if !reused {
                picked.report(Report::Unreachable, Duration::ZERO, now);
                if let Some(target) = self.sent_to {
                    probe::begin(self.state, target, &instance, self.clock);
                }
                self.unreachable.push(Arc::clone(&instance));
                self.tried.push(instance);
            }
            let (head, body) = Head::from_request(*request, authority);
            return Ok(Tried::Again(head, body));
        }
        let refused = failed.failure == Failure::Refused;
        if !refused && (!reused || failed.is_malformed()) {
            picked.report(Report::Reset, Duration::ZERO, now);
        }
        // What it has not looked at, and what changes nothing and met the end of an old connection.
        let unseen = refused || (reused && failed.is_lost() && again.head.as_ref().is_some_and(Head::is_safe));
        let policy = self.routed.retries.filter(|_| self.retries > 0);
        let is_retried = policy.is_some_and(|policy| policy.retries_failure(failed.failure));
        if self.reasons.len() >= ATTEMPTS || !(unseen || is_retried) {
            return Err(broken);
        }
        let Some((head, body)) = again.take() else { return Err(broken) };
        if unseen {
            self.reasons.push(format!("{} {cause}", instance.address));
            // An old connection may be at its end, and not the instance.
            if refused && !reused {
                self.tried.push(instance);
            }
        } else if !self.retry(&instance, &cause).await {
            return Err(broken);
        }
        Ok(Tried::Again(head, body))
    }

    /// Makes ready for a configured retry after a try that went wrong; false if there are too many just now.
    async fn retry(&mut self, instance: &Arc<Instance>, why: &str) -> bool {
        self.give_up(Arc::clone(instance), why);
        self.may_retry().await
    }

    async fn may_retry(&mut self) -> bool {
        // The last one is over.
        self.retry = None;
        self.retry = self.plan.balancers.budget.retry(self.clock.now());
        self.record.retried(self.retry.is_some());
        if self.retry.is_none() {
            return false;
        }
        self.retries -= 1;
        self.unreachable.clear();
        let step = u32::try_from(self.reasons.len()).unwrap_or(u32::MAX).min(4);
        sleep(BACKOFF.mul_f32(fastrand::f32()) * step).await;
        true
    }
}

/// A target of which instances are tried.
struct Current<'a> {
    target: &'a Arc<Target>,
    balancer: &'a Arc<Balancer>,
    pace: Pace,
    /// Instances that were chosen.
    begun: usize,
    permit: Permit,
    /// Held while the request waits for a connection.
    pending: Option<Permit>,
}

impl<'a> Current<'a> {
    fn new(target: &'a Arc<Target>, balancer: &'a Arc<Balancer>, permit: Permit) -> Self {
        Self { target, balancer, pace: Pace::new(target), begun: 0, permit, pending: None }
    }

    /// A connection that is there.
    fn reuse(&self, picked: &Picked) -> Option<PooledConnection> {
        picked.instance().pool().reuse(&PoolKey::Mesh(Arc::clone(self.target.tls())))
    }

    /// Counts the request among those that wait for a connection.
    fn enter(&mut self) -> Result<(), Overflow> {
        if self.pending.is_none() {
            self.pending = Some(self.balancer.admit(Limit::PendingRequests)?);
        }
        Ok(())
    }
}

impl Again<'_> {
    /// The request once more, if it can be had.
    fn take(self) -> Option<(Head, ReplayBody)> {
        let body = match self.upload {
            None => ReplayBody::none(),
            Some(upload) => upload.again()?,
        };
        Some((self.head?, body))
    }
}

/// Whether an answer speaks against the instance: as Envoy judges, a 5xx, or a gRPC status that stands for one.
fn is_server_error<B>(response: &Response<B>) -> bool {
    let status = || response.headers().get("grpc-status")?.to_str().ok()?.parse::<u8>().ok();
    // Unknown, deadline exceeded, unimplemented, internal, unavailable and data loss.
    response.status().is_server_error() || status().is_some_and(|status| matches!(status, 2 | 4 | 12..=15))
}

/// Failed tries of one request at most.
const ATTEMPTS: usize = 16;
/// Longest pause before the first configured retry, and longer for each further one (Envoy's base of 25 ms, without its
/// doubling).
const BACKOFF: Duration = Duration::from_millis(25);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_errors_and_the_grpc_statuses_that_stand_for_one_speak_against_an_instance() {
        for (status, grpc, expected) in [
            (200, None, false),
            (404, None, false),
            (500, None, true),
            (503, Some("0"), true),
            (200, Some("0"), false),
            (200, Some("5"), false),
            (200, Some("14"), true),
            (200, Some("99"), false),
            (200, Some("x"), false),
        ] {
            let mut response = Response::builder().status(status);
            if let Some(grpc) = grpc {
                response = response.header("grpc-status", grpc);
            }
            assert_eq!(is_server_error(&response.body(()).unwrap()), expected, "{status} {grpc:?}");
        }
    }
}
