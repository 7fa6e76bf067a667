use std::sync::LazyLock;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, yield_now};

use super::*;
use crate::proxy::tunnel::{MeshStream, Role};
use crate::stats::Registry;
use crate::stats::scope::{Cluster, Listener};
use crate::testing::ca::{Ca, uri};
use crate::tls::{SpiffeId, TUNNEL, TUNNEL_1};

/// Without and with a tunnel.
const FORMS: [&[&[u8]]; 3] = [&[], &[TUNNEL_1], &[TUNNEL]];

static CA: LazyLock<Ca> = LazyLock::new(Ca::new);

/// What a relay counts for.
fn counters() -> (Arc<ListenerStats>, Arc<ClusterStats>) {
    let registry = Registry::default();
    (registry.listener(Listener::Public, String::new(), false), registry.cluster(&Cluster::LocalApp))
}

fn new_relay() -> Relay {
    let (listener, cluster) = counters();
    Relay::new(&listener, &cluster)
}

/// The plain ends of a pair of relays with TLS between them, as two sidecars make it.
async fn pair(buffer: usize, alpn: &'static [&'static [u8]]) -> (DuplexStream, DuplexStream) {
    let (client, near) = duplex(buffer);
    let (server, far) = duplex(buffer);
    let (left, right) = duplex(buffer);
    tokio::spawn(relay_as(Role::Client, alpn, near, left));
    tokio::spawn(relay_as(Role::Server, alpn, far, right));
    (client, server)
}

async fn relay_as<P, T>(role: Role, alpn: &[&[u8]], mut plain: P, wire: T) -> Result<(), Broken>
where
    P: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut mesh = session(role, alpn, wire).await;
    match role {
        Role::Client => new_relay().run(&mut plain, &mut mesh).await,
        Role::Server => new_relay().run(&mut mesh, &mut plain).await,
    }
}

/// One end of a session, with a connection on it.
async fn session<T: AsyncRead + AsyncWrite + Unpin>(role: Role, alpn: &[&[u8]], wire: T) -> MeshStream<T> {
    let tls = match role {
        Role::Client => {
            let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
            let client = CA.credentials("web").client("db.x.consul", expected, alpn).unwrap();
            Stream::connect(wire, &client).await.unwrap()
        }
        Role::Server => {
            let server = CA.credentials("db").server(alpn).unwrap();
            Stream::accept(wire, server.config(alpn.iter().copied())).await.unwrap()
        }
    };
    let mut mesh = MeshStream::new(tls, role);
    if mesh.is_free() {
        match role {
            Role::Client => mesh.start().await.unwrap().unwrap(),
            Role::Server => {
                mesh.requested().await.unwrap();
                mesh.accept().await.unwrap();
            }
        }
    }
    mesh
}

#[tokio::test]
async fn bytes_come_back_whole_through_any_buffer() {
    for (buffer, alpn) in [1, 7, 4096, 1 << 20].into_iter().flat_map(|buffer| FORMS.map(|alpn| (buffer, alpn))) {
        let (mut client, mut server) = pair(buffer, alpn).await;
        let size = if buffer < 100 { 5_000 } else { 3_000_000 };
        let sent: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
        let echo = tokio::spawn(async move {
            let mut bytes = vec![0; 10_000];
            loop {
                match server.read(&mut bytes).await.unwrap() {
                    0 => break,
                    read => server.write_all(&bytes[..read]).await.unwrap(),
                }
            }
            server.shutdown().await.unwrap();
        });
        let (mut reader, mut writer) = tokio::io::split(client);
        let write = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut received));
        read.unwrap();
        assert!(received == sent, "through {buffer}");
        echo.await.unwrap();
        client = reader.unsplit(writer);
        drop(client);
    }
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    for alpn in FORMS {
        let (mut client, mut server) = pair(4096, alpn).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        server.write_all(b"answer, after the end of the question").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer, after the end of the question");
    }
}

#[tokio::test]
async fn a_reader_that_stops_stops_the_writer() {
    for alpn in FORMS {
        let (mut client, server) = pair(4096, alpn).await;
        let mut taken = 0;
        let chunk = vec![0; 64 * 1024];
        let limit = std::time::Duration::from_millis(200);
        while let Ok(written) = tokio::time::timeout(limit, client.write(&chunk)).await {
            taken += written.unwrap();
            assert!(taken < 4 << 20, "nothing holds the writer back");
        }
        drop(server);
    }
}

