//! Requests and responses on their way from one hop to the next: what is checked, what stays behind, and the
//! form that each version of HTTP wants.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};

use crate::jwt::{Providers, Verified};
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::{HEADERS, framing, pool};
use crate::proxy::outcome::{Fault, Outcome};
use crate::snapshot::{NormalPath, Normalization, RequestView, Upgrades};

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(super) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(super) const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

const X_ENVOY_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// How a listener takes requests.
#[derive(Clone, Copy)]
pub(crate) struct Intake<'a> {
    pub normalization: &'a Normalization,
    /// Upgrades that requests may ask for.
    pub upgrades: &'a Upgrades,
    /// The authority of an HTTP/1.0 request without a host.
    pub service: &'a str,
}

/// A request's head, of no version yet.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub method: Method,
    /// Normalised where the listener normalises.
    pub path: PathAndQuery,
    path_as_written: bool,
    /// Whom the request is for. It is judged by this, and goes on with this as its `Host` or `:authority`.
    pub authority: HeaderValue,
    /// Those that go on, but for `host`, which may be there or not. Of those for one hop there are `connection` and
    /// `upgrade` if the connection is to be upgraded.
    pub headers: HeaderMap,
    /// The client wants to speak another protocol from here on, such as `websocket`, and may.
    upgrades: bool,
}

impl Head {
    /// Checks and normalises. Beyond what codecs check: one length, one host, of the form of one, and a path.
    ///
    /// # Errors
    /// The request is to be answered so.
    pub(crate) fn check(parts: Parts, intake: Intake<'_>) -> Result<Self, Fault> {
        let Parts { method, uri, version, mut headers, .. } = parts;
        if method == Method::CONNECT {
            return Err(Fault::new(Outcome::Method, "CONNECT is not served"));
        }
        if headers.len() > HEADERS {
            return Err(Fault::new(Outcome::TooLarge, "the request has too many headers"));
        }
        framing::check(version, &headers).map_err(|bad| Fault::new(Outcome::BadRequest, bad))?;
        framing::check_values(version, &headers).map_err(|bad| Fault::new(Outcome::BadRequest, bad))?;
        let authority = authority(&uri, version, &headers, intake.service)?;
        let normalization = intake.normalization;
        normalization.headers(&mut headers).map_err(|bad| Fault::new(Outcome::BadRequest, bad.to_string()))?;
        let path = path(uri, &method, normalization)?;
        let upgrade = upgrade(version, &headers, intake.upgrades);
        strip(&mut headers);
        join_cookies(&mut headers);
        let mut head = Self {
            method,
            path,
            path_as_written: !normalization.path,
            authority,
            headers,
            upgrades: upgrade.is_some(),
        };
        if let Some(protocols) = upgrade {
            head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(UPGRADE, protocols);
        }
        Ok(head)
    }

    /// Methods are in upper case, and case-sensitive (RFC 9110, 9.1); some servers take `post` for `POST` all the same.
    ///
    /// # Errors
    /// The request is to be answered so.
    pub(crate) fn check_method(&self) -> Result<(), Fault> {
        if self.method.as_str().bytes().any(|byte| byte.is_ascii_lowercase()) {
            return Err(Fault::new(Outcome::BadRequest, "the method is not in upper case"));
        }
        Ok(())
    }

    #[must_use]
    pub(crate) fn upgrades(&self) -> bool {
        self.upgrades
    }

    /// The connection is to stay one of HTTP, whatever the client wanted.
    pub(crate) fn stay(&mut self) {
        if std::mem::take(&mut self.upgrades) {
            self.headers.remove(CONNECTION);
            self.headers.remove(UPGRADE);
        }
    }

    /// What it is judged by: all of it, or all but its headers, which costs next to nothing.
    #[must_use]
    pub(crate) fn outline(&mut self, with_headers: bool) -> Self {
        if with_headers {
            return self.clone();
        }
        let headers = std::mem::take(&mut self.headers);
        let outline = self.clone();
        self.headers = headers;
        outline
    }

