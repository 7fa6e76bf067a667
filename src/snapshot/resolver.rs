//! The ends of a chain: resolvers and their targets.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::address::Endpoints;
use super::hash::LoadBalancer;
use crate::tls;

/// Envoy's default for a whole request, retries included.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// A resolver node: the target that is meant, then those to fail over to, in order.
#[derive(Debug)]
pub struct Resolver {
    /// Never empty; the first is the primary.
    pub targets: Vec<Arc<Target>>,
    pub load_balancer: LoadBalancer,
    /// The whole request, HTTP only, where the chain starts with this node; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// There is a `service-resolver`: for `explain` alone.
    pub is_configured: bool,
    /// It says what the request timeout is: for `explain` alone.
    pub sets_request_timeout: bool,
}

impl Resolver {
    /// With what holds where nothing is set.
    #[must_use]
    pub fn new(targets: Vec<Arc<Target>>) -> Self {
        Self {
            targets,
            load_balancer: LoadBalancer::default(),
            request_timeout: Some(REQUEST_TIMEOUT),
            is_configured: false,
            sets_request_timeout: false,
        }
    }
}

/// A service (subset, datacenter …) that a chain leads to.
#[derive(Debug)]
pub struct Target {
    /// The chain's opaque id, unique within it.
    pub id: String,
    pub service: String,
    pub datacenter: String,
    /// Of a chain that was compiled with settings of the registration. Empty for others.
    pub customization_hash: String,
    /// How its instances are reached.
    pub transport: Transport,
    /// TCP and TLS connect, per endpoint; Consul's default is 5 s.
    pub connect_timeout: Duration,
    pub endpoints: Arc<Endpoints>,
}

impl Target {
    /// The TLS client for its instances, whose name is the SNI.
    #[must_use]
    pub fn tls(&self) -> &Arc<tls::Client> {
        match &self.transport {
            Transport::Mesh(tls) => tls,
        }
    }

    /// The name of its cluster, as Consul gives it to Envoy (1.19.2, `CustomizeClusterName`): the SNI, behind the hash of
    /// the settings that the chain was compiled with.
    #[must_use]
    pub fn cluster(&self) -> Cow<'_, str> {
        let sni = self.tls().name().to_str();
        if self.customization_hash.is_empty() { sni } else { format!("{}~{sni}", self.customization_hash).into() }
    }
}

/// How the instances of a target are reached. Another way to reach them (plain TCP, TLS that is not the mesh's) is another
/// variant here, and another arm of `attempt` in `proxy/dial.rs`.
#[derive(Debug, Clone)]
pub enum Transport {
    /// Mesh TLS, ready to shake hands as us: our leaf, the target's SNI, and the identities that its instances may show.
    /// The trust domain of those identities says which roots vouch for them.
    Mesh(Arc<tls::Client>),
}

/// For the log.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {:?} in {}", self.service, self.datacenter)
    }
}
