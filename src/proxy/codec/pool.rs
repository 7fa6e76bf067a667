//! Client connections that are used again: those of one instance, or of the local app.
//!
//! A pool has a slot for each worker, as a connection stays on the thread that made it. HTTP/1 connections
//! are lent one request at a time; an HTTP/2 connection is shared by as many as fit.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http::{Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::client::{self, Sender};
use super::flow::Counted;
use super::framing;
use super::incoming::Incoming;
use super::outgoing::AFTER_ANSWER;
use super::replay_body::ReplayBody;
use super::wire::{PathWatch, Turn, WeakWire, Wire};
use super::{HEAD_SIZE, HEADERS, HTTP1_BUFFER};
use crate::proxy::limits::{Overflow, Permit};
use crate::proxy::workers;
use crate::snapshot::{Failure, LocalApp};
use crate::tls;

/// Connections to one place.
#[derive(Default)]
pub struct Pool {
    slots: Mutex<Vec<Arc<Slot>>>,
    shared: Arc<Count>,
}

/// What all workers know of a pool.
#[derive(Default)]
struct Count {
    /// Connections, whoever uses them.
    open: AtomicUsize,
    /// Tells whoever waits that a connection or a stream is free.
    freed: Arc<Notify>,
}

/// One connection, counted until it ends.
pub struct Open {
    count: Arc<Count>,
    _permit: Option<Permit>,
}

