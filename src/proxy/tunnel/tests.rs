use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::drain::Stage;
use crate::proxy::fixture::*;
use crate::snapshot::{
    Action, InboundListener, LocalApp, Node, Protocol, Resolver, Service, Target, Transport, Upstream,
};
use crate::testing::ca::{TRUST_DOMAIN, uri};
use crate::tls::{Credentials, Parameters, Policy, TUNNEL, TUNNEL_1, TUNNEL_2, TUNNELS, Versions};

/// Sidecars have two threads here, and each thread its own sessions.
const THREADS: usize = 2;
const VERSIONS: [Version; 3] = [Version::V1, Version::V2, Version::V3];

fn piece(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

#[test]
fn pieces_are_put_together_however_they_are_cut() {
    let (end, start) = (END.to_be_bytes(), START.to_be_bytes());
    let long = vec![7; 70_000];
    let first = [&piece(b"a")[..], &piece(&long), &piece(b"bc"), &end, &start].concat();
    let second = [&piece(b"second")[..], &end].concat();
    let cuts = [1, 2, 3, 5, 4096, first.len()];
    for (cut, version) in cuts.into_iter().flat_map(|cut| VERSIONS.map(|version| (cut, version))) {
        let (mut incoming, mut opened) = (Incoming::new(Role::Server, version), Vec::new());
        if version.asks() {
            start.chunks(cut).for_each(|part| incoming.take(part, &mut opened));
            assert!(incoming.phase == Phase::Requested && opened.is_empty(), "cut at {cut}");
            incoming.phase = Phase::Carrying;
        }
        first.chunks(cut).for_each(|part| incoming.take(part, &mut opened));
        assert!(incoming.phase == Phase::Requested && opened == [b"a", &long[..], b"bc"].concat(), "cut at {cut}");
        (incoming.phase, opened) = (Phase::Carrying, Vec::new());
        second.chunks(cut).for_each(|part| incoming.take(part, &mut opened));
        assert!(incoming.phase == Phase::Ended && opened == b"second", "cut at {cut}");
    }
}

#[test]
fn what_makes_no_sense_is_noticed_and_nothing_after_it_is_taken() {
    let word = |word: u32| word.to_be_bytes().to_vec();
    for (role, sent) in [
        // A connection within a connection.
        (Role::Server, word(START)),
        (Role::Client, word(START)),
        // Bytes, or an end, of no connection.
        (Role::Server, [word(END), piece(b"more")].concat()),
        (Role::Server, [word(END), word(END)].concat()),
        (Role::Client, [word(END), word(END)].concat()),
        // An answer to no question.
        (Role::Client, [word(END), word(START)].concat()),
        (Role::Client, word(REFUSED)),
        (Role::Server, word(REFUSED)),
        // Bytes before the answer, and two questions.
        (Role::Server, [word(END), word(START), piece(b"early")].concat()),
        (Role::Server, [word(END), word(START), word(START)].concat()),
    ] {
        for version in [Version::V1, Version::V2] {
            let (mut incoming, mut opened) = (Incoming::new(role, version), Vec::new());
            // As the first of version 1 begins.
            incoming.phase = Phase::Carrying;
            incoming.take(&[sent.clone(), piece(b"and on")].concat(), &mut opened);
            assert_eq!((incoming.phase, opened.len()), (Phase::Broken, 0), "{role:?} {sent:?}");
        }
    }
    // Before anything was asked for, and with an answer that is none.
    for (role, phase, version, sent) in [
        (Role::Server, Phase::Ended, Version::V2, piece(b"unasked")),
        (Role::Server, Phase::Ended, Version::V2, word(END)),
        (Role::Client, Phase::Ended, Version::V2, word(START)),
        (Role::Client, Phase::Awaiting, Version::V2, piece(b"early")),
        (Role::Client, Phase::Awaiting, Version::V2, word(END)),
        (Role::Client, Phase::Awaiting, Version::V1, [word(REFUSED), piece(b"a")].concat()),
        (Role::Client, Phase::Awaiting, Version::V2, [word(REFUSED), word(0)].concat()),
        (Role::Client, Phase::Awaiting, Version::V2, [word(REFUSED), word(REASON + 1)].concat()),
        (Role::Client, Phase::Awaiting, Version::V2, [word(REFUSED), word(START)].concat()),
        (Role::Client, Phase::Awaiting, Version::V2, [word(REFUSED), piece(b"a"), word(START)].concat()),
        // A reason for the end of a connection, in versions that know none, from a client, and too late.
        (Role::Client, Phase::Carrying, Version::V1, [word(REFUSED), piece(b"a")].concat()),
        (Role::Client, Phase::Carrying, Version::V2, [word(REFUSED), piece(b"a")].concat()),
        (Role::Server, Phase::Carrying, Version::V3, [word(REFUSED), piece(b"a")].concat()),
        (Role::Client, Phase::Ended, Version::V3, [word(REFUSED), piece(b"a")].concat()),
        // No reason, one that is too long, and anything behind it.
        (Role::Client, Phase::Carrying, Version::V3, [word(REFUSED), word(0)].concat()),
        (Role::Client, Phase::Carrying, Version::V3, [word(REFUSED), word(REASON + 1)].concat()),
        (Role::Client, Phase::Carrying, Version::V3, [word(REFUSED), piece(b"a"), word(END)].concat()),
        (Role::Client, Phase::Carrying, Version::V3, [word(REFUSED), piece(b"a"), piece(b"more")].concat()),
    ] {
        let (mut incoming, mut opened) = (Incoming::new(role, version), Vec::new());
        incoming.phase = phase;
        incoming.take(&[sent.clone(), piece(b"and on")].concat(), &mut opened);
        assert_eq!((incoming.phase, opened.len()), (Phase::Broken, 0), "{role:?} {phase:?} {sent:?}");
    }
}

#[test]
fn a_reason_may_be_longer_than_this_version_knows() {
    for (reason, known) in [
        (&[1][..], Reason::Denied),
        (&[2, 9, 9], Reason::NoApp),
        (&[3; 255], Reason::Full),
        (&[77], Reason::Other),
        (&[0], Reason::Other),
    ] {
        let sent = [REFUSED.to_be_bytes().to_vec(), piece(reason)].concat();
        for cut in [1, 3, sent.len()] {
            for version in [Version::V2, Version::V3] {
                let (mut incoming, mut opened) = (Incoming::new(Role::Client, version), Vec::new());
                incoming.phase = Phase::Awaiting;
                sent.chunks(cut).for_each(|part| incoming.take(part, &mut opened));
                assert_eq!((Refusal::decode(incoming.reason().unwrap(), version).reason, opened.len()), (known, 0));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_tunnel_is_offered_again_after_a_while() {
    let sessions = Sessions::default();
    assert!(!sessions.are_refused());
    sessions.refuse();
    assert!(sessions.are_refused());
    tokio::time::advance(REFUSED_TIME).await;
    assert!(!sessions.are_refused());
}

/// What stands between the sidecars: it counts connections, cuts them, and holds back what they carry.
struct Gate {
    at: SocketAddr,
    count: Arc<AtomicUsize>,
    open: Arc<Mutex<JoinSet<()>>>,
    holds: watch::Sender<bool>,
    held: Arc<AtomicUsize>,
}

impl Gate {
    async fn before(to: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = listener.local_addr().unwrap();
        let (count, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(JoinSet::new())));
        let (counted, opened) = (Arc::clone(&count), Arc::clone(&open));
        let (holds, held) = (watch::channel(false).0, Arc::new(AtomicUsize::new(0)));
        let gate = Self { at, count, open, holds: holds.clone(), held: Arc::clone(&held) };
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, Ordering::SeqCst);
                let (holds, held) = (holds.clone(), Arc::clone(&held));
                opened.lock().unwrap().spawn(async move {
                    let Ok(mut far) = TcpStream::connect(to).await else { return };
                    let (near_reader, near_writer) = near.split();
                    let (far_reader, far_writer) = far.split();
                    let asked = pass(near_reader, far_writer, &holds, &held);
                    let _ = tokio::try_join!(asked, pass(far_reader, near_writer, &holds, &held));
                });
            }
        });
        gate
    }

    /// Connections that have something held back, or had since this was asked last.
    fn held(&self) -> usize {
        self.held.swap(0, Ordering::SeqCst)
    }

    /// Connections since this was asked last.
    fn count(&self) -> usize {
        self.count.swap(0, Ordering::SeqCst)
    }

    fn cut(&self) {
        self.open.lock().unwrap().abort_all();
    }
}

