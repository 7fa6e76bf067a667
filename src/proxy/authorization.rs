//! Whether a peer of an inbound listener may still be served, for everything that it has open.
//!
//! What begins needs an identity that is valid now and a decision that allows it now. What is open ends when a newer
//! state of the intentions denies it, also while its listener is no longer wanted or a drain goes on. That an identity
//! runs out ends nothing that is open, as in Envoy: peers renew theirs while connections go on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

use super::listener::ListenerState;
use super::log_limit::Audited;
use super::outcome::{Fault, Outcome};
use super::record::Record;
use crate::drain::Stage;
use crate::jwt::Verified;
use crate::observe::{ConnectionInfo, Event, Observer};
use crate::snapshot::{Decider, Decision, InboundListener, RequestView, Service};
use crate::tls::{self, PeerError, SpiffeId};

/// A peer that has proved who it is.
#[derive(Debug)]
pub(super) struct Peer {
    pub id: Arc<SpiffeId>,
    proof: Mutex<Proof>,
}

/// To whom it was proved, and until when that holds.
#[derive(Debug)]
struct Proof {
    to: Arc<tls::Server>,
    until: SystemTime,
}

/// A chain as it was shown, leaf first.
type Chain<'a, 'b> = Option<&'a [CertificateDer<'b>]>;

impl Peer {
    /// The identity of a peer with this chain.
    ///
    /// # Errors
    /// When it is nobody of the mesh.
    pub(super) fn new(service: &Service, chain: Chain<'_, '_>) -> Result<Self, PeerError> {
        let to = Arc::clone(&service.tls);
        let (id, until) = authenticate(&to, chain)?;
        Ok(Self { id, proof: Mutex::new(Proof { to, until }) })
    }

    /// Whether the peer is still who it was, by the credentials of now: the leaf has not expired, and the roots still
    /// vouch for it. `chain` gives what it showed, and is asked only where something has changed.
    ///
    /// # Errors
    /// Why it is not. It gets nothing new then.
    pub(super) fn check(
        &self,
        service: &Service,
        chain: impl FnOnce(&mut dyn FnMut(Chain<'_, '_>)),
    ) -> Result<(), PeerError> {
        let mut proof = self.proof.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&proof.to, &service.tls) && SystemTime::now() <= proof.until {
            return Ok(());
        }
        let mut checked = Err(PeerError::NoCertificate);
        chain(&mut |chain| checked = authenticate(&service.tls, chain));
        let (_, until) = checked?;
        *proof = Proof { to: Arc::clone(&service.tls), until };
        Ok(())
    }

    /// Whether it was the present credentials that it proved itself to.
    #[must_use]
    pub(super) fn is_proved_to(&self, service: &Service) -> bool {
        Arc::ptr_eq(&self.proof.lock().unwrap_or_else(PoisonError::into_inner).to, &service.tls)
    }

    /// When it is to be checked again at the latest.
    #[must_use]
    pub(super) fn until(&self) -> SystemTime {
        self.proof.lock().unwrap_or_else(PoisonError::into_inner).until
    }
}

fn authenticate(to: &tls::Server, chain: Chain<'_, '_>) -> Result<(Arc<SpiffeId>, SystemTime), PeerError> {
    let peer = to.authenticate(chain, SystemTime::now())?;
    Ok((peer.id, peer.until))
}

/// What a connection of bytes, and whatever it was upgraded to, may no longer go on for.
pub(super) enum Revoked {
    Denied(Arc<Service>, String),
    /// The drain time is over.
    Drained,
    /// The listener carries requests now, each of which is to be judged.
    CarriesRequests,
}

/// Of a connection of bytes that may carry requests, each of which is to be judged now.
pub(super) fn carries_requests() -> Fault {
    Fault::new(Outcome::OtherProtocol, "closed, as the protocol is one of HTTP now")
}

pub(super) fn drained() -> Fault {
    Fault::new(Outcome::Drained, "closed at the end of the drain time")
}

