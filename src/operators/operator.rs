//! Envoy's operators: read once, then looked up in each record.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName};

use super::record::Record;
use super::time;

/// Names of headers and trailers that operators look at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderNames {
    pub request: Vec<HeaderName>,
    pub response: Vec<HeaderName>,
    pub trailers: Vec<HeaderName>,
}

/// One `%…%` of a format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    kind: Kind,
    /// Longer values are cut to so many bytes.
    longest: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    StartTime(String),
    /// The first of two headers that there is.
    Request(Name, Option<Name>),
    /// The same without the query.
    RequestWithoutQuery(Name, Option<Name>),
    Response(Name, Option<Name>),
    Trailer(HeaderName),
    Peer(PeerPart),
    Audit(AuditPart),
    GrpcStatus,
    GrpcStatusNumber,
    Simple(Simple),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    Header(HeaderName),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PeerPart {
    Id,
    TrustDomain,
    Partition,
    Namespace,
    Datacenter,
    Service,
}

/// Operators about a decision that audit mode did not enforce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AuditPart {
    Result,
    Rule,
}

/// Those without arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Simple {
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ConnectionTerminationDetails,
    BytesReceived,
    BytesSent,
    Duration,
    RequestDuration,
    ResponseDuration,
    ResponseTxDuration,
    RouteName,
    UpstreamHost,
    UpstreamCluster,
    UpstreamLocalAddress,
    UpstreamTransportFailureReason,
    UpstreamRequestAttemptCount,
    DownstreamLocalAddress,
    DownstreamLocalAddressWithoutPort,
    DownstreamLocalPort,
    DownstreamRemoteAddress,
    DownstreamRemoteAddressWithoutPort,
    DownstreamRemotePort,
    RequestedServerName,
}

const SIMPLE: [(&str, Simple); 28] = [
    ("PROTOCOL", Simple::Protocol),
    ("RESPONSE_CODE", Simple::ResponseCode),
    ("RESPONSE_CODE_DETAILS", Simple::ResponseCodeDetails),
    ("RESPONSE_FLAGS", Simple::ResponseFlags),
    ("CONNECTION_TERMINATION_DETAILS", Simple::ConnectionTerminationDetails),
    ("BYTES_RECEIVED", Simple::BytesReceived),
    ("BYTES_SENT", Simple::BytesSent),
    ("DURATION", Simple::Duration),
    ("REQUEST_DURATION", Simple::RequestDuration),
    ("RESPONSE_DURATION", Simple::ResponseDuration),
    ("RESPONSE_TX_DURATION", Simple::ResponseTxDuration),
    ("ROUTE_NAME", Simple::RouteName),
    ("UPSTREAM_HOST", Simple::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS", Simple::UpstreamHost),
    ("UPSTREAM_CLUSTER", Simple::UpstreamCluster),
    ("UPSTREAM_CLUSTER_RAW", Simple::UpstreamCluster),
    ("UPSTREAM_LOCAL_ADDRESS", Simple::UpstreamLocalAddress),
    ("UPSTREAM_TRANSPORT_FAILURE_REASON", Simple::UpstreamTransportFailureReason),
    ("UPSTREAM_REQUEST_ATTEMPT_COUNT", Simple::UpstreamRequestAttemptCount),
    ("DOWNSTREAM_LOCAL_ADDRESS", Simple::DownstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Simple::DownstreamLocalAddressWithoutPort),
    ("DOWNSTREAM_LOCAL_PORT", Simple::DownstreamLocalPort),
    ("DOWNSTREAM_REMOTE_ADDRESS", Simple::DownstreamRemoteAddress),
    ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Simple::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_REMOTE_PORT", Simple::DownstreamRemotePort),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", Simple::DownstreamRemoteAddress),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Simple::DownstreamRemoteAddressWithoutPort),
    ("REQUESTED_SERVER_NAME", Simple::RequestedServerName),
];