    #[must_use]
    pub(crate) fn view(&self) -> RequestView<'_> {
        RequestView {
            method: self.method.as_str(),
            path: self.path.path(),
            path_as_written: self.path_as_written,
            query: self.path.query(),
            authority: self.authority.to_str().unwrap_or_default(),
            headers: &self.headers,
        }
    }

    /// Takes out the tokens that the app is not to see, and adds what it is to know of them.
    pub(crate) fn pass_tokens_on(&mut self, providers: &Providers, verified: &Verified) {
        providers.pass_on(verified, &mut self.headers);
        let Some(query) = self.path.query() else { return };
        if let Cow::Owned(rest) = providers.query_for_app(verified, query) {
            let mark = if rest.is_empty() { "" } else { "?" };
            // Parts of what was a path and a query make another.
            if let Ok(path) = PathAndQuery::try_from(format!("{}{mark}{rest}", self.path.path())) {
                self.path = path;
            }
        }
    }

    /// Another path, from a prefix rewrite. The app gets the original one in Envoy's header.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn rewrite(&mut self, path: &str) -> Result<(), Fault> {
        let bad = || Fault::new(Outcome::BadRequest, "the rewritten path is no path");
        let original = HeaderValue::from_bytes(self.path.as_str().as_bytes()).map_err(|_| bad())?;
        self.path = PathAndQuery::try_from(path).map_err(|_| bad())?;
        self.headers.insert(X_ENVOY_ORIGINAL_PATH, original);
        Ok(())
    }

    /// Repeating it changes nothing (RFC 9110, 9.2.1).
    #[must_use]
    pub(crate) fn is_safe(&self) -> bool {
        self.method.is_safe()
    }

    /// In the form of a version.
    ///
    /// # Errors
    /// When HTTP/2 can't name the host.
    pub(crate) fn into_request(
        mut self,
        version: pool::Version,
        body: ReplayBody,
    ) -> Result<Request<ReplayBody>, Fault> {
        let chunked = is_of_unknown_length(&body) && !self.headers.contains_key(CONTENT_LENGTH);
        let mut request = Request::new(body);
        match version {
            pool::Version::Http1 => {
                *request.uri_mut() = Uri::from(self.path);
                self.headers.insert(HOST, self.authority);
                if chunked {
                    // The codec would leave out the body of a GET or HEAD.
                    self.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
                }
            }
            pool::Version::Http2 => {
                self.stay();
                self.headers.remove(HOST);
                *request.uri_mut() = http2_uri(self.path, self.authority)?;
                *request.version_mut() = Version::HTTP_2;
            }
        }
        *request.method_mut() = self.method;
        *request.headers_mut() = self.headers;
        Ok(request)
    }

    /// Takes a request back that was not sent.
    #[must_use]
    pub(crate) fn from_request(request: Request<ReplayBody>, authority: HeaderValue) -> (Self, ReplayBody) {
        let (Parts { method, uri, mut headers, .. }, body) = request.into_parts();
        let upgrades = headers.contains_key(UPGRADE);
        headers.remove(TRANSFER_ENCODING);
        let path = uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        (Self { method, path, path_as_written: true, authority, headers, upgrades }, body)
    }
}

fn is_of_unknown_length(body: &ReplayBody) -> bool {
    use http_body::Body as _;
    !body.is_empty() && body.size_hint().exact().is_none()
}

/// The path and query of a target, normalised.
fn path(uri: Uri, method: &Method, normalization: &Normalization) -> Result<PathAndQuery, Fault> {
    let bad = |cause| Fault::new(Outcome::BadRequest, cause);
    let mut path = uri.into_parts().path_and_query.ok_or_else(|| bad("the request has no path"))?;
    if path.as_str().starts_with('?') {
        // A target such as `http://db?x=1` has the path `/` (RFC 9110, 4.2.3).
        path = PathAndQuery::try_from(format!("/{path}")).map_err(|_| bad("the request has no path"))?;
    }
    if path.path() == "*" && method != Method::OPTIONS {
        return Err(bad("only OPTIONS is for `*`"));
    }
    match normalization.path(path.as_str()) {
        Ok(NormalPath::Forward(Cow::Borrowed(_))) => Ok(path),
        Ok(NormalPath::Forward(Cow::Owned(normal))) => {
            PathAndQuery::try_from(normal).map_err(|_| bad("the path can't be normalised"))
        }
        Ok(NormalPath::Redirect(location)) => Err(Fault::new(Outcome::Redirect, location)),
        Err(bad) => Err(Fault::new(Outcome::BadRequest, bad.to_string())),
    }
}

fn http2_uri(path: PathAndQuery, authority: HeaderValue) -> Result<Uri, Fault> {
    let no_host = || Fault::new(Outcome::BadRequest, "the host is none that HTTP/2 can name");
    let authority = Authority::from_maybe_shared(Bytes::copy_from_slice(authority.as_bytes()));
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority.map_err(|_| no_host())?);
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).map_err(|_| no_host())
}

/// Whom a request is for, however it says so: the target's authority if it names one, else the `host` header, of which
/// there is one (RFC 9112, 3.2 and 3.2.2). In HTTP/2 both must be the same (RFC 9113, 8.3.1). HTTP/1.0 may name none, and
/// is for `service`.
fn authority(uri: &Uri, version: Version, headers: &HeaderMap, service: &str) -> Result<HeaderValue, Fault> {
    let bad = |cause| Err(Fault::new(Outcome::BadRequest, cause));
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return bad("the request names several hosts");
    }
    // An `http` URI has a host (RFC 9110, 4.2.1), so an empty one is as good as none.
    let host = host.filter(|host| !host.is_empty());
    if host.is_some_and(|host| !is_authority(host.as_bytes())) {
        return bad("the host is no host");
    }
    match (uri.authority().map(Authority::as_str), host) {
        (Some(authority), _) if !is_authority(authority.as_bytes()) => bad("the host is no host"),
        (Some(authority), Some(host)) if version == Version::HTTP_2 && host != authority => {
            bad("the request names two hosts")
        }
        (Some(authority), _) => HeaderValue::from_str(authority).or_else(|_| bad("the host is no host")),
        (None, Some(host)) => Ok(host.clone()),
        (None, None) if version == Version::HTTP_10 && is_authority(service.as_bytes()) => {
            HeaderValue::from_str(service).or_else(|_| bad("the host is no host"))
        }
        (None, None) => bad("the request names no host"),
    }
}