/// Copies one direction of a connection, but for the times in which it is held back.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    holds: &watch::Sender<bool>,
    held: &AtomicUsize,
) -> io::Result<()> {
    let (mut bytes, mut holds) = (vec![0; 4096], holds.subscribe());
    loop {
        let read = from.read(&mut bytes).await?;
        if *holds.borrow_and_update() {
            held.fetch_add(1, Ordering::SeqCst);
        }
        let _ = holds.wait_for(|holds| !holds).await;
        match read {
            0 => return to.shutdown().await,
            read => to.write_all(&bytes[..read]).await?,
        }
    }
}

/// An app that gives back what comes.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    at
}

struct Pair {
    server: Sidecar,
    client: Sidecar,
    gate: Gate,
    app: SocketAddr,
    mesh: SocketAddr,
    at: SocketAddr,
}

impl Pair {
    async fn start() -> Self {
        Self::with(|listener| listener).await
    }

    async fn with(change: impl FnOnce(InboundListener) -> InboundListener) -> Self {
        let (app, mesh, at) = (echo().await, free(), free());
        let gate = Gate::before(mesh).await;
        let server = Sidecar::start(with_inbound(change(inbound(mesh, service(Protocol::Tcp, app)))));
        let client = Sidecar::start(with_upstream(at, upstream(Protocol::Tcp, &[gate.at])));
        listening(mesh).await;
        listening(at).await;
        let pair = Self { server, client, gate, app, mesh, at };
        // What looked whether it listens was carried, too.
        timeout(TEST_TIMEOUT, async { while !pair.reaches().await {} }).await.unwrap();
        pair
    }