#[tokio::test]
async fn a_side_that_breaks_is_named() {
    for alpn in FORMS {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (app, _) = listener.accept().await.unwrap();
        let (left, right) = duplex(4096);
        let (peer, far) = duplex(4096);
        tokio::spawn(relay_as(Role::Server, alpn, far, right));
        let relay = tokio::spawn(relay_as(Role::Client, alpn, Socket::tcp(app), left));
        Socket::tcp(dialled).abort();
        assert_eq!(relay.await.unwrap().unwrap_err().side, Side::Downstream);
        drop(peer);
    }
}

#[tokio::test]
async fn a_tunnel_that_breaks_off_is_no_end_and_one_that_is_closed_is() {
    for closes in [true, false] {
        let (wire, far) = duplex(1 << 16);
        let (mut app, plain) = duplex(1 << 16);
        let relay = tokio::spawn(async move {
            let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
            let client = CA.credentials("web").client("db.x.consul", expected, &[TUNNEL_1]).unwrap();
            let tls = Stream::connect(wire, &client).await.unwrap();
            let mut plain = plain;
            new_relay().run(&mut plain, &mut MeshStream::new(tls, Role::Client)).await
        });
        let server = CA.credentials("db").server(&[TUNNEL_1]).unwrap();
        let mut tls = Stream::accept(far, server.config([TUNNEL_1])).await.unwrap();
        let word = [&3_u32.to_be_bytes()[..], b"abc"].concat();
        poll_fn(|cx| Poll::Ready(with_scratch(|scratch| tls.poll_seal(cx, scratch, &word)))).await.unwrap();
        if closes {
            tls.close();
        }
        poll_fn(|cx| tls.poll_flush(cx)).await.unwrap();
        let mut got = [0; 3];
        app.read_exact(&mut got).await.unwrap();
        let tls = Some(tls).filter(|_| closes);
        app.shutdown().await.unwrap();
        let ended = relay.await.unwrap();
        assert_eq!(ended.is_ok(), closes, "{ended:?}");
        drop(tls);
    }
}

/// What a side of a relay is.
#[derive(Debug, Clone, Copy)]
enum Form {
    Plain,
    /// With these protocols.
    Tls(&'static [&'static [u8]]),
}

const SIDES: [Form; 4] = [Form::Plain, Form::Tls(&[]), Form::Tls(&[TUNNEL_1]), Form::Tls(&[TUNNEL])];

/// Each form of the downstream with each of the upstream.
fn combinations() -> impl Iterator<Item = (Form, Form)> {
    SIDES.into_iter().flat_map(|downstream| SIDES.map(|upstream| (downstream, upstream)))
}

/// A connection of the relay's.
enum Connected<IO> {
    Plain(IO),
    Mesh(Box<MeshStream<IO>>),
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Connected<IO> {
    async fn over(io: IO, form: Form, role: Role) -> Self {
        match form {
            Form::Plain => Self::Plain(io),
            Form::Tls(alpn) => {
                let mut mesh = session(role, alpn, io).await;
                poll_fn(|cx| mesh.tls.poll_flush(cx)).await.unwrap();
                Self::Mesh(Box::new(mesh))
            }
        }
    }

    fn into_io(self) -> IO {
        match self {
            Self::Plain(io) => io,
            Self::Mesh(mesh) => mesh.tls.io,
        }
    }
}

async fn run_between<IO>(relay: &mut Relay, downstream: Connected<IO>, upstream: Connected<IO>) -> Result<(), Broken>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    use Connected::{Mesh, Plain};
    match (downstream, upstream) {
        (Plain(mut downstream), Plain(mut upstream)) => relay.run(&mut downstream, &mut upstream).await,
        (Plain(mut downstream), Mesh(mut upstream)) => relay.run(&mut downstream, &mut *upstream).await,
        (Mesh(mut downstream), Plain(mut upstream)) => relay.run(&mut *downstream, &mut upstream).await,
        (Mesh(mut downstream), Mesh(mut upstream)) => relay.run(&mut *downstream, &mut *upstream).await,
    }
}

/// A relay between two connections, each the one or the other, and what it counts.
struct Between {
    client: DuplexStream,
    server: DuplexStream,
    listener: Arc<ListenerStats>,
    cluster: Arc<ClusterStats>,
    relay: JoinHandle<(Relay, Result<(), Broken>)>,
}

