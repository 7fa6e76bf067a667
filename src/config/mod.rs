//! The command line and the environment, turned into checked settings.
//!
//! The command is `consul connect proxy` (Consul 1.8.7 to 1.22) to the letter, so that a unit file changes in one
//! word. Where Consul goes on with input that it did not understand, and would send a token in plaintext or trust
//! any certificate, we stop with a sentence that says what to write instead.

mod admin;
mod flags;
pub(crate) mod line;
mod reader;
mod values;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tracing::Level;

pub use self::admin::{AdminBind, AdminSettings, Prometheus, PrometheusTls};
use self::reader::{Given, Reader, readable, readable_directory, unreadable};
pub use self::values::AdHocUpstream;
use crate::tls::{Aead, Implementation};
use crate::{consul, telemetry, trace};
use flags::{AdHocFlags, Line, ProcessFlags};
pub(crate) use flags::{AgentFlags, ModeFlags, variable_of};

/// The configuration of the process.
#[derive(Debug)]
pub struct Config {
    pub mode: Mode,
    pub agent: consul::Settings,
    pub log: telemetry::Settings,
    /// How long open connections may go on after a first signal; default 10 s.
    pub drain_time: Duration,
    /// Threads of the data plane; default one for each processor.
    pub workers: usize,
    /// The cipher of TLS records; default: the fastest on this processor.
    pub aead: Aead,
    /// Whether TLS sessions with other sidecars of ours carry one TCP connection after another; default true.
    pub tunnel: bool,
    pub admin: AdminSettings,
    /// Settings of traces from `OTEL_…` variables.
    pub traces: trace::Environment,
    /// Warnings about flags and variables without effect, each a sentence for the log.
    pub warnings: Vec<String>,
}

/// The source of the proxy's definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// `-proxy-id`: the id of a registered proxy.
    ProxyId(String),
    /// `-sidecar-for`: the id of a service with exactly one sidecar.
    SidecarFor(String),
    /// `-service`: everything from flags.
    AdHoc(AdHoc),
}

/// A proxy that is defined by flags alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdHoc {
    pub service: String,
    /// In the order of their names.
    pub upstreams: Vec<AdHocUpstream>,
    /// `-listen` with `-service-addr`: the public listener and the local app as `host:port`. A `-listen` without a
    /// host is the unspecified address, which is no address to register.
    pub public: Option<(SocketAddr, String)>,
    /// `-register`, with the `-register-id` suffix.
    pub register: Option<Register>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Register {
    pub id_suffix: Option<String>,
}

/// The parsed command line.
#[derive(Debug)]
pub enum Invocation {
    Run(Box<Config>),
    /// Print this, and that was all.
    Print(String),
    /// Print [`help`] with the commands that are none of ours.
    Help,
}

