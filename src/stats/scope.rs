//! The subjects of metrics, and their names.
//!
//! A number has one name with dots, as Envoy's `/stats` and statsd show it, and one name with labels, as Prometheus and
//! dogstatsd show it. Both are made here of the same parts, the second by the rules that Consul 1.19.2 writes into
//! Envoy's bootstrap (`command/connect/envoy/bootstrap_config.go`).

use std::fmt::{self, Write as _};
use std::sync::Arc;

/// A label and its value.
pub type Label = (&'static str, String);

/// The subject of a group of metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// HTTP requests and connections of a listener: `http.<prefix>.`.
    Http(Listener),
    /// TCP connections of a listener: `tcp.<prefix>.`.
    Tcp(Listener),
    /// A listening socket by its address, as in `0.0.0.0_21000`.
    Socket(String),
    /// HTTP requests by the address of the public listener.
    SocketHttp(String),
    /// Where requests and connections are sent to.
    Cluster(Cluster),
    /// Calls of one method of gRPC, as in `fgrpc.PingServer.Ping`, to a cluster.
    Grpc(Cluster, String),
    /// The agent.
    LocalAgent,
    /// Those who fetch numbers at the addresses that the registration names.
    Scrapes,
    /// Intentions of a TCP service.
    Rbac,
    /// The limit of inbound connections.
    ConnectionLimit,
    /// The process.
    Server,
    /// What is known of upstreams.
    ClusterManager,
    /// Other answers of the agent.
    ListenerManager,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Listener {
    Public,
    Upstream(Arc<UpstreamName>),
    /// Exposed paths, by the port.
    Exposed(u16),
}

/// An upstream as the registration names it. What it leads to may be something else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamName {
    pub service: String,
    pub namespace: String,
    pub partition: String,
    pub datacenter: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cluster {
    LocalApp,
    Target(Arc<TargetName>),
}

/// A target of a discovery chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetName {
    pub service: String,
    /// Empty for the whole service.
    pub subset: String,
    pub namespace: String,
    /// Empty for the default one.
    pub partition: String,
    pub datacenter: String,
    /// Without `.consul`.
    pub trust_domain: String,
    /// Of a chain that was compiled with settings of the registration. Empty for others.
    pub custom_hash: String,
}

impl TargetName {
    /// The name of the cluster that Consul gives Envoy, which is the SNI.
    #[must_use]
    pub fn cluster(&self) -> String {
        format!("{}.internal.{}.consul", self.target(), self.trust_domain)
    }

    /// As in `v1.db.default.dc1`, or `1a47f6e1~db.default.dc1`.
    #[must_use]
    pub fn target(&self) -> String {
        let subset = if self.subset.is_empty() { String::new() } else { format!("{}.", self.subset) };
        let partition = if self.partition.is_empty() { String::new() } else { format!("{}.", self.partition) };
        format!("{}{subset}{}.{}.{partition}{}", self.hash(), self.service, self.namespace, self.datacenter)
    }

    /// What Envoy makes of it: the cluster's name up to the first dot.
    fn short(&self) -> String {
        format!("{}{}", self.hash(), if self.subset.is_empty() { &self.service } else { &self.subset })
    }

    fn hash(&self) -> String {
        if self.custom_hash.is_empty() { String::new() } else { format!("{}~", self.custom_hash) }
    }
}

