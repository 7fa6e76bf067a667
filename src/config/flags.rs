//! The flags and how they are written.
//!
//! What Go's `flag` package reads (`line.rs`) is rewritten to `--x=v` here, so that the structs below have only one form
//! to read.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail};
use clap::{Arg, ArgAction, Args, CommandFactory as _, Parser};

use super::line::{self, is_switch, split, switch};

#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) mode: ModeFlags,
    #[command(flatten)]
    pub(super) ad_hoc: AdHocFlags,
    #[command(flatten)]
    pub(super) agent: AgentFlags,
    #[command(flatten)]
    pub(super) process: ProcessFlags,
    #[command(flatten)]
    pub(super) admin: AdminFlags,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Which proxy to run")]
pub(crate) struct ModeFlags {
    /// Id of a service on the local agent whose sidecar to run. Exactly one connect-proxy must be registered with
    /// this id as its Proxy.DestinationServiceID.
    #[arg(long, value_name = "service id")]
    pub(super) sidecar_for: Option<String>,
    /// Id of the proxy to run, as registered on the local agent. It goes before -sidecar-for, wherever the two were
    /// given.
    #[arg(long, value_name = "proxy id")]
    pub(super) proxy_id: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "A proxy defined by flags alone")]
pub(super) struct AdHocFlags {
    /// Name of the service to stand for, when neither -proxy-id nor -sidecar-for is given.
    #[arg(long, value_name = "name")]
    pub(super) service: Option<String>,
    /// A service to reach, with the local port (or address) where to reach it: db:8181, db:127.0.0.2:8181,
    /// db:[::1]:8181. The name of a prepared query ends in .query: nearest-db.query:8181. May be repeated.
    // It is the text of -help, where an address is no link.
    #[allow(rustdoc::broken_intra_doc_links)]
    #[arg(long, value_name = "name:[addr:]port")]
    pub(super) upstream: Vec<String>,
    /// Where to accept connections from the mesh: 0.0.0.0:8443 or just :8443. Needs -service and -service-addr.
    #[arg(long, value_name = "addr:port")]
    pub(super) listen: Option<String>,
    /// Where the service itself listens, used with -listen.
    #[arg(long, value_name = "addr:port")]
    pub(super) service_addr: Option<String>,
    /// Register this proxy in the local agent while it runs. Needs -service and -listen.
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    pub(super) register: bool,
    /// Suffix of the id under which -register registers, to distinguish several proxies of one service.
    #[arg(long, value_name = "suffix")]
    pub(super) register_id: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "The Consul agent")]
