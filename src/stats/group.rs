//! The numbers of one listener, of one cluster, and of the process.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, Weak};

use super::exemplar::Exemplars;
use super::grpc::{self, Methods};
use super::scope::{Cluster, Listener, Scope, Stat};
use super::value::{Counter, Gauge, Histogram, Times};

/// One number, as it was when somebody asked.
#[derive(Debug, Clone)]
pub struct Sample {
    pub scope: Scope,
    pub stat: Stat,
    pub value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    Counter(u64),
    Gauge(u64),
    Times(Times),
}

/// Collects samples of one scope.
pub struct Samples<'a> {
    scope: Scope,
    into: &'a mut Vec<Sample>,
}

impl<'a> Samples<'a> {
    pub fn of(scope: Scope, into: &'a mut Vec<Sample>) -> Self {
        Self { scope, into }
    }

    pub fn counter(&mut self, name: &'static str, value: u64) {
        self.push(Stat::Plain(name), Value::Counter(value));
    }

    pub fn gauge(&mut self, name: &'static str, value: u64) {
        self.push(Stat::Plain(name), Value::Gauge(value));
    }

    fn times(&mut self, name: &'static str, value: &Histogram) {
        self.push(Stat::Plain(name), Value::Times(value.get()));
    }

    /// The five classes, which are there from the start.
    fn classes(&mut self, name: &'static str, classes: &Classes) {
        for (class, count) in (1..).zip(&classes.0) {
            self.push(Stat::Class(name, class), Value::Counter(count.get()));
        }
    }

    pub fn push(&mut self, stat: Stat, value: Value) {
        self.into.push(Sample { scope: self.scope.clone(), stat, value });
    }
}

/// Answers by the first digit of their status.
#[derive(Debug, Default)]
pub struct Classes([Counter; 5]);

impl Classes {
    /// Counts an answer. A status that is none, which no peer of ours can send, counts nowhere.
    pub fn count(&self, status: u16) {
        let class = usize::from(status / 100);
        if let Some(counter) = class.checked_sub(1).and_then(|class| self.0.get(class)) {
            counter.increment();
        }
    }

    #[must_use]
    pub fn get(&self) -> [u64; 5] {
        std::array::from_fn(|class| self.0[class].get())
    }

    /// All answers.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.get().iter().sum()
    }
}

/// Answers by status from 100 to 599, made with the first one: most clusters see two or three of them.
#[derive(Debug, Default)]
pub struct Codes(OnceLock<Box<[AtomicU64; 500]>>);

