//! The connections of one worker: those that are idle, those that requests share, and those that are lent to a request
//! and come back.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http::{Request, Response};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::failure::{Failed, NoConnection, no_codec};
use super::http1::Http1;
use crate::proxy::codec::client::{self, Sender};
use crate::proxy::codec::flow::Counted;
use crate::proxy::codec::framing;
use crate::proxy::codec::incoming::Incoming;
use crate::proxy::codec::outgoing::AFTER_ANSWER;
use crate::proxy::codec::replay_body::ReplayBody;
use crate::proxy::codec::turn::Turn;
use crate::proxy::codec::wire::{PathWatch, Wire};
use crate::proxy::limits::Permit;
use crate::snapshot::LocalApp;
use crate::tls;

/// State of a pool, shared by all workers.
#[derive(Default)]
pub(super) struct Count {
    /// Connections of all workers.
    pub open: AtomicUsize,
    /// Wakes tasks that wait for a free connection or stream.
    pub freed: Arc<Notify>,
}

/// One connection, counted until it ends.
pub struct Open {
    count: Arc<Count>,
    _permit: Option<Permit>,
}

impl Open {
    pub(super) fn new(count: &Arc<Count>, permit: Option<Permit>) -> Self {
        count.open.fetch_add(1, Ordering::Relaxed);
        Self { count: Arc::clone(count), _permit: permit }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.count.open.fetch_sub(1, Ordering::Relaxed);
        self.count.freed.notify_waiters();
    }
}

/// One worker's connections.
pub(super) struct Slot {
    count: Arc<Count>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    pool_key: Option<PoolKey>,
    /// The one used last is at the end.
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// The protocol of the last connection.
    speaks: Option<Version>,
    /// The result of a connection in progress that others could share.
    dialling: Option<watch::Receiver<Option<NoConnection>>>,
    /// A task looks after what is kept.
    swept: bool,
}

/// The key of connections: they are used for nothing else.
#[derive(Clone)]
pub enum PoolKey {
    /// A target as somebody: another identity, other roots or other names to expect are another client.
    Mesh(Arc<tls::Client>),
    App(LocalApp),
}

impl PoolKey {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mesh(a), Self::Mesh(b)) => Arc::ptr_eq(a, b),
            (Self::App(a), Self::App(b)) => a == b,
            _ => false,
        }
    }
}

struct Idle {
    connection: Http1,
    since: Instant,
}

#[derive(Clone)]
struct Shared {
    sender: Sender,
    made: Instant,
}

/// A connection that takes one request.
pub struct PooledConnection {
    connection: Connection,
    /// It has carried requests before, so that the far end may be closing it just now.
    pub reused: bool,
}

enum Connection {
    Http1(Http1, Option<PoolReturn>),
    Http2(Sender, Counted),
}

/// The pool that an HTTP/1 connection is returned to.
struct PoolReturn {
    pool_key: PoolKey,
    slot: Weak<Slot>,
}

/// Kept until the response is over, to be dropped then.
pub enum ConnectionGuard {
    Http1(Lease),
    /// A stream of HTTP/2, which its body holds.
    Http2,
}

/// An HTTP/1 connection, which goes home when dropped if its request was answered, or none was sent.
pub struct Lease {
    connection: Option<Http1>,
    home: Option<PoolReturn>,
    unanswered: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Http1,
    Http2,
}

/// A connection that was just made, without a codec yet.
pub struct Dialled {
    pub wire: Wire,
    pub version: Version,
    pub open: Open,
}

/// A task that finds no connection makes one, or waits for the one that is being made.
pub(super) enum Dial {
    Ours(watch::Sender<Option<NoConnection>>),
    Others(watch::Receiver<Option<NoConnection>>),
}

