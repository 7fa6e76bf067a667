//! `envoy_tracing_json` and its like: where spans go, in the messages of Envoy's that stand in Consul's documentation.
//!
//! Keys are in snake case or in camel case, as protobuf's JSON allows.

use std::time::Duration;

use serde_json::Value;

use super::Notes;
use super::opaque::Opaque;
use crate::consul::api::GoDuration;
use crate::trace::{Collector, Headers, Otlp, Sampler, Settings, Zipkin};

const TRACING: &str = "envoy_tracing_json";
const LISTENER: &str = "envoy_listener_tracing_json";
const CLUSTERS: &str = "envoy_extra_static_clusters_json";

/// What cannot be used is noted and left out.
pub(super) fn settings(config: Opaque<'_>, service: &str, node: &str, notes: &mut Notes) -> Settings {
    let of_process = json(config, TRACING, notes);
    let of_listener = json(config, LISTENER, notes);
    let provider = of_listener.as_ref().and_then(|listener| field(listener, "provider"));
    let http = of_process.as_ref().and_then(|tracing| field(tracing, "http"));
    // Clusters may be there for other reasons, and in shapes that are nobody's business here.
    let collector = match provider.map(|provider| (LISTENER, provider)).or(http.map(|http| (TRACING, http))) {
        None => None,
        Some((key, tracer)) => {
            let clusters = clusters(config, notes);
            collector(tracer, &clusters)
                .map_err(|problem| {
                    let place = config.place();
                    notes.push(format!("{place}: {key} is not used, so that nothing is traced by it: {problem}"));
                })
                .ok()
        }
    };
    if let Some(listener) = of_listener.as_ref().filter(|listener| field(listener, "custom_tags").is_some()) {
        let place = config.place();
        notes.push(format!("{place}: custom_tags of {LISTENER} are not supported: {}", field_count(listener)));
    }
    Settings {
        service: service.to_owned(),
        node: node.to_owned(),
        collector,
        sampler: of_listener.as_ref().map(sampler),
        connections: config.count("lictor_trace_connections", notes).is_some_and(|on| on > 0),
    }
}

fn field_count(listener: &Value) -> String {
    let count = field(listener, "custom_tags").and_then(Value::as_array).map_or(1, Vec::len);
    format!("spans go without {count} of them")
}

/// One object as text.
fn json(config: Opaque<'_>, key: &str, notes: &mut Notes) -> Option<Value> {
    let text = config.text(key, notes).filter(|text| !text.trim().is_empty())?;
    let value = serde_json::from_str(&text).ok().filter(Value::is_object);
    if value.is_none() {
        config.bad(key, "a JSON object", notes);
    }
    value
}

/// One object as text, or several with commas between them and no brackets around.
fn clusters(config: Opaque<'_>, notes: &mut Notes) -> Vec<Value> {
    let Some(text) = config.text(CLUSTERS, notes) else { return Vec::new() };
    let clusters = serde_json::from_str(&format!("[{text}]")).ok();
    if clusters.is_none() {
        config.bad(CLUSTERS, "JSON objects with commas between them", notes);
    }
    clusters.unwrap_or_default()
}

/// A field by its name in snake case, however it is written. `null` is as good as absent.
fn field<'a>(value: &'a Value, snake: &str) -> Option<&'a Value> {
    let mut words = snake.split('_');
    let mut camel = words.next().unwrap_or_default().to_owned();
    for word in words {
        let (first, rest) = word.split_at(word.len().min(1));
        camel.push_str(&first.to_ascii_uppercase());
        camel.push_str(rest);
    }
    value.get(snake).or_else(|| value.get(&camel)).filter(|value| !value.is_null())
}

fn text<'a>(value: &'a Value, snake: &str) -> Option<&'a str> {
    field(value, snake)?.as_str().filter(|text| !text.is_empty())
}

fn flag(value: &Value, snake: &str, default: bool) -> bool {
    match field(value, snake) {
        Some(Value::Bool(flag)) => *flag,
        // What wraps a bool that may be unset.
        Some(wrapped) => wrapped.get("value").and_then(Value::as_bool).unwrap_or(default),
        None => default,
    }
}

/// # Errors
/// Why it can't be one; what to do instead.
fn collector(tracer: &Value, clusters: &[Value]) -> Result<Collector, String> {
    let typed = field(tracer, "typed_config").ok_or("it has no typed_config")?;
    let kind = typed.get("@type").and_then(Value::as_str).and_then(|kind| kind.rsplit('.').next()).unwrap_or_default();
    match kind {
        "ZipkinConfig" => zipkin(typed, clusters),
        "OpenTelemetryConfig" => otlp(typed, clusters),
        "DatadogConfig" => Err("the protocol of Datadog is not supported; its agent takes OTLP: use an \
                                OpenTelemetryConfig, or OTEL_EXPORTER_OTLP_ENDPOINT of the environment"
            .into()),
        other => {
            Err(format!("a tracer of the type {other:?} is not supported; ZipkinConfig and OpenTelemetryConfig are"))
        }
    }
}