    /// Whether a new connection carries bytes there and back, and an end both ways.
    async fn reaches(&self) -> bool {
        let asked = async {
            let mut stream = TcpStream::connect(self.at).await?;
            stream.write_all(b"question").await?;
            stream.shutdown().await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            io::Result::Ok(answer == b"question")
        };
        timeout(TEST_TIMEOUT, asked).await.expect("it ends in time").unwrap_or(false)
    }

    /// A connection that is carried. What ended before may count for a moment longer.
    async fn open(&self) -> TcpStream {
        let open = async {
            loop {
                let mut stream = TcpStream::connect(self.at).await.unwrap();
                if stream.write_all(b"open").await.is_ok() && stream.read_exact(&mut [0; 4]).await.is_ok() {
                    return stream;
                }
            }
        };
        timeout(TEST_TIMEOUT, open).await.expect("it is opened in time")
    }

    /// Both threads have a session, or one of them has had all connections.
    async fn warm(&self) {
        for _ in 0..20 {
            assert!(self.reaches().await);
        }
        self.gate.count();
    }

    /// Publishes the service as it is now, changed.
    fn change(&self, change: impl FnOnce(&mut Service)) {
        let snapshot = self.server.snapshot.borrow().clone().unwrap();
        let old = snapshot.inbound.values().next().unwrap();
        let mut service = Service { tls: Arc::clone(&old.service.tls), ..service(Protocol::Tcp, self.app) };
        change(&mut service);
        self.server.snapshot.send_replace(Some(Arc::new(with_service(self.mesh, service))));
    }
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut is: impl FnMut() -> F) {
    let look = async {
        while !is().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TEST_TIMEOUT, look).await.expect(what);
}

