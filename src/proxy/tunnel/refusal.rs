//! Why the sidecar of a server begins no connection, or ends one: as it is sent, and in words.

use std::borrow::Cow;
use std::fmt;

use super::incoming::{REASON, Version};
use crate::observe::{Fault, Outcome};

/// Why a server's sidecar begins no connection, or ends one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// Of a denial: the rule, where the destination shares it. At the client these are a stranger's words, escaped: for
    /// people to read, and for nothing else.
    rule: Option<Box<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The intentions deny it. They are the same at each instance.
    Denied,
    /// The local app does not take connections.
    NoApp,
    /// As many connections are open as `max_inbound_connections` allows.
    Full,
    /// The server's sidecar is stopping, and its drain time is over.
    Drained,
    /// The service's protocol is one of HTTP now.
    OtherProtocol,
    /// A reason of a later version.
    Other,
}

/// Each reason that is known, and its code.
const CODES: [(Reason, u8); 5] =
    [(Reason::Denied, 1), (Reason::NoApp, 2), (Reason::Full, 3), (Reason::Drained, 4), (Reason::OtherProtocol, 5)];

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, rule: None }
    }
}

impl Refusal {
    /// A denial, which names its rule if there is one to be shared.
    #[must_use]
    pub fn denied(rule: Option<&str>) -> Self {
        Self { reason: Reason::Denied, rule: rule.map(Box::from) }
    }

    /// 1 to [`REASON`] bytes: the code, and in version 3 the rule behind it, cut off if it is too long.
    pub(super) fn encode(&self, version: Version) -> Vec<u8> {
        let code = CODES.iter().find(|(reason, _)| *reason == self.reason).map_or(0, |(_, code)| *code);
        let rule = self.rule.as_deref().filter(|_| version >= Version::V3).unwrap_or_default();
        let fits = rule.floor_char_boundary(REASON as usize - 1);
        [&[code], &rule.as_bytes()[..fits]].concat()
    }

    /// Reads what a server sent. Versions before 3 say nothing behind the code.
    pub(super) fn decode(bytes: &[u8], version: Version) -> Self {
        let (code, text) = bytes.split_first().unwrap_or((&0, &[]));
        let reason = CODES.iter().find(|(_, known)| known == code).map_or(Reason::Other, |(reason, _)| *reason);
        let has_rule = reason == Reason::Denied && version >= Version::V3 && !text.is_empty();
        let rule = || String::from_utf8_lossy(text).escape_debug().to_string().into_boxed_str();
        Self { reason, rule: has_rule.then(rule) }
    }

    /// How a connection ends that is refused so.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self.reason {
            Reason::Denied => Outcome::DeniedByDestination,
            Reason::Full => Outcome::Overflow,
            Reason::Drained => Outcome::Drained,
            Reason::OtherProtocol => Outcome::OtherProtocol,
            Reason::NoApp | Reason::Other => Outcome::Unreachable,
        }
    }

    /// The end of a connection with the instance at `address`.
    #[must_use]
    pub fn fault(&self, address: impl fmt::Display) -> Fault {
        Fault::new(self.outcome(), Cow::Owned(format!("{address} {self}")))
    }
}

/// For the log, after the address of an instance.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            Reason::Denied => "denied the connection: its intentions do not allow this service",
            Reason::NoApp => "has no local app that takes connections: see the log of its sidecar",
            Reason::Full => "has as many connections open as its max_inbound_connections allows",
            Reason::Drained => "ended the connection: its sidecar is stopping, and its drain time is over",
            Reason::OtherProtocol => "ended the connection: the protocol of the service is one of HTTP now",
            Reason::Other => "refused the connection for a reason unknown to this version",
        })?;
        match &self.rule {
            Some(rule) => write!(f, " (the destination names the rule \"{rule}\")"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_comes_out_as_it_went_in() {
        for refusal in [Refusal::denied(None), Refusal::denied(Some("web => db (deny, precedence 9)"))]
            .into_iter()
            .chain(CODES.map(|(reason, _)| reason.into()))
        {
            let sent = refusal.encode(Version::V3);
            assert_eq!(Refusal::decode(&sent, Version::V3), refusal);
            // Earlier versions say the code alone.
            let sent = refusal.encode(Version::V2);
            assert_eq!((sent.len(), Refusal::decode(&sent, Version::V2).reason), (1, refusal.reason));
        }
    }

    #[test]
    fn a_rule_is_short_and_harms_no_log() {
        for (sent, shown) in [
            (&b"a\nb\x1b[31m\"\\"[..], "a\\nb\\u{1b}[31m\\\"\\\\"),
            (b"\xff", "\u{fffd}"),
            ("\u{202e}gnp".as_bytes(), "\\u{202e}gnp"),
        ] {
            let refusal = Refusal::decode(&[&[1], sent].concat(), Version::V3);
            assert_eq!(refusal.rule.as_deref(), Some(shown));
            assert!(!refusal.to_string().contains(char::is_control));
        }
        let long = Refusal::denied(Some(&"é".repeat(500))).encode(Version::V3);
        assert_eq!(long.len(), REASON as usize);
        // What was read long ago without a rule is read without one now, and other reasons have none.
        for (bytes, version) in
            [(&b"\x01x"[..], Version::V2), (b"\x02x", Version::V3), (b"\x4dx", Version::V3), (b"", Version::V3)]
        {
            assert_eq!(Refusal::decode(bytes, version).rule, None);
        }
    }
}
