//! Draws a sidecar between two of its statuses: a pure function, for a terminal of any size.
//!
//! Strings come from elsewhere, and are escaped when they become lines (`view::text`).

use ratatui_core::buffer::Buffer;
use ratatui_core::style::{Color, Modifier, Style};
use serde_json::Value;

use super::rows::{Row, limits, rows};
use crate::cli::find::Sidecar;
use crate::cli::status::{faults, seconds_left, states};
use crate::cli::view::{count, list, number, period, text};
use crate::telemetry::escape;

/// The content of the view.
pub(super) struct View<'a> {
    /// Now, or when it last answered.
    pub(super) sidecar: &'a Sidecar,
    /// Its status before that.
    pub(super) before: Option<&'a Value>,
    /// The row whose endpoints are shown.
    pub(super) chosen: usize,
    /// Why there is no newer answer; empty where there is.
    pub(super) trouble: &'a str,
}

/// A line of the terminal: what does not fit on the left is cut, on the right nothing is.
#[derive(Default)]
struct Line {
    left: String,
    /// ASCII.
    right: String,
    style: Style,
}

/// Narrowest column of names; below this width, columns on the right are left out.
const NAME: usize = 16;

/// Its title, its width with the space before it, and its cells.
type Column = (&'static str, usize, fn(&Row<'_>) -> String);

/// In a narrow terminal, the last ones are left out.
const COLUMNS: &[Column] = &[
    ("RATE/S", 8, |row| rate(row.rate())),
    ("ERR/S", 7, |row| rate(row.errors())),
    ("P50 MS", 8, |row| latency(row.latency(0.5))),
    ("P99 MS", 8, |row| latency(row.latency(0.99))),
    ("UP", 8, |row| row.endpoints().map_or_else(none, |(usable, registered)| format!("{usable}/{registered}"))),
    ("DENIED", 8, |row| row.denied().map_or_else(none, |denied| denied.to_string())),
    ("STATE", 11, |row| row.state()),
    ("PROTOCOL", 9, |row| text(&row.now["protocol"]).into_owned()),
];

const KEYS: &str = "q ends; arrows, or j and k, choose a row";

pub(super) fn draw(buffer: &mut Buffer, view: &View<'_>) {
    let (width, height) = (usize::from(buffer.area.width), usize::from(buffer.area.height));
    let rows = rows(view.before, &view.sidecar.status);
    let chosen = view.chosen.min(rows.len().saturating_sub(1));
    let head = head(view);
    let details = rows.get(chosen).map_or_else(Vec::new, details);
    let problems = problems(&view.sidecar.status);
    // The last line is for the keys, where there are lines enough.
    let usable = if height > 2 { height - 1 } else { height };
    let places = share(usable.saturating_sub(head.len()), [rows.len() + 1, details.len(), problems.len()]);
    let lines = head.into_iter().chain(table(&rows, chosen, width, places[0]));
    let lines = lines.chain(details.into_iter().take(places[1])).chain(problems.into_iter().take(places[2]));
    for (y, line) in lines.take(usable).enumerate() {
        put(buffer, y, &line);
    }
    if usable < height {
        put(buffer, usable, &Line { left: KEYS.to_owned(), style: Modifier::DIM.into(), ..Line::default() });
    }
}

fn put(buffer: &mut Buffer, y: usize, line: &Line) {
    let (area, right) = (buffer.area, line.right.len());
    let Ok(y) = u16::try_from(y) else { return };
    let left = usize::from(area.width).saturating_sub(right);
    buffer.set_style(ratatui_core::layout::Rect { y: area.y + y, height: 1, ..area }, line.style);
    buffer.set_stringn(area.x, area.y + y, &line.left, left, Style::default());
    if let Some(from) = area.width.checked_sub(u16::try_from(right).unwrap_or(u16::MAX)) {
        buffer.set_stringn(area.x + from, area.y + y, &line.right, right, Style::default());
    }
}

/// Each part gets a third of the lines if it wants that; what is left goes to the first that wants more.
fn share(lines: usize, wanted: [usize; 3]) -> [usize; 3] {
    let mut given = wanted.map(|wanted| wanted.min(lines / 3));
    let mut left = lines - given.iter().sum::<usize>();
    for (given, wanted) in given.iter_mut().zip(wanted) {
        let more = left.min(wanted - *given);
        *given += more;
        left -= more;
    }
    given
}

