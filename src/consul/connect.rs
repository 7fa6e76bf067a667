//! How connections to the agent are made: TCP, TLS or a unix socket, by way of a proxy or not.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{NoProxy, Proxy, Url};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::files::{Followed, files_of};
use super::settings::{Address, Settings, TlsSettings};
use crate::resolve;

/// Timeout of a connection to the agent, TLS handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time after which an unused connection is closed. The agent's connections belong to the whole host.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Idle timeout of a connection in regular use. It is shorter than the idle timeout of agents and of proxies before
/// them.
const KEPT: Duration = Duration::from_secs(30);

/// Interval of HTTP/2 PINGs, which notice an agent that does not answer any more.
const PING_PERIOD: Duration = Duration::from_secs(20);
/// Timeout of an HTTP/2 PING.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Clients for `settings`, the URL that requests start with, and the value of their `Host` header where that is not
/// the URL's.
#[derive(Clone)]
pub(super) struct Connections {
    /// Its connection is taken by no request of another kind. With `https` all share one connection by HTTP/2.
    pub(super) authorization: reqwest::Client,
    pub(super) shared: reqwest::Client,
    /// Where the agent counts the connections of a host and each carries one request: one that keeps none.
    pub(super) fresh: Option<reqwest::Client>,
    pub(super) base: Url,
    pub(super) host: Option<String>,
}

/// The transport, which follows the files of `settings`.
pub(super) fn followed(settings: &Settings) -> anyhow::Result<Followed<Connections>> {
    let paths = match &settings.address {
        Address::Tcp { https: true, .. } => files(&settings.tls),
        _ => Vec::new(),
    };
    if paths.is_empty() {
        return transport(settings).map(Followed::fixed);
    }
    let settings = settings.clone();
    Followed::new(paths, RELOADED, move || transport(&settings))
}

const RELOADED: &str = "The files for TLS with the agent have changed: new connections use them";

fn files(tls: &TlsSettings) -> Vec<PathBuf> {
    // Go's client takes the file where both are given.
    let authorities = tls.ca_file.as_ref().or(tls.ca_path.as_ref()).filter(|_| tls.verify);
    [authorities, tls.client_cert.as_ref(), tls.client_key.as_ref()].into_iter().flatten().cloned().collect()
}

fn transport(settings: &Settings) -> anyhow::Result<Connections> {
    match &settings.address {
        Address::Unix(path) => {
            let tls = no_tls()?;
            let shared = most_idle(settings);
            let client = |kept| builder(kept).tls_backend_preconfigured(tls.clone()).unix_socket(path.clone()).build();
            let (authorization, shared) = (client((KEPT, 1))?, client((IDLE_TIMEOUT, shared))?);
            Ok(Connections { authorization, shared, fresh: None, base: Url::parse("http://localhost/")?, host: None })
        }
        Address::Tcp { https, authority, prefix } => {
            let scheme = if *https { "https" } else { "http" };
            let base = format!("{scheme}://{authority}{prefix}/");
            let base = Url::parse(&base).with_context(|| format!("the agent's address {base} cannot be used"))?;
            tcp(settings, base)
        }
    }
}

/// Connections that are kept while nothing uses them: those of the requests that share them.
fn most_idle(settings: &Settings) -> usize {
    settings.max_connections.saturating_sub(1).clamp(1, 3)
}

/// `idle` is how long a connection is kept that nothing uses, `most` how many of them.
fn builder((idle, most): (Duration, usize)) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        // The token goes nowhere else than to the address that was given.
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("lictor/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(idle)
        .pool_max_idle_per_host(most)
        .http2_keep_alive_interval(PING_PERIOD)
        .http2_keep_alive_timeout(PING_TIMEOUT)
}

fn tcp(settings: &Settings, base: Url) -> anyhow::Result<Connections> {
    let proxy = proxy(&base)?;
    let https = base.scheme() == "https";
    let tls = if https { tls(&settings.tls)? } else { no_tls()? };
    let mut transport_base = base.clone();
    let mut host = None;
    // Of a proxy the address is asked for by its own name.
    let resolver = proxy.is_none().then(|| Arc::new(Resolver { host: bare_host(&base), port: port(&base) }));
    if let Some(name) = renamed(settings, &base)
        && proxy.is_none()
    {
        // The server name that is sent is that of the URL, so the URL gets the name and the resolver is
        // told what it stands for.
        transport_base.set_host(Some(&name)).with_context(|| format!("the TLS server name {name} is not a name"))?;
        host = Some(match base.port() {
            Some(port) => format!("{}:{port}", base.host_str().unwrap_or_default()),
            None => base.host_str().unwrap_or_default().to_string(),
        });
    }
    let client = |kept| {
        let mut builder = builder(kept).tls_backend_preconfigured(tls.clone());
        if let Some(resolver) = &resolver {
            builder = builder.dns_resolver(resolver.clone());
        }
        if let Some(proxy) = &proxy {
            builder = builder.proxy(proxy.clone());
        }
        builder.build()
    };
    let shared = most_idle(settings);
    let authorization = client((KEPT, if https { shared } else { 1 }))?;
    let shared = if https { authorization.clone() } else { client((IDLE_TIMEOUT, shared))? };
    let fresh = if https { None } else { Some(client((IDLE_TIMEOUT, 0))?) };
    Ok(Connections { authorization, shared, fresh, base: transport_base, host })
}