#[tokio::test]
async fn one_connection_after_another_takes_the_same_session() {
    let pair = Pair::start().await;
    let before = pair.gate.count();
    for _ in 0..50 {
        assert!(pair.reaches().await);
    }
    let made = pair.gate.count();
    assert!(made <= THREADS);
    // Those that are open at one time have one each.
    let mut open = Vec::new();
    for _ in 0..10 {
        open.push(pair.open().await);
    }
    assert!(before + made + pair.gate.count() >= open.len());
}

#[tokio::test]
async fn either_version_of_tls_will_do() {
    let pair = Pair::start().await;
    for versions in [Versions::Tls12, Versions::Tls13] {
        let incoming = Parameters { versions, ..Parameters::default() };
        let credentials = CA.credentials("db").under(Policy { incoming, ..Policy::default() });
        pair.gate.count();
        pair.change(|service| service.tls = credentials.server(TUNNELS).unwrap());
        eventually("a session is made", async || pair.reaches().await && pair.gate.count() > 0).await;
        pair.warm().await;
        for _ in 0..20 {
            assert!(pair.reaches().await);
        }
        assert!(pair.gate.count() <= THREADS);
    }
}

#[tokio::test]
async fn each_connection_of_a_session_is_judged_by_itself() {
    let pair = Pair::start().await;
    pair.warm().await;
    let mut open = pair.open().await;
    pair.change(|service| service.intentions = allowing(Action::Deny));
    let ended = timeout(Duration::from_secs(1), open.read(&mut [0; 4])).await.expect("it is cut within a second");
    assert_eq!(ended.unwrap(), 0);
    eventually("it is refused", async || !pair.reaches().await).await;
    for _ in 0..10 {
        assert!(!pair.reaches().await);
    }
    pair.change(|_| {});
    eventually("it is allowed again", async || pair.reaches().await).await;
    pair.warm().await;
}

#[tokio::test]
async fn new_credentials_of_either_side_mean_new_sessions_and_no_connection_fails() {
    let pair = Pair::start().await;
    pair.warm().await;
    for _ in 0..3 {
        pair.change(|service| service.tls = CA.credentials("db").server(&[TUNNEL]).unwrap());
        eventually("another session is made", async || {
            assert!(pair.reaches().await);
            pair.gate.count() > 0
        })
        .await;
        pair.warm().await;
        let renewed = upstream(Protocol::Tcp, &[pair.gate.at]);
        pair.client.snapshot.send_replace(Some(Arc::new(with_upstream(pair.at, renewed))));
        eventually("another session is made", async || {
            assert!(pair.reaches().await);
            pair.gate.count() > 0
        })
        .await;
        pair.warm().await;
    }
}

#[tokio::test]
async fn a_session_that_died_while_it_was_kept_costs_no_connection() {
    let pair = Pair::start().await;
    for _ in 0..10 {
        pair.warm().await;
        pair.gate.cut();
        for _ in 0..4 {
            assert!(pair.reaches().await);
        }
    }
}

