//! Handshakes in memory: who is let in, who is not, and what a resumed session may not do.

use std::time::{Duration, SystemTime};

use rustls::HandshakeKind;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;
use crate::testing::ca::{Ca, TRUST_DOMAIN, uri};

type Shaken = (Result<Stream<DuplexStream>, HandshakeError>, Result<Stream<DuplexStream>, HandshakeError>);

/// Shakes hands in memory: the client's outcome, then the server's.
async fn shake(client: &Client, server: &Server) -> Shaken {
    let (near, far) = duplex(64 * 1024);
    let connect = async {
        let mut stream = Stream::connect(near, client).await;
        if let Ok(stream) = &mut stream {
            std::future::poll_fn(|cx| stream.poll_flush(cx)).await.unwrap();
        }
        stream
    };
    let accept = async {
        let mut stream = Stream::accept(far, server.config([])).await;
        if let Ok(stream) = &mut stream {
            // A client of TLS 1.2 waits for what is sent last.
            std::future::poll_fn(|cx| stream.poll_flush(cx)).await.unwrap();
        }
        stream
    };
    tokio::join!(connect, accept)
}

fn id(service: &str) -> SpiffeId {
    SpiffeId::parse(&uri(service)).unwrap()
}

fn client(ca: &Ca, service: &str, target: &str) -> Arc<Client> {
    ca.credentials(service).client("db.default.dc1.internal.x.consul", vec![id(target)], &[]).unwrap()
}

fn server(ca: &Ca, service: &str) -> Arc<Server> {
    ca.credentials(service).server(&[]).unwrap()
}

#[tokio::test]
async fn two_services_of_one_mesh_know_each_other() {
    for ca in [Ca::new(), Ca::rsa()] {
        let (client, server) = (client(&ca, "web", "db"), server(&ca, "db"));
        let (near, far) = shake(&client, &server).await;
        let (near, far) = (near.unwrap(), far.unwrap());
        assert_eq!(*client.authenticate(near.peer_certificates(), SystemTime::now()).unwrap().id, id("db"));
        assert_eq!(*server.authenticate(far.peer_certificates(), SystemTime::now()).unwrap().id, id("web"));
    }
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused_and_named() {
    let ca = Ca::new();
    let (near, far) = shake(&client(&ca, "web", "db"), &server(&ca, "impostor")).await;
    let error = near.err().unwrap().to_string();
    assert!(error.contains("svc/impostor") && error.contains("svc/db"), "{error}");
    assert!(far.is_err());
}

#[tokio::test]
async fn another_ca_is_refused_by_either_side() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let (near, _) = shake(&client(&ours, "web", "db"), &server(&theirs, "db")).await;
    assert!(near.is_err());
    let trusting = {
        // A client that would talk to us, with a certificate that we do not know.
        let leaf = theirs.leaf("web");
        let both = [theirs.pem.clone(), ours.pem.clone()];
        Credentials::new(TRUST_DOMAIN, &both, &leaf.cert_pem, &leaf.key_pem, "web", SystemTime::now()).unwrap()
    };
    let (_, far) = shake(&trusting.client("x", vec![id("db")], &[]).unwrap(), &server(&ours, "db")).await;
    assert!(far.is_err());
}

#[tokio::test]
async fn reconnecting_resumes_and_new_credentials_start_afresh() {
    let ca = Ca::new();
    let (client, old) = (client(&ca, "web", "db"), server(&ca, "db"));
    assert_eq!(reconnect(&client, &old).await, HandshakeKind::Full);
    assert_eq!(reconnect(&client, &old).await, HandshakeKind::Resumed);
    assert_eq!(reconnect(&client, &server(&ca, "db")).await, HandshakeKind::Full);
}

/// A server of one version.
fn versions(ca: &Ca, versions: Versions) -> Arc<Server> {
    let incoming = Parameters { versions, ..Parameters::default() };
    ca.credentials("db").under(Policy { incoming, ..Policy::default() }).server(&[]).unwrap()
}

