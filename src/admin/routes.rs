//! Which path gives what.

use std::sync::Arc;

use http::{HeaderMap, Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::json;
use tracing::Level;

use super::guard::Hosts;
use super::query::{self, Query};
use super::reply::{self, Reply};
use super::state::{Command, Serving, State};
use super::{Scope, certs, envoy, explain, guard, intentions, page, process, scrape, stats, status, watches};

/// Answers one request.
pub(super) async fn answer(request: Request<Incoming>, scope: Scope, hosts: Hosts, state: &Arc<State>) -> Reply {
    if let Err(refusal) = guard::check(&request, hosts) {
        return reply::status(StatusCode::FORBIDDEN, refusal);
    }
    let path = request.uri().path();
    if !is_in(scope, path, &state.prometheus.path) {
        return reply::status(StatusCode::NOT_FOUND, "");
    }
    let query = query::parse(request.uri().query().unwrap_or_default());
    if scope == Scope::Prometheus {
        // Envoy answers any method here, and so do those who stand in for it.
        return match state.prometheus.backend_port {
            Some(port) => scrape::backend(port, request.uri().path_and_query().map_or("/", |path| path.as_str())).await,
            None if query.get("names").is_some_and(|names| names == "lictor") => stats::own(state, request.headers()),
            None => stats::prometheus(state, &query),
        };
    }
    let Some(page) = PAGES.iter().find(|page| page.path == path) else {
        let paths = PAGES.iter().map(|page| format!("  {}: {}\n", page.path, page.about)).collect::<String>();
        return reply::status(StatusCode::NOT_FOUND, format!("There is no such path. There are:\n{paths}"));
    };
    let is_post = request.method() == Method::POST;
    let is_get = matches!(*request.method(), Method::GET | Method::HEAD);
    match page.give {
        // Envoy's readers take POST too, and `consul troubleshoot` sends it.
        Give::Read(read) if is_post || is_get => read(state, &query),
        Give::Negotiated(read) if is_post || is_get => read(state, request.headers()),
        Give::Stream(stream) if request.method() == Method::GET => stream(state),
        Give::Change(change) if is_post => change(state, &query),
        Give::Read(_) | Give::Negotiated(_) | Give::Stream(_) => reply::method_not_allowed("GET"),
        Give::Change(_) => reply::method_not_allowed("POST"),
    }
}

fn is_in(scope: Scope, path: &str, scrape_path: &str) -> bool {
    match scope {
        Scope::Admin => true,
        Scope::Ready => path == "/ready",
        Scope::Prometheus => path == scrape_path,
        Scope::Stats => path.starts_with("/stats"),
    }
}

struct Page {
    path: &'static str,
    about: &'static str,
    give: Give,
}

enum Give {
    Read(fn(&State, &Query) -> Reply),
    /// In the form that the asker accepts.
    Negotiated(fn(&State, &HeaderMap) -> Reply),
    /// Goes on without end.
    Stream(fn(&Arc<State>) -> Reply),
    Change(fn(&State, &Query) -> Reply),
}

const PAGES: &[Page] = &[
    Page { path: "/", about: "the dashboard, for a browser", give: Give::Read(page::dashboard) },
    Page { path: "/status", about: "the state of this sidecar as JSON", give: Give::Read(status::status) },
    Page { path: "/events", about: "the same each second, as server-sent events", give: Give::Stream(status::events) },
    Page {
        path: "/explain",
        about: "where a request goes: upstream=, method=, path=, header=, format=json",
        give: Give::Read(explain::explain),
    },
    Page {
        path: "/intentions/check",
        about: "whether a source may reach us, and by which rule: from=, method=, path=, header=",
        give: Give::Read(intentions::check),
    },
    Page {
        path: "/debug/watches",
        about: "queries of the agent: how each is sent, its last answer and its last error",
        give: Give::Read(watches::watches),
    },
    Page { path: "/livez", about: "200 as long as the process answers", give: Give::Read(|_, _| reply::text("ok\n")) },
    Page {
        path: "/readyz",
        about: "200 when the sidecar serves; ?verbose lists each condition",
        give: Give::Read(readyz),
    },
    Page { path: "/ready", about: "the same in Envoy's words", give: Give::Read(ready) },
    Page { path: "/stats", about: "all numbers; filter=, usedonly, type=, format=", give: Give::Read(stats::stats) },
    Page {
        path: "/metrics",
        about: "all metrics for Prometheus under our own names (OpenMetrics where the client accepts it)",
        give: Give::Negotiated(stats::own),
    },
    Page {
        path: "/stats/prometheus",
        about: "all numbers for Prometheus, by Envoy's names",
        give: Give::Read(stats::prometheus),
    },
    Page {
        path: "/certs",
        about: "our certificate, its chain and the roots; never a key",
        give: Give::Read(certs::certs),
    },
    Page {
        path: "/clusters",
        about: "clusters with the present state of their instances; format=json",
        give: Give::Read(envoy::clusters),
    },
    Page {
        path: "/listeners",
        about: "listeners with their addresses; format=json",
        give: Give::Read(envoy::listeners),
    },
    Page {
        path: "/config_dump",
        about: "the configuration in Envoy's shape, without keys and tokens; include_eds",
        give: Give::Read(envoy::config_dump),
    },
    Page { path: "/server_info", about: "version, state and uptime", give: Give::Read(server_info) },
    Page { path: "/memory", about: "memory of the process", give: Give::Read(memory) },
    Page {
        path: "/logging",
        about: "level=trace|debug|info|warn|error sets the log level",
        give: Give::Change(logging),
    },
    Page {
        path: "/healthcheck/fail",
        about: "/ready answers 503 from now on",
        give: Give::Change(|state, _| healthy(state, false)),
    },
    Page {
        path: "/healthcheck/ok",
        about: "/ready answers 200 again",
        give: Give::Change(|state, _| healthy(state, true)),
    },
    Page {
        path: "/drain_listeners",
        about: "accepts nothing new and lets open connections go on; inboundonly: from the mesh alone",
        give: Give::Change(drain),
    },
    Page { path: "/quitquitquit", about: "ends the process as SIGTERM does", give: Give::Change(quit) },
];

fn ready(state: &State, _: &Query) -> Reply {
    let serving = state.serving();
    let status = if serving == Serving::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply::status(status, format!("{}\n", serving.word()))
}

fn readyz(state: &State, query: &Query) -> Reply {
    let serving = state.serving();
    let status = if serving == Serving::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut text = String::new();
    if query.contains_key("verbose") {
        let configured = state.snapshots.borrow().is_some();
        let sign = |good| if good { '+' } else { '-' };
        text = format!(
            "[{}]configuration {}\n[{}]serving {}\n",
            sign(configured),
            if configured { "ok" } else { "not complete: the log lists the queries without an answer" },
            sign(serving == Serving::Live),
            serving.word(),
        );
    }
    reply::status(status, format!("{text}{}\n", if serving == Serving::Live { "ok" } else { "not ready" }))
}

fn server_info(state: &State, _: &Query) -> Reply {
    let uptime = format!("{}s", state.started.elapsed().as_secs());
    reply::json(&json!({
        // Scripts cut the second part.
        "version": format!("lictor/{}/Clean/RELEASE/rustls", env!("CARGO_PKG_VERSION")),
        "state": state.serving().word(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": { "concurrency": state.workers },
    }))
}

fn memory(_: &State, _: &Query) -> Reply {
    let resident = process::resident_bytes().to_string();
    reply::json(&json!({ "allocated": resident, "heap_size": resident, "total_physical_bytes": resident }))
}

fn logging(state: &State, query: &Query) -> Reply {
    if let Some(level) = query.get("level") {
        let level = match level.as_str() {
            "trace" => Level::TRACE,
            "debug" => Level::DEBUG,
            "info" => Level::INFO,
            "warning" | "warn" => Level::WARN,
            "error" | "critical" | "off" => Level::ERROR,
            other => {
                let text = format!("unknown level {other:?}: write trace, debug, info, warning or error\n");
                return reply::status(StatusCode::BAD_REQUEST, text);
            }
        };
        state.level.set(level);
        tracing::info!(target: "admin", %level, "Log level changed");
    }
    let level = match state.level.get() {
        Level::WARN => "warning".to_owned(),
        level => level.to_string().to_lowercase(),
    };
    reply::text(format!("active loggers:\n  lictor: {level}\n"))
}

fn healthy(state: &State, healthy: bool) -> Reply {
    state.set_healthy(healthy);
    reply::ok()
}

fn drain(state: &State, query: &Query) -> Reply {
    let inbound_only = query.contains_key("inboundonly");
    command(state, if inbound_only { Command::DrainInbound } else { Command::Drain })
}

fn quit(state: &State, _: &Query) -> Reply {
    command(state, Command::Quit)
}

fn command(state: &State, command: Command) -> Reply {
    match state.commands.try_send(command) {
        Ok(()) => reply::ok(),
        Err(_) => reply::status(StatusCode::SERVICE_UNAVAILABLE, "busy with earlier commands: try again\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_is_there_once() {
        let mut paths: Vec<_> = PAGES.iter().map(|page| page.path).collect();
        let all = paths.len();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), all);
    }

    #[test]
    fn other_listeners_give_their_part_alone() {
        for (scope, path, expected) in [
            (Scope::Ready, "/ready", true),
            (Scope::Ready, "/stats", false),
            (Scope::Prometheus, "/metrics", true),
            (Scope::Prometheus, "/metrics/x", false),
            (Scope::Prometheus, "/quitquitquit", false),
            (Scope::Stats, "/stats/prometheus", true),
            (Scope::Stats, "/ready", false),
            (Scope::Admin, "/quitquitquit", true),
        ] {
            assert_eq!(is_in(scope, path, "/metrics"), expected, "{scope:?} {path}");
        }
    }
}
