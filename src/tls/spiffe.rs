//! SPIFFE ids as Consul writes them (`agent/connect/uri*.go`), parsed strictly.

use std::fmt;

/// The identity of a mesh service: `spiffe://<trust domain>[/ap/<partition>]/ns/<ns>/dc/<dc>/svc/<service>`.
///
/// Trust domains are kept in lower case; every other part is compared exactly, as it names a service
/// in Consul's catalog, which is case-sensitive.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    pub trust_domain: String,
    /// `default` when the URI does not name one.
    pub partition: String,
    pub namespace: String,
    pub datacenter: String,
    pub service: String,
}

/// Why a URI is not the id of a mesh service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAService(pub String);

impl fmt::Display for NotAService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not the identity of a mesh service", self.0)
    }
}

impl std::error::Error for NotAService {}

impl SpiffeId {
    /// Parses the URI of a certificate.
    ///
    /// # Errors
    /// Anything but a service id: gateways, agents and servers have ids of other shapes and are refused
    /// here, and so are empty segments, bad escapes, queries and fragments.
    pub fn parse(uri: &str) -> Result<Self, NotAService> {
        Self::parse_parts(uri).ok_or_else(|| NotAService(uri.to_owned()))
    }

    fn parse_parts(uri: &str) -> Option<Self> {
        let scheme = uri.get(..9)?;
        if !scheme.eq_ignore_ascii_case("spiffe://") || uri.contains(['?', '#']) {
            return None;
        }
        let mut segments = uri[9..].split('/');
        let trust_domain = segments.next().filter(|td| !td.is_empty())?.to_ascii_lowercase();
        let rest = segments.map(unescape).collect::<Option<Vec<String>>>()?;
        let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
        let (partition, namespace, datacenter, service) = match rest[..] {
            ["ns", ns, "dc", dc, "svc", svc] => ("default", ns, dc, svc),
            ["ap", ap, "ns", ns, "dc", dc, "svc", svc] => (ap, ns, dc, svc),
            _ => return None,
        };
        Some(Self {
            trust_domain,
            partition: partition.to_owned(),
            namespace: namespace.to_owned(),
            datacenter: datacenter.to_owned(),
            service: service.to_owned(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.trust_domain)?;
        if self.partition != "default" {
            write!(f, "/ap/{}", Escaped(&self.partition))?;
        }
        let (ns, dc, svc) = (Escaped(&self.namespace), Escaped(&self.datacenter), Escaped(&self.service));
        write!(f, "/ns/{ns}/dc/{dc}/svc/{svc}")
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A path segment as Go's `url.PathEscape` writes it.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0.as_bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => write!(f, "{}", char::from(byte))?,
                b'-' | b'_' | b'.' | b'~' | b'$' | b'&' | b'+' | b':' | b'=' | b'@' => {
                    write!(f, "{}", char::from(byte))?
                }
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

/// Percent-decodes one path segment; `None` for an empty one, a bad escape or text that is not UTF-8.
fn unescape(segment: &str) -> Option<String> {
    if segment.is_empty() {
        return None;
    }
    let mut bytes = segment.bytes();
    let mut out = Vec::with_capacity(segment.len());
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                out.push(u8::try_from(high * 16 + low).ok()?);
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_id_is_read_and_printed_alike() {
        for uri in [
            "spiffe://be288efb.consul/ns/default/dc/dc1/svc/web",
            "spiffe://be288efb.consul/ap/team-a/ns/default/dc/dc1/svc/web",
            "spiffe://be288efb.consul/ns/default/dc/dc1/svc/a%2Fb",
        ] {
            assert_eq!(SpiffeId::parse(uri).unwrap().to_string(), uri);
        }
    }

    #[test]
    fn the_default_partition_is_implied_and_the_trust_domain_has_no_case() {
        let id = SpiffeId::parse("spiffe://TD.consul/ap/default/ns/default/dc/dc1/svc/web").unwrap();
        assert_eq!(id, SpiffeId::parse("spiffe://td.consul/ns/default/dc/dc1/svc/web").unwrap());
    }

    #[test]
    fn everything_else_is_refused() {
        for uri in [
            "",
            "spiffe://",
            "spiffe:///ns/default/dc/dc1/svc/web",
            "spiffe://td.consul",
            "spiffe://td.consul/ns/default/dc/dc1/svc/",
            "spiffe://td.consul/ns/default/dc/dc1/svc/web/",
            "spiffe://td.consul/ns/default/dc/dc1/svc/web/more",
            "spiffe://td.consul/ns//dc/dc1/svc/web",
            "spiffe://td.consul/ns/default/dc/dc1/svc/%zz",
            "spiffe://td.consul/ns/default/dc/dc1/svc/%f",
            "spiffe://td.consul/ns/default/dc/dc1/svc/%ff",
            "spiffe://td.consul/ns/default/dc/dc1/svc/web?x=1",
            "spiffe://td.consul/gateway/mesh/dc/dc1",
            "spiffe://td.consul/agent/client/dc/dc1/id/n1",
            "https://td.consul/ns/default/dc/dc1/svc/web",
            "spiffe:/",
            "é€spiffe://x",
        ] {
            assert!(SpiffeId::parse(uri).is_err(), "{uri}");
        }
    }
}
