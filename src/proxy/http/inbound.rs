//! Requests from the mesh: who asks is known, and each request is judged by the intentions of its moment.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::sync::watch;
use tokio::time::timeout;

use super::body::{self, Body, Patience, Rest};
use super::message::{self, Head, X_FORWARDED_CLIENT_CERT};
use super::pool::{Dialled, Lent, MadeFor, Pool, Version};
use super::reply::{Kind, Refusal, is_grpc};
use super::wire::Wire;
use super::{serve, upgrade};
use crate::drain;
use crate::jwt::Verified;
use crate::proxy::listener::Live;
use crate::proxy::record::Shown;
use crate::proxy::socket::Socket;
use crate::snapshot::{Decision, Failure, LocalApp, Protocol, PublicListener};
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
}

impl Inbound {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub async fn serve(self, mesh: Stream<Socket>) -> Result<(), String> {
        let live = self.live.clone();
        let this = Arc::new(self);
        serve::serve(Wire::tls(mesh), live, move |request| Arc::clone(&this).answer(request)).await
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let grpc = is_grpc(request.headers());
        let listener = Arc::clone(&self.live.borrow().part);
        match Arc::clone(&self).try_answer(&listener, request).await {
            Ok(response) => response,
            Err(refusal) => {
                self.log(&listener, &refusal);
                refusal.reply(grpc)
            }
        }
    }

    async fn try_answer(
        self: Arc<Self>,
        listener: &PublicListener,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let client = request.extensions_mut().remove::<OnUpgrade>();
        let (parts, body) = request.into_parts();
        let mut head = Head::check(parts, &listener.normalization)?;
        let verified = self.decide(listener, &head)?;
        // To be judged again whenever the intentions change, for as long as an upgraded connection is open.
        let judged = head.upgrade.is_some().then(|| head.clone());
        head.pass_tokens_on(&listener.token_providers, &verified);
        self.annotate(listener, &mut head);
        let exchange = Exchange { listener, app: &self.app };
        let upgrades = head.upgrade.is_some() && client.is_some() && listener.protocol == Protocol::Http;
        if !upgrades {
            head.upgrade = None;
        }
        let (response, rest) = exchange.run(head, body).await?;
        match (client, judged) {
            (Some(client), Some(head)) if upgrades && response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let this = Arc::clone(&self);
                let may_stay = move |listener: &PublicListener| {
                    let decided = this.decide(listener, &head);
                    decided.inspect_err(|refusal| this.log(listener, refusal)).is_ok()
                };
                Ok(upgrade::join(client, response, rest, self.live.clone(), self.drain.clone(), may_stay))
            }
            _ => {
                let (mut parts, body) = response.into_parts();
                message::strip(&mut parts.headers);
                Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
            }
        }
    }

    fn decide(&self, listener: &PublicListener, head: &Head) -> Result<Verified, Refusal> {
        let providers = &listener.token_providers;
        let now = SystemTime::now();
        let (decision, verified) = listener.intentions.verify_and_decide(&self.peer, &head.view(), providers, now);
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
        tracing::info!(
            target: "proxy.inbound",
            source = %self.peer,
            destination = listener.service,
            src = %Shown(self.remote),
            flag = refusal.kind.flag(),
            cause = &*refusal.cause,
            "Request refused"
        );
    }
}

/// One request to the local app.
struct Exchange<'a> {
    listener: &'a PublicListener,
    app: &'a Pool,
}

impl Exchange<'_> {
    async fn run(&self, mut head: Head, body: Incoming) -> Result<(Response<Incoming>, Rest), Refusal> {
        let (mut body, upload) = body::upload(body);
        let limits = (self.listener.local_request_timeout, self.listener.local_idle_timeout);
        let mut patience = Patience::new(limits.0, limits.1, upload.as_ref());
        for _ in 0..TRIES {
            let lent = self.connection(head.upgrade.is_some()).await?;
            let authority = head.authority.clone();
            // A connection that was idle may be closing just now; then a request that changes nothing goes again.
            let again = (lent.reused && head.is_safe() && body.is_empty()).then(|| head.clone());
            let request = head.into_request(lent.version(), body)?;
            match within(&mut patience, lent.send(request)).await? {
                Ok((response, held)) => {
                    let mut rest = Rest::new(held, None);
                    rest.patience = Some(patience);
                    return Ok((response, rest));
                }
                Err(mut failed) => match (failed.request.take(), again) {
                    (Some(request), _) => (head, body) = Head::from_request(*request, authority),
                    (None, Some(again)) if failed.failure == Failure::Reset && failed.is_lost() => {
                        (head, body) = (again, Body::empty());
                    }
                    _ => {
                        return Err(Refusal::new(Kind::Reset, format!("the local app broke off: {}", failed.told())));
                    }
                },
            }
        }
        Err(Refusal::new(Kind::Reset, "the local app closes connections before it takes a request"))
    }

    async fn connection(&self, alone: bool) -> Result<Lent, Refusal> {
        let made_for = MadeFor::App(self.listener.local_app.clone());
        if alone {
            let open = self.app.enter(None);
            return Pool::connect_once(self.dial().await?, open).await.map_err(Refusal::from);
        }
        if let Some(lent) = self.app.reuse(&made_for) {
            return Ok(lent);
        }
        let version = match self.listener.protocol {
            Protocol::Http2 | Protocol::Grpc => Version::Http2,
            Protocol::Http | Protocol::Tcp => Version::Http1,
        };
        let dial = async {
            let open = self.app.enter(None);
            Ok(Dialled { wire: self.dial().await?, version, open })
        };
        self.app.connect(&made_for, dial).await
    }

    async fn dial(&self) -> Result<Wire, Refusal> {
        let app: &LocalApp = &self.listener.local_app;
        let problem = match timeout(self.listener.local_connect_timeout, Socket::connect_app(app)).await {
            Ok(Ok(socket)) => return Ok(Wire::plain(socket)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.listener.local_connect_timeout),
        };
        Err(Refusal::new(
            Kind::Unreachable,
            format!(
                "failed to dial the local app at {app}: {problem}; is it listening there? (LocalServiceAddress and \
                 LocalServicePort of the registration)"
            ),
        ))
    }
}

/// Waits for `act` as long as there is patience.
pub async fn within<F: Future>(patience: &mut Patience, act: F) -> Result<F::Output, Refusal> {
    let mut act = std::pin::pin!(act);
    poll_fn(|cx| {
        if let std::task::Poll::Ready(done) = act.as_mut().poll(cx) {
            return std::task::Poll::Ready(Ok(done));
        }
        patience.poll_expired(cx).map(|expired| Err(expired.into()))
    })
    .await
}

/// Connections to the app that one request tries, where the app closes each before it takes the request.
const TRIES: usize = 3;
