//! One token: read, its signature checked, then what it claims.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::base64url::decode;
use super::keys::{KeySet, Verdict};
use super::verified_cache::digest_of;

/// The claims of a verified token.
#[derive(Clone, PartialEq, Eq)]
pub struct Claims(Map<String, Value>);

/// Why a request has no valid token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no token")]
    Missing,
    #[error("there are too many tokens")]
    TooMany,
    #[error("its provider is not known")]
    UnknownProvider,
    #[error("the provider's keys are not known")]
    NoKeys,
    #[error("it is malformed")]
    Malformed,
    /// `crit` names extensions that must be understood, and none is.
    #[error("it has critical extensions")]
    Critical,
    #[error("no key of the provider fits its algorithm and key id")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet")]
    NotYetValid,
    #[error("it is of another issuer")]
    Issuer,
    #[error("it is for another audience")]
    Audience,
}

/// The requirements that a token is verified against.
pub(super) struct Checks<'a> {
    pub(super) keys: &'a KeySet,
    /// Any, if empty.
    pub(super) issuer: &'a str,
    /// Any, if empty.
    pub(super) audiences: &'a [String],
    pub(super) clock_skew: Duration,
    /// Since the epoch.
    pub(super) now: Duration,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl Claims {
    /// The value that a path through nested objects leads to.
    #[must_use]
    pub fn at(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.0.get(first)?, |value, key| value.as_object()?.get(key))
    }

    #[cfg(test)]
    pub(crate) fn from_json(json: Value) -> Self {
        Self(json.as_object().cloned().unwrap_or_default())
    }
}

impl Checks<'_> {
    /// Verifies a token in the compact form. Nothing in it is believed before the signature was checked.
    pub(super) fn verify(&self, token: &str) -> Result<Claims, Refusal> {
        let (signed, signature) = token.rsplit_once('.').ok_or(Refusal::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(Refusal::Malformed)?;
        let header: Header = json(header)?;
        if header.crit.is_some() {
            return Err(Refusal::Critical);
        }
        let digest = digest_of(token);
        if !self.keys.verified.has(&digest) {
            let signature = decode(signature).ok_or(Refusal::Malformed)?;
            match self.keys.verify(&header.alg, header.kid.as_deref(), signed.as_bytes(), &signature) {
                Verdict::Good => self.keys.verified.add(digest),
                Verdict::Bad => return Err(Refusal::Signature),
                Verdict::NoKey => return Err(Refusal::UnknownKey),
            }
        }
        self.accept(json(payload)?)
    }

    fn accept(&self, claims: Map<String, Value>) -> Result<Claims, Refusal> {
        let (now, skew) = (self.now.as_secs_f64(), self.clock_skew.as_secs_f64());
        if time(&claims, "exp")?.is_some_and(|expiry| now >= expiry + skew) {
            return Err(Refusal::Expired);
        }
        if time(&claims, "nbf")?.is_some_and(|start| now < start - skew) {
            return Err(Refusal::NotYetValid);
        }
        if !self.issuer.is_empty() && claims.get("iss").and_then(Value::as_str) != Some(self.issuer) {
            return Err(Refusal::Issuer);
        }
        if !self.audiences.is_empty() && !self.is_for_us(claims.get("aud")) {
            return Err(Refusal::Audience);
        }
        Ok(Claims(claims))
    }

    fn is_for_us(&self, audience: Option<&Value>) -> bool {
        let is_ours = |text: &str| self.audiences.iter().any(|ours| bare(ours) == bare(text));
        let ours = |value: &Value| value.as_str().is_some_and(is_ours);
        match audience {
            Some(Value::Array(list)) => list.iter().any(ours),
            Some(value) => ours(value),
            None => false,
        }
    }
}

/// An audience without scheme and last slash, neither of which counts to Envoy.
fn bare(audience: &str) -> &str {
    let name = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    name.strip_suffix('/').unwrap_or(name)
}

/// A time in seconds since the epoch, with a fraction perhaps. Anything else under that name makes the token useless.
fn time(claims: &Map<String, Value>, name: &str) -> Result<Option<f64>, Refusal> {
    claims.get(name).map(|value| value.as_f64().ok_or(Refusal::Malformed)).transpose()
}

fn json<T: for<'de> Deserialize<'de>>(part: &str) -> Result<T, Refusal> {
    let bytes = decode(part).ok_or(Refusal::Malformed)?;
    // Also what is skipped has to be UTF-8 (RFC 7515, 4).
    let text = std::str::from_utf8(&bytes).map_err(|_| Refusal::Malformed)?;
    serde_json::from_str(text).map_err(|_| Refusal::Malformed)
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claims(redacted)")
    }
}
