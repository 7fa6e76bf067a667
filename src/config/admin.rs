//! Settings of the admin server and of listeners for metrics.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::flags::AdminFlags;
use super::reader::{Given, Reader, readable, readable_directory};

/// The values of [`AdminFlags`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminSettings {
    pub bind: AdminBind,
    /// A listener for `/ready` alone: `-envoy-ready-bind-address` with `-envoy-ready-bind-port`.
    pub ready: Option<SocketAddr>,
    pub prometheus: Prometheus,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminBind {
    /// Nothing was said: this address, or the next free port.
    Default(SocketAddr),
    Tcp(SocketAddr),
    Unix(PathBuf),
    Off,
}

/// How the listener at `envoy_prometheus_bind_addr` answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prometheus {
    pub path: String,
    /// A port on this host that answers in our place.
    pub backend_port: Option<u16>,
    pub tls: Option<PrometheusTls>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrometheusTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whose certificates are asked for; any CA file comes before a directory of such.
    pub ca_file: Option<PathBuf>,
    pub ca_path: Option<PathBuf>,
}

/// Default address of the admin server, as under `consul connect envoy`.
const DEFAULT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 19_000);

impl Reader<'_> {
    /// # Errors
    /// When a flag or variable can't be read, with its name and what to write instead.
    pub(super) fn admin(&self, flags: AdminFlags) -> anyhow::Result<AdminSettings> {
        let bind = self.given("admin-bind", flags.admin_bind.clone())?;
        let bind = bind.map_or(Ok(AdminBind::Default(DEFAULT)), |given| admin_bind(&given))?;
        let ready = self.ready(&flags)?;
        Ok(AdminSettings { bind, ready, prometheus: self.prometheus(flags)? })
    }

    fn ready(&self, flags: &AdminFlags) -> anyhow::Result<Option<SocketAddr>> {
        let port = self.number("envoy-ready-bind-port", flags.envoy_ready_bind_port.clone(), 0..=65_535)?;
        let Some(port) = port.filter(|port| *port > 0) else { return Ok(None) };
        let host = self.given("envoy-ready-bind-address", flags.envoy_ready_bind_address.clone())?;
        let host = host.map_or_else(|| Ipv4Addr::UNSPECIFIED.to_string(), |given| given.value);
        let given = Given { value: format!("{host}:{port}"), from: "-envoy-ready-bind-address".to_owned() };
        socket_address(&given).map(Some)
    }

    fn prometheus(&self, flags: AdminFlags) -> anyhow::Result<Prometheus> {
        let path = self.given("prometheus-scrape-path", flags.prometheus_scrape_path)?;
        let path = path.map_or_else(|| "/metrics".to_owned(), |given| given.value);
        ensure!(path.starts_with('/'), "-prometheus-scrape-path: {path:?} does not begin with a slash");
        let port = self.number("prometheus-backend-port", flags.prometheus_backend_port, 1..=65_535)?;
        let certificate = self.given("prometheus-cert-file", flags.prometheus_cert_file)?;
        let key = self.given("prometheus-key-file", flags.prometheus_key_file)?;
        let ca_file = self.given("prometheus-ca-file", flags.prometheus_ca_file)?;
        let ca_path = self.given("prometheus-ca-path", flags.prometheus_ca_path)?;
        let pem = |what, given: &Given| readable(what, given, "name a PEM file that this user may read");
        let tls = match (&certificate, &key) {
            (Some(certificate), Some(key)) => Some(PrometheusTls {
                certificate: pem("certificate", certificate)?,
                key: pem("private key", key)?,
                ca_file: ca_file.as_ref().map(|given| pem("CA file", given)).transpose()?,
                ca_path: ca_path.as_ref().map(readable_directory).transpose()?,
            }),
            (None, None) if ca_file.is_none() && ca_path.is_none() => None,
            // As Consul has it: all of them or none.
            _ => bail!(
                "-prometheus-cert-file and -prometheus-key-file must both be given where any of -prometheus-ca-file, \
                 -prometheus-ca-path, -prometheus-cert-file and -prometheus-key-file is"
            ),
        };
        let backend_port = port.map(|port| u16::try_from(port).context("-prometheus-backend-port")).transpose()?;
        Ok(Prometheus { path, backend_port, tls })
    }
}

fn admin_bind(given: &Given) -> anyhow::Result<AdminBind> {
    let Given { value, from } = given;
    if value == "off" {
        return Ok(AdminBind::Off);
    }
    if let Some(path) = value.strip_prefix("unix://") {
        ensure!(path.starts_with('/'), "{from}: {value:?} names no file: write unix:///path");
        return Ok(AdminBind::Unix(Path::new(path).to_owned()));
    }
    socket_address(given).map(AdminBind::Tcp)
}

fn socket_address(Given { value, from }: &Given) -> anyhow::Result<SocketAddr> {
    if let Ok(address) = value.parse() {
        return Ok(address);
    }
    // A name, as in `localhost:19000`; it is asked for once.
    let mut found = value.to_socket_addrs().ok();
    let first = found.as_mut().and_then(Iterator::next);
    first.with_context(|| format!("{from}: {value:?} is no address: write host:port, unix:///path or off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(value: &str) -> anyhow::Result<AdminBind> {
        admin_bind(&Given { value: value.to_owned(), from: "-admin-bind".to_owned() })
    }

    #[test]
    fn an_admin_address_is_one_of_four() {
        assert_eq!(bind("off").unwrap(), AdminBind::Off);
        assert_eq!(bind("unix:///run/a.sock").unwrap(), AdminBind::Unix("/run/a.sock".into()));
        assert_eq!(bind("127.0.0.2:19001").unwrap(), AdminBind::Tcp("127.0.0.2:19001".parse().unwrap()));
        assert_eq!(bind("[::1]:0").unwrap(), AdminBind::Tcp("[::1]:0".parse().unwrap()));
        for bad in ["unix://x", "19000", "127.0.0.1", "127.0.0.1:x", ":"] {
            let error = bind(bad).expect_err(bad).to_string();
            assert!(error.starts_with("-admin-bind: "), "{error}");
        }
    }
}
