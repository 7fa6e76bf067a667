//! Whom the admin server answers.
//!
//! The server listens on the loopback address, which every page in a browser of this host can send requests to. A page
//! may not ask for anything (a foreign `Origin`, `Sec-Fetch-Site`), be it only to hold the places of those who look on; a
//! link in it may lead to the dashboard. A page whose own name was made to lead here (DNS rebinding) may not read
//! anything either: its name is in `Host`. Envoy checks neither.

use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::{HeaderMap, HeaderName, Method, Request};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Why a request is refused; a sentence for the client.
pub(super) type Refusal = &'static str;

/// Which `Host` a request may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hosts {
    /// An address or localhost.
    Own,
    /// Whatever it is called: a Unix socket is reached by no page, and scrapers have names for this host.
    Any,
}

/// Whether the request may be answered.
///
/// # Errors
/// When it may not be, with the reason.
pub(super) fn check<B>(request: &Request<B>, hosts: Hosts) -> Result<(), Refusal> {
    let headers = request.headers();
    let host = request.uri().authority().map(http::uri::Authority::as_str).or_else(|| text(headers, &HOST));
    if hosts == Hosts::Own && !host.is_none_or(is_own) {
        return Err("the Host header names neither an address nor localhost: use the address of the server\n");
    }
    if is_followed_link(request) {
        return Ok(());
    }
    let same_site = text(headers, &SEC_FETCH_SITE).is_none_or(|site| matches!(site, "same-origin" | "none"));
    let same_origin = match (headers.get(ORIGIN), host) {
        (None, _) => true,
        (Some(origin), Some(host)) => origin.to_str().is_ok_and(|origin| {
            origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) == Some(host)
        }),
        (Some(_), None) => false,
    };
    if same_site && same_origin { Ok(()) } else { Err("refused: the request comes from a page of another site\n") }
}

/// Whether a browser opens the dashboard as a page of its own. The page that led to it sees nothing of it.
fn is_followed_link<B>(request: &Request<B>) -> bool {
    let says = |name, value| text(request.headers(), &HeaderName::from_static(name)) == Some(value);
    let is_page = says("sec-fetch-mode", "navigate") && says("sec-fetch-dest", "document");
    *request.method() == Method::GET && request.uri().path() == "/" && is_page
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("\u{fffd}"))
}

fn is_own(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let is_local = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    is_local || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, headers: &[(&str, &str)]) -> Request<()> {
        request_of("/stats", method, headers)
    }

    fn request_of(path: &str, method: Method, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn a_name_that_was_made_to_lead_here_reads_nothing() {
        for host in
            ["127.0.0.1:19000", "127.0.0.1", "[::1]:19000", "localhost:19000", "web.localhost", "10.0.0.7:20200"]
        {
            assert_eq!(check(&request(Method::GET, &[("host", host)]), Hosts::Own), Ok(()), "{host}");
        }
        for host in ["evil.example", "evil.example:19000", "127.0.0.1.evil.example", "localhost.evil.example", "é"] {
            assert!(check(&request(Method::GET, &[("host", host)]), Hosts::Own).is_err(), "{host}");
        }
        assert_eq!(check(&request(Method::GET, &[("host", "evil.example")]), Hosts::Any), Ok(()));
        assert_eq!(check(&request(Method::GET, &[]), Hosts::Own), Ok(()));
    }

    #[test]
    fn a_page_of_another_site_changes_and_reads_nothing() {
        let host = ("host", "127.0.0.1:19000");
        let own = ("origin", "http://127.0.0.1:19000");
        for headers in [vec![host], vec![host, own], vec![host, own, ("sec-fetch-site", "same-origin")]] {
            assert_eq!(check(&request(Method::POST, &headers), Hosts::Own), Ok(()), "{headers:?}");
        }
        for headers in [
            vec![host, ("origin", "http://evil.example")],
            vec![host, ("origin", "null")],
            vec![host, ("origin", "http://127.0.0.1:8080")],
            vec![host, ("sec-fetch-site", "cross-site")],
            vec![host, ("sec-fetch-site", "same-site")],
            vec![own],
        ] {
            for method in [Method::POST, Method::GET] {
                assert!(check(&request(method, &headers), Hosts::Own).is_err(), "{headers:?}");
            }
        }
    }

    #[test]
    fn a_link_leads_to_the_dashboard_alone() {
        let link = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        let frame = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
        for (path, headers, allowed) in
            [("/", link, true), ("/events", link, false), ("/status", link, false), ("/", frame, false)]
        {
            let answer = check(&request_of(path, Method::GET, &headers), Hosts::Own);
            assert_eq!(answer.is_ok(), allowed, "{path} {headers:?}");
        }
    }
}
