//! Sends packets to statsd or dogstatsd.

use std::io;
use std::net::ToSocketAddrs as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::{UdpSocket, UnixDatagram};
use tokio::time::MissedTickBehavior;

use super::state::State;
use super::stats;
use crate::stats::statsd::{Dialect, Writer};

/// Sends what has changed, each `interval`, to `url`. What cannot be sent is not sent again.
pub(super) async fn send(url: &str, dialect: Dialect, interval: Duration, state: &State) {
    let mut writer = Writer::new(dialect);
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut socket = None;
    let mut reported = None;
    loop {
        ticks.tick().await;
        if socket.is_none() {
            match Socket::connect(url).await {
                Ok(connected) => {
                    tracing::info!(target: "admin", %url, "Sending metrics to statsd");
                    (socket, reported) = (Some(connected), None);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if reported.as_ref() != Some(&error) {
                        tracing::error!(target: "admin", %url, %error, "Metrics can't be sent to statsd; trying again");
                        reported = Some(error);
                    }
                }
            }
        }
        let packets = writer.packets(&stats::samples(state), &stats::common_labels(state));
        let Some(connected) = &socket else { continue };
        for packet in packets {
            if let Err(error) = connected.send(packet.as_bytes()).await {
                tracing::debug!(target: "admin", %url, %error, "A packet for statsd was lost");
                // A port where nobody listens may be listened on later. A file may be another one by then.
                if matches!(connected, Socket::Unix(_)) {
                    socket = None;
                }
                break;
            }
        }
    }
}

enum Socket {
    Udp(UdpSocket),
    Unix(UnixDatagram),
}

impl Socket {
    async fn connect(url: &str) -> anyhow::Result<Self> {
        let url = expand(url, |name| std::env::var(name).ok())?;
        if let Some(path) = url.strip_prefix("unix://") {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path).with_context(|| format!("can't connect to {path}"))?;
            return Ok(Self::Unix(socket));
        }
        let Some(address) = url.strip_prefix("udp://") else { bail!("{url:?} begins with neither udp:// nor unix://") };
        let address = address.trim_end_matches('/').to_owned();
        let found = tokio::task::spawn_blocking(move || address.to_socket_addrs().map(|mut all| all.next())).await??;
        let to = found.with_context(|| format!("{url:?} has no address"))?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(to).await?;
        Ok(Self::Udp(socket))
    }

    async fn send(&self, packet: &[u8]) -> io::Result<usize> {
        match self {
            Self::Udp(socket) => socket.send(packet).await,
            Self::Unix(socket) => socket.send(packet).await,
        }
    }
}

/// `$NAME` stands for a whole URL of the environment, and `${HOST_IP}` within one for that variable, as in Consul.
fn expand(url: &str, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<String> {
    let known = |name: &str| variable(name).with_context(|| format!("the variable {name} is not set"));
    if let Some(name) = url.strip_prefix('$').filter(|name| !name.starts_with('{')) {
        return known(name);
    }
    if url.contains(HOST_IP) {
        return Ok(url.replace(HOST_IP, &known("HOST_IP")?));
    }
    Ok(url.to_owned())
}

const HOST_IP: &str = "${HOST_IP}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_stand_for_urls_and_for_the_host() {
        let variable = |name: &str| match name {
            "HOST_IP" => Some("10.0.0.1".to_owned()),
            "STATSD" => Some("udp://1.2.3.4:8125".to_owned()),
            _ => None,
        };
        assert_eq!(expand("udp://${HOST_IP}:8125", variable).unwrap(), "udp://10.0.0.1:8125");
        assert_eq!(expand("$STATSD", variable).unwrap(), "udp://1.2.3.4:8125");
        assert_eq!(expand("udp://a:1", variable).unwrap(), "udp://a:1");
        assert!(expand("$NONE", variable).unwrap_err().to_string().contains("NONE"));
    }
}