/// As a sidecar that is stopped has them: its host takes what comes, and nothing is answered.
#[tokio::test]
async fn a_session_that_is_silent_when_it_is_asked_holds_up_no_connection() {
    let (silent, other) = (Pair::start().await, Pair::start().await);
    let at = free();
    let mut upstream = upstream(Protocol::Tcp, &[silent.gate.at, other.gate.at]);
    // Whoever waits for a part of it waits for longer than anything here may take.
    change_target(&mut upstream, |target| target.connect_timeout = TEST_TIMEOUT * 12);
    let client = Sidecar::start(with_upstream(at, upstream));
    listening(at).await;
    let pair = Pair { at, client, ..other };
    let mut kept = 0;
    for _ in 0..5 {
        for _ in 0..20 {
            assert!(pair.reaches().await);
        }
        silent.gate.count();
        silent.gate.held();
        silent.gate.holds.send_replace(true);
        // One of the two is picked at random, until one that waits is told by its load.
        eventually("the silent one is asked", async || pair.reaches().await && silent.gate.held() > 0).await;
        kept += usize::from(silent.gate.count() == 0);
        for _ in 0..5 {
            assert!(pair.reaches().await);
        }
        silent.gate.holds.send_replace(false);
    }
    assert!(kept > 0, "on a session that was kept");
}

#[tokio::test]
async fn a_connection_that_breaks_takes_its_session_along() {
    let pair = Pair::start().await;
    pair.warm().await;
    let open = pair.open().await;
    pair.gate.count();
    Socket::tcp(open).abort();
    for _ in 0..10 {
        assert!(pair.reaches().await);
    }
    let mut open = pair.open().await;
    pair.gate.cut();
    let broken = timeout(TEST_TIMEOUT, open.read(&mut [0; 4])).await.unwrap();
    assert!(matches!(broken, Ok(0) | Err(_)));
    pair.warm().await;
}

#[tokio::test]
async fn sessions_that_are_kept_hold_up_no_drain() {
    let pair = Pair::start().await;
    pair.warm().await;
    // Before a session would be given up for being free.
    let at_once = SERVER_IDLE_TIME / 2;
    pair.server.trigger.advance(Stage::Draining);
    timeout(at_once, pair.server.trigger.drained()).await.expect("the server's sidecar is done");
    assert!(!pair.reaches().await);
    pair.client.trigger.advance(Stage::Draining);
    timeout(at_once, pair.client.trigger.drained()).await.expect("the client's sidecar is done");
}

#[tokio::test]
async fn a_connection_without_an_app_ends_and_the_next_one_with_it_does_not() {
    let pair = Pair::start().await;
    pair.warm().await;
    let nowhere = LocalApp::Tcp(address(free()));
    pair.change(|service| service.local_app = nowhere);
    eventually("there is no app", async || !pair.reaches().await).await;
    let mut stream = TcpStream::connect(pair.at).await.unwrap();
    let ended = timeout(TEST_TIMEOUT, stream.read(&mut [0; 4])).await.expect("it ends");
    assert_eq!(ended.unwrap(), 0, "cleanly");
    pair.change(|_| {});
    eventually("there is one again", async || pair.reaches().await).await;
    pair.warm().await;
}

#[tokio::test]
async fn a_limit_counts_connections_and_not_sessions_that_are_kept() {
    let pair = Pair::with(|listener| InboundListener { max_connections: Some(2), ..listener }).await;
    let (one, two) = (pair.open().await, pair.open().await);
    assert!(!pair.reaches().await);
    drop((one, two));
    // Were sessions counted, each would have to wait until one is given up after seconds.
    let ten = async {
        for _ in 0..10 {
            eventually("there is room again", async || pair.reaches().await).await;
        }
    };
    timeout(TEST_TIMEOUT, ten).await.expect("only connections take room");
}

fn change_target(upstream: &mut Upstream, change: impl FnOnce(&mut Target)) {
    let Node::Resolver(resolver) = &upstream.chain.start else { unreachable!("it was built so") };
    let old = &resolver.targets[0];
    let mut target = Target {
        id: old.id.clone(),
        service: old.service.clone(),
        datacenter: old.datacenter.clone(),
        customization_hash: String::new(),
        transport: old.transport.clone(),
        connect_timeout: old.connect_timeout,
        endpoints: Arc::clone(&old.endpoints),
    };
    change(&mut target);
    upstream.chain.start = Node::Resolver(Arc::new(Resolver::new(vec![Arc::new(target)])));
}

