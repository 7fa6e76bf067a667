//! Certificates that real authorities issue, and those that nobody should: extension by extension, place by place.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, SanType, SignatureAlgorithm,
};
use rustls_pki_types::CertificateDer;

use super::*;
use crate::testing::ca::{Ca, TRUST_DOMAIN, uri};
use crate::tls::trust::Trust;
use crate::tls::{Aead, certificates, policy};

fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    assert!(length < 0x80);
    [&[tag, length][..], content].concat()
}

fn row(values: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &values.concat())
}

/// An extension of id-ce.
fn extension(id: u64, critical: bool, content: &[u8]) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, id], content.to_vec());
    extension.set_criticality(critical);
    extension
}

/// Name constraints: a tag and a base of each subtree.
fn constraints(critical: bool, permitted: &[(u8, &[u8])], excluded: &[(u8, &[u8])]) -> CustomExtension {
    let trees = |tag, bases: &[(u8, &[u8])]| {
        let trees: Vec<u8> = bases.iter().flat_map(|(base, content)| tlv(0x30, &tlv(*base, content))).collect();
        if trees.is_empty() { Vec::new() } else { tlv(tag, &trees) }
    };
    extension(30, critical, &row(&[trees(0xa0, permitted), trees(0xa1, excluded)]))
}

const ANY: &[u8] = &[0x55, 0x1d, 32, 0];
const ONE: &[u8] = &[0x2a, 1];
const TWO: &[u8] = &[0x2a, 2];

fn policies(critical: bool, ids: &[&[u8]]) -> CustomExtension {
    let all: Vec<Vec<u8>> = ids.iter().map(|id| row(&[tlv(6, id)])).collect();
    extension(32, critical, &row(&all))
}

fn require_policy(critical: bool, skip: u8) -> CustomExtension {
    extension(36, critical, &row(&[tlv(0x80, &[skip])]))
}

type Adjust<'a> = &'a dyn Fn(&mut CertificateParams);

/// A root, an intermediate and a leaf, each with something of its own; whether a client with them is let in.
fn validate(root: Adjust<'_>, between: Adjust<'_>, leaf: Adjust<'_>) -> Result<(), String> {
    let key = || KeyPair::generate().unwrap();
    let root = Ca::made(key(), None, root);
    let between = Ca::made(key(), Some(&root), between);
    let leaf = between.leaf_made(key(), &[&uri("web")], leaf);
    verify(&root.pem, &[&leaf.cert_pem, &between.pem])
}

fn verify(root: &str, chain: &[&str]) -> Result<(), String> {
    let trust = Trust::new(certificates(root).unwrap(), Arc::new(policy::provider(Aead::detect()))).unwrap();
    let chain: Vec<CertificateDer<'_>> = chain.iter().flat_map(|pem| certificates(pem).unwrap()).collect();
    trust.verify(&chain, Purpose::Client, SystemTime::now()).map(drop).map_err(|e| e.to_string())
}

fn none(_: &mut CertificateParams) {}

/// Asserts that a chain is good, or that what is wrong with it is told in these words.
fn assert_result(what: &str, got: &Result<(), String>, problem: Option<&str>) {
    match problem {
        None => assert_eq!(*got, Ok(()), "{what}"),
        Some(words) => assert!(got.as_ref().is_err_and(|e| e.contains(words)), "{what}: {got:?}"),
    }
}