/// Envoy's other operators (1.40), apart from those about either side of a connection, whose names begin so.
const OTHERS: [&str; 41] = [
    "ACCESS_LOG_TYPE",
    "BYTES_RETRANSMITTED",
    "CEL",
    "CLUSTER_METADATA",
    "COALESCE",
    "COMMON_DURATION",
    "CONNECTION_ID",
    "CUSTOM_FLAGS",
    "DYNAMIC_METADATA",
    "EMIT_TIME",
    "EMIT_TIME_LOCAL",
    "ENVIRONMENT",
    "FILTER_CHAIN_NAME",
    "FILTER_STATE",
    "HOSTNAME",
    "LISTENER_NAME",
    "LOCAL_REPLY_BODY",
    "METADATA",
    "PACKETS_RETRANSMITTED",
    "PATH",
    "PER_REQUEST_STATE",
    "QUERY_PARAM",
    "QUERY_PARAMS",
    "REQUEST_HEADER",
    "REQUEST_HEADERS_BYTES",
    "REQUEST_TX_DURATION",
    "RESPONSE_FLAGS_LONG",
    "RESPONSE_HEADER",
    "RESPONSE_HEADERS_BYTES",
    "RESPONSE_TRAILER",
    "RESPONSE_TRAILERS_BYTES",
    "ROUNDTRIP_DURATION",
    "ROUTE_RESOLUTION_COUNT",
    "ROUTE_RESOLUTION_TIME_US",
    "SPAN_ID",
    "START_TIME_LOCAL",
    "STREAM_ID",
    "STREAM_INFO_REQ",
    "TRACE_ID",
    "UNIQUE_ID",
    "VIRTUAL_CLUSTER_NAME",
];

/// Whether an unsupported operator is one of Envoy's, going by its name.
#[must_use]
pub fn is_known_to_envoy(operator: &str) -> bool {
    let name = operator.split('(').next().unwrap_or_default();
    let is_name = name.bytes().all(|byte| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'_'));
    let of_a_side = name.starts_with("DOWNSTREAM_") || name.starts_with("UPSTREAM_");
    (is_name && of_a_side) || OTHERS.contains(&name)
}

/// The value of an operator in one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    Text(Cow<'a, str>),
    Number(u64),
}

impl Operator {
    /// Reads what is between the percent signs: `NAME`, `NAME(ARGUMENT)` or `NAME(ARGUMENT):LENGTH`. `None` if it
    /// has none that is supported.
    pub(super) fn read(text: &str) -> Option<Self> {
        let (text, longest) = match text.rsplit_once(':') {
            Some((head, length)) if !length.contains(')') => (head, Some(length.parse().ok()?)),
            _ => (text, None),
        };
        let (name, argument) = match text.split_once('(') {
            Some((name, argument)) => (name, Some(argument.strip_suffix(')')?)),
            None => (text, None),
        };
        Some(Self { kind: Kind::read(name, argument)?, longest })
    }

    /// The header that its value in the record is of.
    #[must_use]
    pub fn header(&self, record: &Record<'_>) -> Option<&HeaderName> {
        type Find = fn(&Name, &Record<'_>) -> bool;
        let (main, other, is_there): (_, _, Find) = match &self.kind {
            Kind::Request(main, other) | Kind::RequestWithoutQuery(main, other) => {
                (main, other, |name, record| name.in_request(record).is_some())
            }
            Kind::Response(main, other) => (main, other, |name, record| name.in_response(record).is_some()),
            Kind::Trailer(name) => return Some(name),
            _ => return None,
        };
        match [Some(main), other.as_ref()].into_iter().flatten().find(|name| is_there(name, record))? {
            Name::Header(name) => Some(name),
            _ => None,
        }
    }

    /// Adds the names of all headers and trailers that its value may be of.
    pub fn name_headers(&self, names: &mut HeaderNames) {
        let mut add = |list: fn(&mut HeaderNames) -> &mut Vec<HeaderName>, main: &Name, other: &Option<Name>| {
            for name in [Some(main), other.as_ref()].into_iter().flatten() {
                if let Name::Header(name) = name {
                    list(names).push(name.clone());
                }
            }
        };
        match &self.kind {
            Kind::Request(main, other) | Kind::RequestWithoutQuery(main, other) => {
                add(|names| &mut names.request, main, other);
            }
            Kind::Response(main, other) => add(|names| &mut names.response, main, other),
            Kind::Trailer(name) => names.trailers.push(name.clone()),
            Kind::GrpcStatus | Kind::GrpcStatusNumber => {
                names.response.push(GRPC_STATUS);
                names.trailers.push(GRPC_STATUS);
            }
            Kind::StartTime(_) | Kind::Peer(_) | Kind::Audit(_) | Kind::Simple(_) => {}
        }
    }

    /// What it stands for; `None` where that is not known.
    #[must_use]
    pub fn value<'a>(&self, record: &Record<'a>) -> Option<Value<'a>> {
        let value = self.kind.value(record)?;
        Some(match (value, self.longest) {
            (Value::Text(text), Some(longest)) if text.len() > longest => {
                let end = (0..=longest).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
                Value::Text(Cow::Owned(text[..end].to_owned()))
            }
            (value, _) => value,
        })
    }
}

