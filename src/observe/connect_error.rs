//! Why no connection to a destination could be made.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::snapshot::LocalApp;
use crate::tls::{Alert, HandshakeError, PeerError, Refused};

/// Why no connection to a destination could be made. All that waited for the same connection share it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// TCP failed.
    #[error("{0}")]
    Io(Arc<io::Error>),
    #[error("did not answer in time")]
    TimedOut,
    #[error("broke off the TLS handshake: {0}")]
    HandshakeBroken(Arc<io::Error>),
    #[error("did not finish the TLS handshake in time")]
    HandshakeTimedOut,
    #[error("was refused: {0}")]
    Handshake(Arc<HandshakeError>),
    /// The handshake succeeded with a server that is not the one that was meant.
    #[error("was refused: {0}")]
    Peer(Arc<PeerError>),
    #[error("broke off before it had connected: {0}")]
    TunnelBroken(Arc<io::Error>),
    #[error("did not connect to its local app in time")]
    TunnelTimedOut,
    #[error("no HTTP connection could be made: {0}")]
    Codec(Arc<dyn Error + Send + Sync>),
    #[error("failed to dial the local app at {app}: {problem}; {LOCAL_APP_REMEDY}")]
    LocalApp { app: LocalApp, problem: LocalAppProblem },
}

/// Why the local app took no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LocalAppProblem {
    #[error("{0}")]
    Io(Arc<io::Error>),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

const LOCAL_APP_REMEDY: &str = "is it listening there? (LocalServiceAddress and LocalServicePort of the registration)";

impl ConnectError {
    /// The local app took no connection.
    #[must_use]
    pub fn local_app(app: &LocalApp, problem: LocalAppProblem) -> Self {
        Self::LocalApp { app: app.clone(), problem }
    }

    /// What is wrong with the far end, without what that led to; for logs.
    #[must_use]
    pub fn problem(&self) -> String {
        match self {
            Self::Handshake(error) => error.to_string(),
            Self::Peer(error) => error.to_string(),
            other => other.to_string(),
        }
    }

    /// Something answers there that is not what the catalog says.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Handshake(_) | Self::Peer(_))
    }

    /// Nothing came within the time for it.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::TimedOut
                | Self::HandshakeTimedOut
                | Self::TunnelTimedOut
                | Self::LocalApp { problem: LocalAppProblem::TimedOut(_), .. }
        )
    }

    /// What a handshake with the destination failed for; `None` where there was none, or the time was over.
    #[must_use]
    pub fn refused(&self) -> Option<Refused> {
        match self {
            Self::Handshake(error) => Some(error.refused()),
            Self::Peer(error) => Some(error.refused()),
            Self::HandshakeBroken(_) => Some(Refused::Connection),
            _ => None,
        }
    }

    /// What the destination's sidecar said of us, if it refused us with an alert.
    #[must_use]
    pub fn alert(&self) -> Option<Alert> {
        match self {
            Self::Handshake(error) => error.alert(),
            Self::HandshakeBroken(error) | Self::TunnelBroken(error) => Alert::received(error),
            _ => None,
        }
    }

    /// TLS with the destination failed; for `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.is_refused() || matches!(self, Self::HandshakeBroken(_) | Self::HandshakeTimedOut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_follow_the_address_of_an_instance() {
        let broken = || Arc::new(io::Error::from(io::ErrorKind::ConnectionReset));
        let app = LocalApp::Unix("/run/app".into());
        let slow = ConnectError::local_app(&app, LocalAppProblem::TimedOut(Duration::from_secs(5)));
        for (error, sentence, timeout, tls) in [
            (ConnectError::Io(broken()), "connection reset", false, false),
            (ConnectError::TimedOut, "did not answer in time", true, false),
            (ConnectError::HandshakeBroken(broken()), "broke off the TLS handshake: connection reset", false, true),
            (
                ConnectError::Handshake(Arc::new(HandshakeError::Silent)),
                "was refused: the peer closed the connection without a word",
                false,
                true,
            ),
            (ConnectError::TunnelTimedOut, "did not connect to its local app in time", true, false),
            (
                slow,
                "failed to dial the local app at unix:///run/app: no answer within 5s; is it listening there? \
                    (LocalServiceAddress and LocalServicePort of the registration)",
                true,
                false,
            ),
        ] {
            assert_eq!((error.to_string().as_str(), error.is_timeout(), error.is_tls()), (sentence, timeout, tls));
        }
    }
}
