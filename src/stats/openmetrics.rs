//! Our own names, in OpenMetrics 1.0: base units, and labels that say what they mean.
//!
//! Written out here, as `prometheus-client` keeps values of its own behind locks, while these are read from the groups that
//! the data path adds to. [`FAMILIES`] is also what the list in docs/observability.md is made of.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::agent::AgentNow;
use super::exemplar::Exemplar;
use super::group::{ClusterStats, Handshakes, ListenerStats};
use super::grpc;
use super::prometheus::labels_text;
use super::scope::{Cluster, Listener};
use super::value::Times;

/// Media type of [`encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
    Info,
}

impl Kind {
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
        }
    }
}

/// A family of series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Without the endings that its kind has.
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// The labels of its own, beside those of all.
    pub labels: &'static str,
}

macro_rules! families {
    ($($constant:ident $name:literal $kind:ident [$labels:literal] $help:literal;)*) => {
        $(const $constant: Family = Family { name: $name, kind: Kind::$kind, help: $help, labels: $labels };)*

        /// Every family, in the order in which they are given out.
        pub const FAMILIES: &[Family] = &[$($constant,)*];
    };
}

families! {
    BUILD "lictor_build" Info ["version"] "The version of this program.";
    START_TIME "process_start_time_seconds" Gauge [""] "When the process started, in seconds since 1970.";
    CPU "process_cpu_seconds" Counter [""] "Time on a processor, of user and kernel together.";
    MEMORY "process_resident_memory_bytes" Gauge [""] "Resident memory.";
    DESCRIPTORS "process_open_fds" Gauge [""] "Open file descriptors.";
    READY "lictor_ready" Gauge [""] "1 while the sidecar serves, 0 before its configuration is complete and while it drains.";
    SNAPSHOT "lictor_configuration_version" Gauge [""] "Number of the configuration that is in use; each change adds one.";
    CERTIFICATE "lictor_certificate_expiry_timestamp_seconds" Gauge [""] "When the sidecar's certificate, or one between it and its root, expires.";
    SPANS "lictor_spans" Counter ["result"] "Spans of traces: accepted by the collector (sent), or not accepted or without room in the queue (dropped).";
    ROOT "lictor_root_expiry_timestamp_seconds" Gauge ["serial"] "When each root of the mesh expires, by its serial number.";
    AGENT_AGE "lictor_agent_query_age_seconds" Gauge ["kind"] "Since the agent last answered, of the query of each kind for which that is longest. What a table watch stands for is fetched about once an hour.";
    AGENT_QUERIES "lictor_agent_queries" Gauge ["kind, state"] "Queries that are kept up to date: ok, and failing since their last answer.";
    AGENT_REQUESTS "lictor_agent_requests" Counter ["kind, result"] "Completed requests to the agent: answered, refused (an error of the agent), broken (no whole answer), unreachable, cancelled (by us, to send another request).";
    AGENT_REFUSED "lictor_agent_unusable_answers" Counter ["about"] "Answers of the agent that could not be used; the configuration before stays: about upstreams, or this sidecar.";
    CONNECTIONS "lictor_connections" Counter ["direction, upstream"] "Connections that a listener accepted.";
    CONNECTIONS_ACTIVE "lictor_connections_active" Gauge ["direction, upstream"] "Of these, those that are open.";
    CONNECTIONS_LIMITED "lictor_connections_limited" Counter ["direction, upstream"] "Connections that max_inbound_connections, or the limit of handshakes, turned away.";
    CONNECTIONS_REVOKED "lictor_connections_revoked" Counter ["direction, upstream"] "Open connections that a newer intention ended.";
    CONNECTIONS_WOULD_REVOKE "lictor_connections_would_revoke" Counter ["direction, upstream"] "Open connections, and requests that are under way, that a newer intention denies and that go on in audit mode.";
    CONNECTION_DURATION "lictor_connection_duration_seconds" Histogram ["direction, upstream"] "How long connections lasted, at their end.";
    RECEIVED "lictor_received_bytes" Counter ["direction, upstream"] "Plain-text bytes received from clients.";
    SENT "lictor_sent_bytes" Counter ["direction, upstream"] "Plain-text bytes sent to clients.";
    REQUESTS "lictor_requests" Counter ["direction, upstream"] "Requests whose head was read.";
    REQUESTS_ACTIVE "lictor_requests_active" Gauge ["direction, upstream"] "Of these, those that are not over.";
    RESPONSES "lictor_responses" Counter ["direction, upstream, code_class"] "Responses whose head was sent, those of this sidecar included.";
    REQUEST_DURATION "lictor_request_duration_seconds" Histogram ["direction, upstream"] "Whole requests that were answered.";
    REQUESTS_CUT "lictor_requests_cut_off" Counter ["direction, upstream"] "Requests whose answer had begun when this sidecar broke it off: its source did, a time limit passed, or it is denied now.";
    UPGRADES_ACTIVE "lictor_upgraded_connections_active" Gauge ["direction, upstream"] "Connections that have left HTTP behind, as WebSocket does.";
    REQUESTS_ABANDONED "lictor_requests_abandoned" Counter ["direction, upstream"] "Requests whose client left before the end.";
    DECISIONS "lictor_intention_decisions" Counter ["decision"] "Decisions of intentions about connections (tcp) and requests (http): allowed, denied, or would_deny (let through by audit mode).";
    HITS "lictor_intention_hits" Counter ["decision, rule"] "What each intention decided, as long as there is one of its source and destination, and the default policy.";
    HANDSHAKES "lictor_tls_handshakes" Counter ["side, result, resumed"] "TLS handshakes with other sidecars: side is server for accepted connections, client for connections to upstreams; resumed is yes where a complete handshake resumed an earlier session.";
    HANDSHAKE_DURATION "lictor_tls_handshake_duration_seconds" Histogram ["side"] "TLS handshakes that succeeded.";
    ATTEMPTS "lictor_upstream_attempts" Counter ["destination"] "Tries that were sent on a connection, and TCP connections that got through.";
    UPSTREAM_ACTIVE "lictor_upstream_requests_active" Gauge ["destination"] "Requests that were sent and are not over, and TCP connections that are open.";
    GRPC_CALLS "lictor_upstream_grpc_calls" Counter ["destination, method, status"] "Calls of gRPC services that were answered, of up to 64 methods that were answered with status 0 at least once.";
    UPSTREAM_RESPONSES "lictor_upstream_responses" Counter ["destination, code_class"] "Final answers for requests to the destination, those of this sidecar included.";
    UPSTREAM_DURATION "lictor_upstream_response_duration_seconds" Histogram ["destination"] "From the end of a request to the end of the destination's answer.";
    RETRIES "lictor_upstream_retries" Counter ["destination"] "Requests that were sent again.";
    TIMEOUTS "lictor_upstream_timeouts" Counter ["destination, scope"] "Times that a request (request) or one try (try) took longer than it may.";
    OVERFLOWS "lictor_upstream_overflows" Counter ["destination, limit"] "Requests (request: max_concurrent_requests, pending_request) and connections (connection) that a limit turned away, and retries that the budget did not allow (retry).";
    NO_INSTANCE "lictor_upstream_no_instance" Counter ["destination"] "Requests and connections for which there was no instance to use.";
    CONNECTS "lictor_upstream_connects" Counter ["destination, result"] "Attempts to connect: success, failure, timeout.";
    CONNECT_DURATION "lictor_upstream_connect_duration_seconds" Histogram ["destination"] "Attempts to connect that succeeded, TLS included.";
    EJECTIONS "lictor_upstream_ejections" Counter ["destination"] "Instances that were ejected for their errors.";
    EJECTIONS_REFUSED "lictor_upstream_ejections_refused" Counter ["destination"] "Ejections that were due while as many instances were ejected as may be.";
    ENDPOINTS "lictor_upstream_endpoints" Gauge ["destination, health"] "Instances in the catalog: passing their checks, and failing.";
    INSTANCES "lictor_upstream_instances" Gauge ["destination, state"] "Those that pass, by their circuit breaker: closed, open (ejected or unreachable), half-open (one request or connection tries it).";
    LIMIT_REACHED "lictor_upstream_limit_reached" Gauge ["destination, limit"] "1 while a limit lets nothing more through: connection, pending_request, request, retry.";
}

