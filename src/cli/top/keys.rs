//! Keys, from the bytes that a terminal sends for them.

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Up,
    Down,
    First,
    Last,
    /// Of the program.
    End,
}

/// Reads keys byte by byte. A key of which some bytes are still to come is no key yet.
#[derive(Debug, Default)]
pub(super) struct Reader {
    state: State,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Between,
    Escape,
    /// A control sequence (ECMA-48, 5.4), with its first parameter and whether that is over.
    Sequence {
        parameter: u16,
        is_over: bool,
    },
}

const CONTROL_C: u8 = 3;
const ESCAPE: u8 = 0x1b;

impl Reader {
    /// `None`: the byte ends no key that means something here.
    pub(super) fn take(&mut self, byte: u8) -> Option<Key> {
        let (state, key) = match (self.state, byte) {
            (_, ESCAPE) => (State::Escape, None),
            (State::Between, _) => (State::Between, letter(byte)),
            // As `O`, they come from a terminal whose cursor keys are those of an application.
            (State::Escape, b'[' | b'O') => (State::Sequence { parameter: 0, is_over: false }, None),
            (State::Escape, _) => (State::Between, None),
            (State::Sequence { parameter, is_over: false }, b'0'..=b'9') => {
                let parameter = parameter.saturating_mul(10).saturating_add(u16::from(byte - b'0'));
                (State::Sequence { parameter, is_over: false }, None)
            }
            (State::Sequence { parameter, .. }, 0x20..=0x3f) => (State::Sequence { parameter, is_over: true }, None),
            (State::Sequence { parameter, .. }, _) => (State::Between, named(byte, parameter)),
        };
        self.state = state;
        key
    }
}

fn letter(byte: u8) -> Option<Key> {
    match byte {
        b'k' => Some(Key::Up),
        b'j' => Some(Key::Down),
        b'q' | CONTROL_C => Some(Key::End),
        _ => None,
    }
}

/// By the byte that ends its sequence, as xterm, VT220 and rxvt send them.
fn named(end: u8, parameter: u16) -> Option<Key> {
    match (end, parameter) {
        (b'A', _) => Some(Key::Up),
        (b'B', _) => Some(Key::Down),
        (b'H', _) | (b'~', 1 | 7) => Some(Key::First),
        (b'F', _) | (b'~', 4 | 8) => Some(Key::Last),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut reader = Reader::default();
        bytes.iter().filter_map(|byte| reader.take(*byte)).collect()
    }

    #[test]
    fn keys_are_read_as_terminals_send_them() {
        let [up, down, first, last, end] = [Key::Up, Key::Down, Key::First, Key::Last, Key::End];
        let cases: &[(&[u8], &[Key])] = &[
            (b"jkq\x03", &[down, up, end, end]),
            (b"\x1b[A\x1b[B\x1bOA\x1bOB", &[up, down, up, down]),
            (
                b"\x1b[H\x1b[F\x1bOH\x1bOF\x1b[1~\x1b[4~\x1b[7~\x1b[8~",
                &[first, last, first, last, first, last, first, last],
            ),
            // With Control held down, and then F5 and Insert, whose bytes are no letters.
            (b"\x1b[1;5A\x1b[15~\x1b[2~j", &[up, down]),
            // The escape key, Alt and q, and what is none at all.
            (b"\x1b\x1b[A\x1bqx\xffJ\x1b[99999999999999999999~\x1b[?1;2c\x1b[ qk", &[up, up]),
        ];
        for (bytes, expected) in cases {
            assert_eq!(keys(bytes), *expected, "{}", bytes.escape_ascii());
        }
    }
}
