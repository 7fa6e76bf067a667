//! Paths to a root among more than they need, and how long each holds.

use super::*;
use crate::testing::ca::{Ca, Leaf, TRUST_DOMAIN, uri};
use crate::tls::{Credentials, SpiffeId, certificates};

const HOUR: i64 = 3600;

fn trust(roots: &[&str]) -> Trust {
    let roots = roots.iter().flat_map(|pem| certificates(pem).unwrap()).collect();
    Trust::new(roots, Arc::new(crate::tls::policy::provider(crate::tls::Aead::detect()))).unwrap()
}

fn chain(pems: &[&str]) -> Vec<CertificateDer<'static>> {
    pems.iter().flat_map(|pem| certificates(pem).unwrap()).collect()
}

/// So many seconds from now.
fn at(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
}

/// How long a chain holds, in seconds from now, to ten; asked at so many seconds from now.
fn holds(trust: &Trust, chain: &[CertificateDer<'_>], now: i64) -> Result<i64, PeerError> {
    let valid = trust.verify(chain, Purpose::Client, at(now))?;
    let left = valid.until.duration_since(SystemTime::now()).map_or(0, |left| left.as_secs());
    Ok(i64::try_from(left.next_multiple_of(10)).unwrap())
}

fn web(ca: &Ca, from: i64, until: i64) -> Leaf {
    ca.leaf_with(&[&uri("web")], from, until)
}

#[test]
fn what_the_path_does_not_need_changes_nothing() {
    let (old, new, foreign) = (Ca::new(), Ca::new(), Ca::new());
    let leaf = web(&new, -60, HOUR);
    let expired = old.sign(&new, -2 * HOUR, -HOUR);
    let early = old.sign(&new, HOUR, 2 * HOUR);
    let other = web(&foreign, -60, HOUR);
    let trust = trust(&[&old.pem, &new.pem]);
    let mut odd = chain(&[&leaf.cert_pem, &expired]);
    odd.insert(1, CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]));
    odd.push(CertificateDer::from(Vec::new()));
    for (what, chain) in [
        ("a cross-signed root that has expired", chain(&[&leaf.cert_pem, &expired])),
        ("one that is not valid yet", chain(&[&leaf.cert_pem, &early])),
        ("the leaf twice", chain(&[&leaf.cert_pem, &leaf.cert_pem])),
        ("its root, and one that is not", chain(&[&leaf.cert_pem, &new.pem, &foreign.pem, &new.pem])),
        ("another's leaf", chain(&[&leaf.cert_pem, &other.cert_pem])),
        ("what is no certificate", odd),
    ] {
        assert_eq!(holds(&trust, &chain, 0), Ok(HOUR), "{what}");
        assert_eq!(holds(&trust, &chain, HOUR + 60), Err(PeerError::Expired), "{what}");
    }
}

#[test]
fn intermediates_are_found_in_any_order() {
    let root = Ca::new();
    let upper = root.below(-60, 2 * HOUR);
    let lower = upper.below(-60, HOUR / 2);
    let leaf = web(&lower, -60, HOUR);
    let trust = trust(&[&root.pem]);
    for chain in [
        chain(&[&leaf.cert_pem, &lower.pem, &upper.pem]),
        chain(&[&leaf.cert_pem, &upper.pem, &lower.pem]),
        chain(&[&leaf.cert_pem, &upper.pem, &upper.pem, &lower.pem, &lower.pem]),
    ] {
        assert_eq!(holds(&trust, &chain, 0), Ok(HOUR / 2));
        assert_eq!(holds(&trust, &chain, HOUR / 2 + 60), Err(PeerError::Expired));
    }
    assert_eq!(holds(&trust, &chain(&[&leaf.cert_pem, &upper.pem]), 0), Err(PeerError::UnknownIssuer));
}

#[test]
fn a_path_that_expires_leaves_the_other() {
    let (first, second) = (Ca::new(), Ca::new());
    let between = first.below(-60, HOUR / 2);
    let other = second.sign(&between, -60, HOUR);
    let leaf = web(&between, -60, 2 * HOUR);
    let trust = trust(&[&first.pem, &second.pem]);
    for chain in [chain(&[&leaf.cert_pem, &between.pem, &other]), chain(&[&leaf.cert_pem, &other, &between.pem])] {
        let now = holds(&trust, &chain, 0).unwrap();
        assert!(now == HOUR / 2 || now == HOUR, "{now}");
        assert_eq!(holds(&trust, &chain, HOUR / 2 + 60), Ok(HOUR));
        assert_eq!(holds(&trust, &chain, HOUR + 60), Err(PeerError::Expired));
    }
}

