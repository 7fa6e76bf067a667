//! Checks of one sidecar: its registration, each of its queries, its certificate, its ports and its app.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::agent::Answers;
use super::check::{Findings, check_answer};
use super::host::{self, Owner};
use super::{Running, Subject, upstreams};
use crate::consul::{Client, Query, api};
use crate::tls::Credentials;

/// Timeout of a connection to the local app.
const APP_TIME: Duration = Duration::from_secs(3);

pub(super) async fn examine(
    client: &Client,
    subject: &Subject,
    running: &[Running],
    answers: Answers,
    findings: &mut Findings,
) {
    let service = if answers.is_reachable { registration(client, subject, findings).await } else { None };
    let ids = [
        subject.id(),
        service.as_ref().map_or("", |service| service.id.as_str()),
        service.as_ref().map_or("", destination_id),
    ];
    let running = running.iter().find(|one| !one.started_for().is_empty() && ids.contains(&one.started_for()));
    is_ready(running, findings);
    let Some(service) = service else { return };
    let Some(proxy) = &service.proxy else { return };
    identity(client, &proxy.destination_service_name, findings).await;
    rules(client, &proxy.destination_service_name, findings).await;
    let pid = running.and_then(pid);
    if let Some(port) = service.port.get() {
        let address = text(&proxy.config, "bind_address").unwrap_or(&service.address).parse();
        let address = SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
        listener("public listener", address, running.is_some(), pid, findings);
    }
    local_app(proxy, findings).await;
    for upstream in &proxy.upstreams {
        if let Some(port) = upstream.local_bind_port.get() {
            let address = upstream.local_bind_address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
            let name = format!("listener of {}", upstream.destination_name);
            listener(&name, SocketAddr::new(address, port), running.is_some(), pid, findings);
        }
        upstreams::examine(client, upstream, findings).await;
    }
}

fn destination_id(service: &api::AgentService) -> &str {
    service.proxy.as_ref().map_or("", |proxy| proxy.destination_service_id.as_str())
}

fn text<'a>(config: &'a serde_json::Map<String, serde_json::Value>, key: &str) -> Option<&'a str> {
    config.get(key).and_then(serde_json::Value::as_str).filter(|text| !text.is_empty())
}

async fn registration(client: &Client, subject: &Subject, findings: &mut Findings) -> Option<api::AgentService> {
    let id = match subject {
        Subject::ProxyId(id) => id.clone(),
        Subject::SidecarFor(id) | Subject::Either(id) => {
            let services = match client.agent_services().await {
                Ok(services) => services,
                Err(error) => {
                    findings.failed("registration", error);
                    return None;
                }
            };
            let is_sidecar = |service: &&api::AgentService| {
                let is_named = matches!(subject, Subject::Either(_)) && service.id == *id;
                service.kind == "connect-proxy" && (is_named || destination_id(service).eq_ignore_ascii_case(id))
            };
            let found: Vec<&str> = services.values().filter(is_sidecar).map(|service| service.id.as_str()).collect();
            match found[..] {
                [id] => id.to_owned(),
                [] => {
                    findings.fail(
                        "registration",
                        format!("no sidecar of {id} is registered with this agent, as far as the token may see"),
                        "register the service with a sidecar_service, ask the agent of its host (-http-addr), or give the token \
                         service:read on it",
                    );
                    return None;
                }
                _ => {
                    findings.fail(
                        "registration",
                        format!("several sidecars of {id} are registered: {}", found.join(", ")),
                        "name one of them by -proxy-id",
                    );
                    return None;
                }
            }
        }
    };
    let answer = client.fetch(&Query::agent_service(&id)).await;
    if let Err(error) = &answer
        && error.is_not_found()
    {
        findings.fail("registration", error.to_string(), "register it, or name another by -proxy-id");
        return None;
    }
    let service =
        check_answer("registration", answer, findings, |service| format!("agent/service/{} can be read", service.id))?;
    if service.kind != "connect-proxy" || service.proxy.is_none() {
        findings.fail("registration", format!("{id} is no sidecar proxy"), "name a connect-proxy by -proxy-id");
        return None;
    }
    Some(service)
}

fn is_ready(running: Option<&Running>, findings: &mut Findings) {
    let Some(running) = running else {
        findings.warn(
            "sidecar",
            "it does not run on this host, or its admin server is off or of another user",
            "start it, or run this as its user or as root",
        );
        return;
    };
    let about = &running.status["sidecar"];
    let state = about["state"].as_str().unwrap_or_default();
    if state == "LIVE" {
        findings.ok("sidecar", format!("ready; its admin server is at {}", running.address));
    } else {
        findings.fail(
            "sidecar",
            format!("it runs, and is not ready ({state}); its admin server is at {}", running.address),
            "see what fails below, `/readyz?verbose` of its admin server, and its log",
        );
    }
    let inbound = running.status["inbound"].as_array();
    if inbound.is_some_and(|all| all.iter().any(|entry| entry["audit"] == true)) {
        findings.warn(
            "intentions",
            "audit mode is on: what they deny is let through",
            "take lictor_intentions_audit out of the registration when `lictor intentions suggest` has nothing to add",
        );
    }
}

/// The process that listens where its admin server is.
fn pid(running: &Running) -> Option<u32> {
    let owner = match running.address.strip_prefix("unix://") {
        Some(path) => host::owner_of_path(path),
        None => host::owner(running.address.parse().ok()?),
    };
    owner.pid()
}