/// Reads the arguments (without the program's name) and the environment.
///
/// # Errors
///
/// One sentence that names the flag or variable at fault and what to write instead. It never holds a token.
pub fn read(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Invocation> {
    let text = |argument: OsString| argument.into_string().map_err(|raw| anyhow::anyhow!("{raw:?} is not UTF-8"));
    let arguments = arguments.into_iter().map(text).collect::<anyhow::Result<Vec<_>>>()?;
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let flags = match words.as_slice() {
        ["connect", "proxy", ..] => &arguments[2..],
        ["proxy", ..] => &arguments[1..],
        ["version" | "-version" | "--version" | "-v", ..] => return Ok(Invocation::Print(version())),
        ["help" | "-h" | "-help" | "--help", ..] => return Ok(Invocation::Help),
        ["connect", "help" | "-h" | "-help" | "--help", ..] => return Ok(Invocation::Print(CONNECT_HELP.to_owned())),
        [] | ["connect"] => bail!("no command given: run `lictor connect proxy -sidecar-for <service id>`; see {SEE}"),
        ["connect", "envoy", ..] => bail!("there is no Envoy here: use `lictor connect proxy` with the same flags"),
        ["connect", other, ..] => {
            bail!("unknown command `connect {other}`: there is `lictor connect proxy`; see {SEE}")
        }
        [other, ..] => bail!("unknown command `{other}`: there is `lictor connect proxy`; see {SEE}"),
    };
    match flags::read(flags)? {
        Line::Help => Ok(Invocation::Print(flags::help())),
        Line::Flags(flags, ignored) => {
            let reader = Reader::new(&environment, ignored);
            Ok(Invocation::Run(Box::new(reader.config(*flags)?)))
        }
    }
}

/// Settings of a command that queries the agent itself.
#[derive(Debug)]
pub(crate) struct AgentSettings {
    pub(crate) agent: consul::Settings,
    /// `None` where neither `-proxy-id` nor `-sidecar-for` is given.
    pub(crate) mode: Option<Mode>,
    /// Warnings about flags and variables without effect, each a sentence.
    pub(crate) warnings: Vec<String>,
}

/// Reads the flags that name a registered proxy and its agent, with the variables that stand in for them.
///
/// # Errors
/// As of [`read`].
pub(crate) fn agent_of(
    mode: ModeFlags,
    agent: AgentFlags,
    environment: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<AgentSettings> {
    let mut reader = Reader::new(&environment, BTreeSet::new());
    let agent = reader.agent(agent, consul::DEFAULT_CONNECTIONS).context("Error connecting to Consul agent")?;
    let mode = match reader.given("proxy-id", mode.proxy_id)? {
        Some(id) => Some(Mode::ProxyId(id.value)),
        None => reader.given("sidecar-for", mode.sidecar_for)?.map(|id| Mode::SidecarFor(id.value)),
    };
    Ok(AgentSettings { agent, mode, warnings: reader.warnings })
}

impl Mode {
    /// The id or name that says which proxy to run.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::ProxyId(id) | Self::SidecarFor(id) => id,
            Self::AdHoc(ad_hoc) => &ad_hoc.service,
        }
    }
}

impl Config {
    /// The facts that a starting proxy prints, with Consul's labels.
    #[must_use]
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let mode = |name: &str| ("Configuration mode", name.to_owned());
        match &self.mode {
            Mode::ProxyId(id) => vec![mode("Agent API"), ("Proxy ID", id.clone())],
            Mode::SidecarFor(id) => vec![mode("Agent API"), ("Sidecar for ID", id.clone())],
            Mode::AdHoc(ad_hoc) => {
                let mut facts = vec![mode("Flags"), ("Service", ad_hoc.service.clone())];
                facts.extend(ad_hoc.upstreams.iter().map(|up| ("Upstream", format!("{} => {}", up.name, up.bind))));
                let public = ad_hoc.public.as_ref();
                let public = public.map_or("Disabled".to_owned(), |(bind, app)| format!("{bind} => {app}"));
                facts.push(("Public listener", public));
                facts
            }
        }
    }
}

const SEE: &str = "`lictor --help`";

/// What `lictor help` prints; `asking` has a line for each command that asks a running sidecar.
#[must_use]
pub fn help(asking: &str) -> String {
    format!(
        "\
Usage: lictor <command>

  Lictor is a sidecar proxy for Consul's service mesh, driven by nothing but the
  agent's HTTP API.

Commands that run a sidecar

  connect proxy        Run a sidecar, with the flags of `consul connect proxy`
  proxy                The same
  version              Print the version

Commands that ask a running sidecar

{asking}
  `lictor <command> -help` lists the flags of each.
"
    )
}

const CONNECT_HELP: &str = "\
Usage: lictor connect <command>

Commands

  proxy   Run a sidecar, with the flags of `consul connect proxy`

  `lictor connect proxy --help` lists the flags.
";

fn version() -> String {
    format!("lictor {}\nTLS records on this processor: {}\n", env!("CARGO_PKG_VERSION"), Aead::detect())
}