impl Slot {
    #[must_use]
    pub(super) fn new(count: &Arc<Count>) -> Self {
        Self { count: Arc::clone(count), kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reuse(self: &Arc<Self>, pool_key: &PoolKey) -> Option<PooledConnection> {
        let mut kept = self.kept();
        kept.renew(pool_key);
        while let Some(Idle { connection, since }) = kept.idle.pop() {
            if connection.sender.is_ready() && since.elapsed() < IDLE_TIME {
                let connection = Connection::Http1(connection, Some(self.home(pool_key)));
                return Some(PooledConnection { connection, reused: true });
            }
        }
        kept.shared.retain(|shared| !shared.sender.known.is_retired());
        let shared = kept.shared.iter().find(|shared| shared.sender.known.has_room())?;
        Some(PooledConnection { connection: shared.take(), reused: true })
    }

    /// `None` where no connection can be shared.
    pub(super) fn dialling(&self, pool_key: &PoolKey) -> Option<Dial> {
        let mut kept = self.kept();
        kept.renew(pool_key);
        if kept.speaks == Some(Version::Http1) {
            return None;
        }
        if let Some(outcome) = kept.dialling.clone().filter(|outcome| outcome.has_changed().is_ok()) {
            return Some(Dial::Others(outcome));
        }
        let (waiters, outcome) = watch::channel(None);
        kept.dialling = Some(outcome);
        Some(Dial::Ours(waiters))
    }

    pub(super) async fn add(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
        waiters: Option<watch::Sender<Option<NoConnection>>>,
    ) -> Result<PooledConnection, NoConnection> {
        match dialled.version {
            Version::Http1 => self.add_http1(dialled, pool_key).await,
            Version::Http2 => self.add_http2(dialled, pool_key, waiters).await,
        }
    }

    async fn add_http1(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
    ) -> Result<PooledConnection, NoConnection> {
        let connection = Http1::new(dialled.wire, dialled.open).await?;
        let mut kept = self.kept();
        kept.renew(pool_key);
        kept.speaks = Some(Version::Http1);
        Ok(PooledConnection { connection: Connection::Http1(connection, Some(self.home(pool_key))), reused: false })
    }

    fn home(self: &Arc<Self>, pool_key: &PoolKey) -> PoolReturn {
        PoolReturn { pool_key: pool_key.clone(), slot: Arc::downgrade(self) }
    }

    /// Other waiting tasks are woken when the limit of streams is known.
    async fn add_http2(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
        mut waiters: Option<watch::Sender<Option<NoConnection>>>,
    ) -> Result<PooledConnection, NoConnection> {
        let Dialled { wire, open, .. } = dialled;
        let freed = Arc::clone(&self.count.freed);
        let changed = {
            let freed = Arc::clone(&freed);
            move || {
                drop(waiters.take());
                freed.notify_waiters();
            }
        };
        let remote = matches!(pool_key, PoolKey::Mesh(_));
        let (sender, connection) = client::connect(wire.clone(), remote, freed, changed).await.map_err(no_codec)?;
        tokio::spawn(run(Turn::new(connection, wire), open));
        let shared = Shared { sender, made: Instant::now() };
        let connection = shared.take();
        let mut kept = self.kept();
        kept.renew(pool_key);
        kept.speaks = Some(Version::Http2);
        kept.shared.push(shared);
        self.sweep_later(&mut kept);
        Ok(PooledConnection { connection, reused: false })
    }

    /// Takes an HTTP/1 connection back, unless there are enough.
    fn put(self: &Arc<Self>, connection: Http1, pool_key: &PoolKey) {
        let mut kept = self.kept();
        if connection.sender.is_closed() || !kept.is_for(pool_key) {
            return;
        }
        if kept.idle.len() >= IDLE {
            kept.idle.remove(0);
        }
        kept.idle.push(Idle { connection, since: Instant::now() });
        self.sweep_later(&mut kept);
        drop(kept);
        self.count.freed.notify_waiters();
    }

    /// Sees to it that what nobody uses is closed in time.
    fn sweep_later(self: &Arc<Self>, kept: &mut Kept) {
        if std::mem::replace(&mut kept.swept, true) {
            return;
        }
        let slot = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_TIME).await;
                let Some(slot) = slot.upgrade() else { return };
                let mut kept = slot.kept();
                kept.idle.retain(|idle| !idle.connection.sender.is_closed() && idle.since.elapsed() < IDLE_TIME);
                kept.idle.iter().for_each(|idle| idle.connection.watch_path(PathWatch::Idle));
                kept.shared.retain(|shared| {
                    let known = &shared.sender.known;
                    !known.is_retired() && (known.meter.open() > 0 || shared.made.elapsed() < IDLE_TIME)
                });
                if kept.idle.is_empty() && kept.shared.is_empty() {
                    kept.swept = false;
                    return;
                }
            }
        });
    }
}

