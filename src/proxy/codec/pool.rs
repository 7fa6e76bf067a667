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
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::framing;
use super::upload::Upload;
use super::wire::{Turn, Wire};
use super::{CONNECTION_WINDOW, HEAD_SIZE, HEADERS, STREAM_WINDOW};
use crate::proxy::limits::Permit;
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
    freed: Notify,
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
    /// Held while a connection is made that others could share.
    dialling: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Kept {
    made_for: Option<MadeFor>,
    /// The one used last is at the end.
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// What the last connection turned out to be.
    speaks: Option<Version>,
    /// A task looks after what is kept.
    swept: bool,
}

/// What connections were made for; for anything else they can't be used.
#[derive(Clone)]
pub enum MadeFor {
    /// A target as somebody: another identity, other roots or other names to expect are another client.
    Mesh(Arc<tls::Client>),
    App(LocalApp),
}

impl MadeFor {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mesh(a), Self::Mesh(b)) => Arc::ptr_eq(a, b),
            (Self::App(a), Self::App(b)) => a == b,
            _ => false,
        }
    }
}

struct Idle {
    sender: http1::SendRequest<Upload>,
    since: Instant,
}

#[derive(Clone)]
struct Shared {
    sender: http2::SendRequest<Upload>,
    streams: Arc<Load>,
    made: Instant,
}

/// A connection that takes one request.
pub struct Lent {
    connection: Connection,
    /// It has carried requests before, so that the far end may be closing it just now.
    pub reused: bool,
}

enum Connection {
    Http1(http1::SendRequest<Upload>, Option<Home>),
    Http2(http2::SendRequest<Upload>, Streams),
}

/// Where an HTTP/1 connection goes back to.
struct Home {
    made_for: MadeFor,
    slot: Weak<Slot>,
}

/// Kept until the response is over, to be dropped then.
pub enum Held {
    Http1(Lease),
    Http2(Streams),
}

/// An HTTP/1 connection, which goes home when dropped.
pub struct Lease {
    sender: Option<http1::SendRequest<Upload>>,
    home: Option<Home>,
}

/// The streams of one connection.
struct Load {
    taken: AtomicUsize,
    count: Arc<Count>,
}

/// One of a connection's streams, counted until dropped.
pub struct Streams(Arc<Load>);

impl Streams {
    fn enter(load: &Arc<Load>) -> Self {
        load.taken.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(load))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if self.0.taken.fetch_sub(1, Ordering::Relaxed) == STREAMS {
            self.0.count.freed.notify_waiters();
        }
    }
}

/// What there is of connections that others made.
pub enum Borrowed {
    Lent(Box<Lent>),
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
    pub request: Option<Box<Request<Upload>>>,
    pub failure: Failure,
    cause: Cause,
}

enum Cause {
    Codec(hyper::Error),
    /// There was a response, which is not to be passed on.
    Framing(&'static str),
}

impl Pool {
    /// A connection that is there and free.
    #[must_use]
    pub fn reuse(&self, made_for: &MadeFor) -> Option<Lent> {
        self.slot().reuse(made_for)
    }

    /// A free connection of those that are there, or one that `dial` makes. Where several could share one,
    /// one dials and the others wait for it.
    ///
    /// # Errors
    /// Those of `dial`.
    pub async fn connect<E, F>(&self, made_for: &MadeFor, dial: F) -> Result<Lent, E>
    where
        E: From<hyper::Error>,
        F: Future<Output = Result<Dialled, E>>,
    {
        let slot = self.slot();
        let alone = slot.kept().speaks(made_for) == Some(Version::Http1);
        let dialling = if alone { None } else { Some(slot.dialling.lock().await) };
        if let Some(lent) = slot.reuse(made_for) {
            return Ok(lent);
        }
        let dialled = dial.await?;
        let lent = match dialled.version {
            Version::Http1 => slot.add_http1(dialled, made_for).await?,
            Version::Http2 => slot.add_http2(dialled, made_for).await?,
        };
        drop(dialling);
        Ok(lent)
    }

    /// A new HTTP/1 connection on this wire, for a request that can't go over HTTP/2. It is not kept.
    ///
    /// # Errors
    /// None that depends on the far end.
    pub async fn connect_once(wire: Wire, open: Open) -> Result<Lent, hyper::Error> {
        let sender = http1(wire, open).await?;
        Ok(Lent { connection: Connection::Http1(sender, None), reused: false })
    }

    /// Counts a connection that is about to be made.
    #[must_use]
    pub fn enter(&self, permit: Option<Permit>) -> Open {
        Open::new(&self.shared, permit)
    }

