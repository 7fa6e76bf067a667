//! Formats: text or JSON with operators in it, read once and written for each record.

use std::borrow::Cow;

use serde_json::{Map, Value as Json};

use super::secrets::Secrets;
use crate::operators::{BadTemplate, HeaderNames, Piece, Record, Template, Value};
use crate::telemetry;

/// How a record becomes a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    shape: Shape,
    unknown: Vec<String>,
    names: HeaderNames,
    is_default: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    Text(Template),
    Json(Node),
}

/// A value of a JSON format.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Object(Vec<(String, Node)>),
    List(Vec<Node>),
    Text(Template),
    /// Neither text nor of several parts: written as it is.
    Fixed(Json),
}

/// The text is no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadFormat(&'static str);

/// Stands for an unknown value in a text format, as in Envoy.
const NOTHING: &str = "-";

/// Keys and operators of the format that Consul gives to Envoy where none is configured (1.15 and later).
const DEFAULT: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];

impl Default for Format {
    fn default() -> Self {
        let node = |(key, text): (&str, &str)| (key.to_owned(), Node::Text(Template::read(text).unwrap_or_default()));
        let format = Self::new(Shape::Json(Node::Object(DEFAULT.map(node).into())), Vec::new());
        Self { is_default: true, ..format }
    }
}

impl Format {
    fn new(shape: Shape, unknown: Vec<String>) -> Self {
        let mut names = HeaderNames::default();
        match &shape {
            Shape::Text(template) => name_headers(template, &mut names),
            Shape::Json(node) => node.name_headers(&mut names),
        }
        Self { shape, unknown, names, is_default: false }
    }

    /// The headers and trailers that lines may show; no others are looked at.
    #[must_use]
    pub fn header_names(&self) -> &HeaderNames {
        &self.names
    }

    /// Reads a text format. A line's end is added where there is none.
    ///
    /// # Errors
    /// When percent signs don't pair up.
    pub fn text(text: &str) -> Result<Self, BadFormat> {
        let template = Template::read(text.strip_suffix('\n').unwrap_or(text))?;
        let unknown = template.unknown().map(str::to_owned).collect();
        Ok(Self::new(Shape::Text(template), unknown))
    }

    /// Reads a JSON format: an object whose texts have operators in them.
    ///
    /// # Errors
    /// When it is not a JSON object, or percent signs don't pair up.
    pub fn json(json: &str) -> Result<Self, BadFormat> {
        let object: Map<String, Json> = serde_json::from_str(json).map_err(|_| BadFormat("it is not a JSON object"))?;
        let mut unknown = Vec::new();
        let node = Node::read(Json::Object(object), &mut unknown)?;
        Ok(Self::new(Shape::Json(node), unknown))
    }

    /// Operators that are not supported, and so count as not known.
    #[must_use]
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// The line for a record, with its end and no other: whatever a stranger sent is escaped, and tokens are left out.
    #[must_use]
    pub fn line(&self, record: &Record<'_>, secrets: Secrets<'_>) -> String {
        let mut line = match &self.shape {
            Shape::Text(template) => text(template, record, secrets, telemetry::escape),
            Shape::Json(node) => {
                let mut line = node.value(record, secrets);
                // The default format has no operator for it, and nobody is to miss it.
                if let (Some(rule), true, Json::Object(members)) =
                    (record.would_be_denied_by, self.is_default, &mut line)
                {
                    members.insert("would_be_denied_by".to_owned(), rule.into());
                }
                line.to_string()
            }
        };
        line.push('\n');
        line
    }
}

impl Node {
    fn read(json: Json, unknown: &mut Vec<String>) -> Result<Self, BadFormat> {
        Ok(match json {
            Json::String(text) => {
                let template = Template::read(&text)?;
                unknown.extend(template.unknown().map(str::to_owned));
                Self::Text(template)
            }
            Json::Array(items) => {
                Self::List(items.into_iter().map(|item| Self::read(item, unknown)).collect::<Result<_, _>>()?)
            }
            Json::Object(members) => {
                let member = |(key, value)| Self::read(value, unknown).map(|node| (key, node));
                Self::Object(members.into_iter().map(member).collect::<Result<_, _>>()?)
            }
            fixed => Self::Fixed(fixed),
        })
    }