/// The DNS name to send instead of the address's own. An IP address is verified but never sent (RFC 6066,
/// section 3).
fn renamed(settings: &Settings, base: &Url) -> Option<String> {
    let name = settings.tls.server_name.as_ref().filter(|_| base.scheme() == "https")?;
    name.parse::<IpAddr>().is_err().then(|| name.clone())
}

fn bare_host(base: &Url) -> String {
    base.host_str().unwrap_or_default().trim_matches(['[', ']']).to_string()
}

fn port(base: &Url) -> u16 {
    base.port_or_known_default().unwrap_or_default()
}

/// The proxy of the environment, by Go's rules: each scheme has its own variable, the agent on this host
/// is never asked by way of one.
fn proxy(base: &Url) -> anyhow::Result<Option<Proxy>> {
    let host = bare_host(base);
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if loopback {
        return Ok(None);
    }
    let names: [&str; 2] =
        if base.scheme() == "https" { ["HTTPS_PROXY", "https_proxy"] } else { ["HTTP_PROXY", "http_proxy"] };
    let Some(url) = names.iter().find_map(|name| std::env::var(name).ok().filter(|url| !url.is_empty())) else {
        return Ok(None);
    };
    let proxy = Proxy::all(&url).with_context(|| format!("{} holds no usable address", names[0]))?;
    Ok(Some(proxy.no_proxy(NoProxy::from_env())))
}

/// Resolves whatever it is asked to the agent's true address; of several to one that answers first, as hyper waits for
/// seconds before it tries the next.
struct Resolver {
    host: String,
    port: u16,
}

impl Resolve for Resolver {
    fn resolve(&self, _: Name) -> Resolving {
        let (host, port) = (self.host.clone(), self.port);
        Box::pin(async move {
            let found = resolve::lookup(&host).await?;
            let order = resolve::answering_first(&found, port).await;
            Ok(Box::new(order.into_iter().map(move |ip| SocketAddr::from((ip, port)))) as Addrs)
        })
    }
}

/// Without TLS in use a configuration is still asked for; this one trusts nobody and reads no files.
fn no_tls() -> anyhow::Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    Ok(builder
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

fn tls(settings: &TlsSettings) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier(settings, provider)?);
    let mut config = match (&settings.client_cert, &settings.client_key) {
        (Some(cert), Some(key)) => builder
            .with_client_auth_cert(certificates(cert)?, private_key(key)?)
            .with_context(|| format!("the client certificate {} cannot be used", cert.display()))?,
        (None, None) => builder.with_no_client_auth(),
        _ => bail!("a client certificate and its key must be given together"),
    };
    if settings.server_name.as_ref().is_some_and(|name| name.parse::<IpAddr>().is_ok()) {
        config.enable_sni = false;
    }
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn verifier(settings: &TlsSettings, provider: Arc<CryptoProvider>) -> anyhow::Result<Arc<dyn ServerCertVerifier>> {
    if !settings.verify {
        return Ok(Arc::new(Unverified(provider)));
    }
    let roots = Arc::new(roots(settings)?);
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider)
        .build()
        .context("no CA certificate to verify the agent with")?;
    let Some(name) = &settings.server_name else { return Ok(inner) };
    let name =
        ServerName::try_from(name.clone()).with_context(|| format!("the TLS server name {name} is not a name"))?;
    Ok(Arc::new(Named { name, inner }))
}

fn roots(settings: &TlsSettings) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match (&settings.ca_file, &settings.ca_path) {
        // Go's client takes the file where both are given.
        (Some(file), _) => add_roots(&mut roots, file)?,
        (None, Some(directory)) => {
            for path in files_of(directory).context("cannot read the CA directory")? {
                add_roots(&mut roots, &path)?;
            }
        }
        (None, None) => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    Ok(roots)
}

