//! The messages of a tunnel as they come in, and the versions that say which there are. docs/tunnel.md specifies them.

use crate::tls::{Leftover, TUNNEL, TUNNEL_1, TUNNEL_2};

/// Header of no data: the end of one direction of the connection.
pub(super) const END: u32 = 0;
/// Header of no data: another connection begins.
pub(super) const START: u32 = u32::MAX;
/// Header of no data: no connection begins, or the open one does not go on. A piece of 1 to [`REASON`] bytes follows, of
/// which the first says why.
pub(super) const REFUSED: u32 = u32::MAX - 1;
/// Longest reason, in bytes.
pub(super) const REASON: u32 = 255;
pub(super) const HEADER: usize = size_of::<u32>();

/// The version of the tunnel that both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V1,
    /// Each connection is asked for, and a server answers when its app has taken it, or why none begins.
    V2,
    /// A server also says why it ends an open connection.
    V3,
}

impl Version {
    /// The version that an application protocol stands for, if it is one of a tunnel.
    pub(super) fn agreed(alpn: &[u8]) -> Option<Self> {
        let known = [(TUNNEL, Self::V3), (TUNNEL_2, Self::V2), (TUNNEL_1, Self::V1)];
        known.into_iter().find(|(name, _)| *name == alpn).map(|(_, version)| version)
    }

    /// Whether each connection of a session is asked for, the first one too.
    pub(super) fn asks(self) -> bool {
        self >= Self::V2
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// Takes the peer's direction apart, however it is cut into pieces. It keeps nothing but a part of a header, and a reason.
#[derive(Debug)]
pub(super) struct Incoming {
    role: Role,
    pub(super) version: Version,
    pub(super) phase: Phase,
    header: [u8; HEADER],
    /// Bytes of the header that have come.
    begun: usize,
    /// Bytes of the connection that are still to come of this piece.
    left: u32,
    /// At the client: why the server refuses, [`REASON`] bytes at most.
    reason: Leftover,
}

/// How far the peer's direction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Of a connection.
    Carrying,
    /// At the client: the server refuses, and the reason follows.
    Refusing,
    /// At the client: the reason is being read.
    Reason,
    /// At the client: no connection begins, or the open one has ended, for the reason that was read.
    Refused,
    /// Of the connection, and no other has begun.
    Ended,
    /// At the server: the client wants another connection and waits for the answer.
    Requested,
    /// At the client: it waits for the answer.
    Awaiting,
    /// The bytes received are malformed.
    Broken,
}

impl Phase {
    /// At the client: whether it has the answer that it waits for, if only that there is no sense in it.
    pub(super) fn is_answer(self) -> bool {
        !matches!(self, Self::Awaiting | Self::Refusing | Self::Reason)
    }

    /// Whether more of the connection may come, or why it has ended.
    #[inline]
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Carrying | Self::Refusing | Self::Reason)
    }
}

impl Incoming {
    pub(super) fn new(role: Role, version: Version) -> Self {
        let phase = if version.asks() { Phase::Ended } else { Phase::Carrying };
        Self { role, version, phase, header: [0; HEADER], begun: 0, left: 0, reason: Leftover::default() }
    }

    /// Why the server refuses, once all of the reason has come.
    pub(super) fn reason(&self) -> Option<&[u8]> {
        (self.phase == Phase::Refused).then_some(&*self.reason)
    }

    /// Appends to `opened` what of `payload` is the connection's.
    pub(super) fn take(&mut self, mut payload: &[u8], opened: &mut Vec<u8>) {
        while !payload.is_empty() && self.phase != Phase::Broken {
            if self.left > 0 {
                let (piece, rest) = payload.split_at(payload.len().min(self.left as usize));
                // Not more than `left`, which is such a number.
                self.left -= u32::try_from(piece.len()).unwrap_or(self.left);
                self.piece(piece, opened);
                payload = rest;
                continue;
            }
            let (part, rest) = payload.split_at(payload.len().min(HEADER - self.begun));
            self.header[self.begun..self.begun + part.len()].copy_from_slice(part);
            self.begun += part.len();
            payload = rest;
            if self.begun == HEADER {
                self.begun = 0;
                self.turn(u32::from_be_bytes(self.header));
            }
        }
    }

    /// Takes a part of a piece.
    fn piece(&mut self, piece: &[u8], opened: &mut Vec<u8>) {
        if self.phase != Phase::Reason {
            return opened.extend_from_slice(piece);
        }
        self.reason.extend_from_slice(piece);
        if self.left == 0 {
            self.phase = Phase::Refused;
        }
    }

    fn turn(&mut self, header: u32) {
        self.phase = match (self.phase, header) {
            (Phase::Carrying, END) => Phase::Ended,
            (Phase::Ended, START) if self.role == Role::Server => Phase::Requested,
            (Phase::Awaiting, START) => Phase::Carrying,
            (Phase::Awaiting, REFUSED) if self.version >= Version::V2 => Phase::Refusing,
            (Phase::Carrying, REFUSED) if self.version >= Version::V3 && self.role == Role::Client => Phase::Refusing,
            (Phase::Refusing, length @ 1..=REASON) => {
                self.left = length;
                Phase::Reason
            }
            (Phase::Carrying, length) if length < REFUSED => {
                self.left = length;
                Phase::Carrying
            }
            _ => Phase::Broken,
        };
    }
}
