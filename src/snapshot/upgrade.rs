//! Protocols that HTTP/1.1 connections may be upgraded to.

use std::sync::Arc;

/// `websocket`, as in Envoy under Consul, and those that the registration names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upgrades(Arc<[String]>);

impl Upgrades {
    /// Also those of these names. HTTP itself is not upgraded to: behind `h2c` no request would be judged.
    #[must_use]
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().filter(|name| !Self::is_http(name.as_bytes())).collect())
    }

    /// Whether an element of an `upgrade` header is such a protocol, with a version behind a slash or without.
    #[must_use]
    pub fn allow(&self, protocol: &[u8]) -> bool {
        let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default();
        let is = |allowed: &[u8]| protocol.eq_ignore_ascii_case(allowed) || name.eq_ignore_ascii_case(allowed);
        !Self::is_http(protocol) && (is(b"websocket") || self.0.iter().any(|allowed| is(allowed.as_bytes())))
    }

    /// Whether a protocol is HTTP by any of its names.
    #[must_use]
    pub fn is_http(protocol: &[u8]) -> bool {
        let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default();
        [&b"h2c"[..], b"h2", b"h3", b"http", b"https"].iter().any(|http| name.eq_ignore_ascii_case(http))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn websocket_and_what_is_named_are_allowed_and_http_never() {
        let named = Upgrades::new(["Chat".to_owned(), "tls/1.2".to_owned(), "h2c".to_owned(), "HTTP/2.0".to_owned()]);
        for (protocol, by_default, if_named) in [
            ("websocket", true, true),
            ("WebSocket", true, true),
            ("websocket/13", true, true),
            ("chat", false, true),
            ("chat/2", false, true),
            ("TLS/1.2", false, true),
            ("TLS/1.3", false, false),
            ("h2c", false, false),
            ("H2C", false, false),
            ("HTTP/2.0", false, false),
            ("", false, false),
        ] {
            assert_eq!(Upgrades::default().allow(protocol.as_bytes()), by_default, "{protocol}");
            assert_eq!(named.allow(protocol.as_bytes()), if_named, "{protocol}");
        }
    }
}