/// A number's own name within its scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stat {
    /// Dots stand for levels, which Prometheus shows as underscores.
    Plain(&'static str),
    /// Answers of one class: `downstream_rq` and 2 are `downstream_rq_2xx`.
    Class(&'static str, u8),
    /// Answers with one status: `upstream_rq` and 404 are `upstream_rq_404`.
    Code(&'static str, u16),
    /// `ssl.versions.TLSv1.3`.
    TlsVersion(&'static str),
}

impl Scope {
    fn prefix(&self) -> String {
        match self {
            Self::Http(listener) => format!("http.{listener}."),
            Self::Tcp(listener) => format!("tcp.{listener}."),
            Self::Socket(address) => format!("listener.{address}."),
            Self::SocketHttp(address) => format!("listener.{address}.http.public_listener."),
            Self::Cluster(cluster) => format!("cluster.{cluster}."),
            Self::Grpc(cluster, method) => format!("cluster.{cluster}.grpc.{method}."),
            Self::LocalAgent => "cluster.local_agent.".to_owned(),
            Self::Scrapes => "http.envoy_metrics.".to_owned(),
            Self::Rbac => "connect_authz.rbac.".to_owned(),
            Self::ConnectionLimit => "connection_limit.inbound_connection_limit.".to_owned(),
            Self::Server => "server.".to_owned(),
            Self::ClusterManager => "cluster_manager.".to_owned(),
            Self::ListenerManager => "listener_manager.".to_owned(),
        }
    }

    const fn family(&self) -> &'static str {
        match self {
            Self::Http(_) | Self::Scrapes => "http",
            Self::Tcp(_) => "tcp",
            Self::Socket(_) => "listener",
            Self::SocketHttp(_) => "listener_http",
            Self::Cluster(_) | Self::Grpc(..) | Self::LocalAgent => "cluster",
            Self::Rbac => "rbac",
            Self::ConnectionLimit => "connection_limit",
            Self::Server => "server",
            Self::ClusterManager => "cluster_manager",
            Self::ListenerManager => "listener_manager",
        }
    }

    fn labels(&self) -> Vec<Label> {
        let public = || (HTTP_PREFIX, "public_listener".to_owned());
        match self {
            Self::Http(listener) => listener.labels(HTTP_PREFIX),
            Self::Tcp(listener) => listener.labels("envoy_tcp_prefix"),
            Self::Socket(address) => vec![("envoy_listener_address", address.clone())],
            Self::SocketHttp(address) => vec![("envoy_listener_address", address.clone()), public()],
            Self::Cluster(cluster) | Self::Grpc(cluster, _) => cluster.labels(),
            Self::LocalAgent => vec![("envoy_cluster_name", "local_agent".to_owned())],
            Self::Scrapes => vec![(HTTP_PREFIX, "envoy_metrics".to_owned())],
            Self::Rbac => vec![("envoy_rbac_prefix", "connect_authz".to_owned())],
            Self::ConnectionLimit => vec![("envoy_connection_limit_prefix", "inbound_connection_limit".to_owned())],
            Self::Server | Self::ClusterManager | Self::ListenerManager => Vec::new(),
        }
    }

    /// The name with dots.
    #[must_use]
    pub fn dotted(&self, stat: Stat) -> String {
        let mut name = self.prefix();
        // A string takes whatever is written to it.
        let _ = match stat {
            Stat::Plain(plain) => write!(name, "{plain}"),
            Stat::Class(of, class) => write!(name, "{of}_{class}xx"),
            Stat::Code(of, code) => write!(name, "{of}_{code}"),
            Stat::TlsVersion(version) => write!(name, "ssl.versions.{version}"),
        };
        name
    }

    /// The name of the family, and the labels.
    #[must_use]
    pub fn labelled(&self, stat: Stat) -> (String, Vec<Label>) {
        let family = self.family();
        let mut labels = self.labels();
        let name = match stat {
            Stat::Plain(plain) => format!("envoy_{family}_{}{}", self.method("_"), plain.replace('.', "_")),
            Stat::Class(of, class) => {
                labels.push(("envoy_response_code_class", class.to_string()));
                format!("envoy_{family}_{}_xx", of.replace('.', "_"))
            }
            Stat::Code(of, code) => {
                labels.push(("envoy_response_code", code.to_string()));
                format!("envoy_{family}_{of}")
            }
            Stat::TlsVersion(version) => {
                labels.push(("envoy_ssl_version", version.to_owned()));
                format!("envoy_{family}_ssl_versions")
            }
        };
        (name, labels)
    }
}

impl Scope {
    /// The name with dots but for what are labels, as dogstatsd shows it.
    #[must_use]
    pub fn without_labels(&self, stat: Stat) -> String {
        let levels = if let Self::SocketHttp(_) = self { "listener.http" } else { self.family() };
        let own = match stat {
            Stat::Plain(plain) => plain.to_owned(),
            Stat::Class(of, _) => format!("{of}_xx"),
            Stat::Code(of, _) => of.to_owned(),
            Stat::TlsVersion(_) => "ssl.versions".to_owned(),
        };
        format!("{levels}.{}{own}", self.method("."))
    }

    /// What stands before a number of a method of gRPC, each part with `end` behind it.
    fn method(&self, end: &str) -> String {
        let Self::Grpc(_, method) = self else { return String::new() };
        let in_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let shown: String = match end {
            "_" => method.chars().map(|c| if in_word(c) { c } else { '_' }).collect(),
            _ => method.clone(),
        };
        format!("grpc{end}{shown}{end}")
    }
}

const HTTP_PREFIX: &str = "envoy_http_conn_manager_prefix";

impl Listener {
    fn labels(&self, prefix: &'static str) -> Vec<Label> {
        match self {
            Self::Public => vec![(prefix, "public_listener".to_owned())],
            Self::Exposed(port) => vec![(prefix, format!("exposed_path_{port}"))],
            Self::Upstream(name) => vec![
                (prefix, "upstream".to_owned()),
                ("consul_upstream_service", name.service.clone()),
                ("consul_upstream_namespace", name.namespace.clone()),
                ("consul_upstream_partition", name.partition.clone()),
                ("consul_upstream_datacenter", name.datacenter.clone()),
            ],
        }
    }
}

/// What the registration says, with what differs from the default.
impl fmt::Display for UpstreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.service)?;
        for (key, part) in [("ns", &self.namespace), ("ap", &self.partition)] {
            if !part.is_empty() && part != "default" {
                write!(f, "?{key}={part}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Public => f.write_str("public_listener"),
            Self::Exposed(port) => write!(f, "exposed_path_{port}"),
            Self::Upstream(name) => {
                write!(f, "upstream.{}.{}.{}.{}", name.service, name.namespace, name.partition, name.datacenter)
            }
        }
    }
}

impl Cluster {
    fn labels(&self) -> Vec<Label> {
        match self {
            Self::LocalApp => vec![("envoy_cluster_name", "local_app".to_owned())],
            Self::Target(name) => vec![
                ("envoy_cluster_name", name.short()),
                ("consul_destination_service", name.service.clone()),
                ("consul_destination_service_subset", name.subset.clone()),
                ("consul_destination_custom_hash", name.custom_hash.clone()),
                ("consul_destination_namespace", name.namespace.clone()),
                ("consul_destination_partition", name.partition.clone()),
                ("consul_destination_datacenter", name.datacenter.clone()),
                ("consul_destination_routing_type", "internal".to_owned()),
                ("consul_destination_trust_domain", name.trust_domain.clone()),
                ("consul_destination_target", name.target()),
                ("consul_destination_full_target", format!("{}.internal.{}", name.target(), name.trust_domain)),
            ],
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LocalApp => f.write_str("local_app"),
            Self::Target(name) => f.write_str(&name.cluster()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(subset: &str) -> Scope {
        Scope::Cluster(Cluster::Target(Arc::new(TargetName {
            service: "db".into(),
            subset: subset.into(),
            namespace: "default".into(),
            partition: String::new(),
            datacenter: "dc1".into(),
            trust_domain: "1-2".into(),
            custom_hash: String::new(),
        })))
    }

    fn upstream() -> Listener {
        Listener::Upstream(Arc::new(UpstreamName {
            service: "db".into(),
            namespace: "default".into(),
            partition: "default".into(),
            datacenter: "dc1".into(),
        }))
    }

    #[test]
    fn names_are_those_of_envoy_under_consul() {
        let socket = || "0.0.0.0_21000".to_owned();
        let cases = [
            (
                target(""),
                Stat::Class("upstream_rq", 2),
                "cluster.db.default.dc1.internal.1-2.consul.upstream_rq_2xx",
                "envoy_cluster_upstream_rq_xx",
            ),
            (
                target("v1"),
                Stat::Code("upstream_rq", 404),
                "cluster.v1.db.default.dc1.internal.1-2.consul.upstream_rq_404",
                "envoy_cluster_upstream_rq",
            ),
            (
                target(""),
                Stat::Class("retry.upstream_rq", 5),
                "cluster.db.default.dc1.internal.1-2.consul.retry.upstream_rq_5xx",
                "envoy_cluster_retry_upstream_rq_xx",
            ),
            (
                Scope::Cluster(Cluster::LocalApp),
                Stat::Plain("upstream_cx_total"),
                "cluster.local_app.upstream_cx_total",
                "envoy_cluster_upstream_cx_total",
            ),
            (
                Scope::Http(upstream()),
                Stat::Class("downstream_rq", 5),
                "http.upstream.db.default.default.dc1.downstream_rq_5xx",
                "envoy_http_downstream_rq_xx",
            ),
            (
                Scope::Http(Listener::Public),
                Stat::Plain("rbac.denied"),
                "http.public_listener.rbac.denied",
                "envoy_http_rbac_denied",
            ),
            (
                Scope::Tcp(upstream()),
                Stat::Plain("downstream_cx_total"),
                "tcp.upstream.db.default.default.dc1.downstream_cx_total",
                "envoy_tcp_downstream_cx_total",
            ),
            (
                Scope::SocketHttp(socket()),
                Stat::Class("downstream_rq", 2),
                "listener.0.0.0.0_21000.http.public_listener.downstream_rq_2xx",
                "envoy_listener_http_downstream_rq_xx",
            ),
            (
                Scope::Socket(socket()),
                Stat::Plain("ssl.handshake"),
                "listener.0.0.0.0_21000.ssl.handshake",
                "envoy_listener_ssl_handshake",
            ),
            (Scope::Rbac, Stat::Plain("denied"), "connect_authz.rbac.denied", "envoy_rbac_denied"),
            (
                Scope::ConnectionLimit,
                Stat::Plain("limited_connections"),
                "connection_limit.inbound_connection_limit.limited_connections",
                "envoy_connection_limit_limited_connections",
            ),
            (Scope::Server, Stat::Plain("live"), "server.live", "envoy_server_live"),
        ];
        for (scope, stat, dotted, family) in cases {
            assert_eq!(scope.dotted(stat), dotted);
            assert_eq!(scope.labelled(stat).0, family);
        }
    }

    #[test]
    fn labels_are_those_that_dashboards_select_by() {
        let text = |scope: &Scope, stat| {
            let labels = scope.labelled(stat).1.into_iter().filter(|(_, value)| !value.is_empty());
            labels.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(&target("v1"), Stat::Class("upstream_rq", 5)),
            "envoy_cluster_name=v1 consul_destination_service=db consul_destination_service_subset=v1 \
             consul_destination_namespace=default consul_destination_datacenter=dc1 \
             consul_destination_routing_type=internal consul_destination_trust_domain=1-2 \
             consul_destination_target=v1.db.default.dc1 \
             consul_destination_full_target=v1.db.default.dc1.internal.1-2 envoy_response_code_class=5"
        );
        assert_eq!(
            text(&Scope::Tcp(upstream()), Stat::Plain("downstream_cx_total")),
            "envoy_tcp_prefix=upstream consul_upstream_service=db consul_upstream_namespace=default \
             consul_upstream_partition=default consul_upstream_datacenter=dc1"
        );
    }
}
