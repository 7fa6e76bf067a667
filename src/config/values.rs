//! Parsers of the values of flags and variables. They accept the same spellings as Consul's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::consul::Address;

/// Parses a boolean as Go's `strconv.ParseBool` does.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Go's durations, such as `1m30s` or `1.5h`, or a plain number of seconds.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    if text.chars().all(is_number) {
        return Duration::try_from_secs_f64(text.parse().ok()?).ok();
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, behind) = rest.split_at(rest.find(|c| !is_number(c))?);
        let (unit, behind) = behind.split_at(behind.find(is_number).unwrap_or(behind.len()));
        seconds += number.parse::<f64>().ok()? * seconds_of(unit)?;
        rest = behind;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

fn seconds_of(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1e-9,
        "us" | "µs" | "μs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    })
}

/// Splits `host:port`, with an IPv6 host in brackets, which are taken off. The host may be empty.
pub(super) fn host_and_port(text: &str) -> anyhow::Result<(&str, u16)> {
    let (host, port) =
        text.rsplit_once(':').with_context(|| format!("address {text}: missing port in address; write host:port"))?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => {
            ensure!(v6.parse::<Ipv6Addr>().is_ok(), "address {text}: {v6:?} is not an IPv6 address");
            v6
        }
        None if host.contains(':') => bail!("address {text}: too many colons in address; write IPv6 as [::1]:port"),
        None if host.contains(['[', ']']) => bail!("address {text}: missing bracket in address"),
        None => host,
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let number = port.parse().ok().filter(|number| digits && *number != 0);
    Ok((host, number.with_context(|| format!("address {text}: {port:?} is not a port from 1 to 65535"))?))
}

/// An address to bind, where an empty host means `unnamed`. Host names are looked up, IPv4 first.
pub(super) fn bind(text: &str, unnamed: Ipv4Addr) -> anyhow::Result<SocketAddr> {
    let (host, port) = host_and_port(text)?;
    if host.is_empty() {
        return Ok((unnamed, port).into());
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok((ip, port).into());
    }
    // Known without being looked up (RFC 6761), also where no file says so.
    if host.eq_ignore_ascii_case("localhost") {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    let found = Some((host, port)).filter(|_| is_host(host)).and_then(|named| named.to_socket_addrs().ok());
    let found: Vec<_> = found.into_iter().flatten().collect();
    let first = found.iter().find(|address| address.is_ipv4()).or_else(|| found.first());
    first.copied().with_context(|| format!("address {text}: the host {host:?} cannot be resolved; write an IP address"))
}

/// An address to dial, where an empty host means this machine, as it does in Go.
pub(super) fn dial(text: &str) -> anyhow::Result<String> {
    let (host, port) = host_and_port(text)?;
    ensure!(is_host(host) || host.is_empty(), "address {text}: {host:?} is not a host name");
    Ok(authority(host, port))
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdHocUpstream {
    pub name: String,
    pub prepared_query: bool,
    pub bind: SocketAddr,
}

/// `name:[addr:]port`, the name with an optional `.service` or `.query`.
pub(super) fn upstream(text: &str) -> anyhow::Result<AdHocUpstream> {
    let (name, address) =
        text.split_once(':').with_context(|| format!("Upstream value should be name:addr in {text:?}"))?;
    let (name, kind) = name.split_once('.').unwrap_or((name, ""));
    ensure!(!name.is_empty(), "Upstream value should be name:addr in {text:?}: the name is missing");
    let prepared_query = match kind {
        "" | "service" => false,
        "query" => true,
        _ => bail!("Upstream type must be blank, 'service', or 'query'. Got: {kind:?}"),
    };
    let bind = if address.contains(':') {
        bind(address, Ipv4Addr::LOCALHOST)?
    } else {
        bind(&format!(":{address}"), Ipv4Addr::LOCALHOST)?
    };
    Ok(AdHocUpstream { name: name.to_owned(), prepared_query, bind })
}

/// The address of an agent; `tls` is what `CONSUL_HTTP_SSL` says. Without a port it is the scheme's, 80 or 443, as in
/// Consul 1.8.7, not 8500.
pub(super) fn agent(text: &str, tls: bool) -> anyhow::Result<Address> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let https = match scheme {
        // Never back to plaintext when TLS was asked for.
        "http" => tls,
        "https" => true,
        "unix" => {
            ensure!(!rest.is_empty(), "{text:?} names no socket; write unix:///path");
            return Ok(Address::Unix(PathBuf::from(rest)));
        }
        _ => bail!("Unknown protocol scheme: {scheme}; write host:port, http://…, https://… or unix:///path"),
    };
    // The text is not repeated here: there is a password in it.
    ensure!(!rest.contains('@'), "a user in the address is not supported; use CONSUL_HTTP_AUTH=user:password");
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    ensure!(!host.is_empty(), "{text:?} names no host; write host:port, or unix:///path for a socket");
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '?' | '#');
    ensure!(!path.contains(odd), "{text:?} is not an address; only a path may follow the port");
    let has_port = host.rfind(':') > host.rfind(']');
    let default = if https { 443 } else { 80 };
    let authority =
        if has_port { dial(host) } else { dial(&format!("{host}:{default}")) }.context("the agent's address")?;
    let path = path.trim_matches('/');
    let prefix = if path.is_empty() { String::new() } else { format!("/{path}") };
    Ok(Address::Tcp { https, authority, prefix })
}

