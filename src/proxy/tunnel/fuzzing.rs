//! Checks of what a peer sends in a tunnel.

use super::{END, HEADER, Incoming, Phase, REASON, REFUSED, Refusal, Role, START, Version};

/// Bytes of a peer: the first says who we are and which version was agreed on, then each piece stands behind its length.
pub fn tunnel(bytes: &[u8]) {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let role = if first & 1 == 0 { Role::Server } else { Role::Client };
    let version = [Version::V1, Version::V2, Version::V3, Version::V3][usize::from(first >> 1 & 3)];
    let mut at_once = Peer::new(role, version);
    let mut by_byte = Peer::new(role, version);
    let phase = if version == Version::V1 { Phase::Carrying } else { Phase::Ended };
    let mut reference = Reference { role, version, phase, pending: Vec::new(), left: 0, reason: Vec::new() };
    let mut expected = Vec::new();
    while let Some((length, behind)) = rest.split_first() {
        let (piece, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        reference.take(piece, &mut expected);
        at_once.take(piece);
        piece.chunks(1).for_each(|byte| by_byte.take(byte));
        for peer in [&mut at_once, &mut by_byte] {
            assert_eq!(peer.opened, expected);
            assert_eq!(peer.incoming.phase, reference.phase);
            let is_refused = reference.phase == Phase::Refused;
            assert_eq!(peer.incoming.reason(), is_refused.then_some(&*reference.reason));
            if let Some(reason) = peer.incoming.reason() {
                assert!((1..=REASON as usize).contains(&reason.len()));
                assert!(!Refusal::decode(reason, version).to_string().contains(char::is_control));
            }
            peer.begin_another();
        }
        reference.phase = another(role, reference.phase);
    }
}

/// Whose bytes we read.
struct Peer {
    role: Role,
    incoming: Incoming,
    opened: Vec<u8>,
}

impl Peer {
    fn new(role: Role, version: Version) -> Self {
        Self { role, incoming: Incoming::new(role, version), opened: Vec::new() }
    }

    fn take(&mut self, piece: &[u8]) {
        self.incoming.take(piece, &mut self.opened);
    }

    fn begin_another(&mut self) {
        self.incoming.phase = another(self.role, self.incoming.phase);
    }
}

/// Our side begins the next connection as soon as it can: the server answers, the client asks.
fn another(role: Role, phase: Phase) -> Phase {
    match (role, phase) {
        (Role::Server, Phase::Requested) => Phase::Carrying,
        (Role::Client, Phase::Ended) => Phase::Awaiting,
        _ => phase,
    }
}

/// The same, from what docs say of the bytes, and with all of a header in view.
struct Reference {
    role: Role,
    version: Version,
    phase: Phase,
    /// The beginning of a header.
    pending: Vec<u8>,
    left: usize,
    reason: Vec<u8>,
}

impl Reference {
    fn take(&mut self, piece: &[u8], opened: &mut Vec<u8>) {
        for &byte in piece {
            if self.phase == Phase::Broken {
                return;
            }
            if self.left > 0 {
                self.left -= 1;
                match self.phase {
                    Phase::Reason => {
                        self.reason.push(byte);
                        self.phase = if self.left == 0 { Phase::Refused } else { Phase::Reason };
                    }
                    _ => opened.push(byte),
                }
                continue;
            }
            self.pending.push(byte);
            let Ok(header) = <[u8; HEADER]>::try_from(self.pending.as_slice()) else { continue };
            self.pending.clear();
            self.turn(u32::from_be_bytes(header));
        }
    }

    fn turn(&mut self, number: u32) {
        let may_ask = self.role == Role::Server && self.phase == Phase::Ended;
        let is_answer = self.phase == Phase::Awaiting;
        let may_end = self.role == Role::Client && self.phase == Phase::Carrying && self.version == Version::V3;
        self.phase = match number {
            START if may_ask => Phase::Requested,
            START if is_answer => Phase::Carrying,
            REFUSED if (is_answer && self.version != Version::V1) || may_end => Phase::Refusing,
            END if self.phase == Phase::Carrying => Phase::Ended,
            START | END | REFUSED => Phase::Broken,
            _ if self.phase == Phase::Refusing && number > REASON => Phase::Broken,
            _ if self.phase == Phase::Refusing => {
                self.left = number as usize;
                Phase::Reason
            }
            _ if self.phase == Phase::Carrying => {
                self.left = number as usize;
                Phase::Carrying
            }
            _ => Phase::Broken,
        };
    }
}
