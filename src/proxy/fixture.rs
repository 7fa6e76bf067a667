//! Fixtures of the data plane's tests: sidecars in this process, and their configuration.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::drain;
use crate::jwt::Providers;
use crate::observe::Observer;
use crate::proxy::{self, Workers};
use crate::snapshot::*;
use crate::testing::ca::{Ca, uri};
use crate::tls::{SpiffeId, TUNNELS};

pub(super) static CA: LazyLock<Ca> = LazyLock::new(Ca::new);

/// For everything that a test waits for.
pub(super) const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A data plane of its own, with what it goes by.
pub(super) struct Sidecar {
    pub(super) snapshot: watch::Sender<Option<Arc<Snapshot>>>,
    pub(super) trigger: drain::Trigger,
    /// The recorded events.
    pub(super) observer: Observer,
    _running: JoinHandle<()>,
}

impl Sidecar {
    pub(super) fn start(snapshot: Snapshot) -> Self {
        let (snapshot, snapshots) = watch::channel(Some(Arc::new(snapshot)));
        let (trigger, drain) = drain::channel();
        let observer = Observer::default();
        let observed = observer.clone();
        let running = tokio::spawn(async move {
            let workers = Workers::start(2).unwrap();
            proxy::run(snapshots, &workers, observed, drain).await;
            // A runtime must not wait for another's threads on one of its own.
            tokio::task::spawn_blocking(move || drop(workers));
        });
        Self { snapshot, trigger, observer, _running: running }
    }
}

/// A free port, for listeners that have to be told one. No two are the same, and none is of those that the kernel
/// gives to whoever connects.
pub(super) fn free() -> SocketAddr {
    const FIRST: usize = 10_000;
    const COUNT: usize = 20_000;
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    loop {
        let number = TAKEN.fetch_add(1, Ordering::Relaxed);
        assert!(number < COUNT, "no port is free");
        let port = FIRST + (std::process::id() as usize * 641 + number) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, u16::try_from(port).unwrap()));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

pub(super) fn address(to: SocketAddr) -> Address {
    Address { host: Host::Ip(to.ip()), port: to.port() }
}

/// Everybody may.
pub(super) fn allowing(action: Action) -> Arc<Intentions> {
    Arc::new(Intentions::new(vec![], DefaultPolicy { action, source: "test".into(), hits: Hits::default() }))
}

/// `db`, in front of `app`.
pub(super) fn service(protocol: Protocol, app: SocketAddr) -> Service {
    let alpn: &[&[u8]] = if protocol == Protocol::Tcp { TUNNELS } else { &[b"h2", b"http/1.1"] };
    Service {
        name: "db".into(),
        protocol,
        tls: CA.credentials("db").server(alpn).unwrap(),
        intentions: allowing(Action::Allow),
        local_app: LocalApp::Tcp(address(app)),
        local_connect_timeout: Duration::from_secs(5),
        local_request_timeout: Some(Duration::from_secs(15)),
        local_idle_timeout: Some(Duration::from_secs(300)),
        normalization: Normalization::default(),
        upgrades: Upgrades::new(["echo".to_owned()]),
        sanitize_forwarded_cert: false,
        expose_cause: false,
        audit: false,
        share_denial_rule: false,
        token_providers: Arc::new(Providers::default()),
    }
}

/// The listener of a service.
pub(super) fn inbound(bind: SocketAddr, service: Service) -> InboundListener {
    InboundListener {
        bind: Bind::Tcp(bind),
        handshake_timeout: Duration::from_secs(10),
        max_connections: None,
        service: Arc::new(service),
    }
}

pub(super) fn upstream(protocol: Protocol, instances: &[SocketAddr]) -> Upstream {
    let alpn: &[&[u8]] = match protocol {
        Protocol::Tcp => TUNNELS,
        Protocol::Http => &[b"h2", b"http/1.1"],
        Protocol::Http2 | Protocol::Grpc => &[b"h2"],
    };
    let expected = vec![SpiffeId::parse(&uri("db")).unwrap()];
    let usable: Vec<Endpoint> = instances.iter().map(|to| Endpoint { address: address(*to), weight: 1 }).collect();
    let target = Arc::new(Target {
        id: "db".into(),
        service: "db".into(),
        datacenter: "dc1".into(),
        customization_hash: String::new(),
        transport: Transport::Mesh(CA.credentials("web").client("db.x.consul", expected, alpn).unwrap()),
        connect_timeout: Duration::from_secs(5),
        endpoints: Arc::new(Endpoints { registered: usable.len(), usable }),
    });
    let resolver = Arc::new(Resolver::new(vec![target]));
    Upstream {
        name: "db".into(),
        settings: UpstreamSettings::default(),
        chain: Chain { service: "db".into(), protocol, start: Node::Resolver(resolver) },
        limits: Limits::default(),
        passive_health_check: PassiveHealthCheck::default(),
        requests: RequestSettings { upgrades: Upgrades::new(["echo".to_owned()]), ..RequestSettings::default() },
        awaited: None,
    }
}

pub(super) fn with_service(bind: SocketAddr, service: Service) -> Snapshot {
    with_inbound(inbound(bind, service))
}

pub(super) fn with_inbound(listener: InboundListener) -> Snapshot {
    Snapshot { version: 1, inbound: [(listener.bind.clone(), Arc::new(listener))].into(), ..Snapshot::default() }
}

pub(super) fn with_upstream(bind: SocketAddr, upstream: Upstream) -> Snapshot {
    let key = OutboundKey { destination: "service:db".into(), bind: Bind::Tcp(bind) };
    let listener = OutboundListener { key: key.clone(), upstream: Arc::new(upstream) };
    Snapshot { version: 1, outbound: [(key, Arc::new(listener))].into(), ..Snapshot::default() }
}

pub(super) async fn listening(at: SocketAddr) {
    let connect = async {
        while TcpStream::connect(at).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(TEST_TIMEOUT, connect).await.expect("it listens in time");
}
