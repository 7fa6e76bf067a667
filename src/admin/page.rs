//! The dashboard: one page that needs nothing from elsewhere.

use std::sync::OnceLock;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_FRAME_OPTIONS};

use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;

const PAGE: &str = include_str!("page/dashboard.html");
const STYLE: &str = include_str!("page/dashboard.css");
const SCRIPT: &str = include_str!("page/dashboard.js");

/// The page, and the policy under which a browser runs nothing but what is in it.
pub(super) fn dashboard(_: &State, _: &Query) -> Reply {
    static MADE: OnceLock<(String, HeaderValue)> = OnceLock::new();
    let (page, policy) =
        MADE.get_or_init(|| (PAGE.replace("{{style}}", STYLE).replace("{{script}}", SCRIPT), policy()));
    let mut reply = reply::of("text/html; charset=utf-8", page.as_str());
    let headers = reply.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy.clone());
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    reply
}

fn policy() -> HeaderValue {
    let hash = |text: &str| STANDARD.encode(digest::digest(&digest::SHA256, text.as_bytes()));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    // Base64 and the words above are ASCII.
    HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
}
