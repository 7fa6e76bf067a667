//! Requests of the local app: each is routed by the chain of its moment and sent to an instance.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::SET_COOKIE;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::body::{Body, Rest};
use super::message::{self, Head, Intake, X_FORWARDED_CLIENT_CERT};
use super::note::{Caller, Note};
use super::patience::{Expired, Patience};
use super::refusal::{Kind, Refusal};
use super::reply::Asked;
use super::{serve, upgrade};
use crate::drain;
use crate::proxy::balance::{Balancer, Clock, Instance, Outcome, Picked, Plan, Retry};
use crate::proxy::codec::pool::{Borrowed, Dialled, Failed, Lent, MadeFor, Pool, Version};
use crate::proxy::codec::upload::{Upload, UploadState};
use crate::proxy::codec::wire::Wire;
use crate::proxy::dial::{Offer, attempt};
use crate::proxy::limits::{Limit, Overflow, Permit};
use crate::proxy::listener::Live;
use crate::proxy::socket::Socket;
use crate::snapshot::{Failure, Normalization, Protocol, RequestHash, Routed, Target, Upgrades, hash_request};

/// One connection of the local app.
pub struct Outbound {
    pub remote: Option<SocketAddr>,
    pub live: watch::Receiver<Live<Plan>>,
    pub drain: drain::Watch,
    pub clock: Clock,
    /// What its requests may upgrade it to, as of when it began.
    pub upgrades: Upgrades,
    /// For the access log.
    pub caller: Caller,
}

impl Outbound {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub async fn serve(self, app: Socket) -> Result<(), String> {
        let live = self.live.clone();
        let wire = Wire::plain(app);
        wire.allow_upgrades(self.upgrades.clone());
        let this = Arc::new(self);
        serve::serve(wire, live, serve::TIMES, move |request| Arc::clone(&this).answer(request)).await
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let mut asked = Asked::new(&self.caller, &request);
        let plan = Arc::clone(&self.live.borrow().part);
        let result = self.try_answer(&plan, request, asked.note.as_deref_mut()).await;
        asked.answer(result.inspect_err(|refusal| log(&plan, refusal)), plan.upstream.requests.tells_cause)
    }

    async fn try_answer(
        &self,
        plan: &Plan,
        mut request: Request<Incoming>,
        note: Option<&mut Note>,
    ) -> Result<Response<Body>, Refusal> {
        let client = request.extensions_mut().remove::<OnUpgrade>();
        let (parts, body) = request.into_parts();
        // The target goes on as it came: whoever decides about the request normalises it.
        let intake =
            Intake { normalization: &Normalization::NONE, upgrades: &self.upgrades, service: &plan.upstream.name };
        let head = Head::check(parts, intake)?;
        head.check_method()?;
        let routed = plan
            .upstream
            .chain
            .route(&head.view(), fastrand::u64(..))
            .ok_or_else(|| Refusal::new(Kind::NoRoute, "no route of the service-router matches"))?;
        let source = self.remote.map(|remote| remote.ip());
        let RequestHash { hash, set_cookies } =
            hash_request(routed.hash_policies, &head.view(), source, fastrand::u64(..));
        // HTTP/2 apps are not upgraded to anything.
        let upgradable = client.is_some() && plan.upstream.chain.protocol == Protocol::Http;
        let head = self.edit(head, &routed, upgradable)?;
        let upgrades = head.upgrades();
        let (response, rest) = Exchange::new(plan, &routed, self.clock, hash).run(head, body, note).await?;
        match client {
            Some(client) if upgrades && response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                Ok(upgrade::join(client, response, rest, self.live.clone(), self.drain.clone(), |_| true))
            }
            _ => {
                message::refuse_unasked_switch(&response)?;
                let (mut parts, body) = response.into_parts();
                message::strip(&mut parts.headers);
                for edits in routed.response_edits {
                    edits.apply(&mut parts.headers);
                }
                for cookie in set_cookies {
                    parts.headers.append(SET_COOKIE, cookie);
                }
                Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
            }
        }
    }

    fn edit(&self, mut head: Head, routed: &Routed<'_>, upgradable: bool) -> Result<Head, Refusal> {
        if !upgradable {
            head.stay();
        }
        head.headers.remove(X_FORWARDED_CLIENT_CERT);
        message::annotate(&mut head.headers);
        if let Some(path) = &routed.path {
            head.rewrite(path)?;
        }
        for edits in routed.request_edits {
            edits.apply(&mut head.headers);
        }
        Ok(head)
    }
}

