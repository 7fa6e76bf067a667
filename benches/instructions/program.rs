//! Fixed work for counting instructions: `instructions SCENARIO TIMES` does the same thing that many times.
//!
//! One connection at a time and one message at a time, two sidecars on one worker thread, an app that answers
//! by rote: what is done does not depend on when it is done. The setting up is the same for any number of
//! times, so that the difference between two numbers is the work alone. See `scripts/instructions`.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use tokio::sync::watch;

use lictor::drain;
use lictor::jwt::Providers;
use lictor::observe::Observer;
use lictor::proxy::{self, Workers};
use lictor::snapshot::{
    Action, DefaultPolicy, Hits, InboundListener, Intention, Intentions, LocalApp, Normalization, Protocol, Service,
    Snapshot, Upgrades,
};
use lictor::tls::{Client, Server, Stream, TUNNEL};

use mesh::{Mesh, PATIENCE, address, local};

#[path = "../mesh/mod.rs"]
mod mesh;

const REQUEST: &[u8] =
    b"GET /orders/17?detail=full HTTP/1.1\r\nHost: web\r\nUser-Agent: instructions\r\nAccept: */*\r\n\r\n";
const RESPONSE_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 1024\r\n\r\n";
const RESPONSE_BODY: [u8; 1024] = [b'x'; 1024];
/// Four TLS records, and less than any socket buffer.
const CHUNK: usize = 64 * 1024;
/// Intentions that do not match, beside the one that does.
const INTENTIONS: usize = 100;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [scenario, times] = &arguments[..] else {
        bail!("usage: instructions handshake|connection|tunnel|relay|exchange|http TIMES");
    };
    let times: usize = times.parse().context("TIMES must be a number")?;
    match scenario.as_str() {
        "handshake" => handshakes(times),
        "connection" => connections(times, &[]),
        "tunnel" => connections(times, &[TUNNEL]),
        "relay" => relay(times),
        "exchange" => exchanges(times, Protocol::Tcp),
        "http" => exchanges(times, Protocol::Http),
        _ => bail!("no scenario {scenario:?}"),
    }
}

/// Full mutual handshakes with both identities checked, in memory.
fn handshakes(times: usize) -> Result<()> {
    let mesh = Mesh::new()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let server = mesh.server(Protocol::Tcp)?;
    runtime.block_on(async {
        for _ in 0..times {
            // A new one each time: it has no session to resume.
            let client = mesh.client(Protocol::Tcp)?;
            shake(&client, &server).await?;
        }
        Ok(())
    })
}

async fn shake(client: &Client, server: &Server) -> Result<()> {
    let (near, far) = tokio::io::duplex(CHUNK);
    let connect = async {
        let mut connected = Stream::connect(near, client).await?;
        // The last flight would wait for the first data.
        poll_fn(|cx| connected.poll_flush(cx)).await?;
        anyhow::Ok(connected)
    };
    let (connected, accepted) = tokio::join!(connect, Stream::accept_offer(far, server));
    let (connected, accepted) = (connected?, accepted?);
    client.authenticate(connected.peer_certificates(), SystemTime::now())?;
    server.authenticate(accepted.peer_certificates(), SystemTime::now())?;
    Ok(())
}

/// A new connection through both sidecars for each request. All but the first resume a session, or take the session
/// of the one before if the server knows how to.
fn connections(times: usize, alpn: &[&[u8]]) -> Result<()> {
    let pair = Pair::start(Protocol::Tcp, |mesh| Ok(mesh.web.server(alpn)?), respond)?;
    for _ in 0..times {
        request(&mut pair.connect()?)?;
    }
    Ok(())
}

/// Chunks through both sidecars and back.
fn relay(times: usize) -> Result<()> {
    let pair = Pair::start(Protocol::Tcp, |mesh| mesh.server(Protocol::Tcp), echo)?;
    let mut connection = pair.connect()?;
    let (sent, mut came) = (vec![b'x'; CHUNK], vec![0; CHUNK]);
    for _ in 0..times {
        connection.write_all(&sent)?;
        connection.read_exact(&mut came)?;
    }
    ensure!(sent == came, "what came back is not what was sent");
    Ok(())
}

/// Small requests on an open connection through both sidecars.
fn exchanges(times: usize, protocol: Protocol) -> Result<()> {
    let pair = Pair::start(protocol, |mesh| mesh.server(protocol), respond)?;
    let mut connection = pair.connect()?;
    for _ in 0..times {
        request(&mut connection)?;
    }
    Ok(())
}

