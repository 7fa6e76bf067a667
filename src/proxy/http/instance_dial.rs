//! A connection for a request to one instance: a pooled one, a new one, or one that is waited for.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::proxy::balance::{Balancer, Clock, Instance, Picked, Report};
use crate::proxy::codec::pool::{Checkout, Dialled, NoConnection, Pool, PoolKey, PooledConnection, Version};
use crate::proxy::codec::wire::{Counts, Wire};
use crate::proxy::dial::{Offer, attempt};
use crate::proxy::limits::{Limit, Overflow, Permit};
use crate::proxy::outcome::{Fault, Outcome};
use crate::proxy::socket::Socket;
use crate::snapshot::Target;
use crate::tls::Stream;

/// The inputs of a connection to an instance.
pub(super) struct Dial {
    pub target: Arc<Target>,
    pub balancer: Arc<Balancer>,
    pub until: Instant,
    /// For a request that needs a connection of HTTP/1 for itself.
    pub alone: bool,
    pub only_http2: bool,
    /// Where no more connections may be made, one of those that are there is waited for.
    pub may_wait: bool,
}

/// An instance that there is no connection to.
pub(super) struct Unconnected {
    pub instance: Arc<Instance>,
    pub fault: Fault,
}

impl Dial {
    /// Reports a failure; how the request goes is yet to be reported.
    pub(super) async fn connect(self, picked: Picked, clock: Clock) -> Result<(Picked, PooledConnection), Unconnected> {
        match self.connection(picked.instance()).await {
            Ok(pooled) => Ok((picked, pooled)),
            Err(why) => {
                let (instance, fault) = (Arc::clone(picked.instance()), Fault::from(why));
                if fault.outcome != Outcome::Overflow {
                    picked.report(Report::Unreachable, Duration::ZERO, clock.now());
                }
                Err(Unconnected { instance, fault })
            }
        }
    }

    async fn connection(&self, instance: &Instance) -> Result<PooledConnection, NoConnection> {
        let permit = || self.balancer.admit(Limit::Connections);
        if self.alone {
            let open = instance.pool().enter(Some(permit()?));
            let (mesh, _) = attempt(&self.target, instance, self.until, Offer::Http1, self.balancer.observer()).await?;
            return Pool::connect_once(wire_to(instance, mesh), open).await;
        }
        let pool_key = PoolKey::Mesh(Arc::clone(self.target.tls()));
        match instance.pool().connect(&pool_key, self.dial(instance, || permit().map(Some))).await {
            // As in Envoy, requests wait for one of the connections, and each instance may have one.
            Err(NoConnection::Overflow(_)) if self.may_wait => match instance.pool().borrow(&pool_key).await {
                Checkout::PooledConnection(pooled) => Ok(*pooled),
                Checkout::None => instance.pool().connect(&pool_key, self.dial(instance, || Ok(None))).await,
            },
            dialled => dialled,
        }
    }

    async fn dial(
        &self,
        instance: &Instance,
        permit: impl FnOnce() -> Result<Option<Permit>, Overflow>,
    ) -> Result<Dialled, NoConnection> {
        let open = instance.pool().enter(permit()?);
        let (mesh, _) = attempt(&self.target, instance, self.until, Offer::All, self.balancer.observer()).await?;
        let http2 = self.only_http2 || mesh.alpn() == Some(b"h2");
        let version = if http2 { Version::Http2 } else { Version::Http1 };
        Ok(Dialled { wire: wire_to(instance, mesh), version, open })
    }
}

fn wire_to(instance: &Instance, mesh: Stream<Socket>) -> Wire {
    Wire::tls(mesh).counted(Counts::Cluster(Arc::clone(instance.stats())))
}
