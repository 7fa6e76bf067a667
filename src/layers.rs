//! The layers of the crate, as a table, and the test that every import keeps to it.
//!
//! The test reads the source files and not the compiler's output, as the compiler forgets imports. What is only compiled for tests or fuzzing is left
//! out: fixtures may reach everywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fmt, fs};

/// Each module of the crate, lowest first, with the modules that it may import. A module imports none that stands below it in this table,
/// so the table itself has no cycle.
const LAYERS: [(&str, &[&str]); 24] = [
    ("fetch", &[]),
    ("drain", &[]),
    ("race", &[]),
    ("stats", &[]),
    ("telemetry", &[]),
    ("trace", &["stats"]),
    ("tls", &[]),
    ("jwt", &[]),
    ("resolve", &["race"]),
    ("consul", &["resolve"]),
    ("operators", &["tls"]),
    ("access_log", &["jwt", "operators", "telemetry"]),
    ("config", &["consul", "telemetry", "tls", "trace"]),
    ("registration", &["config", "consul"]),
    ("snapshot", &["access_log", "fetch", "jwt", "operators", "tls", "trace"]),
    ("observe", &["access_log", "jwt", "operators", "snapshot", "stats", "tls", "trace"]),
    ("control", &["access_log", "config", "consul", "fetch", "jwt", "snapshot", "stats", "tls", "trace"]),
    ("proxy", &["access_log", "drain", "jwt", "observe", "operators", "race", "resolve", "snapshot", "stats", "tls"]),
    ("admin", &["config", "drain", "observe", "proxy", "snapshot", "stats", "telemetry", "tls"]),
    ("doctor", &["consul", "tls"]),
    ("cli", &["admin", "config", "doctor", "stats", "telemetry"]),
    (
        "app",
        &[
            "admin",
            "config",
            "consul",
            "control",
            "drain",
            "observe",
            "proxy",
            "registration",
            "snapshot",
            "stats",
            "telemetry",
            "trace",
        ],
    ),
    // The root of the crate, and the program.
    ("lib", &[]),
    ("main", &["app", "cli", "config", "telemetry"]),
];

/// Beside the layers: a module, one that it may not import, and why.
const APART: [(&str, &str, &str); 7] = [
    ("proxy::inbound", "proxy::outbound", "what both directions share is below them"),
    ("proxy::outbound", "proxy::inbound", "what both directions share is below them"),
    ("proxy::http::inbound", "proxy::http::outbound", "what both directions share is below them"),
    ("proxy::http::outbound", "proxy::http::inbound", "what both directions share is below them"),
    ("proxy::codec", "proxy::http", "connections do not know what requests mean"),
    ("app", "consul::api", "wire types become domain values in control::translate"),
    ("config", "consul::api", "wire types become domain values in control::translate"),
];

#[test]
fn every_import_keeps_to_the_layers() {
    let broken = layer_faults(&Sources::read());
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn modules_import_each_other_in_no_cycle() {
    let cycles = cycles(&Sources::read().imports);
    assert!(cycles.is_empty(), "\n{}\n", cycles.join("\n"));
}

/// What names rustls' unbuffered interface, or the reader of a client's first message that goes with it.
const UNBUFFERED: [&str; 6] = [
    "UnbufferedClientConnection",
    "UnbufferedServerConnection",
    "UnbufferedStatus",
    "ConnectionState",
    "EncodeTlsData",
    "Acceptor",
];

#[test]
fn one_short_file_knows_the_unbuffered_interface_of_rustls() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![top.join("src")];
    let mut using = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of this crate") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let words = tokens(&fs::read_to_string(&path).expect("a file of this crate"));
                let is_stream = path.ends_with("tls/stream.rs");
                if words.iter().any(|(word, _)| UNBUFFERED.contains(&word.as_str()) || is_stream && word == "rustls") {
                    using.push(path);
                }
            }
        }
    }
    let only = top.join("src/tls/unbuffered.rs");
    assert_eq!(using, [only.as_path()], "rustls 0.24 replaces that interface, so that one file alone may use it");
    let lines = fs::read_to_string(only).expect("the file is there").lines().count();
    assert!(
        lines <= 200,
        "{lines} lines are more than one reader takes in: keep what is not the library's in stream.rs"
    );
}

