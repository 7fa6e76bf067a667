//! Config entries `jwt-provider`. One that cannot be used is refused as a whole, as a part of its conditions
//! would let more tokens in than was meant.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderName;

use super::{Bad, Notes};
use crate::consul::api;
use crate::control::jwks_fetcher::{KeySource, RemoteKeys, Trust};
use crate::jwt::{DEFAULT_CLOCK_SKEW, Forwarding, KeySet, Location, Provider};

/// Consul asks for a time and has no default; this is its documentation's example, rounded.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest timeout of a request for a key set that a jwt-provider may set.
const LONGEST_REQUEST: Duration = Duration::from_secs(60);
/// Envoy's default time between two fetches of a key set.
const CACHE_DURATION: Duration = Duration::from_secs(300);
/// Shortest time between two fetches of a key set that a jwt-provider may set.
const SHORTEST_CACHE: Duration = Duration::from_secs(5);
/// Envoy's default pause before the first retry of a fetch.
const BACK_OFF: Duration = Duration::from_secs(1);
/// Retries of one fetch that a jwt-provider may set at most.
const MOST_RETRIES: u32 = 10;

/// A provider but for keys that are kept elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct ProviderPlan {
    /// Complete if there is no source.
    pub(in crate::control) provider: Provider,
    pub(in crate::control) keys: Option<KeySource>,
}

/// # Errors
/// When it has no usable keys, or says something that cannot be followed.
pub(in crate::control) fn provider(wire: &api::JwtProvider, notes: &mut Notes) -> Result<ProviderPlan, Bad> {
    if let Some(field) = wire.unknown_field() {
        return Err(Bad(format!("its field {field:?} is not known and may say which tokens are good")));
    }
    let set = wire.json_web_key_set.as_ref();
    let (keys, source) = match set.map(|set| (&set.local, &set.remote)) {
        Some((Some(local), _)) => local_keys(local)?,
        Some((None, Some(remote))) => (None, Some(remote_keys(remote, &wire.name, notes)?)),
        _ => return Err(Bad("it has no key set".into())),
    };
    let provider = Provider {
        issuer: wire.issuer.clone(),
        audiences: wire.audiences.clone(),
        keys,
        refetch: None,
        locations: wire.locations.iter().map(location).collect::<Result<_, _>>()?,
        forwarding: wire.forwarding.as_ref().and_then(|wire| forwarding(wire).transpose()).transpose()?,
        clock_skew: match u64::try_from(wire.clock_skew_seconds) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => DEFAULT_CLOCK_SKEW,
        },
    };
    Ok(ProviderPlan { provider, keys: source })
}

type Keys = (Option<Arc<KeySet>>, Option<KeySource>);

fn local_keys(wire: &api::LocalJwks) -> Result<Keys, Bad> {
    if wire.jwks.is_empty() {
        if wire.filename.is_empty() {
            return Err(Bad("its local key set is empty".into()));
        }
        return Ok((None, Some(KeySource::File(PathBuf::from(&wire.filename)))));
    }
    let json = STANDARD.decode(&wire.jwks).map_err(|_| Bad("its local key set is not base64".into()))?;
    let keys = KeySet::parse(&json).map_err(|bad| Bad(format!("its local key set is {bad}")))?;
    Ok((Some(Arc::new(keys)), None))
}

fn remote_keys(wire: &api::RemoteJwks, name: &str, notes: &mut Notes) -> Result<KeySource, Bad> {
    let uri = reqwest::Url::parse(&wire.uri).map_err(|_| Bad("the URI of its key set is none".into()))?;
    match uri.scheme() {
        "https" => {}
        "http" => notes
            .push(format!("jwt-provider {name}: its key set is fetched over plain HTTP and can be changed in transit")),
        _ => return Err(Bad("the URI of its key set is neither https nor http".into())),
    }
    let retry = wire.retry_policy.as_ref();
    let back_off = retry.and_then(|retry| retry.retry_policy_back_off.as_ref());
    let first = back_off.and_then(|back_off| back_off.base_interval.positive()).unwrap_or(BACK_OFF);
    let longest = back_off.and_then(|back_off| back_off.max_interval.positive()).unwrap_or(first * 10);
    let timeout = u64::try_from(wire.request_timeout_ms).ok().filter(|ms| *ms > 0).map(Duration::from_millis);
    Ok(KeySource::Remote(RemoteKeys {
        uri: uri.into(),
        timeout: timeout.unwrap_or(REQUEST_TIMEOUT).min(LONGEST_REQUEST),
        cache: wire.cache_duration.positive().unwrap_or(CACHE_DURATION).max(SHORTEST_CACHE),
        retries: retry.map_or(0, |retry| retry.num_retries).min(MOST_RETRIES),
        back_off: first,
        longest_back_off: longest.max(first),
        trust: trust(wire.jwks_cluster.as_ref(), name, notes)?,
    }))
}

