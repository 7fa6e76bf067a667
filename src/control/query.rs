//! The queries that the control plane sends to the agent.

use std::fmt;

use super::jwks_fetcher::KeySource;

pub(super) use crate::consul::{Chain as ChainQuery, Instances as EndpointsQuery};

/// One thing to keep watching. Equal queries are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Query {
    /// Our registration, by proxy id.
    Service(String),
    Roots,
    /// By service name.
    Leaf(String),
    /// By the name of the destination.
    Intentions(String),
    /// The default policy, for the service of that name.
    DefaultPolicy(String),
    Chain(ChainQuery),
    Endpoints(EndpointsQuery),
    PreparedQuery(PreparedQuery),
    /// The config entry of that name.
    Mesh,
    /// The config entry of that name, `global`.
    ProxyDefaults,
    /// A config entry, by its name.
    JwtProvider(String),
    /// A key set that is not in its config entry; not asked of the agent.
    Keys(KeySource),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PreparedQuery {
    pub(super) name: String,
    pub(super) datacenter: Option<String>,
}

impl Query {
    /// Whether nothing can be served without it.
    pub(super) fn is_essential(&self) -> bool {
        matches!(self, Self::Service(_) | Self::Roots | Self::Leaf(_) | Self::Intentions(_) | Self::DefaultPolicy(_))
    }

    /// Whether it says where upstreams lead, rather than what we are.
    pub(super) fn is_about_upstreams(&self) -> bool {
        matches!(self, Self::Chain(_) | Self::Endpoints(_) | Self::PreparedQuery(_))
    }
}

/// For the log: what is asked, in words.
impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(id) => write!(f, "registration of {id}"),
            Self::Roots => f.write_str("CA roots"),
            Self::Leaf(service) => write!(f, "leaf certificate of {service}"),
            Self::Intentions(service) => write!(f, "intentions of {service}"),
            Self::DefaultPolicy(service) => write!(f, "default policy of {service}"),
            Self::Chain(query) => write!(f, "discovery chain of {}", query.service),
            Self::Endpoints(query) => {
                write!(f, "endpoints of {}", query.service)?;
                query.datacenter.iter().try_for_each(|datacenter| write!(f, " in {datacenter}"))
            }
            Self::PreparedQuery(query) => write!(f, "prepared query {}", query.name),
            Self::Mesh => f.write_str("mesh config entry"),
            Self::ProxyDefaults => f.write_str("proxy-defaults config entry"),
            Self::JwtProvider(name) => write!(f, "jwt-provider {name}"),
            Self::Keys(source) => write!(f, "key set of {source}"),
        }
    }
}
