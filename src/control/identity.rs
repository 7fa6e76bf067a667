//! Our identity: the last good credentials, and the newest leaf and roots that replace them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::translate::Bad;
use crate::consul::api;
use crate::tls::{Aead, Credentials, Policy};

#[derive(Debug, Default)]
pub(super) struct Identity {
    roots: Option<Arc<api::CaRoots>>,
    leaf: Option<Arc<api::Leaf>>,
    good: Option<Good>,
    policy: Policy,
    aead: Aead,
}

#[derive(Debug)]
struct Good {
    roots: Arc<api::CaRoots>,
    leaf: Arc<api::Leaf>,
    credentials: Arc<Credentials>,
    /// What the log says of its age.
    reported: Age,
}

/// How much of the time is over for which credentials hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Age {
    #[default]
    Usual,
    /// Consul's agent renews a leaf when 60 to 90 % of its life are over (`calculateSoftExpiry`, 1.19.2).
    Late,
    Expired,
}

/// A certificate with less than this part of its life left (one twentieth) is late.
const LATE: u32 = 20;

impl Identity {
    /// Nothing is known yet. `aead` is what is to seal records.
    pub(super) fn new(aead: Aead) -> Self {
        Self { aead, ..Self::default() }
    }

    pub(super) fn credentials(&self) -> Option<&Arc<Credentials>> {
        self.good.as_ref().map(|good| &good.credentials)
    }

    /// Takes new roots; false if they are those that we have.
    pub(super) fn set_roots(&mut self, roots: Arc<api::CaRoots>) -> bool {
        let new = self.roots.as_ref() != Some(&roots);
        if new {
            self.roots = Some(roots);
        }
        new
    }

    /// Takes a new leaf; false if it is the one that we have.
    pub(super) fn set_leaf(&mut self, leaf: &api::Leaf) -> bool {
        let new = self.leaf.as_deref() != Some(leaf);
        if new {
            self.leaf = Some(Arc::new(leaf.clone()));
        }
        new
    }

    /// Takes what the mesh asks of TLS; says whether that made other credentials of those that we have.
    pub(super) fn set_policy(&mut self, policy: Policy) -> bool {
        if self.policy == policy {
            return false;
        }
        self.policy = policy.clone();
        let Some(good) = &mut self.good else { return false };
        good.credentials = Arc::new(good.credentials.under(policy));
        true
    }

    /// What is to be said of credentials that should have been renewed by now: once when they are late, and once when they
    /// have expired.
    pub(super) fn overdue(&mut self, now: SystemTime) -> Option<String> {
        let good = self.good.as_mut()?;
        let (id, from, until) = (good.credentials.id(), good.credentials.not_before(), good.credentials.not_after());
        let life = until.duration_since(from).unwrap_or_default();
        let left = until.duration_since(now).unwrap_or_default();
        let age = match left {
            Duration::ZERO => Age::Expired,
            left if left < life / LATE => Age::Late,
            _ => Age::Usual,
        };
        let is_new = age > std::mem::replace(&mut good.reported, age);
        let look = "look in the logs of the agent and of the servers for what is wrong with the certificate authority";
        match age {
            Age::Late if is_new => Some(format!(
                "the leaf certificate {id} expires at {} and the agent has given no newer one: {look}",
                httpdate::fmt_http_date(until)
            )),
            Age::Expired if is_new => Some(format!(
                "the leaf certificate {id} expired at {} and the agent has given no newer one, so that peers refuse new \
                 connections: {look}",
                httpdate::fmt_http_date(until)
            )),
            _ => None,
        }
    }

    /// Whether the newest leaf or roots were refused, which time alone may mend: a certificate of a host
    /// whose clock is ahead becomes valid.
    pub(super) fn is_behind(&self) -> bool {
        let newest = self.roots.as_ref().zip(self.leaf.as_ref());
        newest.is_some_and(|(roots, leaf)| !self.is_good(roots, leaf))
    }