#[test]
fn the_table_names_each_module_once_and_lowest_first() {
    let sources = Sources::read();
    let tops: BTreeSet<&str> = sources.modules.iter().map(|module| top(module)).collect();
    let named: Vec<&str> = LAYERS.iter().map(|(module, _)| *module).collect();
    assert_eq!(tops, named.iter().copied().collect(), "LAYERS in src/layers.rs names the modules that there are");
    for (place, (module, may)) in LAYERS.iter().enumerate() {
        for other in *may {
            assert!(named[..place].contains(other), "LAYERS in src/layers.rs: {other} does not stand above {module}");
        }
    }
}

#[test]
fn the_architecture_names_files_that_there_are() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(top.join("docs/architecture.md")).expect("the page is there");
    let named = text.split('`').skip(1).step_by(2).filter(|name| name.ends_with(".rs") || name.ends_with('/'));
    let missing: Vec<&str> =
        named.filter(|name| ![top, &top.join("src")].iter().any(|at| at.join(name).exists())).collect();
    assert!(missing.is_empty(), "docs/architecture.md names what there is not: {}", missing.join(", "));
}

#[test]
fn faults_are_told_with_file_line_and_rule() {
    let of = |module: &str, text: &str| {
        let mut sources = Sources::default();
        let modules = ["snapshot", "control", "control::draft", "tls", "proxy", "proxy::inbound", "proxy::outbound"];
        sources.modules.extend(modules.map(String::from));
        let file = format!("src/{}.rs", module.replace("::", "/"));
        sources.parse(module, Path::new(&file), text);
        sources.resolve();
        layer_faults(&sources)
    };
    assert_eq!(of("snapshot", "use crate::tls::Sni;\n// crate::control\nfn f() { \"crate::control\"; 'c'; }"), [""; 0]);
    let expected = "src/snapshot.rs:2: snapshot imports control::draft, and may import only access_log, fetch, jwt, operators, tls, trace \
                    (LAYERS in src/layers.rs)";
    assert_eq!(of("snapshot", "\nuse crate::{tls::{self, Sni}, control::draft::Draft};"), [expected]);
    assert_eq!(of("snapshot", "\nfn f<'a>(x: &'a u8) { crate::control::draft::f() }"), [expected]);
    assert_eq!(of("snapshot", "#[cfg(test)]\nmod tests { use crate::control::draft::Draft; }"), [""; 0]);
    let apart = "src/proxy/inbound.rs:1: proxy::inbound imports proxy::outbound, and may not: what both directions share is below them \
                 (APART in src/layers.rs)";
    assert_eq!(of("proxy::inbound", "use super::outbound::serve;"), [apart]);
}

#[test]
fn cycles_are_found_through_what_is_exported_again() {
    let mut sources = Sources::default();
    sources.modules.extend(["proxy", "proxy::a", "proxy::b"].map(String::from));
    sources.parse("proxy", Path::new("src/proxy/mod.rs"), "pub(crate) use b::Thing;\nuse a::run;");
    sources.parse("proxy::a", Path::new("src/proxy/a.rs"), "use super::Thing;");
    sources.parse("proxy::b", Path::new("src/proxy/b.rs"), "");
    sources.resolve();
    assert_eq!(cycles(&sources.imports), [""; 0]);
    sources.parse("proxy::b", Path::new("src/proxy/b.rs"), "\nuse super::a;");
    sources.parse("proxy::a", Path::new("src/proxy/a.rs"), "use super::b::Thing;");
    sources.resolve();
    let expected = "Modules import each other: src/proxy/a.rs:1 imports proxy::b, src/proxy/b.rs:2 imports proxy::a";
    assert_eq!(cycles(&sources.imports), [expected]);
}

