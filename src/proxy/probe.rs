//! Looks after instances that could not be reached, so that they are used again as soon as they can be, and no
//! connection or request has to find out.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::balance::{Balancer, Clock, Instance, OutboundRuntime};
use super::dial::{self, Offer};
use super::listener::ListenerState;
use super::socket::Socket;
use super::tunnel::MeshStream;
use crate::drain::Stage;
use crate::snapshot::Target;
use crate::tls;

/// Has a task look after the instance, unless one does. It ends when the instance is reached by anybody, leaves the
/// catalog, or when nobody uses the target any more.
pub(super) fn begin(
    state: &watch::Receiver<ListenerState<OutboundRuntime>>,
    target: &Target,
    instance: &Arc<Instance>,
    clock: Clock,
) {
    if let Some(watched) = instance.watch() {
        tracing::info!(
            target: "proxy.upstream", service = target.service, instance = %instance.address,
            "An instance can't be connected to; it is used again when it can be"
        );
        let (state, id, instance) = (state.clone(), target.id.clone(), Arc::clone(instance));
        tokio::spawn(async move {
            let _watched = watched;
            look_after(&state, &id, &instance, clock).await;
        });
    }
}

async fn look_after(
    state: &watch::Receiver<ListenerState<OutboundRuntime>>,
    id: &str,
    instance: &Arc<Instance>,
    clock: Clock,
) {
    loop {
        sleep(PERIOD.mul_f32(0.75 + fastrand::f32() / 2.0)).await;
        // For three periods: the next probe comes before a request would find its time up.
        if !instance.stay_aside(clock.now(), PERIOD * 3) {
            return tracing::info!(target: "proxy.upstream", instance = %instance.address, "An instance can be connected to again");
        }
        let plan = {
            let state = state.borrow();
            Arc::clone(if state.stage == Stage::Running { &state.config.upstream } else { return })
        };
        // As of now: credentials may be others than when it was put aside.
        let target = plan.upstream.chain.targets().find(|target| target.id == id);
        let Some((target, balancer)) = target.and_then(|target| Some((target, plan.balancers.get(id)?))) else {
            return;
        };
        if !balancer.has(instance) || !balancer.is_used(clock.now()) {
            return;
        }
        probe(target, balancer, instance, plan.upstream.chain.protocol.is_http());
    }
}

/// Connects once, beside attempts of before that have not come to an end: a connect that was swallowed is of no use
/// even if the host is back.
fn probe(target: &Arc<Target>, balancer: &Balancer, instance: &Arc<Instance>, http: bool) {
    // Enough are being probed; this one will be soon.
    let Some(permit) = balancer.probe_permit() else { return };
    let (target, instance, observer) = (Arc::clone(target), Arc::clone(instance), balancer.observer().clone());
    tokio::spawn(async move {
        let until = Instant::now() + target.connect_timeout.min(TIME);
        let reached = if http {
            let dialled = dial::attempt(&target, &instance, until, Offer::All, &observer).await;
            dialled.map(|(stream, _)| drop(stream)).is_ok()
        } else {
            match dial::connect(&target, &instance, until, &observer).await {
                Ok((mesh, _)) => {
                    spare(mesh, target.tls(), &instance);
                    true
                }
                Err(why) => why.is_denial(),
            }
        };
        drop(permit);
        if reached {
            instance.is_back();
        }
    });
}

/// Ends a connection that nobody needs, and keeps its session if it can carry another.
pub(super) fn spare(mut mesh: MeshStream<Socket>, tls: &Arc<tls::Client>, instance: &Arc<Instance>) {
    if !mesh.answers_for_app() {
        return mesh.part();
    }
    let (tls, instance) = (Arc::clone(tls), Arc::clone(instance));
    tokio::spawn(async move {
        match timeout(TIME, mesh.end_unused()).await {
            Ok(Ok(())) => instance.sessions().keep(mesh, &tls),
            _ => mesh.part(),
        }
    });
}

/// Interval between two probes of an instance, give or take a quarter.
const PERIOD: Duration = Duration::from_millis(600);
/// Timeout of one probe.
const TIME: Duration = Duration::from_secs(3);
