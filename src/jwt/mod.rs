//! JSON Web Tokens of requests: found, verified and passed on as `jwt-provider` config entries say.
//!
//! RFC 7515 (signatures), 7517 (keys), 7518 and 8037 (algorithms), 7519 (claims). Pure: the time is passed
//! in, and key sets are given. Neither keys nor tokens nor claims are ever printed.

mod base64url;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod keys;
mod token;
mod verified_cache;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use http::header::{AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::sync::Notify;

use base64url::decode;
pub use keys::{BadKeySet, KeySet};
use token::Checks;
pub use token::{Claims, Refusal};

/// Consul's default for `ClockSkewSeconds`.
pub const DEFAULT_CLOCK_SKEW: Duration = Duration::from_secs(30);

/// Tokens of one provider in one request: each costs a check of its signature.
const MAX_TOKENS: usize = 8;

/// A `jwt-provider` config entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// The required claim `iss`; any, if empty.
    pub issuer: String,
    /// One of which the claim `aud` must name; any, if empty.
    pub audiences: Vec<String>,
    /// `None` while a remote set was not fetched yet: no token is valid.
    pub keys: Option<Arc<KeySet>>,
    /// Told of tokens with a key that is not known, where newer keys can be fetched.
    pub refetch: Option<Refetch>,
    /// Where to look, in order. Empty: [`Location::defaults`].
    pub locations: Vec<Location>,
    pub forwarding: Option<Forwarding>,
    pub clock_skew: Duration,
}

/// Asks the fetcher of a key set for a newer one. Clones ask the same fetcher; only clones are equal.
#[derive(Debug, Clone, Default)]
pub struct Refetch(Arc<Notify>);

impl Refetch {
    /// Does not wait. Requests that were not handled yet count as one.
    pub fn request(&self) {
        self.0.notify_one();
    }

    /// Ends when a newer key set was requested since the last time.
    pub async fn requested(&self) {
        self.0.notified().await;
    }
}

impl PartialEq for Refetch {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Refetch {}

/// A place of a token in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    Header {
        name: HeaderName,
        /// Before the token, such as `Bearer `; of any case.
        prefix: String,
        /// Whether the app gets to see the header.
        forward: bool,
    },
    QueryParameter(String),
    Cookie(String),
}

/// The header that passes the claims of a verified token to the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarding {
    pub header: HeaderName,
    /// Whether the payload's base64url has its `=`.
    pub padded: bool,
}

/// The providers that a listener knows, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Providers(pub BTreeMap<String, Provider>);

/// The result of verifying a request's tokens.
#[derive(Default)]
pub struct Verified {
    tokens: Vec<Token>,
    refusals: Vec<(String, Refusal)>,
}

struct Token {
    provider: String,
    claims: Claims,
    /// Unpadded base64url.
    payload: String,
}

impl Location {
    /// `Authorization: Bearer …`, then `access_token` in the query (RFC 6750), as in Envoy.
    #[must_use]
    pub fn defaults() -> [Self; 2] {
        let header = Self::Header { name: AUTHORIZATION, prefix: "Bearer ".to_owned(), forward: false };
        [header, Self::QueryParameter("access_token".to_owned())]
    }

    /// All tokens there are; an undecodable header is one that is not valid.
    fn tokens<'a>(&'a self, headers: &'a HeaderMap, query: Option<&'a str>) -> Vec<Cow<'a, str>> {
        match self {
            Self::Header { name, prefix, .. } => {
                let values = headers.get_all(name).iter().filter_map(|value| after_prefix(value, prefix));
                values.map(String::from_utf8_lossy).collect()
            }
            Self::QueryParameter(name) => {
                let pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
                pairs.filter(|(key, _)| key == name).map(|(_, token)| token.into()).collect()
            }
            Self::Cookie(name) => {
                let lines = headers.get_all(COOKIE).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
                lines.flat_map(|line| cookies(&line, name)).map(Cow::Owned).collect()
            }
        }
    }
}

