//! The query of a request to the admin server.

use std::collections::BTreeMap;

/// Decoded; a key without a value has an empty one.
pub(super) type Query = BTreeMap<String, String>;

/// Reads what stands behind the question mark.
pub(super) fn parse(text: &str) -> Query {
    let decode =
        |part: &str| percent_encoding::percent_decode_str(&part.replace('+', " ")).decode_utf8_lossy().into_owned();
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = parse("usedonly&filter=a%2Eb+c&=x&&type=Counters");
        assert_eq!(query.get("usedonly").map(String::as_str), Some(""));
        assert_eq!(query.get("filter").map(String::as_str), Some("a.b c"));
        assert_eq!(query.get("type").map(String::as_str), Some("Counters"));
    }
}
