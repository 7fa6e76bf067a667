//! Key sets that are not in their config entries: in a file on this host, or at a URI.
//!
//! One task for each set reads it again and again. What was read last stays good until something newer was
//! read, however long that takes.

use std::fmt;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until};

use crate::jwt::{KeySet, Refetch};

/// Longest key set, in bytes.
const LIMIT: usize = 1024 * 1024;
/// Interval between two reads of a key set's file.
const FILE_PERIOD: Duration = Duration::from_secs(10);
/// Shortest interval between two fetches that tokens with an unknown key cause.
const REFETCH_GAP: Duration = Duration::from_secs(10);
/// Longest pause between attempts after failures; the cache duration if that is shorter.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Timeout of a connection to the server of a key set.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a key set is, and how to get it. Equal sources are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum KeySource {
    File(PathBuf),
    Remote(RemoteKeys),
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct RemoteKeys {
    /// May hold credentials.
    pub(super) uri: String,
    /// For one request, from the dial to the last byte.
    pub(super) timeout: Duration,
    /// The set is fetched again when it is as old as this.
    pub(super) cache: Duration,
    /// After a first attempt that failed.
    pub(super) retries: u32,
    /// Before the first retry; doubled for each further one.
    pub(super) back_off: Duration,
    pub(super) longest_back_off: Duration,
    pub(super) trust: Trust,
}

/// The authorities that vouch for a server of keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Trust {
    System,
    File(PathBuf),
    /// A variable of our environment with certificates in PEM.
    Environment(String),
    Pem(String),
}

/// Keys that were read, and how to ask for newer ones.
#[derive(Debug, Clone)]
pub(super) struct Fetched {
    pub(super) keys: Arc<KeySet>,
    pub(super) refetch: Refetch,
}

/// Reads a key set until it is dropped.
#[derive(Debug)]
pub(super) struct Keeper(AbortHandle);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads a key set from now on, and sends what `wrap` makes of it whenever it changes. Must be called within a
/// runtime.
pub(super) fn keep<T, F>(source: KeySource, updates: mpsc::Sender<T>, wrap: F) -> Keeper
where
    T: Send + 'static,
    F: Fn(Fetched) -> T + Send + 'static,
{
    Keeper(tokio::spawn(run(source, updates, wrap)).abort_handle())
}

