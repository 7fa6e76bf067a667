//! Requests to a collector.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::task::spawn_blocking;

use super::settings::{Collector, Headers};

/// Timeout of a connection to the collector.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest body of a collector's answer, in bytes.
const LONGEST_ANSWER: usize = 64 * 1024;

pub(super) struct Client {
    http: reqwest::Client,
    url: String,
    headers: HeaderMap,
    grpc: bool,
}

/// Why a batch was not taken.
pub(super) struct Problem {
    pub text: String,
    /// It may be taken a little later.
    pub is_passing: bool,
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Self { text: format!("{error:#}"), is_passing: false }
    }
}

impl Client {
    pub(super) async fn new(collector: &Collector) -> anyhow::Result<Self> {
        let none = Headers::default();
        let (host, given, timeout, content_type, grpc, certificate) = match collector {
            Collector::Zipkin(zipkin) => (&zipkin.host, &none, zipkin.timeout, "application/json", false, None),
            Collector::Otlp(otlp) if otlp.grpc => {
                (&otlp.host, &otlp.headers, otlp.timeout, "application/grpc", true, otlp.certificate.clone())
            }
            Collector::Otlp(otlp) => {
                let certificate = otlp.certificate.clone();
                (&otlp.host, &otlp.headers, otlp.timeout, "application/x-protobuf", false, certificate)
            }
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &given.0 {
            let name = HeaderName::try_from(name.as_str()).with_context(|| format!("{name:?} is no header's name"))?;
            let mut value = HeaderValue::try_from(value.as_str())
                .with_context(|| format!("the value of the header {name} can't be sent"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        // After the configured ones, which must not replace it.
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        if grpc {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        } else if let Some(host) = host {
            headers.insert(HOST, HeaderValue::try_from(host.as_str()).context("the collector's host can't be named")?);
        }
        let (url, secure) = (collector.url().to_owned(), collector.url().starts_with("https:"));
        // Reads files.
        let tls = spawn_blocking(move || tls(secure, certificate)).await.context("reading certificates")??;
        let mut http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("lictor/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(timeout)
            .pool_max_idle_per_host(1)
            .tls_backend_preconfigured(tls);
        if grpc {
            http = http.http2_prior_knowledge();
        }
        Ok(Self { http: http.build()?, url, headers, grpc })
    }

    /// Sends one batch; the body of a successful answer.
    pub(super) async fn post(&self, body: Vec<u8>) -> Result<Bytes, Problem> {
        let body = if self.grpc { message(&body) } else { body.into() };
        let sent = self.http.post(&self.url).headers(self.headers.clone()).body(body).send().await;
        let response = sent.map_err(|error| Problem {
            text: format!("{:#}", anyhow::Error::new(error.without_url())),
            is_passing: true,
        })?;
        let (head, body) = http::Response::<reqwest::Body>::from(response).into_parts();
        if !head.status.is_success() {
            // The statuses that OTLP's specification calls retryable.
            let is_passing =
                matches!(head.status, StatusCode::TOO_MANY_REQUESTS) || matches!(head.status.as_u16(), 502..=504);
            return Err(Problem { text: format!("the collector answered {}", head.status), is_passing });
        }
        let answer = Limited::new(body, LONGEST_ANSWER).collect().await;
        let answer = answer.map_err(|error| Problem { text: format!("no whole answer: {error}"), is_passing: true })?;
        if self.grpc {
            let trailers = answer.trailers().cloned();
            check_call(&head.headers, trailers.as_ref())?;
            let frame = answer.to_bytes();
            return Ok(frame.slice(frame.len().min(PREFIX)..));
        }
        Ok(answer.to_bytes())
    }
}

/// Length of a gRPC message's prefix, in bytes: a flag for compression, and the length of the message.
const PREFIX: usize = 5;

fn message(body: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(body.len() + PREFIX);
    message.put_u8(0);
    message.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    message.put_slice(body);
    message.freeze()
}

/// How a call ended; an answer without a body says so in its head.
fn check_call(head: &HeaderMap, trailers: Option<&HeaderMap>) -> Result<(), Problem> {
    let field = |name| trailers.and_then(|trailers| trailers.get(name)).or_else(|| head.get(name));
    let text = |name| field(name).and_then(|value| value.to_str().ok());
    match text("grpc-status").and_then(|status| status.parse::<u8>().ok()) {
        Some(0) => Ok(()),
        // Cancelled, deadline exceeded, aborted, out of range, unavailable, data loss.
        status => Err(Problem {
            text: format!(
                "the collector ended the call with status {}: {}",
                status.map_or_else(|| "none".to_owned(), |status| status.to_string()),
                text("grpc-message").unwrap_or_default()
            ),
            is_passing: matches!(status, Some(1 | 4 | 10 | 11 | 14 | 15)),
        }),
    }
}

/// Without TLS in use a configuration is still asked for; that one trusts nobody and reads no files.
fn tls(secure: bool, certificate: Option<PathBuf>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match certificate {
        _ if !secure => {}
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Some(path) => {
            let cannot = || format!("can't read the collector's authorities in {}", path.display());
            for certificate in CertificateDer::pem_file_iter(&path).with_context(cannot)? {
                roots.add(certificate.with_context(cannot)?)?;
            }
            if roots.is_empty() {
                bail!("there is no certificate in {}", path.display());
            }
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    Ok(builder.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth())
}
