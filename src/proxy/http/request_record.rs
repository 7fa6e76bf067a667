//! The record of a request, filled on its way and finished when the response is over.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;

use super::deadlines::TimedOut;
use crate::jwt::Providers;
use crate::observe::{Attempt, AttemptResult, ConnectionInfo, Destination, Event, Observer, RequestRecord};
use crate::proxy::codec::replay_body::BodyProgress;
use crate::proxy::outcome::{Fault, Outcome};
use crate::snapshot::Routed;
use crate::stats::ClusterStats;

/// Begins the records of the requests of one connection.
#[derive(Debug, Clone)]
pub(crate) struct RequestObserver {
    pub observer: Observer,
    pub connection: Arc<ConnectionInfo>,
}

impl RequestObserver {
    /// Of a request whose head has come just now.
    #[must_use]
    pub(crate) fn begin<B>(&self, request: &Request<B>, is_grpc: bool) -> Box<RequestRecorder> {
        let log = self.observer.active_access_log();
        let mut record = RequestRecord::new(Arc::clone(&self.connection), request, log);
        record.is_grpc = is_grpc && self.connection.listener.is_grpc();
        record.traced = self.observer.begin_trace(&self.connection, request.headers());
        self.observer.observe(Event::RequestReceived(&record));
        Box::new(RequestRecorder { observer: self.observer.clone(), record, upload: None })
    }
}

/// Tells the observer of one request, and that it is over when this is dropped.
pub(crate) struct RequestRecorder {
    observer: Observer,
    record: RequestRecord,
    upload: Option<BodyProgress>,
}

impl RequestRecorder {
    pub(crate) fn record(&self) -> &RequestRecord {
        &self.record
    }

    /// Logs show no tokens where these look for them.
    pub(crate) fn hide_tokens_of(&mut self, providers: &Arc<Providers>) {
        self.record.providers = Some(Arc::clone(providers));
    }

    /// Audit mode lets it through; `rule` says what would have denied it.
    pub(crate) fn audited(&mut self, rule: String) {
        self.record.would_be_denied_by = Some(rule.into());
    }

    /// Audit mode has let it through.
    pub(crate) fn is_audited(&self) -> bool {
        self.record.would_be_denied_by.is_some()
    }

    /// Writes the trace's headers, if it is traced, with which it goes on.
    pub(crate) fn pass_trace_on(&mut self, headers: &mut HeaderMap) {
        if let Some(traced) = &mut self.record.traced {
            traced.pass_on(headers);
        }
    }

    pub(crate) fn routed(&mut self, routed: &Routed<'_>) {
        self.record.route = routed.route.map(|route| Arc::clone(&route.name));
    }

    /// The target that it is for, wherever it is sent to in the end.
    pub(crate) fn meant_for(&mut self, cluster: &Arc<ClusterStats>) {
        self.record.cluster = Some(Arc::clone(cluster));
    }

    /// It goes out on a connection.
    pub(crate) fn sent(&mut self, cluster: &Arc<ClusterStats>) {
        self.observer.observe(Event::RequestSent(cluster));
        let before = self.record.cluster.replace(Arc::clone(cluster));
        if let Some(before) = before.filter(|_| self.record.is_sent) {
            before.requests_active.decrement();
        }
        cluster.requests_active.increment();
        self.record.is_sent = true;
    }

    /// It is sent again by a retry that is configured, or would be if it were `allowed` at this time.
    pub(crate) fn retried(&mut self, allowed: bool) {
        self.record.retries += u32::from(allowed);
        if let Some(cluster) = &self.record.cluster {
            self.observer.observe(if allowed { Event::Retried(cluster) } else { Event::RetryRefused(cluster) });
        }
    }

    /// The answer is not passed on, as the request is sent again.
    pub(crate) fn answer_retried(&self, cluster: &ClusterStats, status: StatusCode) {
        self.observer.observe(Event::AnswerRetried { cluster, status: status.as_u16() });
    }

    pub(crate) fn uploads(&mut self, upload: Option<&BodyProgress>) {
        self.upload = upload.cloned();
    }

    /// Begins an attempt at a destination.
    pub(crate) fn attempt(&mut self, destination: Destination) {
        let attempt = Attempt::new(destination);
        self.observer.observe(Event::AttemptStarted(&attempt));
        self.record.attempts.push(attempt);
    }

    /// Records the result of the attempt at a destination that `matches`.
    pub(crate) fn attempt_ended(
        &mut self,
        matches: impl Fn(&Destination) -> bool,
        result: impl FnOnce() -> AttemptResult,
    ) {
        let Some(attempt) = self.record.attempts.pending(matches) else { return };
        attempt.end(result());
        self.observer.observe(Event::AttemptEnded(attempt));
    }

    /// There is a response, which it goes with until that is over. An attempt that was not ended ends with it.
    pub(crate) fn answered<B>(&mut self, response: &Response<B>, fault: Option<Fault>) {
        let result = || fault.as_ref().map_or(AttemptResult::Responded(response.status().as_u16()), Into::into);
        self.attempt_ended(|_| true, result);
        let record = &mut self.record;
        record.responded = Some(record.started.elapsed());
        record.status = response.status().as_u16();
        if let Some(copied) = &mut record.access_log {
            copied.set_response(response.headers());
        }
        if let Some(traced) = &mut record.traced {
            traced.answered(response.headers());
        }
        if let Some(Fault { outcome, cause }) = fault {
            (record.outcome, record.cause) = (outcome, Some(cause));
        }
        record.answer = Some(record.outcome);
        if record.outcome == Outcome::Ended {
            self.grpc_status(response.headers());
        }
        let record = &self.record;
        self.observer.observe(Event::ResponseStarted(record));
    }

    pub(crate) fn frame(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.record.bytes_sent += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            self.record.access_log.iter_mut().for_each(|copied| copied.set_trailers(trailers));
            self.record.traced.iter_mut().for_each(|traced| traced.answered(trailers));
            self.grpc_status(trailers);
        }
    }

    /// In trailers, or in the head of an answer that has nothing else.
    fn grpc_status(&mut self, headers: &HeaderMap) {
        if self.record.is_grpc
            && let Some(status) = headers.get("grpc-status")
        {
            self.record.grpc_status = status.to_str().ok().and_then(|status| status.parse().ok());
        }
    }

    /// All of the response was given.
    pub(crate) fn complete(&mut self) {
        self.record.is_complete = true;
    }

    /// The response broke off, as its source is denied now.
    pub(crate) fn denied(&mut self) {
        self.record.is_complete = true;
        self.record.is_cut = true;
        self.record.answer = Some(Outcome::Denied);
    }

    /// The response broke off: it was not waited for any longer, or (`None`) the sender failed.
    pub(crate) fn broken(&mut self, expired: Option<TimedOut>) {
        self.record.is_complete = true;
        self.record.outcome = match expired {
            None => Outcome::Reset,
            Some(TimedOut::Upload) => Outcome::ClientReset,
            Some(expired) => Fault::from(expired).outcome,
        };
        self.record.is_cut = self.record.outcome != Outcome::ClientReset;
    }
}

impl Drop for RequestRecorder {
    fn drop(&mut self) {
        let record = &mut self.record;
        if !record.is_complete {
            // Not all was taken: the client is gone.
            record.outcome = Outcome::Aborted;
        }
        record.bytes_received = self.upload.as_ref().map_or(0, BodyProgress::received);
        record.duration = record.started.elapsed();
        self.observer.observe(Event::RequestFinished(record));
    }
}
