//! DER, as much of it as certificates take (X.690).

/// A row of values: each is a tag, a length and so many bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Der<'a>(pub(super) &'a [u8]);

/// Tags of the universal class.
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const OID: u8 = 0x06;

impl<'a> Der<'a> {
    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Takes the next value: its tag, its content, and both with their header. `None` when there is none, or when it is
    /// not DER: tags of more than a byte, lengths that are indefinite or longer than they need to be.
    pub(super) fn next(&mut self) -> Option<(u8, &'a [u8], &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x83 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                let length = bytes.iter().fold(0, |length, &byte| length << 8 | usize::from(byte));
                let shortest = length > 0x7f && bytes.first() != Some(&0);
                (shortest.then_some(length)?, rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        let whole = self.0.get(..self.0.len() - rest.len())?;
        self.0 = rest;
        Some((tag, content, whole))
    }

    /// Takes the content of the next value, which has this tag.
    pub(super) fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next().filter(|(found, ..)| *found == tag).map(|(_, content, _)| content)
    }

    /// The content of the only value in `bytes`, which has this tag.
    pub(super) fn only(bytes: &'a [u8], tag: u8) -> Option<&'a [u8]> {
        let mut der = Self(bytes);
        let content = der.expect(tag)?;
        der.is_empty().then_some(content)
    }

    /// Each value in turn, if all can be read.
    pub(super) fn all(mut self) -> Option<Vec<(u8, &'a [u8])>> {
        let mut values = Vec::new();
        while !self.is_empty() {
            let (tag, content, _) = self.next()?;
            values.push((tag, content));
        }
        Some(values)
    }
}

/// A number that is not negative and fits; `None` for any other.
pub(super) fn number(content: &[u8]) -> Option<u32> {
    match content {
        [] => None,
        [first, ..] if first & 0x80 != 0 => None,
        [0, second, ..] if second & 0x80 == 0 => None,
        _ if content.len() > 4 => None,
        _ => Some(content.iter().fold(0, |number, &byte| number << 8 | u32::from(byte))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_anything_else_is_not() {
        let read = |bytes: &'static [u8]| Der(bytes).next();
        assert_eq!(read(&[4, 2, 7, 8, 9]), Some((4, &[7, 8][..], &[4, 2, 7, 8][..])));
        assert_eq!(read(&[4, 0]), Some((4, &[][..], &[4, 0][..])));
        let long = [&[4, 0x81, 0x80][..], &[1; 128]].concat();
        assert_eq!(Der(&long).next().map(|(_, content, _)| content.len()), Some(128));
        for bad in [
            &[][..],
            &[4],
            &[4, 1],
            &[4, 0x80],
            &[4, 0x81],
            &[4, 0x81, 1, 9],
            &[4, 0x82, 0, 0x80],
            &[4, 0x84, 0, 0, 0, 1, 9],
            &[4, 0xff, 9],
            &[0x1f, 1, 9],
            &[4, 0x83, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(Der(bad).next(), None, "{bad:?}");
        }
        assert_eq!(Der(&[4, 1, 7, 5, 0]).all(), Some(vec![(4, &[7][..]), (5, &[][..])]));
        assert_eq!(Der(&[4, 1, 7, 5]).all(), None);
        assert_eq!(Der::only(&[4, 1, 7], 4), Some(&[7][..]));
        assert_eq!((Der::only(&[4, 1, 7], 5), Der::only(&[4, 1, 7, 0], 4)), (None, None));
        let numbers = [(&[0][..], Some(0)), (&[0, 0x80], Some(128)), (&[0x7f, 0xff, 0xff, 0xff], Some(0x7fff_ffff))];
        for (content, expected) in numbers {
            assert_eq!(number(content), expected);
        }
        for bad in [&[][..], &[0x80], &[0, 1], &[0, 0xff, 0xff, 0xff, 0xff], &[1, 0, 0, 0, 0]] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }
}