#[test]
fn each_extension_at_an_authority() {
    let domain: (u8, &[u8]) = (0x86, TRUST_DOMAIN.as_bytes());
    let suffix: (u8, &[u8]) = (0x86, b".consul");
    let directory = tlv(0x30, &[]);
    for (what, of, problem) in [
        ("nothing", vec![], None),
        ("the trust domain", vec![constraints(true, &[domain], &[])], None),
        ("a suffix of it, not critical", vec![constraints(false, &[suffix], &[])], None),
        ("one of two", vec![constraints(true, &[(0x86, b"else"), suffix], &[])], None),
        ("another domain", vec![constraints(true, &[(0x86, b"else.consul")], &[])], Some("name constraints")),
        ("another domain, not critical", vec![constraints(false, &[(0x86, b"else")], &[])], Some("name constraints")),
        ("excluded", vec![constraints(true, &[], &[suffix])], Some("name constraints")),
        ("another excluded", vec![constraints(true, &[], &[(0x86, b"else.consul")])], None),
        ("DNS names, which it has none of", vec![constraints(true, &[(0x82, b"example.com")], &[])], None),
        ("email addresses, likewise", vec![constraints(true, &[(0x81, b"example.com")], &[])], None),
        ("IP addresses, likewise", vec![constraints(true, &[(0x87, &[10, 0, 0, 0, 255, 0, 0, 0])], &[])], None),
        ("distinguished names", vec![constraints(true, &[(0xa4, &directory)], &[])], Some("not known")),
        ("all distinguished names, not critical", vec![constraints(false, &[(0xa4, &directory)], &[])], None),
        (
            "those excluded, not critical",
            vec![constraints(false, &[], &[(0xa4, &directory)])],
            Some("name constraints"),
        ),
        ("registered ids", vec![constraints(true, &[(0x88, ONE)], &[])], Some("not known")),
        ("registered ids, not critical", vec![constraints(false, &[(0x88, ONE)], &[])], None),
        ("constraints of nothing", vec![extension(30, true, &row(&[]))], Some("can't be read")),
        ("junk for constraints", vec![extension(30, false, &[1, 2, 3])], Some("can't be read")),
        (
            "constraints twice",
            vec![constraints(true, &[domain], &[]), constraints(true, &[suffix], &[])],
            Some("twice"),
        ),
        ("critical policies", vec![policies(true, &[ONE, TWO])], None),
        ("policies", vec![policies(false, &[ANY])], None),
        ("a policy required, and none there", vec![require_policy(true, 0)], Some("policy")),
        ("one required, not critical", vec![require_policy(false, 0)], Some("policy")),
        ("one required later than at the leaf", vec![require_policy(true, 3)], None),
        ("mapping of policies", vec![extension(33, true, &row(&[row(&[tlv(6, ONE), tlv(6, TWO)])]))], None),
        ("mapping inhibited", vec![extension(36, true, &row(&[tlv(0x81, &[0])]))], None),
        ("any policy inhibited", vec![extension(54, true, &tlv(2, &[0]))], None),
        ("places of revocation lists", vec![extension(31, true, &row(&[]))], None),
        ("a critical key identifier", vec![extension(35, true, &row(&[]))], Some("critical")),
        ("a critical extension that nobody knows", vec![extension(99, true, &[5, 0])], Some("critical")),
        ("one that is not critical", vec![extension(99, false, &[5, 0])], None),
    ] {
        let adjust = |params: &mut CertificateParams| params.custom_extensions.clone_from(&of);
        let at_root = validate(&adjust, &none, &none);
        // What is required of those below a root says nothing of the root's own policies.
        assert_result(&format!("{what}, at the intermediate"), &validate(&none, &adjust, &none), problem);
        let is_policy = what.contains("policy required") || what.contains("one required");
        assert_result(&format!("{what}, at the root"), &at_root, if is_policy { None } else { problem });
    }
}

#[test]
fn each_extension_at_a_leaf() {
    let usages =
        |usages: &'static [KeyUsagePurpose]| move |params: &mut CertificateParams| params.key_usages = usages.to_vec();
    let purposes = |purposes: &'static [ExtendedKeyUsagePurpose]| {
        move |params: &mut CertificateParams| params.extended_key_usages = purposes.to_vec()
    };
    let extended =
        |of: CustomExtension| move |params: &mut CertificateParams| params.custom_extensions.push(of.clone());
    for (what, of, problem) in [
        ("signs", Box::new(usages(&[KeyUsagePurpose::DigitalSignature])) as Box<dyn Fn(&mut CertificateParams)>, None),
        ("does not sign", Box::new(usages(&[KeyUsagePurpose::KeyEncipherment])), Some("key usage")),
        (
            "is an authority",
            Box::new(|params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            Some("an authority's"),
        ),
        ("is none, expressly", Box::new(|params: &mut CertificateParams| params.is_ca = IsCa::ExplicitNoCa), None),
        ("is for clients", Box::new(purposes(&[ExtendedKeyUsagePurpose::ClientAuth])), None),
        ("is for servers", Box::new(purposes(&[ExtendedKeyUsagePurpose::ServerAuth])), Some("extended key usage")),
        ("is for anything", Box::new(purposes(&[ExtendedKeyUsagePurpose::Any])), Some("extended key usage")),
        ("says nothing of it", Box::new(purposes(&[])), None),
        ("has critical policies", Box::new(extended(policies(true, &[ONE]))), None),
        ("has what nobody knows", Box::new(extended(extension(99, true, &[5, 0]))), Some("critical")),
        (
            "has constraints, which it has nobody for",
            Box::new(extended(constraints(true, &[(0x86, b"else")], &[]))),
            None,
        ),
        ("requires a policy of itself", Box::new(extended(require_policy(true, 0))), Some("policy")),
    ] {
        assert_result(what, &validate(&none, &none, &*of), problem);
    }
}

