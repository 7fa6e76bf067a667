//! Logs in Consul's layout.
//!
//! One event is one line, written at once: either text,
//! `2026-11-21T02:29:41.000Z [INFO]  proxy: Starting listener: bind_addr=0.0.0.0:21000`, or with `-log-json` an
//! object with `@level`, `@message`, `@module`, `@timestamp` and the fields. Both follow Consul 1.8.7, but for the
//! time, which is always UTC, and for quotes inside of values, which Consul leaves as they are.
//!
//! Names, certificates and error texts of strangers end up in logs, so characters that could begin another line or move a
//! terminal's cursor is escaped, see [`escape`].

use std::borrow::Cow;
use std::error::Error;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::{FilterFn, filter_fn};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub level: Level,
    pub json: bool,
}

/// Makes standard output the log of this process. The handle changes its level.
///
/// # Errors
///
/// When the process has a log already.
pub fn init(settings: Settings) -> anyhow::Result<LevelHandle> {
    let (subscriber, handle) = subscriber(settings, std::io::stdout);
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(handle)
}

/// Reads and changes the level of the log while the process runs.
#[derive(Clone)]
pub struct LevelHandle {
    level: Arc<Mutex<Level>>,
    change: Arc<dyn Fn(Level) + Send + Sync>,
}

impl LevelHandle {
    #[must_use]
    pub fn get(&self) -> Level {
        *self.level.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, level: Level) {
        let mut now = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        (self.change)(level);
        *now = level;
    }
}

/// Returns `text` as one line: control characters, line separators and marks that change the direction of writing
/// are escaped as in a Rust string, everything else stays.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().fold(String::with_capacity(text.len() + 8), |mut line, c| {
        push_escaped(&mut line, c);
        line
    }))
}

/// Returns JSON that a terminal shows as it is: `serde_json` escapes the control characters of ASCII, and leaves DEL, C1
/// (U+009B begins a sequence as ESC [ does), line separators and marks that change the direction of writing.
#[must_use]
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let is_harmless = |c: char| c.is_ascii() && c != '\u{7f}' || c.escape_debug().len() == 1;
    if json.chars().all(is_harmless) {
        return Cow::Borrowed(json);
    }
    let mut line = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if is_harmless(c) {
            line.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // A string takes whatever is written to it.
                let _ = write!(line, "\\u{unit:04x}");
            }
        }
    }
    Cow::Owned(line)
}

fn subscriber<W>(settings: Settings, writer: W) -> (impl Subscriber + Send + Sync, LevelHandle)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layout = Layout { json: settings.json };
    let lines = tracing_subscriber::fmt::layer()
        .fmt_fields(layout)
        .event_format(layout)
        .with_writer(writer)
        .log_internal_errors(false);
    let (wanted, reload) = reload::Layer::new(filter(settings.level));
    let change = move |level| {
        // It fails only when there is no log any more.
        let _ = reload.modify(|wanted| *wanted = filter(level));
    };
    let handle = LevelHandle { level: Arc::new(Mutex::new(settings.level)), change: Arc::new(change) };
    (tracing_subscriber::registry().with(wanted).with(lines), handle)
}

/// The level is also the hint by which a disabled event costs one comparison.
fn filter(level: Level) -> FilterFn<impl Fn(&Metadata<'_>) -> bool> {
    filter_fn(move |event: &Metadata<'_>| is_wanted(event.module_path(), *event.level(), level))
        .with_max_level_hint(level)
}

/// Libraries speak of their own insides, which only matters when something is wrong.
fn is_wanted(module_path: Option<&str>, event: Level, level: Level) -> bool {
    let ours = module_path.is_some_and(|path| path == "lictor" || path.starts_with("lictor::"));
    event <= if ours { level } else { level.min(Level::WARN) }
}

/// How events and the fields of spans are written.
#[derive(Debug, Clone, Copy)]
struct Layout {
    json: bool,
}

impl<S, N> FormatEvent<S, N> for Layout
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut own = Fields::new(self.json);
        event.record(&mut own);
        let mut inherited = String::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                inherited.push_str(fields);
            }
        }
        let module = module(event.metadata().target());
        let level = *event.metadata().level();
        let time = now()?;
        if self.json {
            let (name, message) = (level_name(level), json_string(&own.message));
            // Of two fields with one name a reader of JSON keeps the last, which is to be the event's own.
            let fields = format_args!("{inherited}{}", own.fields);
            write!(to, r#"{{"@level":"{name}","@message":{message},"#)?;
            writeln!(to, r#""@module":{},"@timestamp":"{time}"{fields}}}"#, json_string(&module))
        } else {
            let message = escape(&own.message);
            let colon = if own.fields.is_empty() && inherited.is_empty() { "" } else { ":" };
            let (time, label) = (milliseconds(&time), level_label(level));
            writeln!(to, "{time} {label} {module}: {message}{colon}{}{inherited}", own.fields)
        }
    }
}

impl<'w> FormatFields<'w> for Layout {
    fn format_fields<R: RecordFields>(&self, mut to: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = Fields::new(self.json);
        fields.record(&mut visitor);
        to.write_str(&visitor.fields)
    }