impl Provider {
    /// Every token found must be valid, as in Envoy 1.40: it is not known which of them the app reads. The first
    /// one's claims count.
    fn verify(&self, headers: &HeaderMap, query: Option<&str>, now: SystemTime) -> Result<Token, Refusal> {
        let keys = self.keys.as_ref().ok_or(Refusal::NoKeys)?;
        let checks = Checks {
            keys,
            issuer: &self.issuer,
            audiences: &self.audiences,
            clock_skew: self.clock_skew,
            now: now.duration_since(UNIX_EPOCH).unwrap_or_default(),
        };
        let locations = self.locations();
        let tokens: Vec<_> = locations.iter().flat_map(|place| place.tokens(headers, query)).collect();
        if tokens.len() > MAX_TOKENS {
            return Err(Refusal::TooMany);
        }
        let claims = tokens.iter().map(|token| checks.verify(token)).collect::<Result<Vec<_>, _>>();
        if let (Err(Refusal::UnknownKey), Some(refetch)) = (&claims, &self.refetch) {
            refetch.request();
        }
        let mut claims = claims?;
        let first = tokens.first().ok_or(Refusal::Missing)?;
        let payload = first.split('.').nth(1).unwrap_or_default().to_owned();
        Ok(Token { provider: String::new(), claims: claims.swap_remove(0), payload })
    }

    fn locations(&self) -> Cow<'_, [Location]> {
        if self.locations.is_empty() { Location::defaults().to_vec().into() } else { (&self.locations).into() }
    }

    fn pass_on(&self, token: &Token, headers: &mut HeaderMap) {
        for location in &*self.locations() {
            if let Location::Header { name, prefix, forward: false } = location {
                remove_tokens(headers, name, prefix);
            }
        }
        if let Some(forwarding) = &self.forwarding {
            let payload = forwarding.encode(&token.payload);
            if let Ok(value) = HeaderValue::try_from(payload) {
                headers.insert(&forwarding.header, value);
            }
        }
    }

    /// Whether a parameter of the query may hold tokens that the app is not to see. Consul knows forwarding for
    /// headers alone, and its Envoy then also leaves the query as it is.
    fn hides_parameter(&self, parameter: &str) -> bool {
        let locations = self.locations();
        let forwards = locations.iter().any(|location| matches!(location, Location::Header { forward: true, .. }));
        let named = |location: &Location| matches!(location, Location::QueryParameter(name) if name == parameter);
        !forwards && locations.iter().any(named)
    }
}

impl Forwarding {
    fn encode(&self, payload: &str) -> String {
        match decode(payload) {
            Some(bytes) if self.padded => URL_SAFE.encode(bytes),
            _ => payload.to_owned(),
        }
    }
}

impl Providers {
    /// Looks for a token of each provider named and verifies it.
    #[must_use]
    pub fn verify<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
        headers: &HeaderMap,
        query: Option<&str>,
        now: SystemTime,
    ) -> Verified {
        let mut verified = Verified::default();
        for name in names {
            if verified.knows(name) {
                continue;
            }
            let provider = self.0.get(name).ok_or(Refusal::UnknownProvider);
            match provider.and_then(|provider| provider.verify(headers, query, now)) {
                Ok(token) => verified.tokens.push(Token { provider: name.to_owned(), ..token }),
                Err(refusal) => verified.refusals.push((name.to_owned(), refusal)),
            }
        }
        verified
    }

    /// Names of parameters and cookies that hold tokens.
    pub fn parameters_and_cookies(&self) -> impl Iterator<Item = &str> {
        self.0.values().flat_map(|provider| &provider.locations).filter_map(|location| match location {
            Location::QueryParameter(name) | Location::Cookie(name) => Some(name.as_str()),
            Location::Header { .. } => None,
        })
    }

    /// Whether tokens are looked for in a header of that name.
    #[must_use]
    pub fn look_in_header(&self, header: &HeaderName) -> bool {
        let is_there = |location: &Location| matches!(location, Location::Header { name, .. } if name == header);
        self.0.values().any(|provider| provider.locations().iter().any(is_there))
    }

    /// The query that the app gets: without the verified tokens, as with headers.
    #[must_use]
    pub fn query_for_app<'a>(&self, verified: &Verified, query: &'a str) -> Cow<'a, str> {
        let providers = || verified.tokens.iter().filter_map(|token| self.0.get(&token.provider));
        let hidden = |pair: &str| {
            let parameter = pair.split_once('=').map_or(pair, |(name, _)| name);
            providers().any(|provider| provider.hides_parameter(parameter))
        };
        if !query.split('&').any(hidden) {
            return Cow::Borrowed(query);
        }
        Cow::Owned(query.split('&').filter(|pair| !hidden(pair)).collect::<Vec<_>>().join("&"))
    }

    /// Edits the headers that the app gets: verified tokens are removed unless they are to be forwarded, and
    /// their payloads are added where a provider says so. What the peer itself sent as such a payload is removed
    /// whether or not there was a token, so that the app can trust it.
    pub fn pass_on(&self, verified: &Verified, headers: &mut HeaderMap) {
        for forwarding in self.0.values().filter_map(|provider| provider.forwarding.as_ref()) {
            headers.remove(&forwarding.header);
        }
        for token in &verified.tokens {
            if let Some(provider) = self.0.get(&token.provider) {
                provider.pass_on(token, headers);
            }
        }
    }
}

