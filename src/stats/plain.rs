//! OpenMetrics as the text format 0.0.4, for readers that know only that.

use super::openmetrics::Kind;

/// The same series: what counts is named with its ending, facts are gauges, and there are neither exemplars nor an end.
#[must_use]
pub fn of(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let (mut name, mut full_name) = ("", String::new());
    for line in openmetrics.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("TYPE"), Some(family), Some(kind)) => {
                let (ending, kind) = match kind {
                    kind if kind == Kind::Counter.word() => ("_total", kind),
                    kind if kind == Kind::Info.word() => ("_info", Kind::Gauge.word()),
                    kind => ("", kind),
                };
                (name, full_name) = (family, format!("{family}{ending}"));
                text.push_str(&format!("# TYPE {full_name} {kind}\n"));
            }
            (Some("#"), Some("HELP"), Some(family), Some(help)) if family == name => {
                text.push_str(&format!("# HELP {full_name} {help}\n"));
            }
            _ => {
                text.push_str(without_exemplar(line));
                text.push('\n');
            }
        }
    }
    text
}

/// An exemplar begins at the first ` # {` that is in no label's value, where quotes are escaped.
fn without_exemplar(line: &str) -> &str {
    let is_outside = |at: usize| {
        let mut is_outside = true;
        let mut bytes = line.bytes().take(at);
        while let Some(byte) = bytes.next() {
            match byte {
                b'\\' => drop(bytes.next()),
                b'"' => is_outside = !is_outside,
                _ => {}
            }
        }
        is_outside
    };
    line.match_indices(" # {").find(|(at, _)| is_outside(*at)).map_or(line, |(at, _)| &line[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_the_same_series_under_the_names_of_the_older_format() {
        let openmetrics = "# TYPE a_build info\n# HELP a_build The version.\na_build_info{version=\"1\"} 1\n\
            # TYPE a_requests counter\n# HELP a_requests All # {of} them.\na_requests_total{to=\"x \\\" # {\"} 3 # {trace_id=\"ab\"} 1 17.5\n\
            # TYPE a_seconds histogram\na_seconds_bucket{le=\"+Inf\"} 1\na_seconds_count 1\na_seconds_sum 0.5\n\
            # TYPE a_open gauge\na_open{to=\" # {\"} 2\n# EOF\n";
        let text = "# TYPE a_build_info gauge\n# HELP a_build_info The version.\na_build_info{version=\"1\"} 1\n\
            # TYPE a_requests_total counter\n# HELP a_requests_total All # {of} them.\na_requests_total{to=\"x \\\" # {\"} 3\n\
            # TYPE a_seconds histogram\na_seconds_bucket{le=\"+Inf\"} 1\na_seconds_count 1\na_seconds_sum 0.5\n\
            # TYPE a_open gauge\na_open{to=\" # {\"} 2\n";
        assert_eq!(of(openmetrics), text);
    }
}
