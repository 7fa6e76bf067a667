//! The values of operators in header edits of a request to an upstream.

use std::borrow::Cow;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, StatusCode, Version};

use super::message::Head;
use crate::observe::{ConnectionInfo, RequestRecord};
use crate::operators::{Record, Request, Response, Upstream};
use crate::snapshot::Routed;

/// The values that do not change until the response.
pub(super) struct Known<'a> {
    connection: &'a ConnectionInfo,
    pub routed: &'a Routed<'a>,
    version: Version,
    start: SystemTime,
    began: Instant,
}

impl<'a> Known<'a> {
    #[must_use]
    pub(super) fn new(connection: &'a ConnectionInfo, routed: &'a Routed<'a>, record: &RequestRecord) -> Self {
        Self { connection, routed, version: record.version, start: record.start, began: record.started }
    }

    /// Edits the headers of the request as the chain says.
    pub(super) fn edit_request(&self, head: &mut Head) {
        if self.routed.request_edits.iter().all(|edits| edits.is_empty()) {
            return;
        }
        let mut headers = std::mem::take(&mut head.headers);
        let record = self.record(Some(head), None);
        self.routed.request_edits.iter().for_each(|edits| edits.apply_to_request(&mut headers, &record));
        head.headers = headers;
    }

    /// The request, if the edits of the response need it.
    #[must_use]
    pub(super) fn keep(&self, head: &Head) -> Option<Head> {
        self.routed.response_edits.iter().any(|edits| edits.have_operators()).then(|| head.clone())
    }

    /// Edits the headers of the response as the chain says; `request` is what was kept of the request.
    pub(super) fn edit_response(&self, request: Option<&Head>, status: StatusCode, headers: &mut HeaderMap) {
        let empty = HeaderMap::new();
        let response = Response {
            code: status.as_u16(),
            details: Some(Cow::Borrowed("via_upstream")),
            headers: &empty,
            trailers: None,
        };
        let record = self.record(request, Some(response));
        self.routed.response_edits.iter().for_each(|edits| edits.apply_to_response(headers, &record));
    }

    fn record<'r>(&'r self, head: Option<&'r Head>, response: Option<Response<'r>>) -> Record<'r> {
        let target = self.routed.resolver.targets.first();
        Record {
            duration: self.began.elapsed(),
            response_duration: response.as_ref().map(|_| self.began.elapsed()),
            request: head.map(|head| Request {
                protocol: if self.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
                method: head.method.as_str(),
                path: head.path.as_str(),
                authority: head.authority.to_str().unwrap_or_default(),
                headers: &head.headers,
            }),
            response,
            // As Envoy has it where nothing went wrong.
            flags: Cow::Borrowed("-"),
            upstream: target.map(|target| Upstream {
                cluster: target.cluster(),
                route: None,
                host: None,
                local: None,
                transport_failure: None,
                attempts: 1,
            }),
            downstream_local: self.connection.local.as_deref().copied(),
            downstream_remote: self.connection.remote,
            ..Record::new(self.start)
        }
    }
}