/// Where the entry names no authority, those of the system are trusted. (Envoy then verifies nothing.)
fn trust(wire: Option<&api::JwksCluster>, name: &str, notes: &mut Notes) -> Result<Trust, Bad> {
    let Some(tls) = wire.and_then(|cluster| cluster.tls_certificates.as_ref()) else { return Ok(Trust::System) };
    let Some(ca) = &tls.trusted_ca else {
        if tls.ca_certificate_provider_instance.is_some() {
            notes.push(format!(
                "jwt-provider {name}: a certificate provider instance is for Envoy, so the system's authorities are \
                 trusted"
            ));
        }
        return Ok(Trust::System);
    };
    if !ca.inline_bytes.is_empty() {
        let pem = STANDARD.decode(&ca.inline_bytes).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        return pem.map(Trust::Pem).ok_or_else(|| Bad("its inline CA certificate is not PEM in base64".into()));
    }
    if !ca.inline_string.is_empty() {
        return Ok(Trust::Pem(ca.inline_string.clone()));
    }
    if !ca.environment_variable.is_empty() {
        return Ok(Trust::Environment(ca.environment_variable.clone()));
    }
    if !ca.filename.is_empty() {
        return Ok(Trust::File(PathBuf::from(&ca.filename)));
    }
    Ok(Trust::System)
}

fn location(wire: &api::JwtLocation) -> Result<Location, Bad> {
    match (&wire.header, &wire.query_param, &wire.cookie) {
        (Some(header), None, None) => Ok(Location::Header {
            name: header_name(&header.name)?,
            prefix: header.value_prefix.clone(),
            forward: header.forward,
        }),
        (None, Some(parameter), None) => Ok(Location::QueryParameter(parameter.name.clone())),
        (None, None, Some(cookie)) => Ok(Location::Cookie(cookie.name.clone())),
        _ => Err(Bad("one of its locations is of no kind that is known, or of several".into())),
    }
}

fn forwarding(wire: &api::JwtForwarding) -> Result<Option<Forwarding>, Bad> {
    if wire.header_name.is_empty() {
        return Ok(None);
    }
    Ok(Some(Forwarding { header: header_name(&wire.header_name)?, padded: wire.pad_forward_payload_header }))
}

