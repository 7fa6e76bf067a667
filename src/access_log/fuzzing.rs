//! Checks of access-log formats, and of the lines that strangers have a part in.

use std::time::UNIX_EPOCH;

use http::{HeaderMap, HeaderValue};

use super::{Format, Record, Request, Response, Secrets};

/// A format, then a zero and what a stranger sends in every place.
pub fn log_format(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let Ok(format) = std::str::from_utf8(parts.next().unwrap_or_default()) else { return };
    let sent: Vec<u8> = parts.next().unwrap_or_default().iter().filter(|byte| is_in_headers(**byte)).copied().collect();
    let text = String::from_utf8_lossy(&sent);
    let Ok(value) = HeaderValue::from_bytes(&sent) else { return };
    let headers: HeaderMap = ["x-a", "user-agent", "referer", "grpc-status", "x-envoy-original-path"]
        .into_iter()
        .map(|name| (name.parse().unwrap(), value.clone()))
        .collect();
    let nothing = Record::new(UNIX_EPOCH);
    let hostile = Record {
        request: Some(Request { protocol: "HTTP/2", method: &text, path: &text, authority: &text, headers: &headers }),
        response: Some(Response { code: 200, details: None, headers: &headers, trailers: Some(&headers) }),
        requested_server_name: Some(text.clone()),
        ..nothing.clone()
    };
    if let Ok(format) = Format::text(format) {
        let controls =
            |record: &Record<'_>| format.line(record, Secrets::default()).chars().filter(|c| c.is_control()).count();
        assert_eq!(controls(&hostile), controls(&nothing), "a stranger adds control characters");
        assert!(format.line(&hostile, Secrets::default()).ends_with('\n'));
    }
    if let Ok(format) = Format::json(format) {
        for record in [&hostile, &nothing] {
            let line = format.line(record, Secrets::default());
            assert_eq!(line.find('\n'), Some(line.len() - 1), "{line:?}");
            assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok_and(|line| line.is_object()), "{line:?}");
        }
    }
}

fn is_in_headers(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}