/// A name for TLS: what may look like an address loses its port and brackets.
pub(super) fn server_name(text: &str) -> &str {
    let host = if text.rfind(':') > text.rfind(']') && text.parse::<Ipv6Addr>().is_err() {
        text.rsplit_once(':').map_or(text, |(host, _)| host)
    } else {
        text
    };
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn is_host(host: &str) -> bool {
    let is_name = |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    !host.is_empty() && (is_name(host) || host.parse::<Ipv6Addr>().is_ok())
}

fn authority(host: &str, port: u16) -> String {
    match host {
        "" => format!("127.0.0.1:{port}"),
        v6 if v6.contains(':') => format!("[{v6}]:{port}"),
        host => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn booleans() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert_eq!(boolean(text), Some(true), "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            assert_eq!(boolean(text), Some(false), "{text}");
        }
        for text in ["", "yes", "no", "on", "tRUE", " true", "2"] {
            assert_eq!(boolean(text), None, "{text}");
        }
    }

    #[test]
    fn durations() {
        let cases = [
            ("0", 0),
            ("10", 10_000),
            ("1.5", 1500),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("250ms", 250),
            ("1h0.5m", 3_630_000),
            ("1000us", 1),
        ];
        for (text, milliseconds) in cases {
            assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in
            ["", ".", "s", "-1s", "10x", "1 s", "inf", "nan", "1e3", "1.2.3s", "1s2", "99999999999999999999h", "é"]
        {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn agent_addresses() {
        let tcp = |https, authority: &str, prefix: &str| Address::Tcp {
            https,
            authority: authority.to_owned(),
            prefix: prefix.to_owned(),
        };
        let cases = [
            ("127.0.0.1:8500", false, tcp(false, "127.0.0.1:8500", "")),
            ("http://consul:8500", false, tcp(false, "consul:8500", "")),
            ("http://consul:8500", true, tcp(true, "consul:8500", "")),
            ("consul:8501", true, tcp(true, "consul:8501", "")),
            ("https://consul:8501", false, tcp(true, "consul:8501", "")),
            ("localhost", false, tcp(false, "localhost:80", "")),
            ("https://consul.example", false, tcp(true, "consul.example:443", "")),
            (":8500", false, tcp(false, "127.0.0.1:8500", "")),
            ("[::1]:8500", false, tcp(false, "[::1]:8500", "")),
            ("https://[::1]", false, tcp(true, "[::1]:443", "")),
            ("http://gw:80/consul/a/", false, tcp(false, "gw:80", "/consul/a")),
            ("http://gw:80/", false, tcp(false, "gw:80", "")),
            ("unix:///run/consul.sock", false, Address::Unix("/run/consul.sock".into())),
            ("unix:///run/consul.sock", true, Address::Unix("/run/consul.sock".into())),
            ("unix://here.sock", false, Address::Unix("here.sock".into())),
        ];
        for (text, tls, expected) in cases {
            assert_eq!(agent(text, tls).expect(text), expected, "{text} {tls}");
        }
    }

    #[test]
    fn wrong_agent_addresses() {
        let cases = [
            ("ftp://x", "Unknown protocol scheme: ftp"),
            ("unix://", "names no socket"),
            ("/run/consul.sock", "unix:///path"),
            ("http://", "names no host"),
            ("http://user:secret@x:1", "CONSUL_HTTP_AUTH"),
            ("::1", "write IPv6 as"),
            ("::1:8500", "write IPv6 as"),
            ("[::1:8500", "too many colons"),
            ("[x]:8500", "not an IPv6 address"),
            ("host:port", "not a port"),
            ("host:0", "not a port"),
            ("host:+80", "not a port"),
            ("host:65536", "not a port"),
            ("host:", "not a port"),
            ("ho st:80", "not a host name"),
            ("hö:80", "not a host name"),
            ("http://x:80/a b", "only a path"),
            ("http://x:80/?a", "only a path"),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", agent(text, false).expect_err(text));
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn upstreams() {
        let cases = [
            ("db:8181", "db", false, "127.0.0.1:8181"),
            ("db.:8181", "db", false, "127.0.0.1:8181"),
            ("db.service:8181", "db", false, "127.0.0.1:8181"),
            ("near.query:8181", "near", true, "127.0.0.1:8181"),
            ("db:10.0.0.1:8181", "db", false, "10.0.0.1:8181"),
            ("db::8181", "db", false, "127.0.0.1:8181"),
            ("db:[::1]:8181", "db", false, "[::1]:8181"),
            ("db:localhost:8181", "db", false, "127.0.0.1:8181"),
        ];
        for (text, name, prepared_query, bind) in cases {
            let expected = AdHocUpstream { name: name.to_owned(), prepared_query, bind: bind.parse().unwrap() };
            assert_eq!(upstream(text).expect(text), expected, "{text}");
        }
        let wrong = [
            ("db", "Upstream value should be name:addr in \"db\""),
            (":8181", "the name is missing"),
            ("db.gateway:1", "Upstream type must be blank, 'service', or 'query'. Got: \"gateway\""),
            ("db:", "not a port"),
            ("db:0", "not a port"),
            ("db:70000", "not a port"),
            ("db:::1:80", "write IPv6 as"),
            ("db:no such host:80", "cannot be resolved"),
        ];
        for (text, expected) in wrong {
            let error = format!("{:#}", upstream(text).expect_err(text));
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_to_dial_and_bind() {
        assert_eq!(dial(":8080").unwrap(), "127.0.0.1:8080");
        assert_eq!(dial("app.local:8080").unwrap(), "app.local:8080");
        assert_eq!(dial("[::1]:8080").unwrap(), "[::1]:8080");
        assert!(dial("8080").is_err());
        assert_eq!(bind(":21000", Ipv4Addr::UNSPECIFIED).unwrap(), "0.0.0.0:21000".parse().unwrap());
        assert_eq!(bind("[::]:21000", Ipv4Addr::UNSPECIFIED).unwrap(), "[::]:21000".parse().unwrap());
    }

    #[test]
    fn server_names_lose_their_port() {
        for (text, expected) in [
            ("consul.example", "consul.example"),
            ("consul.example:8501", "consul.example"),
            ("[::1]:8501", "::1"),
            ("[::1]", "::1"),
            ("::1", "::1"),
            ("10.0.0.1:1", "10.0.0.1"),
        ] {
            assert_eq!(server_name(text), expected, "{text}");
        }
    }
}