/// The values of [`ProcessFlags`].
struct Process {
    log: telemetry::Settings,
    drain_time: Duration,
    workers: usize,
    aead: Aead,
    tunnel: bool,
}

impl Reader<'_> {
    fn config(mut self, flags: flags::Flags) -> anyhow::Result<Config> {
        let process = self.process(flags.process)?;
        let admin = self.admin(flags.admin)?;
        let max_connections = flags.agent.agent_connections.clone();
        let too_few = self.number("agent-connections", max_connections.clone(), 0..=1).is_ok_and(|few| few.is_some());
        ensure!(
            !too_few,
            "-agent-connections: {} are needed, one that waits for intentions alone, so that a denial is known within a \
             second, and one for everything else",
            consul::FEWEST_CONNECTIONS
        );
        let max_connections = self
            .number("agent-connections", max_connections, consul::FEWEST_CONNECTIONS..=128)?
            .unwrap_or(consul::DEFAULT_CONNECTIONS);
        let agent = self.agent(flags.agent, max_connections).context("Error connecting to Consul agent")?;
        let mode = self.mode(flags.mode, flags.ad_hoc).context("Error preparing configuration")?;
        let Process { log, drain_time, workers, aead, tunnel } = process;
        let environment = self.environment;
        let variable = |name: &str| environment(name).and_then(|value| value.into_string().ok());
        let traces = trace::Environment::read(&variable, &mut self.warnings);
        Ok(Config { mode, agent, log, drain_time, workers, aead, tunnel, admin, traces, warnings: self.warnings })
    }

    fn process(&mut self, flags: ProcessFlags) -> anyhow::Result<Process> {
        let level = flags.log_level.as_deref().map_or(Ok(Level::INFO), log_level)?;
        let drain_time = match self.given("drain-time", flags.drain_time)? {
            Some(Given { value, from }) => {
                values::duration(&value).filter(|time| *time <= MAX_DRAIN_TIME).with_context(|| {
                    format!(
                        "{from}: {value:?} is not a duration of at most a day; write 30s, 1m30s or a number of seconds"
                    )
                })?
            }
            None => Duration::from_secs(10),
        };
        let workers = match self.number("workers", flags.workers, 1..=1024)? {
            Some(workers) => workers,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let aead = self.given("aead", flags.aead)?.map_or(Ok(Aead::detect()), |given| aead(&given))?;
        let tunnel = match self.given("tunnel", flags.tunnel)? {
            None => true,
            Some(Given { value, from }) => {
                values::boolean(&value).with_context(|| format!("{from}: {value:?} is neither true nor false"))?
            }
        };
        Ok(Process { log: telemetry::Settings { level, json: flags.log_json }, drain_time, workers, aead, tunnel })
    }

    fn mode(&mut self, mode: ModeFlags, ad_hoc: AdHocFlags) -> anyhow::Result<Mode> {
        ensure!(
            !ad_hoc.register || (is_given(&ad_hoc.service) && is_given(&ad_hoc.listen)),
            "-register may only be specified with -service and -listen"
        );
        // An id from the environment goes before -sidecar-for on the command line, as in Consul.
        if let Some(id) = self.given("proxy-id", mode.proxy_id)? {
            self.warn_unused(&ad_hoc, &id.from);
            if is_given(&mode.sidecar_for) {
                self.warnings.push(format!("the flag -sidecar-for is ignored because of {}", id.from));
            }
            return Ok(Mode::ProxyId(id.value));
        }
        if let Some(id) = self.given("sidecar-for", mode.sidecar_for)? {
            self.warn_unused(&ad_hoc, &id.from);
            return Ok(Mode::SidecarFor(id.value));
        }
        self.ad_hoc(ad_hoc).map(Mode::AdHoc)
    }

    fn ad_hoc(&mut self, flags: AdHocFlags) -> anyhow::Result<AdHoc> {
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let service = given(flags.service).context(
            "-service or -proxy-id must be specified so that proxy can configure itself. \
             To run the sidecar of a registered service, give -sidecar-for with the service's id.",
        )?;
        let upstreams = flags.upstream.iter().map(|text| upstream(text)).collect::<anyhow::Result<BTreeSet<_>>>()?;
        let upstreams = Vec::from_iter(upstreams);
        for (i, upstream) in upstreams.iter().enumerate() {
            if let Some(other) = upstreams[..i].iter().find(|other| other.bind == upstream.bind) {
                bail!("-upstream: {} and {} cannot both be at {}", other.name, upstream.name, upstream.bind);
            }
        }
        let app = given(flags.service_addr);
        let public = match given(flags.listen) {
            Some(listen) => {
                let bind = values::bind(&listen, Ipv4Addr::UNSPECIFIED).context("-listen")?;
                let app = app.context(
                    "-service-addr must be specified with -listen so the proxy knows the backend service address.",
                )?;
                Some((bind, values::dial(&app).context("-service-addr")?))
            }
            None => {
                if app.is_some() {
                    self.warnings.push("the flag -service-addr has no meaning without -listen and is ignored".into());
                }
                None
            }
        };
        let id_suffix = given(flags.register_id);
        if id_suffix.is_some() && !flags.register {
            self.warnings.push("the flag -register-id has no meaning without -register and is ignored".into());
        }
        let register = flags.register.then_some(Register { id_suffix });
        Ok(AdHoc { service, upstreams, public, register })
    }

    fn warn_unused(&mut self, flags: &AdHocFlags, because: &str) {
        let unused = [
            ("service", is_given(&flags.service)),
            ("upstream", !flags.upstream.is_empty()),
            ("listen", is_given(&flags.listen)),
            ("service-addr", is_given(&flags.service_addr)),
            ("register", flags.register),
            ("register-id", is_given(&flags.register_id)),
        ];
        let unused = unused.into_iter().filter(|(_, given)| *given);
        self.warnings.extend(unused.map(|(name, _)| format!("the flag -{name} is ignored because of {because}")));
    }

    fn agent(&mut self, flags: AgentFlags, max_connections: usize) -> anyhow::Result<consul::Settings> {
        let https = self.boolean("CONSUL_HTTP_SSL")?.unwrap_or(false);
        let address = match self.given("http-addr", flags.http_addr)? {
            Some(Given { value, from }) => values::agent(&value, https).with_context(|| from)?,
            None => values::agent("127.0.0.1:8500", https)?,
        };
        let token = self.token(flags.token, flags.token_file)?;
        let tls = TlsFlags {
            ca_file: self.given("ca-file", flags.ca_file)?,
            ca_path: self.given("ca-path", flags.ca_path)?,
            client_cert: self.given("client-cert", flags.client_cert)?,
            client_key: self.given("client-key", flags.client_key)?,
            server_name: self.given("tls-server-name", flags.tls_server_name)?,
            verify: self.boolean("CONSUL_HTTP_SSL_VERIFY")?.unwrap_or(true),
        };
        if !tls.verify {
            self.warnings.push("CONSUL_HTTP_SSL_VERIFY is false: any certificate of the agent is accepted".to_owned());
        }
        let basic_auth = self.variable("CONSUL_HTTP_AUTH")?.map(|auth| match auth.split_once(':') {
            Some((user, password)) => (user.to_owned(), Some(password.to_owned())),
            None => (auth, None),
        });
        Ok(consul::Settings {
            address,
            basic_auth,
            tls: tls.check()?,
            scope: consul::Scope {
                token,
                datacenter: flags.datacenter.filter(|name| !name.is_empty()),
                stale: flags.stale,
                namespace: self.given("namespace", flags.namespace)?.map(|given| given.value),
                partition: self.given("partition", flags.partition)?.map(|given| given.value),
            },
            max_connections,
        })
    }

    /// The order of Consul since 1.13: flag file, flag token, then file and token of the environment.
    fn token(&mut self, token: Option<String>, file: Option<String>) -> anyhow::Result<consul::Token> {
        let file_goes_first = is_given(&file) || !is_given(&token);
        let file = self.given("token-file", file)?.filter(|_| file_goes_first);
        let Some(file) = file else {
            let token = self.given("token", token)?;
            return token.map_or(Ok(consul::Token::None), |given| fixed_token(&given.value, &given.from));
        };
        let read = fs::metadata(&file.value).and_then(|about| Ok((about.is_file(), fs::read(&file.value)?)));
        let (is_file, text) = read.map_err(|error| {
            unreadable("token file", &file, &error, "name a file with a token that this user may read")
        })?;
        let text = String::from_utf8_lossy(&text);
        if text.trim().is_empty() {
            self.warnings.push(format!("the token file {} of {} is empty: no token is sent", file.value, file.from));
        }
        let token = fixed_token(&text, &file.from)?;
        // A pipe, as of a shell's `<(…)`, can be read only once; a file is read again when it changes.
        Ok(if is_file { consul::Token::File(file.value.into()) } else { token })
    }
}

