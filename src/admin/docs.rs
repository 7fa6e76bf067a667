//! The lists in docs/observability.md are made of the code: this test says so when they are not, and
//! `UPDATE_DOCS=1 cargo test` writes them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::observe::Outcome;
use crate::stats::openmetrics::{FAMILIES, Family, Kind};

fn reasons() -> String {
    let mut text = String::from(
        "| reason | flag | details | answer | meaning | what to do |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for outcome in Outcome::ALL {
        let about = outcome.describe();
        if about.remedy.is_empty() {
            continue;
        }
        let code = |text: &str| if text.is_empty() { "-".to_owned() } else { format!("`{text}`") };
        let answer =
            if about.status == http::StatusCode::OK { "-".to_owned() } else { about.status.as_u16().to_string() };
        let (flag, details, meaning, remedy) = (code(about.flag), code(about.details), about.meaning, about.remedy);
        let _ = writeln!(text, "| {} | {flag} | {details} | {answer} | {meaning} | {remedy} |", outcome.name());
    }
    text
}

fn metrics() -> String {
    let mut text = String::from("| series | type | labels | meaning |\n| --- | --- | --- | --- |\n");
    for Family { name, kind, help, labels } in FAMILIES {
        let ending = match kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        let labels = if labels.is_empty() { "-" } else { labels };
        let _ = writeln!(text, "| `{name}{ending}` | {} | {labels} | {help} |", kind.word());
    }
    text
}

#[test]
fn the_lists_of_the_docs_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/observability.md");
    let page = fs::read_to_string(&path).expect("the page is there");
    let mut made = page.clone();
    for (name, list) in [("reasons", reasons()), ("metrics", metrics())] {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let from = made.find(&begin).expect("a list begins") + begin.len();
        let to = made.find(&end).expect("it ends");
        made.replace_range(from..to, &list);
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &made).expect("the page can be written");
    }
    assert_eq!(page, made, "docs/observability.md is not what the code says: UPDATE_DOCS=1 cargo test writes it");
}
