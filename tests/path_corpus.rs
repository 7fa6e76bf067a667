//! The checks of the fuzz target, over its corpus and what can be put together from it.

#[path = "../fuzz/checks/path.rs"]
mod check;

use std::fs;
use std::path::Path;

#[test]
fn no_spelling_of_a_path_gets_round_a_rule() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/path");
    let files = fs::read_dir(corpus).unwrap().map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    let targets: Vec<String> = files.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    assert!(targets.len() > 50);
    for target in &targets {
        check::path(target);
        for other in &targets {
            check::path(&format!("{target}{other}"));
            check::path(&format!("{target}{}", other.trim_start_matches('/')));
        }
    }
}
