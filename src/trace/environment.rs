//! The variables of OpenTelemetry's specification (`OTEL_…`). They go before the registration.

use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::sampler::Sampler;
use super::settings::{Collector, Headers, Otlp, Settings, Zipkin};

/// Settings of traces from `OTEL_…` variables.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Environment {
    /// Nothing is traced, whatever the registration says: `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER=none`.
    pub is_off: bool,
    pub(super) collector: Option<Collector>,
    pub(super) sampler: Option<Sampler>,
    pub(super) service: Option<String>,
    /// `OTEL_RESOURCE_ATTRIBUTES`.
    pub(super) attributes: Vec<(String, String)>,
    pub(super) batches: Batches,
}

/// `OTEL_BSP_…`: spans wait and are sent together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Batches {
    /// Time between two of them; default 5 s.
    pub delay: Duration,
    /// For one, all tries included; default 30 s.
    pub timeout: Duration,
    /// Spans that wait; default 2,048. More are dropped.
    pub queue: usize,
    /// Spans in one; default 512.
    pub size: usize,
}

impl Default for Batches {
    fn default() -> Self {
        Self { delay: Duration::from_secs(5), timeout: Duration::from_secs(30), queue: 2_048, size: 512 }
    }
}

impl Environment {
    /// Reads the variables. One that makes no sense is as good as not set, as the specification wants it, and
    /// `warnings` gets a sentence.
    pub fn read(variable: &dyn Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> Self {
        let mut reader = Reader { variable, warnings };
        let exporter = reader.text("OTEL_TRACES_EXPORTER").unwrap_or_default();
        let is_off = reader.is_true("OTEL_SDK_DISABLED") || exporter == "none";
        let collector = match exporter.as_str() {
            "" if reader.endpoint().is_none() => None,
            "none" => None,
            "" | "otlp" => reader.otlp(),
            "zipkin" => reader.zipkin(),
            other => {
                let other = other.to_owned();
                reader.bad("OTEL_TRACES_EXPORTER", &other, "otlp, zipkin or none");
                None
            }
        };
        let mut attributes = reader.pairs("OTEL_RESOURCE_ATTRIBUTES");
        let named = attributes.iter().find(|(name, _)| name == "service.name").map(|(_, value)| value.clone());
        attributes.retain(|(name, _)| name != "service.name");
        Self {
            is_off,
            collector,
            sampler: reader.sampler(),
            service: reader.text("OTEL_SERVICE_NAME").or(named),
            attributes,
            batches: reader.batches(),
        }
    }

    /// The collector of spans.
    pub(super) fn collector(&self, settings: &Settings) -> Option<Collector> {
        let given = || self.collector.clone().or_else(|| settings.collector.clone());
        if self.is_off { None } else { given() }
    }

    /// By default a collector of the environment gets all that begins here, as OpenTelemetry has it, and one of the
    /// registration nothing, as Consul has it.
    pub(super) fn sampler(&self, settings: &Settings) -> Sampler {
        let default = Sampler::of_roots(if self.collector.is_some() { 1.0 } else { 0.0 });
        self.sampler.or(settings.sampler).unwrap_or(default)
    }
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    warnings: &'a mut Vec<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.variable)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// Of traces, or else of all signals: `OTEL_EXPORTER_OTLP_TRACES_TIMEOUT`, `OTEL_EXPORTER_OTLP_TIMEOUT`.
    fn otlp_name(&self, what: &str) -> Option<String> {
        let names = [format!("OTEL_EXPORTER_OTLP_TRACES_{what}"), format!("OTEL_EXPORTER_OTLP_{what}")];
        names.into_iter().find(|name| self.text(name).is_some())
    }

    fn endpoint(&self) -> Option<String> {
        self.otlp_name("ENDPOINT")
    }

    fn otlp(&mut self) -> Option<Collector> {
        let grpc = self.protocol();
        let default = if grpc { "http://localhost:4317" } else { "http://localhost:4318" };
        let (url, given_by) = match self.endpoint() {
            Some(name) => (self.text(&name).unwrap_or_default(), name),
            None => (default.to_owned(), String::new()),
        };
        let url = match (grpc, given_by.as_str()) {
            // That of traces alone is used as it is.
            (false, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") => url,
            (false, _) => format!("{}/v1/traces", url.trim_end_matches('/')),
            (true, _) if url.contains("://") => grpc_url(&url),
            (true, _) => grpc_url(&format!("https://{url}")),
        };
        if !is_url(&url) {
            self.bad(&given_by, &url, "a URL such as \"http://127.0.0.1:4318\"");
            return None;
        }
        for what in ["COMPRESSION", "CLIENT_KEY", "CLIENT_CERTIFICATE"] {
            if let Some(name) = self.otlp_name(what).filter(|name| self.text(name).as_deref() != Some("none")) {
                self.warnings.push(format!("the variable {name} has no meaning for lictor and is ignored"));
            }
        }
        let headers = self.otlp_name("HEADERS").map(|name| self.pairs(&name)).unwrap_or_default();
        let timeout = self.otlp_name("TIMEOUT").and_then(|name| self.milliseconds(&name));
        let certificate = self.otlp_name("CERTIFICATE").and_then(|name| self.text(&name)).map(PathBuf::from);
        let timeout = timeout.unwrap_or(Collector::TIMEOUT);
        Some(Collector::Otlp(Otlp { grpc, headers: Headers(headers), timeout, certificate, ..Otlp::new(url) }))
    }

    /// Whether it is gRPC.
    fn protocol(&mut self) -> bool {
        let Some(name) = self.otlp_name("PROTOCOL") else { return false };
        match self.text(&name).unwrap_or_default().as_str() {
            "grpc" => true,
            "http/protobuf" => false,
            other => {
                let other = other.to_owned();
                self.bad(&name, &other, "http/protobuf or grpc");
                false
            }
        }
    }

    fn zipkin(&mut self) -> Option<Collector> {
        let name = "OTEL_EXPORTER_ZIPKIN_ENDPOINT";
        let url = self.text(name).unwrap_or_else(|| "http://localhost:9411/api/v2/spans".to_owned());
        if !is_url(&url) {
            self.bad(name, &url, "a URL such as \"http://127.0.0.1:9411/api/v2/spans\"");
            return None;
        }
        let timeout = self.milliseconds("OTEL_EXPORTER_ZIPKIN_TIMEOUT").unwrap_or(Collector::TIMEOUT);
        Some(Collector::Zipkin(Zipkin { url, host: None, shared: false, long_ids: true, timeout }))
    }

    fn sampler(&mut self) -> Option<Sampler> {
        const NAME: &str = "OTEL_TRACES_SAMPLER";
        let name = self.text(NAME)?;
        let (respects_caller, kind) = match name.strip_prefix("parentbased_") {
            Some(kind) => (true, kind),
            None => (false, name.as_str()),
        };
        let ratio = match kind {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => self.ratio(),
            _ => {
                self.bad(NAME, &name, "always_on, always_off or traceidratio, or parentbased_ and one of these");
                return None;
            }
        };
        let requested_ratio = if name == "always_off" { 0.0 } else { 1.0 };
        Some(Sampler { respects_caller, ratio, requested_ratio })
    }

    fn ratio(&mut self) -> f64 {
        const NAME: &str = "OTEL_TRACES_SAMPLER_ARG";
        let Some(text) = self.text(NAME) else { return 1.0 };
        let ratio = text.parse::<f64>().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
        if ratio.is_none() {
            self.bad(NAME, &text, "a number from 0 to 1");
        }
        ratio.unwrap_or(1.0)
    }

    fn batches(&mut self) -> Batches {
        let default = Batches::default();
        let queue = self.count("OTEL_BSP_MAX_QUEUE_SIZE").unwrap_or(default.queue);
        Batches {
            delay: self.milliseconds("OTEL_BSP_SCHEDULE_DELAY").unwrap_or(default.delay).max(SHORTEST_DELAY),
            timeout: self.milliseconds("OTEL_BSP_EXPORT_TIMEOUT").unwrap_or(default.timeout),
            queue,
            size: self.count("OTEL_BSP_MAX_EXPORT_BATCH_SIZE").unwrap_or(default.size).min(queue),
        }
    }

    fn milliseconds(&mut self, name: &str) -> Option<Duration> {
        let text = self.text(name)?;
        let time = text.parse().ok().filter(|ms| (1..=MOST_MILLISECONDS).contains(ms)).map(Duration::from_millis);
        if time.is_none() {
            self.bad(name, &text, "a number of milliseconds");
        }
        time
    }

    fn count(&mut self, name: &str) -> Option<usize> {
        let text = self.text(name)?;
        let count = text.parse().ok().filter(|count| (1..=MOST_SPANS).contains(count));
        if count.is_none() {
            self.bad(name, &text, "a number from 1 to 100000");
        }
        count
    }

    fn is_true(&self, name: &str) -> bool {
        self.text(name).is_some_and(|text| text.eq_ignore_ascii_case("true"))
    }

    /// `name=value` with commas between, values percent-encoded. What it says may be secret.
    fn pairs(&mut self, name: &str) -> Vec<(String, String)> {
        let Some(text) = self.text(name) else { return Vec::new() };
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=')?;
            let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
            (!name.trim().is_empty()).then(|| (name.trim().to_owned(), value.into_owned()))
        };
        let pairs: Option<Vec<_>> = text.split(',').filter(|pair| !pair.trim().is_empty()).map(pair).collect();
        if pairs.is_none() {
            self.warnings.push(format!("the variable {name} is ignored: it is no list such as \"a=b,c=d\""));
        }
        pairs.unwrap_or_default()
    }

    fn bad(&mut self, name: &str, value: &str, wanted: &str) {
        self.warnings.push(format!("the variable {name} is ignored: {value:?} is not {wanted}"));
    }
}

/// The one call that OTLP has for spans.
pub(super) fn grpc_url(base: &str) -> String {
    const PATH: &str = "opentelemetry.proto.collector.trace.v1.TraceService/Export";
    format!("{}/{PATH}", base.trim_end_matches('/'))
}

fn is_url(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

/// Shortest delay between two batches.
const SHORTEST_DELAY: Duration = Duration::from_millis(10);
/// Longest time that a variable may set, in milliseconds: a day.
const MOST_MILLISECONDS: u64 = 24 * 60 * 60 * 1000;
/// Longest queue, and largest batch, that a variable may set, in spans.
const MOST_SPANS: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> (Environment, Vec<String>) {
        let mut warnings = Vec::new();
        let find = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        (Environment::read(&find, &mut warnings), warnings)
    }

    fn url(variables: &[(&str, &str)]) -> Option<String> {
        let (environment, warnings) = read(variables);
        assert_eq!(warnings, Vec::<String>::new());
        environment.collector(&Settings::default()).map(|collector| collector.url().to_owned())
    }

    #[test]
    fn nothing_is_sent_unless_it_is_said_where() {
        assert_eq!(read(&[]), (Environment::default(), Vec::new()));
        assert_eq!(url(&[("OTEL_SERVICE_NAME", "x")]), None);
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t:1/x");
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:2/");
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        assert_eq!(url(&[all]).as_deref(), Some("http://a:2/v1/traces"));
        assert_eq!(url(&[all, traces]).as_deref(), Some("https://t:1/x"));
        assert_eq!(url(&[("OTEL_TRACES_EXPORTER", "otlp")]).as_deref(), Some("http://localhost:4318/v1/traces"));
        let export = "opentelemetry.proto.collector.trace.v1.TraceService/Export";
        assert_eq!(url(&[all, grpc]), Some(format!("http://a:2/{export}")));
        assert_eq!(url(&[("OTEL_TRACES_EXPORTER", "otlp"), grpc]), Some(format!("http://localhost:4317/{export}")));
        assert_eq!(url(&[("OTEL_TRACES_EXPORTER", "zipkin")]).as_deref(), Some("http://localhost:9411/api/v2/spans"));
        assert_eq!(url(&[all, ("OTEL_TRACES_EXPORTER", "none")]), None);
        assert_eq!(url(&[all, ("OTEL_SDK_DISABLED", "TRUE")]), None);
    }

    #[test]
    fn the_environment_goes_before_the_registration() {
        let registered = Settings {
            collector: Some(Collector::Otlp(Otlp::new("http://registered/".into()))),
            sampler: Some(Sampler::of_roots(0.5)),
            ..Settings::default()
        };
        let (nothing, _) = read(&[]);
        assert_eq!(nothing.collector(&registered), registered.collector);
        assert_eq!(nothing.sampler(&registered), Sampler::of_roots(0.5));
        assert_eq!(nothing.sampler(&Settings::default()), Sampler::of_roots(0.0));
        let (given, _) = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x, a = b"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=named,env=lab"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
        ]);
        let Some(Collector::Otlp(otlp)) = given.collector(&registered) else { panic!("{given:?}") };
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(otlp.headers.0, [pair("authorization", "Bearer x"), pair("a", "b")]);
        assert!(!format!("{otlp:?}").contains("Bearer"), "headers may be secrets");
        assert_eq!((&*otlp.url, otlp.timeout), ("http://a/v1/traces", Duration::from_millis(2500)));
        assert_eq!((given.service.as_deref(), given.attributes), (Some("named"), vec![pair("env", "lab")]));
        assert_eq!((given.batches.queue, given.batches.size), (8, 8));
        let (given, _) = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a")]);
        assert_eq!(given.sampler(&Settings::default()), Sampler::of_roots(1.0));
    }

    #[test]
    fn samplers_have_the_names_of_the_specification() {
        for (name, ratio, respects_caller, expected, requested_ratio) in [
            ("always_on", None, false, 1.0, 1.0),
            ("always_off", None, false, 0.0, 0.0),
            ("parentbased_always_off", None, true, 0.0, 1.0),
            ("traceidratio", Some("0.25"), false, 0.25, 1.0),
            ("parentbased_traceidratio", None, true, 1.0, 1.0),
        ] {
            let mut variables = vec![("OTEL_TRACES_SAMPLER", name)];
            variables.extend(ratio.map(|ratio| ("OTEL_TRACES_SAMPLER_ARG", ratio)));
            let expected = Sampler { respects_caller, ratio: expected, requested_ratio };
            assert_eq!(read(&variables).0.sampler(&Settings::default()), expected, "{name}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_told_and_ignored() {
        let otlp = ("OTEL_TRACES_EXPORTER", "otlp");
        for variables in [
            vec![("OTEL_TRACES_EXPORTER", "console")],
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "collector")],
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector")],
            vec![otlp, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
            vec![otlp, ("OTEL_EXPORTER_OTLP_HEADERS", "secret")],
            vec![otlp, ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1")],
            vec![otlp, ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")],
            vec![("OTEL_TRACES_SAMPLER", "some")],
            vec![("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "2")],
            vec![("OTEL_BSP_MAX_QUEUE_SIZE", "0")],
            vec![("OTEL_BSP_SCHEDULE_DELAY", "soon")],
        ] {
            let (_, warnings) = read(&variables);
            assert_eq!(warnings.len(), 1, "{variables:?}: {warnings:?}");
            assert!(warnings[0].contains("OTEL_") && !warnings[0].contains("secret"), "{warnings:?}");
        }
    }
}