impl Between {
    fn start((downstream, upstream): (Form, Form), buffer: usize) -> Self {
        let (client, near) = plain_end(downstream, Role::Client, buffer);
        let (server, far) = plain_end(upstream, Role::Server, buffer);
        let (listener, cluster) = counters();
        let mut relay = Relay::new(&listener, &cluster);
        let relay = tokio::spawn(async move {
            let near = Connected::over(near, downstream, Role::Server);
            let far = Connected::over(far, upstream, Role::Client);
            let (near, far) = tokio::join!(near, far);
            let ended = run_between(&mut relay, near, far).await;
            (relay, ended)
        });
        Self { client, server, listener, cluster, relay }
    }

    /// Bytes that were counted so far, from the downstream and to it.
    fn counted(&self) -> (u64, u64) {
        let (received, sent) = (self.listener.received.get(), self.listener.sent.get());
        assert_eq!((received, sent), (self.cluster.sent.get(), self.cluster.received.get()));
        (received, sent)
    }

    /// Both directions have ended; gives whether the downstream was left unanswered.
    async fn ended(self, moved: (u64, u64)) -> bool {
        assert_eq!(self.counted(), moved);
        let (relay, ended) = self.relay.await.unwrap();
        ended.unwrap();
        assert_eq!((relay.received(), relay.sent()), moved);
        relay.was_left_unanswered
    }
}

/// What a test has of a connection to the relay, and the relay's end of it. Another relay speaks TLS for the test.
fn plain_end(form: Form, role: Role, buffer: usize) -> (DuplexStream, DuplexStream) {
    let (ours, plain) = duplex(buffer);
    let Form::Tls(alpn) = form else { return (ours, plain) };
    let (wire, theirs) = duplex(buffer);
    tokio::spawn(relay_as(role, alpn, plain, wire));
    (ours, theirs)
}

async fn say(to: &mut DuplexStream, text: &str) {
    to.write_all(text.as_bytes()).await.unwrap();
    to.shutdown().await.unwrap();
}

async fn hear(from: &mut DuplexStream) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn any_two_connections_end_each_direction_by_itself_and_bytes_are_counted_while_they_move() {
    for forms in combinations() {
        // The client ends first.
        let mut between = Between::start(forms, 4096);
        between.client.write_all(b"ques").await.unwrap();
        let mut begun = [0; 4];
        between.server.read_exact(&mut begun).await.unwrap();
        assert_eq!(between.counted(), (4, 0), "{forms:?}");
        say(&mut between.client, "tion").await;
        assert_eq!((&begun, hear(&mut between.server).await.as_str()), (b"ques", "tion"), "{forms:?}");
        assert_eq!(between.counted(), (8, 0), "{forms:?}");
        say(&mut between.server, "answer").await;
        assert_eq!(hear(&mut between.client).await, "answer", "{forms:?}");
        assert!(!between.ended((8, 6)).await, "{forms:?}");

        // The server ends first.
        let mut between = Between::start(forms, 4096);
        say(&mut between.server, "greeting").await;
        assert_eq!(hear(&mut between.client).await, "greeting", "{forms:?}");
        assert_eq!(between.counted(), (0, 8), "{forms:?}");
        say(&mut between.client, "thanks").await;
        assert_eq!(hear(&mut between.server).await, "thanks", "{forms:?}");
        assert!(!between.ended((6, 8)).await, "{forms:?}");
    }
}

#[tokio::test]
async fn an_upstream_that_ends_first_and_without_a_byte_leaves_the_downstream_unanswered() {
    for forms in combinations() {
        let mut between = Between::start(forms, 4096);
        say(&mut between.server, "").await;
        assert_eq!(hear(&mut between.client).await, "", "{forms:?}");
        say(&mut between.client, "question").await;
        assert_eq!(hear(&mut between.server).await, "question", "{forms:?}");
        assert!(between.ended((8, 0)).await, "{forms:?}");

        let mut between = Between::start(forms, 4096);
        say(&mut between.client, "question").await;
        assert_eq!(hear(&mut between.server).await, "question", "{forms:?}");
        say(&mut between.server, "").await;
        assert_eq!(hear(&mut between.client).await, "", "{forms:?}");
        assert!(!between.ended((8, 0)).await, "{forms:?}");
    }
}