impl Codes {
    pub fn count(&self, status: u16) {
        let counts = self.0.get_or_init(|| Box::new([const { AtomicU64::new(0) }; 500]));
        if let Some(count) = status.checked_sub(100).and_then(|code| counts.get(usize::from(code))) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Those that were seen.
    pub fn get(&self) -> impl Iterator<Item = (u16, u64)> {
        let counts = self.0.get().into_iter().flat_map(|counts| counts.iter());
        (100..).zip(counts.map(|count| count.load(Ordering::Relaxed))).filter(|(_, count)| *count > 0)
    }
}

/// TLS handshakes of one side.
#[derive(Debug, Default)]
pub struct Handshakes {
    pub complete: Counter,
    /// Of these, those that took up a session of before.
    pub resumed: Counter,
    /// Of all, those of TLS 1.2. The others are of TLS 1.3.
    pub tls12: Counter,
    /// Broken off, or not TLS.
    pub connection_error: Counter,
    /// No client certificate came.
    pub no_certificate: Counter,
    /// The certificate leads to no root of the mesh, or is not valid now.
    pub bad_certificate: Counter,
    /// The certificate is valid, and of a service that was not meant.
    pub other_identity: Counter,
    pub time: Histogram,
}

impl Handshakes {
    fn collect(&self, samples: &mut Samples<'_>) {
        let (complete, tls12) = (self.complete.get(), self.tls12.get());
        samples.counter("ssl.handshake", complete);
        samples.counter("ssl.session_reused", self.resumed.get());
        samples.push(Stat::TlsVersion("TLSv1.2"), Value::Counter(tls12));
        samples.push(Stat::TlsVersion("TLSv1.3"), Value::Counter(complete.saturating_sub(tls12)));
        samples.counter("ssl.connection_error", self.connection_error.get());
        samples.counter("ssl.fail_verify_no_cert", self.no_certificate.get());
        samples.counter("ssl.fail_verify_error", self.bad_certificate.get());
        samples.counter("ssl.fail_verify_san", self.other_identity.get());
    }
}

/// A service that connects to us, and what intentions said of it.
#[derive(Debug, Default)]
pub struct CallerStats {
    pub service: String,
    pub allowed: Counter,
    pub denied: Counter,
    /// Denied and let through, in audit mode.
    pub would_deny: Counter,
}

/// Counters of one listener.
#[derive(Debug)]
pub struct ListenerStats {
    pub listener: Listener,
    /// As in `127.0.0.1_5000`.
    pub address: String,
    /// Whether requests are looked into. A registration may change that.
    http: AtomicBool,
    pub connections: Counter,
    pub connections_active: Gauge,
    pub connection_time: Histogram,
    /// Connections that a limit of ours closed before anything was read: `max_inbound_connections`, handshakes.
    pub connections_limited: Counter,
    pub received: Counter,
    pub sent: Counter,
    pub requests: Counter,
    pub requests_active: Gauge,
    /// Answers whose head was sent, those of this sidecar included.
    pub answers: Classes,
    /// Whole requests that were answered.
    pub request_time: Histogram,
    /// Of those, requests that were traced.
    pub exemplars: Exemplars,
    /// The asker left or reset before the end, or its request could not be read.
    pub reset_by_asker: Counter,
    /// We broke an answer off that had begun.
    pub reset_by_us: Counter,
    /// Connections that have left HTTP behind.
    pub upgrades_active: Gauge,
    pub idle_timeouts: Counter,
    /// Connections of a TCP service, requests of an HTTP service, that intentions allowed or denied.
    pub allowed: Counter,
    pub denied: Counter,
    /// Denied and let through, in audit mode. None of them is in the other two.
    pub would_deny: Counter,
    /// Open connections that a newer intention ended.
    pub revoked: Counter,
    /// What is open, denied by a newer intention, and goes on in audit mode.
    pub would_revoke: Counter,
    pub tls: Handshakes,
}

impl ListenerStats {
    #[must_use]
    pub fn new(listener: Listener, address: String, http: bool) -> Self {
        Self {
            listener,
            address,
            http: AtomicBool::new(http),
            connections: Counter::default(),
            connections_active: Gauge::default(),
            connection_time: Histogram::default(),
            connections_limited: Counter::default(),
            received: Counter::default(),
            sent: Counter::default(),
            requests: Counter::default(),
            requests_active: Gauge::default(),
            answers: Classes::default(),
            request_time: Histogram::default(),
            exemplars: Exemplars::default(),
            reset_by_asker: Counter::default(),
            reset_by_us: Counter::default(),
            upgrades_active: Gauge::default(),
            idle_timeouts: Counter::default(),
            allowed: Counter::default(),
            denied: Counter::default(),
            would_deny: Counter::default(),
            revoked: Counter::default(),
            would_revoke: Counter::default(),
            tls: Handshakes::default(),
        }
    }

    #[must_use]
    pub fn is_http(&self) -> bool {
        self.http.load(Ordering::Relaxed)
    }

    pub fn set_http(&self, http: bool) {
        self.http.store(http, Ordering::Relaxed);
    }

    /// Adds its numbers under Envoy's names.
    pub fn collect(&self, into: &mut Vec<Sample>) {
        if self.is_http() {
            self.collect_http(into);
        } else {
            self.collect_tcp(into);
        }
        self.collect_socket(into);
    }

    fn collect_http(&self, into: &mut Vec<Sample>) {
        let mut http = Samples::of(Scope::Http(self.listener.clone()), into);
        self.collect_connections(&mut http);
        http.counter("downstream_rq_total", self.requests.get());
        http.counter("downstream_rq_completed", self.answers.total());
        http.classes("downstream_rq", &self.answers);
        http.times("downstream_rq_time", &self.request_time);
        http.gauge("downstream_rq_active", self.requests_active.get());
        http.counter("downstream_rq_rx_reset", self.reset_by_asker.get());
        http.counter("downstream_rq_tx_reset", self.reset_by_us.get());
        http.gauge("downstream_cx_upgrades_active", self.upgrades_active.get());
        http.counter("downstream_rq_idle_timeout", self.idle_timeouts.get());
        if self.listener == Listener::Public {
            http.counter("rbac.allowed", self.allowed.get());
            http.counter("rbac.denied", self.denied.get());
            http.counter("rbac.shadow_denied", self.would_deny.get());
            let mut socket = Samples::of(Scope::SocketHttp(self.address.clone()), into);
            socket.counter("downstream_rq_completed", self.answers.total());
            socket.classes("downstream_rq", &self.answers);
        }
    }