fn log(plan: &Plan, refusal: &Refusal) {
    tracing::warn!(
        target: "proxy.upstream",
        upstream = plan.upstream.name,
        flag = refusal.kind.flag(),
        cause = &*refusal.cause,
        "Request failed"
    );
}

/// One request with all its tries.
struct Exchange<'a> {
    plan: &'a Plan,
    routed: &'a Routed<'a>,
    clock: Clock,
    hash: Option<u64>,
    /// Those that could not be used or have answered badly.
    tried: Vec<Arc<Instance>>,
    /// Of these, those that could not be connected to since the last configured retry.
    unreachable: Vec<Arc<Instance>>,
    /// Why, one by one.
    reasons: Vec<String>,
    /// Configured retries that are left, and the one that is under way.
    retries: u32,
    retry: Option<Retry>,
}

/// What can be sent once more.
struct Again<'a> {
    head: Option<Head>,
    /// `None`: the request has no body.
    upload: Option<&'a UploadState>,
}

/// What came of one try.
enum Tried {
    Response(Response<Incoming>, Rest),
    /// To be tried again, with this.
    Again(Head, Upload),
}

impl<'a> Exchange<'a> {
    fn new(plan: &'a Plan, routed: &'a Routed<'a>, clock: Clock, hash: Option<u64>) -> Self {
        let retries = routed.retries.map_or(0, |policy| policy.retries);
        let (tried, unreachable, reasons) = (Vec::new(), Vec::new(), Vec::new());
        Self { plan, routed, clock, hash, tried, unreachable, reasons, retries, retry: None }
    }

    async fn run(
        mut self,
        mut head: Head,
        body: Incoming,
        mut note: Option<&mut Note>,
    ) -> Result<(Response<Incoming>, Rest), Refusal> {
        self.plan.balancers.budget.request(self.clock.now());
        let (mut body, upload) = Upload::new(body);
        if let Some(note) = &mut note {
            note.uploads(upload.as_ref());
        }
        let limits = (self.routed.request_timeout, self.routed.idle_timeout);
        let mut patience = Patience::new(limits.0, limits.1, upload.as_ref());
        loop {
            let chosen = self.choose_or_retry().await?;
            if let Some(note) = &mut note {
                note.sent_to(chosen.target.tls.name().to_str(), &chosen.picked.instance().address);
            }
            patience.try_for(self.plan.upstream.requests.per_try_timeout);
            let connected = self.connection(&chosen, head.upgrades());
            let connected = match patience.within(connected).await {
                // That one instance took too long to connect to.
                Err(expired @ Expired::Try) => Err(expired.into()),
                connected => connected?,
            };
            match connected {
                Ok(lent) => match self.send(chosen, lent, head, body, upload.as_ref(), &mut patience).await? {
                    Tried::Response(response, mut rest) => {
                        patience.try_for(None);
                        rest.patience = Some(patience);
                        return Ok((response, rest));
                    }
                    Tried::Again(again, rest) => (head, body) = (again, rest),
                },
                // A limit is no fault of the instance, and would be reached elsewhere too.
                Err(refusal) if refusal.kind == Kind::Overflow => return Err(refusal),
                Err(refusal) => {
                    let instance = Arc::clone(chosen.picked.instance());
                    chosen.picked.report(Outcome::Unreachable, Duration::ZERO, self.clock.now());
                    self.unreachable.push(Arc::clone(&instance));
                    self.give_up(instance, &refusal.cause);
                }
            }
        }
    }