#[tokio::test]
async fn any_two_connections_carry_more_than_fits_into_a_buffer() {
    for (forms, buffer) in combinations().flat_map(|forms| [7, 4096, 1 << 20].map(|buffer| (forms, buffer))) {
        let mut between = Between::start(forms, buffer);
        let size = if buffer < 100 { 2_000 } else { 700_000 };
        let sent: Vec<u8> = (0..size).map(|i: u32| (i % 251) as u8).collect();
        let (client, server) = (&mut between.client, &mut between.server);
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (tokio::io::split(client), tokio::io::split(server));
        let (mut asked, mut answered) = (Vec::new(), Vec::new());
        let ask = async {
            to_client.write_all(&sent).await.unwrap();
            to_client.shutdown().await.unwrap();
        };
        let answer = async {
            to_server.write_all(&sent).await.unwrap();
            to_server.shutdown().await.unwrap();
        };
        let (reading, writing) = (from_server.read_to_end(&mut asked), from_client.read_to_end(&mut answered));
        let (_, _, read, written) = tokio::join!(ask, answer, reading, writing);
        assert_eq!((read.unwrap(), written.unwrap()), (sent.len(), sent.len()));
        assert!(asked == sent && answered == sent, "{forms:?} through {buffer}");
        drop((from_client, to_client, from_server, to_server));
        between.ended((size.into(), size.into())).await;
    }
}

#[tokio::test]
async fn a_slow_reader_of_any_two_connections_holds_the_writer_back_and_gets_everything() {
    /// More than all buffers on the way hold, by far.
    const LIMIT: u64 = 1 << 20;
    for forms in combinations() {
        let Between { mut client, mut server, listener, relay, .. } = Between::start(forms, 4096);
        let sent: Vec<u8> = (0..2 * LIMIT).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        let mut received = vec![0];
        server.read_exact(&mut received).await.unwrap();
        // All is in memory and on one thread: nothing moves any more when it has not for so many turns of each task.
        let (mut before, mut still) = (0, 0);
        while still < 1000 {
            let now = listener.received.get();
            still = if now == before { still + 1 } else { 0 };
            before = now;
            yield_now().await;
        }
        assert!(before < LIMIT && !writer.is_finished(), "{forms:?}: nothing holds the writer back");
        server.read_to_end(&mut received).await.unwrap();
        assert!(received == expected, "{forms:?}");
        server.shutdown().await.unwrap();
        relay.await.unwrap().1.unwrap();
        drop(writer.await.unwrap());
    }
}

/// Both ends of a connection: the relay's, with this role, and the other.
async fn connected(form: Form, role: Role) -> (Connected<Socket>, Connected<Socket>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let other = match role {
        Role::Client => Role::Server,
        Role::Server => Role::Client,
    };
    let ours = Connected::over(Socket::tcp(accepted), form, role);
    tokio::join!(ours, Connected::over(Socket::tcp(dialled), form, other))
}

#[tokio::test]
async fn a_reset_of_either_of_any_two_connections_is_named() {
    for ((downstream, upstream), side) in
        combinations().flat_map(|forms| [Side::Downstream, Side::Upstream].map(|side| (forms, side)))
    {
        let (near, client) = connected(downstream, Role::Server).await;
        let (far, server) = connected(upstream, Role::Client).await;
        let (broken, kept) = if side == Side::Downstream { (client, server) } else { (server, client) };
        broken.into_io().abort();
        let ended = run_between(&mut new_relay(), near, far).await.unwrap_err();
        assert_eq!(ended.side, side, "{downstream:?} {upstream:?}: {ended}");
        let outcome = if side == Side::Downstream { Outcome::ClientReset } else { Outcome::Reset };
        assert_eq!(Fault::from(&ended).outcome, outcome);
        drop(kept);
    }
}

#[tokio::test(start_paused = true)]
async fn a_relay_rests_when_the_downstream_has_been_answered() {
    let ((mut client, mut near), (mut server, mut far)) = (duplex(64), duplex(64));
    let mut relay = new_relay();
    for (asks, answers, waits) in [(true, false, true), (false, true, false), (false, false, false), (true, true, true)]
    {
        if asks {
            client.write_all(b"question").await.unwrap();
        }
        if answers {
            server.write_all(b"answer").await.unwrap();
        }
        let started = Instant::now();
        assert!(relay.run_to_rest(&mut near, &mut far).await.is_none());
        assert_eq!(started.elapsed() >= REST_LIMIT, waits, "{asks} {answers}");
    }
}