/// Connects, lets the client read the server's ticket, and tells what kind of handshake it was.
async fn reconnect(client: &Client, server: &Server) -> HandshakeKind {
    let (near, far) = shake(client, server).await;
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    std::future::poll_fn(|cx| far.poll_flush(cx)).await.unwrap();
    // With TLS 1.2 it came before the handshake's end.
    if near.agreed().0 == "TLSv1_3" {
        std::future::poll_fn(|cx| with_scratch(|scratch| near.poll_open(cx, scratch))).await.unwrap();
    }
    // A resumed session shows the certificates of the first, so that it can be authenticated as that was.
    assert_eq!(*client.authenticate(near.peer_certificates(), SystemTime::now()).unwrap().id, id("db"));
    assert_eq!(*server.authenticate(far.peer_certificates(), SystemTime::now()).unwrap().id, id("web"));
    far.handshake_kind().unwrap()
}

#[test]
fn credentials_make_a_provider_only_for_another_aead() {
    let credentials = Ca::new().credentials("web");
    let provider = Arc::clone(&credentials.provider);
    let same = credentials.sealed_by(Aead::detect()).under(Policy::default());
    assert!(Arc::ptr_eq(&provider, &same.provider));
    let is_same = [Implementation::AwsLc, Implementation::Ring]
        .map(|implementation| same.clone().sealed_by(Aead::forced(implementation)).provider)
        .map(|other| Arc::ptr_eq(&provider, &other));
    assert_eq!(is_same.iter().filter(|is_same| **is_same).count(), 1);
}

#[tokio::test]
async fn a_session_is_worth_nothing_once_its_certificate_has_expired() {
    let ca = Ca::new();
    let (client, server) = (client(&ca, "web", "db"), server(&ca, "db"));
    let (near, far) = shake(&client, &server).await;
    let later = SystemTime::now() + Duration::from_secs(2 * 86_400);
    assert_eq!(server.authenticate(far.unwrap().peer_certificates(), later), Err(PeerError::Expired));
    assert_eq!(client.authenticate(near.unwrap().peer_certificates(), later), Err(PeerError::Expired));
}

#[tokio::test]
async fn identities_that_are_not_one_service_of_our_domain_are_refused() {
    let ca = Ca::new();
    let server = server(&ca, "db");
    let now = SystemTime::now();
    let authenticate = |uris: &[&str]| {
        let chain = certificates(&ca.leaf_with(uris, -60, 3600).cert_pem).unwrap();
        server.authenticate(Some(&chain), now)
    };
    let foreign = "spiffe://other.consul/ns/default/dc/dc1/svc/web";
    assert!(matches!(authenticate(&[foreign]), Err(PeerError::TrustDomain(id)) if id.service == "web"));
    assert_eq!(authenticate(&[]), Err(PeerError::NotOneUri(0)));
    assert_eq!(authenticate(&[&uri("web"), &uri("api")]), Err(PeerError::NotOneUri(2)));
    assert!(matches!(authenticate(&["https://example.com/"]), Err(PeerError::NotAService(_))));
    assert_eq!(server.authenticate(None, now), Err(PeerError::NoCertificate));
    let junk = [CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])];
    assert_eq!(server.authenticate(Some(&junk), now), Err(PeerError::Malformed));
    let early = certificates(&ca.leaf_with(&[&uri("web")], 600, 3600).cert_pem).unwrap();
    assert_eq!(server.authenticate(Some(&early), now), Err(PeerError::NotYetValid));
}

