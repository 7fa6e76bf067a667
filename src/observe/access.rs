//! The access log, as a reader of records.

use std::borrow::Cow;

use super::attempt::Attempt;
use super::connection::{ConnectionRecord, Direction};
use super::outcome::Outcome;
use super::request::RequestRecord;
use crate::access_log::{Record, Request, Response, Secrets, Upstream};

/// Writes the line of a connection that carries bytes.
pub(super) fn log_connection(record: &ConnectionRecord) {
    let Some((log, start)) = record.access_log.as_deref() else { return };
    let last = record.attempts.last().filter(|_| record.is_connected);
    let upstream = last.map(|attempt| Upstream {
        cluster: match record.direction() {
            Direction::Inbound => attempt.destination.cluster(),
            Direction::Outbound => Cow::Borrowed(record.info.listener.name()),
        },
        attempts: 1,
        ..upstream(attempt)
    });
    let line = Record {
        duration: record.duration,
        // As in Envoy, one that was carried has none, however it ended.
        flags: Cow::Borrowed(if upstream.is_some() { "" } else { record.outcome.describe().flag }),
        bytes_received: record.bytes_received,
        bytes_sent: record.bytes_sent,
        connection_termination: (record.outcome != Outcome::Ended).then_some(Cow::Borrowed(&record.cause)),
        upstream,
        downstream_local: record.info.local.as_deref().copied(),
        downstream_remote: record.info.remote,
        peer: record.info.peer.as_deref(),
        would_be_denied_by: record.would_be_denied_by.as_deref(),
        ..Record::new(*start)
    };
    log.log(&line, Secrets::default());
}

/// Writes the line of a request.
pub(super) fn log_request(record: &RequestRecord) {
    let Some(copied) = &record.access_log else { return };
    let attempts = u32::try_from(record.attempts.len()).unwrap_or(u32::MAX);
    let line = Record {
        duration: record.duration,
        response_duration: record.responded,
        request: Some(Request {
            protocol: record.protocol(),
            method: record.method.as_str(),
            path: record.path(),
            authority: record.authority(),
            headers: &copied.request,
        }),
        response: (record.status > 0).then(|| Response {
            code: record.status,
            details: record.answer.map(|outcome| Cow::Borrowed(outcome.describe().details)),
            headers: &copied.response,
            trailers: copied.trailers.as_ref(),
        }),
        flags: Cow::Borrowed(record.outcome.describe().flag),
        bytes_received: record.bytes_received,
        bytes_sent: record.bytes_sent,
        upstream: record.attempts.last().map(|attempt| Upstream { attempts, ..upstream(attempt) }),
        downstream_local: record.connection.local.as_deref().copied(),
        downstream_remote: record.connection.remote,
        peer: record.connection.peer.as_deref(),
        would_be_denied_by: record.would_be_denied_by.as_deref(),
        ..Record::new(record.start)
    };
    copied.log.log(&line, Secrets { providers: record.providers.as_deref() });
}

fn upstream(attempt: &Attempt) -> Upstream<'_> {
    Upstream {
        cluster: attempt.destination.cluster(),
        route: None,
        host: Some(Cow::Owned(attempt.destination.host())),
        local: None,
        transport_failure: None,
        attempts: 1,
    }
}
