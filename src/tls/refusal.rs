//! Why a peer is refused, and why a handshake did not succeed.

use std::sync::Arc;
use std::{fmt, io};

use rustls::{AlertDescription, CertificateError, OtherError};

use super::spiffe::SpiffeId;

/// Certificates in a peer's chain at most. Consul's chains have two or three, and four after a rotation.
pub(super) const MAX_CERTIFICATES: usize = 32;

/// Why a peer is not spoken to, although its chain may be good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerError {
    NoCertificate,
    /// Not X.509 as far as it has to be read.
    Malformed,
    TooManyCertificates(usize),
    /// No path to a root is valid yet.
    NotYetValid,
    /// No path to a root is valid any more.
    Expired,
    /// No root of ours issued it, not even by way of other certificates.
    UnknownIssuer,
    /// Its extended key usage, or that of an authority on the path, does not allow what it is shown for.
    NotFor(Purpose),
    /// There is a path to a root, and this is wrong with it.
    BadPath(String),
    /// None, or more than one, URI in the subject's alternative names.
    NotOneUri(usize),
    NotAService(String),
    TrustDomain(Box<SpiffeId>),
    Unexpected {
        shown: Box<SpiffeId>,
        expected: Vec<SpiffeId>,
    },
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("it showed no certificate"),
            Self::Malformed => f.write_str("its certificate can't be read"),
            Self::TooManyCertificates(shown) => {
                write!(f, "it showed {shown} certificates, more than {MAX_CERTIFICATES}")
            }
            Self::NotYetValid => f.write_str("its certificate is not valid yet (compare the hosts' clocks)"),
            Self::Expired => f.write_str("its certificate has expired"),
            Self::UnknownIssuer => f.write_str("its certificate does not chain to a root of the mesh (unknown issuer)"),
            Self::NotFor(purpose) => write!(
                f,
                "the extended key usage of its certificate, or of an authority above it, does not allow a {purpose}"
            ),
            Self::BadPath(problem) => {
                write!(f, "its certificate chains to a root of the mesh, but {problem}")
            }
            Self::NotOneUri(count) => {
                write!(f, "its certificate holds {count} URIs where a mesh identity is exactly one")
            }
            Self::NotAService(uri) => write!(f, "its identity {uri:?} is not that of a mesh service"),
            Self::TrustDomain(id) => write!(f, "its identity {id} is of another trust domain"),
            Self::Unexpected { shown, expected } => {
                write!(f, "its identity is {shown}, expected ")?;
                for (i, id) in expected.iter().enumerate() {
                    write!(f, "{}{id}", if i == 0 { "" } else { " or " })?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for PeerError {}

/// The purpose of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Client,
    Server,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}

/// The alert that tells the peer follows from this.
impl From<PeerError> for rustls::Error {
    fn from(error: PeerError) -> Self {
        Self::InvalidCertificate(match error {
            PeerError::NoCertificate => return Self::NoCertificatesPresented,
            PeerError::Malformed => CertificateError::BadEncoding,
            PeerError::NotYetValid => CertificateError::NotValidYet,
            PeerError::Expired => CertificateError::Expired,
            PeerError::UnknownIssuer => CertificateError::UnknownIssuer,
            error => CertificateError::Other(OtherError(Arc::new(error))),
        })
    }
}

impl PeerError {
    /// What such an error was made of, where the library has its own word for it.
    pub(super) fn of(error: &CertificateError) -> Option<Self> {
        match error {
            CertificateError::BadEncoding => Some(Self::Malformed),
            CertificateError::NotValidYet => Some(Self::NotYetValid),
            CertificateError::Expired => Some(Self::Expired),
            CertificateError::UnknownIssuer => Some(Self::UnknownIssuer),
            _ => None,
        }
    }
}

/// Why a handshake did not succeed.
#[derive(Debug)]
pub enum HandshakeError {
    Io(io::Error),
    Tls(rustls::Error),
    /// The peer left before it said anything, as health checks do.
    Silent,
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(e) => write!(f, "{e}"),
            Self::Tls(rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other))) => {
                write!(f, "{other}")
            }
            Self::Tls(rustls::Error::InvalidCertificate(error)) => match PeerError::of(error) {
                Some(error) => write!(f, "{error}"),
                None => write!(f, "{error}"),
            },
            Self::Tls(e) => write!(f, "{e}"),
            Self::Silent => f.write_str("the peer closed the connection without a word"),
        }
    }
}

impl std::error::Error for HandshakeError {}

/// The kind of a failed handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It was broken off, was no TLS, or had nothing in common with us.
    Connection,
    NoCertificate,
    /// No valid path leads from it to a root.
    Certificate,
    /// The certificate is good, and of somebody else.
    Identity,
}

impl PeerError {
    #[must_use]
    pub fn refused(&self) -> Refused {
        match self {
            Self::NoCertificate => Refused::NoCertificate,
            Self::NotOneUri(_) | Self::NotAService(_) | Self::TrustDomain(_) | Self::Unexpected { .. } => {
                Refused::Identity
            }
            _ => Refused::Certificate,
        }
    }
}

impl HandshakeError {
    #[must_use]
    pub fn refused(&self) -> Refused {
        match self {
            Self::Tls(rustls::Error::NoCertificatesPresented) => Refused::NoCertificate,
            Self::Tls(rustls::Error::InvalidCertificate(error)) => {
                PeerError::of(error).map_or(Refused::Certificate, |error| error.refused())
            }
            Self::Tls(_) | Self::Io(_) | Self::Silent => Refused::Connection,
        }
    }
}

/// The alert of a peer that ends a session (RFC 8446, section 6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alert {
    /// `access_denied`: our certificate is good, and we may not.
    AccessDenied,
    /// `bad_certificate`. Consul's built-in proxy sends it for a denied intention as well.
    BadCertificate,
    /// Another one that is about our certificate, which has this name.
    Certificate(&'static str),
}

impl Alert {
    /// The alert that an error of a [`super::Stream`] stands for, if it is one of those.
    #[must_use]
    pub fn received(error: &io::Error) -> Option<Self> {
        Self::of(error.get_ref()?.downcast_ref()?)
    }

    fn of(error: &rustls::Error) -> Option<Self> {
        let rustls::Error::AlertReceived(alert) = error else { return None };
        Some(match alert {
            AlertDescription::AccessDenied => Self::AccessDenied,
            AlertDescription::BadCertificate => Self::BadCertificate,
            AlertDescription::UnsupportedCertificate => Self::Certificate("unsupported_certificate"),
            AlertDescription::CertificateRevoked => Self::Certificate("certificate_revoked"),
            AlertDescription::CertificateExpired => Self::Certificate("certificate_expired"),
            AlertDescription::CertificateUnknown => Self::Certificate("certificate_unknown"),
            AlertDescription::UnknownCA => Self::Certificate("unknown_ca"),
            AlertDescription::CertificateRequired => Self::Certificate("certificate_required"),
            _ => return None,
        })
    }
}

impl HandshakeError {
    /// The peer's alert, if it refused us with one.
    #[must_use]
    pub fn alert(&self) -> Option<Alert> {
        match self {
            Self::Tls(error) => Alert::of(error),
            Self::Io(_) | Self::Silent => None,
        }
    }

    pub(super) fn too_large() -> Self {
        Self::Tls(rustls::Error::General("the handshake is too large".into()))
    }

    /// Whether the server refuses a client for offering none of its application protocols.
    #[must_use]
    pub fn is_lack_of_protocol(&self) -> bool {
        matches!(self, Self::Tls(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)))
    }
}