#[test]
fn credentials_that_do_not_fit_together_are_refused() {
    let (ca, other) = (Ca::new(), Ca::new());
    let leaf = ca.leaf("web");
    let expired = ca.leaf_with(&[&uri("web")], -7200, -3600);
    let now = SystemTime::now();
    let check = |roots: &[&Ca], cert: &str, key: &str, service: &str| {
        let roots: Vec<String> = roots.iter().map(|ca| ca.pem.clone()).collect();
        Credentials::new(TRUST_DOMAIN, &roots, cert, key, service, now).err().map(|e| e.to_string())
    };
    assert_eq!(check(&[&ca], &leaf.cert_pem, &leaf.key_pem, "web"), None);
    assert_eq!(check(&[&other, &ca, &Ca::expired()], &leaf.cert_pem, &leaf.key_pem, "web"), None);
    for (problem, found) in [
        ("does not chain", check(&[&other], &leaf.cert_pem, &leaf.key_pem, "web")),
        ("no valid root", check(&[], &leaf.cert_pem, &leaf.key_pem, "web")),
        ("no valid root", check(&[&Ca::expired()], &leaf.cert_pem, &leaf.key_pem, "web")),
        ("not for service", check(&[&ca], &leaf.cert_pem, &leaf.key_pem, "api")),
        ("not the key", check(&[&ca], &leaf.cert_pem, &ca.leaf("web").key_pem, "web")),
        ("has expired", check(&[&ca], &expired.cert_pem, &expired.key_pem, "web")),
        ("not a PEM key", check(&[&ca], &leaf.cert_pem, "nonsense", "web")),
        ("no certificate", check(&[&ca], "nonsense", &leaf.key_pem, "web")),
    ] {
        assert!(found.as_ref().is_some_and(|found| found.contains(problem)), "{problem}: {found:?}");
    }
}

#[tokio::test]
async fn every_name_that_can_be_sent_is_sent_and_taken_as_it_is() {
    let ca = Ca::new();
    let (tls12, tls13) = (versions(&ca, Versions::Tls12), versions(&ca, Versions::Tls13));
    // It knows no group that a client guesses, so that it asks for a second hello.
    let mut asks_again = ca.credentials("db");
    let groups = vec![aws_lc_rs::kx_group::SECP384R1];
    asks_again.provider = Arc::new(CryptoProvider { kx_groups: groups, ..CryptoProvider::clone(&asks_again.provider) });
    let servers = [tls12, tls13, asks_again.server(&[]).unwrap()];
    let suffix = ".default.dc1.internal.x.consul";
    let longest = "a".repeat(255 - suffix.len());
    for service in
        ["web", &"a".repeat(64), &longest, "a b", "-a", "a-", "a@b", "a:b", "grün", ".", "a..b", "*", "\u{1}"]
    {
        let name = format!("{service}{suffix}");
        let client = ca.credentials("web").client(&name, vec![id("db")], &[]).unwrap();
        assert!(sends(&client, &name).await, "{name}");
        for (server, full) in
            servers.iter().zip([HandshakeKind::Full, HandshakeKind::Full, HandshakeKind::FullWithHelloRetryRequest])
        {
            let client = client.offering(&[]);
            assert_eq!(reconnect(&client, server).await, full, "{name}");
            assert_eq!(reconnect(&client, server).await, HandshakeKind::Resumed, "{name}");
        }
    }
}

/// Whether its hello holds the name as a name of a host.
async fn sends(client: &Client, name: &str) -> bool {
    let (near, mut far) = duplex(64 * 1024);
    let mut hello = Vec::with_capacity(4096);
    tokio::select! {
        _ = Stream::connect(near, client) => unreachable!("nobody answers"),
        read = far.read_buf(&mut hello) => assert!(read.unwrap() > 0),
    }
    let length = u16::try_from(name.len()).unwrap().to_be_bytes();
    let named = [&[0], &length[..], name.as_bytes()].concat();
    hello.windows(named.len()).any(|part| part == named)
}

#[tokio::test]
async fn a_name_that_cannot_be_sent_is_left_out() {
    let ca = Ca::new();
    let server = server(&ca, "db");
    for name in ["", "a\0b", "a b.", ".", &"a".repeat(256)] {
        let client = ca.credentials("web").client(name, vec![id("db")], &[]).unwrap();
        let (near, far) = shake(&client, &server).await;
        assert!(near.is_ok() && far.is_ok() && matches!(client.name(), ServerName::IpAddress(_)), "{name:?}");
    }
}

