//! The local app, as a place to send requests to.

use std::sync::Arc;
use std::time::Duration;

use http::Response;

use super::body::ResponseTail;
use super::deadlines::Deadlines;
use super::message::Head;
use super::request_record::RequestRecorder;
use crate::observe::{ConnectError, Destination, Observer};
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::pool::{Dialled, NoConnection, Pool, PoolKey, PooledConnection, Version};
use crate::proxy::codec::replay_body::{BodyProgress, ReplayBody};
use crate::proxy::codec::wire::{Counts, Wire};
use crate::proxy::local_app::connect_app;
use crate::proxy::outcome::{Fault, Outcome, no_response};
use crate::snapshot::{Failure, LocalApp, Protocol};

/// The local app, and the deadlines of requests to it.
pub(super) struct App<'a> {
    pub address: &'a LocalApp,
    pub protocol: Protocol,
    pub connect_timeout: Duration,
    pub request_timeout: Option<Duration>,
    pub idle_timeout: Option<Duration>,
    /// Connections to it.
    pub pool: &'a Pool,
    pub observer: &'a Observer,
}

impl App<'_> {
    /// Sends one request there.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn exchange(
        &self,
        mut head: Head,
        mut body: ReplayBody,
        upload: Option<&BodyProgress>,
        record: &mut RequestRecorder,
    ) -> Result<(Response<Incoming>, ResponseTail), Fault> {
        record.uploads(upload);
        record.attempt(Destination::LocalApp(self.address.clone()));
        let mut deadlines = Deadlines::new(self.request_timeout, self.idle_timeout, upload);
        // Where a connection did not take the request, others that are there may not either.
        let mut anew = false;
        for _ in 0..TRIES {
            let pooled = deadlines.run_until(self.connection(head.upgrades(), anew)).await??;
            let authority = head.authority.clone();
            // A connection that was idle may be closing just now; then a request that changes nothing goes again.
            let repeatable = pooled.reused && head.is_safe() && body.is_empty();
            // A stream of HTTP/2 can be refused, and then the app has not looked at the request.
            let again = (repeatable || pooled.version() == Version::Http2).then(|| head.clone());
            let request = head.into_request(pooled.version(), body)?;
            if !anew {
                record.sent(self.observer.local_app());
            }
            match deadlines.run_until(pooled.send(request)).await? {
                Ok((response, held)) => {
                    let mut rest = ResponseTail::new(held, None);
                    rest.deadlines = Some(deadlines);
                    if let Some(upload) = upload {
                        upload.settle();
                    }
                    return Ok((response, rest));
                }
                Err(failed) if upload.is_some_and(BodyProgress::is_broken) => {
                    let cause = format!("the request's body broke off: {}", failed.describe());
                    return Err(Fault::new(Outcome::BadRequest, cause));
                }
                Err(mut failed) => match (failed.request.take(), again) {
                    (Some(request), _) => (head, body) = Head::from_request(*request, authority),
                    (None, Some(again)) if failed.failure == Failure::Refused || (repeatable && failed.is_lost()) => {
                        let body_again = upload.map_or_else(|| Some(ReplayBody::none()), BodyProgress::again);
                        let Some(body_again) = body_again else { return Err(no_response("the local app", &failed)) };
                        (head, body) = (again, body_again);
                    }
                    _ => return Err(no_response("the local app", &failed)),
                },
            }
            anew = true;
        }
        Err(Fault::new(Outcome::Reset, "the local app closes connections before it takes a request"))
    }

    async fn connection(&self, alone: bool, anew: bool) -> Result<PooledConnection, Fault> {
        let pool_key = PoolKey::App(self.address.clone());
        if alone {
            let open = self.pool.enter(None);
            return Ok(Pool::connect_once(self.dial().await?, open).await?);
        }
        if !anew && let Some(pooled) = self.pool.reuse(&pool_key) {
            return Ok(pooled);
        }
        let version = match self.protocol {
            Protocol::Http2 | Protocol::Grpc => Version::Http2,
            Protocol::Http | Protocol::Tcp => Version::Http1,
        };
        let dial = async {
            let open = self.pool.enter(None);
            Ok(Dialled { wire: self.dial().await?, version, open })
        };
        let pooled = if anew {
            self.pool.connect_anew(&pool_key, dial).await?
        } else {
            self.pool.connect(&pool_key, dial).await?
        };
        Ok(pooled)
    }

    async fn dial(&self) -> Result<Wire, NoConnection> {
        let connected = connect_app(self.address, self.connect_timeout, self.observer).await;
        let socket = connected.map_err(|problem| ConnectError::local_app(self.address, problem))?;
        Ok(Wire::plain(socket).counted(Counts::Cluster(Arc::clone(self.observer.local_app()))))
    }
}

/// Connections to the app that are tried for one request, where the app processes it on none.
const TRIES: usize = 5;