    /// Makes credentials of the newest leaf and roots. Says whether they changed, and what is wrong with the
    /// newest.
    ///
    /// When those do not fit together, each is tried with the last good other: bad roots must not keep out a
    /// good leaf, nor a bad leaf good roots. But no root is trusted any longer than it is listed.
    pub(super) fn refresh(&mut self, service: &str, now: SystemTime) -> (bool, Result<(), Bad>) {
        let Some((roots, leaf)) = self.roots.clone().zip(self.leaf.clone()) else { return (false, Ok(())) };
        let (renewed, refused) = self.renew(Arc::clone(&roots), leaf, service, now);
        let distrusted = self.trust_only(&roots);
        let all_the_same =
            |Bad(problem)| Bad(format!("{problem}; but no root is trusted any longer than it is listed"));
        (renewed || distrusted, if distrusted { refused.map_err(all_the_same) } else { refused })
    }

    /// Takes the best pair of leaf and roots that there is.
    fn renew(
        &mut self,
        roots: Arc<api::CaRoots>,
        leaf: Arc<api::Leaf>,
        service: &str,
        now: SystemTime,
    ) -> (bool, Result<(), Bad>) {
        let mut refused = Ok(());
        for (roots, leaf) in self.candidates(roots, leaf) {
            if self.is_good(&roots, &leaf) {
                return (false, refused);
            }
            match credentials(&roots, &leaf, service, now) {
                Ok(credentials) => {
                    let credentials = Arc::new(credentials.sealed_by(self.aead).under(self.policy.clone()));
                    self.good = Some(Good { roots, leaf, credentials, reported: Age::Usual });
                    return (true, refused);
                }
                Err(bad) => refused = refused.and(Err(bad)),
            }
        }
        (false, refused)
    }

    /// Trusts no root that the mesh lists no more, also where its present roots do not vouch for our leaf yet. A list of
    /// another trust domain is of another mesh, and one without a root is none: they change nothing.
    fn trust_only(&mut self, listed: &api::CaRoots) -> bool {
        let Some(good) = self.good.as_mut().filter(|good| good.roots.trust_domain == listed.trust_domain) else {
            return false;
        };
        let listed = anchors(listed);
        let narrowed = good.credentials.trusting_only(&listed).filter(|_| !listed.is_empty());
        let changes = narrowed.is_some();
        if let Some(credentials) = narrowed {
            good.credentials = Arc::new(credentials);
        }
        changes
    }

    /// What to try, best first. The good pair is among them if it is the best that there is.
    fn candidates(&self, roots: Arc<api::CaRoots>, leaf: Arc<api::Leaf>) -> Vec<(Arc<api::CaRoots>, Arc<api::Leaf>)> {
        let mut pairs = vec![(Arc::clone(&roots), Arc::clone(&leaf))];
        if let Some(good) = &self.good {
            pairs.push((roots, Arc::clone(&good.leaf)));
            pairs.push((Arc::clone(&good.roots), leaf));
        }
        pairs
    }

    fn is_good(&self, roots: &Arc<api::CaRoots>, leaf: &Arc<api::Leaf>) -> bool {
        self.good.as_ref().is_some_and(|good| Arc::ptr_eq(&good.roots, roots) && Arc::ptr_eq(&good.leaf, leaf))
    }
}

fn credentials(roots: &api::CaRoots, leaf: &api::Leaf, service: &str, now: SystemTime) -> Result<Credentials, Bad> {
    let key = leaf.private_key_pem.expose();
    Credentials::new(&roots.trust_domain, &anchors(roots), &leaf.cert_pem, key, service, now)
        .map_err(|error| Bad(error.to_string()))
}

/// Every listed root is trusted, active or not; their intermediates are no anchors.
fn anchors(roots: &api::CaRoots) -> Vec<String> {
    roots.roots.iter().map(|root| root.root_cert.clone()).collect()
}