impl Open {
    fn new(count: &Arc<Count>, permit: Option<Permit>) -> Self {
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
struct Slot {
    count: Arc<Count>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    pool_key: Option<PoolKey>,
    /// The one used last is at the end.
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// What the last connection turned out to be.
    speaks: Option<Version>,
    /// What comes of a connection that is being made and that others could share.
    dialling: Option<watch::Receiver<Option<NoConnection>>>,
    /// A task looks after what is kept.
    swept: bool,
}

/// What connections were made for; for anything else they can't be used.
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

/// A connection of HTTP/1.
struct Http1 {
    sender: http1::SendRequest<ReplayBody>,
    /// Where the codec ends, the socket is to be closed, whoever holds this.
    wire: WeakWire,
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

/// Where an HTTP/1 connection goes back to.
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

/// What there is of connections that others made.
pub enum Checkout {
    PooledConnection(Box<PooledConnection>),
    /// There is none at all.
    None,
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

/// A request that brought no response.
pub struct Failed {
    /// The request itself, if nothing of it was sent.
    pub request: Option<Box<Request<ReplayBody>>>,
    pub failure: Failure,
    cause: Cause,
}

enum Cause {
    Http1(hyper::Error),
    Http2(h2::Error),
    /// There was a response, which is not to be passed on.
    Framing(&'static str),
}

/// Why there is no connection. All that waited for the same one are told the same.
#[derive(Debug, Clone)]
pub enum NoConnection {
    Overflow(Overflow),
    /// One clause for the log.
    Unreachable(String),
}

impl From<Overflow> for NoConnection {
    fn from(overflow: Overflow) -> Self {
        Self::Overflow(overflow)
    }
}

impl From<String> for NoConnection {
    fn from(cause: String) -> Self {
        Self::Unreachable(cause)
    }
}

/// Whoever finds no connection makes one, or waits for the one that is being made.
enum Dial {
    Ours(watch::Sender<Option<NoConnection>>),
    Others(watch::Receiver<Option<NoConnection>>),
}

impl Pool {
    /// A connection that is there and free.
    #[must_use]
    pub fn reuse(&self, pool_key: &PoolKey) -> Option<PooledConnection> {
        self.slot().reuse(pool_key)
    }

    /// A free connection of those that are there, or one that `dial` makes. Where several could share one, one dials
    /// and the others share what comes of it.
    ///
    /// # Errors
    /// Those of `dial`.
    pub async fn connect<F>(&self, pool_key: &PoolKey, dial: F) -> Result<PooledConnection, NoConnection>
    where
        F: Future<Output = Result<Dialled, NoConnection>>,
    {
        let slot = self.slot();
        let tell = loop {
            if let Some(pooled) = slot.reuse(pool_key) {
                return Ok(pooled);
            }
            match slot.dialling(pool_key) {
                Some(Dial::Ours(tell)) => break Some(tell),
                Some(Dial::Others(mut outcome)) => {
                    // Without a word there is a connection, or whoever dialled gave up.
                    let _ = outcome.changed().await;
                    if let Some(why) = outcome.borrow().clone() {
                        return Err(why);
                    }
                }
                None => break None,
            }
        };
        match dial.await {
            Ok(dialled) => slot.add(dialled, pool_key, tell).await,
            Err(why) => {
                if let Some(tell) = tell {
                    let _ = tell.send(Some(why.clone()));
                }
                Err(why)
            }
        }
    }

    /// A connection that `dial` makes, and on which nothing has been sent yet.
    ///
    /// # Errors
    /// Those of `dial`.
    pub async fn connect_anew<F>(&self, pool_key: &PoolKey, dial: F) -> Result<PooledConnection, NoConnection>
    where
        F: Future<Output = Result<Dialled, NoConnection>>,
    {
        self.slot().add(dial.await?, pool_key, None).await
    }

    /// A new HTTP/1 connection on this wire, for a request that can't go over HTTP/2. It is not kept.
    ///
    /// # Errors
    /// None that depends on the far end.
    pub async fn connect_once(wire: Wire, open: Open) -> Result<PooledConnection, NoConnection> {
        let connection = http1(wire, open).await?;
        Ok(PooledConnection { connection: Connection::Http1(connection, None), reused: false })
    }

    /// Counts a connection that is about to be made.
    #[must_use]
    pub fn enter(&self, permit: Option<Permit>) -> Open {
        Open::new(&self.shared, permit)
    }

    /// A connection for whom no more may be made: one of any worker, or the first of all. It is waited for if all
    /// are taken.
    pub async fn borrow(&self, pool_key: &PoolKey) -> Checkout {
        loop {
            let mut freed = pin!(self.shared.freed.notified());
            freed.as_mut().enable();
            let slots = self.slots().clone();
            if let Some(pooled) = slots.iter().find_map(|slot| slot.reuse(pool_key)) {
                return Checkout::PooledConnection(Box::new(pooled));
            }
            if self.shared.open.load(Ordering::Relaxed) == 0 {
                return Checkout::None;
            }
            freed.await;
        }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self) -> Arc<Slot> {
        let worker = workers::current();
        let mut slots = self.slots();
        while slots.len() <= worker {
            slots.push(Arc::new(Slot { count: Arc::clone(&self.shared), kept: Mutex::default() }));
        }
        Arc::clone(&slots[worker])
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Slot {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reuse(self: &Arc<Self>, pool_key: &PoolKey) -> Option<PooledConnection> {
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
    fn dialling(&self, pool_key: &PoolKey) -> Option<Dial> {
        let mut kept = self.kept();
        kept.renew(pool_key);
        if kept.speaks == Some(Version::Http1) {
            return None;
        }
        if let Some(outcome) = kept.dialling.clone().filter(|outcome| outcome.has_changed().is_ok()) {
            return Some(Dial::Others(outcome));
        }
        let (tell, outcome) = watch::channel(None);
        kept.dialling = Some(outcome);
        Some(Dial::Ours(tell))
    }

    async fn add(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
        tell: Option<watch::Sender<Option<NoConnection>>>,
    ) -> Result<PooledConnection, NoConnection> {
        match dialled.version {
            Version::Http1 => self.add_http1(dialled, pool_key).await,
            Version::Http2 => self.add_http2(dialled, pool_key, tell).await,
        }
    }

    async fn add_http1(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
    ) -> Result<PooledConnection, NoConnection> {
        let connection = http1(dialled.wire, dialled.open).await?;
        let mut kept = self.kept();
        kept.renew(pool_key);
        kept.speaks = Some(Version::Http1);
        Ok(PooledConnection { connection: Connection::Http1(connection, Some(self.home(pool_key))), reused: false })
    }

    fn home(self: &Arc<Self>, pool_key: &PoolKey) -> PoolReturn {
        PoolReturn { pool_key: pool_key.clone(), slot: Arc::downgrade(self) }
    }

    /// Others that wait are told when it is known how many streams there may be.
    async fn add_http2(
        self: &Arc<Self>,
        dialled: Dialled,
        pool_key: &PoolKey,
        mut tell: Option<watch::Sender<Option<NoConnection>>>,
    ) -> Result<PooledConnection, NoConnection> {
        let Dialled { wire, open, .. } = dialled;
        let freed = Arc::clone(&self.count.freed);
        let changed = {
            let freed = Arc::clone(&freed);
            move || {
                drop(tell.take());
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
                // Whoever does not wait for the answer drops this.
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
        Err(fault) => Err(Failed { request: None, failure: Failure::Reset, cause: Cause::Framing(fault) }),
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

impl Http1 {
    fn watch_path(&self, watch: PathWatch) {
        if let Some(wire) = self.wire.upgrade() {
            wire.watch_path(watch);
        }
    }

    fn send(&mut self, request: Request<ReplayBody>) -> impl Future<Output = Answered> + use<> {
        use http_body::Body as _;
        // A far end that takes no more of a body for now confirms nothing either.
        let whole = request.body().is_end_stream();
        self.watch_path(if whole { PathWatch::Request } else { PathWatch::Upload });
        self.sender.try_send_request(request)
    }
}

/// What comes of a request that hyper sends.
type Answered = Result<Response<hyper::body::Incoming>, hyper::client::conn::TrySendError<Request<ReplayBody>>>;

impl Failed {
    fn http1(mut failed: hyper::client::conn::TrySendError<Request<ReplayBody>>) -> Self {
        let request = failed.take_message().map(Box::new);
        let failure = if request.is_some() { Failure::ResetBeforeRequest } else { Failure::Reset };
        Self { request, failure, cause: Cause::Http1(failed.into_error()) }
    }

    fn http2(failed: client::Unanswered) -> Self {
        let client::Unanswered { request, error } = failed;
        let failure = match &request {
            Some(_) => Failure::ResetBeforeRequest,
            None if client::is_refusal(&error) => Failure::Refused,
            None => Failure::Reset,
        };
        Self { request: request.map(Box::new), failure, cause: Cause::Http2(error) }
    }

    /// The connection ended, or was ended, before there was an answer.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &self.cause {
            Cause::Http1(error) => {
                let io = std::error::Error::source(error).is_some_and(|source| source.is::<std::io::Error>());
                error.is_incomplete_message() || error.is_closed() || error.is_canceled() || io
            }
            Cause::Http2(error) => error.is_io(),
            Cause::Framing(_) => false,
        }
    }

    /// What came as an answer is none in HTTP, or not to be passed on.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        match &self.cause {
            Cause::Http1(error) => error.is_parse(),
            Cause::Http2(error) => error.is_library() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR),
            Cause::Framing(_) => true,
        }
    }

    /// For the log.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.cause {
            Cause::Http1(error) => match std::error::Error::source(error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            },
            Cause::Http2(error) => error.to_string(),
            Cause::Framing(fault) => (*fault).to_owned(),
        }
    }
}

fn no_codec(error: impl fmt::Display) -> NoConnection {
    NoConnection::Unreachable(format!("no HTTP connection could be made: {error}"))
}

async fn http1(wire: Wire, open: Open) -> Result<Http1, NoConnection> {
    let (sender, connection) = http1::Builder::new()
        .max_headers(HEADERS)
        .max_header_size(HEAD_SIZE)
        .max_buf_size(HTTP1_BUFFER)
        .handshake(TokioIo::new(wire.clone()))
        .await
        .map_err(no_codec)?;
    wire.hear_out();
    let http1 = Http1 { sender, wire: wire.downgrade() };
    let turns = Turn::new(connection.with_upgrades(), wire.clone());
    tokio::spawn(async move {
        if turns.await.is_err() {
            // Who has half of a request would otherwise wait for the rest, or go on with its answer.
            wire.abort();
        }
        drop(open);
    });
    Ok(http1)
}

/// Whoever sent a request learns how the connection ended.
async fn run<T>(connection: impl Future<Output = T>, open: Open) {
    drop(connection.await);
    drop(open);
}

/// Idle HTTP/1 connections kept for each worker.
const IDLE: usize = 256;
/// How long connections are kept that nobody uses, and how often they are looked over. Many apps close
/// theirs after a minute or more.
const IDLE_TIME: Duration = Duration::from_secs(55);
const SWEEP_TIME: Duration = Duration::from_secs(20);