fn layer_faults(sources: &Sources) -> Vec<String> {
    let mut faults = Vec::new();
    for import in &sources.imports {
        let (from, to) = (top(&import.from), top(&import.to));
        let may = LAYERS.iter().find(|(module, _)| *module == from).map_or(&[][..], |(_, may)| may);
        if from != to && !may.contains(&to) {
            faults.push(format!("{import}, and may import only {} (LAYERS in src/layers.rs)", may.join(", ")));
        }
        for (module, other, why) in APART {
            if is_within(&import.from, module) && is_within(&import.to, other) {
                faults.push(format!("{import}, and may not: {why} (APART in src/layers.rs)"));
            }
        }
    }
    faults
}

/// One sentence for each group of modules that can be reached from each other.
fn cycles(imports: &[Import]) -> Vec<String> {
    let mut graph: BTreeMap<&str, BTreeMap<&str, &Import>> = BTreeMap::new();
    for import in imports.iter().filter(|import| import.from != import.to) {
        graph.entry(&import.from).or_default().entry(&import.to).or_insert(import);
    }
    let mut reported = BTreeSet::new();
    let mut cycles = Vec::new();
    for start in graph.keys() {
        let Some(way) = way_back(&graph, start) else { continue };
        if way.iter().any(|import| !reported.insert(import.from.as_str())) {
            continue;
        }
        let way: Vec<String> = way.iter().map(|import| format!("{} imports {}", import.place, import.to)).collect();
        cycles.push(format!("Modules import each other: {}", way.join(", ")));
    }
    cycles
}

/// The shortest way from a module to itself.
fn way_back<'a>(graph: &BTreeMap<&'a str, BTreeMap<&'a str, &'a Import>>, start: &'a str) -> Option<Vec<&'a Import>> {
    let mut ways = vec![(start, Vec::new())];
    let mut seen = BTreeSet::new();
    let mut next = 0;
    while let Some((module, way)) = ways.get(next).cloned() {
        next += 1;
        for (to, import) in graph.get(module).into_iter().flatten() {
            let way: Vec<&Import> = way.iter().copied().chain([*import]).collect();
            if *to == start {
                return Some(way);
            }
            if seen.insert(*to) {
                ways.push((to, way));
            }
        }
    }
    None
}

/// A module that names another one. Modules are written as paths below the crate: `control::draft`.
#[derive(Debug, Clone)]
struct Import {
    from: String,
    to: String,
    place: Place,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} imports {}", self.place, self.from, self.to)
    }
}

#[derive(Debug, Clone)]
struct Place {
    file: PathBuf,
    line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A path as it is written in a module, made absolute.
#[derive(Debug, Clone)]
struct Named {
    from: String,
    path: Vec<String>,
    place: Place,
}

#[derive(Debug, Default)]
struct Sources {
    modules: BTreeSet<String>,
    named: BTreeMap<String, Vec<Named>>,
    /// What a name in a module stands for, by `use`.
    bound: BTreeMap<(String, String), Vec<String>>,
    imports: Vec<Import>,
}

impl Sources {
    fn read() -> Self {
        let mut sources = Self::default();
        for (root, file) in [("lib", "src/lib.rs"), ("main", "src/main.rs")] {
            sources.modules.insert(root.into());
            sources.read_file(root, Path::new(file));
        }
        sources.resolve();
        sources
    }

    /// Reads a file and those of the modules that it declares.
    fn read_file(&mut self, module: &str, file: &Path) {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("a file of this crate");
        for child in self.parse(module, file, &text) {
            let folder = match module {
                "lib" => PathBuf::from("src"),
                _ if file.ends_with("mod.rs") => file.parent().expect("a folder").to_owned(),
                _ => file.with_extension(""),
            };
            let flat = folder.join(format!("{child}.rs"));
            let file = if Path::new(env!("CARGO_MANIFEST_DIR")).join(&flat).exists() {
                flat
            } else {
                folder.join(&child).join("mod.rs")
            };
            let module = if module == "lib" { child } else { format!("{module}::{child}") };
            self.modules.insert(module.clone());
            self.read_file(&module, &file);
        }
    }