    fn collect_tcp(&self, into: &mut Vec<Sample>) {
        let mut tcp = Samples::of(Scope::Tcp(self.listener.clone()), into);
        self.collect_connections(&mut tcp);
        // Nothing is kept between the two sides: what one does not take is not read from the other.
        tcp.gauge("downstream_cx_rx_bytes_buffered", 0);
        tcp.gauge("downstream_cx_tx_bytes_buffered", 0);
        tcp.counter("downstream_cx_no_route", 0);
        if self.listener == Listener::Public {
            let mut rbac = Samples::of(Scope::Rbac, into);
            rbac.counter("allowed", self.allowed.get());
            rbac.counter("denied", self.denied.get());
            rbac.counter("shadow_denied", self.would_deny.get());
        }
    }

    fn collect_connections(&self, samples: &mut Samples<'_>) {
        samples.counter("downstream_cx_total", self.connections.get());
        samples.gauge("downstream_cx_active", self.connections_active.get());
        samples.counter("downstream_cx_rx_bytes_total", self.received.get());
        samples.counter("downstream_cx_tx_bytes_total", self.sent.get());
        samples.times("downstream_cx_length_ms", &self.connection_time);
    }

    fn collect_socket(&self, into: &mut Vec<Sample>) {
        let mut socket = Samples::of(Scope::Socket(self.address.clone()), into);
        socket.counter("downstream_cx_total", self.connections.get());
        socket.gauge("downstream_cx_active", self.connections_active.get());
        socket.counter("downstream_cx_overflow", 0);
        socket.counter("downstream_cx_overload_reject", 0);
        socket.counter("downstream_global_cx_overflow", 0);
        if self.listener == Listener::Public {
            self.tls.collect(&mut socket);
            let mut limit = Samples::of(Scope::ConnectionLimit, into);
            limit.counter("limited_connections", self.connections_limited.get());
            limit.gauge("active_connections", self.connections_active.get());
        }
    }
}

/// Knows the instances of a cluster.
pub trait Members: Send + Sync {
    fn look(&self) -> MembersNow;
}

/// The instances of a cluster at one instant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MembersNow {
    /// Instances in the catalog, those that fail their checks included.
    pub registered: usize,
    /// Those that may be used as far as the catalog goes.
    pub usable: Vec<Member>,
    pub connections: LimitNow,
    pub pending_requests: LimitNow,
    pub requests: LimitNow,
    /// No retry would be made now, as there were too many of late.
    pub retries_are_refused: bool,
}

/// How much of a limit is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitNow {
    pub used: usize,
    /// `None`: no limit is set.
    pub maximum: Option<usize>,
}

impl LimitNow {
    /// Nothing more would be let through now. Envoy calls that circuit breaker open.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        self.maximum.is_some_and(|maximum| self.used >= maximum)
    }
}

impl MembersNow {
    /// Instances by the state of their circuit breaker: closed, open, half-open.
    #[must_use]
    pub fn by_breaker(&self) -> [(&'static str, u64); 3] {
        ["closed", "open", "half-open"].map(|breaker| {
            let is_so = |member: &&Member| member.state.breaker() == breaker;
            (breaker, self.usable.iter().filter(is_so).count() as u64)
        })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub address: String,
    pub weight: u32,
    pub state: MemberState,
    /// Connections of a TCP service, requests of an HTTP service.
    pub in_flight: u32,
    /// Microseconds that answers take of late; `None` before the first.
    pub latency: Option<f32>,
}

/// The state of an instance's circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberState {
    Healthy,
    /// Could not be reached, and comes last.
    Unreachable,
    /// Answers with errors, and gets nothing.
    Ejected,
    /// One connection or request alone finds out whether it is well again.
    Probed,
}

impl MemberState {
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Unreachable => "unreachable",
            Self::Ejected => "ejected",
            Self::Probed => "probed",
        }
    }

    /// The state of its circuit breaker, in the usual words.
    #[must_use]
    pub const fn breaker(self) -> &'static str {
        match self {
            Self::Healthy => "closed",
            Self::Unreachable | Self::Ejected => "open",
            Self::Probed => "half-open",
        }
    }
}

