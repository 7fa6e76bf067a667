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
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version};

use super::refusal::{Kind, Refusal};
use crate::jwt::{Providers, Verified};
use crate::proxy::codec::upload::Upload;
use crate::proxy::codec::{HEADERS, framing, pool};
use crate::snapshot::{NormalPath, Normalization, RequestView};

pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

const X_ENVOY_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// A request's head, of no version yet.
#[derive(Debug, Clone)]
pub struct Head {
    pub method: Method,
    /// Normalised.
    pub path: PathAndQuery,
    /// `None` only for HTTP/1.0, which need not name a host.
    pub authority: Option<HeaderValue>,
    /// Without those that are for one hop; with `host` or without.
    pub headers: HeaderMap,
    /// What the client wants to speak from here on, such as `websocket`.
    pub upgrade: Option<HeaderValue>,
}

impl Head {
    /// Checks and normalises. Beyond what codecs check: one length, one host, of the form of one, and a path.
    ///
    /// # Errors
    /// The request is to be answered so.
    pub fn check(parts: Parts, normalization: &Normalization) -> Result<Self, Refusal> {
        let Parts { method, uri, version, mut headers, .. } = parts;
        if method == Method::CONNECT {
            return Err(Refusal::new(Kind::Method, "CONNECT is not served"));
        }
        if headers.len() > HEADERS {
            return Err(Refusal::new(Kind::TooLarge, "the request has too many headers"));
        }
        framing::check(version, &headers).map_err(|bad| Refusal::new(Kind::BadRequest, bad))?;
        let authority = authority(&uri, version, &headers)?;
        normalization.headers(&mut headers).map_err(|bad| Refusal::new(Kind::BadRequest, bad.to_string()))?;
        let bad = |cause| Refusal::new(Kind::BadRequest, cause);
        let path = uri.into_parts().path_and_query.ok_or_else(|| bad("the request has no path"))?;
        let path = match normalization.path(path.as_str()) {
            Ok(NormalPath::Forward(Cow::Borrowed(_))) => path,
            Ok(NormalPath::Forward(Cow::Owned(normal))) => {
                PathAndQuery::try_from(normal).map_err(|_| bad("the path can't be normalised"))?
            }
            Ok(NormalPath::Redirect(location)) => return Err(Refusal::new(Kind::Redirect, location)),
            Err(bad) => return Err(Refusal::new(Kind::BadRequest, bad.to_string())),
        };
        let upgrade = upgrade(version, &headers);
        strip(&mut headers);
        Ok(Self { method, path, authority, headers, upgrade })
    }

    #[must_use]
    pub fn view(&self) -> RequestView<'_> {
        RequestView {
            method: self.method.as_str(),
            path: self.path.path(),
            query: self.path.query(),
            authority: self.authority.as_ref().and_then(|authority| authority.to_str().ok()).unwrap_or_default(),
            headers: &self.headers,
        }
    }

    /// Takes out the tokens that the app is not to see, and adds what it is to know of them.
    pub fn pass_tokens_on(&mut self, providers: &Providers, verified: &Verified) {
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

    /// Another path, from a prefix rewrite. The app learns the original one as Envoy tells it.
    ///
    /// # Errors
    /// When it is none.
    pub fn rewrite(&mut self, path: &str) -> Result<(), Refusal> {
        let bad = || Refusal::new(Kind::BadRequest, "the rewritten path is no path");
        let original = HeaderValue::from_str(self.path.as_str()).map_err(|_| bad())?;
        self.path = PathAndQuery::try_from(path).map_err(|_| bad())?;
        self.headers.insert(X_ENVOY_ORIGINAL_PATH, original);
        Ok(())
    }

    /// Repeating it changes nothing (RFC 9110, 9.2.1).
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.method.is_safe()
    }

    /// In the form of a version.
    ///
    /// # Errors
    /// When HTTP/2 can't name the host.
    pub fn into_request(mut self, version: pool::Version, body: Upload) -> Result<Request<Upload>, Refusal> {
        let mut request = Request::new(body);
        match version {
            pool::Version::Http1 => {
                *request.uri_mut() = Uri::from(self.path);
                if let Some(authority) = self.authority.take()
                    && !self.headers.contains_key(HOST)
                {
                    self.headers.insert(HOST, authority);
                }
                join_cookies(&mut self.headers);
                if let Some(upgrade) = self.upgrade {
                    self.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                    self.headers.insert(UPGRADE, upgrade);
                }
            }
            pool::Version::Http2 => {
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
    pub fn from_request(request: Request<Upload>, authority: Option<HeaderValue>) -> (Self, Upload) {
        let (Parts { method, uri, mut headers, .. }, body) = request.into_parts();
        let upgrade = headers.remove(UPGRADE);
        headers.remove(CONNECTION);
        let path = uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        (Self { method, path, authority, headers, upgrade }, body)
    }
}

fn http2_uri(path: PathAndQuery, authority: Option<HeaderValue>) -> Result<Uri, Refusal> {
    let no_host = || Refusal::new(Kind::BadRequest, "the request names no host, which HTTP/2 needs");
    let authority = authority.ok_or_else(no_host)?;
    let authority = Authority::from_maybe_shared(Bytes::copy_from_slice(authority.as_bytes()));
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority.map_err(|_| no_host())?);
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).map_err(|_| no_host())
}

