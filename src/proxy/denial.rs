//! What the sidecar of a client knows of a denial: what the sidecar of the destination says of it, or how it ends the
//! connection without a word.

use std::fmt;
use std::io;

use super::log_limit::LogLimit;
use super::outcome::{Fault, Outcome};
use crate::tls::{Alert, SpiffeId};

/// How a connection ends that the sidecar of the destination ended after the handshake and without a byte. `address` is
/// the instance's, `broken` how its side broke off, if it did not end in order.
pub(super) fn unanswered(address: impl fmt::Display, broken: Option<&io::Error>) -> Fault {
    let alert = broken.and_then(Alert::received);
    let cause = match alert {
        Some(Alert::AccessDenied) => format!("{address} denied the connection with the TLS alert access_denied"),
        Some(Alert::BadCertificate) => format!(
            "{address} sent the TLS alert bad_certificate: probably denied, as Consul's built-in proxy denies so; \
             otherwise it does not accept our certificate"
        ),
        Some(Alert::Certificate(name)) => format!(
            "{address} does not accept our certificate (TLS alert {name}): compare the roots of both sides and the \
             clocks of both hosts"
        ),
        None => format!(
            "{address} ended the connection after the handshake and without a byte{}: probably denied; \
             otherwise its app took no connection or closed it at once. The log of its sidecar says which",
            broken.map(|error| format!(" ({error})")).unwrap_or_default(),
        ),
    };
    Fault::new(alert.map_or(Outcome::ProbablyDenied, outcome), cause)
}

/// The outcome of a connection that ended with this alert.
pub(super) fn outcome(alert: Alert) -> Outcome {
    match alert {
        Alert::AccessDenied => Outcome::DeniedByDestination,
        Alert::BadCertificate => Outcome::ProbablyDenied,
        Alert::Certificate(_) => Outcome::Unreachable,
    }
}

/// Logs that a connection of the local app to `upstream` failed; `source` is who we are.
pub(super) fn log(upstream: &str, source: Option<&SpiffeId>, fault: &Fault, log_limit: &LogLimit) {
    if !log_limit.is_first(upstream, &fault.cause) {
        return;
    }
    let what = match fault.outcome {
        Outcome::DeniedByDestination => "Connection denied by the destination",
        Outcome::ProbablyDenied => "Connection probably denied by the destination",
        _ => "failed to dial the upstream",
    };
    let source = source.map(tracing::field::display);
    tracing::warn!(target: "proxy.upstream", upstream, source, reason = &*fault.cause, "{what}");
}

#[cfg(test)]
mod tests {
    use rustls::{AlertDescription, Error};

    use super::*;

    #[test]
    fn what_is_not_certain_is_called_probable() {
        let alert = |alert| io::Error::new(io::ErrorKind::InvalidData, Error::AlertReceived(alert));
        for (broken, outcome, words) in [
            (None, Outcome::ProbablyDenied, "probably denied; otherwise its app"),
            (Some(io::ErrorKind::ConnectionReset.into()), Outcome::ProbablyDenied, "(connection reset): probably"),
            (Some(alert(AlertDescription::BadCertificate)), Outcome::ProbablyDenied, "probably denied, as Consul's"),
            (Some(alert(AlertDescription::AccessDenied)), Outcome::DeniedByDestination, "denied the connection with"),
            (Some(alert(AlertDescription::UnknownCA)), Outcome::Unreachable, "does not accept our certificate"),
            (Some(alert(AlertDescription::InternalError)), Outcome::ProbablyDenied, "probably denied; otherwise"),
        ] {
            let fault = unanswered("10.0.0.1:20000", broken.as_ref());
            assert!(fault.outcome == outcome && fault.cause.contains(words), "{fault:?}");
            assert!(fault.cause.starts_with("10.0.0.1:20000 "), "{fault:?}");
        }
    }
}
