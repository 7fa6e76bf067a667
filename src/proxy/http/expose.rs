//! Requests for exposed paths: only those, and from anybody.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use tokio::sync::watch;

use super::app::App;
use super::body::Body;
use super::message::{self, Head, Intake, X_FORWARDED_CLIENT_CERT};
use super::ongoing::Ongoing;
use super::request_record::{RequestObserver, RequestRecorder};
use super::responder::Responder;
use super::serve::{self, Part, Terms, Times};
use crate::observe::Observer;
use crate::proxy::codec::pool::Pool;
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::wire::{Counts, Wire};
use crate::proxy::listener::ListenerState;
use crate::proxy::log_limit::LogLimit;
use crate::proxy::outcome::{Fault, Outcome};
use crate::proxy::record::{Host, Shown};
use crate::proxy::socket::Socket;
use crate::snapshot::{Exposed, Normalization, Upgrades};

/// Deadlines of a listener of an exposed path, which anyone can reach. Health checks and scrapes send their requests at
/// once.
const TIMES: Times = Times {
    first: Duration::from_secs(5),
    head: Duration::from_secs(5),
    idle: Duration::from_secs(60),
    stall: Duration::from_secs(15),
};

/// The paths of one listener, with connections to the app for each.
#[derive(Debug)]
pub(crate) struct Plan {
    pub exposed: Arc<Exposed>,
    pub pools: BTreeMap<String, Pool>,
}

impl Plan {
    #[must_use]
    pub(crate) fn new(exposed: Arc<Exposed>) -> Self {
        let pools = exposed.paths.keys().map(|path| (path.clone(), Pool::default())).collect();
        Self { exposed, pools }
    }
}

/// One connection of a health check or scraper.
pub(crate) struct Exposure {
    pub state: watch::Receiver<ListenerState<Plan>>,
    pub remote: Option<SocketAddr>,
    pub requests: RequestObserver,
    pub log_limit: LogLimit,
}

impl Exposure {
    /// Serves requests until the connection ends.
    ///
    /// # Errors
    /// Why it ended otherwise than well, for the log.
    pub(crate) async fn serve(self, socket: Socket) -> Result<(), Fault> {
        let terms = Terms::new(self.state.clone(), TIMES, Arc::default(), self.remote, None, self.log_limit.clone());
        let wire = Wire::plain(socket).counted(Counts::Listener(Arc::clone(&self.requests.connection.stats)));
        let this = Arc::new(self);
        let answer = move |request, ongoing| Arc::clone(&this).answer(request, ongoing);
        serve::serve(wire, &terms, answer).await
    }

    async fn answer(self: Arc<Self>, request: Request<ReplayBody>, ongoing: Ongoing) -> Response<Body> {
        let mut responder = Responder::new(&self.requests, &request);
        let plan = Arc::clone(&self.state.borrow().config);
        let result = try_answer(&plan, request, &ongoing, &mut responder.record, &self.requests.observer).await;
        responder.answer(result.inspect_err(|fault| self.log(&plan, fault)), false)
    }

    fn log(&self, plan: &Plan, fault: &Fault) {
        if !self.log_limit.is_first(Host(self.remote), &fault.cause) {
            return;
        }
        tracing::info!(
            target: "proxy.inbound",
            listener = %plan.exposed.bind,
            src = %Shown(self.remote),
            flag = fault.outcome.flag(),
            cause = &*fault.cause,
            "Request for an exposed path failed"
        );
    }
}

impl Part for Plan {
    fn carries_requests(&self) -> bool {
        true
    }

    fn name(&self) -> String {
        format!("exposed paths at {}", self.exposed.bind)
    }
}

async fn try_answer(
    plan: &Plan,
    request: Request<ReplayBody>,
    ongoing: &Ongoing,
    record: &mut RequestRecorder,
    observer: &Observer,
) -> Result<Response<Body>, Fault> {
    let (parts, body) = request.into_parts();
    let intake =
        Intake { normalization: &Normalization::default(), upgrades: &Upgrades::default(), service: "localhost" };
    let mut head = Head::check(parts, intake)?;
    head.check_method()?;
    head.stay();
    let path = head.path.path();
    let found = plan.exposed.path(path).zip(plan.pools.get(path));
    let (to, pool) = found.ok_or_else(|| Fault::new(Outcome::NoRoute, "the path is not exposed"))?;
    // Nobody has proved anything here.
    head.headers.remove(X_FORWARDED_CLIENT_CERT);
    message::annotate(&mut head.headers);
    let app = App {
        address: &to.app,
        protocol: to.protocol,
        connect_timeout: plan.exposed.connect_timeout,
        request_timeout: plan.exposed.request_timeout,
        idle_timeout: plan.exposed.idle_timeout,
        pool,
        observer,
    };
    let (response, rest) = app.exchange(head, body, ongoing.upload().as_ref(), record).await?;
    message::refuse_unasked_switch(&response)?;
    let (mut parts, body) = response.into_parts();
    message::strip(&mut parts.headers);
    Ok(Response::from_parts(parts, Body::stream(body).with(rest)))
}