    fn add_fields(&self, to: &'w mut FormattedFields<Self>, fields: &tracing::span::Record<'_>) -> fmt::Result {
        self.format_fields(to.as_writer(), fields)
    }
}

/// Collects the message, and the fields as ` name=value` or `,"name":value`.
struct Fields {
    json: bool,
    message: String,
    fields: String,
}

impl Fields {
    fn new(json: bool) -> Self {
        Self { json, message: String::new(), fields: String::new() }
    }

    fn name(&mut self, field: &Field) {
        let name = field.name().strip_prefix("r#").unwrap_or(field.name());
        // A string takes whatever is written to it.
        let _ =
            if self.json { write!(self.fields, ",{}:", json_string(name)) } else { write!(self.fields, " {name}=") };
    }

    fn plain(&mut self, field: &Field, value: impl fmt::Display) {
        self.name(field);
        let _ = write!(self.fields, "{value}");
    }

    fn text(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            return self.message.push_str(value);
        }
        self.name(field);
        if self.json {
            self.fields.push_str(&json_string(value));
        } else {
            push_value(&mut self.fields, value);
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if self.json && !value.is_finite() { self.text(field, &value.to_string()) } else { self.plain(field, value) }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.plain(field, value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.plain(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let mut chain = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            let _ = write!(chain, ": {error}");
            cause = error.source();
        }
        self.text(field, &chain);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, &format!("{value:?}"));
    }
}

/// The module as Consul names them: `proxy.inbound`.
fn module(target: &str) -> Cow<'_, str> {
    let target = target.strip_prefix("lictor::").unwrap_or(target);
    if target.contains("::") { Cow::Owned(target.replace("::", ".")) } else { Cow::Borrowed(target) }
}

fn level_label(level: Level) -> &'static str {
    match level {
        Level::TRACE => "[TRACE]",
        Level::DEBUG => "[DEBUG]",
        Level::INFO => "[INFO] ",
        Level::WARN => "[WARN] ",
        Level::ERROR => "[ERROR]",
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::TRACE => "trace",
        Level::DEBUG => "debug",
        Level::INFO => "info",
        Level::WARN => "warn",
        Level::ERROR => "error",
    }
}

/// The time with microseconds, such as `2026-11-21T02:29:41.000000Z`.
fn now() -> Result<String, fmt::Error> {
    let mut time = String::with_capacity(32);
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    Ok(time)
}

/// Cuts the microseconds of [`now`] down to the milliseconds that Consul's text has.
fn milliseconds(time: &str) -> String {
    let kept = "2026-11-21T02:29:41.000".len();
    format!("{}Z", time.get(..kept).unwrap_or(time))
}

fn json_string(text: &str) -> String {
    escape_json(&serde_json::Value::from(text).to_string()).into_owned()
}

/// A value that would not be read back as one word is put into quotes.
fn push_value(line: &mut String, value: &str) {
    if !value.is_empty() && value.bytes().all(|byte| matches!(byte, b'!'..=b'~') && byte != b'"') {
        return line.push_str(value);
    }
    line.push('"');
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            line.push('\\');
            line.push(c);
        } else {
            push_escaped(line, c);
        }
    }
    line.push('"');
}

