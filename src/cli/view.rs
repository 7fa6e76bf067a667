//! Reads what a sidecar says of itself (`/status`), whatever its version: what is not there is empty, or zero.

use std::borrow::Cow;

use serde_json::Value;

use crate::telemetry::escape;

pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub(super) fn of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// A string, harmless on a terminal.
pub(super) fn text(value: &Value) -> Cow<'_, str> {
    escape(of(value))
}

pub(super) fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

pub(super) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

/// A time in its largest unit, from seconds.
pub(super) fn period(seconds: f64) -> String {
    let units = [(86_400.0, "days"), (3_600.0, "h"), (60.0, "min")];
    let (length, unit) = units.into_iter().find(|(length, _)| seconds >= 2.0 * length).unwrap_or((1.0, "s"));
    format!("{:.0} {unit}", (seconds / length).max(0.0).floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_told_in_their_largest_unit() {
        for (seconds, expected) in [
            (-1.0, "0 s"),
            (0.9, "0 s"),
            (119.0, "119 s"),
            (120.0, "2 min"),
            (7_199.0, "119 min"),
            (7_200.0, "2 h"),
            (172_800.0, "2 days"),
        ] {
            assert_eq!(period(seconds), expected);
        }
    }
}