    /// A connection for whom no more may be made: one of any worker, or the first of all. It is waited for if all
    /// are taken.
    pub async fn borrow(&self, made_for: &MadeFor) -> Borrowed {
        loop {
            let mut freed = pin!(self.shared.freed.notified());
            freed.as_mut().enable();
            let slots = self.slots().clone();
            if let Some(lent) = slots.iter().find_map(|slot| slot.reuse(made_for)) {
                return Borrowed::Lent(Box::new(lent));
            }
            if self.shared.open.load(Ordering::Relaxed) == 0 {
                return Borrowed::None;
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
            slots.push(Arc::new(Slot {
                count: Arc::clone(&self.shared),
                kept: Mutex::default(),
                dialling: tokio::sync::Mutex::default(),
            }));
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

    fn reuse(self: &Arc<Self>, made_for: &MadeFor) -> Option<Lent> {
        let mut kept = self.kept();
        kept.renew(made_for);
        while let Some(Idle { sender, since }) = kept.idle.pop() {
            if sender.is_ready() && since.elapsed() < IDLE_TIME {
                return Some(Lent { connection: Connection::Http1(sender, Some(self.home(made_for))), reused: true });
            }
        }
        kept.shared.retain(|shared| !shared.sender.is_closed());
        let free = |shared: &&Shared| shared.streams.taken.load(Ordering::Relaxed) < STREAMS;
        let shared = kept.shared.iter().find(free)?;
        Some(Lent {
            connection: Connection::Http2(shared.sender.clone(), Streams::enter(&shared.streams)),
            reused: true,
        })
    }

    async fn add_http1(self: &Arc<Self>, dialled: Dialled, made_for: &MadeFor) -> Result<Lent, hyper::Error> {
        let sender = http1(dialled.wire, dialled.open).await?;
        let mut kept = self.kept();
        kept.renew(made_for);
        kept.speaks = Some(Version::Http1);
        Ok(Lent { connection: Connection::Http1(sender, Some(self.home(made_for))), reused: false })
    }

    fn home(self: &Arc<Self>, made_for: &MadeFor) -> Home {
        Home { made_for: made_for.clone(), slot: Arc::downgrade(self) }
    }

    async fn add_http2(self: &Arc<Self>, dialled: Dialled, made_for: &MadeFor) -> Result<Lent, hyper::Error> {
        let Dialled { wire, open, .. } = dialled;
        let (sender, connection) = http2::Builder::new(Parts::of(wire.clone()))
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(u32::try_from(HEAD_SIZE).unwrap_or(u32::MAX))
            .handshake(TokioIo::new(wire.clone()))
            .await?;
        tokio::spawn(run(connection, open));
        let streams = Arc::new(Load { taken: AtomicUsize::new(0), count: Arc::clone(&self.count) });
        let shared = Shared { sender, streams, made: Instant::now() };
        let connection = Connection::Http2(shared.sender.clone(), Streams::enter(&shared.streams));
        let mut kept = self.kept();
        kept.renew(made_for);
        kept.speaks = Some(Version::Http2);
        kept.shared.push(shared);
        self.sweep_later(&mut kept);
        Ok(Lent { connection, reused: false })
    }

    /// Takes an HTTP/1 connection back, unless there are enough.
    fn put(self: &Arc<Self>, sender: http1::SendRequest<Upload>, made_for: &MadeFor) {
        let mut kept = self.kept();
        if sender.is_closed() || !kept.is_for(made_for) {
            return;
        }
        if kept.idle.len() >= IDLE {
            kept.idle.remove(0);
        }
        kept.idle.push(Idle { sender, since: Instant::now() });
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
                kept.idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE_TIME);
                kept.shared.retain(|shared| {
                    let used = shared.streams.taken.load(Ordering::Relaxed) > 0 || shared.made.elapsed() < IDLE_TIME;
                    !shared.sender.is_closed() && used
                });
                if kept.idle.is_empty() && kept.shared.is_empty() {
                    kept.swept = false;
                    return;
                }
            }
        });
    }
}

impl Kept {
    fn is_for(&self, made_for: &MadeFor) -> bool {
        self.made_for.as_ref().is_some_and(|made| made.is(made_for))
    }

    fn speaks(&self, made_for: &MadeFor) -> Option<Version> {
        self.speaks.filter(|_| self.is_for(made_for))
    }

    /// Lets go of connections that were made for something else. Requests under way on them are not
    /// disturbed.
    fn renew(&mut self, made_for: &MadeFor) {
        if !self.is_for(made_for) {
            self.idle.clear();
            self.shared.clear();
            self.speaks = None;
            self.made_for = Some(made_for.clone());
        }
    }
}

impl Lent {
    #[must_use]
    pub fn version(&self) -> Version {
        match &self.connection {
            Connection::Http1(..) => Version::Http1,
            Connection::Http2(..) => Version::Http2,
        }
    }

    /// Puts back what nothing was sent on.
    pub fn put_back(self) {
        if let Connection::Http1(sender, home) = self.connection {
            drop(Lease { sender: Some(sender), home });
        }
    }