impl Kind {
    fn read(name: &str, argument: Option<&str>) -> Option<Self> {
        let Some(argument) = argument else {
            return match name {
                "START_TIME" => Some(Self::StartTime(time::DEFAULT.to_owned())),
                "GRPC_STATUS" => Some(Self::GrpcStatus),
                "GRPC_STATUS_NUMBER" => Some(Self::GrpcStatusNumber),
                "DOWNSTREAM_PEER_URI_SAN" => Some(Self::Peer(PeerPart::Id)),
                _ => SIMPLE.iter().find(|(known, _)| *known == name).map(|(_, simple)| Self::Simple(*simple)),
            };
        };
        match name {
            "START_TIME" if argument.is_empty() => Some(Self::StartTime(time::DEFAULT.to_owned())),
            "START_TIME" => Some(Self::StartTime(argument.to_owned())),
            "REQ" => names(argument).map(|(main, other)| Self::Request(main, other)),
            "REQ_WITHOUT_QUERY" => names(argument).map(|(main, other)| Self::RequestWithoutQuery(main, other)),
            "RESP" => names(argument).map(|(main, other)| Self::Response(main, other)),
            "TRAILER" => argument.parse().ok().map(Self::Trailer),
            "GRPC_STATUS" => Some(Self::GrpcStatus),
            "DYNAMIC_METADATA" => {
                PeerPart::read(argument).map(Self::Peer).or_else(|| AuditPart::read(argument).map(Self::Audit))
            }
            _ => None,
        }
    }

    fn value<'a>(&self, record: &Record<'a>) -> Option<Value<'a>> {
        let text = |text: Cow<'a, str>| Some(Value::Text(text)).filter(|_| true);
        match self {
            Self::StartTime(form) => text(time::write(record.start, form).into()),
            Self::Request(main, other) => text(first(main, other.as_ref(), |name| name.in_request(record))?),
            Self::RequestWithoutQuery(main, other) => {
                let value = first(main, other.as_ref(), |name| name.in_request(record))?;
                let end = value.find('?').unwrap_or(value.len());
                text(Cow::Owned(value[..end].to_owned()))
            }
            Self::Response(main, other) => text(first(main, other.as_ref(), |name| name.in_response(record))?),
            Self::Trailer(name) => text(header(record.response.as_ref()?.trailers?, name)?),
            Self::Peer(part) => text(part.of(record)?),
            Self::Audit(AuditPart::Result) => record.would_be_denied_by.map(|_| Value::Text("denied".into())),
            Self::Audit(AuditPart::Rule) => record.would_be_denied_by.map(|rule| Value::Text(rule.into())),
            Self::GrpcStatus => text(grpc_name(grpc_status(record)?).into()),
            Self::GrpcStatusNumber => Some(Value::Number(grpc_status(record)?)),
            Self::Simple(simple) => simple.value(record),
        }
    }
}

impl Simple {
    fn value<'a>(self, record: &Record<'a>) -> Option<Value<'a>> {
        let number = |number: u64| Some(Value::Number(number));
        let text = |text: &Option<Cow<'a, str>>| text.clone().filter(|text| !text.is_empty()).map(Value::Text);
        let address = |address: Option<SocketAddr>| Some(Value::Text(address?.to_string().into()));
        let ip = |address: Option<SocketAddr>| Some(Value::Text(address?.ip().to_string().into()));
        let port = |address: Option<SocketAddr>| Some(Value::Number(address?.port().into()));
        let upstream = record.upstream.as_ref();
        match self {
            Self::Protocol => Some(Value::Text(record.request.as_ref()?.protocol.into())),
            // Zero where there was no answer, as in Envoy.
            Self::ResponseCode => number(record.response.as_ref().map_or(0, |response| response.code.into())),
            Self::ResponseCodeDetails => text(&record.response.as_ref()?.details),
            Self::ResponseFlags => Some(Value::Text(record.flags.clone())).filter(|_| !record.flags.is_empty()),
            Self::ConnectionTerminationDetails => text(&record.connection_termination),
            Self::BytesReceived => number(record.bytes_received),
            Self::BytesSent => number(record.bytes_sent),
            Self::Duration => number(milliseconds(record.duration)),
            Self::RequestDuration => number(milliseconds(record.request_duration?)),
            Self::ResponseDuration => number(milliseconds(record.response_duration?)),
            Self::ResponseTxDuration => number(milliseconds(record.duration.saturating_sub(record.response_duration?))),
            Self::RouteName => text(&upstream?.route),
            Self::UpstreamHost => text(&upstream?.host),
            Self::UpstreamCluster => text(&Some(upstream?.cluster.clone())),
            Self::UpstreamLocalAddress => address(upstream?.local),
            Self::UpstreamTransportFailureReason => text(&upstream?.transport_failure),
            Self::UpstreamRequestAttemptCount => number(upstream.map_or(0, |upstream| upstream.attempts.into())),
            Self::DownstreamLocalAddress => address(record.downstream_local),
            Self::DownstreamLocalAddressWithoutPort => ip(record.downstream_local),
            Self::DownstreamLocalPort => port(record.downstream_local),
            Self::DownstreamRemoteAddress => address(record.downstream_remote),
            Self::DownstreamRemoteAddressWithoutPort => ip(record.downstream_remote),
            Self::DownstreamRemotePort => port(record.downstream_remote),
            Self::RequestedServerName => text(&record.requested_server_name),
        }
    }
}

