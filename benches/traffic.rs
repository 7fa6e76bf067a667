//! What bytes, headers and changes cost: `cargo bench --bench traffic`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::SystemTime;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use http::{HeaderMap, HeaderValue};
use tokio::io::DuplexStream;
use tokio::sync::watch;

use lictor::operators::Record;
use lictor::snapshot::{Edits, Normalization, OutboundKey, OutboundListener, Protocol, Snapshot};
use lictor::tls::{Stream, with_scratch};
use mesh::Mesh;

#[path = "mesh/mod.rs"]
mod mesh;

fn main() {
    divan::main();
}

/// More than is ever under way.
const ROOM: usize = 1024 * 1024;

/// Both ends of a session over memory.
fn session() -> anyhow::Result<(Stream<DuplexStream>, Stream<DuplexStream>)> {
    let mesh = Mesh::new()?;
    let (client, server) = (mesh.client(Protocol::Tcp)?, mesh.server(Protocol::Tcp)?);
    let (near, far) = tokio::io::duplex(ROOM);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let connect = async {
            let mut connected = Stream::connect(near, &client).await?;
            std::future::poll_fn(|cx| connected.poll_flush(cx)).await?;
            anyhow::Ok(connected)
        };
        let (connected, accepted) = tokio::join!(connect, Stream::accept_offer(far, &server));
        Ok((connected?, accepted?))
    })
}

/// What a relay does with each read: seals it on one side, opens it on the other.
#[divan::bench(args = [64, 1024, 16 * 1024, 128 * 1024])]
fn seal_and_open(bencher: Bencher<'_, '_>, size: usize) {
    let (mut from, mut to) = session().expect("a session");
    let plain = vec![b'x'; size];
    let mut cx = Context::from_waker(Waker::noop());
    bencher.counter(BytesCount::new(size)).bench_local(|| {
        with_scratch(|scratch| {
            let Poll::Ready(Ok(piece)) = scratch.poll_read(&mut cx, &mut &plain[..], 0) else {
                panic!("memory is read at once")
            };
            assert_eq!(piece.len(), size, "what is in memory is there at once");
            from.poll_seal_piece(&mut cx, scratch, piece, &[]).expect("memory takes everything at once");
            let mut opened = 0;
            while opened < size {
                assert!(matches!(to.poll_open(&mut cx, scratch), Poll::Ready(Ok(()))), "what was sealed is there");
                opened += black_box(&scratch.opened).len();
            }
        });
    });
}

fn headers() -> HeaderMap {
    let names =
        ["host", "user-agent", "accept", "accept-encoding", "x-request-id", "x-forwarded-for", "x-debug", "cookie"];
    names.into_iter().map(|name| (name.parse().expect("a name"), HeaderValue::from_static("a value"))).collect()
}

/// What a route's changes to the headers of a request cost, and the look at their names before.
#[divan::bench(args = [1, 4, 16])]
fn rewrite_headers(bencher: Bencher<'_, '_>, changes: usize) {
    let names: Vec<String> = (0..changes).map(|number| format!("x-added-{number}")).collect();
    let add = names.iter().map(|name| (name.as_str(), "a value"));
    let edits = Edits::new(["x-debug"], add, [("x-request-id", "another")]).expect("edits");
    let (normalization, known) = (Normalization::default(), Record::new(SystemTime::UNIX_EPOCH));
    bencher.with_inputs(headers).bench_local_refs(|headers| {
        let accepted = normalization.headers(headers).is_ok();
        edits.apply_to_request(headers, &known);
        accepted
    });
}

/// A new snapshot in which one upstream has changed, while both cores read.
#[divan::bench(args = [10, 500])]
fn publish_beside_readers(bencher: Bencher<'_, '_>, upstreams: u16) {
    let mesh = Mesh::new().expect("a mesh");
    let one = |port| mesh.client_side(Protocol::Tcp, port, 1).expect("a snapshot");
    let first =
        Snapshot { outbound: (1..=upstreams).flat_map(|port| one(port).outbound).collect(), ..Snapshot::default() };
    let (key, changed) = one(1).outbound.pop_first().expect("an upstream");
    let (sender, receiver) = watch::channel(Some(Arc::new(first)));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    black_box(receiver.borrow().clone());
                }
            });
        }
        bencher.bench_local(|| publish(&sender, &key, &changed));
        done.store(true, Ordering::Relaxed);
    });
}

fn publish(sender: &watch::Sender<Option<Arc<Snapshot>>>, key: &OutboundKey, changed: &Arc<OutboundListener>) {
    let mut next = sender.borrow().as_deref().cloned().unwrap_or_default();
    next.version += 1;
    next.outbound.insert(key.clone(), Arc::clone(changed));
    sender.send_replace(Some(Arc::new(next)));
}