/// Facts about the process that are no group's.
#[derive(Debug, Clone, Default)]
pub struct Process {
    /// Seconds since 1970.
    pub started: f64,
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub descriptors: u64,
    pub is_ready: bool,
    pub configuration: u64,
    /// Seconds since 1970.
    pub certificate_expiry: Option<u64>,
    pub spans_sent: u64,
    pub spans_dropped: u64,
    /// Roots by serial number, each with its end in seconds since 1970.
    pub roots: BTreeMap<String, u64>,
    pub agent: AgentNow,
    /// Answers that could not be used: about upstreams, and about this sidecar.
    pub unusable_answers: [u64; 2],
    /// What was allowed and denied by each intention, as in `web => db`, and the default policy.
    pub rules: BTreeMap<String, [u64; 2]>,
}

/// All numbers; `common` labels stand on each.
#[must_use]
pub fn encode(
    process: &Process,
    listeners: &[impl AsRef<ListenerStats>],
    clusters: &[impl AsRef<ClusterStats>],
    common: &[(String, String)],
) -> String {
    let mut writer = Writer { text: String::new(), common };
    for family in FAMILIES {
        let before = writer.text.len();
        write_process(&mut writer, family, process);
        listeners.iter().for_each(|stats| write_listener(&mut writer, family, stats.as_ref()));
        clusters.iter().for_each(|stats| write_cluster(&mut writer, family, stats.as_ref()));
        if writer.text.len() > before {
            let Family { name, kind, help, .. } = family;
            let head = format!("# TYPE {name} {}\n# HELP {name} {help}\n", kind.word());
            writer.text.insert_str(before, &head);
        }
    }
    writer.text.push_str("# EOF\n");
    writer.text
}

