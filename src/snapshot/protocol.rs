//! The protocols that services speak.

/// The protocol of a service. Anything that is not HTTP is relayed as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Tcp,
    Http,
    Http2,
    Grpc,
}

impl Protocol {
    /// Reads Consul's `protocol` value, of any case; whatever is not HTTP-like is TCP, as in Consul.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" => Self::Http2,
            "grpc" => Self::Grpc,
            _ => Self::Tcp,
        }
    }

    #[must_use]
    pub fn is_http(self) -> bool {
        self != Self::Tcp
    }
}