fn push_escaped(line: &mut String, c: char) {
    if matches!(c, '"' | '\'' | '\\') { line.push(c) } else { line.extend(c.escape_debug()) }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing::{debug, error, info, info_span, trace, warn};

    use super::*;

    /// Keeps each write apart.
    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<String>>>);

    impl io::Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(String::from_utf8(bytes.to_vec()).unwrap());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: Level, json: bool, events: impl FnOnce()) -> Vec<String> {
        let writes = Writes::default();
        let target = writes.clone();
        let (subscriber, _) = subscriber(Settings { level, json }, move || target.clone());
        tracing::subscriber::with_default(subscriber, events);
        writes.0.lock().unwrap().clone()
    }

    /// The lines without their times, whose form is checked.
    fn text(level: Level, events: impl FnOnce()) -> Vec<String> {
        let cut = |line: &String| {
            let (time, rest) = line.split_once(' ').unwrap();
            let form: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
            assert_eq!(form, "0000-00-00T00:00:00.000Z");
            rest.to_owned()
        };
        logged(level, false, events).iter().map(cut).collect()
    }

    #[test]
    fn text_has_consuls_layout() {
        let lines = text(Level::TRACE, || {
            info!(target: "proxy", "Proxy loaded config and ready to serve");
            warn!(target: "proxy.inbound", port = 1, open = true, ratio = 0.5, service = "web", "Waiting");
            error!(target: "lictor::control::draft", what = "two words", empty = "", "Failed");
            debug!(target: "proxy", r#type = ?Some(1), path = %"/a=b", "Seen");
            trace!(target: "proxy", only = 1);
        });
        let expected = [
            "[INFO]  proxy: Proxy loaded config and ready to serve\n",
            "[WARN]  proxy.inbound: Waiting: port=1 open=true ratio=0.5 service=web\n",
            "[ERROR] control.draft: Failed: what=\"two words\" empty=\"\"\n",
            "[DEBUG] proxy: Seen: type=Some(1) path=/a=b\n",
            "[TRACE] proxy: : only=1\n",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn fields_of_spans_come_last_in_text() {
        let lines = text(Level::INFO, || {
            let outer = info_span!("connection", id = 7, peer = tracing::field::Empty);
            let _entered = outer.enter();
            outer.record("peer", "spiffe://x/svc/web");
            let _inner = info_span!("request", method = "GET").entered();
            info!(target: "proxy", status = 200, "Done");
        });
        assert_eq!(lines, ["[INFO]  proxy: Done: status=200 id=7 peer=spiffe://x/svc/web method=GET\n"]);
    }

    #[test]
    fn json_is_harmless_on_a_terminal_and_reads_as_before() {
        let hostile = "a\u{7f}\u{9b}2J\u{2028}\u{202e}\u{e0001}\u{1b}[2J é\"";
        let json = serde_json::json!({ "name": hostile });
        let shown = escape_json(&json.to_string()).into_owned();
        assert_eq!(shown, r#"{"name":"a\u007f\u009b2J\u2028\u202e\udb40\udc01\u001b[2J é\""}"#);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), json);
        let lines = logged(Level::INFO, true, || info!(target: "proxy", name = hostile, "From {hostile}"));
        assert!(!lines[0].contains(['\u{7f}', '\u{9b}', '\u{2028}', '\u{202e}']), "{lines:?}");
        assert!(matches!(escape_json("{\n  \"é\": 1\n}"), Cow::Borrowed(_)));
    }

    #[test]
    fn json_is_one_object_in_a_line() {
        let lines = logged(Level::INFO, true, || {
            let _span = info_span!("connection", id = 7, side = "span").entered();
            let cause = io::Error::other("a\n\"b\"");
            let failure: &(dyn Error + 'static) = &cause;
            info!(target: "proxy.inbound", error = failure, side = "event", bytes = 3_u64, nan = f64::NAN, "Two\nlines");
        });
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!(line.matches('\n').count(), 1);
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        let time = value.as_object_mut().unwrap().remove("@timestamp").unwrap();
        assert_eq!(time.as_str().unwrap().len(), "2026-11-21T02:29:41.000000Z".len());
        let expected = serde_json::json!({
            "@level": "info", "@message": "Two\nlines", "@module": "proxy.inbound",
            "error": "a\n\"b\"", "side": "event", "bytes": 3, "nan": "NaN", "id": 7,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn strangers_cannot_write_lines() {
        let hostile = "x\n2026 [INFO]  proxy: forged\r\u{1b}[2J\u{2028}\u{202e}\0 \"é\\";
        let lines = text(Level::INFO, || {
            info!(target: "proxy", name = hostile, "From {hostile}");
            info!(target: "proxy", name = %hostile, "");
        });
        let escaped = r"x\n2026 [INFO]  proxy: forged\r\u{1b}[2J\u{2028}\u{202e}\0 ";
        assert_eq!(lines[0], format!("[INFO]  proxy: From {escaped}\"é\\: name=\"{escaped}\\\"é\\\\\"\n"));
        assert_eq!(lines[1], format!("[INFO]  proxy: : name=\"{escaped}\\\"é\\\\\"\n"));
        assert!(matches!(escape("plain 'text'"), Cow::Borrowed(_)));
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        #[derive(Debug)]
        struct Outer(io::Error);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("cannot dial")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        let lines = text(Level::INFO, || {
            let outer = Outer(io::Error::other("refused"));
            info!(target: "proxy", error = &outer as &(dyn Error + 'static), "Failed");
        });
        assert_eq!(lines, ["[INFO]  proxy: Failed: error=\"cannot dial: refused\"\n"]);
    }

    #[test]
    fn levels_and_libraries_are_filtered() {
        let seen = Arc::new(Mutex::new(0));
        let lines = text(Level::INFO, || {
            debug!(target: "proxy", value = ?{ *seen.lock().unwrap() += 1 }, "not for now");
            info!("kept");
        });
        assert_eq!(lines, ["[INFO]  telemetry.tests: kept\n"]);
        assert_eq!(*seen.lock().unwrap(), 0, "a disabled event evaluates nothing");
    }

    #[test]
    fn libraries_are_heard_from_warnings_up() {
        let cases = [
            (Some("lictor::proxy"), Level::DEBUG, Level::DEBUG, true),
            (Some("lictor"), Level::INFO, Level::INFO, true),
            (Some("lictor::proxy"), Level::DEBUG, Level::INFO, false),
            (Some("hyper::client"), Level::DEBUG, Level::TRACE, false),
            (Some("lictoria"), Level::INFO, Level::TRACE, false),
            (None, Level::INFO, Level::TRACE, false),
            (Some("rustls::conn"), Level::WARN, Level::DEBUG, true),
            (Some("rustls::conn"), Level::WARN, Level::ERROR, false),
        ];
        for (path, event, level, wanted) in cases {
            assert_eq!(is_wanted(path, event, level), wanted, "{path:?} {event} at {level}");
        }
    }
}