fn zipkin(typed: &Value, clusters: &[Value]) -> Result<Collector, String> {
    let cluster = text(typed, "collector_cluster").ok_or("it has no collector_cluster")?;
    let path = text(typed, "collector_endpoint").unwrap_or("/api/v2/spans");
    if text(typed, "collector_endpoint_version") == Some("HTTP_PROTO") {
        return Err("HTTP_PROTO is not supported; write HTTP_JSON as the collector_endpoint_version".into());
    }
    Ok(Collector::Zipkin(Zipkin {
        url: url(&address(cluster, clusters)?, path)?,
        host: Some(text(typed, "collector_hostname").unwrap_or(cluster).to_owned()),
        shared: flag(typed, "shared_span_context", true),
        long_ids: flag(typed, "trace_id_128bit", false),
        timeout: Collector::TIMEOUT,
    }))
}

fn otlp(typed: &Value, clusters: &[Value]) -> Result<Collector, String> {
    let service = text(typed, "service_name").map(str::to_owned);
    if let Some(http) = field(typed, "http_service") {
        let uri = field(http, "http_uri").ok_or("its http_service has no http_uri")?;
        let written = text(uri, "uri").ok_or("its http_uri has no uri")?;
        let parsed = reqwest::Url::parse(written).map_err(|_| format!("the uri {written:?} is no URL"))?;
        // The cluster says where, and the URI what; one without a cluster says both.
        let url = match text(uri, "cluster") {
            Some(cluster) if parsed.scheme() == "http" => url(&address(cluster, clusters)?, parsed.path())?,
            _ => parsed.to_string(),
        };
        let host = parsed.host_str().map(|host| match parsed.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        });
        let timeout = timeout(uri);
        return Ok(Collector::Otlp(Otlp { host, timeout, headers: headers(http), service, ..Otlp::new(url) }));
    }
    let grpc = field(typed, "grpc_service").ok_or("it has neither an http_service nor a grpc_service")?;
    let envoy = field(grpc, "envoy_grpc").ok_or("of grpc_service only envoy_grpc is supported")?;
    let cluster = text(envoy, "cluster_name").ok_or("its envoy_grpc has no cluster_name")?;
    let url = url(&address(cluster, clusters)?, "/opentelemetry.proto.collector.trace.v1.TraceService/Export")?;
    Ok(Collector::Otlp(Otlp { grpc: true, timeout: timeout(grpc), service, ..Otlp::new(url) }))
}

fn timeout(of: &Value) -> Duration {
    let time = text(of, "timeout").and_then(|text| text.parse::<GoDuration>().ok());
    let time = time.and_then(|time| u64::try_from(time.nanoseconds()).ok()).map(Duration::from_nanos);
    time.filter(|time| !time.is_zero()).unwrap_or(Collector::TIMEOUT)
}

fn headers(http: &Value) -> Headers {
    let list = field(http, "request_headers_to_add").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let pair = |option: &Value| {
        let header = field(option, "header")?;
        Some((text(header, "key")?.to_owned(), text(header, "value")?.to_owned()))
    };
    Headers(list.iter().filter_map(pair).collect())
}