/// Longest drain time that a flag may set.
const MAX_DRAIN_TIME: Duration = Duration::from_secs(24 * 60 * 60);

struct TlsFlags {
    ca_file: Option<Given>,
    ca_path: Option<Given>,
    client_cert: Option<Given>,
    client_key: Option<Given>,
    server_name: Option<Given>,
    verify: bool,
}

impl TlsFlags {
    fn check(self) -> anyhow::Result<consul::TlsSettings> {
        match (&self.client_cert, &self.client_key) {
            (Some(cert), None) => {
                bail!("both client cert and client key must be provided: {} came without -client-key", cert.from)
            }
            (None, Some(key)) => {
                bail!("both client cert and client key must be provided: {} came without -client-cert", key.from)
            }
            _ => {}
        }
        let pem = |what, given: &Option<Given>| {
            let path = |given| readable(what, given, "name a PEM file that this user may read, or leave it out");
            given.as_ref().map(path).transpose()
        };
        Ok(consul::TlsSettings {
            ca_file: pem("CA file", &self.ca_file)?,
            ca_path: self.ca_path.as_ref().map(readable_directory).transpose()?,
            client_cert: pem("client certificate", &self.client_cert)?,
            client_key: pem("client key", &self.client_key)?,
            server_name: self.server_name.map(|given| values::server_name(&given.value).to_owned()),
            verify: self.verify,
        })
    }
}

