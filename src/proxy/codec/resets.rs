//! Follows the frames that an HTTP/2 codec sends to a client, to know of requests that the codec refuses by itself: it
//! resets their streams, and tells nobody. A reset that is passed on from elsewhere refuses nothing.

use std::collections::VecDeque;

use h2::Reason;

/// The position of a connection within its frames, and the refused streams.
#[derive(Debug, Default)]
pub(crate) struct Resets {
    /// Bytes before the next frame.
    skip: u64,
    /// The beginning of a frame: its header, and of a reset all of it.
    begun: [u8; RESET],
    seen: usize,
    refused: Option<&'static str>,
    /// Streams that end because a response broke off, until their reset is sent.
    broken_off: VecDeque<u32>,
}

impl Resets {
    /// Why a request was refused since this was asked last, if one was.
    pub(crate) fn take(&mut self) -> Option<&'static str> {
        self.refused.take()
    }

    /// A response broke off, so that the reset of its stream, if one is sent, is no refusal.
    pub(crate) fn breaks_off(&mut self, stream: u32) {
        if self.broken_off.len() == BROKEN_OFF {
            self.broken_off.pop_front();
        }
        self.broken_off.push_back(stream);
    }

    /// Looks at the bytes that go out next.
    pub(crate) fn follow(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= skipped as u64;
            bytes = &bytes[skipped..];
            let wanted = if self.seen >= HEADER { RESET } else { HEADER };
            let taken = (wanted - self.seen).min(bytes.len());
            self.begun[self.seen..self.seen + taken].copy_from_slice(&bytes[..taken]);
            self.seen += taken;
            bytes = &bytes[taken..];
            if self.seen < wanted {
                return;
            }
            self.read();
        }
    }

    /// Reads a header, or a reset.
    fn read(&mut self) {
        let [a, b, c, kind, _, w, x, y, z, code @ ..] = self.begun;
        if kind == RST_STREAM && self.seen == HEADER {
            return;
        }
        if kind == RST_STREAM {
            let stream = u32::from_be_bytes([w, x, y, z]);
            match self.broken_off.iter().position(|broken| *broken == stream) {
                Some(at) => drop(self.broken_off.remove(at)),
                None => self.refused = refusal(Reason::from(u32::from_be_bytes(code))).or(self.refused),
            }
        } else {
            self.skip = u64::from(u32::from_be_bytes([0, a, b, c]));
        }
        self.seen = 0;
    }
}

/// What a codec means by a reset, where it refuses something. Other reasons are our own, and reported elsewhere.
fn refusal(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::PROTOCOL_ERROR => {
            "the HTTP/2 request is malformed: its head is too large, lacks a pseudo-header or has one twice, has a header of HTTP/1's connections, \
             a character that no method, path or header may have, or a body of another length (RFC 9113, 8.1.1)"
        }
        Reason::FLOW_CONTROL_ERROR => "more was sent than the stream's window allows (RFC 9113, 6.9)",
        Reason::FRAME_SIZE_ERROR => "a frame has a size that it may not have (RFC 9113, 4.2)",
        Reason::REFUSED_STREAM => "there are more streams at a time than were allowed (RFC 9113, 5.1.2)",
        _ => return None,
    })
}

/// Streams that are remembered at most: as many as a client may have open. Of some, no reset is sent any more.
const BROKEN_OFF: usize = 256;

/// Of a frame (RFC 9113, 4.1), and with the error code behind it that a reset has (6.4).
const HEADER: usize = 9;
const RESET: usize = HEADER + 4;
const RST_STREAM: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[0, 0, payload.len() as u8, kind, 0, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn a_reset_that_is_passed_on_refuses_nothing() {
        let mut resets = Resets::default();
        resets.breaks_off(3);
        resets.breaks_off(1);
        resets.follow(&reset(Reason::PROTOCOL_ERROR));
        assert_eq!(resets.take(), None);
        // The stream of that number was reported once.
        resets.follow(&reset(Reason::PROTOCOL_ERROR));
        assert!(resets.take().is_some());
        for stream in 2..10_000 {
            resets.breaks_off(stream);
        }
        assert_eq!(resets.broken_off.len(), BROKEN_OFF);
    }

    fn reset(reason: Reason) -> Vec<u8> {
        frame(RST_STREAM, &u32::from(reason).to_be_bytes())
    }

    #[test]
    fn resets_of_the_codec_are_seen_however_bytes_are_cut() {
        // A payload that looks like a reset.
        let data = frame(0, &reset(Reason::PROTOCOL_ERROR));
        for (reason, detected) in [
            (Reason::PROTOCOL_ERROR, true),
            (Reason::REFUSED_STREAM, true),
            (Reason::CANCEL, false),
            (Reason::NO_ERROR, false),
            (Reason::INTERNAL_ERROR, false),
        ] {
            let sent = [&data[..], &frame(4, &[]), &reset(reason), &reset(Reason::CANCEL), &data].concat();
            for cut in 1..=sent.len() {
                let mut resets = Resets::default();
                sent.chunks(cut).for_each(|part| resets.follow(part));
                assert_eq!((resets.take().is_some(), resets.take()), (detected, None), "{reason} cut at {cut}");
            }
        }
    }
}