/// Ends when an open connection must. `audited` and the record of the connection get what audit mode lets go on, and the
/// reason of the denial.
#[expect(clippy::manual_async_fn, reason = "the future of an async fn has room for each argument twice")]
pub(super) fn revoked(
    state: &mut watch::Receiver<ListenerState<InboundListener>>,
    peer: &SpiffeId,
    audited: &Audited,
    record: &mut Record,
) -> impl Future<Output = Revoked> {
    async move {
        loop {
            if state.changed().await.is_err() {
                return Revoked::Drained;
            }
            let (service, stage) = {
                let now = state.borrow_and_update();
                (Arc::clone(&now.config.service), now.stage)
            };
            if stage >= Stage::Closing {
                return Revoked::Drained;
            }
            match verdict(&service, &service.intentions.decide(peer)) {
                Verdict::Allowed => {}
                Verdict::WouldDeny(reason) => {
                    audited.log(peer, &service.name, "open connection", &reason);
                    record.would_revoke(reason);
                }
                Verdict::Denied(reason) => return Revoked::Denied(service, reason),
            }
            if service.protocol.is_http() {
                return Revoked::CarriesRequests;
            }
        }
    }
}

/// The decision about a connection of bytes, with the reason of a denial.
pub(super) enum Verdict {
    Allowed,
    /// It is let through, as the service is in audit mode.
    WouldDeny(String),
    Denied(String),
}

/// Decides about a connection of bytes that the peer asks for.
pub(super) fn decide(service: &Service, peer: &SpiffeId, connection: &ConnectionInfo, observer: &Observer) -> Verdict {
    let decision = service.intentions.decide(peer);
    let verdict = verdict(service, &decision);
    observer.observe(match &verdict {
        Verdict::WouldDeny(reason) => Event::WouldDeny { connection, request: None, reason },
        Verdict::Allowed | Verdict::Denied(_) => Event::Decided { connection, source: peer, decision: &decision },
    });
    verdict
}

/// Why the peer may not have a connection of bytes any more, if it may not.
pub(super) fn denial(service: &Service, peer: &SpiffeId) -> Option<String> {
    match verdict(service, &service.intentions.decide(peer)) {
        Verdict::Denied(reason) => Some(reason),
        Verdict::Allowed | Verdict::WouldDeny(_) => None,
    }
}

fn verdict(service: &Service, decision: &Decision<'_>) -> Verdict {
    match reason(decision) {
        None => Verdict::Allowed,
        Some(reason) if service.audit => Verdict::WouldDeny(reason),
        Some(reason) => Verdict::Denied(reason),
    }
}

/// Why a connection of bytes may not be had, if it may not.
pub(super) fn reason(decision: &Decision<'_>) -> Option<String> {
    match decision {
        Decision::Allow(_) => None,
        Decision::Deny(decider) => Some(decider.to_string()),
        // Only requests can be judged by permissions; a TCP listener sees none.
        Decision::EachRequest(intention) => {
            Some(format!("{intention} has L7 permissions, which deny everything on a tcp service"))
        }
    }
}

/// The parts of the decision about a request that are kept, besides the request.
#[derive(Debug)]
pub(super) struct Judged {
    /// Tokens that were valid then. That one expires ends nothing that is open, as in Envoy.
    pub verified: Verified,
    /// When the decision was made.
    pub began: SystemTime,
    /// The request's headers are kept too.
    pub headers: bool,
    /// It is denied and goes on in audit mode, which has been counted.
    pub audited: bool,
}

/// Why a request that is under way may not go on, if it may not by the intentions. Audit mode is for the caller to mind.
pub(super) fn request_denial(
    service: &Service,
    peer: &SpiffeId,
    request: &RequestView<'_>,
    judged: &Judged,
) -> Option<String> {
    let intentions = &service.intentions;
    if !judged.headers && intentions.look_at_headers(peer) {
        // No rule looked at headers when the request came, and they are gone.
        return Some("the rules look at headers now, which were not kept".into());
    }
    match intentions.decide_request(peer, request, &judged.verified) {
        Decision::Allow(_) => None,
        Decision::Deny(Decider::Token(..)) => {
            // Other tokens may be asked for than those that were looked at.
            let providers = &service.token_providers;
            match intentions.verify_and_decide(peer, request, providers, judged.began).0 {
                Decision::Allow(_) => None,
                Decision::Deny(decider) => Some(decider.to_string()),
                Decision::EachRequest(intention) => Some(intention.to_string()),
            }
        }
        Decision::Deny(decider) => Some(decider.to_string()),
        Decision::EachRequest(intention) => Some(intention.to_string()),
    }
}
