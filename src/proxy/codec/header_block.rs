//! Follows the frames that an HTTP/2 client sends, to know of header blocks that do not end.
//!
//! Between HEADERS and the CONTINUATION that ends its block, a connection carries nothing else (RFC 9113, 6.10), and
//! the codec waits for it without a limit, with what has come so far in memory.

/// The position of a connection within its frames.
#[derive(Debug)]
pub(crate) struct HeaderBlockProgress {
    /// Bytes before the next frame: first those of the preface.
    skip: u64,
    /// The beginning of a frame, whose header has not come whole.
    header: [u8; HEADER],
    seen: usize,
    /// A block has begun, and does not end with the present frame.
    open: bool,
    /// The present frame ends a block.
    ending: bool,
    /// Header blocks that have begun.
    begun: u64,
}

impl HeaderBlockProgress {
    /// For a connection that begins with a preface of so many bytes.
    #[must_use]
    pub(crate) fn after(preface: usize) -> Self {
        Self { skip: preface as u64, header: [0; HEADER], seen: 0, open: false, ending: false, begun: 0 }
    }

    /// The number, from one on, of the header block that has begun to come and is not complete.
    #[must_use]
    pub(crate) fn begun_head(&self) -> Option<u64> {
        (self.open || self.ending).then_some(self.begun)
    }

    /// Looks at the bytes that come next. What is wrong with them is for the codec to say.
    pub(crate) fn follow(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= skipped as u64;
            bytes = &bytes[skipped..];
            if self.skip > 0 {
                return;
            }
            self.ending = false;
            if bytes.is_empty() {
                return;
            }
            let taken = (HEADER - self.seen).min(bytes.len());
            self.header[self.seen..self.seen + taken].copy_from_slice(&bytes[..taken]);
            self.seen += taken;
            bytes = &bytes[taken..];
            if self.seen < HEADER {
                return;
            }
            self.seen = 0;
            self.begin_frame();
        }
    }

    fn begin_frame(&mut self) {
        let [a, b, c, kind, flags, ..] = self.header;
        self.skip = u64::from(u32::from_be_bytes([0, a, b, c]));
        if kind != HEADERS && kind != CONTINUATION {
            return;
        }
        self.begun += u64::from(kind == HEADERS);
        self.ending = flags & END_HEADERS != 0;
        self.open = !self.ending;
    }
}

/// Length of a frame header, in bytes (RFC 9113, 4.1).
const HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![0, 0, payload as u8, kind, flags, 0, 0, 0, 1];
        frame.resize(HEADER + payload, 0xff);
        frame
    }

    fn after(frames: &[Vec<u8>]) -> Option<u64> {
        let mut blocks = HeaderBlockProgress::after(3);
        blocks.follow(b"PRI");
        blocks.follow(&frames.concat());
        blocks.begun_head()
    }

    #[test]
    fn a_block_is_begun_until_its_last_byte() {
        let whole = frame(HEADERS, END_HEADERS, 5);
        assert_eq!(after(&[]), None);
        assert_eq!(after(&[frame(0, END_HEADERS, 9)]), None);
        assert_eq!(after(std::slice::from_ref(&whole)), None);
        assert_eq!(after(&[whole[..HEADER + 4].to_vec()]), Some(1));
        let open = frame(HEADERS, 0, 5);
        assert_eq!(after(&[whole.clone(), open.clone()]), Some(2));
        assert_eq!(after(&[whole.clone(), open.clone(), frame(CONTINUATION, 0, 0)]), Some(2));
        let end = frame(CONTINUATION, END_HEADERS, 7);
        assert_eq!(after(&[open.clone(), end[..HEADER].to_vec()]), Some(1));
        assert_eq!(after(&[open.clone(), end.clone()]), None);
        assert_eq!(after(&[open.clone(), end, whole, open]), Some(3));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_bytes_are_cut(
            frames in prop::collection::vec((0u8..11, any::<u8>(), 0usize..40), 0..12),
            last in 0usize..50,
            piece in 1usize..30,
        ) {
            let mut bytes: Vec<u8> = frames.iter().flat_map(|(kind, flags, size)| frame(*kind, *flags, *size)).collect();
            bytes.truncate(bytes.len().saturating_sub(last));
            let mut whole = HeaderBlockProgress::after(0);
            whole.follow(&bytes);
            let mut cut = HeaderBlockProgress::after(0);
            bytes.chunks(piece).for_each(|piece| cut.follow(piece));
            prop_assert_eq!(whole.begun_head(), cut.begun_head());
        }
    }
}