#[tokio::test]
async fn garbage_gets_an_alert_and_a_silent_peer_is_told_apart() {
    let ca = Ca::new();
    let server = server(&ca, "db");
    let (mut near, far) = duplex(64 * 1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(Stream::accept(far, server.config([])).await, Err(HandshakeError::Tls(_))));
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer.first(), Some(&21), "an alert record");

    let (near, far) = duplex(64 * 1024);
    drop(near);
    assert!(matches!(Stream::accept(far, server.config([])).await, Err(HandshakeError::Silent)));
}

#[tokio::test]
async fn a_peer_whose_record_cannot_be_opened_gets_an_alert() {
    let ca = Ca::new();
    let (near, far) = shake(&client(&ca, "web", "db"), &server(&ca, "db")).await;
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    // A record of application data that nobody has sealed.
    near.io.write_all(&[&[23, 3, 3, 0, 32][..], &[7; 32]].concat()).await.unwrap();
    async fn open(stream: &mut Stream<DuplexStream>) -> String {
        loop {
            let opened = std::future::poll_fn(|cx| with_scratch(|scratch| stream.poll_open(cx, scratch))).await;
            if let Err(error) = opened {
                return error.to_string();
            }
        }
    }
    open(&mut far).await;
    let error = open(&mut near).await;
    assert!(error.contains("BadRecordMac"), "{error}");
}

#[test]
fn application_protocols_are_named_only_where_they_overlap() {
    let server = Ca::new().credentials("db").server(&[b"h2", b"http/1.1"]).unwrap();
    let offered = |names: &[&'static [u8]]| server.config(names.iter().copied()).alpn_protocols.len();
    assert_eq!((offered(&[b"h2"]), offered(&[b"spdy"]), offered(&[])), (2, 0, 0));
}

#[test]
fn nothing_secret_is_shown() {
    let ca = Ca::new();
    let credentials = ca.credentials("web");
    let shown = format!("{credentials:?} {:?}", credentials.client("x.consul", vec![id("db")], &[]).unwrap());
    assert!(!shown.contains("PRIVATE") && !shown.contains("key"), "{shown}");
}

#[tokio::test]
async fn versions_and_suites_are_what_the_mesh_allows() {
    const AES_256: &str = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384";
    let ca = Ca::new();
    let side = |versions, suites: &[&str]| Parameters {
        versions,
        cipher_suites: suites.iter().map(ToString::to_string).collect(),
    };
    let both = || side(Versions::Both, &[]);
    for (server, client, agreed) in [
        (both(), both(), Some(("TLSv1_3", "TLS13_AES_128_GCM_SHA256"))),
        (side(Versions::Tls12, &[]), both(), Some(("TLSv1_2", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"))),
        (both(), side(Versions::Tls12, &[AES_256]), Some(("TLSv1_2", AES_256))),
        (side(Versions::Tls12, &[AES_256]), both(), Some(("TLSv1_2", AES_256))),
        (side(Versions::Both, &[AES_256]), both(), Some(("TLSv1_3", "TLS13_AES_128_GCM_SHA256"))),
        (side(Versions::Tls13, &[]), side(Versions::Tls12, &[]), None),
    ] {
        let policy = |incoming: &Parameters, outgoing: &Parameters| Policy {
            incoming: incoming.clone(),
            outgoing: outgoing.clone(),
        };
        // What is asked of the other direction must not count.
        let other = side(Versions::Tls12, &["TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"]);
        let far = ca.credentials("db").under(policy(&server, &other)).server(&[]).unwrap();
        let near = ca.credentials("web").under(policy(&other, &client)).client("x", vec![id("db")], &[]).unwrap();
        let got = match shake(&near, &far).await {
            (Ok(near), Ok(_)) => Some(near.agreed()),
            _ => None,
        };
        let agreed = agreed.map(|(version, suite)| (version.to_owned(), suite.to_owned()));
        assert_eq!(got, agreed, "{server:?} {client:?}");
    }
    assert!(is_known_suite(AES_256) && !is_known_suite("TLS_RSA_WITH_AES_128_CBC_SHA"));
    assert!(!is_known_suite("TLS13_AES_128_GCM_SHA256"));
}
