//! Requests from the mesh: who asks is known, and each request is judged by the intentions of its moment.

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::request::Parts;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;
use tokio::time::timeout;

use super::app::App;
use super::body::Body;
use super::message::{self, Head, Intake, X_FORWARDED_CLIENT_CERT};
use super::ongoing::{Case, Ongoing, Open};
use super::request_record::{RequestObserver, RequestRecorder};
use super::responder::Responder;
use super::serve::{self, Leaving, Part, Terms};
use super::{bridge, upgrade};
use crate::access_log::Secrets;
use crate::drain;
use crate::jwt::Verified;
use crate::observe::Event;
use crate::proxy::authorization::{Judged, Peer, request_denial};
use crate::proxy::codec::pool::Pool;
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::wire::{Counts, Wire};
use crate::proxy::listener::ListenerState;
use crate::proxy::log_limit::{Audited, LogLimit};
use crate::proxy::outcome::{Fault, Outcome};
use crate::proxy::places::Counted;
use crate::proxy::record::Shown;
use crate::proxy::socket::Socket;
use crate::snapshot::{Decider, Decision, InboundListener, Protocol, Service, Upgrades};
use crate::tls::{PeerError, SpiffeId, Stream};

/// One connection from the mesh.
pub(crate) struct Inbound {
    pub peer: Peer,
    pub remote: Option<SocketAddr>,
    pub state: watch::Receiver<ListenerState<InboundListener>>,
    pub drain: drain::Watch,
    /// Connections to the local app.
    pub app: Arc<Pool>,
    /// The element with the identity of the peer for the app.
    pub certificate: Option<HeaderValue>,
    /// Upgrades that its requests may ask for, as of its beginning.
    pub upgrades: Upgrades,
    pub requests: RequestObserver,
    pub log_limit: LogLimit,
    /// Logs connections and requests that audit mode lets through.
    pub audited: Audited,
    /// Requests under way.
    pub open: Open,
    /// Counts towards `max_inbound_connections`, also when it is a connection of requests no more.
    pub _counted: Counted,
}

impl Inbound {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub(crate) async fn serve(self, mesh: Stream<Socket>) -> Result<(), Fault> {
        let counts = Counts::Listener(Arc::clone(&self.requests.connection.stats));
        let (wire, leaving) = (Wire::tls(mesh).counted(counts), Arc::default());
        wire.allow_upgrades(self.upgrades.clone());
        let terms = Terms::new(
            self.state.clone(),
            serve::TIMES,
            Arc::clone(&leaving),
            self.remote,
            Some(&self.peer.id),
            self.log_limit.clone(),
        );
        let this = Arc::new(self);
        let (handler, on) = (Arc::clone(&this), wire.clone());
        let answer = move |request, ongoing| Arc::clone(&handler).answer(request, ongoing, on.clone());
        tokio::select! {
            biased;
            () = this.watch(&wire, &leaving) => Ok(()),
            ended = serve::serve(wire.clone(), &terms, answer) => ended,
        }
    }

    /// Judges again what is under way whenever the listener has changed, and has the connection take no more requests
    /// once the peer is no longer who it was.
    async fn watch(&self, wire: &Wire, leaving: &Leaving) {
        let mut state = self.state.clone();
        let mut judged = Arc::clone(&state.borrow_and_update().config.service);
        loop {
            let left = self.peer.until().duration_since(SystemTime::now()).unwrap_or_default();
            // Clocks are set: a long time is not slept through.
            let changed = timeout(left.min(LOOK_TIME) + MOMENT, state.changed()).await;
            if matches!(changed, Ok(Err(_))) {
                return pending().await;
            }
            let service = Arc::clone(&state.borrow_and_update().config.service);
            if !Arc::ptr_eq(&judged.intentions, &service.intentions)
                || !Arc::ptr_eq(&judged.token_providers, &service.token_providers)
                || judged.audit != service.audit
            {
                self.open.end_denied(|case| self.is_denied(&service, case));
            }
            judged = Arc::clone(&service);
            if let Err(problem) = self.peer.check(&service, |act| wire.peer_certificates(act)) {
                leaving.set();
                self.log(&service, &unproved(&problem));
                // What is under way goes on, and is judged on.
                while state.changed().await.is_ok() {
                    let service = Arc::clone(&state.borrow_and_update().config.service);
                    self.open.end_denied(|case| self.is_denied(&service, case));
                }
                return pending().await;
            }
        }
    }