fn add_roots(roots: &mut RootCertStore, path: &Path) -> anyhow::Result<()> {
    for certificate in certificates(path)? {
        roots.add(certificate).with_context(|| format!("a CA certificate in {} cannot be used", path.display()))?;
    }
    Ok(())
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let context = || format!("cannot read certificates from {}", path.display());
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).with_context(context)?.collect::<Result<_, _>>().with_context(context)?;
    if found.is_empty() {
        bail!("there is no certificate in {}", path.display());
    }
    Ok(found)
}

fn private_key(path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).with_context(|| format!("cannot read a private key from {}", path.display()))
}

/// Verifies for a given name instead of the one that was dialled.
struct Named {
    name: ServerName<'static>,
    inner: Arc<WebPkiServerVerifier>,
}

impl fmt::Debug for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Named").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner.verify_server_cert(end_entity, intermediates, &self.name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Takes any certificate, as was asked for with `CONSUL_HTTP_SSL_VERIFY=false`.
struct Unverified(Arc<CryptoProvider>);

impl fmt::Debug for Unverified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unverified").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;
    use rustls_pki_types::PrivatePkcs8KeyDer;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::consul::{Client, Error};
    use crate::testing;

    /// Answers one request over TLS; gives the server name and the `Host` header it came with.
    async fn serve(names: &[&str]) -> (SocketAddr, String, JoinHandle<Option<(Option<String>, String)>>) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let issued = generate_simple_self_signed(names).expect("the names are good");
        let key = PrivatePkcs8KeyDer::from(issued.signing_key.serialize_der()).into();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider has them")
            .with_no_client_auth()
            .with_single_cert(vec![issued.cert.der().clone()], key)
            .expect("certificate and key match");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let served = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.ok()?;
            let mut stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await.ok()?;
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.ok()?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").await.ok()?;
            stream.shutdown().await.ok()?;
            let request = String::from_utf8_lossy(&request[..length]).to_ascii_lowercase();
            let host = request.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default().to_string();
            Some((stream.get_ref().1.server_name().map(str::to_string), host))
        });
        (address, issued.cert.pem(), served)
    }

    async fn ask(address: SocketAddr, tls: TlsSettings) -> Result<(), Error> {
        let mut settings =
            testing::settings(Address::Tcp { https: true, authority: address.to_string(), prefix: String::new() });
        settings.tls = tls;
        Client::new(&settings).expect("the settings are good").agent_services().await.map(drop)
    }

    fn trusting(pem: &str, server_name: Option<&str>) -> (testing::TempFile, TlsSettings) {
        let file = testing::TempFile::new(pem);
        let ca_file = Some(file.path().to_path_buf());
        (file, TlsSettings { ca_file, server_name: server_name.map(str::to_string), ..TlsSettings::default() })
    }

    #[tokio::test]
    async fn a_given_server_name_is_sent_and_verified() {
        const NAME: &str = "server.dc1.consul";
        let (address, pem, served) = serve(&[NAME]).await;
        let (_file, tls) = trusting(&pem, Some(NAME));
        ask(address, tls).await.expect("an answer");
        let seen = served.await.expect("no panics");
        assert_eq!(seen, Some((Some(NAME.to_string()), address.to_string())));
    }

    #[tokio::test]
    async fn an_address_as_server_name_is_verified_and_not_sent() {
        let (address, pem, served) = serve(&["192.0.2.7"]).await;
        let (_file, tls) = trusting(&pem, Some("192.0.2.7"));
        ask(address, tls).await.expect("an answer");
        assert_eq!(served.await.expect("no panics"), Some((None, address.to_string())));
    }

    #[tokio::test]
    async fn an_agent_of_another_name_or_ca_is_told_nothing() {
        for (names, server_name, own_ca) in [
            (&["server.dc1.consul"][..], Some("server.dc2.consul"), true),
            (&["server.dc1.consul"], None, true),
            (&["server.dc1.consul"], Some("server.dc1.consul"), false),
        ] {
            let (address, pem, served) = serve(names).await;
            let (_, other_pem, other) = serve(names).await;
            other.abort();
            let (_file, tls) = trusting(if own_ca { &pem } else { &other_pem }, server_name);
            let error = ask(address, tls).await.expect_err("not the agent that was meant");
            assert!(error.is_transport() && !error.is_unreachable(), "{error}");
            assert!(error.to_string().contains("-ca-file"), "{error}");
            assert_eq!(served.await.expect("no panics"), None);
        }
    }

    #[tokio::test]
    async fn verification_can_be_turned_off() {
        let (address, _, served) = serve(&["server.dc1.consul"]).await;
        ask(address, TlsSettings { verify: false, ..TlsSettings::default() }).await.expect("an answer");
        assert!(served.await.expect("no panics").is_some());
    }
}