fn header_name(text: &str) -> Result<HeaderName, Bad> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| Bad(format!("{text:?} is not a header's name")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(wire: Value) -> Result<ProviderPlan, Bad> {
        provider(&serde_json::from_value(wire).unwrap(), &mut Notes::default())
    }

    fn with(field: &str, value: Value) -> Result<ProviderPlan, Bad> {
        let mut wire = json!({"Name": "okta", "JSONWebKeySet": {"Local": {"JWKS": STANDARD.encode(r#"{"keys":[]}"#)}}});
        wire[field] = value;
        read(wire)
    }

    fn remote(wire: Value) -> RemoteKeys {
        let mut remote = json!({"URI": "https://example.com/jwks"});
        remote.as_object_mut().unwrap().extend(wire.as_object().unwrap().clone());
        match with("JSONWebKeySet", json!({ "Remote": remote })).unwrap().keys {
            Some(KeySource::Remote(remote)) => remote,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_answer_of_a_real_agent_is_read() {
        let wire = serde_json::from_str(include_str!("../../consul/testdata/1.19-jwt_provider.json")).unwrap();
        let plan = read(wire).unwrap();
        let Some(KeySource::Remote(keys)) = plan.keys else { panic!("{plan:?}") };
        assert_eq!(keys.uri, "https://example.com/jwks");
        assert_eq!((keys.timeout, keys.cache), (Duration::from_millis(1500), Duration::from_secs(300)));
        let (first, longest) = (Duration::from_secs(1), Duration::from_secs(10));
        assert_eq!((keys.retries, keys.back_off, keys.longest_back_off), (2, first, longest));
        assert_eq!(keys.trust, Trust::System);
        let header = Location::Header { name: "x-jwt".parse().unwrap(), prefix: "T ".into(), forward: false };
        assert_eq!(plan.provider.locations, [header]);
        assert_eq!((plan.provider.issuer.as_str(), plan.provider.audiences), ("me", vec!["a".to_owned()]));
        assert_eq!(plan.provider.forwarding, Some(Forwarding { header: "x-fwd".parse().unwrap(), padded: false }));
        assert_eq!((plan.provider.clock_skew, plan.provider.keys), (Duration::from_secs(30), None));
    }

    #[test]
    fn keys_are_in_the_entry_in_a_file_or_elsewhere() {
        let inline = with("Issuer", "me".into()).unwrap();
        assert!(inline.provider.keys.is_some_and(|keys| keys.is_empty()) && inline.keys.is_none());
        let file = with("JSONWebKeySet", json!({"Local": {"Filename": "/keys.json"}})).unwrap();
        assert_eq!((file.provider.keys, file.keys), (None, Some(KeySource::File("/keys.json".into()))));
        for set in [
            json!(null),
            json!({}),
            json!({"Local": {}}),
            json!({"Local": {"JWKS": "%"}}),
            json!({"Local": {"JWKS": STANDARD.encode("{}")}}),
            json!({"Remote": {"URI": "example.com"}}),
            json!({"Remote": {"URI": "file:///etc/passwd"}}),
        ] {
            assert!(with("JSONWebKeySet", set.clone()).is_err(), "{set}");
        }
    }

    #[test]
    fn fetching_is_bounded_whatever_the_entry_says() {
        let plain = remote(json!({}));
        assert_eq!((plain.timeout, plain.cache, plain.retries), (REQUEST_TIMEOUT, CACHE_DURATION, 0));
        let policy =
            json!({"NumRetries": 1_000_000, "RetryPolicyBackOff": {"BaseInterval": "3s", "MaxInterval": "1s"}});
        let wild = remote(json!({"RequestTimeoutMs": 9_999_999, "CacheDuration": 1, "RetryPolicy": policy}));
        assert_eq!((wild.timeout, wild.cache, wild.retries), (LONGEST_REQUEST, SHORTEST_CACHE, MOST_RETRIES));
        assert_eq!(wild.back_off, wild.longest_back_off);
        assert_eq!(remote(json!({"RequestTimeoutMs": -1})).timeout, REQUEST_TIMEOUT);
    }

    #[test]
    fn authorities_are_those_that_the_entry_names_or_the_systems() {
        let trust = |ca: Value| remote(json!({"JWKSCluster": {"TLSCertificates": ca}})).trust;
        for (ca, expected) in [
            (json!({}), Trust::System),
            (json!({"CaCertificateProviderInstance": {"InstanceName": "x"}}), Trust::System),
            (json!({"TrustedCA": {}}), Trust::System),
            (json!({"TrustedCA": {"Filename": "/ca.pem"}}), Trust::File("/ca.pem".into())),
            (json!({"TrustedCA": {"EnvironmentVariable": "CA"}}), Trust::Environment("CA".into())),
            (json!({"TrustedCA": {"InlineString": "pem"}}), Trust::Pem("pem".into())),
            (json!({"TrustedCA": {"InlineBytes": STANDARD.encode("pem")}}), Trust::Pem("pem".into())),
        ] {
            assert_eq!(trust(ca.clone()), expected, "{ca}");
        }
    }

    #[test]
    fn an_entry_with_fields_that_are_not_known_is_refused() {
        let jwks = STANDARD.encode(r#"{"keys":[]}"#);
        let remote = |name: &str, value: Value| json!({"Remote": {"URI": "https://a.example/", name: value}});
        for (field, value) in [
            ("RequiredClaims", json!(["sub"])),
            ("JSONWebKeySet", json!({"Local": {"JWKS": jwks}, "Pinned": "x"})),
            ("JSONWebKeySet", json!({"Local": {"JWKS": jwks, "KeyIDs": ["a"]}})),
            ("JSONWebKeySet", remote("Pin", "x".into())),
            ("JSONWebKeySet", remote("JWKSCluster", json!({"Pin": "x"}))),
            ("JSONWebKeySet", remote("JWKSCluster", json!({"TLSCertificates": {"Pin": "x"}}))),
            ("JSONWebKeySet", remote("JWKSCluster", json!({"TLSCertificates": {"TrustedCA": {"Pin": "x"}}}))),
            ("Locations", json!([{"Cookie": {"Name": "c", "Secure": true}}])),
            ("Locations", json!([{"Header": {"Name": "c", "Once": true}}])),
            ("Forwarding", json!({"HeaderName": "c", "Only": "x"})),
        ] {
            let refused = with(field, value.clone()).expect_err("it says something that is not known");
            assert!(refused.0.contains("not known"), "{field} {value}: {refused}");
        }
        for (field, value) in [
            ("Meta", json!({"a": "b"})),
            ("Hash", json!(7)),
            ("CacheConfig", json!({"Size": 7, "New": 1})),
            ("RequiredClaims", json!([])),
            ("JSONWebKeySet", remote("UseSNI", true.into())),
        ] {
            assert!(with(field, value.clone()).is_ok(), "{field} {value}");
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for (field, value) in [
            ("Locations", json!([{}])),
            ("Locations", json!([{"Body": {"Name": "x"}}])),
            ("Locations", json!([{"Header": {"Name": "a b"}}])),
            ("Locations", json!([{"Header": {"Name": "a"}, "Cookie": {"Name": "b"}}])),
            ("Forwarding", json!({"HeaderName": "a b"})),
        ] {
            assert!(with(field, value.clone()).is_err(), "{field} {value}");
        }
        let locations = json!([{"QueryParam": {"Name": "q"}}, {"Cookie": {"Name": "c"}}]);
        let expected = [Location::QueryParameter("q".into()), Location::Cookie("c".into())];
        assert_eq!(with("Locations", locations).unwrap().provider.locations, expected);
    }
}