    fn is_denied(&self, service: &Service, case: &mut Case) -> bool {
        let Some(reason) = request_denial(service, &self.peer.id, &case.head.view(), &case.judged) else {
            return false;
        };
        if service.audit {
            self.log_audited(service, &reason);
            if !std::mem::replace(&mut case.judged.audited, true) {
                let RequestObserver { observer, connection } = &self.requests;
                let view = case.head.view();
                let request = Some((view.method, view.path));
                observer.observe(Event::WouldRevoke { connection, request, reason: &reason });
            }
        } else {
            self.log(service, &Fault::new(Outcome::Denied, format!("under way, and denied now: {reason}")));
        }
        !service.audit
    }

    async fn answer(self: Arc<Self>, mut request: Request<ReplayBody>, ongoing: Ongoing, wire: Wire) -> Response<Body> {
        let mut responder = Responder::new(&self.requests, &request);
        let service = Arc::clone(&self.state.borrow().config.service);
        responder.record.hide_tokens_of(&service.token_providers);
        let bridged = bridge::spans(service.protocol, &mut request);
        let answer = async {
            self.peer.check(&service, |act| wire.peer_certificates(act)).map_err(|problem| unproved(&problem))?;
            let record = &mut responder.record;
            let response = Arc::clone(&self).try_answer(&service, request, &ongoing, record).await?;
            if bridged { bridge::gather(response).await } else { Ok(response) }
        };
        let result = ongoing.unless_over(answer).await;
        let result = result.unwrap_or_else(|_| Err(Fault::new(Outcome::Denied, "denied while it was under way")));
        responder.answer(result.inspect_err(|fault| self.log(&service, fault)), service.expose_cause)
    }

    async fn try_answer(
        self: Arc<Self>,
        service: &Service,
        mut request: Request<ReplayBody>,
        ongoing: &Ongoing,
        record: &mut RequestRecorder,
    ) -> Result<Response<Body>, Fault> {
        let client = request.extensions_mut().remove::<OnUpgrade>();
        let (parts, body) = request.into_parts();
        let mut head = Head::check(parts, self.intake(service))?;
        if client.is_none() || service.protocol != Protocol::Http {
            head.stay();
        }
        // What is added is judged too: the decision is about what the app receives.
        self.annotate(service, &mut head);
        record.pass_trace_on(&mut head.headers);
        let began = SystemTime::now();
        let verified = self.decide(service, &head, began, record)?;
        head.check_method()?;
        // To be judged again whenever the intentions change, for as long as it is under way.
        let (upgrades, headers) = (head.upgrades(), service.intentions.has_request_rules() || head.upgrades());
        let kept = head.outline(headers);
        head.pass_tokens_on(&service.token_providers, &verified);
        let audited = record.is_audited();
        ongoing.keep_case(Case { head: kept, judged: Judged { verified, began, headers, audited } });
        self.open.add(ongoing);
        let (response, rest) = self.app(service).exchange(head, body, ongoing.upload().as_ref(), record).await?;
        let switches = upgrades && response.status() == StatusCode::SWITCHING_PROTOCOLS;
        match (client, switches.then(|| ongoing.take_case()).flatten()) {
            (Some(client), Some(mut case)) => {
                let this = Arc::clone(&self);
                let may_stay = move |listener: &InboundListener| !this.is_denied(&listener.service, &mut case);
                let (state, stats) = (self.state.clone(), &self.requests.connection.stats);
                Ok(upgrade::join(client, response, rest, state, self.drain.clone(), stats, may_stay))
            }
            _ => {
                message::refuse_unasked_switch(&response)?;
                let (mut parts, body) = response.into_parts();
                message::strip(&mut parts.headers);
                Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
            }
        }
    }

    fn intake<'a>(&'a self, service: &'a Service) -> Intake<'a> {
        Intake { normalization: &service.normalization, upgrades: &self.upgrades, service: &service.name }
    }

    fn app<'a>(&'a self, service: &'a Service) -> App<'a> {
        App {
            address: &service.local_app,
            protocol: service.protocol,
            connect_timeout: service.local_connect_timeout,
            request_timeout: service.local_request_timeout,
            idle_timeout: service.local_idle_timeout,
            pool: &self.app,
            observer: &self.requests.observer,
        }
    }

