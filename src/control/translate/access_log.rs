//! `AccessLogs`, which the agent merges into the registration from proxy-defaults.

use std::path::PathBuf;

use super::Notes;
use crate::access_log::{Format, Settings, Sink};
use crate::consul::api;

/// `None` when nothing is to be logged. A format that cannot be used is noted and replaced by the default.
pub(super) fn settings(wire: Option<&api::AccessLogs>, notes: &mut Notes) -> Option<Settings> {
    let wire = wire.filter(|wire| wire.enabled)?;
    let sink = match (wire.kind.as_str(), wire.path.as_str()) {
        ("" | "stdout", _) => Sink::Stdout,
        ("stderr", _) => Sink::Stderr,
        ("file", path) if !path.is_empty() => Sink::File(PathBuf::from(path)),
        (other, _) => {
            notes.push(format!("access logs: type {other:?} is not known or lacks its path, so they go to stdout"));
            Sink::Stdout
        }
    };
    let format = match (wire.json_format.as_str(), wire.text_format.as_str()) {
        ("", "") => Ok(Format::default()),
        ("", text) => Format::text(text),
        (json, _) => Format::json(json),
    };
    let format = format.unwrap_or_else(|bad| {
        notes.push(format!("access logs: the format can't be used, as {bad}: the default format is used"));
        Format::default()
    });
    if !format.unknown().is_empty() {
        notes.push(format!("access logs: these operators are not supported and have no value: {:?}", format.unknown()));
    }
    Some(Settings { sink, format, refused_connections: !wire.disable_listener_logs })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The settings, and how often something was noted.
    fn read(wire: Value) -> (Option<Settings>, usize) {
        let mut notes = Notes::default();
        let wire: api::AccessLogs = serde_json::from_value(wire).unwrap();
        (settings(Some(&wire), &mut notes), notes.take().len())
    }

    #[test]
    fn where_and_how_is_as_configured() {
        let line = || Format::text("%PROTOCOL%").unwrap();
        for (wire, sink, format, noted) in [
            (json!({}), Sink::Stdout, Format::default(), 0),
            (json!({"Type": "stdout"}), Sink::Stdout, Format::default(), 0),
            (json!({"Type": "stderr"}), Sink::Stderr, Format::default(), 0),
            (json!({"Type": "file", "Path": "/a"}), Sink::File("/a".into()), Format::default(), 0),
            (json!({"Type": "file"}), Sink::Stdout, Format::default(), 1),
            (json!({"Type": "syslog"}), Sink::Stdout, Format::default(), 1),
            (json!({"TextFormat": "%PROTOCOL%"}), Sink::Stdout, line(), 0),
            (json!({"TextFormat": "%PROTOCOL%\n"}), Sink::Stdout, line(), 0),
            (json!({"TextFormat": "%PROTOCOL"}), Sink::Stdout, Format::default(), 1),
            (json!({"TextFormat": "%NEW%"}), Sink::Stdout, Format::text("%NEW%").unwrap(), 1),
            (json!({"JSONFormat": "{\"a\": \"b\"}"}), Sink::Stdout, Format::json("{\"a\": \"b\"}").unwrap(), 0),
            (json!({"JSONFormat": "[]"}), Sink::Stdout, Format::default(), 1),
        ] {
            let mut enabled = wire.clone();
            enabled["Enabled"] = true.into();
            let expected = Settings { sink, format, refused_connections: true };
            assert_eq!(read(enabled), (Some(expected), noted), "{wire}");
            assert_eq!(read(wire), (None, 0));
        }
        let quiet = read(json!({"Enabled": true, "DisableListenerLogs": true})).0;
        assert_eq!(quiet.map(|settings| settings.refused_connections), Some(false));
    }
}
