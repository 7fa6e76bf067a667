//! Follows the frames that an HTTP/2 codec sends to a client, to know of requests that the codec refuses by itself: it
//! resets their streams, and tells nobody.

use h2::Reason;

/// Where in its frames a connection is, and what was refused.
#[derive(Debug, Default)]
pub(crate) struct Resets {
    /// Bytes before the next frame.
    skip: u64,
    /// The beginning of a frame: its header, and of a reset all of it.
    begun: [u8; RESET],
    seen: usize,
    refused: Option<&'static str>,
}

impl Resets {
    /// Why a request was refused since this was asked last, if one was.
    pub(crate) fn take(&mut self) -> Option<&'static str> {
        self.refused.take()
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
        let [a, b, c, kind, _, _, _, _, _, code @ ..] = self.begun;
        if kind == RST_STREAM && self.seen == HEADER {
            return;
        }
        if kind == RST_STREAM {
            self.refused = refusal(Reason::from(u32::from_be_bytes(code))).or(self.refused);
        } else {
            self.skip = u64::from(u32::from_be_bytes([0, a, b, c]));
        }
        self.seen = 0;
    }
}

/// What a codec means by a reset, where it refuses something. Other reasons are our own, and told elsewhere.
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

    fn reset(reason: Reason) -> Vec<u8> {
        frame(RST_STREAM, &u32::from(reason).to_be_bytes())
    }

    #[test]
    fn resets_of_the_codec_are_seen_however_bytes_are_cut() {
        // A payload that looks like a reset.
        let data = frame(0, &reset(Reason::PROTOCOL_ERROR));
        for (reason, told) in [
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
                assert_eq!((resets.take().is_some(), resets.take()), (told, None), "{reason} cut at {cut}");
            }
        }
    }
}