/// The host that the request is for: of the target if it names one, else of the header, of which there is one
/// (RFC 9112, 3.2). In HTTP/2 both must be the same (RFC 9113, 8.3.1).
fn authority(uri: &Uri, version: Version, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
    let bad = |cause| Err(Refusal::new(Kind::BadRequest, cause));
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return bad("the request names several hosts");
    }
    if host.is_some_and(|host| !is_host(host.as_bytes())) {
        return bad("the host is no host");
    }
    let Some(authority) = uri.authority() else {
        return match host {
            Some(host) => Ok(Some(host.clone())),
            None if version == Version::HTTP_10 => Ok(None),
            None => bad("the request names no host"),
        };
    };
    if authority.as_str().contains('@') {
        return bad("the host is no host");
    }
    if version == Version::HTTP_2 && host.is_some_and(|host| host.as_bytes() != authority.as_str().as_bytes()) {
        return bad("the request names two hosts");
    }
    HeaderValue::from_str(authority.as_str()).map(Some).or_else(|_| bad("the host is no host"))
}

/// A name, an IPv4 address or an IPv6 address in brackets, with a port or without (RFC 3986, 3.2.2). Empty
/// is allowed, as in RFC 9112.
fn is_host(host: &[u8]) -> bool {
    host.iter().all(|byte| {
        byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'-' | b'.'
                    | b'_'
                    | b'~'
                    | b'%'
                    | b'!'
                    | b'$'
                    | b'&'
                    | b'\''
                    | b'('
                    | b')'
                    | b'*'
                    | b'+'
                    | b';'
                    | b'='
                    | b':'
                    | b'['
                    | b']'
            )
    })
}

/// What is to be upgraded to, if that is asked for in HTTP/1.1. HTTP/2 is not.
fn upgrade(version: Version, headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers.get(UPGRADE).filter(|_| version == Version::HTTP_11)?;
    let named = options(headers).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    (named && !wanted.as_bytes().eq_ignore_ascii_case(b"h2c")).then(|| wanted.clone())
}

/// Whether something other than HTTP may follow the request.
pub fn leaves_http<B>(request: &Request<B>) -> bool {
    request.headers().get_all(UPGRADE).iter().any(|upgrade| !upgrade.as_bytes().eq_ignore_ascii_case(b"h2c"))
}

/// What the `connection` header lists.
fn options(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes);
    lines.flat_map(|line| line.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

/// Removes what is for one hop alone (RFC 9110, 7.6.1). `te: trailers` stays, which gRPC goes by.
pub fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = options(headers)
            .filter_map(|option| HeaderName::from_bytes(option).ok())
            .filter(|name| !KEPT_IF_NAMED.contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE, HTTP2_SETTINGS] {
        headers.remove(name);
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

/// HTTP/2 may split cookies over lines, HTTP/1 may not (RFC 9113, 8.2.3).
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
pub fn annotate(headers: &mut HeaderMap) {
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
pub fn append_element(headers: &mut HeaderMap, name: &HeaderName, element: &HeaderValue) {
    let before = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let lines: Vec<&[u8]> = before.chain([element.as_bytes()]).collect();
    let joined = if lines.len() == 1 { None } else { HeaderValue::from_bytes(&lines.join(&b","[..])).ok() };
    headers.insert(name, joined.unwrap_or_else(|| element.clone()));
}