pub(crate) struct AgentFlags {
    /// Address of the agent's HTTP API: host:port, http://host:port, https://host:port or unix:///path. With
    /// CONSUL_HTTP_SSL=true, http:// means https://. The default is http://127.0.0.1:8500.
    #[arg(long, value_name = "address")]
    pub(super) http_addr: Option<String>,
    /// ACL token. The default is the agent's own token. Others of this machine can see it among the arguments:
    /// prefer -token-file or the environment.
    #[arg(long, value_name = "token")]
    pub(super) token: Option<String>,
    /// File with the ACL token; when the file changes, the new token is used at once. Goes before -token.
    #[arg(long, value_name = "path")]
    pub(super) token_file: Option<String>,
    /// PEM file with the CA certificates that the agent's certificate is checked against. The default is the
    /// system's.
    #[arg(long, value_name = "path")]
    pub(super) ca_file: Option<String>,
    /// Directory of such PEM files.
    #[arg(long, value_name = "path")]
    pub(super) ca_path: Option<String>,
    /// PEM file with the client certificate that an agent with verify_incoming asks for. Needs -client-key.
    #[arg(long, value_name = "path")]
    pub(super) client_cert: Option<String>,
    /// PEM file with the private key of -client-cert.
    #[arg(long, value_name = "path")]
    pub(super) client_key: Option<String>,
    /// Name that the agent's certificate must have, sent as SNI. The default is the host of the address.
    #[arg(long, value_name = "name")]
    pub(super) tls_server_name: Option<String>,
    /// Datacenter to query. The default is the agent's.
    #[arg(long, value_name = "name")]
    pub(super) datacenter: Option<String>,
    /// Let any Consul server answer, not only the leader: faster, and sometimes older. The default is false.
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    pub(super) stale: bool,
    /// Namespace of the proxy, for Consul Enterprise only.
    #[arg(long, value_name = "name")]
    pub(super) namespace: Option<String>,
    /// Admin partition of the proxy, for Consul Enterprise only.
    #[arg(long, value_name = "name")]
    pub(super) partition: Option<String>,
    /// Most connections to the agent at one time, 2 to 128; more than 8 are never used. An agent serves 200 to all
    /// programs of a host together, so that fewer are used where it refuses some. With https, one connection carries
    /// all requests. The default is 4.
    #[arg(long, value_name = "number")]
    pub(super) agent_connections: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logs and process")]
pub(super) struct ProcessFlags {
    /// TRACE, DEBUG, INFO, WARN or ERROR. The default is INFO.
    #[arg(long, value_name = "level")]
    pub(super) log_level: Option<String>,
    /// Log one JSON object in each line. The default is false.
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    pub(super) log_json: bool,
    /// How long open connections may go on after SIGTERM or SIGINT, such as 30s, 1m30s, or a number of seconds. A
    /// second signal ends them at once. The default is 10s.
    #[arg(long, value_name = "duration")]
    pub(super) drain_time: Option<String>,
    /// Threads that carry traffic, 1 to 1024. The default is one for each processor.
    #[arg(long, value_name = "number")]
    pub(super) workers: Option<String>,
    /// Library that seals TLS records with AES-GCM, for comparison: aws-lc or ring. The default is the fastest on this
    /// processor.
    #[arg(long, value_name = "library")]
    pub(super) aead: Option<String>,
    /// Use one TLS session with another lictor for one TCP connection after another (docs/tunnel.md). The default is
    /// true.
    #[arg(long, value_name = "true|false")]
    pub(super) tunnel: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Admin server and metrics")]
pub(super) struct AdminFlags {
    /// Where the admin server listens: host:port (port 0 for any free one), unix:///path, or off. Those who reach it can
    /// read what this sidecar does and end it. The default is 127.0.0.1:19000, or the next free port.
    #[arg(long, value_name = "address")]
    pub(super) admin_bind: Option<String>,
    /// Address of a listener for /ready alone, for probes. Needs -envoy-ready-bind-port.
    #[arg(long, value_name = "address")]
    pub(super) envoy_ready_bind_address: Option<String>,
    /// Port of that listener.
    #[arg(long, value_name = "port")]
    pub(super) envoy_ready_bind_port: Option<String>,
    /// Port on this host to which a scrape of envoy_prometheus_bind_addr is passed on, instead of being answered from
    /// here.
    #[arg(long, value_name = "port")]
    pub(super) prometheus_backend_port: Option<String>,
    /// Path under which envoy_prometheus_bind_addr gives the metrics. The default is /metrics.
    #[arg(long, value_name = "path")]
    pub(super) prometheus_scrape_path: Option<String>,
    /// PEM file with the CA certificates that a scraper's certificate is checked against, where it shows one.
    #[arg(long, value_name = "path")]
    pub(super) prometheus_ca_file: Option<String>,
    /// Directory of such PEM files.
    #[arg(long, value_name = "path")]
    pub(super) prometheus_ca_path: Option<String>,
    /// PEM file with the certificate that envoy_prometheus_bind_addr shows.
    #[arg(long, value_name = "path")]
    pub(super) prometheus_cert_file: Option<String>,
    /// PEM file with the private key of -prometheus-cert-file.
    #[arg(long, value_name = "path")]
    pub(super) prometheus_key_file: Option<String>,
}

/// The environment variable that stands in for a flag.
pub(crate) fn variable_of(flag: &str) -> Option<&'static str> {
    Some(match flag {
        "proxy-id" => "CONNECT_PROXY_ID",
        "sidecar-for" => "CONNECT_SIDECAR_FOR",
        "http-addr" => "CONSUL_HTTP_ADDR",
        "token" => "CONSUL_HTTP_TOKEN",
        "token-file" => "CONSUL_HTTP_TOKEN_FILE",
        "ca-file" => "CONSUL_CACERT",
        "ca-path" => "CONSUL_CAPATH",
        "client-cert" => "CONSUL_CLIENT_CERT",
        "client-key" => "CONSUL_CLIENT_KEY",
        "tls-server-name" => "CONSUL_TLS_SERVER_NAME",
        "namespace" => "CONSUL_NAMESPACE",
        "partition" => "CONSUL_PARTITION",
        "agent-connections" => "LICTOR_AGENT_CONNECTIONS",
        "drain-time" => "LICTOR_DRAIN_TIME",
        "workers" => "LICTOR_WORKERS",
        "aead" => "LICTOR_AEAD",
        "tunnel" => "LICTOR_TUNNEL",
        "admin-bind" => "LICTOR_ADMIN_BIND",
        _ => return None,
    })
}

/// Flags of `consul connect proxy` and `consul connect envoy` (1.19.2) that have no meaning here, with whether they
/// take a value: those who come from there need not edit their unit files.
const WITHOUT_MEANING: &[(&str, bool)] = &[
    ("address", true),
    ("admin-access-log-path", true),
    ("bind-address", true),
    ("deregister-after-critical", true),
    ("enable-config-gen-logging", false),
    ("envoy-binary", true),
    ("envoy-version", true),
    ("expose-servers", false),
    ("grpc-addr", true),
    ("grpc-ca-file", true),
    ("grpc-ca-path", true),
    ("ignore-envoy-compatibility", false),
    ("no-central-config", false),
    ("node-name", true),
    ("omit-deprecated-tags", false),
    ("pprof-addr", true),
    ("wan-address", true),
];

/// Flags that would make the command do something else altogether: to go on without them would surprise.
const REFUSED: &[(&str, &str)] = &[
    ("bootstrap", "there is no Envoy to write a bootstrap configuration for; leave it out"),
    ("gateway", "lictor runs sidecars, not gateways; run the gateway with `consul connect envoy`"),
    ("mesh-gateway", "lictor runs sidecars, not gateways; run the gateway with `consul connect envoy`"),
];

/// The flags of a command line.
#[derive(Debug)]
pub(super) enum Line {
    Help,
    /// The flags, and the names of those that were given in vain.
    Flags(Box<Flags>, BTreeSet<&'static str>),
}

/// Reads the arguments behind the command.
pub(super) fn read(arguments: &[String]) -> anyhow::Result<Line> {
    let command = Flags::command();
    let mut canonical = Vec::with_capacity(arguments.len());
    let mut ignored = BTreeSet::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            no_other(rest.next())?;
            break;
        }
        let Some((name, inline)) = split(argument)? else { return no_other(Some(argument)).map(|()| Line::Help) };
        if matches!(name, "h" | "help") {
            return Ok(Line::Help);
        }
        let mut value = || {
            let next = inline.map(str::to_owned).or_else(|| rest.next().cloned());
            next.with_context(|| format!("flag needs an argument: -{name}"))
        };
        if let Some(known) = command.get_arguments().find(|known| known.get_long() == Some(name)) {
            let value = if is_switch(known) { switch(name, inline)?.to_string() } else { value()? };
            canonical.push(format!("--{name}={value}"));
        } else if let Some((known, takes_value)) = WITHOUT_MEANING.iter().find(|(known, _)| *known == name) {
            if *takes_value {
                value()?;
            } else {
                switch(name, inline)?;
            }
            ignored.insert(*known);
        } else {
            return Err(unknown(name, command.get_arguments().filter_map(Arg::get_long)));
        }
    }
    let flags = Flags::try_parse_from(canonical).context("reading the flags")?;
    Ok(Line::Flags(Box::new(flags), ignored))
}