/// Leaf and roots, and whether they make credentials at this moment.
async fn identity(client: &Client, service: &str, findings: &mut Findings) {
    let roots = check_answer("roots", client.fetch(&Query::ca_roots()).await, findings, |_| {
        "agent/connect/ca/roots can be read".into()
    });
    let leaf = client.fetch(&Query::ca_leaf(service)).await;
    let leaf = check_answer("leaf", leaf, findings, |_| format!("agent/connect/ca/leaf/{service} can be read"));
    let (Some(roots), Some(leaf)) = (roots, leaf) else { return };
    let pems: Vec<String> = roots.roots.iter().map(|root| root.root_cert.clone()).collect();
    let now = SystemTime::now();
    let key = leaf.private_key_pem.expose();
    // As it is spelled in the certificate, whatever case it was asked in.
    let name = leaf.service_uri.rsplit('/').next().unwrap_or(service);
    match Credentials::new(&roots.trust_domain, &pems, &leaf.cert_pem, key, name, now) {
        Ok(credentials) => {
            let life = credentials.not_after().duration_since(credentials.not_before()).unwrap_or_default();
            let left = credentials.not_after().duration_since(now).unwrap_or_default();
            let found = format!("{} leads to a root, for {} more", credentials.id(), period(left));
            if left < life / LATE {
                let next =
                    "see the logs of the agent and of the servers for what is wrong with the certificate authority";
                findings.warn("certificate", format!("{found}, and should have been renewed"), next);
            } else {
                findings.ok("certificate", found);
            }
        }
        Err(error) => findings.fail(
            "certificate",
            error.to_string(),
            "compare the clocks of this host and of the servers, and see the agent's log",
        ),
    }
}

/// A certificate with less than this part of its life left (one tenth) is late: the agent renews it before.
const LATE: u32 = 10;

fn period(left: Duration) -> String {
    match left.as_secs() {
        seconds if seconds < 2 * 3600 => format!("{} min", seconds / 60),
        seconds if seconds < 48 * 3600 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// Intentions, what decides where none matches, and the config entries that go with them.
async fn rules(client: &Client, service: &str, findings: &mut Findings) {
    let list = client.fetch(&Query::intentions(service)).await;
    let list = check_answer("intentions", list, findings, |list| format!("{} name it or all", list.len()));
    let policy = client.fetch(&Query::default_policy(service)).await;
    check_answer("default policy", policy, findings, |policy| {
        format!("{} ({})", if policy.allow { "allow" } else { "deny" }, policy.source)
    });
    let mesh = client.fetch(&Query::mesh_config()).await;
    check_answer("config entry mesh", mesh, findings, |entry| {
        if entry.is_some() { "there is one" } else { "there is none" }.into()
    });
    let requirements = |row: &api::Intention| {
        let permissions = row.permissions.iter().filter_map(|permission| permission.jwt.clone());
        row.jwt
            .clone()
            .into_iter()
            .chain(permissions)
            .flat_map(|jwt| jwt.providers)
            .map(|provider| provider.name)
            .collect::<Vec<_>>()
    };
    let names: std::collections::BTreeSet<String> = list.iter().flatten().flat_map(requirements).collect();
    for name in names {
        let title = format!("jwt-provider {name}");
        match client.fetch(&Query::jwt_provider(&name)).await {
            Ok(answer) if answer.value.is_none() => {
                findings.fail(
                    title,
                    "an intention requires it, and there is none",
                    "write it: requests that need it are denied",
                );
            }
            answer => {
                check_answer(title, answer, findings, |_| "can be read".into());
            }
        }
    }
}

/// Checks which process listens at the address of a listener.
fn listener(name: &str, address: SocketAddr, is_running: bool, sidecar: Option<u32>, findings: &mut Findings) {
    let owner = host::owner(address);
    match (&owner, sidecar) {
        (Owner::Nobody, _) if is_running => findings.fail(
            name,
            format!("the sidecar runs, and nothing listens at {address}"),
            "see the sidecar's log: it says why it could not bind it, or what it waits for",
        ),
        (Owner::Nobody, _) => findings.ok(name, format!("{address} is free")),
        (Owner::Process(_, pid), Some(sidecar)) if *pid == sidecar => {
            findings.ok(name, format!("the sidecar listens at {address}"))
        }
        (Owner::Process(process, _), None) if process == "lictor" => {
            findings.ok(name, format!("a lictor listens at {address}"))
        }
        (Owner::Process(process, pid), _) => findings.fail(
            name,
            format!("{address} is taken by {process} (process {pid})"),
            "end that program, or give one of the two another port",
        ),
        (Owner::User(user), _) => findings.warn(
            name,
            format!("a process of the user with the id {user} listens at {address}, and can't be looked at"),
            "run this as root to see whether it is the sidecar",
        ),
    }
}

async fn local_app(proxy: &api::Proxy, findings: &mut Findings) {
    let path = &proxy.local_service_socket_path;
    let host = Some(proxy.local_service_address.as_str()).filter(|host| !host.is_empty()).unwrap_or("127.0.0.1");
    let (address, result) = if !path.is_empty() {
        (path.clone(), timeout(APP_TIME, UnixStream::connect(path)).await.map(|result| result.map(drop)))
    } else if let Some(port) = proxy.local_service_port.get() {
        let connected = timeout(APP_TIME, TcpStream::connect((host, port))).await;
        (format!("{host}:{port}"), connected.map(|result| result.map(drop)))
    } else {
        findings.warn(
            "local app",
            "the registration has neither port nor socket of it",
            "set its port, if the mesh is to reach it",
        );
        return;
    };
    let next = "start the app, or correct LocalServiceAddress and LocalServicePort of the registration";
    match result {
        Ok(Ok(())) => findings.ok("local app", format!("takes connections at {address}")),
        Ok(Err(error)) => findings.fail("local app", format!("takes no connection at {address}: {error}"), next),
        Err(_) => findings.fail("local app", format!("took no connection at {address} within {APP_TIME:?}"), next),
    }
}