impl Shared {
    fn take(&self) -> Connection {
        Connection::Http2(self.sender.clone(), Counted::new(&self.sender.known.meter))
    }
}

impl Kept {
    fn is_for(&self, pool_key: &PoolKey) -> bool {
        self.pool_key.as_ref().is_some_and(|made| made.is(pool_key))
    }

    /// Lets go of connections that were made for something else. Requests under way on them are not
    /// disturbed.
    fn renew(&mut self, pool_key: &PoolKey) {
        if !self.is_for(pool_key) {
            self.idle.clear();
            self.shared.clear();
            self.speaks = None;
            self.dialling = None;
            self.pool_key = Some(pool_key.clone());
        }
    }
}

impl PooledConnection {
    /// A new connection that is not kept.
    #[must_use]
    pub(super) fn once(connection: Http1) -> Self {
        Self { connection: Connection::Http1(connection, None), reused: false }
    }

    #[must_use]
    pub fn version(&self) -> Version {
        match &self.connection {
            Connection::Http1(..) => Version::Http1,
            Connection::Http2(..) => Version::Http2,
        }
    }

    /// Puts back what nothing was sent on.
    pub fn put_back(self) {
        if let Connection::Http1(connection, home) = self.connection {
            drop(Lease { connection: Some(connection), home, unanswered: false });
        }
    }

    /// Sends the request, which has the form that this version wants, and waits for the response head.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn send(self, request: Request<ReplayBody>) -> Result<(Response<Incoming>, ConnectionGuard), Failed> {
        match self.connection {
            Connection::Http1(mut connection, home) => {
                let answered = connection.send(request);
                // A task that does not wait for the answer drops this.
                let mut lease = Lease { connection: Some(connection), home, unanswered: true };
                let response = answered.await.map_err(Failed::http1)?;
                // After an answer that is not to be passed on, nobody knows what comes next.
                let response = checked(response.map(Incoming::from))?;
                lease.unanswered = false;
                Ok((response, ConnectionGuard::Http1(lease)))
            }
            Connection::Http2(sender, counted) => {
                let response = sender.send(request, counted).await.map_err(|unanswered| Failed::http2(*unanswered))?;
                Ok((checked(response)?, ConnectionGuard::Http2))
            }
        }
    }
}

/// Lets no response through whose headers describe another message than it is. Its connection ends with it.
fn checked(mut response: Response<Incoming>) -> Result<Response<Incoming>, Failed> {
    match framing::check_response(&mut response) {
        Ok(()) => Ok(response),
        Err(fault) => Err(Failed::framing(fault)),
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        let Some(wire) = connection.wire.upgrade() else { return };
        // What is left of the request would wait for a far end that may take no more of it.
        if self.unanswered {
            return wire.cut_unsent();
        }
        if wire.has_unsent() {
            tokio::spawn(async move {
                tokio::time::sleep(AFTER_ANSWER).await;
                if let Some(wire) = connection.wire.upgrade() {
                    wire.cut_unsent();
                }
            });
            return;
        }
        if let Some(home) = &self.home
            && let Some(slot) = home.slot.upgrade()
        {
            slot.put(connection, &home.pool_key);
        }
    }
}

/// The sender of a request gets the end of the connection.
async fn run<T>(connection: impl Future<Output = T>, open: Open) {
    drop(connection.await);
    drop(open);
}

/// Idle HTTP/1 connections kept for each worker.
const IDLE: usize = 256;
/// Time for which an unused connection is kept. Many apps close theirs after a minute or more.
const IDLE_TIME: Duration = Duration::from_secs(55);
/// Interval between two checks for unused connections to close.
const SWEEP_TIME: Duration = Duration::from_secs(20);
