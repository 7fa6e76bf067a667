//! Why there is no connection, or no response on one.

use std::error::Error;
use std::sync::Arc;

use http::Request;

use crate::observe::ConnectError;
use crate::proxy::codec::client;
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::limits::Overflow;
use crate::snapshot::Failure;

/// A request that brought no response.
pub struct Failed {
    /// The request itself, if nothing of it was sent.
    pub request: Option<Box<Request<ReplayBody>>>,
    pub failure: Failure,
    cause: Cause,
}

enum Cause {
    Http1(hyper::Error),
    Http2(h2::Error),
    /// There was a response, which is not to be passed on.
    Framing(&'static str),
}

/// Why there is no connection. All tasks that waited for the same one get the same reason.
#[derive(Debug, Clone)]
pub enum NoConnection {
    Overflow(Overflow),
    Unreachable(ConnectError),
}

impl From<Overflow> for NoConnection {
    fn from(overflow: Overflow) -> Self {
        Self::Overflow(overflow)
    }
}

impl From<ConnectError> for NoConnection {
    fn from(error: ConnectError) -> Self {
        Self::Unreachable(error)
    }
}

impl Failed {
    /// For a response whose headers describe another message than it is.
    pub(super) fn framing(fault: &'static str) -> Self {
        Self { request: None, failure: Failure::Reset, cause: Cause::Framing(fault) }
    }

    pub(super) fn http1(mut failed: hyper::client::conn::TrySendError<Request<ReplayBody>>) -> Self {
        let request = failed.take_message().map(Box::new);
        let failure = if request.is_some() { Failure::ResetBeforeRequest } else { Failure::Reset };
        Self { request, failure, cause: Cause::Http1(failed.into_error()) }
    }

    pub(super) fn http2(failed: client::Unanswered) -> Self {
        let client::Unanswered { request, error } = failed;
        let failure = match &request {
            Some(_) => Failure::ResetBeforeRequest,
            None if client::is_refusal(&error) => Failure::Refused,
            None => Failure::Reset,
        };
        Self { request: request.map(Box::new), failure, cause: Cause::Http2(error) }
    }

    /// The connection ended, or was ended, before there was an answer.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &self.cause {
            Cause::Http1(error) => {
                let io = Error::source(error).is_some_and(|source| source.is::<std::io::Error>());
                error.is_incomplete_message() || error.is_closed() || error.is_canceled() || io
            }
            Cause::Http2(error) => error.is_io(),
            Cause::Framing(_) => false,
        }
    }

    /// The answer is not HTTP, or must not be passed on.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        match &self.cause {
            Cause::Http1(error) => error.is_parse(),
            Cause::Http2(error) => error.is_library() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR),
            Cause::Framing(_) => true,
        }
    }

    /// For the log.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.cause {
            Cause::Http1(error) => match Error::source(error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            },
            Cause::Http2(error) => error.to_string(),
            Cause::Framing(fault) => (*fault).to_owned(),
        }
    }
}

pub(super) fn no_codec(error: impl Error + Send + Sync + 'static) -> NoConnection {
    NoConnection::Unreachable(ConnectError::Codec(Arc::new(error)))
}