    fn name_headers(&self, names: &mut HeaderNames) {
        match self {
            Self::Object(members) => members.iter().for_each(|(_, node)| node.name_headers(names)),
            Self::List(items) => items.iter().for_each(|node| node.name_headers(names)),
            Self::Text(template) => name_headers(template, names),
            Self::Fixed(_) => {}
        }
    }

    fn value(&self, record: &Record<'_>, secrets: Secrets<'_>) -> Json {
        match self {
            Self::Object(members) => {
                let member = |(key, node): &(String, Node)| (key.clone(), node.value(record, secrets));
                members.iter().map(member).collect::<Map<_, _>>().into()
            }
            Self::List(items) => items.iter().map(|node| node.value(record, secrets)).collect(),
            Self::Text(template) => json(template, record, secrets),
            Self::Fixed(json) => json.clone(),
        }
    }
}

fn name_headers(template: &Template, names: &mut HeaderNames) {
    for piece in template.pieces() {
        if let Piece::Operator(operator) = piece {
            operator.name_headers(names);
        }
    }
}

/// A template as text. What is not literal is escaped, and shows no secrets.
fn text(template: &Template, record: &Record<'_>, secrets: Secrets<'_>, escape: fn(&str) -> Cow<'_, str>) -> String {
    let mut text = String::with_capacity(256);
    for piece in template.pieces() {
        match value(piece, record, secrets) {
            Some(Value::Text(value)) if matches!(piece, Piece::Literal(_)) => text.push_str(&value),
            Some(Value::Text(value)) => text.push_str(&escape(&value)),
            Some(Value::Number(number)) => text.push_str(&number.to_string()),
            None => text.push_str(NOTHING),
        }
    }
    text
}

/// A template as a JSON value. A single operator keeps its type.
fn json(template: &Template, record: &Record<'_>, secrets: Secrets<'_>) -> Json {
    match template.pieces() {
        [piece] => match value(piece, record, secrets) {
            Some(Value::Text(text)) => text.into_owned().into(),
            Some(Value::Number(number)) => number.into(),
            None => Json::Null,
        },
        _ => text(template, record, secrets, |text| Cow::Borrowed(text)).into(),
    }
}

/// The value of a piece of a format, without secrets.
fn value<'a>(piece: &'a Piece, record: &Record<'a>, secrets: Secrets<'_>) -> Option<Value<'a>> {
    let (operator, text) = match (piece, piece.value(record)?) {
        (Piece::Operator(operator), Value::Text(text)) => (operator, text),
        (_, value) => return Some(value),
    };
    let shown = match operator.header(record) {
        Some(name) => secrets.hide_header(name, &text),
        None => secrets.hide(&text),
    };
    let hidden = (shown != text).then(|| shown.into_owned());
    Some(Value::Text(hidden.map_or(text, Cow::Owned)))
}

