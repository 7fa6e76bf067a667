//! Listeners for exposed paths, which anyone may ask without TLS.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::super::opaque::Opaque;
use super::super::{Notes, host};
use super::plan::PublicPlan;
use super::public::{LOCAL_CONNECT_TIMEOUT, LOCAL_IDLE_TIMEOUT, LOCAL_REQUEST_TIMEOUT, bind_address};
use crate::consul::api;
use crate::snapshot::{Address, Bind, Exposed, ExposedPath, LocalApp, Protocol};

/// Listeners for exposed paths, one for each port.
pub(super) fn exposed(
    service: &api::AgentService,
    proxy: &api::Proxy,
    public: Option<&PublicPlan>,
    notes: &mut Notes,
) -> BTreeMap<Bind, Exposed> {
    if proxy.expose.checks {
        notes.push(
            "Expose.Checks is not supported, as the agent's HTTP API does not tell the paths of checks: list them in \
             Expose.Paths"
                .into(),
        );
    }
    if proxy.expose.paths.is_empty() {
        return BTreeMap::new();
    }
    let config = Opaque::new(Some(&proxy.config), "proxy config");
    let address = bind_address(service, config, notes);
    let mut listeners = BTreeMap::<Bind, Exposed>::new();
    for wire in &proxy.expose.paths {
        let Some((port, path)) = exposed_path(wire, proxy, notes) else { continue };
        let bind = Bind::Tcp(SocketAddr::new(address, port));
        if public.is_some_and(|public| public.bind == bind) {
            notes
                .push(format!("exposed path {:?}: port {port} is the public listener's, so it is left out", wire.path));
            continue;
        }
        let listener = listeners.entry(bind.clone()).or_insert_with(|| Exposed {
            bind,
            paths: BTreeMap::new(),
            connect_timeout: public.map_or(LOCAL_CONNECT_TIMEOUT, |public| public.local_connect_timeout),
            request_timeout: public.map_or(Some(LOCAL_REQUEST_TIMEOUT), |public| public.local_request_timeout),
            idle_timeout: public.map_or(Some(LOCAL_IDLE_TIMEOUT), |public| public.local_idle_timeout),
        });
        if listener.paths.contains_key(&wire.path) {
            notes.push(format!("exposed path {:?}: port {port} lists it twice; the first entry is used", wire.path));
        } else {
            listener.paths.insert(wire.path.clone(), path);
        }
    }
    listeners
}

fn exposed_path(wire: &api::ExposePath, proxy: &api::Proxy, notes: &mut Notes) -> Option<(u16, ExposedPath)> {
    let ports = wire.listener_port.get().zip(wire.local_path_port.get());
    let Some((port, local_port)) = ports.filter(|_| wire.path.starts_with('/')) else {
        notes.push(format!(
            "exposed path {:?} lacks a port or does not begin with a slash, so it is left out",
            wire.path
        ));
        return None;
    };
    let host = host(&proxy.local_service_address).or_else(|| host("127.0.0.1"))?;
    let protocol = match Protocol::parse(&wire.protocol) {
        Protocol::Http2 | Protocol::Grpc => Protocol::Http2,
        Protocol::Http | Protocol::Tcp => Protocol::Http,
    };
    let app = LocalApp::Tcp(Address { host, port: local_port });
    Some((port, ExposedPath { app, protocol }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::fixture::sidecar;
    use super::*;

    #[test]
    fn exposed_paths_are_gathered_by_port() {
        let exposed = |service: Value, paths: Value| {
            let (definition, notes) =
                sidecar(service, json!({"LocalServicePort": 8080, "Expose": {"Paths": paths, "Checks": false}}));
            let listener = |(bind, exposed): (&Bind, &Exposed)| {
                let path = |(path, to): (&String, &ExposedPath)| format!("{path} {} {:?}", to.app, to.protocol);
                (bind.to_string(), exposed.paths.iter().map(path).collect::<Vec<_>>())
            };
            (definition.exposed.iter().map(listener).collect::<Vec<_>>(), notes.len())
        };
        let path = |port: u16, path: &str, local: u16, protocol: &str| json!({"ListenerPort": port, "Path": path, "LocalPathPort": local, "Protocol": protocol});
        let on = |port: u16, paths: &[&str]| {
            (format!("0.0.0.0:{port}"), paths.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        for (paths, expected, noted) in [
            (json!([]), vec![], 0),
            (json!([path(1, "/a", 2, "")]), vec![on(1, &["/a 127.0.0.1:2 Http"])], 0),
            (
                json!([path(1, "/a", 2, "http"), path(3, "/a", 2, "http"), path(1, "/b", 4, "http2")]),
                vec![on(1, &["/a 127.0.0.1:2 Http", "/b 127.0.0.1:4 Http2"]), on(3, &["/a 127.0.0.1:2 Http"])],
                0,
            ),
            (json!([path(1, "/a", 2, ""), path(1, "/a", 3, "")]), vec![on(1, &["/a 127.0.0.1:2 Http"])], 1),
            (json!([path(0, "/a", 2, ""), path(1, "/a", 0, ""), path(1, "a", 2, "")]), vec![], 3),
            (json!([path(21000, "/a", 2, "")]), vec![], 1),
        ] {
            assert_eq!(exposed(json!({"Port": 21000}), paths.clone()), (expected, noted), "{paths}");
        }
        let one = json!([path(1, "/a", 2, "")]);
        assert_eq!(exposed(json!({"Port": 0, "Address": "10.0.0.1"}), one).0[0].0, "10.0.0.1:1");
        let (definition, notes) = sidecar(json!({}), json!({"LocalServicePort": 1, "Expose": {"Checks": true}}));
        assert!(definition.exposed.is_empty() && notes.iter().any(|note| note.contains("Expose.Checks")));
    }
}