/// Counters of one target of a chain, or of the local app.
#[derive(Debug)]
pub struct ClusterStats {
    pub cluster: Cluster,
    /// Tries that a connection took, and TCP connections that got through.
    pub tries: Counter,
    /// Requests that were sent and are not over, and TCP connections that are open.
    pub requests_active: Gauge,
    /// Calls by method, of a service of gRPC.
    pub grpc: Methods,
    /// Final answers, our own included.
    pub answers: Classes,
    pub codes: Codes,
    /// Answers that were tried again.
    pub retried_answers: Classes,
    /// From the request's end to the answer's, for answers of the other side.
    pub answer_time: Histogram,
    pub retries: Counter,
    pub retries_successful: Counter,
    pub retries_exhausted: Counter,
    /// Retries that the retry budget or a limit refused.
    pub retries_refused: Counter,
    pub timeouts: Counter,
    pub try_timeouts: Counter,
    /// Requests that max_concurrent_requests refused.
    pub overflows: Counter,
    /// Requests that max_pending_requests refused.
    pub pending_overflows: Counter,
    /// Connections that a limit refused.
    pub connection_overflows: Counter,
    /// Requests and connections for which there was no instance.
    pub no_instance: Counter,
    /// Attempts to connect, those that failed included.
    pub connections: Counter,
    pub connections_active: Gauge,
    pub connect_failures: Counter,
    pub connect_timeouts: Counter,
    pub connect_time: Histogram,
    pub received: Counter,
    pub sent: Counter,
    pub ejections: Counter,
    /// Ejections that were due, while as many instances are ejected as may be.
    pub ejections_refused: Counter,
    pub tls: Handshakes,
    members: Mutex<Option<Weak<dyn Members>>>,
}

impl ClusterStats {
    #[must_use]
    pub fn new(cluster: Cluster) -> Self {
        Self {
            cluster,
            tries: Counter::default(),
            requests_active: Gauge::default(),
            grpc: Methods::default(),
            answers: Classes::default(),
            codes: Codes::default(),
            retried_answers: Classes::default(),
            answer_time: Histogram::default(),
            retries: Counter::default(),
            retries_successful: Counter::default(),
            retries_exhausted: Counter::default(),
            retries_refused: Counter::default(),
            timeouts: Counter::default(),
            try_timeouts: Counter::default(),
            overflows: Counter::default(),
            pending_overflows: Counter::default(),
            connection_overflows: Counter::default(),
            no_instance: Counter::default(),
            connections: Counter::default(),
            connections_active: Gauge::default(),
            connect_failures: Counter::default(),
            connect_timeouts: Counter::default(),
            connect_time: Histogram::default(),
            received: Counter::default(),
            sent: Counter::default(),
            ejections: Counter::default(),
            ejections_refused: Counter::default(),
            tls: Handshakes::default(),
            members: Mutex::default(),
        }
    }

    /// Who knows of its instances from now on.
    pub fn set_members(&self, members: Weak<dyn Members>) {
        *self.members.lock().unwrap_or_else(PoisonError::into_inner) = Some(members);
    }