    /// The next instance to try. Those that could not be connected to come again only where a retry of that is
    /// configured: whatever else there is needs none, as nothing was sent.
    async fn choose_or_retry(&mut self) -> Result<Chosen<'a>, Refusal> {
        let refusal = match self.choose() {
            Err(refusal) if !self.unreachable.is_empty() => refusal,
            chosen => return chosen,
        };
        let asked = self.routed.retries.filter(|_| self.retries > 0);
        if asked.is_some_and(|policy| policy.retries_failure(Failure::Connect)) && self.may_retry().await {
            return self.choose();
        }
        Err(refusal)
    }

    /// One of the first target that has one, in the order of failover.
    fn choose(&mut self) -> Result<Chosen<'a>, Refusal> {
        if self.reasons.len() >= ATTEMPTS {
            return Err(self.exhausted());
        }
        let now = self.clock.now();
        let mut overflow = None;
        for (target, balancer) in self.plan.balancers.in_order(&self.routed.resolver.targets, now) {
            let permit = match balancer.admit(Limit::ConcurrentRequests) {
                Ok(permit) => permit,
                Err(reached) => {
                    overflow = Some(reached);
                    continue;
                }
            };
            let pick = |tried: &[Arc<Instance>]| balancer.pick(now, self.hash, tried, |below| fastrand::u64(..below));
            // What was asked to be tried again may go to the same instance, if there is no other.
            let picked = pick(&self.tried).or_else(|| self.retry.as_ref().and_then(|_| pick(&self.unreachable)));
            if let Some(picked) = picked {
                return Ok(Chosen { target, balancer, picked, permit });
            }
        }
        Err(overflow.map_or_else(|| self.exhausted(), Refusal::from))
    }

    fn exhausted(&self) -> Refusal {
        if !self.reasons.is_empty() {
            let cause = format!("no instance could be used: {}", self.reasons.join(", "));
            return Refusal::new(Kind::Unreachable, cause);
        }
        let targets = self.plan.balancers.in_order(&self.routed.resolver.targets, self.clock.now());
        let told = targets.iter().map(|(target, balancer)| format!("{}: {}", target, balancer.absence()));
        Refusal::new(Kind::NoInstance, told.collect::<Vec<_>>().join("; "))
    }

    fn give_up(&mut self, instance: Arc<Instance>, why: &str) {
        self.reasons.push(format!("{} {why}", instance.address));
        self.tried.push(instance);
    }

    async fn connection(&self, chosen: &Chosen<'_>, alone: bool) -> Result<Lent, Refusal> {
        let Chosen { target, balancer, picked, .. } = chosen;
        let instance = picked.instance();
        let made_for = MadeFor::Mesh(Arc::clone(&target.tls));
        if !alone && let Some(lent) = instance.pool().reuse(&made_for) {
            return Ok(lent);
        }
        let _pending = balancer.admit(Limit::PendingRequests)?;
        if alone {
            let open = instance.pool().enter(Some(balancer.admit(Limit::Connections)?));
            let until = Instant::now() + target.connect_timeout;
            let (mesh, _) = attempt(target, instance, until, Offer::Http1).await?;
            return Pool::connect_once(Wire::tls(mesh), open).await.map_err(Refusal::from);
        }
        let dialled = self.dial(target, instance, &made_for, || balancer.admit(Limit::Connections).map(Some)).await;
        match dialled {
            // As in Envoy, requests wait for one of the connections, and each instance may have one.
            Err(refusal) if refusal.kind == Kind::Overflow && self.plan.upstream.limits.max_connections != Some(0) => {
                match instance.pool().borrow(&made_for).await {
                    Borrowed::Lent(lent) => Ok(*lent),
                    Borrowed::None => self.dial(target, instance, &made_for, || Ok(None)).await,
                }
            }
            dialled => dialled,
        }
    }

    async fn dial(
        &self,
        target: &Target,
        instance: &Instance,
        made_for: &MadeFor,
        permit: impl FnOnce() -> Result<Option<Permit>, Overflow>,
    ) -> Result<Lent, Refusal> {
        let always = self.plan.upstream.chain.protocol != Protocol::Http;
        let dial = async {
            let open = instance.pool().enter(permit()?);
            let until = Instant::now() + target.connect_timeout;
            let (mesh, _) = attempt(target, instance, until, Offer::All).await?;
            let http2 = always || mesh.alpn() == Some(b"h2");
            let version = if http2 { Version::Http2 } else { Version::Http1 };
            Ok(Dialled { wire: Wire::tls(mesh), version, open })
        };
        instance.pool().connect(made_for, dial).await
    }

    /// Sends the request and judges what comes of it.
    async fn send(
        &mut self,
        chosen: Chosen<'a>,
        lent: Lent,
        head: Head,
        body: Upload,
        upload: Option<&UploadState>,
        patience: &mut Patience,
    ) -> Result<Tried, Refusal> {
        let Chosen { picked, permit, .. } = chosen;
        let authority = head.authority.clone();
        let reused = lent.reused;
        // What may be sent twice: streams can be refused, idle connections can be closing, retries be asked for.
        let may_go_again = lent.version() == Version::Http2 || self.retries > 0 || (reused && head.is_safe());
        let again = Again { head: may_go_again.then(|| head.clone()), upload };
        let request = head.into_request(lent.version(), body)?;
        let sent = Instant::now();
        let answered = patience.within(lent.send(request)).await;
        let (latency, now) = (sent.elapsed(), self.clock.now());
        match answered {
            Ok(Ok((response, held))) => {
                let error = is_server_error(&response);
                let outcome = if error { Outcome::ServerError } else { Outcome::Success };
                let in_flight = picked.report(outcome, latency, now);
                let policy = self.routed.retries.filter(|_| self.retries > 0);
                if policy.is_some_and(|policy| policy.retries_response(response.status(), response.headers()))
                    && let Some((head, body)) = again.take()
                    && self.retry(in_flight.instance(), &format!("answered {}", response.status())).await
                {
                    return Ok(Tried::Again(head, body));
                }
                Ok(Tried::Response(response, Rest::new(held, Some((in_flight, permit)))))
            }
            Ok(Err(failed)) => self.after_failure(picked, failed, again, authority, reused).await,
            Err(expired) => self.after_expiry(picked, expired, again, latency).await,
        }
    }

    async fn after_expiry(
        &mut self,
        picked: Picked,
        expired: Expired,
        again: Again<'_>,
        latency: Duration,
    ) -> Result<Tried, Refusal> {
        let instance = Arc::clone(picked.instance());
        // What the client broke off says nothing of the instance.
        if expired != Expired::Upload {
            picked.report(Outcome::Reset, latency, self.clock.now());
        }
        let refusal = Refusal::from(expired);
        let policy = self.routed.retries.filter(|_| expired == Expired::Try && self.retries > 0);
        if policy.is_some_and(|policy| policy.retries_response(StatusCode::GATEWAY_TIMEOUT, &HeaderMap::new()))
            && let Some((head, body)) = again.take()
            && self.retry(&instance, &refusal.cause).await
        {
            return Ok(Tried::Again(head, body));
        }
        Err(refusal)
    }

    async fn after_failure(
        &mut self,
        picked: Picked,
        mut failed: Failed,
        again: Again<'_>,
        authority: HeaderValue,
        reused: bool,
    ) -> Result<Tried, Refusal> {
        let (instance, now) = (Arc::clone(picked.instance()), self.clock.now());
        let told = failed.told();
        if again.upload.is_some_and(UploadState::is_broken) {
            return Err(Refusal::new(Kind::BadRequest, format!("the request's body broke off: {told}")));
        }
        // Nothing of it has been sent: this is no retry, and no fault of the instance if the connection was old.
        if let Some(request) = failed.request.take() {
            self.reasons.push(format!("{} closed the connection: {told}", instance.address));
            if !reused {
                picked.report(Outcome::Unreachable, Duration::ZERO, now);
                self.unreachable.push(Arc::clone(&instance));
                self.tried.push(instance);
            }
            let (head, body) = Head::from_request(*request, authority);
            return Ok(Tried::Again(head, body));
        }
        let refused = failed.failure == Failure::Refused;
        if !refused && (!reused || failed.is_malformed()) {
            picked.report(Outcome::Reset, Duration::ZERO, now);
        }
        // What it has not looked at, and what changes nothing and met the end of an old connection.
        let unseen = refused || (reused && failed.is_lost() && again.head.as_ref().is_some_and(Head::is_safe));
        let asked = self.routed.retries.filter(|_| self.retries > 0);
        let asked = asked.is_some_and(|policy| policy.retries_failure(failed.failure));
        let broken = Refusal::of(&instance.address, &failed);
        if self.reasons.len() >= ATTEMPTS || !(unseen || asked) {
            return Err(broken);
        }
        let Some((head, body)) = again.take() else { return Err(broken) };
        if unseen {
            self.reasons.push(format!("{} {told}", instance.address));
            if refused {
                self.tried.push(instance);
            }
        } else if !self.retry(&instance, &told).await {
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

/// An instance of a target, to be tried.
struct Chosen<'a> {
    target: &'a Target,
    balancer: &'a Arc<Balancer>,
    picked: Picked,
    permit: Permit,
}

impl Again<'_> {
    /// The request once more, if it can be had.
    fn take(self) -> Option<(Head, Upload)> {
        let body = match self.upload {
            None => Upload::none(),
            Some(upload) => upload.again()?,
        };
        Some((self.head?, body))
    }
}

/// Whether an answer speaks against the instance: as Envoy judges, a 5xx, or a gRPC status that stands for one.
fn is_server_error(response: &Response<Incoming>) -> bool {
    let status = || response.headers().get("grpc-status")?.to_str().ok()?.parse::<u8>().ok();
    // Unknown, deadline exceeded, unimplemented, internal, unavailable and data loss.
    response.status().is_server_error() || status().is_some_and(|status| matches!(status, 2 | 4 | 12..=15))
}

/// Tries of one request that come to nothing at most.
const ATTEMPTS: usize = 16;
/// Before a configured retry, at most, and longer for each (Envoy's 25 ms base, without its doubling).
const BACKOFF: Duration = Duration::from_millis(25);