#[test]
fn a_root_is_part_of_the_path() {
    let root = Ca::new();
    let leaf = web(&root, -60, 2 * HOUR);
    let chain = chain(&[&leaf.cert_pem]);
    let (short, long) = (root.again(-60, HOUR), root.again(-60, 3 * HOUR));
    let (expired, early) = (root.again(-2 * HOUR, -HOUR), root.again(HOUR, 3 * HOUR));
    assert_eq!(holds(&trust(&[&short]), &chain, 0), Ok(HOUR));
    assert_eq!(holds(&trust(&[&short]), &chain, HOUR + 60), Err(PeerError::Expired));
    assert_eq!(holds(&trust(&[&expired]), &chain, 0), Err(PeerError::Expired));
    assert_eq!(holds(&trust(&[&early]), &chain, 0), Err(PeerError::NotYetValid));
    // The same root with the same key, renewed.
    assert_eq!(holds(&trust(&[&expired, &long]), &chain, 0), Ok(2 * HOUR));
    assert_eq!(holds(&trust(&[&short, &long]), &chain, HOUR + 60), Ok(2 * HOUR));
    // One that the chain brings along is no root.
    assert_eq!(
        holds(&trust(&[&Ca::new().pem]), &self::chain(&[&leaf.cert_pem, &root.pem]), 0),
        Err(PeerError::UnknownIssuer)
    );
}

#[test]
fn as_many_certificates_as_nobody_needs_are_refused() {
    let root = Ca::new();
    let leaf = web(&root, -60, HOUR);
    let many = |count| chain(&vec![leaf.cert_pem.as_str(); count]);
    let trust = trust(&[&root.pem]);
    assert_eq!(holds(&trust, &many(MAX_CERTIFICATES), 0), Ok(HOUR));
    assert_eq!(holds(&trust, &many(33), 0), Err(PeerError::TooManyCertificates(33)));
    assert_eq!(holds(&trust, &[], 0), Err(PeerError::NoCertificate));
}

#[test]
fn a_peer_is_served_over_the_path_that_holds() {
    let (first, second) = (Ca::new(), Ca::new());
    let between = first.below(-60, HOUR / 2);
    let other = second.sign(&between, -60, HOUR);
    let leaf = web(&between, -60, 2 * HOUR);
    let own = web(&first, -60, 2 * HOUR);
    let roots = [first.pem.clone(), second.pem.clone()];
    let credentials =
        Credentials::new(TRUST_DOMAIN, &roots, &own.cert_pem, &own.key_pem, "web", SystemTime::now()).unwrap();
    let server = credentials.server(&[]).unwrap();
    let client = credentials.client("x", vec![credentials.id().clone()], &[]).unwrap();
    let chain = chain(&[&leaf.cert_pem, &between.pem, &other]);
    // Each is asked twice: what is known of the chain must not count for longer than its path.
    for now in [0, 0, HOUR / 2 + 60, HOUR / 2 + 60, 0] {
        let (peer, other) = (server.authenticate(Some(&chain), at(now)), client.authenticate(Some(&chain), at(now)));
        assert_eq!(peer, other);
        let peer = peer.unwrap();
        assert_eq!(peer.id.service, "web");
        assert!(peer.until > at(now) && peer.until <= at(HOUR), "{now}");
    }
    for _ in 0..2 {
        assert_eq!(server.authenticate(Some(&chain), at(HOUR + 60)), Err(PeerError::Expired));
        assert_eq!(client.authenticate(Some(&chain), at(HOUR + 60)), Err(PeerError::Expired));
    }
    // What it said before is worth nothing where its roots are not.
    let third = Ca::new();
    assert_eq!(
        third.credentials("db").server(&[]).unwrap().authenticate(Some(&chain), SystemTime::now()),
        Err(PeerError::UnknownIssuer)
    );
}