fn is_given(value: &Option<String>) -> bool {
    value.as_ref().is_some_and(|value| !value.is_empty())
}

fn aead(Given { value, from }: &Given) -> anyhow::Result<Aead> {
    match value.as_str() {
        "aws-lc" => Ok(Aead::forced(Implementation::AwsLc)),
        "ring" => Ok(Aead::forced(Implementation::Ring)),
        _ => bail!("{from}: {value:?} is not a library that seals TLS records: write aws-lc or ring"),
    }
}

fn log_level(text: &str) -> anyhow::Result<Level> {
    Ok(match text.to_ascii_uppercase().as_str() {
        "TRACE" => Level::TRACE,
        "DEBUG" => Level::DEBUG,
        "INFO" => Level::INFO,
        "WARN" => Level::WARN,
        "ERR" | "ERROR" => Level::ERROR,
        _ => bail!("Invalid log level: {text}. Valid log levels are: [TRACE DEBUG INFO WARN ERR ERROR]"),
    })
}

fn upstream(text: &str) -> anyhow::Result<AdHocUpstream> {
    values::upstream(text).with_context(|| format!("invalid value {text:?} for flag -upstream"))
}

fn fixed_token(text: &str, from: &str) -> anyhow::Result<consul::Token> {
    let token = text.trim();
    let sound = token.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(sound, "{from} gives no token: there are spaces in it, or characters that no header may hold");
    Ok(if token.is_empty() { consul::Token::None } else { consul::Token::Fixed(token.to_owned()) })
}

#[cfg(test)]
mod tests;