/// A name, an IPv4 address or an IPv6 address in brackets, with a port or without (RFC 3986, 3.2.2). No user, and no
/// escapes, which servers decode or not.
fn is_authority(text: &[u8]) -> bool {
    let after = |at: usize| text.split_at(at);
    let (host, port) = match text.iter().position(|byte| *byte == b']') {
        Some(end) => after(end + 1),
        None => after(text.iter().position(|byte| *byte == b':').unwrap_or(text.len())),
    };
    let is_host = match host.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) {
        Some(address) => address.iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.')),
        None => host.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(byte)),
    };
    let is_port = port.strip_prefix(b":").map_or(port.is_empty(), |port| port.iter().all(u8::is_ascii_digit));
    !host.is_empty() && host != b"[]" && is_host && is_port
}

/// Of what the client wants to upgrade its connection to, what it may (RFC 9110, 7.8). HTTP/1.1 alone can be.
fn upgrade(version: Version, headers: &HeaderMap, allowed: &Upgrades) -> Option<HeaderValue> {
    if version != Version::HTTP_11 || !headers.contains_key(UPGRADE) {
        return None;
    }
    let named = options(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    let protocols: Vec<&[u8]> = options(headers, &UPGRADE).filter(|protocol| allowed.allow(protocol)).collect();
    if !named || protocols.is_empty() {
        return None;
    }
    HeaderValue::from_bytes(&protocols.join(&b", "[..])).ok()
}

/// Whether something other than HTTP may follow the request.
pub(super) fn leaves_http<B>(request: &Request<B>, allowed: &Upgrades) -> bool {
    request.headers().contains_key(UPGRADE)
        && options(request.headers(), &UPGRADE).any(|protocol| allowed.allow(protocol))
}

/// A response that switches protocols is for who asked for it (RFC 9110, 15.2.2).
///
/// # Errors
/// Nobody asked.
pub(super) fn refuse_unasked_switch<B>(response: &Response<B>) -> Result<(), Fault> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Fault::new(Outcome::BadResponse, "the answer switches protocols without a request for an upgrade"));
    }
    Ok(())
}

/// The elements of a header's list.
fn options<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    lines.flat_map(|line| line.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

/// Removes what is for one hop alone (RFC 9110, 7.6.1). `te: trailers` stays, which gRPC goes by.
pub(super) fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = options(headers, &CONNECTION)
            .filter_map(|option| HeaderName::from_bytes(option).ok())
            .filter(|name| !KEPT_IF_NAMED.contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    // Few have any: to look at those that are there costs less than to look for each of these.
    if headers.keys().any(|name| FOR_ONE_HOP.contains(name)) {
        for name in FOR_ONE_HOP {
            headers.remove(name);
        }
    }
    if headers.contains_key(TE) {
        let trailers = headers.get_all(TE).iter().any(|te| {
            te.as_bytes()
                .split(|byte| *byte == b',')
                .any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"))
        });
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

const FOR_ONE_HOP: [HeaderName; 5] = [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE, HTTP2_SETTINGS];

/// Naming these in `connection` would take from the request what makes it what it is, or what a proxy is to
/// see of it.
const KEPT_IF_NAMED: [HeaderName; 9] = [
    HOST,
    TE,
    CONTENT_LENGTH,
    http::header::AUTHORIZATION,
    COOKIE,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    X_FORWARDED_PROTO,
    X_FORWARDED_CLIENT_CERT,
];

/// HTTP/2 may split cookies over lines, which readers take as one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(COOKIE).iter();
    if lines.next().is_none() || lines.next().is_none() {
        return;
    }
    let joined = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// Adds what Envoy under Consul adds where it is missing.
pub(super) fn annotate(headers: &mut HeaderMap) {
    if !headers.contains_key(&X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id(fastrand::u128(..)));
    }
    if !headers.contains_key(&X_FORWARDED_PROTO) {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
}

/// A random UUID (RFC 9562, version 4).
fn request_id(random: u128) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let random = random & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let mut text = [b'-'; 36];
    let mut shift = 128;
    for (place, byte) in text.iter_mut().enumerate() {
        if !matches!(place, 8 | 13 | 18 | 23) {
            shift -= 4;
            *byte = DIGITS[(random >> shift) as usize & 0xf];
        }
    }
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

/// Adds an element behind those that a list header has, on one line.
pub(super) fn append_element(headers: &mut HeaderMap, name: &HeaderName, element: &HeaderValue) {
    let before = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let lines: Vec<&[u8]> = before.chain([element.as_bytes()]).collect();
    let joined = if lines.len() == 1 { None } else { HeaderValue::from_bytes(&lines.join(&b","[..])).ok() };
    headers.insert(name, joined.unwrap_or_else(|| element.clone()));
}
