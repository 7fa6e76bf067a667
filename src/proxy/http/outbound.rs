//! Requests of the local app: each is routed by the chain of its moment and sent to an instance.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::SET_COOKIE;
use http::{Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;

use super::body::Body;
use super::exchange::Exchange;
use super::known::Known;
use super::message::{self, Head, Intake, X_FORWARDED_CLIENT_CERT};
use super::ongoing::Ongoing;
use super::request_record::{RequestObserver, RequestRecorder};
use super::responder::Responder;
use super::serve::{self, Part, Terms};
use super::{bridge, upgrade};
use crate::drain;
use crate::proxy::balance::{Clock, OutboundRuntime, UpstreamRuntime};
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::wire::{Counts, Wire};
use crate::proxy::listener::ListenerState;
use crate::proxy::log_limit::LogLimit;
use crate::proxy::outcome::{Fault, Outcome};
use crate::proxy::socket::Socket;
use crate::snapshot::{Normalization, Protocol, RequestHash, Upgrades, hash_request};

/// One connection of the local app.
pub(crate) struct Outbound {
    pub remote: Option<SocketAddr>,
    pub state: watch::Receiver<ListenerState<OutboundRuntime>>,
    pub drain: drain::Watch,
    pub clock: Clock,
    /// Upgrades that its requests may ask for, as of its beginning.
    pub upgrades: Upgrades,
    pub requests: RequestObserver,
    pub log_limit: LogLimit,
}

impl Outbound {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub(crate) async fn serve(self, app: Socket) -> Result<(), Fault> {
        let wire = Wire::plain(app).counted(Counts::Listener(Arc::clone(&self.requests.connection.stats)));
        wire.allow_upgrades(self.upgrades.clone());
        let terms =
            Terms::new(self.state.clone(), serve::TIMES, Arc::default(), self.remote, None, self.log_limit.clone());
        let this = Arc::new(self);
        let answer = move |request, ongoing| Arc::clone(&this).answer(request, ongoing);
        serve::serve(wire, &terms, answer).await
    }

    async fn answer(self: Arc<Self>, mut request: Request<ReplayBody>, ongoing: Ongoing) -> Response<Body> {
        let mut responder = Responder::new(&self.requests, &request);
        let plan = Arc::clone(&self.state.borrow().config.upstream);
        let bridged = bridge::spans(plan.upstream.chain.protocol, &mut request);
        let mut result = self.try_answer(&plan, request, &ongoing, &mut responder.record).await;
        if bridged && let Ok(response) = result {
            result = bridge::gather(response).await;
        }
        responder.answer(result.inspect_err(|fault| self.log(&plan, fault)), plan.upstream.requests.expose_cause)
    }

    fn log(&self, plan: &UpstreamRuntime, fault: &Fault) {
        if self.log_limit.is_first(&plan.upstream.name, &fault.cause) {
            tracing::warn!(
                target: "proxy.upstream",
                upstream = plan.upstream.name,
                flag = fault.outcome.flag(),
                cause = &*fault.cause,
                "Request failed"
            );
        }
    }

    async fn try_answer(
        &self,
        plan: &UpstreamRuntime,
        mut request: Request<ReplayBody>,
        ongoing: &Ongoing,
        record: &mut RequestRecorder,
    ) -> Result<Response<Body>, Fault> {
        let client = request.extensions_mut().remove::<OnUpgrade>();
        let (parts, body) = request.into_parts();
        // The target goes on as it came: the deciding sidecar normalises it.
        let intake =
            Intake { normalization: &Normalization::NONE, upgrades: &self.upgrades, service: &plan.upstream.name };
        let head = Head::check(parts, intake)?;
        head.check_method()?;
        let routed = plan
            .upstream
            .chain
            .route(&head.view(), fastrand::u64(..))
            .ok_or_else(|| Fault::new(Outcome::NoRoute, "no route of the service-router matches"))?;
        record.routed(&routed);
        let primary = routed.resolver.targets.first();
        if let Some(balancer) = primary.and_then(|target| plan.balancers.get(&target.id)) {
            record.meant_for(balancer.stats());
        }
        let source = self.remote.map(|remote| remote.ip());
        let RequestHash { hash, set_cookies } =
            hash_request(routed.hash_policies, &head.view(), source, fastrand::u64(..));
        // HTTP/2 apps are not upgraded to anything.
        let upgradable = client.is_some() && plan.upstream.chain.protocol == Protocol::Http;
        let known = Known::new(&self.requests.connection, &routed, record.record());
        let mut head = self.edit(head, &known, upgradable)?;
        record.pass_trace_on(&mut head.headers);
        let kept = known.keep(&head);
        let upgrades = head.upgrades();
        let upload = ongoing.upload();
        let exchange = Exchange::new(plan, &routed, &self.state, self.clock, hash, record);
        let (response, rest) = exchange.run(head, body, upload.as_ref()).await?;
        match client {
            Some(client) if upgrades && response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let (state, stats) = (self.state.clone(), &self.requests.connection.stats);
                Ok(upgrade::join(client, response, rest, state, self.drain.clone(), stats, |_| true))
            }
            _ => {
                message::refuse_unasked_switch(&response)?;
                let (mut parts, body) = response.into_parts();
                message::strip(&mut parts.headers);
                known.edit_response(kept.as_ref(), parts.status, &mut parts.headers);
                for cookie in set_cookies {
                    parts.headers.append(SET_COOKIE, cookie);
                }
                Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
            }
        }
    }

    fn edit(&self, mut head: Head, known: &Known<'_>, upgradable: bool) -> Result<Head, Fault> {
        if !upgradable {
            head.stay();
        }
        head.headers.remove(X_FORWARDED_CLIENT_CERT);
        message::annotate(&mut head.headers);
        // As in Envoy, before the path is rewritten.
        known.edit_request(&mut head);
        if let Some(path) = &known.routed.path {
            head.rewrite(path)?;
        }
        Ok(head)
    }
}

impl Part for OutboundRuntime {
    fn carries_requests(&self) -> bool {
        self.listener.upstream.chain.protocol.is_http()
    }

    fn name(&self) -> String {
        format!("upstream {}", self.listener.upstream.name)
    }
}