/// The sidecar, and what is wrong with it.
fn head(view: &View<'_>) -> Vec<Line> {
    let status = &view.sidecar.status;
    let faults = faults(status);
    let state = match (view.trouble.is_empty(), faults.is_empty()) {
        (false, _) => "NO ANSWER",
        (true, false) => "NOT WELL",
        (true, true) => "ready",
    };
    let certificate = seconds_left(status)
        .map_or_else(String::new, |left| format!(", certificate: {:.1} days left", left / 86_400.0));
    let up = period(number(&status["sidecar"]["uptime"]));
    let title = format!("{}: {state}, up {up}{certificate}", view.sidecar.title());
    let bad = Style::new().fg(Color::Red);
    let mut lines = vec![Line { left: title, style: Modifier::BOLD.into(), ..Line::default() }];
    if !view.trouble.is_empty() {
        lines.push(Line { left: escape(view.trouble).into_owned(), style: bad, ..Line::default() });
    } else if let Some(fault) = faults.first() {
        lines.push(Line { left: escape(fault).into_owned(), style: bad, ..Line::default() });
    }
    lines
}

/// The rows around the chosen one, below the titles of their columns.
fn table(rows: &[Row<'_>], chosen: usize, width: usize, height: usize) -> Vec<Line> {
    let mut room = width.saturating_sub(NAME);
    let columns: Vec<_> = COLUMNS
        .iter()
        .map_while(|column| {
            room = room.checked_sub(column.1)?;
            Some(column)
        })
        .collect();
    let cells = |cell: &dyn Fn(&Column) -> String| {
        columns.iter().map(|column| format!("{:>1$}", cell(column), column.1)).collect::<String>()
    };
    let title = Line {
        left: "LISTENER".to_owned(),
        right: cells(&|column| column.0.to_owned()),
        style: Modifier::UNDERLINED.into(),
    };
    let shown = height.saturating_sub(1);
    let first = (chosen + 1).saturating_sub(shown);
    let lines = rows.iter().enumerate().skip(first).take(shown).map(|(index, row)| {
        let direction = if row.is_inbound { "inbound " } else { "" };
        let mut style = Style::new();
        if row.errors().is_some_and(|errors| errors > 0.0) {
            style = style.fg(Color::Red);
        } else if row.state() != "ok" {
            style = style.fg(Color::Yellow);
        }
        if index == chosen {
            style = style.add_modifier(Modifier::REVERSED);
        }
        Line { left: format!("{direction}{}", escape(row.name())), right: cells(&|column| (column.2)(row)), style }
    });
    std::iter::once(title).chain(lines).take(height).collect()
}

/// The endpoints of an upstream, or the callers of the service, below a title.
fn details(row: &Row<'_>) -> Vec<Line> {
    let mut lines = vec![titled(&match row.is_inbound {
        true => format!("callers of {}; default policy: {}", escape(row.name()), text(&row.now["default"])),
        false => format!("endpoints of {}", escape(row.name())),
    })];
    for caller in list(&row.now["callers"]) {
        let (allowed, denied) = (count(&caller["allowed"]), count(&caller["denied"]));
        lines.push(plain(format!("  {}: {allowed} allowed, {denied} denied", text(&caller["service"]))));
    }
    for target in row.targets() {
        let retries = if target["retries_refused"] == true { ", no more retries" } else { "" };
        let full = limits(target).map(|(name, limit)| {
            let name = name.replace('_', " ");
            format!(", limit of {} reached: {}", escape(&name), count(&limit["maximum"]))
        });
        let full: String = full.collect();
        lines.push(plain(format!("  {}: {}{full}{retries}", text(&target["id"]), states(target))));
        lines.extend(list(&target["endpoints"]).iter().map(|endpoint| plain(self::endpoint(endpoint))));
    }
    lines
}

fn endpoint(endpoint: &Value) -> String {
    let latency = endpoint["latency_ms"].as_f64().map_or_else(String::new, |latency| format!(", {latency:.1} ms"));
    format!(
        "    {} {}, breaker {}, {} in flight{latency}",
        text(&endpoint["address"]),
        text(&endpoint["state"]),
        text(&endpoint["breaker"]),
        count(&endpoint["in_flight"]),
    )
}

/// The newest, each in two lines: to whom it happened, and why.
fn problems(status: &Value) -> Vec<Line> {
    let problems = list(&status["problems"]);
    if problems.is_empty() {
        return vec![titled("no problems")];
    }
    let mut lines = vec![titled("newest problems")];
    for problem in problems {
        let ago = period((number(&status["time"]) - number(&problem["time"])) / 1000.0);
        let what = problem["what"].as_str().map_or_else(String::new, |what| format!(", {}", escape(what)));
        let (direction, listener) = (text(&problem["direction"]), text(&problem["listener"]));
        let (reason, who) = (text(&problem["reason"]), text(&problem["who"]));
        lines.push(plain(format!("  {ago} ago, {direction} {listener}: {reason} from {who}{what}")));
        lines.push(plain(format!("    {}", text(&problem["cause"]))));
    }
    lines
}

fn titled(text: &str) -> Line {
    Line { left: text.to_owned(), style: Modifier::BOLD.into(), ..Line::default() }
}

fn plain(left: String) -> Line {
    Line { left, ..Line::default() }
}

fn none() -> String {
    "-".to_owned()
}

fn rate(rate: Option<f64>) -> String {
    match rate {
        None => none(),
        Some(rate) if rate < 1000.0 => format!("{rate:.1}"),
        Some(rate) if rate < 1_000_000.0 => format!("{:.1}k", rate / 1000.0),
        Some(rate) => format!("{:.0}M", rate / 1_000_000.0),
    }
}

fn latency(milliseconds: Option<f64>) -> String {
    match milliseconds {
        None => none(),
        Some(milliseconds) if milliseconds < 100.0 => format!("{milliseconds:.1}"),
        Some(milliseconds) => format!("{milliseconds:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use ratatui_core::backend::TestBackend;
    use ratatui_core::terminal::Terminal;
    use serde_json::json;

    use super::*;
    use crate::cli::client::Address;

    fn status(time: u64, requests: u64) -> Value {
        let slow = requests / 20;
        let times = [0, 0, requests - slow, 0, 0, 0, 0, 0, 0, slow, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        json!({
            "time": time,
            "sidecar": { "service": "web", "state": "LIVE", "uptime": 7300 },
            "certificate": { "not_after": 216_100.0 },
            "inbound": [{
                "service": "web", "bind": "a:1", "protocol": "http", "http": true, "requests": requests, "classes": [0, 0, 0, 0, requests / 10],
                "times": times, "denied": 3, "default": "default policy (allow)",
                "callers": [{ "service": "a\u{1b}pi", "allowed": 6, "denied": 3 }],
            }],
            "outbound": [
                { "name": "db", "key": "db", "bind": "a:2", "protocol": "tcp", "http": false, "connections": requests * 100, "targets": [{
                    "id": "db.x", "registered": 3, "limits": { "pending_requests": { "open": true, "used": 9, "maximum": 9 } },
                    "endpoints": [
                        { "address": "10.0.0.1:80", "state": "healthy", "breaker": "closed", "in_flight": 2, "latency_ms": 3.12 },
                        { "address": "10.0.0.2:80", "state": "ejected", "breaker": "open", "in_flight": 0 },
                    ],
                }] },
                { "name": "cache\n", "key": "cache", "bind": "a:3", "protocol": "grpc", "http": true, "waits_for_agent": true },
            ],
            "problems": [{
                "time": time - 4000, "direction": "inbound", "listener": "web", "reason": "Denied", "who": "a\u{1b}pi",
                "what": "GET /x\u{7}", "cause": "intention api => web (deny, precedence 9)",
            }],
        })
    }

    fn drawn(width: u16, height: u16, view: &View<'_>) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame.buffer_mut(), view)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content.chunks(usize::from(width).max(1));
        let line = |cells: &[ratatui_core::buffer::Cell]| cells.iter().map(|cell| cell.symbol()).collect::<String>();
        lines.map(|cells| line(cells).trim_end().to_owned() + "\n").collect()
    }

    fn sidecar(status: Value) -> Sidecar {
        Sidecar { address: Address::Tcp("127.0.0.1".into(), 19000), status }
    }

    #[test]
    fn the_view_answers_what_people_ask() {
        let (before, now) = (status(98_000, 100), sidecar(status(100_000, 140)));
        let view = View { sidecar: &now, before: Some(&before), chosen: 1, trouble: "" };
        let expected = "\
web (127.0.0.1:19000): ready, up 2 h, certificate: 2.5 days left
LISTENER                RATE/S  ERR/S  P50 MS  P99 MS      UP  DENIED      STATE
inbound web               20.0    2.0     3.1    1000       -       3         ok
db                        2.0k    0.0       -       -     1/3       -      limit
cache\\n                    0.0    0.0       -       -     0/0       -      waits
endpoints of db
  db.x: 1 of 3 endpoints up, 1 ejected, limit of pending requests reached: 9
    10.0.0.1:80 healthy, breaker closed, 2 in flight, 3.1 ms
    10.0.0.2:80 ejected, breaker open, 0 in flight
newest problems
  4 s ago, inbound web: Denied from a\\u{1b}pi, GET /x\\u{7}
    intention api => web (deny, precedence 9)
";
        let text = drawn(80, 24, &view);
        assert!(text.starts_with(expected) && text.ends_with(&format!("{KEYS}\n")), "{text}");
        assert_eq!(text.lines().count(), 24);
    }

    #[test]
    fn a_small_terminal_shows_the_chosen_row_and_less_of_all() {
        let (before, now) = (status(98_000, 100), sidecar(status(100_000, 140)));
        let view = |chosen, trouble| View { sidecar: &now, before: Some(&before), chosen, trouble };
        let expected = "\
web (127.0.0.1:19000): ready, up 2 h, ce
LISTENER           RATE/S  ERR/S  P50 MS
inbound web          20.0    2.0     3.1
db                   2.0k    0.0       -
cache\\n               0.0    0.0       -
endpoints of cache\\n
newest problems
  4 s ago, inbound web: Denied from a\\u{
    intention api => web (deny, preceden
q ends; arrows, or j and k, choose a row
";
        assert_eq!(drawn(40, 10, &view(2, "")), expected);
        // Fewer lines than rows: the chosen one is among them, and the reason why nothing is new is told.
        let text = drawn(40, 7, &view(9, "can't connect\u{1b}[2J"));
        assert!(text.contains("NO ANSWER") && text.contains("\ncan't connect\\u{1b}[2J\n"), "{text}");
        assert!(text.contains("\ncache\\n ") && !text.contains("\ndb "), "{text}");
    }

    #[test]
    fn no_size_and_no_status_is_too_strange() {
        let odd = json!({ "time": -1, "inbound": [null, 7, {}], "outbound": [{ "targets": [{}, 3] }], "problems": [{}, "x"] });
        for status in [status(100_000, 140), json!({}), json!(null), odd] {
            let sidecar = sidecar(status);
            for (width, height) in [(0, 0), (1, 1), (1, 50), (300, 1), (3, 2), (16, 3), (17, 5), (80, 24), (500, 100)] {
                let view = View { sidecar: &sidecar, before: Some(&sidecar.status), chosen: 3, trouble: "" };
                drawn(width, height, &view);
                drawn(width, height, &View { before: None, trouble: "\u{202e}\u{1b}\u{4e2d}", ..view });
            }
        }
    }

    #[test]
    fn a_sidecar_that_is_not_well_says_why() {
        let mut draining = status(100_000, 0);
        draining["sidecar"]["state"] = json!("DRAINING");
        let sidecar = sidecar(draining);
        let text = drawn(80, 24, &View { sidecar: &sidecar, before: None, chosen: 0, trouble: "" });
        assert!(text.contains("NOT WELL") && text.contains("\nnot ready: it drains"), "{text}");
        assert!(text.contains("callers of web; default policy") && text.contains("  a\\u{1b}pi: 6 allowed, 3 denied"));
    }
}
