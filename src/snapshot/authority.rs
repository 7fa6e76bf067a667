//! Authorities (`host[:port]`) as servers compare them.

/// The spellings under which a server may know the host that an authority names, beside the one that is written, all in
/// lower case.
///
/// Letter case, the dot at the end of a full name and the scheme's default port make no difference (RFC 9110, 4.2.3).
/// Without any port the authority is among them too: servers that hold several hosts tell these apart by name alone.
pub(super) fn spellings(authority: &str) -> Vec<String> {
    let authority = authority.to_ascii_lowercase();
    let (host, port) = split(&authority);
    let name = host.trim_end_matches('.');
    let ports: &[&str] = if is_default(port) { &["", ":", ":80", ":443"] } else { &["", ":"] };
    let mut spellings = Vec::with_capacity(10);
    for name in [name.to_owned(), format!("{name}.")] {
        spellings.extend(ports.iter().map(|port| format!("{name}{port}")));
        if let Some(port) = port.filter(|port| !port.is_empty()) {
            spellings.push(format!("{name}:{port}"));
        }
    }
    spellings
}

/// The host, and the port if there is one. Colons within brackets are the host's.
fn split(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Of either scheme, as an app behind the mesh may think that it serves either.
fn is_default(port: Option<&str>) -> bool {
    port.is_none_or(|port| matches!(port.trim_start_matches('0'), "" | "80" | "443"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_host_leads_to_every_other() {
        let same = [
            "Admin.Example",
            "admin.example.",
            "ADMIN.EXAMPLE:80",
            "admin.example.:443",
            "admin.example:",
            "admin.example:0080",
        ];
        for written in same {
            for known in ["admin.example", "admin.example.", "admin.example:80", "admin.example.:443"] {
                assert!(spellings(written).iter().any(|spelling| spelling == known), "{written} is not {known}");
            }
        }
    }

    #[test]
    fn another_port_is_another_authority_of_the_same_host() {
        let other = spellings("admin.example:8080");
        for (known, is) in [("admin.example", true), ("admin.example.:8080", true), ("admin.example:80", false)] {
            assert_eq!(other.iter().any(|spelling| spelling == known), is, "{known}");
        }
    }

    #[test]
    fn addresses_in_brackets_keep_their_colons() {
        for written in ["[2001:DB8::1]", "[2001:db8::1]:80"] {
            assert!(spellings(written).iter().any(|spelling| spelling == "[2001:db8::1]"), "{written}");
        }
        assert!(!spellings("[::1]").iter().any(|spelling| spelling == "[:"));
    }
}