/// `NAME` or `NAME?OTHER`.
fn names(argument: &str) -> Option<(Name, Option<Name>)> {
    match argument.split_once('?') {
        Some((main, other)) => Some((Name::read(main)?, Some(Name::read(other)?))),
        None => Some((Name::read(argument)?, None)),
    }
}

impl Name {
    fn read(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            ":status" => Self::Status,
            other => Self::Header(other.parse().ok()?),
        })
    }

    fn in_request<'a>(&self, record: &Record<'a>) -> Option<Cow<'a, str>> {
        let request = record.request.as_ref()?;
        match self {
            Self::Method => Some(request.method.into()),
            Self::Path => Some(request.path.into()),
            Self::Authority => Some(request.authority).filter(|authority| !authority.is_empty()).map(Cow::Borrowed),
            Self::Scheme => Some("http".into()),
            Self::Status => None,
            Self::Header(name) => header(request.headers, name),
        }
    }

    fn in_response<'a>(&self, record: &Record<'a>) -> Option<Cow<'a, str>> {
        let response = record.response.as_ref()?;
        match self {
            Self::Status => Some(response.code.to_string().into()),
            Self::Header(name) => header(response.headers, name),
            Self::Method | Self::Path | Self::Authority | Self::Scheme => None,
        }
    }
}

impl PeerPart {
    /// What Consul's Envoy keeps of the peer: `consul:service` and its like.
    fn read(argument: &str) -> Option<Self> {
        match argument.strip_prefix("consul:")? {
            "trust-domain" => Some(Self::TrustDomain),
            "partition" => Some(Self::Partition),
            "namespace" => Some(Self::Namespace),
            "datacenter" => Some(Self::Datacenter),
            "service" => Some(Self::Service),
            _ => None,
        }
    }

    fn of<'a>(self, record: &Record<'a>) -> Option<Cow<'a, str>> {
        let peer = record.peer?;
        Some(match self {
            Self::Id => peer.to_string().into(),
            Self::TrustDomain => peer.trust_domain.as_str().into(),
            Self::Partition => peer.partition.as_str().into(),
            Self::Namespace => peer.namespace.as_str().into(),
            Self::Datacenter => peer.datacenter.as_str().into(),
            Self::Service => peer.service.as_str().into(),
        })
    }
}

impl AuditPart {
    /// What Envoy's RBAC filters keep of their shadow rules.
    fn read(argument: &str) -> Option<Self> {
        let filters = ["envoy.filters.http.rbac:", "envoy.filters.network.rbac:"];
        match filters.iter().find_map(|filter| argument.strip_prefix(filter))? {
            "shadow_engine_result" => Some(Self::Result),
            "shadow_effective_policy_id" => Some(Self::Rule),
            _ => None,
        }
    }
}

fn first<'a>(main: &Name, other: Option<&Name>, find: impl Fn(&Name) -> Option<Cow<'a, str>>) -> Option<Cow<'a, str>> {
    find(main).or_else(|| other.and_then(find))
}

/// The first line of that name.
fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// From the trailers, or the headers of an answer that has no body.
fn grpc_status(record: &Record<'_>) -> Option<u64> {
    let response = record.response.as_ref()?;
    let value = response.trailers.and_then(|trailers| header(trailers, &GRPC_STATUS));
    value.or_else(|| header(response.headers, &GRPC_STATUS))?.parse().ok()
}

fn grpc_name(status: u64) -> String {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    let name = usize::try_from(status).ok().and_then(|status| NAMES.get(status));
    name.map_or_else(|| status.to_string(), ToString::to_string)
}