    fn decide(
        &self,
        service: &Service,
        head: &Head,
        now: SystemTime,
        record: &mut RequestRecorder,
    ) -> Result<Verified, Fault> {
        let providers = &service.token_providers;
        let view = head.view();
        let (decision, verified) = service.intentions.verify_and_decide(&self.peer.id, &view, providers, now);
        // Without what may be secret, the query and the values of headers.
        tracing::debug!(
            target: "proxy.inbound",
            source = %self.peer.id,
            destination = service.name,
            request_id = view.headers.get(message::X_REQUEST_ID).and_then(|id| id.to_str().ok()),
            method = view.method,
            authority = view.authority,
            path = view.path,
            %decision,
            "Request decided"
        );
        let RequestObserver { observer, connection } = &self.requests;
        // Audit mode lets no unknown provider pass: a client could forge the headers that its tokens bring.
        let may_pass = service.audit && !matches!(decision, Decision::Deny(Decider::UnknownProvider(_)));
        if let (Decision::Deny(decider), true) = (&decision, may_pass) {
            let reason = with_refusals(decider, &verified);
            observer.observe(Event::WouldDeny { connection, request: Some((view.method, view.path)), reason: &reason });
            self.log_audited(service, &reason);
            record.audited(reason);
            return Ok(verified);
        }
        observer.observe(Event::Decided { connection, source: &self.peer.id, decision: &decision });
        match decision {
            Decision::Allow(_) => Ok(verified),
            Decision::Deny(decider) => Err(Fault::new(Outcome::Denied, with_refusals(&decider, &verified))),
            // Requests are judged by what it asks of each.
            Decision::EachRequest(intention) => Err(Fault::new(Outcome::Denied, format!("{intention} was not judged"))),
        }
    }

    fn annotate(&self, service: &Service, head: &mut Head) {
        message::annotate(&mut head.headers);
        // As Consul configures Envoy: gRPC services get none.
        match &self.certificate {
            Some(element) if service.protocol != Protocol::Grpc && !service.sanitize_forwarded_cert => {
                message::append_element(&mut head.headers, &X_FORWARDED_CLIENT_CERT, element);
            }
            _ => drop(head.headers.remove(X_FORWARDED_CLIENT_CERT)),
        }
    }

    fn log_audited(&self, service: &Service, reason: &str) {
        self.audited.log(&self.peer.id, &service.name, "request", reason);
    }

    fn log(&self, service: &Service, fault: &Fault) {
        // A redirect's is a location, with the query.
        let secrets = Secrets { providers: Some(&service.token_providers) };
        let cause = secrets.hide(&fault.cause);
        if !self.log_limit.is_first(&self.peer.id, &cause) {
            return;
        }
        tracing::info!(
            target: "proxy.inbound",
            source = %self.peer.id,
            destination = service.name,
            src = %Shown(self.remote),
            flag = fault.outcome.flag(),
            cause = &*cause,
            "Request refused"
        );
    }
}

/// The rule that denies a request, and the faults of its tokens.
fn with_refusals(decider: &Decider<'_>, verified: &Verified) -> String {
    let tokens = verified.refusals().map(|(provider, fault)| format!("; token of {provider}: {fault}"));
    format!("{decider}{}", tokens.collect::<String>())
}

impl Part for InboundListener {
    fn carries_requests(&self) -> bool {
        self.service.protocol.is_http()
    }

    fn name(&self) -> String {
        format!("public listener of {}", self.service.name)
    }
}

/// Decides about a request as [`Inbound`] does, but for what the app would learn of the peer's certificate.
///
/// # Errors
/// The answer to a request that is refused whatever its source.
pub(crate) fn rehearse<'a>(
    service: &'a Service,
    peer: &SpiffeId,
    request: Parts,
    now: SystemTime,
) -> Result<(Decision<'a>, Verified), Fault> {
    let intake = Intake { normalization: &service.normalization, upgrades: &service.upgrades, service: &service.name };
    let mut head = Head::check(request, intake)?;
    message::annotate(&mut head.headers);
    let judged = service.intentions.verify_and_decide(peer, &head.view(), &service.token_providers, now);
    if matches!(judged.0, Decision::Allow(_)) {
        head.check_method()?;
    }
    Ok(judged)
}

fn unproved(problem: &PeerError) -> Fault {
    Fault::new(Outcome::Denied, format!("the peer does not prove its identity any more: {problem}"))
}

/// Longest interval between two checks of a peer's certificate on an open connection.
const LOOK_TIME: Duration = Duration::from_secs(600);
/// Added to the expiry of a certificate before it is checked, so that it has expired by then.
const MOMENT: Duration = Duration::from_millis(10);