#[tokio::test]
async fn a_certificate_that_has_expired_opens_nothing_more() {
    let pair = Pair::start().await;
    let leaf = CA.leaf_with(&[&uri("web")], -60, 3);
    let roots = [CA.pem.clone()];
    let credentials =
        Credentials::new(TRUST_DOMAIN, &roots, &leaf.cert_pem, &leaf.key_pem, "web", SystemTime::now()).unwrap();
    let mut expiring = upstream(Protocol::Tcp, &[pair.gate.at]);
    let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
    let tls = credentials.client("db.x.consul", expected, TUNNELS).unwrap();
    change_target(&mut expiring, |target| target.transport = Transport::Mesh(tls));
    pair.gate.count();
    pair.client.snapshot.send_replace(Some(Arc::new(with_upstream(pair.at, expiring))));
    eventually("its sessions are in use", async || pair.reaches().await && pair.gate.count() > 0).await;
    eventually("it is refused", async || !pair.reaches().await).await;
    assert!(!pair.reaches().await);
}

/// An instance that is no sidecar of ours: `answer` says how it shakes hands.
async fn instance(alpn: &'static [&'static [u8]]) -> Gate {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    let server = CA.credentials("db").server(alpn).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                // Insists on its protocols where the client offers any, unlike a listener of ours.
                let config = server.config(alpn.iter().copied());
                let Ok(mut tls) = Stream::accept(stream, config).await else { return };
                let text = poll_fn(|cx| {
                    with_scratch(|scratch| {
                        ready!(tls.poll_open(cx, scratch))?;
                        Poll::Ready(io::Result::Ok(scratch.opened.clone()))
                    })
                });
                let text = text.await.unwrap();
                poll_fn(|cx| Poll::Ready(with_scratch(|scratch| tls.poll_seal(cx, scratch, &text)))).await.unwrap();
                tls.close();
                let _ = poll_fn(|cx| tls.poll_flush(cx)).await;
            });
        }
    });
    Gate::before(at).await
}

#[tokio::test]
async fn whoever_knows_no_tunnel_is_spoken_to_as_ever() {
    const PROTOCOLS: [&[&[u8]]; 2] = [&[], &[b"h2"]];
    for alpn in PROTOCOLS {
        let (gate, at) = (instance(alpn).await, free());
        let _client = Sidecar::start(with_upstream(at, upstream(Protocol::Tcp, &[gate.at])));
        listening(at).await;
        for _ in 0..5 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(b"as it is").await.unwrap();
            let mut answer = String::new();
            timeout(TEST_TIMEOUT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
            assert_eq!(answer, "as it is", "with {alpn:?}");
        }
        gate.count();
        TcpStream::connect(at).await.unwrap().shutdown().await.unwrap();
        // One that refused the offer is not asked again.
        eventually("it has one session for each", async || gate.count.load(Ordering::SeqCst) == 1).await;
    }
}

#[tokio::test]
async fn a_client_that_speaks_nonsense_is_cut_and_harms_nobody() {
    let pair = Pair::start().await;
    let word = |word: u32| word.to_be_bytes().to_vec();
    let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
    for (version, nonsense) in [
        (TUNNEL_1, word(START)),
        (TUNNEL_1, [word(END), word(END)].concat()),
        (TUNNEL_1, [word(END), piece(b"late")].concat()),
        (TUNNEL_1, [word(END), word(START), piece(b"early")].concat()),
        (TUNNEL_1, [piece(b"x"), word(START)].concat()),
        (TUNNEL, word(END)),
        (TUNNEL, word(REFUSED)),
        (TUNNEL, [word(START), word(REFUSED), piece(b"1")].concat()),
        (TUNNEL, piece(b"x")),
        (TUNNEL, [word(START), piece(b"early")].concat()),
        (TUNNEL, [word(START), word(START)].concat()),
    ] {
        let socket = TcpStream::connect(pair.mesh).await.unwrap();
        let client = CA.credentials("web").client("db.x.consul", expected.clone(), &[version]).unwrap();
        let mut tls = Stream::connect(socket, &client).await.unwrap();
        assert_eq!(tls.alpn(), Some(version));
        poll_fn(|cx| Poll::Ready(with_scratch(|scratch| tls.poll_seal(cx, scratch, &nonsense)))).await.unwrap();
        let ended = async {
            while tls.read_side() == ReadSide::Open {
                if poll_fn(|cx| with_scratch(|scratch| tls.poll_open(cx, scratch))).await.is_err() {
                    return;
                }
            }
        };
        timeout(SERVER_IDLE_TIME / 2, ended).await.unwrap_or_else(|_| panic!("{nonsense:?} ends it"));
        assert!(pair.reaches().await);
    }
}

