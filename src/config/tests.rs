use std::collections::BTreeMap;

use std::path::Path;

use super::*;
use crate::consul::{Address, Token};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// Reads `line` split at spaces, with `{here}` standing for the directory of the package, and `variables` given as
/// `NAME=value` words.
fn read_line(line: &str, variables: &str) -> anyhow::Result<Invocation> {
    let words = |text: &str| text.split_whitespace().map(|word| word.replace("{here}", HERE)).collect::<Vec<_>>();
    let variables: BTreeMap<_, _> = words(variables)
        .into_iter()
        .map(|word| word.split_once('=').map(|(name, value)| (name.to_owned(), OsString::from(value))).unwrap())
        .collect();
    read(words(line).into_iter().map(OsString::from), |name| variables.get(name).cloned())
}

fn config(flags: &str, variables: &str) -> Config {
    match read_line(&format!("connect proxy {flags}"), variables) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{flags} {variables}: {other:?}"),
    }
}

fn error(flags: &str, variables: &str) -> String {
    let error = format!("{:#}", read_line(&format!("connect proxy {flags}"), variables).expect_err(flags));
    assert!(!error.contains('\n') && !error.contains("SECRET"), "{error}");
    error
}

#[test]
fn commands() {
    let printed = |line| match read_line(line, "") {
        Ok(Invocation::Print(text)) => text,
        Ok(Invocation::Help) => help(""),
        other => panic!("{line}: {other:?}"),
    };
    for line in ["version", "--version", "-version", "-v"] {
        let text = printed(line);
        assert_eq!(text.lines().next(), Some(concat!("lictor ", env!("CARGO_PKG_VERSION"))), "{line}");
        assert!(text.lines().nth(1).is_some_and(|line| line.contains("AES-GCM of ")), "{text}");
    }
    for line in ["help", "-h", "--help", "connect -h", "connect --help", "connect proxy -h", "proxy --help"] {
        assert!(printed(line).starts_with("Usage: lictor "), "{line}");
    }
    for line in ["connect proxy -service web", "proxy -service web"] {
        assert!(matches!(read_line(line, "").unwrap(), Invocation::Run(_)), "{line}");
    }
    for (line, expected) in [
        ("", "no command given"),
        ("connect", "no command given"),
        ("agent -dev", "unknown command `agent`"),
        ("connect expose", "unknown command `connect expose`"),
        ("connect envoy -sidecar-for web", "use `lictor connect proxy`"),
    ] {
        let error = read_line(line, "").expect_err(line).to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
    let raw = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
    assert!(read([raw], |_| None).is_err());
}

#[test]
fn modes_go_by_consuls_precedence() {
    let proxy = |id: &str| Mode::ProxyId(id.to_owned());
    let sidecar = |id: &str| Mode::SidecarFor(id.to_owned());
    let cases = [
        ("-proxy-id p", "", proxy("p")),
        ("-sidecar-for s", "", sidecar("s")),
        ("-proxy-id p -sidecar-for s", "", proxy("p")),
        ("-sidecar-for s", "CONNECT_PROXY_ID=p", proxy("p")),
        ("-proxy-id flag", "CONNECT_PROXY_ID=p", proxy("flag")),
        ("-sidecar-for flag", "CONNECT_SIDECAR_FOR=s", sidecar("flag")),
        ("-proxy-id p", "CONNECT_SIDECAR_FOR=s", proxy("p")),
        ("-service web", "CONNECT_SIDECAR_FOR=s", sidecar("s")),
        ("-proxy-id= -sidecar-for s", "", sidecar("s")),
        ("-sidecar-for s", "CONNECT_PROXY_ID=", sidecar("s")),
    ];
    for (flags, variables, expected) in cases {
        assert_eq!(config(flags, variables).mode, expected, "{flags} {variables}");
    }
}

#[test]
fn a_proxy_of_flags() {
    let line = "-service web -upstream x.query:2 -upstream db:1 -upstream db:1 -upstream db:3 \
                -listen :8443 -service-addr :80 -register -register-id two";
    let config = config(line, "");
    let upstream = |name: &str, prepared_query, bind: &str| AdHocUpstream {
        name: name.to_owned(),
        prepared_query,
        bind: bind.parse().unwrap(),
    };
    let expected = AdHoc {
        service: "web".to_owned(),
        upstreams: vec![
            upstream("db", false, "127.0.0.1:1"),
            upstream("db", false, "127.0.0.1:3"),
            upstream("x", true, "127.0.0.1:2"),
        ],
        public: Some(("0.0.0.0:8443".parse().unwrap(), "127.0.0.1:80".to_owned())),
        register: Some(Register { id_suffix: Some("two".to_owned()) }),
    };
    assert_eq!(config.mode, Mode::AdHoc(expected));
    assert_eq!(config.warnings, [""; 0]);
    let facts: Vec<_> = config.facts().into_iter().map(|(label, value)| format!("{label}: {value}")).collect();
    let expected = [
        "Configuration mode: Flags",
        "Service: web",
        "Upstream: db => 127.0.0.1:1",
        "Upstream: db => 127.0.0.1:3",
        "Upstream: x => 127.0.0.1:2",
        "Public listener: 0.0.0.0:8443 => 127.0.0.1:80",
    ];
    assert_eq!(facts, expected);
}

#[test]
fn what_is_given_in_vain_is_told_once() {
    let cases: [(&str, &str, &[&str]); 6] = [
        ("-service web", "", &[]),
        ("-service web -pprof-addr :1 -pprof-addr :2 -grpc-addr x", "", &["-grpc-addr", "-pprof-addr"]),
        ("-service web -service-addr :80 -register-id x", "", &["-service-addr", "-register-id"]),
        ("-proxy-id p -service web -upstream a:1 -upstream b:2", "", &["-service", "-upstream"]),
        ("-sidecar-for s", "CONNECT_PROXY_ID=p", &["-sidecar-for"]),
        ("-service web", "CONSUL_HTTP_SSL_VERIFY=false", &["CONSUL_HTTP_SSL_VERIFY"]),
    ];
    for (flags, variables, expected) in cases {
        let warnings = config(flags, variables).warnings;
        assert_eq!(warnings.len(), expected.len(), "{flags}: {warnings:?}");
        for (warning, name) in warnings.iter().zip(expected) {
            assert!(warning.contains(&format!("{name} ")), "{flags}: {warning}");
        }
    }
}

#[test]
fn the_agents_address() {
    let tcp = |https, authority: &str| Address::Tcp { https, authority: authority.to_owned(), prefix: String::new() };
    let cases = [
        ("", "", tcp(false, "127.0.0.1:8500")),
        ("", "CONSUL_HTTP_SSL=true", tcp(true, "127.0.0.1:8500")),
        ("", "CONSUL_HTTP_ADDR=http://a:1 CONSUL_HTTP_SSL=1", tcp(true, "a:1")),
        ("", "CONSUL_HTTP_ADDR=https://a:1 CONSUL_HTTP_SSL=false", tcp(true, "a:1")),
        ("-http-addr b:2", "CONSUL_HTTP_ADDR=a:1", tcp(false, "b:2")),
        ("-http-addr=", "CONSUL_HTTP_ADDR=a:1", tcp(false, "a:1")),
        ("", "CONSUL_HTTP_ADDR=unix:///x CONSUL_HTTP_SSL=true", Address::Unix("/x".into())),
    ];
    for (flags, variables, expected) in cases {
        let config = config(&format!("-service web {flags}"), variables);
        assert_eq!(config.agent.address, expected, "{flags} {variables}");
    }
}

#[test]
fn tokens_go_by_consuls_precedence() {
    let fixed = |token: &str| Token::Fixed(token.to_owned());
    let file = |name: &str| Token::File(Path::new(HERE).join(name));
    let directory = std::env::temp_dir().join(format!("lictor-config-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let (one, two) = (directory.join("one"), directory.join("two"));
    fs::write(&one, "one\n").unwrap();
    fs::write(&two, "\n").unwrap();
    let (one, two) = (one.to_str().unwrap(), two.to_str().unwrap());
    let cases = [
        (String::new(), String::new(), Token::None),
        ("-token flag".to_owned(), String::new(), fixed("flag")),
        (String::new(), "CONSUL_HTTP_TOKEN=env".to_owned(), fixed("env")),
        ("-token flag".to_owned(), "CONSUL_HTTP_TOKEN=env".to_owned(), fixed("flag")),
        (String::new(), format!("CONSUL_HTTP_TOKEN=env CONSUL_HTTP_TOKEN_FILE={one}"), file(one)),
        ("-token flag".to_owned(), format!("CONSUL_HTTP_TOKEN_FILE={one}"), fixed("flag")),
        (format!("-token flag -token-file {one}"), String::new(), file(one)),
        (format!("-token-file {two}"), format!("CONSUL_HTTP_TOKEN_FILE={one}"), file(two)),
        ("-token-file=/dev/null".to_owned(), String::new(), Token::None),
    ];
    for (flags, variables, expected) in cases {
        let config = config(&format!("-service web {flags}"), &variables);
        assert_eq!(config.agent.scope.token, expected, "{flags} {variables}");
        let empty =
            matches!(&config.agent.scope.token, Token::File(path) if path.ends_with("two")) || flags.contains("null");
        assert_eq!(config.warnings.iter().any(|warning| warning.contains("is empty")), empty, "{flags}");
    }
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn the_rest_of_the_agents_settings() {
    let plain = config("-service web", "").agent;
    assert!(plain.tls.verify && !plain.scope.stale);
    assert_eq!((plain.basic_auth, plain.scope), (None, consul::Scope::default()));
    assert_eq!(plain.max_connections, 4);
    let variables = "CONSUL_CACERT={here}/Cargo.toml CONSUL_CAPATH={here}/src CONSUL_CLIENT_CERT={here}/Cargo.toml \
        CONSUL_CLIENT_KEY={here}/Cargo.lock CONSUL_TLS_SERVER_NAME=agent.example:8501 CONSUL_HTTP_AUTH=me:a:b \
        CONSUL_NAMESPACE=ns CONSUL_PARTITION=part CONSUL_HTTP_SSL_VERIFY=0 LICTOR_AGENT_CONNECTIONS=4";
    let agent = config("-service web -datacenter dc2 -stale", variables).agent;
    let path = |name: &str| Some(Path::new(HERE).join(name));
    assert_eq!(agent.tls.ca_file, path("Cargo.toml"));
    assert_eq!(agent.tls.ca_path, path("src"));
    assert_eq!(agent.tls.client_cert, path("Cargo.toml"));
    assert_eq!(agent.tls.client_key, path("Cargo.lock"));
    assert_eq!(agent.tls.server_name.as_deref(), Some("agent.example"));
    assert!(!agent.tls.verify && agent.scope.stale);
    assert_eq!(agent.basic_auth, Some(("me".to_owned(), Some("a:b".to_owned()))));
    assert_eq!(agent.scope.datacenter.as_deref(), Some("dc2"));
    assert_eq!(agent.scope.namespace.as_deref(), Some("ns"));
    assert_eq!(agent.scope.partition.as_deref(), Some("part"));
    assert_eq!(agent.max_connections, 4);
    let user = config("-service web", "CONSUL_HTTP_AUTH=me").agent.basic_auth;
    assert_eq!(user, Some(("me".to_owned(), None)));
}

#[test]
fn logs_and_process() {
    let plain = config("-service web", "");
    assert_eq!(plain.log, telemetry::Settings { level: Level::INFO, json: false });
    assert_eq!(plain.drain_time, Duration::from_secs(10));
    assert!(plain.workers >= 1);
    let levels = [
        ("trace", Level::TRACE),
        ("Debug", Level::DEBUG),
        ("INFO", Level::INFO),
        ("warn", Level::WARN),
        ("ERR", Level::ERROR),
        ("error", Level::ERROR),
    ];
    for (text, level) in levels {
        assert_eq!(config(&format!("-service web -log-level {text}"), "").log.level, level, "{text}");
    }
    let aead = |text: &str| config(&format!("-service web -aead {text}"), "LICTOR_AEAD=aws-lc").aead;
    assert_eq!(aead("ring"), Aead::forced(Implementation::Ring));
    assert_eq!(config("-service web", "LICTOR_AEAD=aws-lc").aead, Aead::forced(Implementation::AwsLc));
    assert_eq!(config("-service web", "").aead, Aead::detect());
    let tunnel = |line: &str, environment: &str| config(&format!("-service web {line}"), environment).tunnel;
    assert!(tunnel("", "") && tunnel("-tunnel true", "LICTOR_TUNNEL=false") && tunnel("-tunnel=1", ""));
    assert!(!tunnel("-tunnel=false", "") && !tunnel("", "LICTOR_TUNNEL=0"));
    let config = config("-service web -log-json -drain-time 1m -workers 3", "LICTOR_DRAIN_TIME=5 LICTOR_WORKERS=9");
    assert_eq!((config.log.json, config.drain_time, config.workers), (true, Duration::from_secs(60), 3));
    assert_eq!(self::config("-service web", "LICTOR_DRAIN_TIME=5").drain_time, Duration::from_secs(5));
}

#[test]
fn wrong_input_is_told_in_a_sentence() {
    let cases = [
        ("", "", "-service or -proxy-id must be specified so that proxy can configure itself."),
        ("-sidecar-for=", "", "-service or -proxy-id must be specified"),
        ("-service web -listen :1", "", "-service-addr must be specified with -listen"),
        ("-service web -listen 1 -service-addr :1", "", "-listen: address 1: missing port in address"),
        ("-service web -listen :1 -service-addr x", "", "-service-addr: address x: missing port"),
        ("-service web -register", "", "-register may only be specified with -service and -listen"),
        ("-proxy-id p -register", "", "-register may only be specified with -service and -listen"),
        (
            "-service web -upstream db",
            "",
            "invalid value \"db\" for flag -upstream: Upstream value should be name:addr",
        ),
        ("-service web -upstream a:1 -upstream b:1", "", "a and b cannot both be at 127.0.0.1:1"),
        ("-service web -log-level loud", "", "Invalid log level: loud. Valid log levels are: [TRACE DEBUG INFO WARN"),
        ("-service web -log-level=", "", "Invalid log level"),
        ("-service web -drain-time soon", "", "-drain-time: \"soon\" is not a duration"),
        ("-service web", "LICTOR_DRAIN_TIME=25h", "LICTOR_DRAIN_TIME: \"25h\" is not a duration of at most a day"),
        (
            "-service web -agent-connections 1",
            "",
            "-agent-connections: 2 are needed, one that waits for intentions alone",
        ),
        ("-service web -agent-connections 129", "", "-agent-connections: \"129\" is not a number from 2 to 128"),
        ("-service web -tunnel off", "", "-tunnel: \"off\" is neither true nor false"),
        ("-service web -workers 0", "", "-workers: \"0\" is not a number from 1 to 1024"),
        (
            "-service web -http-addr ftp://x",
            "",
            "Error connecting to Consul agent: -http-addr: Unknown protocol scheme: ftp",
        ),
        ("-service web", "CONSUL_HTTP_ADDR=ftp://x", "CONSUL_HTTP_ADDR: Unknown protocol scheme: ftp"),
        ("-service web", "CONSUL_HTTP_SSL=yes", "could not parse CONSUL_HTTP_SSL"),
        ("-service web", "CONSUL_HTTP_SSL_VERIFY=maybe", "could not parse CONSUL_HTTP_SSL_VERIFY"),
        ("-service web -client-cert x", "", "both client cert and client key must be provided: -client-cert came"),
        ("-service web", "CONSUL_CLIENT_KEY=x", "provided: CONSUL_CLIENT_KEY came without -client-cert"),
        ("-service web -ca-file {here}/none", "", "cannot read the CA file"),
        ("-service web -ca-file {here}/src", "", "of -ca-file (Is a directory"),
        ("-service web", "CONSUL_CACERT={here}/none", "none of CONSUL_CACERT (No such file or directory"),
        ("-service web -ca-path {here}/Cargo.toml", "", "cannot read the CA directory"),
        ("-service web -client-cert {here}/none -client-key x", "", "cannot read the client certificate"),
        ("-service web -client-cert {here}/LICENSE -client-key {here}/none", "", "cannot read the client key"),
        ("-service web -token-file {here}/none", "", "cannot read the token file"),
        ("-service web", "CONSUL_HTTP_TOKEN_FILE={here}/src", "cannot read the token file"),
        ("-service web -token SECRETé", "", "-token gives no token"),
        ("-service web", "CONSUL_HTTP_ADDR=http://me:SECRET@x", "use CONSUL_HTTP_AUTH"),
    ];
    for (flags, variables, expected) in cases {
        let error = error(flags, variables);
        assert!(error.contains(expected), "{flags} {variables}: {error}");
    }
}