    /// Sends the request, which has the form that this version wants, and waits for the response head.
    ///
    /// # Errors
    /// See [`Failed`].
    pub async fn send(self, request: Request<Upload>) -> Result<(Response<Incoming>, Held), Failed> {
        match self.connection {
            Connection::Http1(mut sender, home) => {
                let response = checked(sender.try_send_request(request).await)?;
                Ok((response, Held::Http1(Lease { sender: Some(sender), home })))
            }
            Connection::Http2(mut sender, streams) => {
                let response = checked(sender.try_send_request(request).await)?;
                Ok((response, Held::Http2(streams)))
            }
        }
    }
}

type Answered = Result<Response<Incoming>, hyper::client::conn::TrySendError<Request<Upload>>>;

/// Lets no response through whose headers describe another message than it is. Its connection ends with it.
fn checked(answered: Answered) -> Result<Response<Incoming>, Failed> {
    let mut response = answered.map_err(Failed::new)?;
    match framing::check_response(&mut response) {
        Ok(()) => Ok(response),
        Err(fault) => Err(Failed { request: None, failure: Failure::Reset, cause: Cause::Framing(fault) }),
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let (Some(sender), Some(home)) = (self.sender.take(), &self.home)
            && let Some(slot) = home.slot.upgrade()
        {
            slot.put(sender, &home.made_for);
        }
    }
}

impl Failed {
    fn new(mut failed: hyper::client::conn::TrySendError<Request<Upload>>) -> Self {
        let request = failed.take_message().map(Box::new);
        let error = failed.into_error();
        let failure = match (&request, http2_error(&error)) {
            (Some(_), _) => Failure::ResetBeforeRequest,
            // Streams that a GOAWAY leaves out were not looked at (RFC 9113, 6.8), nor were refused ones (8.7).
            (None, Some(error)) if error.is_remote() && error.is_go_away() => Failure::Refused,
            (None, Some(error)) if error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM) => {
                Failure::Refused
            }
            _ => Failure::Reset,
        };
        Self { request, failure, cause: Cause::Codec(error) }
    }

    /// The connection ended, or was ended, before there was an answer.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let Cause::Codec(error) = &self.cause else { return false };
        let io = std::error::Error::source(error).is_some_and(|source| source.is::<std::io::Error>());
        error.is_incomplete_message() || error.is_closed() || error.is_canceled() || io
    }

    /// What came as an answer is none in HTTP, or not to be passed on.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        match &self.cause {
            Cause::Codec(error) => {
                let ours = |error: &h2::Error| error.is_library() && error.reason() == Some(h2::Reason::PROTOCOL_ERROR);
                error.is_parse() || http2_error(error).is_some_and(ours)
            }
            Cause::Framing(_) => true,
        }
    }

    /// For the log.
    #[must_use]
    pub fn told(&self) -> String {
        match &self.cause {
            Cause::Codec(error) => match std::error::Error::source(error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            },
            Cause::Framing(fault) => (*fault).to_owned(),
        }
    }
}

fn http2_error(error: &hyper::Error) -> Option<&h2::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

async fn http1(wire: Wire, open: Open) -> Result<http1::SendRequest<Upload>, hyper::Error> {
    let (sender, connection) = http1::Builder::new()
        .max_headers(HEADERS)
        .max_header_size(HEAD_SIZE)
        .handshake(TokioIo::new(wire.clone()))
        .await?;
    tokio::spawn(run(Turn::new(connection.with_upgrades(), wire), open));
    Ok(sender)
}

/// Runs the parts of an HTTP/2 client. The first is the one that reads and writes, and has the wire.
#[derive(Clone)]
struct Parts(Arc<Mutex<Option<Wire>>>);

impl Parts {
    fn of(wire: Wire) -> Self {
        Self(Arc::new(Mutex::new(Some(wire))))
    }
}

impl<F> hyper::rt::Executor<F> for Parts
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, part: F) {
        let wire = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match wire {
            Some(wire) => tokio::spawn(Turn::new(part, wire)),
            None => tokio::spawn(part),
        };
    }
}

/// Whoever sent a request learns how the connection ended.
async fn run(connection: impl Future<Output = hyper::Result<()>>, open: Open) {
    let _ = connection.await;
    drop(open);
}

/// Idle HTTP/1 connections kept for each worker.
const IDLE: usize = 256;
/// How long connections are kept that nobody uses, and how often they are looked over. Many apps close
/// theirs after a minute or more.
const IDLE_TIME: Duration = Duration::from_secs(55);
const SWEEP_TIME: Duration = Duration::from_secs(20);
/// Requests at a time on one HTTP/2 connection; what peers allow is as a rule a hundred or more.
const STREAMS: usize = 100;
/// A connection on which something is waited for is asked for a sign of life.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
