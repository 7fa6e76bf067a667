//! Checks of key sets and tokens.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use serde_json::{Map, Value, json};

use super::{KeySet, Location, Provider, Providers};

const NOW: Duration = Duration::from_secs(1_300_000_000);
const SKEW: Duration = Duration::from_secs(30);
const SECRET: &[u8] = b"of the issuer, and of nobody else";

/// The first byte says what the others are: a key set, a token, a token's claims, or its header.
pub fn jwt(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    match first % 4 {
        0 => key_set(rest),
        1 => forged(rest),
        2 => {
            let (accepted, expected) = signed(br#"{"alg":"HS256","kid":"ours"}"#, rest);
            assert_eq!(accepted, expected, "{}", String::from_utf8_lossy(rest));
        }
        _ => {
            let (accepted, expected) = signed(rest, br#"{"iss":"me","aud":"us"}"#);
            // One that says something twice may be refused.
            assert!(expected || !accepted, "{}", String::from_utf8_lossy(rest));
        }
    }
}

/// No key set vouches for a token that was signed by somebody else.
fn key_set(json: &[u8]) {
    let Ok(keys) = KeySet::parse(json) else { return };
    let token = sign(br#"{"alg":"HS256"}"#, b"{}");
    let secret = URL_SAFE_NO_PAD.encode(SECRET);
    let knows_secret = String::from_utf8_lossy(json).contains(&secret);
    assert!(knows_secret || accepted(Arc::new(keys), &token).is_none());
}

/// Nobody makes a token without a key.
fn forged(token: &[u8]) {
    static KEYS: LazyLock<Arc<KeySet>> = LazyLock::new(|| {
        // Points and numbers whose private halves nobody knows, and a secret.
        let [p256, p384, p521] = [32, 48, 66].map(|length| URL_SAFE_NO_PAD.encode(vec![7; length]));
        let modulus = URL_SAFE_NO_PAD.encode([0xc5; 256]);
        let set = json!({"keys": [
            {"kty": "RSA", "n": modulus, "e": "AQAB"},
            {"kty": "EC", "crv": "P-256", "x": p256, "y": p256},
            {"kty": "EC", "crv": "P-384", "x": p384, "y": p384},
            {"kty": "EC", "crv": "P-521", "x": p521, "y": p521},
            {"kty": "OKP", "crv": "Ed25519", "x": p256},
            {"kty": "oct", "k": URL_SAFE_NO_PAD.encode(SECRET), "kid": "secret"},
        ]});
        Arc::new(KeySet::parse(set.to_string().as_bytes()).unwrap())
    });
    let Ok(token) = std::str::from_utf8(token) else { return };
    assert!(accepted(Arc::clone(&KEYS), token).is_none(), "{token:?} is accepted");
}

/// Whether a token of the issuer is accepted, and whether its header and its claims say that it may be.
fn signed(header: &[u8], claims: &[u8]) -> (bool, bool) {
    let set = json!({"keys": [{"kty": "oct", "k": URL_SAFE_NO_PAD.encode(SECRET), "kid": "ours"}]});
    let keys = Arc::new(KeySet::parse(set.to_string().as_bytes()).unwrap());
    (accepted(keys, &sign(header, claims)).is_some(), holds(header, claims).unwrap_or(false))
}

/// The same, read by way of a tree of values. `None` where it can't be read.
fn holds(header: &[u8], claims: &[u8]) -> Option<bool> {
    let read = |bytes: &[u8]| serde_json::from_slice::<Map<String, Value>>(bytes).ok();
    let (header, claims) = (read(header)?, read(claims)?);
    let named = match header.get("kid") {
        None | Some(Value::Null) => true,
        Some(id) => id.as_str()? == "ours",
    };
    let critical = !matches!(header.get("crit"), None | Some(Value::Null));
    let time = |name: &str| claims.get(name).map_or(Some(None), |value| value.as_f64().map(Some));
    let (now, skew) = (NOW.as_secs_f64(), SKEW.as_secs_f64());
    let fresh = time("exp")?.is_none_or(|expiry| now < expiry + skew);
    let begun = time("nbf")?.is_none_or(|start| start - skew <= now);
    let ours = |value: &Value| {
        let text = value.as_str().unwrap_or_default();
        let text = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme)).unwrap_or(text);
        matches!(text, "us" | "us/")
    };
    let audience = claims.get("aud");
    let for_us =
        audience.is_some_and(|value| value.as_array().map_or_else(|| ours(value), |list| list.iter().any(ours)));
    let from_issuer = claims.get("iss").and_then(Value::as_str) == Some("me");
    let by_us = header.get("alg")?.as_str()? == "HS256" && named && !critical;
    Some(by_us && fresh && begun && for_us && from_issuer)
}

/// What becomes of a request with the token in its query, if it is accepted.
fn accepted(keys: Arc<KeySet>, token: &str) -> Option<()> {
    let provider = Provider {
        issuer: "me".to_owned(),
        audiences: vec!["us".to_owned()],
        keys: Some(keys),
        refetch: None,
        locations: vec![Location::QueryParameter("access_token".to_owned())],
        forwarding: None,
        clock_skew: SKEW,
    };
    let providers = Providers([("p".to_owned(), provider)].into());
    let query = format!("access_token={token}");
    let verified = providers.verify(["p"].into_iter(), &HeaderMap::new(), Some(&query), UNIX_EPOCH + NOW);
    let shown = format!("{verified:?}");
    // What is shown has no words that long: a token that says the same is none that is shown.
    assert!(token.len() < 32 || token.contains(' ') || !shown.contains(token), "the token is shown");
    verified.claims("p").map(|_| {
        let left = providers.query_for_app(&verified, &query);
        assert!(!left.contains("access_token="), "the app sees a token");
    })
}

fn sign(header: &[u8], claims: &[u8]) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET), signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
}