#[test]
fn what_authorities_must_be() {
    let length =
        |length| move |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(length));
    let purposes = |purposes: &'static [ExtendedKeyUsagePurpose]| {
        move |params: &mut CertificateParams| params.extended_key_usages = purposes.to_vec()
    };
    assert_eq!(validate(&length(1), &length(0), &none), Ok(()));
    assert_result("a root for leaves only", &validate(&length(0), &none, &none), Some("path length"));
    let not: Adjust<'_> = &|params| params.is_ca = IsCa::ExplicitNoCa;
    assert_result("a leaf that signs", &validate(&none, not, &none), Some("not an authority's"));
    assert_result("a root that is none", &validate(not, &none, &none), Some("not an authority's"));
    let does_not_sign: Adjust<'_> = &|params| params.key_usages = vec![KeyUsagePurpose::CrlSign];
    assert_result("key usage", &validate(&none, does_not_sign, &none), Some("key usage"));
    assert_result("key usage of the root", &validate(does_not_sign, &none, &none), Some("key usage"));
    let (clients, servers) =
        (purposes(&[ExtendedKeyUsagePurpose::ClientAuth]), purposes(&[ExtendedKeyUsagePurpose::ServerAuth]));
    for (adjust, problem) in [(&clients as Adjust<'_>, None), (&servers, Some("extended key usage"))] {
        assert_result("extended key usage", &validate(&none, adjust, &none), problem);
        assert_result("extended key usage of the root", &validate(adjust, &none, &none), problem);
    }
}

#[test]
fn every_name_of_a_leaf_is_constrained() {
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let with = |name: SanType| move |params: &mut CertificateParams| params.subject_alt_names.push(name.clone());
    let only = |tag, base: &'static [u8]| {
        move |params: &mut CertificateParams| params.custom_extensions.push(constraints(true, &[(tag, base)], &[]))
    };
    for (name, tag, base, problem) in [
        (dns("web.example.com"), 0x82, &b"example.com"[..], None),
        (dns("web.example.org"), 0x82, b"example.com", Some("DNS name \"web.example.org\"")),
        (SanType::Rfc822Name("me@example.org".try_into().unwrap()), 0x81, b"example.com", Some("email")),
        (SanType::Rfc822Name("me@example.com".try_into().unwrap()), 0x81, b"example.com", None),
        (SanType::IpAddress([10, 0, 0, 1].into()), 0x87, &[10, 0, 0, 0, 255, 0, 0, 0], Some("IP address")),
        (SanType::URI("spiffe://10.0.0.1/x".try_into().unwrap()), 0x86, b".consul", Some("spiffe://10.0.0.1")),
        (SanType::URI("urn:x".try_into().unwrap()), 0x86, b".consul", Some("urn:x")),
    ] {
        let what = format!("{name:?}");
        assert_result(&what, &validate(&none, &only(tag, base), &with(name.clone())), problem);
        assert_result(&what, &validate(&only(tag, base), &none, &with(name)), problem);
    }
    // An intermediate has names too.
    let else_where: Adjust<'_> =
        &|params| params.subject_alt_names = vec![SanType::URI("spiffe://else".try_into().unwrap())];
    assert_result(
        "an intermediate",
        &validate(&only(0x86, TRUST_DOMAIN.as_bytes()), else_where, &none),
        Some("intermediate 1"),
    );
}