impl From<BadTemplate> for BadFormat {
    fn from(bad: BadTemplate) -> Self {
        Self(bad.reason())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use http::HeaderMap;
    use serde_json::json;

    use super::*;
    use crate::access_log::{Request, Response, Upstream};
    use crate::tls::SpiffeId;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    /// Everything that can be known of a request.
    fn with_record(act: impl FnOnce(&Record<'_>)) {
        let request = headers(&[("user-agent", "curl"), ("x-request-id", "abc"), ("x-long", "0123456789")]);
        let response = headers(&[("x-envoy-upstream-service-time", "7"), ("server", "app")]);
        let trailers = headers(&[("grpc-status", "5"), ("x-end", "yes")]);
        let peer = SpiffeId::parse("spiffe://td.consul/ns/default/dc/dc1/svc/web").unwrap();
        act(&Record {
            duration: Duration::from_millis(12),
            request_duration: Some(Duration::from_millis(2)),
            response_duration: Some(Duration::from_millis(9)),
            request: Some(Request {
                protocol: "HTTP/1.1",
                method: "GET",
                path: "/a?b=c",
                authority: "db.local",
                headers: &request,
            }),
            response: Some(Response {
                code: 200,
                details: Some("via_upstream".into()),
                headers: &response,
                trailers: Some(&trailers),
            }),
            bytes_received: 3,
            bytes_sent: 4,
            upstream: Some(Upstream {
                cluster: "local_app".into(),
                route: Some("main".into()),
                host: Some("127.0.0.1:8080".into()),
                local: Some("127.0.0.1:5000".parse().unwrap()),
                transport_failure: None,
                attempts: 1,
            }),
            downstream_local: Some("10.0.0.1:21000".parse().unwrap()),
            downstream_remote: Some("[::1]:40000".parse().unwrap()),
            requested_server_name: Some("db.internal".into()),
            peer: Some(&peer),
            ..Record::new(UNIX_EPOCH + Duration::from_millis(1500))
        });
    }

    /// Texts as formats, and what they become with everything known, and with nothing.
    #[test]
    fn operators_stand_for_what_envoy_has_them_stand_for() {
        const CASES: [(&str, &str, &str); 40] = [
            ("plain 100%%", "plain 100%", "plain 100%"),
            ("%START_TIME%", "1970-01-01T00:00:01.500Z", "1970-01-01T00:00:00.000Z"),
            ("%START_TIME(%s.%3f)% x", "1.500 x", "0.000 x"),
            ("%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "GET /a?b=c", "- -"),
            ("%REQ_WITHOUT_QUERY(:PATH)%", "/a", "-"),
            ("%REQ(HOST)% %REQ(:authority)%", "db.local db.local", "- -"),
            ("%REQ(X-NONE?USER-AGENT)%", "curl", "-"),
            ("%REQ(X-LONG):4%|%REQ(x-long):40%", "0123|0123456789", "-|-"),
            ("%REQ(X-NONE)%", "-", "-"),
            ("%RESP(SERVER)% %RESP(:STATUS)%", "app 200", "- -"),
            ("%TRAILER(X-END)%", "yes", "-"),
            ("%GRPC_STATUS% %GRPC_STATUS(CAMEL_STRING)% %GRPC_STATUS_NUMBER%", "NotFound NotFound 5", "- - -"),
            ("%PROTOCOL%", "HTTP/1.1", "-"),
            ("%RESPONSE_CODE%", "200", "0"),
            ("%RESPONSE_CODE_DETAILS%", "via_upstream", "-"),
            ("%RESPONSE_FLAGS%", "-", "-"),
            ("%CONNECTION_TERMINATION_DETAILS%", "-", "-"),
            ("%BYTES_RECEIVED%/%BYTES_SENT%", "3/4", "0/0"),
            ("%DURATION% %REQUEST_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%", "12 2 9 3", "0 - - -"),
            ("%ROUTE_NAME%", "main", "-"),
            ("%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS%", "127.0.0.1:8080 127.0.0.1:8080", "- -"),
            ("%UPSTREAM_CLUSTER%", "local_app", "-"),
            ("%UPSTREAM_LOCAL_ADDRESS%", "127.0.0.1:5000", "-"),
            ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "-", "-"),
            ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "1", "0"),
            ("%DOWNSTREAM_LOCAL_ADDRESS%", "10.0.0.1:21000", "-"),
            ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%", "10.0.0.1 21000", "- -"),
            ("%DOWNSTREAM_REMOTE_ADDRESS%", "[::1]:40000", "-"),
            ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%", "::1 40000", "- -"),
            ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%", "[::1]:40000", "-"),
            ("%REQUESTED_SERVER_NAME%", "db.internal", "-"),
            ("%REQUESTED_SERVER_NAME:2%", "db", "-"),
            ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://td.consul/ns/default/dc/dc1/svc/web", "-"),
            ("%DYNAMIC_METADATA(consul:service)% %DYNAMIC_METADATA(consul:datacenter)%", "web dc1", "- -"),
            ("%DYNAMIC_METADATA(consul:trust-domain)%", "td.consul", "-"),
            ("%HOSTNAME% %REQ% %REQ(%", "- - ", ""),
            ("%NO_SUCH(x):3%", "-", "-"),
            ("%DYNAMIC_METADATA(other:x)%", "-", "-"),
            ("", "", ""),
            ("ends\n", "ends", "ends"),
        ];
        let nothing = Record::new(UNIX_EPOCH);
        with_record(|record| {
            for (text, full, empty) in CASES {
                match Format::text(text) {
                    Ok(format) => {
                        assert_eq!(format.line(record, Secrets::default()), format!("{full}\n"), "{text}");
                        assert_eq!(format.line(&nothing, Secrets::default()), format!("{empty}\n"), "{text}");
                    }
                    Err(_) => assert!(text.ends_with("(%"), "{text}"),
                }
            }
        });
    }

    /// With no other headers than those that a format names, its line is the same.
    #[test]
    fn formats_name_the_headers_that_they_show() {
        let format =
            Format::text("%REQ(X-NONE?USER-AGENT)% %REQ(:PATH)% %RESP(SERVER)% %TRAILER(X-END)% %GRPC_STATUS%")
                .unwrap();
        let names = format.header_names();
        assert_eq!(names.request, ["x-none", "user-agent"]);
        assert_eq!(
            (&names.response[..], &names.trailers[..]),
            (
                &["server", "grpc-status"].map(|name| name.parse().unwrap())[..],
                &["x-end", "grpc-status"].map(|name| name.parse().unwrap())[..]
            )
        );
        let mut json = Format::json(r#"{"a": {"b": ["%REQ(X-LONG)%"]}}"#).unwrap().header_names().clone();
        assert_eq!(json.request.pop().unwrap(), "x-long");
        assert_eq!(json, HeaderNames::default());
    }

    #[test]
    fn the_default_is_consuls() {
        let format = Format::default();
        assert!(format.unknown().is_empty());
        let line =
            |record: &Record<'_>| serde_json::from_str::<Json>(&format.line(record, Secrets::default())).unwrap();
        with_record(|record| {
            let expected = json!({
                "start_time": "1970-01-01T00:00:01.500Z", "route_name": "main", "method": "GET", "path": "/a?b=c",
                "protocol": "HTTP/1.1", "response_code": 200, "response_flags": null,
                "response_code_details": "via_upstream", "connection_termination_details": null, "bytes_received": 3,
                "bytes_sent": 4, "duration": 12, "upstream_service_time": "7", "x_forwarded_for": null,
                "user_agent": "curl", "request_id": "abc", "authority": "db.local", "upstream_host": "127.0.0.1:8080",
                "upstream_cluster": "local_app", "upstream_local_address": "127.0.0.1:5000",
                "downstream_local_address": "10.0.0.1:21000", "downstream_remote_address": "[::1]:40000",
                "requested_server_name": "db.internal", "upstream_transport_failure_reason": null,
            });
            assert_eq!(line(record), expected);
        });
    }

    #[test]
    fn json_formats_keep_their_shape_and_the_types_of_lone_operators() {
        let json = r#"{"n": "%BYTES_SENT%", "t": "%BYTES_SENT% b, %REQ(X-NONE)%", "none": "%REQ(X-NONE)%", "one": 1,
            "deep": {"list": ["%PROTOCOL%", null, "%%"]}, "odd": "%HOSTNAME%"}"#;
        let format = Format::json(json).unwrap();
        assert_eq!(format.unknown(), ["HOSTNAME"]);
        with_record(|record| {
            let line: Json = serde_json::from_str(&format.line(record, Secrets::default())).unwrap();
            let deep = json!({"list": ["HTTP/1.1", null, "%"]});
            assert_eq!(line, json!({"n": 4, "t": "4 b, -", "none": null, "one": 1, "deep": deep, "odd": null}));
        });
        for bad in ["", "[]", "\"x\"", "{", r#"{"a": "%b"}"#] {
            assert!(Format::json(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_stranger_cannot_write_lines() {
        let hostile: HeaderMap =
            [("x-a".parse().unwrap(), http::HeaderValue::from_bytes(b"a\tb\xff\xc2\x85\"").unwrap())]
                .into_iter()
                .collect();
        let request =
            Request { protocol: "HTTP/2", method: "GET", path: "/\u{2028}", authority: "", headers: &hostile };
        let record = Record { request: Some(request), ..Record::new(UNIX_EPOCH) };
        let text = Format::text("%REQ(x-a)% %REQ(:PATH)%").unwrap().line(&record, Secrets::default());
        assert_eq!(text, "a\\tb\u{fffd}\\u{85}\" /\\u{2028}\n");
        let json = Format::json(r#"{"a": "%REQ(x-a)%"}"#).unwrap().line(&record, Secrets::default());
        assert_eq!(json.matches('\n').count(), 1);
        assert_eq!(serde_json::from_str::<Json>(&json).unwrap()["a"], "a\tb\u{fffd}\u{85}\"");
    }
}