    /// Takes the paths of one file in, and gives the modules that it declares in files of their own.
    fn parse(&mut self, module: &str, file: &Path, text: &str) -> Vec<String> {
        let mut parser = Parser { tokens: tokens(text), at: 0, module: path_of(module), found: Vec::new() };
        let children = parser.items();
        let mut named = Vec::new();
        for Found { path, name, line } in parser.found {
            if let Some(name) = name {
                self.bound.insert((module.into(), name), path.clone());
            }
            named.push(Named { from: module.into(), path, place: Place { file: file.into(), line } });
        }
        self.named.insert(module.into(), named);
        children
    }

    /// Turns paths into imports of modules.
    fn resolve(&mut self) {
        let mut imports = Vec::new();
        for Named { from, path, place } in self.named.values().flatten() {
            if let Some(to) = self.module_of(path, 0) {
                imports.push(Import { from: from.clone(), to, place: place.clone() });
            }
        }
        self.imports = imports;
    }

    /// The module that holds what a path names, also where other modules export it again. `None` for other crates.
    fn module_of(&self, path: &[String], depth: usize) -> Option<String> {
        let mut module = String::from("lib");
        for (place, segment) in path.iter().enumerate() {
            let inner = if module == "lib" { segment.clone() } else { format!("{module}::{segment}") };
            if self.modules.contains(&inner) {
                module = inner;
                continue;
            }
            if let Some(target) = self.bound.get(&(module.clone(), segment.clone())).filter(|_| depth < 8) {
                let longer: Vec<String> = target.iter().chain(&path[place + 1..]).cloned().collect();
                return self.module_of(&longer, depth + 1).or(Some(module));
            }
            break;
        }
        (module != "lib").then_some(module)
    }
}

struct Found {
    path: Vec<String>,
    /// The name that a `use` binds.
    name: Option<String>,
    line: usize,
}

struct Parser {
    tokens: Vec<(String, usize)>,
    at: usize,
    module: Vec<String>,
    found: Vec<Found>,
}

impl Parser {
    /// Walks over everything, inline modules too, and gives the modules that are declared to be elsewhere.
    fn items(&mut self) -> Vec<String> {
        let mut children = Vec::new();
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "#" if self.is_for_tests() => self.skip_item(),
                "mod" if self.peek(2) == ";" => {
                    children.push(self.peek(1).to_owned());
                    self.at += 3;
                }
                "use" if self.at == 0 || matches!(self.peek_back(), ";" | "}" | "]" | ")" | "{" | "pub") => {
                    self.at += 1;
                    self.use_tree(&[]);
                }
                "crate" | "super" | "lictor" if self.peek(1) == "::" && self.peek_back() != "in" => self.path(),
                _ => self.at += 1,
            }
        }
        children
    }

    fn peek(&self, ahead: usize) -> &str {
        self.tokens.get(self.at + ahead).map_or("", |(token, _)| token)
    }

    fn peek_back(&self) -> &str {
        self.at.checked_sub(1).map_or("", |at| &self.tokens[at].0)
    }

    fn line(&self) -> usize {
        self.tokens[self.at.min(self.tokens.len() - 1)].1
    }

    /// Whether an attribute begins here that leaves the next item to tests or fuzzing.
    fn is_for_tests(&self) -> bool {
        let attribute: Vec<&str> =
            self.tokens[self.at..].iter().map(|(token, _)| token.as_str()).take_while(|token| *token != "]").collect();
        let enabled = |place: usize| attribute[place.saturating_sub(2)] != "not";
        attribute.get(2) == Some(&"cfg")
            && attribute.iter().enumerate().any(|(place, token)| matches!(*token, "test" | "fuzzing") && enabled(place))
    }

    /// To the end of an item: a semicolon, or the block that it ends with.
    fn skip_item(&mut self) {
        let mut depth = 0_usize;
        while self.at < self.tokens.len() {
            let token = self.peek(0);
            let ends = match token {
                "{" | "(" | "[" => {
                    depth += 1;
                    false
                }
                "}" | ")" | "]" => {
                    depth = depth.saturating_sub(1);
                    depth == 0 && token == "}"
                }
                ";" => depth == 0,
                _ => false,
            };
            self.at += 1;
            if ends {
                return;
            }
        }
    }

    /// A path that is written out where it is used.
    fn path(&mut self) {
        let line = self.line();
        let mut path = Vec::new();
        loop {
            path.push(self.peek(0).to_owned());
            self.at += 1;
            if self.peek(0) != "::" || !is_name(self.peek(1)) {
                break;
            }
            self.at += 1;
        }
        self.find(&path, None, line);
    }

    /// What follows `use`, from `prefix` on.
    fn use_tree(&mut self, prefix: &[String]) {
        let mut path = prefix.to_vec();
        let line = self.line();
        loop {
            match self.peek(0) {
                "{" => {
                    self.at += 1;
                    while !matches!(self.peek(0), "}" | "") {
                        self.use_tree(&path);
                        if self.peek(0) == "," {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                "::" => self.at += 1,
                "," | ";" | "}" | "" | "as" => break,
                segment => {
                    path.push(segment.to_owned());
                    self.at += 1;
                }
            }
        }
        if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
            path.pop();
        }
        let mut name = path.last().cloned();
        if self.peek(0) == "as" {
            name = Some(self.peek(1).to_owned());
            self.at += 2;
        }
        self.find(&path, name, line);
    }

    fn find(&mut self, path: &[String], name: Option<String>, line: usize) {
        let mut absolute = match path[0].as_str() {
            "crate" | "lictor" => Vec::new(),
            _ => self.module.clone(),
        };
        for segment in path {
            match segment.as_str() {
                "crate" | "lictor" | "self" | "*" => {}
                "super" => drop(absolute.pop()),
                _ => absolute.push(segment.clone()),
            }
        }
        self.found.push(Found { path: absolute, name, line });
    }
}

fn is_name(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

fn path_of(module: &str) -> Vec<String> {
    if module == "lib" { Vec::new() } else { module.split("::").map(String::from).collect() }
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

fn is_within(module: &str, folder: &str) -> bool {
    module.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The words and signs of Rust source with their lines, without comments and literals.
fn tokens(text: &str) -> Vec<(String, usize)> {
    let mut tokens = Vec::new();
    let (mut rest, mut line) = (text, 1);
    while let Some(first) = rest.chars().next() {
        let length = literal(rest).unwrap_or_else(|| {
            let length = if is_name(rest) {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            if !first.is_whitespace() {
                tokens.push((rest[..length].to_owned(), line));
            }
            length
        });
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    tokens
}

/// The length of the comment, string, character or lifetime that a text begins with.
fn literal(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    if text.starts_with("/*") {
        return Some(text.find("*/").map_or(text.len(), |end| end + 2));
    }
    let plain = text.strip_prefix('b').or(text.strip_prefix('c')).unwrap_or(text);
    let begun = text.len() - plain.len();
    if let Some(raw) = plain.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let inner = begun + 2 + hashes;
            return Some(text[inner..].find(&end).map_or(text.len(), |at| inner + at + end.len()));
        }
    }
    if plain.starts_with('"') {
        return Some(begun + quoted(plain, '"'));
    }
    if let Some(inner) = plain.strip_prefix('\'') {
        let is_character = inner.starts_with('\\') || inner.chars().nth(1) == Some('\'');
        return Some(if is_character { begun + quoted(plain, '\'') } else { 1 });
    }
    None
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}