/// `host:port` of a cluster's first endpoint.
fn address(name: &str, clusters: &[Value]) -> Result<String, String> {
    let cluster = clusters
        .iter()
        .find(|cluster| text(cluster, "name") == Some(name))
        .ok_or_else(|| format!("{CLUSTERS} has no cluster {name:?}, which would say where the collector is"))?;
    if field(cluster, "transport_socket").is_some() || field(cluster, "tls_context").is_some() {
        return Err(format!(
            "TLS of the cluster {name:?} is not supported; set OTEL_EXPORTER_OTLP_ENDPOINT=https://… in the environment"
        ));
    }
    let first = |value: &Value, list: &str| field(value, list)?.get(0).cloned();
    let endpoint = field(cluster, "load_assignment")
        .and_then(|assignment| first(assignment, "endpoints"))
        .and_then(|locality| first(&locality, "lb_endpoints"))
        .and_then(|lb| field(&lb, "endpoint").and_then(|endpoint| field(endpoint, "address")).cloned());
    // Hosts are how older Envoys had it.
    let endpoint = endpoint.or_else(|| first(cluster, "hosts"));
    let socket = endpoint.as_ref().and_then(|address| field(address, "socket_address"));
    let found = socket.and_then(|socket| Some((text(socket, "address")?, field(socket, "port_value")?.as_u64()?)));
    let (host, port) = found.ok_or_else(|| format!("the cluster {name:?} has no endpoint with a socket_address"))?;
    Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

fn url(address: &str, path: &str) -> Result<String, String> {
    let slash = if path.starts_with('/') { "" } else { "/" };
    let url = format!("http://{address}{slash}{path}");
    reqwest::Url::parse(&url).map_err(|_| format!("{url:?} is no URL"))?;
    Ok(url)
}

/// Of a `HttpConnectionManager.Tracing`, in which all is 100 % that is not said.
fn sampler(listener: &Value) -> Sampler {
    let part = |name| {
        let percent = field(listener, name).map_or(Some(100.0), |percent| {
            percent.get("value").unwrap_or(percent).as_f64().or(if percent.is_object() { Some(0.0) } else { None })
        });
        percent.unwrap_or(0.0).clamp(0.0, 100.0) / 100.0
    };
    let overall = part("overall_sampling");
    Sampler {
        respects_caller: true,
        ratio: part("random_sampling") * overall,
        requested_ratio: part("client_sampling") * overall,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CLUSTER: &str = r#"{"name": "zipkin", "type": "STRICT_DNS", "connect_timeout": "5s", "load_assignment": {"cluster_name": "zipkin",
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9411}}}}]}]}}"#;
    const CAMEL: &str = r#"{"name": "otlp", "loadAssignment": {"endpoints": [{"lbEndpoints": [{"endpoint": {"address":
        {"socketAddress": {"address": "::1", "portValue": 4317}}}}]}]}}"#;

    fn read(config: &Value) -> (Settings, Vec<String>) {
        let mut notes = Notes::default();
        let settings =
            settings(Opaque::new(config.as_object(), "proxy config"), "web", "web-sidecar-proxy", &mut notes);
        (settings, notes.take())
    }

    fn traced(typed: &Value, clusters: &str) -> (Option<Collector>, Vec<String>) {
        let tracing = json!({"http": {"name": "envoy.tracers.x", "typedConfig": typed}}).to_string();
        let (settings, notes) =
            read(&json!({"envoy_tracing_json": tracing, "envoy_extra_static_clusters_json": clusters}));
        (settings.collector, notes)
    }

    fn of_type(name: &str, mut fields: Value) -> Value {
        fields["@type"] = json!(format!("type.googleapis.com/envoy.config.trace.v3.{name}"));
        fields
    }

    #[test]
    fn zipkin_is_as_in_consuls_documentation() {
        let expected = Zipkin {
            url: "http://127.0.0.1:9411/api/v1/spans".into(),
            host: Some("zipkin".into()),
            shared: false,
            long_ids: true,
            timeout: Collector::TIMEOUT,
        };
        for fields in [
            json!({"collector_cluster": "zipkin", "collector_endpoint_version": "HTTP_JSON", "collector_endpoint": "/api/v1/spans",
                   "shared_span_context": false, "trace_id_128bit": true}),
            json!({"collectorCluster": "zipkin", "collectorEndpoint": "/api/v1/spans", "sharedSpanContext": {"value": false},
                   "traceId128bit": true}),
        ] {
            let both = format!("{CAMEL},{CLUSTER}");
            assert_eq!(
                traced(&of_type("ZipkinConfig", fields), &both),
                (Some(Collector::Zipkin(expected.clone())), vec![])
            );
        }
        let (collector, _) = traced(&of_type("ZipkinConfig", json!({"collector_cluster": "zipkin"})), CLUSTER);
        let Some(Collector::Zipkin(zipkin)) = collector else { panic!("{collector:?}") };
        assert_eq!((&*zipkin.url, zipkin.shared, zipkin.long_ids), ("http://127.0.0.1:9411/api/v2/spans", true, false));
    }

    #[test]
    fn opentelemetry_is_over_grpc_or_http() {
        let grpc = of_type(
            "OpenTelemetryConfig",
            json!({
            "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "0.250s"}, "service_name": "shop"}),
        );
        let (collector, notes) = traced(&grpc, CAMEL);
        let Some(Collector::Otlp(otlp)) = collector else { panic!("{notes:?}") };
        let url = "http://[::1]:4317/opentelemetry.proto.collector.trace.v1.TraceService/Export";
        assert_eq!((&*otlp.url, otlp.grpc, otlp.service.as_deref()), (url, true, Some("shop")));
        assert_eq!(otlp.timeout, Duration::from_millis(250));
        let http = of_type(
            "OpenTelemetryConfig",
            json!({
            "httpService": {"httpUri": {"uri": "http://collector:4318/v1/traces", "cluster": "zipkin", "timeout": "1s"},
                            "requestHeadersToAdd": [{"header": {"key": "x-key", "value": "secret"}}]}}),
        );
        let (collector, notes) = traced(&http, CLUSTER);
        let Some(Collector::Otlp(otlp)) = collector else { panic!("{notes:?}") };
        assert_eq!((&*otlp.url, otlp.host.as_deref()), ("http://127.0.0.1:9411/v1/traces", Some("collector:4318")));
        assert_eq!((otlp.grpc, otlp.headers), (false, Headers(vec![("x-key".into(), "secret".into())])));
        let alone = of_type(
            "OpenTelemetryConfig",
            json!({"http_service": {"http_uri": {"uri": "https://collector/v1/traces"}}}),
        );
        assert_eq!(traced(&alone, CLUSTER).0.unwrap().url(), "https://collector/v1/traces");
    }

    #[test]
    fn sampling_is_that_of_the_listener() {
        let read =
            |listener: Value| read(&json!({"envoy_listener_tracing_json": listener.to_string()})).0.sampler.unwrap();
        let kind = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing";
        assert_eq!(read(json!({"@type": kind, "random_sampling": {"value": 25}})), Sampler::of_roots(0.25));
        assert_eq!(read(json!({"@type": kind})), Sampler::of_roots(1.0));
        let all = json!({"randomSampling": {"value": 50.0}, "clientSampling": {}, "overallSampling": {"value": 50}});
        assert_eq!(read(all), Sampler { respects_caller: true, ratio: 0.25, requested_ratio: 0.0 });
        assert_eq!(
            self::read(&json!({})),
            (Settings { service: "web".into(), node: "web-sidecar-proxy".into(), ..Settings::default() }, vec![])
        );
        assert!(self::read(&json!({"lictor_trace_connections": true})).0.connections);
    }

    #[test]
    fn a_listener_may_name_its_own_tracer() {
        let provider = json!({"provider": {"name": "x", "typed_config": of_type("ZipkinConfig", json!({"collector_cluster": "zipkin"}))}});
        let config =
            json!({"envoy_listener_tracing_json": provider.to_string(), "envoy_extra_static_clusters_json": CLUSTER});
        assert!(read(&config).0.collector.is_some());
    }

    #[test]
    fn what_cannot_be_used_is_told_and_traces_nothing() {
        let zipkin = |fields| of_type("ZipkinConfig", fields);
        let named = || zipkin(json!({"collector_cluster": "zipkin"}));
        let secure = CLUSTER.replace("\"type\"", "\"transport_socket\": {}, \"type\"");
        let no_port = CLUSTER.replace("9411", "\"x\"");
        for (typed, clusters, warning) in [
            (of_type("DatadogConfig", json!({"collector_cluster": "zipkin"})), CLUSTER, "Datadog is not supported"),
            (of_type("SkyWalkingConfig", json!({})), CLUSTER, "\"SkyWalkingConfig\" is not supported"),
            (json!({}), CLUSTER, "is not supported"),
            (zipkin(json!({})), CLUSTER, "no collector_cluster"),
            (zipkin(json!({"collector_cluster": "other"})), CLUSTER, "no cluster \"other\""),
            (
                zipkin(json!({"collector_cluster": "zipkin", "collector_endpoint_version": "HTTP_PROTO"})),
                CLUSTER,
                "HTTP_PROTO",
            ),
            (named(), "", "no cluster \"zipkin\""),
            (named(), &secure, "TLS of the cluster"),
            (named(), &no_port, "no endpoint with a socket_address"),
            (of_type("OpenTelemetryConfig", json!({})), CLUSTER, "neither an http_service nor a grpc_service"),
            (of_type("OpenTelemetryConfig", json!({"grpc_service": {"google_grpc": {}}})), CLUSTER, "only envoy_grpc"),
            (of_type("OpenTelemetryConfig", json!({"http_service": {"http_uri": {"uri": "x"}}})), CLUSTER, "is no URL"),
        ] {
            let (collector, notes) = traced(&typed, clusters);
            assert_eq!((collector, notes.len()), (None, 1), "{typed}: {notes:?}");
            assert!(notes[0].contains(warning), "{warning}: {notes:?}");
        }
        for config in [
            json!({"envoy_tracing_json": "{"}),
            json!({"envoy_tracing_json": "[]"}),
            json!({"envoy_listener_tracing_json": {}}),
        ] {
            let (settings, notes) = read(&config);
            assert_eq!((settings.collector, notes.len()), (None, 1), "{config}");
        }
    }
}