async fn run<T, F: Fn(Fetched) -> T>(source: KeySource, updates: mpsc::Sender<T>, wrap: F) {
    let refetch = Refetch::default();
    let mut last: Option<Arc<KeySet>> = None;
    let mut failures = 0;
    loop {
        match source.load().await {
            Ok(keys) => {
                if failures > 0 {
                    tracing::info!("the key set of {source} can be read again");
                }
                failures = 0;
                if last.as_deref() != Some(&keys) {
                    let keys = Arc::new(keys);
                    last = Some(Arc::clone(&keys));
                    if updates.send(wrap(Fetched { keys, refetch: refetch.clone() })).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => {
                let meanwhile = if last.is_some() {
                    "the keys read before stay in use"
                } else {
                    "no token of its provider is valid"
                };
                // Once for each time that it begins.
                if failures == 0 {
                    tracing::warn!("the key set of {source} can't be read: {error:#}; {meanwhile}");
                } else {
                    tracing::debug!("the key set of {source} still can't be read: {error:#}");
                }
                failures += 1;
            }
        }
        let read = Instant::now();
        tokio::select! {
            () = sleep(source.pause(failures)) => {}
            () = refetch.requested() => sleep_until(read + REFETCH_GAP).await,
        }
    }
}

impl KeySource {
    async fn load(&self) -> anyhow::Result<KeySet> {
        let bytes = match self {
            Self::File(path) => {
                let path = path.clone();
                spawn_blocking(move || read_file(path)).await??
            }
            Self::Remote(remote) => remote.fetch().await?,
        };
        Ok(KeySet::parse(&bytes)?)
    }

    /// Until it is read again, after so many failures in a row.
    fn pause(&self, failures: u32) -> Duration {
        match self {
            Self::File(_) => FILE_PERIOD,
            Self::Remote(remote) => remote.pause(failures),
        }
    }
}

impl RemoteKeys {
    /// Scheme, host and path. User, password, query and fragment may be secrets.
    fn shown_uri(&self) -> String {
        let Ok(mut uri) = reqwest::Url::parse(&self.uri) else { return "a URI that is none".to_owned() };
        // They fail where there can be none.
        let _ = uri.set_username("").and_then(|()| uri.set_password(None));
        uri.set_query(None);
        uri.set_fragment(None);
        uri.into()
    }

    fn pause(&self, failures: u32) -> Duration {
        let grown = |failures: u32| self.back_off.saturating_mul(2_u32.saturating_pow(failures.min(16)));
        match failures {
            0 => self.cache,
            // The entry's own retries…
            failures if failures <= self.retries => grown(failures - 1).min(self.longest_back_off),
            // …and when those are used up, we still need the keys.
            failures => grown(failures).min(LONGEST_PAUSE).min(self.cache),
        }
    }

    async fn fetch(&self) -> anyhow::Result<Vec<u8>> {
        let trust = self.trust.clone();
        let secure = self.uri.starts_with("https:");
        // Reads files; a file of authorities may be replaced at any time.
        let tls = spawn_blocking(move || trust.client(secure)).await??;
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("lictor/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(self.timeout)
            .tls_backend_preconfigured(tls)
            .build()?;
        let mut response = http.get(&self.uri).send().await.map_err(strip_url)?;
        if response.status() != reqwest::StatusCode::OK {
            bail!("its server answered {}", response.status());
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(strip_url)? {
            if body.len() + chunk.len() > LIMIT {
                bail!("it is longer than {LIMIT} bytes");
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

impl Trust {
    fn client(&self, secure: bool) -> anyhow::Result<ClientConfig> {
        let roots = if secure { self.roots()? } else { RootCertStore::empty() };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }

    fn roots(&self) -> anyhow::Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        let pem = match self {
            Self::System => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                return Ok(roots);
            }
            Self::File(path) => read_file(path.clone())?,
            Self::Environment(name) => {
                std::env::var(name).with_context(|| format!("no CA certificates in the variable {name}"))?.into_bytes()
            }
            Self::Pem(text) => text.clone().into_bytes(),
        };
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            roots.add(certificate.context("its CA certificates are not PEM")?)?;
        }
        if roots.is_empty() {
            bail!("no CA certificate is given");
        }
        Ok(roots)
    }
}

fn read_file(path: PathBuf) -> anyhow::Result<Vec<u8>> {
    let context = || format!("can't read {}", path.display());
    // Anything but a file might never end.
    if !std::fs::metadata(&path).with_context(context)?.is_file() {
        bail!("{} is not a file", path.display());
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(&path).with_context(context)?;
    file.take(LIMIT as u64 + 1).read_to_end(&mut bytes).with_context(context)?;
    if bytes.len() > LIMIT {
        bail!("{} is longer than {LIMIT} bytes", path.display());
    }
    Ok(bytes)
}

/// With its causes, and without the URI, which the log line has already.
fn strip_url(error: reqwest::Error) -> anyhow::Error {
    anyhow::Error::new(error.without_url())
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Remote(remote) => f.write_str(&remote.shown_uri()),
        }
    }
}

impl fmt::Debug for RemoteKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteKeys").field("uri", &self.shown_uri()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tokio::time::timeout;

    use super::*;
    use crate::testing::{Agent, Fault, TempFile};

    /// Longest wait for something that should come at once.
    const SOON: Duration = Duration::from_secs(10);
    const PATH: &str = "/v1/keys";

    fn set(names: &[&str]) -> Value {
        let key = |name: &&str| json!({"kty": "oct", "kid": name, "k": "c2VjcmV0"});
        json!({"keys": names.iter().map(key).collect::<Vec<_>>()})
    }

    async fn remote(agent: &Agent) -> RemoteKeys {
        RemoteKeys {
            uri: format!("http://{}{PATH}", agent.tcp_address().await),
            timeout: Duration::from_secs(2),
            cache: Duration::from_millis(50),
            retries: 2,
            back_off: Duration::from_millis(10),
            longest_back_off: Duration::from_millis(20),
            trust: Trust::System,
        }
    }

    fn start(source: KeySource) -> (Keeper, mpsc::Receiver<Fetched>) {
        let (updates, receiver) = mpsc::channel(16);
        (keep(source, updates, |fetched| fetched), receiver)
    }

    async fn next(updates: &mut mpsc::Receiver<Fetched>) -> Fetched {
        timeout(SOON, updates.recv()).await.expect("keys come soon").expect("the keeper runs")
    }

    fn parsed(names: &[&str]) -> KeySet {
        KeySet::parse(set(names).to_string().as_bytes()).unwrap()
    }

    #[tokio::test]
    async fn a_remote_set_is_fetched_again_and_survives_its_server() {
        let server = Agent::start();
        let (_keeper, mut updates) = start(KeySource::Remote(remote(&server).await));
        // There is nothing yet.
        server.set(PATH, set(&["a"]));
        assert_eq!(*next(&mut updates).await.keys, parsed(&["a"]));
        for fault in [Fault::Status(500, "oops"), Fault::Rubbish] {
            server.fault(Some(fault));
            let before = server.requests(PATH).len();
            while server.requests(PATH).len() < before + 3 {
                tokio::task::yield_now().await;
            }
        }
        server.fault(None);
        server.set(PATH, set(&["a", "b"]));
        // What is the same is no news.
        assert_eq!(*next(&mut updates).await.keys, parsed(&["a", "b"]));
    }

    #[tokio::test]
    async fn a_set_that_is_too_long_is_not_taken() {
        let server = Agent::start();
        let mut long = set(&["a"]);
        long["padding"] = "x".repeat(LIMIT).into();
        server.set(PATH, long.clone());
        let source = remote(&server).await;
        assert!(source.fetch().await.unwrap_err().to_string().contains("longer"));
        let file = TempFile::new(&long.to_string());
        assert!(KeySource::File(file.path().into()).load().await.is_err());
        assert!(KeySource::File("/dev/zero".into()).load().await.is_err());
    }

    #[tokio::test]
    async fn an_unknown_key_has_the_set_fetched_before_its_time() {
        let server = Agent::start();
        server.set(PATH, set(&["a"]));
        let source = RemoteKeys { cache: Duration::from_secs(3600), ..remote(&server).await };
        let (_keeper, mut updates) = start(KeySource::Remote(source));
        let fetched = next(&mut updates).await;
        server.set(PATH, set(&["b"]));
        tokio::time::pause();
        let requested = Instant::now();
        for _ in 0..1000 {
            fetched.refetch.request();
        }
        tokio::time::advance(REFETCH_GAP).await;
        tokio::time::resume();
        assert_eq!(*next(&mut updates).await.keys, parsed(&["b"]));
        assert!(requested.elapsed() >= REFETCH_GAP);
        assert_eq!(server.requests(PATH).len(), 2);
    }

    #[tokio::test]
    async fn a_file_is_read() {
        let file = TempFile::new(&set(&["a"]).to_string());
        let (_keeper, mut updates) = start(KeySource::File(file.path().into()));
        assert_eq!(*next(&mut updates).await.keys, parsed(&["a"]));
    }

    #[test]
    fn pauses_follow_the_retry_policy_then_our_own() {
        let mut remote = RemoteKeys {
            uri: String::new(),
            timeout: Duration::ZERO,
            cache: Duration::from_secs(300),
            retries: 3,
            back_off: Duration::from_secs(1),
            longest_back_off: Duration::from_secs(3),
            trust: Trust::System,
        };
        let pauses = |remote: &RemoteKeys| [0, 1, 2, 3, 4, 5, 6, 1000].map(|failures| remote.pause(failures).as_secs());
        assert_eq!(pauses(&remote), [300, 1, 2, 3, 16, 32, 60, 60]);
        (remote.retries, remote.cache) = (0, Duration::from_secs(5));
        assert_eq!(pauses(&remote), [5, 2, 4, 5, 5, 5, 5, 5]);
    }

    #[test]
    fn authorities_must_be_there() {
        let ca = crate::testing::ca::Ca::new();
        assert_eq!(Trust::Pem(ca.pem.clone()).roots().unwrap().len(), 1);
        let file = TempFile::new(&ca.pem);
        assert_eq!(Trust::File(file.path().into()).roots().unwrap().len(), 1);
        for bad in [Trust::Pem(String::new()), Trust::Environment("LICTOR_NO_SUCH".into()), Trust::File("/none".into())]
        {
            assert!(bad.roots().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_source_is_named_without_its_query() {
        let uri = "https://example.com/keys?token=secret".to_owned();
        let remote = RemoteKeys {
            uri,
            timeout: SOON,
            cache: SOON,
            retries: 0,
            back_off: SOON,
            longest_back_off: SOON,
            trust: Trust::System,
        };
        assert_eq!(KeySource::Remote(remote).to_string(), "https://example.com/keys");
    }
}
