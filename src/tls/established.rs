//! The result of a handshake.

use rustls::{HandshakeKind, ProtocolVersion};

use super::unbuffered::Session;

/// How a handshake that succeeded was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    /// A session of before was taken up again, without certificates.
    pub is_resumed: bool,
    pub version: Version,
}

/// A version of TLS that the mesh may allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Tls12,
    Tls13,
}

impl Session {
    pub(super) fn handshake(&self) -> Handshake {
        let (kind, version) = match self {
            Self::Client(it) => (it.handshake_kind(), it.protocol_version()),
            Self::Server(it) => (it.handshake_kind(), it.protocol_version()),
        };
        Handshake {
            is_resumed: kind == Some(HandshakeKind::Resumed),
            version: if version == Some(ProtocolVersion::TLSv1_2) { Version::Tls12 } else { Version::Tls13 },
        }
    }
}