fn request(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(REQUEST)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    ensure!(head.starts_with(b"HTTP/1.1 200"), "the answer is {:?}", String::from_utf8_lossy(&head));
    let mut body = [0; RESPONSE_BODY.len()];
    connection.read_exact(&mut body)?;
    ensure!(body == RESPONSE_BODY, "the body of the answer is wrong");
    Ok(())
}

/// The app: answers each request head. One connection at a time would do for one connection at a time, but
/// a sidecar may keep its own open.
fn respond(mut connection: TcpStream) -> std::io::Result<()> {
    let answer = [RESPONSE_HEAD, &RESPONSE_BODY].concat();
    let mut heard = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = connection.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        heard.extend_from_slice(&buffer[..count]);
        if heard.ends_with(b"\r\n\r\n") {
            heard.clear();
            connection.write_all(&answer)?;
        }
    }
}

/// The app: gives every chunk back, once it is whole.
fn echo(mut connection: TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        connection.read_exact(&mut chunk)?;
        connection.write_all(&chunk)?;
    }
}

/// A sidecar in front of the app, a sidecar in front of us, and the port of the latter.
struct Pair {
    port: u16,
}

impl Pair {
    fn start(
        protocol: Protocol,
        server: impl FnOnce(&Mesh) -> Result<Arc<Server>>,
        answer: fn(TcpStream) -> std::io::Result<()>,
    ) -> Result<Self> {
        let mesh = Mesh::new()?;
        let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let app_port = app.local_addr()?.port();
        thread::spawn(move || {
            for connection in app.incoming().flatten() {
                let _ = connection.set_nodelay(true);
                thread::spawn(move || answer(connection));
            }
        });
        let (public, port) = (free_port()?, free_port()?);
        let server = server_side(server(&mesh)?, protocol, public, app_port);
        let client = mesh.client_side(protocol, port, public)?;
        thread::spawn(move || run([server, client]));
        Ok(Self { port })
    }

    fn connect(&self) -> Result<TcpStream> {
        let began = SystemTime::now();
        loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)) {
                Ok(connection) => {
                    connection.set_nodelay(true)?;
                    connection.set_read_timeout(Some(PATIENCE))?;
                    return Ok(connection);
                }
                // The listener is about to come up.
                Err(error) if began.elapsed()? > PATIENCE => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Both data planes, on one worker.
fn run(snapshots: [Snapshot; 2]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let workers = Workers::start(1)?;
    let (_trigger, drain) = drain::channel();
    let [(_keep_server, server), (_keep_client, client)] =
        snapshots.map(|snapshot| watch::channel(Some(Arc::new(snapshot))));
    runtime.block_on(async {
        tokio::join!(
            proxy::run(server, &workers, Observer::default(), drain.clone()),
            proxy::run(client, &workers, Observer::default(), drain.clone())
        )
    });
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn server_side(tls: Arc<Server>, protocol: Protocol, public: u16, app: u16) -> Snapshot {
    let service = Service {
        name: "web".into(),
        protocol,
        tls,
        intentions: Arc::new(intentions()),
        local_app: LocalApp::Tcp(address(app)),
        local_connect_timeout: PATIENCE,
        local_request_timeout: Some(PATIENCE),
        local_idle_timeout: Some(PATIENCE),
        normalization: Normalization::default(),
        upgrades: Upgrades::default(),
        sanitize_forwarded_cert: false,
        expose_cause: false,
        audit: false,
        share_denial_rule: false,
        token_providers: Arc::new(Providers::default()),
    };
    let bind = local(public);
    let listener = InboundListener {
        bind: bind.clone(),
        handshake_timeout: PATIENCE,
        max_connections: None,
        service: Arc::new(service),
    };
    Snapshot { version: 1, inbound: [(bind, Arc::new(listener))].into(), ..Snapshot::default() }
}

fn intentions() -> Intentions {
    let intention = |source: String, action| Intention {
        source_partition: "default".into(),
        source_namespace: "default".into(),
        source,
        destination: "web".into(),
        action: Some(action),
        permissions: Vec::new(),
        token: None,
        precedence: 9,
        hits: Hits::default(),
    };
    let mut list: Vec<_> = (0..INTENTIONS).map(|number| intention(format!("other-{number}"), Action::Deny)).collect();
    list.push(intention("shop".into(), Action::Allow));
    Intentions::new(
        list,
        DefaultPolicy { action: Action::Deny, source: "the fixed work".into(), hits: Hits::default() },
    )
}