/// The text of `lictor connect proxy -help`.
pub(super) fn help() -> String {
    let mut text = String::from(HELP);
    line::list(&mut text, &Flags::command(), variable_of);
    text.push_str(HELP_END);
    text
}

const HELP: &str = "\
Usage: lictor connect proxy [options]

  Runs a sidecar proxy of Consul's service mesh until SIGINT or SIGTERM. The
  proxy's registration, its upstreams, intentions and certificates come from the
  local Consul agent, and changes of them are followed without a restart.

  The sidecar of the registered service \"web\":

    $ lictor connect proxy -sidecar-for web

  The same for one of several proxies, by its own id:

    $ lictor connect proxy -proxy-id web-sidecar-proxy

  Nothing registered: be \"web\" and reach \"db\" by the local port 8181:

    $ lictor connect proxy -service web -upstream db:8181

  Each flag is written with one dash or two, with its value behind a space or an
  equals sign. A variable in [brackets] stands in for a flag that is not given.
";

const HELP_END: &str = "
More variables of the environment

  CONSUL_HTTP_AUTH
     User, or user:password, for basic authentication.
  CONSUL_HTTP_SSL
     Boolean: use https.
  CONSUL_HTTP_SSL_VERIFY
     Boolean: false accepts any certificate of the agent. The default is true.
  OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER, OTEL_TRACES_SAMPLER, …
     Where spans of traces go, and of which requests they are made, as
     OpenTelemetry specifies. Without them envoy_tracing_json says it.

  Flags of `consul connect proxy` and `consul connect envoy` that have no meaning
  here are accepted with a warning.
";

fn no_other(argument: Option<&String>) -> anyhow::Result<()> {
    match argument {
        Some(argument) => bail!("Should have no non-flag arguments. Remove {argument:?}, or put its flag before it."),
        None => Ok(()),
    }
}

fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> anyhow::Error {
    if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return anyhow::anyhow!("the flag -{name} is not supported: {why}");
    }
    line::unknown(name, known.chain(WITHOUT_MEANING.iter().map(|(known, _)| *known)), "lictor connect proxy")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_words(line: &str) -> anyhow::Result<Line> {
        read(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    fn flags(line: &str) -> (Flags, BTreeSet<&'static str>) {
        match read_words(line) {
            Ok(Line::Flags(flags, ignored)) => (*flags, ignored),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_table_of_flags_is_sound() {
        Flags::command().debug_assert();
        for flag in Flags::command().get_arguments() {
            assert!(WITHOUT_MEANING.iter().all(|(name, _)| Some(*name) != flag.get_long()));
        }
    }

    #[test]
    fn values_are_written_as_in_go() {
        for line in ["-service web", "--service web", "-service=web", "--service=web", "-service x -service web"] {
            assert_eq!(flags(line).0.ad_hoc.service.as_deref(), Some("web"), "{line}");
        }
        assert_eq!(flags("-service -dash").0.ad_hoc.service.as_deref(), Some("-dash"));
        assert_eq!(flags("-service -- -stale").0.ad_hoc.service.as_deref(), Some("--"));
        assert_eq!(flags("-service=a=b").0.ad_hoc.service.as_deref(), Some("a=b"));
        assert_eq!(flags("-service=").0.ad_hoc.service.as_deref(), Some(""));
        assert_eq!(flags("-upstream a:1 --upstream=b:2").0.ad_hoc.upstream, ["a:1", "b:2"]);
        assert_eq!(flags("-stale --").0.agent.token, None);
    }

    #[test]
    fn switches_take_a_value_by_an_equals_sign_only() {
        let cases = [
            ("-stale", true),
            ("--stale", true),
            ("-stale=1", true),
            ("-stale=T", true),
            ("-stale=True", true),
            ("-stale=false", false),
            ("-stale=0", false),
            ("-stale -stale=F", false),
            ("", false),
        ];
        for (line, expected) in cases {
            assert_eq!(flags(line).0.agent.stale, expected, "{line}");
        }
        let (flags, _) = flags("-register -log-json -register-id x");
        assert!(flags.ad_hoc.register && flags.process.log_json && !flags.agent.stale);
    }

    #[test]
    fn flags_without_meaning_are_taken_with_their_values() {
        let (flags, ignored) = flags("-pprof-addr :6060 -no-central-config -grpc-addr=x -pprof-addr -y -service web");
        assert_eq!(flags.ad_hoc.service.as_deref(), Some("web"));
        assert_eq!(ignored.into_iter().collect::<Vec<_>>(), ["grpc-addr", "no-central-config", "pprof-addr"]);
    }

    #[test]
    fn wrong_lines_are_told_in_a_sentence() {
        let cases = [
            ("-listn x", "flag provided but not defined: -listn (did you mean -listen?)"),
            ("-sidecarfor x", "did you mean -sidecar-for?"),
            ("-ppro-addr x", "did you mean -pprof-addr?"),
            ("-frobnicate", "flag provided but not defined: -frobnicate (`lictor connect proxy -help`"),
            ("-service", "flag needs an argument: -service"),
            ("-pprof-addr", "flag needs an argument: -pprof-addr"),
            ("-stale=maybe", "invalid boolean value \"maybe\" for -stale"),
            ("-no-central-config=x", "invalid boolean value \"x\" for -no-central-config"),
            ("-stale false", "Should have no non-flag arguments. Remove \"false\""),
            ("web", "Should have no non-flag arguments."),
            ("-", "Should have no non-flag arguments."),
            ("-- -service web", "Should have no non-flag arguments."),
            ("---service web", "bad flag syntax: ---service"),
            ("-=x", "bad flag syntax: -=x"),
            ("--=x", "bad flag syntax: --=x"),
            ("-gateway mesh", "the flag -gateway is not supported: lictor runs sidecars"),
            ("-bootstrap", "the flag -bootstrap is not supported"),
        ];
        for (line, expected) in cases {
            let error = read_words(line).expect_err(line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
            assert!(!error.contains('\n'), "{line}: {error}");
        }
    }

    #[test]
    fn help_names_each_flag_and_variable() {
        for line in ["-h", "--help", "-help", "-service web -h"] {
            assert!(matches!(read_words(line).unwrap(), Line::Help), "{line}");
        }
        let help = help();
        for flag in Flags::command().get_arguments() {
            let name = flag.get_long().unwrap();
            assert!(help.contains(&format!("\n  -{name}")), "{name}");
            assert!(variable_of(name).is_none_or(|variable| help.contains(&format!("[{variable}]"))), "{name}");
        }
        assert!(help.lines().all(|line| line.len() <= 82), "{help}");
    }
}