impl Verified {
    /// The claims of the provider's token, if there is a valid one.
    #[must_use]
    pub fn claims(&self, provider: &str) -> Option<&Claims> {
        self.tokens.iter().find(|token| token.provider == provider).map(|token| &token.claims)
    }

    /// Why tokens are not valid, by provider: for the log.
    pub fn refusals(&self) -> impl Iterator<Item = (&str, Refusal)> {
        self.refusals.iter().map(|(provider, refusal)| (provider.as_str(), *refusal))
    }

    /// Whether a provider was asked for that is not known yet: neither is which headers only its tokens may bring.
    pub fn lacks_provider(&self) -> bool {
        self.refusals.iter().any(|(_, refusal)| *refusal == Refusal::UnknownProvider)
    }

    fn knows(&self, provider: &str) -> bool {
        self.claims(provider).is_some() || self.refusals.iter().any(|(name, _)| name == provider)
    }

    #[cfg(test)]
    pub(crate) fn of(tokens: &[(&str, serde_json::Value)]) -> Self {
        let token = |(provider, claims): &(&str, serde_json::Value)| Token {
            provider: (*provider).to_owned(),
            claims: Claims::from_json(claims.clone()),
            payload: String::new(),
        };
        Self { tokens: tokens.iter().map(token).collect(), refusals: Vec::new() }
    }
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let providers: Vec<_> = self.tokens.iter().map(|token| &token.provider).collect();
        f.debug_struct("Verified").field("providers", &providers).field("refusals", &self.refusals).finish()
    }
}

/// The part of a header's value after the prefix; `None` if that is not there.
fn after_prefix<'a>(value: &'a HeaderValue, prefix: &str) -> Option<&'a [u8]> {
    let (prefix, value) = (prefix.trim_end().as_bytes(), value.as_bytes());
    let head = value.get(..prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then(|| value[prefix.len()..].trim_ascii())
}

fn cookies(line: &str, name: &str) -> Vec<String> {
    let pairs = line.split(';').filter_map(|pair| pair.trim().split_once('='));
    let value = |text: &str| text.trim_matches('"').to_owned();
    pairs.filter(|(key, _)| *key == name).map(|(_, text)| value(text)).collect()
}

