//! Checks of what a peer sends in a tunnel.

use super::{END, HEADER, Incoming, Phase, REASON, REFUSED, Role, START};

/// Bytes of a peer: the first says who we are and whether connections are asked for, then each piece stands behind its
/// length.
pub fn tunnel(bytes: &[u8]) {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let role = if first & 1 == 0 { Role::Server } else { Role::Client };
    let asks = first & 2 != 0;
    let mut at_once = Peer::new(role, asks);
    let mut by_byte = Peer::new(role, asks);
    let phase = if asks { Phase::Ended } else { Phase::Carrying };
    let mut reference = Reference { role, asks, phase, pending: Vec::new(), left: 0 };
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
    fn new(role: Role, asks: bool) -> Self {
        Self { role, incoming: Incoming::new(role, asks), opened: Vec::new() }
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
    asks: bool,
    phase: Phase,
    /// The beginning of a header.
    pending: Vec<u8>,
    left: usize,
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
                    Phase::Reason(code) => {
                        let code = code.unwrap_or(byte);
                        self.phase = if self.left == 0 { Phase::Refused(code) } else { Phase::Reason(Some(code)) };
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
        self.phase = match number {
            START if may_ask => Phase::Requested,
            START if is_answer => Phase::Carrying,
            REFUSED if is_answer && self.asks => Phase::Refusing,
            END if self.phase == Phase::Carrying => Phase::Ended,
            START | END | REFUSED => Phase::Broken,
            _ if self.phase == Phase::Refusing && number > REASON => Phase::Broken,
            _ if self.phase == Phase::Refusing => {
                self.left = number as usize;
                Phase::Reason(None)
            }
            _ if self.phase == Phase::Carrying => {
                self.left = number as usize;
                Phase::Carrying
            }
            _ => Phase::Broken,
        };
    }
}