#[test]
fn policies_that_are_required() {
    let of = |extensions: Vec<CustomExtension>| {
        move |params: &mut CertificateParams| params.custom_extensions.clone_from(&extensions)
    };
    let required = |more: CustomExtension| of(vec![require_policy(true, 0), more]);
    for (what, between, leaf, problem) in [
        ("the same", required(policies(true, &[ONE])), of(vec![policies(false, &[ONE])]), None),
        ("one of two", required(policies(true, &[ONE, TWO])), of(vec![policies(false, &[TWO])]), None),
        ("another", required(policies(true, &[ONE])), of(vec![policies(false, &[TWO])]), Some("policy")),
        ("none", required(policies(true, &[ONE])), of(vec![]), Some("policy")),
        ("any above", required(policies(true, &[ANY])), of(vec![policies(false, &[TWO])]), None),
        ("any below", required(policies(true, &[ONE])), of(vec![policies(false, &[ANY])]), None),
        (
            "any below, inhibited",
            of(vec![require_policy(true, 0), policies(true, &[ONE]), extension(54, true, &tlv(2, &[0]))]),
            of(vec![policies(false, &[ANY])]),
            Some("policy"),
        ),
        (
            "a mapped one",
            of(vec![
                require_policy(true, 0),
                policies(true, &[ONE]),
                extension(33, true, &row(&[row(&[tlv(6, ONE), tlv(6, TWO)])])),
            ]),
            of(vec![policies(false, &[ONE])]),
            Some("mapped"),
        ),
    ] {
        assert_result(what, &validate(&none, &between, &leaf), problem);
    }
}

#[test]
fn keys_of_every_kind_are_mixed() {
    let kinds: [&SignatureAlgorithm; 4] =
        [&PKCS_RSA_SHA256, &PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
    for (turn, _) in kinds.iter().enumerate() {
        let key = |place: usize| KeyPair::generate_for(kinds[(turn + place) % kinds.len()]).unwrap();
        let root = Ca::made(key(0), None, none);
        let upper = Ca::made(key(1), Some(&root), none);
        let lower = Ca::made(key(2), Some(&upper), none);
        let leaf = lower.leaf_made(key(3), &[&uri("web")], none);
        assert_eq!(verify(&root.pem, &[&leaf.cert_pem, &lower.pem, &upper.pem]), Ok(()), "{turn}");
        assert_eq!(verify(&root.pem, &[&leaf.cert_pem, &upper.pem, &lower.pem]), Ok(()), "{turn}");
        assert!(verify(&upper.pem, &[&leaf.cert_pem, &lower.pem]).is_ok(), "an intermediate that is listed is a root");
    }
}

#[test]
fn a_signature_that_is_not_good_is_no_path() {
    let root = Ca::new();
    let mut der = certificates(&root.leaf("web").cert_pem).unwrap().remove(0).to_vec();
    let trust = Trust::new(certificates(&root.pem).unwrap(), Arc::new(policy::provider(Aead::detect()))).unwrap();
    let now = SystemTime::now();
    assert!(trust.verify(&[CertificateDer::from(der.as_slice())], Purpose::Client, now).is_ok());
    // No byte can be another: whatever is changed is noticed, and nothing panics.
    for place in 0..der.len() {
        der[place] ^= 1;
        assert!(trust.verify(&[CertificateDer::from(der.as_slice())], Purpose::Client, now).is_err(), "{place}");
        der[place] ^= 1;
        assert!(trust.verify(&[CertificateDer::from(&der[..place])], Purpose::Client, now).is_err(), "{place}");
    }
}

#[test]
fn a_search_has_an_end() {
    // Authorities that all have the same name, each signed by each: a path could go through any of them.
    let same = |params: &mut CertificateParams| params.distinguished_name = rcgen::DistinguishedName::new();
    let all: Vec<Ca> = (0..6).map(|_| Ca::made(KeyPair::generate().unwrap(), None, same)).collect();
    let mut pems: Vec<String> = Vec::new();
    for by in &all {
        pems.extend(all.iter().map(|of| by.sign(of, -60, 3600)));
    }
    let leaf = all[0].leaf("web");
    let mut chain = vec![leaf.cert_pem.as_str()];
    chain.extend(pems.iter().take(31).map(String::as_str));
    let got = verify(&Ca::new().pem, &chain);
    assert!(got.as_ref().is_err_and(|e| e.contains("signatures")), "{got:?}");
    // As many levels as are allowed, and one more.
    for (levels, problem) in [(MAX_AUTHORITIES, None), (MAX_AUTHORITIES + 1, Some("unknown issuer"))] {
        let root = Ca::new();
        let mut line: Vec<Ca> = Vec::new();
        for _ in 0..levels {
            let next = line.last().unwrap_or(&root).below(-60, 3600);
            line.push(next);
        }
        let leaf = line.last().unwrap().leaf("web");
        let mut chain = vec![leaf.cert_pem.as_str()];
        chain.extend(line.iter().map(|ca| ca.pem.as_str()));
        assert_result(&levels.to_string(), &verify(&root.pem, &chain), problem);
    }
}