/// Removes the lines that hold tokens and leaves others, such as `Authorization: Basic …`.
fn remove_tokens(headers: &mut HeaderMap, name: &HeaderName, prefix: &str) {
    let others = headers.get_all(name).iter().filter(|value| after_prefix(value, prefix).is_none());
    let others: Vec<HeaderValue> = others.cloned().collect();
    headers.remove(name);
    for value in others {
        headers.append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;
    use aws_lc_rs::hmac;
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa;
    use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
    use serde_json::{Value, json};
    use x509_parser::prelude::FromDer;
    use x509_parser::public_key::PublicKey;
    use x509_parser::x509::SubjectPublicKeyInfo;

    const NOW: u64 = 1_300_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn base64(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn sign(header: &Value, claims: &Value, signature: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
        let signed = format!("{}.{}", base64(header.to_string()), base64(claims.to_string()));
        let signature = base64(signature(signed.as_bytes()));
        format!("{signed}.{signature}")
    }

    fn hs256(claims: &Value) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"a secret");
        sign(&json!({"alg": "HS256"}), claims, |message| hmac::sign(&key, message).as_ref().to_vec())
    }

    fn secret() -> Value {
        json!({"kty": "oct", "k": base64("a secret")})
    }

    fn keys(keys: &[Value]) -> KeySet {
        KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
    }

    fn provider(list: &[Value]) -> Provider {
        Provider {
            issuer: String::new(),
            audiences: Vec::new(),
            keys: Some(Arc::new(keys(list))),
            refetch: None,
            locations: Vec::new(),
            forwarding: None,
            clock_skew: DEFAULT_CLOCK_SKEW,
        }
    }

    fn providers(provider: Provider) -> Providers {
        Providers([("p".to_owned(), provider)].into())
    }

    fn verify_at(provider: &Provider, headers: &HeaderMap, query: Option<&str>, now: u64) -> Verified {
        providers(provider.clone()).verify(["p", "p"].into_iter(), headers, query, at(now))
    }

    fn bearer(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::try_from(format!("Bearer {token}")).unwrap());
        headers
    }

    /// `Ok`, or why not.
    fn outcome(provider: &Provider, token: &str) -> Result<(), Refusal> {
        let verified = verify_at(provider, &bearer(token), None, NOW);
        let refusal = verified.refusals().next().map(|(_, refusal)| refusal);
        assert_eq!(verified.claims("p").is_some(), refusal.is_none());
        refusal.map_or(Ok(()), Err)
    }

    const RFC7515_A1: &str = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    const RFC7515_A3: &str = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";

    #[test]
    fn the_examples_of_rfc_7515_are_verified() {
        let secret = json!({"kty": "oct", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"});
        let curve = json!({"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
        for (key, token) in [(secret, RFC7515_A1), (curve, RFC7515_A3)] {
            let provider = Provider { issuer: "joe".to_owned(), ..provider(&[key]) };
            let verify = |now| verify_at(&provider, &bearer(token), None, now);
            let root = ["http://example.com/is_root".to_owned()];
            assert_eq!(verify(NOW).claims("p").and_then(|claims| claims.at(&root)), Some(&Value::Bool(true)));
            assert!(verify(1_300_819_380 + 29).claims("p").is_some());
            let late = verify(1_300_819_380 + 30);
            assert_eq!(late.refusals().collect::<Vec<_>>(), [("p", Refusal::Expired)]);
        }
    }

    #[test]
    fn a_good_signature_is_remembered_and_nothing_else() {
        let provider = Provider { audiences: vec!["us".to_owned()], ..provider(&[secret()]) };
        let remembered = |token: &str| provider.keys.as_ref().unwrap().verified.has(&verified_cache::digest_of(token));
        let good = hs256(&json!({"aud": "us", "exp": NOW + 100}));
        for _ in 0..2 {
            assert_eq!(outcome(&provider, &good), Ok(()));
            assert!(remembered(&good));
        }
        // What else it says is looked at each time.
        let later = |seconds| verify_at(&provider, &bearer(&good), None, NOW + seconds);
        assert!(later(129).claims("p").is_some() && later(130).claims("p").is_none());
        let elsewhere = Provider { audiences: vec!["them".to_owned()], ..provider.clone() };
        assert_eq!(outcome(&elsewhere, &good), Err(Refusal::Audience));
        // So is what differs in a byte, and the same under other keys.
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let first = if signature.starts_with('A') { "B" } else { "A" };
        let forged = format!("{signed}.{first}{}", &signature[1..]);
        assert_eq!(outcome(&provider, &forged), Err(Refusal::Signature));
        assert!(!remembered(&forged));
        let other = json!({"kty": "oct", "k": base64("another secret")});
        assert_eq!(
            outcome(&Provider { keys: Some(Arc::new(keys(&[other]))), ..provider.clone() }, &good),
            Err(Refusal::Signature)
        );
    }

    #[test]
    fn ecdsa_of_each_curve_is_verified() {
        for (algorithm, name, crv) in [
            (&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "ES256", "P-256"),
            (&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "ES384", "P-384"),
            (&signature::ECDSA_P521_SHA512_FIXED_SIGNING, "ES512", "P-521"),
        ] {
            let pair = EcdsaKeyPair::generate(algorithm).unwrap();
            let point = &pair.public_key().as_ref()[1..];
            let (x, y) = point.split_at(point.len() / 2);
            let key = json!({"kty": "EC", "crv": crv, "x": base64(x), "y": base64(y)});
            let token = |alg: &str| {
                sign(&json!({"alg": alg}), &json!({}), |message| {
                    pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
                })
            };
            assert_eq!(outcome(&provider(std::slice::from_ref(&key)), &token(name)), Ok(()), "{name}");
            for other in ["HS256", "RS256", "none", "", if name == "ES256" { "ES384" } else { "ES256" }] {
                assert_eq!(outcome(&provider(std::slice::from_ref(&key)), &token(other)), Err(Refusal::UnknownKey));
            }
        }
    }

    #[test]
    fn ed25519_is_verified() {
        let pair = Ed25519KeyPair::generate().unwrap();
        let key = json!({"kty": "OKP", "crv": "Ed25519", "x": base64(pair.public_key())});
        let token = sign(&json!({"alg": "EdDSA"}), &json!({}), |message| pair.sign(message).as_ref().to_vec());
        assert_eq!(outcome(&provider(&[key]), &token), Ok(()));
    }

    #[test]
    fn rsa_is_verified_and_its_public_key_is_no_secret() {
        let pair = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
        let (n, e) = rsa_numbers(&pair);
        let key = json!({"kty": "RSA", "kid": "1", "use": "sig", "n": base64([&[0], &*n].concat()), "e": base64(e)});
        let schemes: [(&str, &'static dyn signature::RsaEncoding); 6] = [
            ("RS256", &signature::RSA_PKCS1_SHA256),
            ("RS384", &signature::RSA_PKCS1_SHA384),
            ("RS512", &signature::RSA_PKCS1_SHA512),
            ("PS256", &signature::RSA_PSS_SHA256),
            ("PS384", &signature::RSA_PSS_SHA384),
            ("PS512", &signature::RSA_PSS_SHA512),
        ];
        for (name, encoding) in schemes {
            let token = |header: Value| {
                sign(&header, &json!({}), |message| {
                    let mut signature = vec![0; pair.public_modulus_len()];
                    pair.sign(encoding, &SystemRandom::new(), message, &mut signature).unwrap();
                    signature
                })
            };
            let provider = provider(std::slice::from_ref(&key));
            assert_eq!(outcome(&provider, &token(json!({"alg": name}))), Ok(()), "{name}");
            assert_eq!(outcome(&provider, &token(json!({"alg": name, "kid": "1"}))), Ok(()), "{name}");
            assert_eq!(outcome(&provider, &token(json!({"alg": name, "kid": "2"}))), Err(Refusal::UnknownKey));
            let other = if name == "RS256" { "PS256" } else { "RS256" };
            assert_eq!(outcome(&provider, &token(json!({"alg": other}))), Err(Refusal::Signature));
        }
        let confused = hmac::Key::new(hmac::HMAC_SHA256, &n);
        let token =
            sign(&json!({"alg": "HS256"}), &json!({}), |message| hmac::sign(&confused, message).as_ref().to_vec());
        assert_eq!(outcome(&provider(&[key]), &token), Err(Refusal::UnknownKey));
    }

    fn rsa_numbers(pair: &rsa::KeyPair) -> (Vec<u8>, Vec<u8>) {
        let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(pair.public_key());
        let der = der.unwrap();
        let (_, info) = SubjectPublicKeyInfo::from_der(der.as_ref()).unwrap();
        match info.parsed().unwrap() {
            PublicKey::RSA(key) => (positive(key.modulus), key.exponent.to_vec()),
            _ => panic!("not an RSA key"),
        }
    }

    fn positive(number: &[u8]) -> Vec<u8> {
        number.iter().copied().skip_while(|byte| *byte == 0).collect()
    }

    #[test]
    fn keys_are_used_for_what_they_are_for() {
        let token = hs256(&json!({}));
        let with = |field: &str, value: Value| {
            let mut key = secret();
            key[field] = value;
            outcome(&provider(&[json!({"kty": "new"}), key]), &token)
        };
        assert_eq!(with("use", json!("sig")), Ok(()));
        assert_eq!(with("key_ops", json!(["verify"])), Ok(()));
        assert_eq!(with("alg", json!("HS256")), Ok(()));
        for (field, value) in
            [("use", json!("enc")), ("key_ops", json!(["sign"])), ("alg", json!("HS512")), ("k", json!(""))]
        {
            assert_eq!(with(field, value), Err(Refusal::UnknownKey), "{field}");
        }
    }

    #[test]
    fn a_token_that_is_not_right_is_refused() {
        let check =
            |token: &str, expected| assert_eq!(outcome(&provider(&[secret()]), token), Err(expected), "{token}");
        let good = hs256(&json!({}));
        let (signed, signature) = good.rsplit_once('.').unwrap();
        check(&format!("{signed}."), Refusal::Signature);
        check(&format!("{signed}.{}", base64("x")), Refusal::Signature);
        check(&format!("{signed}.{signature}="), Refusal::Malformed);
        check(&format!("{signed}x.{signature}"), Refusal::Signature);
        check(&format!("{good}.e30"), Refusal::Signature);
        for token in ["", "a", "a.b", "..", "a.b.c", "e30.e30.", "bnVsbA.e30.e30"] {
            check(token, Refusal::Malformed);
        }
        let none = format!("{}.{}.", base64(r#"{"alg":"none"}"#), base64("{}"));
        check(&none, Refusal::UnknownKey);
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"a secret");
        let critical = sign(&json!({"alg": "HS256", "crit": ["b64"], "b64": false}), &json!({}), |message| {
            hmac::sign(&key, message).as_ref().to_vec()
        });
        check(&critical, Refusal::Critical);
        assert_eq!(outcome(&Provider { keys: None, ..provider(&[]) }, &good), Err(Refusal::NoKeys));
    }

    #[test]
    fn claims_are_checked() {
        let strict =
            Provider { issuer: "us".to_owned(), audiences: vec!["a".into(), "b".into()], ..provider(&[secret()]) };
        let check = |claims: Value, expected| assert_eq!(outcome(&strict, &hs256(&claims)), expected, "{claims}");
        for audience in
            [json!("a"), json!("b"), json!(["x", "b"]), json!("a/"), json!(["https://a"]), json!("http://b/")]
        {
            check(json!({"iss": "us", "aud": audience}), Ok(()));
        }
        for audience in [json!("x"), json!([]), json!(["x"]), json!(null), json!("a/b"), json!({"a": 1})] {
            check(json!({"iss": "us", "aud": audience}), Err(Refusal::Audience));
        }
        check(json!({"iss": "us"}), Err(Refusal::Audience));
        check(json!({"iss": "them", "aud": "a"}), Err(Refusal::Issuer));
        check(json!({"aud": "a"}), Err(Refusal::Issuer));
        let timed = |name: &str, time: Value| json!({"iss": "us", "aud": "a", name: time});
        check(timed("exp", json!(NOW - 29)), Ok(()));
        check(timed("exp", json!(NOW - 30)), Err(Refusal::Expired));
        check(timed("nbf", json!(NOW + 30)), Ok(()));
        check(timed("nbf", json!(NOW + 31)), Err(Refusal::NotYetValid));
        check(timed("exp", json!("soon")), Err(Refusal::Malformed));
        check(timed("exp", json!(null)), Err(Refusal::Malformed));
        check(timed("exp", json!(1e300)), Ok(()));
    }

    #[test]
    fn tokens_are_found_where_the_entry_says() {
        let header = |name: &'static str, prefix: &str| Location::Header {
            name: HeaderName::from_static(name),
            prefix: prefix.to_owned(),
            forward: false,
        };
        let places =
            [header("x-token", "Token "), Location::QueryParameter("jwt".into()), Location::Cookie("sid".into())];
        let provider = Provider { locations: places.to_vec(), ..provider(&[secret()]) };
        let token = hs256(&json!({}));
        let found = |header: Option<(&'static str, String)>, query: Option<String>| {
            let mut headers = HeaderMap::new();
            if let Some((name, value)) = header {
                headers.insert(name, HeaderValue::try_from(value).unwrap());
            }
            verify_at(&provider, &headers, query.as_deref(), NOW).claims("p").is_some()
        };
        assert!(found(Some(("x-token", format!("token {token}"))), None));
        assert!(found(None, Some(format!("a=b&jwt={token}"))));
        assert!(found(Some(("cookie", format!("a=b; sid={token}; c=d"))), None));
        assert!(!found(Some(("x-token", "Token stale".into())), Some(format!("jwt={token}"))));
        assert!(!found(Some(("authorization", format!("Bearer {token}"))), Some(format!("access_token={token}"))));
        assert!(!found(Some(("cookie", format!("xsid={token}"))), None));
        let defaults = Provider { locations: Vec::new(), ..provider.clone() };
        let query = format!("access_token={token}");
        assert!(verify_at(&defaults, &HeaderMap::new(), Some(&query), NOW).claims("p").is_some());
    }

    #[test]
    fn of_several_tokens_all_must_be_valid() {
        let token = hs256(&json!({"a": 1}));
        let mut headers = bearer(&token);
        headers.append(AUTHORIZATION, HeaderValue::try_from(format!("Bearer {token}")).unwrap());
        assert!(verify_at(&provider(&[secret()]), &headers, None, NOW).claims("p").is_some());
        let refusal =
            |headers: &HeaderMap| verify_at(&provider(&[secret()]), headers, None, NOW).refusals().next().unwrap().1;
        let mut many = headers.clone();
        for _ in 0..8 {
            many.append(AUTHORIZATION, many[AUTHORIZATION].clone());
        }
        assert_eq!(refusal(&many), Refusal::TooMany);
        headers.append(AUTHORIZATION, HeaderValue::from_static("Bearer e30.e30.e30"));
        assert_eq!(refusal(&headers), Refusal::Malformed);
    }

    #[test]
    fn the_app_gets_the_payload_and_not_the_token() {
        let claims = json!({"a": "b"});
        let token = hs256(&claims);
        let forwarding = |padded| Some(Forwarding { header: HeaderName::from_static("x-payload"), padded });
        let pass_on = |provider: Provider, mut headers: HeaderMap| {
            headers.insert("x-payload", HeaderValue::from_static("forged"));
            headers.append(AUTHORIZATION, HeaderValue::from_static("Basic dTpw"));
            let verified = verify_at(&provider, &headers, None, NOW);
            providers(provider).pass_on(&verified, &mut headers);
            headers
        };
        let headers = pass_on(Provider { forwarding: forwarding(false), ..provider(&[secret()]) }, bearer(&token));
        assert_eq!(headers["x-payload"], base64(claims.to_string()));
        assert_eq!(headers.get_all(AUTHORIZATION).iter().collect::<Vec<_>>(), ["Basic dTpw"]);
        let headers = pass_on(Provider { forwarding: forwarding(true), ..provider(&[secret()]) }, bearer(&token));
        assert_eq!(headers["x-payload"], URL_SAFE.encode(claims.to_string()));
        let headers = pass_on(Provider { forwarding: forwarding(true), ..provider(&[]) }, bearer(&token));
        assert_eq!(headers.get("x-payload"), None);
        assert_eq!(headers.get_all(AUTHORIZATION).iter().count(), 2);
        let name = AUTHORIZATION;
        let keep = Location::Header { name, prefix: "Bearer ".to_owned(), forward: true };
        let headers = pass_on(Provider { locations: vec![keep], ..provider(&[secret()]) }, bearer(&token));
        assert_eq!(headers.get_all(AUTHORIZATION).iter().count(), 2);
    }

    #[test]
    fn the_app_gets_the_query_without_verified_tokens() {
        let token = hs256(&json!({}));
        let query = format!("a=b&access_token={token}&c");
        let passed = |provider: Provider| {
            let verified = verify_at(&provider, &HeaderMap::new(), Some(&query), NOW);
            providers(provider).query_for_app(&verified, &query).into_owned()
        };
        assert_eq!(passed(provider(&[secret()])), "a=b&c");
        assert_eq!(passed(provider(&[])), query);
        let [header, parameter] = Location::defaults();
        let Location::Header { name, prefix, .. } = header else { panic!("no header") };
        let forwarding = vec![Location::Header { name, prefix, forward: true }, parameter];
        assert_eq!(passed(Provider { locations: forwarding, ..provider(&[secret()]) }), query);
        let only = Provider { locations: vec![Location::QueryParameter("jwt".into())], ..provider(&[secret()]) };
        let verified = verify_at(&only, &HeaderMap::new(), Some(&format!("jwt={token}")), NOW);
        assert_eq!(providers(only).query_for_app(&verified, &format!("jwt={token}")), "");
    }

    #[test]
    fn nothing_of_a_key_or_token_is_printed() {
        let provider = provider(&[secret()]);
        let token = hs256(&json!({"private": "claim"}));
        let verified = verify_at(&provider, &bearer(&token), None, NOW);
        let printed = format!("{provider:?} {verified:?} {:?}", verified.claims("p"));
        for hidden in ["a secret", &base64("a secret"), "claim", &token[..20]] {
            assert!(!printed.contains(hidden), "{hidden} in {printed}");
        }
    }

    #[test]
    fn what_is_no_key_set_is_refused() {
        for text in ["", "[]", "{}", r#"{"keys": 1}"#] {
            assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(keys(&[]).is_empty());
        assert!(
            keys(&[json!(1), json!({"kty": "RSA"}), json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"})])
                .is_empty()
        );
    }
}