/// The server's side, or the client's, knows only earlier versions.
#[tokio::test]
async fn each_version_of_the_tunnel_will_do() {
    for known in [&[TUNNEL_1][..], &[TUNNEL_2, TUNNEL_1]] {
        let pair = Pair::start().await;
        pair.gate.count();
        pair.change(|service| service.tls = CA.credentials("db").server(known).unwrap());
        eventually("a session is made", async || pair.reaches().await && pair.gate.count() > 0).await;
        pair.warm().await;
        for _ in 0..20 {
            assert!(pair.reaches().await);
        }
        assert!(pair.gate.count() <= THREADS);
        pair.change(|_| {});
        assert_eq!(pair.cut_by_a_deny(known).await, None, "no reason is given to who knows none");
    }
}

#[tokio::test]
async fn a_server_says_why_an_open_connection_ends() {
    let pair = Pair::start().await;
    assert_eq!(pair.cut_by_a_deny(TUNNELS).await, Some(Refusal::denied(None)));
    let sharing = |service: &mut Service| service.share_denial_rule = true;
    pair.change(sharing);
    let refusal = pair.cut_by_a_deny_of(TUNNELS, sharing).await.unwrap();
    assert!(refusal.reason == Reason::Denied && refusal.to_string().contains("names the rule"), "{refusal}");
}

impl Pair {
    async fn cut_by_a_deny(&self, known: &[&[u8]]) -> Option<Refusal> {
        self.cut_by_a_deny_of(known, |_| {}).await
    }

    /// The reason that a client of these versions is given when a deny ends its connection, which ends in order.
    async fn cut_by_a_deny_of(&self, known: &[&[u8]], change: impl Fn(&mut Service)) -> Option<Refusal> {
        let mut mesh = eventually_some(async || {
            let mut mesh = session(self, known).await;
            timeout(TEST_TIMEOUT, begin(&mut mesh)).await.unwrap().then_some(mesh)
        })
        .await;
        self.change(|service| {
            change(service);
            service.intentions = allowing(Action::Deny);
        });
        let ended = async {
            while !mesh.has_ended() {
                poll_fn(|cx| with_scratch(|scratch| mesh.poll_piece(cx, scratch, 0))).await.expect("it ends in order");
            }
        };
        timeout(TEST_TIMEOUT, ended).await.unwrap();
        assert!(!mesh.is_free());
        mesh.refusal()
    }
}

/// A session with the server for a client that knows these versions.
async fn session(pair: &Pair, known: &[&[u8]]) -> MeshStream<Socket> {
    let socket = Socket::tcp(TcpStream::connect(pair.mesh).await.unwrap());
    let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
    let client = CA.credentials("web").client("db.x.consul", expected, known).unwrap();
    MeshStream::new(Stream::connect(socket, &client).await.unwrap(), Role::Client)
}

