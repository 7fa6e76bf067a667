//! Client connections that are used again: those of one instance, or of the local app.
//!
//! A pool has a slot for each worker, as a connection stays on the thread that made it. HTTP/1 connections
//! are lent one request at a time; an HTTP/2 connection is shared by as many as fit.

mod failure;
mod http1;
mod slot;

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::proxy::codec::wire::Wire;
use crate::proxy::limits::Permit;
use crate::proxy::workers;
use http1::Http1;
use slot::{Count, Dial, Slot};

pub(crate) use failure::{Failed, NoConnection};
pub(crate) use slot::{ConnectionGuard, Dialled, Open, PoolKey, PooledConnection, Version};

/// Connections to one place.
#[derive(Default)]
pub struct Pool {
    slots: Mutex<Vec<Arc<Slot>>>,
    shared: Arc<Count>,
}

/// The answer of a pool to a request for a connection.
pub enum Checkout {
    PooledConnection(Box<PooledConnection>),
    /// There is none at all.
    None,
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
        let waiters = loop {
            if let Some(pooled) = slot.reuse(pool_key) {
                return Ok(pooled);
            }
            match slot.dialling(pool_key) {
                Some(Dial::Ours(waiters)) => break Some(waiters),
                Some(Dial::Others(mut outcome)) => {
                    // Without a reason there is a connection, or the dialling task gave up.
                    let _ = outcome.changed().await;
                    if let Some(why) = outcome.borrow().clone() {
                        return Err(why);
                    }
                }
                None => break None,
            }
        };
        match dial.await {
            Ok(dialled) => slot.add(dialled, pool_key, waiters).await,
            Err(why) => {
                if let Some(waiters) = waiters {
                    let _ = waiters.send(Some(why.clone()));
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
        Ok(PooledConnection::once(Http1::new(wire, open).await?))
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
            slots.push(Arc::new(Slot::new(&self.shared)));
        }
        Arc::clone(&slots[worker])
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use http::Request;
    use http_body_util::BodyExt as _;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;
    use crate::observe::ConnectError;
    use crate::proxy::codec::replay_body::ReplayBody;
    use crate::proxy::socket::Socket;
    use crate::snapshot::LocalApp;

    fn key(name: &str) -> PoolKey {
        PoolKey::App(LocalApp::Unix(name.into()))
    }

    /// A connection to an app that answers each request alike, and the way to it that a pool dials.
    async fn dial(pool: &Pool) -> Result<Dialled, NoConnection> {
        let (near, mut far) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            while far.read(&mut [0; 1024]).await? > 0 {
                far.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
            }
            io::Result::Ok(())
        });
        Ok(Dialled { wire: Wire::plain(Socket::unix(near)), version: Version::Http1, open: pool.enter(None) })
    }

    async fn exchange(pooled: PooledConnection) {
        let request = Request::builder().uri("/").header("host", "a").body(ReplayBody::none()).unwrap();
        let (response, guard) = pooled.send(request).await.ok().expect("an answer");
        assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "ok");
        drop(guard);
    }

    /// An idle connection, as soon as the codec has seen that it is idle.
    async fn free(pool: &Pool, key: &PoolKey) -> PooledConnection {
        loop {
            match pool.reuse(key) {
                Some(pooled) => return pooled,
                None => tokio::task::yield_now().await,
            }
        }
    }

    #[tokio::test]
    async fn a_connection_is_used_again_for_the_same_place_and_for_no_other() {
        let pool = Pool::default();
        let pooled = pool.connect(&key("a"), dial(&pool)).await.expect("a connection");
        assert!(!pooled.reused);
        exchange(pooled).await;
        let pooled = free(&pool, &key("a")).await;
        assert!(pooled.reused && pool.reuse(&key("a")).is_none(), "HTTP/1 carries one request at a time");
        pooled.put_back();
        exchange(free(&pool, &key("a")).await).await;
        assert!(pool.reuse(&key("b")).is_none());
        assert!(pool.reuse(&key("a")).is_none(), "what was made for another place is let go of");
    }

    #[tokio::test]
    async fn a_connection_that_failed_is_told_to_the_one_who_made_it() {
        let pool = Pool::default();
        let failed = pool.connect(&key("a"), async { Err(NoConnection::Unreachable(ConnectError::TimedOut)) }).await;
        assert!(matches!(failed, Err(NoConnection::Unreachable(ConnectError::TimedOut))));
        assert!(matches!(pool.borrow(&key("a")).await, Checkout::None), "no connection counts as open");
    }
}
