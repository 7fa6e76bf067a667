//! The names that a certificate holds, and what authorities above it constrain them to (RFC 5280, 4.2.1.10).
//!
//! Where Go's and BoringSSL's readings differ, both have to allow a name: what is permitted is matched in the narrower
//! sense, what is excluded in the wider.

use std::fmt;

use super::der::{Der, SEQUENCE};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name<'a> {
    Email(&'a str),
    Dns(&'a str),
    Uri(&'a str),
    Ip(&'a [u8]),
    /// The content of a `Name`: a row of RDNs.
    Directory(&'a [u8]),
    /// Of another kind, by its tag.
    Other(u8),
}

impl<'a> Name<'a> {
    /// `None` when one can't be read.
    pub(super) fn all(names: &'a [u8]) -> Option<Vec<Self>> {
        Der(names).all()?.into_iter().map(|(tag, content)| Self::read(tag, content)).collect()
    }

    fn read(tag: u8, content: &'a [u8]) -> Option<Self> {
        let text = || std::str::from_utf8(content).ok().filter(|text| text.is_ascii());
        Some(match tag {
            0x81 => Self::Email(text()?),
            0x82 => Self::Dns(text()?),
            0xa4 => Self::Directory(Der::only(content, SEQUENCE)?),
            0x86 => Self::Uri(text()?),
            0x87 => Self::Ip(content),
            0xa0 | 0xa3 | 0xa5 | 0x88 => Self::Other(tag),
            _ => return None,
        })
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Email(text) => write!(f, "the email address {text:?}"),
            Self::Dns(text) => write!(f, "the DNS name {text:?}"),
            Self::Uri(text) => write!(f, "the URI {text:?}"),
            Self::Ip(_) => f.write_str("an IP address"),
            Self::Directory(_) => f.write_str("the distinguished name"),
            Self::Other(_) => f.write_str("a name of another kind"),
        }
    }
}

/// Name constraints of an authority: permitted and excluded names.
#[derive(Debug)]
pub(super) struct Constraints<'a> {
    permitted: Vec<Name<'a>>,
    excluded: Vec<Name<'a>>,
}

impl<'a> Constraints<'a> {
    /// # Errors
    /// What is wrong with them; critical ones of a kind that Go does not process are refused.
    pub(super) fn read(value: &'a [u8], critical: bool) -> Result<Self, &'static str> {
        let malformed = "can't be read";
        let subtrees = Der(Der::only(value, SEQUENCE).ok_or(malformed)?).all().ok_or(malformed)?;
        let mut read = Self { permitted: Vec::new(), excluded: Vec::new() };
        for (tag, trees) in subtrees {
            let list = match tag {
                0xa0 => &mut read.permitted,
                0xa1 => &mut read.excluded,
                _ => return Err(malformed),
            };
            for (tag, tree) in Der(trees).all().ok_or(malformed)? {
                // A minimum or maximum has no meaning (RFC 5280).
                match Der(tree).all().ok_or(malformed)?[..] {
                    [(base, content)] if tag == SEQUENCE => list.push(Name::read(base, content).ok_or(malformed)?),
                    _ => return Err(malformed),
                }
            }
        }
        let is_unknown = |name: &Name<'_>| matches!(name, Name::Directory(_) | Name::Other(_));
        if critical && read.permitted.iter().chain(&read.excluded).any(is_unknown) {
            return Err("is critical and constrains names of a kind that is not known");
        }
        if read.permitted.is_empty() && read.excluded.is_empty() { Err(malformed) } else { Ok(read) }
    }

    /// How many comparisons a name takes.
    pub(super) fn len(&self) -> usize {
        self.permitted.len() + self.excluded.len()
    }

    /// Whether a name may be there.
    pub(super) fn allow(&self, name: Name<'_>) -> bool {
        let excluded = self.excluded.iter().any(|base| matches(name, *base, Sense::Wide).unwrap_or(false));
        let mut permitted = self.permitted.iter().filter_map(|base| matches(name, *base, Sense::Narrow)).peekable();
        !excluded && (permitted.peek().is_none() || permitted.any(|matches| matches))
    }
}

/// How a name is compared that Go and BoringSSL compare differently, or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sense {
    /// What both match.
    Narrow,
    /// What either matches, or does not process.
    Wide,
}

/// Whether a name is in the subtree of `base`; `None` when it is of another kind.
fn matches(name: Name<'_>, base: Name<'_>, sense: Sense) -> Option<bool> {
    let wide = sense == Sense::Wide;
    Some(match (name, base) {
        (Name::Dns(name), Name::Dns(base)) => dns(name, base, sense),
        (Name::Uri(uri), Name::Uri(base)) => match host(uri) {
            Some(host) => host_matches(host, base, sense),
            None => wide,
        },
        (Name::Email(mailbox), Name::Email(base)) => email(mailbox, base, sense),
        (Name::Directory(name), Name::Directory(base)) => name.starts_with(base),
        // BoringSSL refuses addresses under constraints of addresses, whatever they are.
        (Name::Ip(_), Name::Ip(_)) => wide,
        (Name::Other(name), Name::Other(base)) if name == base => wide,
        _ => return None,
    })
}

/// The host of a URI, where there is one that is a name: not an IP address, and without anything that is read in more
/// than one way.
fn host(uri: &str) -> Option<&str> {
    let (_, rest) = uri.split_once("://")?;
    let authority = rest.split_once('/').map_or(rest, |(authority, _)| authority);
    let host = authority.split_once(':').map_or(authority, |(host, _)| host);
    let is_name = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    let is_address = host.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    (is_name && !is_address && !host.is_empty() && !host.starts_with('.') && !host.ends_with('.')).then_some(host)
}

/// A leading dot means subdomains. Without one, Go takes the host and its subdomains, BoringSSL the host alone.
fn host_matches(host: &str, base: &str, sense: Sense) -> bool {
    if base.starts_with('.') {
        is_below(host, base)
    } else if sense == Sense::Narrow {
        host.eq_ignore_ascii_case(base)
    } else {
        is_within(host, base)
    }
}

/// Whether a name ends with `suffix`, which begins with a dot, and has more before it.
fn is_below(name: &str, suffix: &str) -> bool {
    let Some(split) = name.len().checked_sub(suffix.len()) else { return false };
    split > 0 && name.get(split..).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
}

/// Whether a name is a domain or a subdomain of it; everything is of the empty one.
fn is_within(name: &str, domain: &str) -> bool {
    domain.is_empty() || name.eq_ignore_ascii_case(domain) || is_below(name, &format!(".{domain}"))
}

fn dns(name: &str, base: &str, sense: Sense) -> bool {
    let is_in = |name: &str| if base.starts_with('.') { is_below(name, base) } else { is_within(name, base) };
    match name.strip_prefix("*.") {
        None => is_in(name),
        // It stands for each name below: all of them in the narrow sense, any of them in the wide.
        Some(parent) => is_in(parent) || (sense == Sense::Wide && is_within(base.trim_start_matches('.'), parent)),
    }
}

/// A mailbox, a host, or a domain with a leading dot.
fn email(mailbox: &str, base: &str, sense: Sense) -> bool {
    let Some((local, host)) = mailbox.rsplit_once('@') else { return sense == Sense::Wide };
    match base.rsplit_once('@') {
        Some((base_local, base_host)) => {
            let same =
                if sense == Sense::Narrow { local == base_local } else { local.eq_ignore_ascii_case(base_local) };
            same && host.eq_ignore_ascii_case(base_host)
        }
        None => host_matches(host, base, sense),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a name is in a subtree: in the sense for what is permitted, and in that for what is excluded.
    fn both_senses(name: Name<'_>, base: Name<'_>) -> (Option<bool>, Option<bool>) {
        (matches(name, base, Sense::Narrow), matches(name, base, Sense::Wide))
    }

    const BOTH: (bool, bool) = (true, true);
    const NEITHER: (bool, bool) = (false, false);
    /// Not permitted by it, but excluded by it.
    const APART: (bool, bool) = (false, true);

    #[test]
    fn uris_are_constrained_by_their_host() {
        for (uri, base, expected) in [
            ("spiffe://td.consul/ns/x", "td.consul", BOTH),
            ("spiffe://TD.Consul", "td.consul", BOTH),
            ("spiffe://td.consul:80/x", "td.consul", BOTH),
            ("spiffe://td.consul/x", ".consul", BOTH),
            ("spiffe://a.td.consul/x", ".consul", BOTH),
            ("spiffe://consul/x", ".consul", NEITHER),
            ("spiffe://evilconsul/x", ".consul", NEITHER),
            ("spiffe://eviltd.consul/x", "td.consul", NEITHER),
            ("spiffe://td.consul.evil/x", "td.consul", NEITHER),
            ("spiffe://evil/td.consul", "td.consul", NEITHER),
            ("spiffe://a.td.consul/x", "td.consul", APART),
            ("spiffe://td.consul/x", "", APART),
            // No host, an address, or one that is read in more than one way.
            ("spiffe:///x", "td.consul", APART),
            ("urn:td.consul", "td.consul", APART),
            ("spiffe://10.0.0.1/x", ".1", APART),
            ("spiffe://[::1]/x", "td.consul", APART),
            ("spiffe://td.consul@evil/x", "evil", APART),
            ("spiffe://evil?.td.consul/x", ".td.consul", APART),
            ("spiffe://evil#.td.consul/x", ".td.consul", APART),
            ("spiffe://evil%2e.td.consul/x", ".td.consul", APART),
            ("spiffe://.td.consul/x", ".td.consul", APART),
            ("spiffe://td.consul./x", "td.consul", APART),
        ] {
            let (narrow, wide) = both_senses(Name::Uri(uri), Name::Uri(base));
            assert_eq!((narrow, wide), (Some(expected.0), Some(expected.1)), "{uri} {base}");
        }
    }

    #[test]
    fn names_of_other_kinds_are_constrained_too() {
        let (email, dns) = (Name::Email, Name::Dns);
        for (name, base, expected) in [
            (dns("a.example.com"), dns("example.com"), BOTH),
            (dns("example.com"), dns("EXAMPLE.com"), BOTH),
            (dns("example.com"), dns(".example.com"), NEITHER),
            (dns("badexample.com"), dns("example.com"), NEITHER),
            (dns("x"), dns(""), BOTH),
            (dns("*.example.com"), dns("example.com"), BOTH),
            (dns("*.example.com"), dns("a.example.com"), APART),
            (dns("*.example.com"), dns(".a.example.com"), APART),
            (dns("*.example.com"), dns("other.com"), NEITHER),
            (email("me@example.com"), email("me@EXAMPLE.com"), BOTH),
            (email("ME@example.com"), email("me@example.com"), APART),
            (email("me@example.com"), email("example.com"), BOTH),
            (email("me@a.example.com"), email(".example.com"), BOTH),
            (email("me@example.com"), email("other.com"), NEITHER),
            (email("nobody"), email("example.com"), APART),
            (Name::Directory(&[1, 2, 3]), Name::Directory(&[1, 2]), BOTH),
            (Name::Directory(&[1, 2]), Name::Directory(&[1, 2, 3]), NEITHER),
            (Name::Ip(&[10, 0, 0, 1]), Name::Ip(&[10, 0, 0, 0, 255, 0, 0, 0]), APART),
            (Name::Other(0x88), Name::Other(0x88), APART),
        ] {
            assert_eq!(both_senses(name, base), (Some(expected.0), Some(expected.1)), "{name:?} {base:?}");
        }
        for (name, base) in
            [(dns("a"), Name::Uri("a")), (Name::Other(0x88), Name::Other(0xa0)), (Name::Ip(&[]), dns("a"))]
        {
            assert_eq!(both_senses(name, base), (None, None));
        }
    }

    #[test]
    fn what_is_excluded_is_not_permitted() {
        let constraints = Constraints {
            permitted: vec![Name::Uri(".consul"), Name::Uri("other")],
            excluded: vec![Name::Uri("bad.consul")],
        };
        for (uri, allowed) in [
            ("spiffe://a.consul", true),
            ("spiffe://other", true),
            ("spiffe://bad.consul", false),
            ("spiffe://x.bad.consul", false),
            ("spiffe://elsewhere", false),
        ] {
            assert_eq!(constraints.allow(Name::Uri(uri)), allowed, "{uri}");
        }
        assert!(constraints.allow(Name::Dns("anything")));
    }

    #[test]
    fn constraints_that_cant_be_read_are_refused() {
        let uri = [0x30, 0x0b, 0xa0, 0x09, 0x30, 0x07, 0x86, 0x05, b't', b'd', b'.', b'i', b'o'];
        let directory = [0x30, 0x08, 0xa0, 0x06, 0x30, 0x04, 0xa4, 0x02, 0x30, 0x00];
        assert!(Constraints::read(&uri, true).unwrap().allow(Name::Uri("spiffe://td.io")));
        assert!(Constraints::read(&directory, false).is_ok() && Constraints::read(&directory, true).is_err());
        for bad in [
            &[][..],
            &[0x30, 0x00],
            &[0x30, 0x02, 0xa0, 0x00],
            &[0x30, 0x02, 0xa2, 0x00],
            &uri[..12],
            // With a minimum.
            &[0x30, 0x0b, 0xa0, 0x09, 0x30, 0x07, 0x86, 0x02, b't', b'd', 0x80, 0x01, 0x01],
            // Not a name.
            &[0x30, 0x06, 0xa0, 0x04, 0x30, 0x02, 0x89, 0x00],
        ] {
            assert!(Constraints::read(bad, false).is_err(), "{bad:?}");
        }
    }
}