    /// Its instances as they are now; none for the local app.
    #[must_use]
    pub fn members(&self) -> MembersNow {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner).clone();
        members.and_then(|members| members.upgrade()).map(|members| members.look()).unwrap_or_default()
    }

    /// A final answer.
    pub fn answered(&self, status: u16) {
        self.answers.count(status);
        self.codes.count(status);
    }

    /// Adds its numbers under Envoy's names.
    pub fn collect(&self, into: &mut Vec<Sample>) {
        let mut samples = Samples::of(Scope::Cluster(self.cluster.clone()), into);
        self.collect_requests(&mut samples);
        samples.counter("upstream_cx_total", self.connections.get());
        samples.gauge("upstream_cx_active", self.connections_active.get());
        samples.counter("upstream_cx_rx_bytes_total", self.received.get());
        samples.counter("upstream_cx_tx_bytes_total", self.sent.get());
        samples.counter("upstream_cx_connect_fail", self.connect_failures.get());
        samples.counter("upstream_cx_connect_timeout", self.connect_timeouts.get());
        samples.times("upstream_cx_connect_ms", &self.connect_time);
        samples.counter("upstream_cx_none_healthy", self.no_instance.get());
        samples.counter("upstream_cx_overflow", self.connection_overflows.get());
        if let Cluster::Target(_) = self.cluster {
            let members = self.members();
            let count = |state| members.usable.iter().filter(|member| member.state == state).count() as u64;
            samples.gauge("membership_total", members.registered as u64);
            samples.gauge("membership_healthy", members.usable.len() as u64 - count(MemberState::Ejected));
            samples.gauge("outlier_detection.ejections_active", count(MemberState::Ejected));
            samples.counter("outlier_detection.ejections_enforced_total", self.ejections.get());
            samples.counter("outlier_detection.ejections_overflow", self.ejections_refused.get());
            samples.gauge("circuit_breakers.default.cx_open", u64::from(members.connections.is_reached()));
            samples.gauge("circuit_breakers.default.rq_open", u64::from(members.requests.is_reached()));
            samples.gauge("circuit_breakers.default.rq_pending_open", u64::from(members.pending_requests.is_reached()));
            samples.gauge("circuit_breakers.default.rq_retry_open", u64::from(members.retries_are_refused));
            self.tls.collect(&mut samples);
        }
        self.collect_calls(into);
    }

    fn collect_calls(&self, into: &mut Vec<Sample>) {
        for (method, statuses) in self.grpc.get() {
            let mut samples = Samples::of(Scope::Grpc(self.cluster.clone(), method), into);
            let total = statuses.iter().sum();
            samples.counter("total", total);
            samples.counter("success", statuses[0]);
            samples.counter("failure", total - statuses[0]);
            for (status, count) in grpc::STATUS.into_iter().zip(statuses).filter(|(_, count)| *count > 0) {
                samples.counter(status, count);
            }
        }
    }

    fn collect_requests(&self, samples: &mut Samples<'_>) {
        samples.counter("upstream_rq_total", self.tries.get());
        samples.counter("upstream_rq_completed", self.answers.total());
        samples.classes("upstream_rq", &self.answers);
        for (code, count) in self.codes.get() {
            samples.push(Stat::Code("upstream_rq", code), Value::Counter(count));
        }
        samples.times("upstream_rq_time", &self.answer_time);
        samples.counter("upstream_rq_timeout", self.timeouts.get());
        samples.counter("upstream_rq_per_try_timeout", self.try_timeouts.get());
        samples.counter("upstream_rq_pending_overflow", self.overflows.get() + self.pending_overflows.get());
        samples.gauge("upstream_rq_active", self.requests_active.get());
        if let Cluster::Target(_) = self.cluster {
            samples.counter("retry.upstream_rq_completed", self.retried_answers.total());
            samples.classes("retry.upstream_rq", &self.retried_answers);
            samples.counter("upstream_rq_retry", self.retries.get());
            samples.counter("upstream_rq_retry_success", self.retries_successful.get());
            samples.counter("upstream_rq_retry_limit_exceeded", self.retries_exhausted.get());
            samples.counter("upstream_rq_retry_overflow", self.retries_refused.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_bounded() {
        let cluster = ClusterStats::new(Cluster::LocalApp);
        for status in [0, 99, 100, 200, 599, 600, 999, u16::MAX] {
            cluster.answered(status);
        }
        assert_eq!(cluster.codes.get().collect::<Vec<_>>(), [(100, 1), (200, 1), (599, 1)]);
        assert_eq!(cluster.answers.get(), [1, 1, 0, 0, 1]);
    }

    #[test]
    fn classes_are_there_before_their_first_answer() {
        let mut samples = Vec::new();
        ListenerStats::new(Listener::Public, "0.0.0.0_1".into(), true).collect(&mut samples);
        let classes = samples.iter().filter(|sample| matches!(sample.stat, Stat::Class(..))).count();
        assert_eq!(classes, 10, "five of the listener and five of its address");
    }

    #[test]
    fn no_name_is_given_out_twice() {
        let mut samples = Vec::new();
        for http in [false, true] {
            ListenerStats::new(Listener::Public, format!("0.0.0.0_{}", u8::from(http)), http).collect(&mut samples);
        }
        ClusterStats::new(Cluster::LocalApp).collect(&mut samples);
        let mut names: Vec<_> = samples.iter().map(|sample| sample.scope.dotted(sample.stat)).collect();
        // The limit of connections is of the one public listener that there is.
        names.retain(|name| !name.starts_with("connection_limit."));
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