struct Writer<'a> {
    text: String,
    common: &'a [(String, String)],
}

impl Writer<'_> {
    fn line(&mut self, name: &str, ending: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let common = self.common.iter().map(|(name, value)| (&**name, &**value));
        let labels = labels_text(labels.iter().copied().chain(common));
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        // A string takes whatever is written to it.
        let _ = writeln!(self.text, "{name}{ending}{braces} {value}");
    }

    fn value(&mut self, family: &Family, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let ending = match family.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        self.line(family.name, ending, labels, value);
    }

    fn times(&mut self, family: &Family, labels: &[(&str, &str)], times: &Times) {
        self.times_with(family, labels, times, &[]);
    }

    /// `exemplars` are by bucket.
    fn times_with(&mut self, family: &Family, labels: &[(&str, &str)], times: &Times, exemplars: &[Option<Exemplar>]) {
        for (bucket, (bound, count)) in times.cumulative().enumerate() {
            let bound = bound.map_or_else(|| "+Inf".to_owned(), seconds);
            let with_bound: Vec<_> = labels.iter().copied().chain([("le", &*bound)]).collect();
            match exemplars.get(bucket).copied().flatten() {
                None => self.line(family.name, "_bucket", &with_bound, count),
                Some(Exemplar { trace_id, micros, at }) => {
                    let (took, at) = (seconds(micros), seconds(at));
                    let with_trace = format!("{count} # {{trace_id=\"{trace_id:032x}\"}} {took} {at}");
                    self.line(family.name, "_bucket", &with_bound, with_trace);
                }
            }
        }
        self.line(family.name, "_count", labels, times.count());
        self.line(family.name, "_sum", labels, seconds(times.sum));
    }
}

/// Microseconds as seconds; a whole number has a point, as OpenMetrics wants bounds to have.
fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    let short = text.trim_end_matches('0');
    if short.ends_with('.') { format!("{short}0") } else { short.to_owned() }
}

