//! The listener at `envoy_prometheus_bind_addr`: TLS, and a backend that answers in our place.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::reply::{self, Reply};
use crate::config::PrometheusTls;

/// Timeout of a request to the backend.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer of a backend, in bytes.
const LONGEST_ANSWER: usize = 64 * 1024 * 1024;

/// TLS of the listener, made anew when a file changes.
pub(super) struct Tls {
    settings: PrometheusTls,
    current: Option<(Vec<Option<SystemTime>>, TlsAcceptor)>,
}

impl Tls {
    /// # Errors
    /// When the files can't be used.
    pub(super) fn new(settings: &PrometheusTls) -> anyhow::Result<Self> {
        let mut tls = Self { settings: settings.clone(), current: None };
        tls.current = Some((tls.times(), acceptor(settings)?));
        Ok(tls)
    }

    /// With the files as they are now; those before, as long as the new ones can't be used.
    pub(super) fn acceptor(&mut self) -> Option<TlsAcceptor> {
        let times = self.times();
        if self.current.as_ref().is_none_or(|(before, _)| *before != times) {
            match acceptor(&self.settings) {
                Ok(acceptor) => self.current = Some((times, acceptor)),
                Err(error) => {
                    tracing::warn!(target: "admin", error = format!("{error:#}"), "New TLS files for scrapes cannot be used; the earlier ones stay in use");
                    if let Some((before, _)) = &mut self.current {
                        *before = times;
                    }
                }
            }
        }
        self.current.as_ref().map(|(_, acceptor)| acceptor.clone())
    }

    fn times(&self) -> Vec<Option<SystemTime>> {
        let PrometheusTls { certificate, key, ca_file, ca_path } = &self.settings;
        let files = [Some(certificate), Some(key), ca_file.as_ref(), ca_path.as_ref()];
        files
            .into_iter()
            .flatten()
            .map(|path| std::fs::metadata(path).and_then(|about| about.modified()).ok())
            .collect()
    }
}

fn acceptor(settings: &PrometheusTls) -> anyhow::Result<TlsAcceptor> {
    let chain = certificates(&settings.certificate)?;
    ensure!(!chain.is_empty(), "{} holds no certificate", settings.certificate.display());
    // The parser's own errors may quote what it read: say nothing more about a key.
    let key = PrivateKeyDer::from_pem_file(&settings.key)
        .map_err(|_| anyhow::anyhow!("{} holds no PEM key", settings.key.display()))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("preparing TLS for scrapes")?;
    let mut roots = RootCertStore::empty();
    for path in authority_files(settings)? {
        for certificate in certificates(&path)? {
            roots.add(certificate).with_context(|| format!("{} holds no CA certificate", path.display()))?;
        }
    }
    // As Envoy under Consul: a certificate is checked where a client shows one.
    let config = if roots.is_empty() {
        config.with_no_client_auth()
    } else {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        config.with_client_cert_verifier(verifier.allow_unauthenticated().build().context("preparing TLS for scrapes")?)
    };
    let config = config.with_single_cert(chain, key).context("the certificate and key for scrapes can't be used")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn authority_files(settings: &PrometheusTls) -> anyhow::Result<Vec<PathBuf>> {
    if let Some(file) = &settings.ca_file {
        return Ok(vec![file.clone()]);
    }
    let Some(folder) = &settings.ca_path else { return Ok(Vec::new()) };
    let entries = std::fs::read_dir(folder).with_context(|| format!("can't read {}", folder.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.filter(|path| path.is_file()).collect())
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let file = File::open(path).with_context(|| format!("can't read {}", path.display()))?;
    let read: Result<_, _> = CertificateDer::pem_reader_iter(BufReader::new(file)).collect();
    read.with_context(|| format!("{} is not PEM", path.display()))
}

/// Fetches the answer of the backend on this host.
pub(super) async fn backend(port: u16, path_and_query: &str) -> Reply {
    match timeout(BACKEND_TIMEOUT, fetch(port, path_and_query)).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => {
            let text = format!("the backend of this listener at 127.0.0.1:{port} cannot be scraped: {error:#}\n");
            reply::status(StatusCode::SERVICE_UNAVAILABLE, text)
        }
        Err(_) => reply::status(StatusCode::GATEWAY_TIMEOUT, "the backend of this listener does not answer\n"),
    }
}

async fn fetch(port: u16, path_and_query: &str) -> anyhow::Result<Reply> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path_and_query).header(HOST, format!("127.0.0.1:{port}")).body(Empty::<Bytes>::new())?;
    let (parts, body) = client.send_request(request).await?.into_parts();
    let body = Limited::new(body, LONGEST_ANSWER).collect().await.map_err(|error| anyhow::anyhow!("{error}"))?;
    connection.abort();
    let mut reply = reply::status(parts.status, body.to_bytes());
    let kind = parts.headers.get(CONTENT_TYPE).cloned();
    reply.headers_mut().insert(CONTENT_TYPE, kind.unwrap_or(HeaderValue::from_static("text/plain")));
    Ok(reply)
}
