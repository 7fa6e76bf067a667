//! Key sets (RFC 7517) and signatures under their keys (RFC 7518, RFC 8037).
//!
//! Our own, as `jsonwebtoken` 11.1 has no ES512 and finds one key for each `kid`, where Envoy tries each that fits.

use std::fmt;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{
    self, EcdsaVerificationAlgorithm, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;

use super::base64url::decode;
use super::verified_cache::VerifiedCache;

/// The keys of one issuer that can be used for verifying.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySet {
    keys: Vec<Key>,
    pub(super) verified: VerifiedCache,
}

/// The text is not a key set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadKeySet(String);

#[derive(Clone, PartialEq, Eq)]
struct Key {
    id: Option<String>,
    /// The use of the key (`use`), if given.
    algorithm: Option<String>,
    material: Material,
}

#[derive(Clone, PartialEq, Eq)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    Ec { curve: Curve, point: Vec<u8> },
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
    P521,
}

impl KeySet {
    /// Reads a key set's JSON. Keys of kinds that are not known, or not for signatures, are left out, as RFC
    /// 7517 (section 5) wants.
    ///
    /// # Errors
    /// When the text is not JSON with a list of `keys`. The error does not quote it.
    pub fn parse(json: &[u8]) -> Result<Self, BadKeySet> {
        let set: JsonKeySet = serde_json::from_slice(json)
            .map_err(|error| BadKeySet(format!("not a key set (line {}, column {})", error.line(), error.column())))?;
        let keys = set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok());
        Ok(Self { keys: keys.filter_map(Key::read).collect(), verified: VerifiedCache::default() })
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Keys that a token with this header may be signed with. A token that names a key is not for keys of other
    /// names.
    pub(super) fn verify(&self, algorithm: &str, key_id: Option<&str>, message: &[u8], signature: &[u8]) -> Verdict {
        let named = |key: &&Key| key_id.is_none() || key.id.is_none() || key.id.as_deref() == key_id;
        let fits = |key: &&Key| key.algorithm.as_deref().is_none_or(|own| own == algorithm);
        let mut verdict = Verdict::NoKey;
        for key in self.keys.iter().filter(named).filter(fits) {
            match key.material.verify(algorithm, message, signature) {
                Some(true) => return Verdict::Good,
                Some(false) => verdict = Verdict::Bad,
                None => {}
            }
        }
        verdict
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    Bad,
    /// None of the keys can have made such a signature.
    NoKey,
}

#[derive(Deserialize)]
struct JsonKeySet {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct JsonKey {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

impl Key {
    fn read(json: JsonKey) -> Option<Self> {
        let for_signatures = json.usage.as_deref().is_none_or(|usage| usage == "sig");
        let for_verifying = json.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
        if !for_signatures || !for_verifying {
            return None;
        }
        let material = Material::read(&json)?;
        Some(Self { id: json.kid.filter(|id| !id.is_empty()), algorithm: json.alg, material })
    }
}

impl Material {
    fn read(json: &JsonKey) -> Option<Self> {
        let field = |value: &Option<String>| decode(value.as_ref()?.trim_end_matches('='));
        match (json.kty.as_str(), json.crv.as_deref()) {
            ("RSA", _) => Some(Self::Rsa { n: positive(field(&json.n)?)?, e: positive(field(&json.e)?)? }),
            ("EC", Some(name)) => {
                let curve = Curve::named(name)?;
                Some(Self::Ec { curve, point: curve.point(&field(&json.x)?, &field(&json.y)?)? })
            }
            ("OKP", Some("Ed25519")) => field(&json.x).filter(|x| x.len() == 32).map(Self::Ed25519),
            ("oct", _) => field(&json.k).filter(|k| !k.is_empty()).map(Self::Secret),
            _ => None,
        }
    }

    /// The algorithm must be of the key's own kind, so that a public key is never taken for an HMAC secret;
    /// `None` where it is not.
    fn verify(&self, algorithm: &str, message: &[u8], signature: &[u8]) -> Option<bool> {
        match self {
            Self::Rsa { n, e } => {
                let key = RsaPublicKeyComponents { n, e };
                rsa(algorithm).map(|parameters| key.verify(parameters, message, signature).is_ok())
            }
            Self::Ec { curve, point } => {
                let algorithm = curve.algorithm(algorithm)?;
                Some(UnparsedPublicKey::new(algorithm, point).verify(message, signature).is_ok())
            }
            Self::Ed25519(point) => {
                let verified = UnparsedPublicKey::new(&signature::ED25519, point).verify(message, signature).is_ok();
                matches!(algorithm, "EdDSA" | "Ed25519").then_some(verified)
            }
            Self::Secret(secret) => {
                let key = hmac::Key::new(hmac_algorithm(algorithm)?, secret);
                Some(hmac::verify(&key, message, signature).is_ok())
            }
        }
    }
}

fn rsa(algorithm: &str) -> Option<&'static RsaParameters> {
    match algorithm {
        "RS256" => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
        "RS384" => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
        "RS512" => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
        "PS256" => Some(&signature::RSA_PSS_2048_8192_SHA256),
        "PS384" => Some(&signature::RSA_PSS_2048_8192_SHA384),
        "PS512" => Some(&signature::RSA_PSS_2048_8192_SHA512),
        _ => None,
    }
}

fn hmac_algorithm(algorithm: &str) -> Option<hmac::Algorithm> {
    match algorithm {
        "HS256" => Some(hmac::HMAC_SHA256),
        "HS384" => Some(hmac::HMAC_SHA384),
        "HS512" => Some(hmac::HMAC_SHA512),
        _ => None,
    }
}

impl Curve {
    fn named(name: &str) -> Option<Self> {
        match name {
            "P-256" => Some(Self::P256),
            "P-384" => Some(Self::P384),
            "P-521" => Some(Self::P521),
            _ => None,
        }
    }

    fn algorithm(self, name: &str) -> Option<&'static EcdsaVerificationAlgorithm> {
        match (self, name) {
            (Self::P256, "ES256") => Some(&signature::ECDSA_P256_SHA256_FIXED),
            (Self::P384, "ES384") => Some(&signature::ECDSA_P384_SHA384_FIXED),
            (Self::P521, "ES512") => Some(&signature::ECDSA_P521_SHA512_FIXED),
            _ => None,
        }
    }

    /// The uncompressed form of SEC 1, section 2.3.3.
    fn point(self, x: &[u8], y: &[u8]) -> Option<Vec<u8>> {
        let length = match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        };
        (x.len() == length && y.len() == length).then(|| [&[4], x, y].concat())
    }
}

/// Without leading zeros, which some issuers write.
fn positive(bytes: Vec<u8>) -> Option<Vec<u8>> {
    let start = bytes.iter().position(|byte| *byte != 0)?;
    Some(bytes[start..].to_vec())
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySet({} keys)", self.keys.len())
    }
}