fn write_process(writer: &mut Writer<'_>, family: &Family, process: &Process) {
    match *family {
        BUILD => writer.value(family, &[("version", env!("CARGO_PKG_VERSION"))], 1),
        START_TIME => writer.value(family, &[], process.started),
        CPU => writer.value(family, &[], process.cpu_seconds),
        MEMORY => writer.value(family, &[], process.resident_bytes),
        DESCRIPTORS => writer.value(family, &[], process.descriptors),
        READY => writer.value(family, &[], u8::from(process.is_ready)),
        SNAPSHOT => writer.value(family, &[], process.configuration),
        CERTIFICATE => {
            if let Some(expiry) = process.certificate_expiry {
                writer.value(family, &[], expiry);
            }
        }
        SPANS => {
            writer.value(family, &[("result", "sent")], process.spans_sent);
            writer.value(family, &[("result", "dropped")], process.spans_dropped);
        }
        ROOT => {
            for (serial, expiry) in &process.roots {
                writer.value(family, &[("serial", serial)], expiry);
            }
        }
        HITS => {
            for (rule, [allowed, denied]) in &process.rules {
                for (decision, count) in [("allowed", allowed), ("denied", denied)] {
                    writer.value(family, &[("decision", decision), ("rule", rule)], count);
                }
            }
        }
        _ => write_agent(writer, family, process),
    }
}

fn write_agent(writer: &mut Writer<'_>, family: &Family, process: &Process) {
    match *family {
        AGENT_AGE => {
            for (kind, age) in process.agent.ages() {
                writer.value(family, &[("kind", kind)], format_args!("{age:.3}"));
            }
        }
        AGENT_QUERIES => {
            for (kind, all, failing) in process.agent.counts() {
                writer.value(family, &[("kind", kind), ("state", "ok")], all - failing);
                writer.value(family, &[("kind", kind), ("state", "failing")], failing);
            }
        }
        AGENT_REQUESTS => {
            for (kind, result, count) in &process.agent.requests {
                writer.value(family, &[("kind", kind), ("result", result)], count);
            }
        }
        AGENT_REFUSED => {
            for (about, count) in ["upstreams", "sidecar"].into_iter().zip(process.unusable_answers) {
                writer.value(family, &[("about", about)], count);
            }
        }
        _ => {}
    }
}

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

fn write_listener(writer: &mut Writer<'_>, family: &Family, stats: &ListenerStats) {
    let (direction, upstream) = match &stats.listener {
        Listener::Public => ("inbound", String::new()),
        Listener::Upstream(name) => ("outbound", name.to_string()),
        Listener::Exposed(_) => ("exposed", String::new()),
    };
    let labels = [("direction", direction), ("upstream", &*upstream)];
    let is_public = stats.listener == Listener::Public;
    match *family {
        CONNECTIONS => writer.value(family, &labels, stats.connections.get()),
        CONNECTIONS_ACTIVE => writer.value(family, &labels, stats.connections_active.get()),
        CONNECTIONS_LIMITED if is_public => writer.value(family, &labels, stats.connections_limited.get()),
        CONNECTIONS_REVOKED if is_public => writer.value(family, &labels, stats.revoked.get()),
        CONNECTIONS_WOULD_REVOKE if is_public => writer.value(family, &labels, stats.would_revoke.get()),
        CONNECTION_DURATION => writer.times(family, &labels, &stats.connection_time.get()),
        RECEIVED => writer.value(family, &labels, stats.received.get()),
        SENT => writer.value(family, &labels, stats.sent.get()),
        REQUESTS if stats.is_http() => writer.value(family, &labels, stats.requests.get()),
        REQUESTS_ACTIVE if stats.is_http() => writer.value(family, &labels, stats.requests_active.get()),
        REQUESTS_CUT if stats.is_http() => writer.value(family, &labels, stats.reset_by_us.get()),
        UPGRADES_ACTIVE if stats.is_http() => writer.value(family, &labels, stats.upgrades_active.get()),
        REQUESTS_ABANDONED if stats.is_http() => writer.value(family, &labels, stats.reset_by_asker.get()),
        REQUEST_DURATION if stats.is_http() => {
            writer.times_with(family, &labels, &stats.request_time.get(), &stats.exemplars.get());
        }
        RESPONSES if stats.is_http() => {
            for (class, count) in CLASSES.into_iter().zip(stats.answers.get()) {
                writer.value(family, &[labels[0], labels[1], ("code_class", class)], count);
            }
        }
        DECISIONS if is_public => {
            writer.value(family, &[("decision", "allowed")], stats.allowed.get());
            writer.value(family, &[("decision", "denied")], stats.denied.get());
            writer.value(family, &[("decision", "would_deny")], stats.would_deny.get());
        }
        HANDSHAKES if is_public => write_handshakes(writer, family, "server", &[], &stats.tls),
        HANDSHAKE_DURATION if is_public => writer.times(family, &[("side", "server")], &stats.tls.time.get()),
        _ => {}
    }
}

