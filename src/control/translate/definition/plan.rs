//! The content of a definition, before anything is known of the mesh.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::access_log::Settings as AccessLog;
use crate::control::query::{ChainQuery, PreparedQuery};
use crate::snapshot::{
    Bind, Exposed, Limits, LocalApp, MetricsSettings, OutboundKey, PassiveHealthCheck, Protocol, RequestSettings,
    Upgrades,
};
use crate::trace;

/// Consul's default for connecting to an upstream's instance.
pub(in crate::control) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The configuration of the proxy from its definition alone.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::control) struct Definition {
    /// The service that we stand in front of: its leaf and its intentions are ours.
    pub(in crate::control) service: String,
    pub(in crate::control) public: Option<PublicPlan>,
    pub(in crate::control) upstreams: BTreeMap<OutboundKey, UpstreamPlan>,
    pub(in crate::control) exposed: BTreeMap<Bind, Exposed>,
    pub(in crate::control) access_log: Option<AccessLog>,
    pub(in crate::control) metrics: MetricsSettings,
    pub(in crate::control) traces: trace::Settings,
}

impl Definition {
    /// Whether the registration turns audit mode on, by itself or as proxy-defaults is merged into it.
    pub(in crate::control) fn asks_for_audit(&self) -> bool {
        self.public.as_ref().is_some_and(|public| public.audit)
    }

    /// Leaves the tunnel as it is, or turns it off everywhere.
    pub(in crate::control) fn restrict_tunnel(&mut self, on: bool) {
        self.public.iter_mut().for_each(|public| public.tunnel &= on);
        self.upstreams.values_mut().for_each(|upstream| upstream.tunnel &= on);
    }
}

/// The public listener but for credentials and intentions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct PublicPlan {
    pub(in crate::control) bind: Bind,
    pub(in crate::control) protocol: Protocol,
    pub(in crate::control) local_app: LocalApp,
    pub(in crate::control) local_connect_timeout: Duration,
    pub(in crate::control) local_request_timeout: Option<Duration>,
    pub(in crate::control) local_idle_timeout: Option<Duration>,
    pub(in crate::control) handshake_timeout: Duration,
    pub(in crate::control) max_connections: Option<usize>,
    /// Answers of ours say why in a header.
    pub(in crate::control) expose_cause: bool,
    /// Denied traffic is logged and let through: `lictor_intentions_audit`.
    pub(in crate::control) audit: bool,
    pub(in crate::control) upgrades: Upgrades,
    /// Whether the tunnel is agreed to, tcp only: `lictor_tunnel`.
    pub(in crate::control) tunnel: bool,
    /// Whether clients get the rule that denies them, tcp only: `lictor_share_denial_rule`.
    pub(in crate::control) share_denial_rule: bool,
}

/// An upstream but for its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct UpstreamPlan {
    pub(in crate::control) name: String,
    pub(in crate::control) source: Source,
    pub(in crate::control) limits: Limits,
    pub(in crate::control) passive_health_check: PassiveHealthCheck,
    pub(in crate::control) requests: RequestSettings,
    /// Whether the tunnel is offered, tcp only: `lictor_tunnel`, of the upstream or else of the proxy.
    pub(in crate::control) tunnel: bool,
}

/// The source of an upstream's targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Source {
    Chain(ChainQuery),
    PreparedQuery { query: PreparedQuery, protocol: Protocol, connect_timeout: Duration },
}