#[test]
fn our_own_leaf_needs_no_more_than_a_peers() {
    let (old, new) = (Ca::new(), Ca::new());
    let leaf = web(&new, -60, 2 * HOUR);
    let expired = old.sign(&new, -2 * HOUR, -HOUR);
    let pem = format!("{}{expired}", leaf.cert_pem);
    let make = |roots: &[String], now| Credentials::new(TRUST_DOMAIN, roots, &pem, &leaf.key_pem, "web", at(now));
    let credentials = make(&[old.pem.clone(), new.pem.clone()], 0).unwrap();
    assert!(credentials.not_after() > at(2 * HOUR - 60));
    assert!(make(std::slice::from_ref(&new.pem), 0).is_ok());
    let error = make(&[old.pem], 0).unwrap_err().to_string();
    assert!(error.contains("has expired"), "{error}");
}

/// Those of our own trust domain, and those of another.
fn two_domains(ours: &[&str], theirs: &[&str]) -> TrustStores {
    let provider = Arc::new(crate::tls::policy::provider(crate::tls::Aead::detect()));
    let mut stores = TrustStores::new(TRUST_DOMAIN.into(), trust(ours), provider);
    stores.by_domain.insert("other.consul".into(), Arc::new(trust(theirs)));
    stores
}

#[test]
fn roots_vouch_for_identities_of_their_own_trust_domain_alone() {
    const THERE: &str = "spiffe://other.consul/ns/default/dc/dc9/svc/web";
    const NOWHERE: &str = "spiffe://unknown.consul/ns/default/dc/dc9/svc/web";
    let (ours, theirs) = (Ca::new(), Ca::new());
    let mut credentials = ours.credentials("db");
    credentials.trust = Arc::new(two_domains(&[&ours.pem], &[&theirs.pem]));
    let here = uri("web");
    let client = |ids: &[&str]| {
        let expected = ids.iter().map(|id| SpiffeId::parse(id).unwrap()).collect();
        credentials.client("web.mesh", expected, &[])
    };
    let error = client(&[&here, NOWHERE]).unwrap_err().to_string();
    assert!(error.contains("no root certificate is known of the trust domain of spiffe://unknown.consul/"), "{error}");
    let client = client(&[&here, THERE]).unwrap();
    let server = credentials.server(&[]).unwrap();
    let shown = |ca: &Ca, id: &str| chain(&[&ca.leaf_with(&[id], -60, HOUR).cert_pem]);
    for (ca, id, proves) in
        [(&ours, &*here, true), (&theirs, THERE, true), (&theirs, &*here, false), (&ours, THERE, false)]
    {
        let found = client.authenticate(Some(&shown(ca, id)), SystemTime::now()).map(|peer| peer.id.to_string());
        assert_eq!(found, if proves { Ok(id.to_owned()) } else { Err(PeerError::UnknownIssuer) }, "{id}");
    }
    // A claim to a trust domain without roots: our own say whether the peer is a stranger.
    let refused = |ca: &Ca, id: &str| server.authenticate(Some(&shown(ca, id)), SystemTime::now()).unwrap_err();
    let of_another_domain = |id: &str| PeerError::TrustDomain(Box::new(SpiffeId::parse(id).unwrap()));
    assert_eq!(refused(&ours, NOWHERE), of_another_domain(NOWHERE));
    assert_eq!(refused(&theirs, NOWHERE), PeerError::UnknownIssuer);
    assert_eq!(refused(&theirs, &here), PeerError::UnknownIssuer);
    assert_eq!(refused(&ours, THERE), PeerError::UnknownIssuer);
    // To know the roots of another trust domain lets nobody of it in.
    assert_eq!(refused(&theirs, THERE), of_another_domain(THERE));
}

#[test]
fn our_own_roots_become_fewer_and_those_of_others_stay() {
    let (old, new, theirs) = (Ca::new(), Ca::new(), Ca::new());
    let stores = two_domains(&[&old.pem, &new.pem], &[&theirs.pem]);
    let left = stores.only(&chain(&[&new.pem])).unwrap();
    assert!(left.roots().eq(&chain(&[&new.pem, &theirs.pem])));
    assert_eq!(left.subjects().len(), 2);
    assert!(left.only(&chain(&[&new.pem])).is_none());
}