fn write_handshakes(writer: &mut Writer<'_>, family: &Family, side: &str, more: &[(&str, &str)], tls: &Handshakes) {
    let resumed = tls.resumed.get();
    for (resumed, count) in [("no", tls.complete.get().saturating_sub(resumed)), ("yes", resumed)] {
        let own = [("side", side), ("result", "complete"), ("resumed", resumed)];
        writer.value(family, &own.into_iter().chain(more.iter().copied()).collect::<Vec<_>>(), count);
    }
    for (result, count) in [
        ("connection_error", &tls.connection_error),
        ("no_certificate", &tls.no_certificate),
        ("bad_certificate", &tls.bad_certificate),
        ("other_identity", &tls.other_identity),
    ] {
        let labels: Vec<_> = [("side", side), ("result", result)].into_iter().chain(more.iter().copied()).collect();
        writer.value(family, &labels, count.get());
    }
}

fn write_cluster(writer: &mut Writer<'_>, family: &Family, stats: &ClusterStats) {
    let destination = match &stats.cluster {
        Cluster::LocalApp => "local_app".to_owned(),
        Cluster::Target(name) => name.target(),
    };
    let own = ("destination", &*destination);
    let is_target = stats.cluster != Cluster::LocalApp;
    match *family {
        ATTEMPTS => writer.value(family, &[own], stats.tries.get()),
        UPSTREAM_ACTIVE => writer.value(family, &[own], stats.requests_active.get()),
        GRPC_CALLS => {
            for (method, statuses) in stats.grpc.get() {
                for (status, count) in grpc::STATUS.into_iter().zip(statuses).filter(|(_, count)| *count > 0) {
                    writer.value(family, &[own, ("method", &method), ("status", status)], count);
                }
            }
        }
        UPSTREAM_RESPONSES => {
            for (class, count) in CLASSES.into_iter().zip(stats.answers.get()) {
                writer.value(family, &[own, ("code_class", class)], count);
            }
        }
        UPSTREAM_DURATION => writer.times(family, &[own], &stats.answer_time.get()),
        RETRIES if is_target => writer.value(family, &[own], stats.retries.get()),
        TIMEOUTS => {
            writer.value(family, &[own, ("scope", "request")], stats.timeouts.get());
            writer.value(family, &[own, ("scope", "try")], stats.try_timeouts.get());
        }
        OVERFLOWS if is_target => {
            writer.value(family, &[own, ("limit", "request")], stats.overflows.get());
            writer.value(family, &[own, ("limit", "pending_request")], stats.pending_overflows.get());
            writer.value(family, &[own, ("limit", "connection")], stats.connection_overflows.get());
            writer.value(family, &[own, ("limit", "retry")], stats.retries_refused.get());
        }
        NO_INSTANCE if is_target => writer.value(family, &[own], stats.no_instance.get()),
        CONNECTS => {
            let (all, failed, late) =
                (stats.connections.get(), stats.connect_failures.get(), stats.connect_timeouts.get());
            // A connect that took too long is a failure, too, as with Envoy.
            writer.value(family, &[own, ("result", "success")], all.saturating_sub(failed));
            writer.value(family, &[own, ("result", "failure")], failed.saturating_sub(late));
            writer.value(family, &[own, ("result", "timeout")], late);
        }
        CONNECT_DURATION => writer.times(family, &[own], &stats.connect_time.get()),
        EJECTIONS if is_target => writer.value(family, &[own], stats.ejections.get()),
        HANDSHAKES if is_target => write_handshakes(writer, family, "client", &[own], &stats.tls),
        _ if is_target => write_members(writer, family, stats, own),
        _ => {}
    }
}

