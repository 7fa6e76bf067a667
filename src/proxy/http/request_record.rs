//! What the access log is told of one request, gathered on its way and written when the response is over.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use http_body::Frame;

use super::deadlines::TimedOut;
use crate::access_log::{self, AccessLog, Active, Record, Secrets};
use crate::jwt::Providers;
use crate::proxy::codec::replay_body::BodyProgress;
use crate::proxy::outcome::{Fault, Outcome};
use crate::tls::SpiffeId;

/// Who asks, the same for all requests of a connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionInfo {
    pub access_log: AccessLog,
    pub remote: Option<SocketAddr>,
    pub local: Option<SocketAddr>,
    pub peer: Option<Arc<SpiffeId>>,
}

/// Writes its line when it is dropped.
pub(crate) struct RequestRecord {
    log: Arc<Active>,
    caller: ConnectionInfo,
    start: SystemTime,
    began: Instant,
    answered: Option<Instant>,
    version: Version,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    status: u16,
    response_headers: HeaderMap,
    trailers: Option<HeaderMap>,
    /// How the answer began.
    answer: Option<Outcome>,
    outcome: Outcome,
    /// They say where tokens are that the log must not show.
    providers: Option<Arc<Providers>>,
    upstream: Option<Upstream>,
    upload: Option<BodyProgress>,
    sent: u64,
    complete: bool,
}

struct Upstream {
    cluster: String,
    host: String,
    attempts: u32,
}

impl ConnectionInfo {
    /// `None` where nothing is logged.
    #[must_use]
    pub(crate) fn record<B>(&self, request: &Request<B>) -> Option<Box<RequestRecord>> {
        let log = self.access_log.active()?;
        Some(Box::new(RequestRecord {
            log,
            caller: self.clone(),
            start: SystemTime::now(),
            began: Instant::now(),
            answered: None,
            version: request.version(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            status: 0,
            response_headers: HeaderMap::new(),
            trailers: None,
            answer: None,
            outcome: Outcome::Ended,
            providers: None,
            upstream: None,
            upload: None,
            sent: 0,
            complete: false,
        }))
    }
}

impl RequestRecord {
    /// The log shows no tokens where these look for them.
    pub(crate) fn hide_tokens_of(&mut self, providers: &Arc<Providers>) {
        self.providers = Some(Arc::clone(providers));
    }

    /// Where it is sent now.
    pub(crate) fn sent_to(&mut self, cluster: impl ToString, host: impl ToString) {
        let attempts = self.upstream.as_ref().map_or(1, |upstream| upstream.attempts + 1);
        self.upstream = Some(Upstream { cluster: cluster.to_string(), host: host.to_string(), attempts });
    }

    pub(crate) fn uploads(&mut self, upload: Option<&BodyProgress>) {
        self.upload = upload.cloned();
    }

    /// There is a response, which it goes with until that is over.
    pub(crate) fn answered<B>(&mut self, response: &Response<B>, fault: Option<&Fault>) {
        self.answered = Some(Instant::now());
        self.status = response.status().as_u16();
        self.response_headers = response.headers().clone();
        self.outcome = fault.map_or(Outcome::Ended, |fault| fault.outcome);
        self.answer = Some(self.outcome);
    }

    pub(crate) fn frame(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.sent += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
    }

    /// All of the response was given.
    pub(crate) fn complete(&mut self) {
        self.complete = true;
    }

    /// The response broke off, as its source is denied now.
    pub(crate) fn denied(&mut self) {
        self.complete = true;
        self.answer = Some(Outcome::Denied);
    }

    /// The response broke off: it was not waited for any longer, or (`None`) whoever sent it failed to.
    pub(crate) fn broken(&mut self, expired: Option<TimedOut>) {
        self.complete = true;
        self.outcome = match expired {
            None => Outcome::Reset,
            Some(TimedOut::Upload) => Outcome::ClientReset,
            Some(expired) => Fault::from(expired).outcome,
        };
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let authority = self.uri.authority().map(|authority| authority.as_str());
        let host = || self.headers.get(http::header::HOST).and_then(|host| host.to_str().ok());
        // Not all was taken: whoever asked is gone.
        let outcome = if self.complete { self.outcome } else { Outcome::Aborted };
        let secrets = Secrets { providers: self.providers.as_deref() };
        let record = Record {
            duration: self.began.elapsed(),
            response_duration: self.answered.map(|at| at - self.began),
            request: Some(access_log::Request {
                protocol: if self.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
                method: self.method.as_str(),
                path: self.uri.path_and_query().map_or("", |path| path.as_str()),
                authority: authority.or_else(host).unwrap_or_default(),
                headers: &self.headers,
            }),
            response: (self.status > 0).then(|| access_log::Response {
                code: self.status,
                details: self.answer.map(|outcome| Cow::Borrowed(outcome.describe().details)),
                headers: &self.response_headers,
                trailers: self.trailers.as_ref(),
            }),
            flags: Cow::Borrowed(outcome.describe().flag),
            bytes_received: self.upload.as_ref().map_or(0, BodyProgress::received),
            bytes_sent: self.sent,
            upstream: self.upstream.as_ref().map(|upstream| access_log::Upstream {
                cluster: Cow::Borrowed(&upstream.cluster),
                route: None,
                host: Some(Cow::Borrowed(&upstream.host)),
                local: None,
                transport_failure: None,
                attempts: upstream.attempts,
            }),
            downstream_local: self.caller.local,
            downstream_remote: self.caller.remote,
            peer: self.caller.peer.as_deref(),
            ..Record::new(self.start)
        };
        self.log.log(&record, secrets);
    }
}
