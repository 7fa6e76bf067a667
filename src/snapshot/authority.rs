//! Authorities (`host[:port]`) as servers compare them.

/// An authority without what makes no difference to a server: in lower case, without the dot at the end of a full name,
/// and without the scheme's default port (RFC 9110, 4.2.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Canonical {
    text: String,
    name_len: usize,
}

impl Canonical {
    pub(super) fn of(authority: &str) -> Self {
        let mut text = authority.to_ascii_lowercase();
        let port = split(&text).1.filter(|port| !is_default(port)).map(str::to_owned);
        text.truncate(split(&text).0.trim_end_matches('.').len());
        let name_len = text.len();
        if let Some(port) = port {
            text.extend([":", &port]);
        }
        Self { text, name_len }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// Without any port, as servers with name-based virtual hosts compare it.
    pub(super) fn name(&self) -> &str {
        &self.text[..self.name_len]
    }
}

/// The host, and the port if there is one. Colons within brackets are the host's.
fn split(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Of either scheme, as an app behind the mesh may think that it serves either.
fn is_default(port: &str) -> bool {
    matches!(port.trim_start_matches('0'), "" | "80" | "443")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_difference_is_left_out() {
        for (written, canonical, name) in [
            ("admin.example", "admin.example", "admin.example"),
            ("ADMIN.Example", "admin.example", "admin.example"),
            ("admin.example.", "admin.example", "admin.example"),
            ("admin.example:80", "admin.example", "admin.example"),
            ("Admin.Example.:0443", "admin.example", "admin.example"),
            ("admin.example:", "admin.example", "admin.example"),
            ("admin.example.:8080", "admin.example:8080", "admin.example"),
            ("[2001:DB8::1]", "[2001:db8::1]", "[2001:db8::1]"),
            ("[2001:db8::1]:80", "[2001:db8::1]", "[2001:db8::1]"),
            ("[::1]:81", "[::1]:81", "[::1]"),
            (".", "", ""),
            (":80", "", ""),
            ("", "", ""),
        ] {
            let found = Canonical::of(written);
            assert_eq!((found.as_str(), found.name()), (canonical, name), "{written}");
        }
    }
}