/// Whether a connection begins that carries bytes.
async fn begin(mesh: &mut MeshStream<Socket>) -> bool {
    if mesh.is_free() && !matches!(mesh.start().await, Ok(Ok(()))) {
        return false;
    }
    let sent = poll_fn(|cx| Poll::Ready(with_scratch(|scratch| mesh.tls.poll_seal(cx, scratch, &piece(b"open")))));
    if sent.await.is_err() {
        return false;
    }
    let mut answered = 0;
    while answered < 4 && !mesh.has_ended() {
        let read = poll_fn(|cx| {
            with_scratch(|scratch| {
                let piece = ready!(mesh.poll_piece(cx, scratch, 0))?;
                Poll::Ready(io::Result::Ok(scratch.plaintext(piece).len()))
            })
        });
        let Ok(read) = read.await else { return false };
        answered += read;
    }
    answered == 4
}

async fn eventually_some<T>(mut get: impl AsyncFnMut() -> Option<T>) -> T {
    let look = async {
        loop {
            if let Some(found) = get().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TEST_TIMEOUT, look).await.expect("it is there in time")
}

/// How a client of this version sees what the server answers to its question.
async fn asked(pair: &Pair) -> Result<(), Reason> {
    let mut mesh = session(pair, TUNNELS).await;
    assert!(mesh.is_free() && mesh.answers_for_app());
    timeout(TEST_TIMEOUT, mesh.start()).await.unwrap().unwrap().map_err(|refusal| refusal.reason)
}

#[tokio::test]
async fn a_server_says_why_no_connection_begins() {
    let pair = Pair::with(|listener| InboundListener { max_connections: Some(100), ..listener }).await;
    assert_eq!(asked(&pair).await, Ok(()));
    pair.change(|service| service.intentions = allowing(Action::Deny));
    eventually("it is denied", async || asked(&pair).await == Err(Reason::Denied)).await;
    pair.change(|service| service.local_app = LocalApp::Tcp(address(free())));
    eventually("there is no app", async || asked(&pair).await == Err(Reason::NoApp)).await;
    pair.change(|_| {});
    eventually("it is allowed again", async || asked(&pair).await == Ok(())).await;
}

#[tokio::test]
async fn an_instance_without_its_app_fails_nobody_and_is_used_again() {
    let (dead, live) = (Pair::start().await, Pair::start().await);
    let at = free();
    let client = Sidecar::start(with_upstream(at, upstream(Protocol::Tcp, &[dead.mesh, live.mesh])));
    dead.change(|service| service.local_app = LocalApp::Tcp(address(free())));
    eventually("there is no app", async || asked(&dead).await == Err(Reason::NoApp)).await;
    listening(at).await;
    let pair = Pair { at, client, ..live };
    for _ in 0..100 {
        assert!(pair.reaches().await);
    }
    dead.change(|_| {});
    // Only the instance that was dead is left: it is in use again without anybody's failing first.
    tokio::time::sleep(Duration::from_secs(5)).await;
    pair.change(|service| service.local_app = LocalApp::Tcp(address(free())));
    eventually("the other is dead now", async || asked(&pair).await == Err(Reason::NoApp)).await;
    for _ in 0..20 {
        assert!(pair.reaches().await);
    }
}

#[tokio::test]
async fn who_is_denied_is_not_led_to_another_instance() {
    let (denying, other) = (Pair::start().await, Pair::start().await);
    let at = free();
    let client = Sidecar::start(with_upstream(at, upstream(Protocol::Tcp, &[denying.mesh, other.mesh])));
    for pair in [&denying, &other] {
        pair.change(|service| service.intentions = allowing(Action::Deny));
        eventually("it is denied", async || asked(pair).await == Err(Reason::Denied)).await;
    }
    listening(at).await;
    let pair = Pair { at, client, ..other };
    for _ in 0..10 {
        assert!(!pair.reaches().await);
    }
    // A denial says nothing of an instance: both are used at once when they allow it.
    for pair in [&denying, &pair] {
        pair.change(|_| {});
        eventually("it is allowed", async || asked(pair).await == Ok(())).await;
    }
    for _ in 0..20 {
        assert!(pair.reaches().await);
    }
}