fn write_members(writer: &mut Writer<'_>, family: &Family, stats: &ClusterStats, own: (&str, &str)) {
    match *family {
        EJECTIONS_REFUSED => writer.value(family, &[own], stats.ejections_refused.get()),
        ENDPOINTS => {
            let members = stats.members();
            writer.value(family, &[own, ("health", "passing")], members.usable.len());
            let failing = members.registered.saturating_sub(members.usable.len());
            writer.value(family, &[own, ("health", "failing")], failing);
        }
        INSTANCES => {
            for (state, count) in stats.members().by_breaker() {
                writer.value(family, &[own, ("state", state)], count);
            }
        }
        LIMIT_REACHED => {
            let members = stats.members();
            for (limit, reached) in [
                ("connection", members.connections.is_reached()),
                ("pending_request", members.pending_requests.is_reached()),
                ("request", members.requests.is_reached()),
                ("retry", members.retries_are_refused),
            ] {
                writer.value(family, &[own, ("limit", limit)], u8::from(reached));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::stats::agent::AgentQuery;
    use crate::stats::scope::UpstreamName;

    fn listener(http: bool) -> Arc<ListenerStats> {
        Arc::new(ListenerStats::new(
            Listener::Upstream(Arc::new(UpstreamName { service: "db".into(), ..UpstreamName::default() })),
            "127.0.0.1_5000".into(),
            http,
        ))
    }

    #[test]
    fn each_family_has_a_sound_name_and_is_given_out_by_some_group() {
        let public = Arc::new(ListenerStats::new(Listener::Public, "a".into(), true));
        let target = ClusterStats::new(Cluster::Target(Arc::default()));
        target.grpc.count("/a.B/C", 0);
        let agent = AgentNow {
            queries: vec![AgentQuery { kind: "leaf", age: Some(1.5), ..AgentQuery::default() }],
            requests: vec![("leaf", "answered", 1)],
            ..AgentNow::default()
        };
        let process = Process {
            certificate_expiry: Some(1),
            roots: [("1f".into(), 2)].into(),
            rules: [("web => *".into(), [3, 0])].into(),
            agent,
            ..Process::default()
        };
        let text = encode(&process, &[public, listener(true)], &[Arc::new(target)], &[]);
        for family in FAMILIES {
            assert!(!family.name.ends_with("_total") && family.help.ends_with('.'), "{}", family.name);
            assert!(text.contains(&format!("# TYPE {} {}\n", family.name, family.kind.word())), "{}", family.name);
        }
        assert!(text.ends_with("# EOF\n"));
        for line in [
            "lictor_agent_query_age_seconds{kind=\"leaf\"} 1.500",
            "lictor_agent_requests_total{kind=\"leaf\",result=\"answered\"} 1",
            "lictor_intention_hits_total{decision=\"allowed\",rule=\"web => *\"} 3",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
    }

    #[test]
    fn times_are_in_seconds() {
        let stats = listener(true);
        stats.request_time.observe(Duration::from_millis(3));
        let text = encode(&Process::default(), &[stats], &[] as &[Arc<ClusterStats>], &[("env".into(), "lab".into())]);
        for line in [
            "lictor_request_duration_seconds_bucket{direction=\"outbound\",upstream=\"db\",le=\"0.001\",env=\"lab\"} 0",
            "lictor_request_duration_seconds_bucket{direction=\"outbound\",upstream=\"db\",le=\"0.005\",env=\"lab\"} 1",
            "lictor_request_duration_seconds_bucket{direction=\"outbound\",upstream=\"db\",le=\"3600.0\",env=\"lab\"} 1",
            "lictor_request_duration_seconds_sum{direction=\"outbound\",upstream=\"db\",env=\"lab\"} 0.003",
            "lictor_requests_total{direction=\"outbound\",upstream=\"db\",env=\"lab\"} 0",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
    }

    #[test]
    fn bytes_have_no_requests() {
        let text = encode(&Process::default(), &[listener(false)], &[] as &[Arc<ClusterStats>], &[]);
        assert!(text.contains("lictor_connections_total") && !text.contains("lictor_requests"));
    }
}
