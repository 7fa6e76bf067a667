//! Requests from the mesh: who asks is known, and each request is judged by the intentions of its moment.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::{HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;

use super::app::App;
use super::body::Body;
use super::message::{self, Head, Intake, X_FORWARDED_CLIENT_CERT};
use super::note::{Caller, Note};
use super::refusal::{Kind, Refusal};
use super::reply::Asked;
use super::{bridge, serve, upgrade};
use crate::access_log::Secrets;
use crate::drain;
use crate::jwt::Verified;
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::pool::Pool;
use crate::proxy::codec::wire::Wire;
use crate::proxy::listener::Live;
use crate::proxy::record::Shown;
use crate::proxy::socket::Socket;
use crate::snapshot::{Decision, Protocol, PublicListener, Upgrades};
use crate::tls::{SpiffeId, Stream};

/// One connection from the mesh.
pub struct Inbound {
    pub peer: Arc<SpiffeId>,
    pub remote: Option<SocketAddr>,
    pub live: watch::Receiver<Live<PublicListener>>,
    pub drain: drain::Watch,
    /// Connections to the local app.
    pub app: Arc<Pool>,
    /// The element that tells the app who the peer is.
    pub certificate: Option<HeaderValue>,
    /// What its requests may upgrade it to, as of when it began.
    pub upgrades: Upgrades,
    /// For the access log.
    pub caller: Caller,
}

impl Inbound {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub async fn serve(self, mesh: Stream<Socket>) -> Result<(), String> {
        let live = self.live.clone();
        let wire = Wire::tls(mesh);
        wire.allow_upgrades(self.upgrades.clone());
        let this = Arc::new(self);
        serve::serve(wire, live, serve::TIMES, move |request| Arc::clone(&this).answer(request)).await
    }

    async fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Body> {
        let mut asked = Asked::new(&self.caller, &request);
        let listener = Arc::clone(&self.live.borrow().part);
        if let Some(note) = &mut asked.note {
            note.hide_tokens_of(&listener.token_providers);
        }
        let bridged = bridge::spans(listener.protocol, &mut request);
        let mut result = Arc::clone(&self).try_answer(&listener, request, asked.note.as_deref_mut()).await;
        if bridged && let Ok(response) = result {
            result = bridge::gather(response).await;
        }
        asked.answer(result.inspect_err(|refusal| self.log(&listener, refusal)), listener.tells_cause)
    }

    async fn try_answer(
        self: Arc<Self>,
        listener: &PublicListener,
        mut request: Request<Incoming>,
        note: Option<&mut Note>,
    ) -> Result<Response<Body>, Refusal> {
        let client = request.extensions_mut().remove::<OnUpgrade>();
        let (parts, body) = request.into_parts();
        let mut head = Head::check(parts, self.intake(listener))?;
        if client.is_none() || listener.protocol != Protocol::Http {
            head.stay();
        }
        // What is added is judged too: the decision is about what the app receives.
        self.annotate(listener, &mut head);
        let verified = self.decide(listener, &head)?;
        head.check_method()?;
        // To be judged again whenever the intentions change, for as long as an upgraded connection is open.
        let judged = head.upgrades().then(|| head.clone());
        head.pass_tokens_on(&listener.token_providers, &verified);
        let (response, rest) = self.app(listener).exchange(head, body, note).await?;
        match (client, judged) {
            (Some(client), Some(head)) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let this = Arc::clone(&self);
                let may_stay = move |listener: &PublicListener| {
                    let decided = this.decide(listener, &head);
                    decided.inspect_err(|refusal| this.log(listener, refusal)).is_ok()
                };
                Ok(upgrade::join(client, response, rest, self.live.clone(), self.drain.clone(), may_stay))
            }
            _ => {
                message::refuse_unasked_switch(&response)?;
                let (mut parts, body) = response.into_parts();
                message::strip(&mut parts.headers);
                Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
            }
        }
    }

    fn intake<'a>(&'a self, listener: &'a PublicListener) -> Intake<'a> {
        Intake { normalization: &listener.normalization, upgrades: &self.upgrades, service: &listener.service }
    }

    fn app<'a>(&'a self, listener: &'a PublicListener) -> App<'a> {
        App {
            address: &listener.local_app,
            protocol: listener.protocol,
            connect_timeout: listener.local_connect_timeout,
            request_timeout: listener.local_request_timeout,
            idle_timeout: listener.local_idle_timeout,
            pool: &self.app,
        }
    }

    fn decide(&self, listener: &PublicListener, head: &Head) -> Result<Verified, Refusal> {
        let providers = &listener.token_providers;
        let now = SystemTime::now();
        let view = head.view();
        let (decision, verified) = listener.intentions.verify_and_decide(&self.peer, &view, providers, now);
        // Without what may be secret, the query and the values of headers.
        tracing::debug!(
            target: "proxy.inbound",
            source = %self.peer,
            destination = listener.service,
            request_id = view.headers.get(message::X_REQUEST_ID).and_then(|id| id.to_str().ok()),
            method = view.method,
            authority = view.authority,
            path = view.path,
            %decision,
            "Request judged"
        );
        match decision {
            Decision::Allow(_) => Ok(verified),
            Decision::Deny(decider) => {
                let tokens = verified.refusals().map(|(provider, refusal)| format!("; token of {provider}: {refusal}"));
                Err(Refusal::new(Kind::Denied, format!("{decider}{}", tokens.collect::<String>())))
            }
            // Requests are judged by what it asks of each.
            Decision::EachRequest(intention) => Err(Refusal::new(Kind::Denied, format!("{intention} was not judged"))),
        }
    }

    fn annotate(&self, listener: &PublicListener, head: &mut Head) {
        message::annotate(&mut head.headers);
        // As Consul configures Envoy: gRPC services get none.
        match &self.certificate {
            Some(element) if listener.protocol != Protocol::Grpc && !listener.sanitize_forwarded_cert => {
                message::append_element(&mut head.headers, &X_FORWARDED_CLIENT_CERT, element);
            }
            _ => drop(head.headers.remove(X_FORWARDED_CLIENT_CERT)),
        }
    }

    fn log(&self, listener: &PublicListener, refusal: &Refusal) {
        // A redirect's is a location, with the query.
        let secrets = Secrets { providers: Some(&listener.token_providers) };
        tracing::info!(
            target: "proxy.inbound",
            source = %self.peer,
            destination = listener.service,
            src = %Shown(self.remote),
            flag = refusal.kind.flag(),
            cause = &*secrets.hide(&refusal.cause),
            "Request refused"
        );
    }
}
