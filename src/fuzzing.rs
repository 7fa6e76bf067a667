//! What must hold for whatever strangers, peers and agents send: one function for each target in `fuzz/`.
//!
//! A function takes any bytes and panics where something does not hold. They are here rather than in `fuzz/`, because
//! what they check is private. They also run over the corpora of the targets as an ordinary test.

pub use crate::access_log::fuzzing::log_format;
pub use crate::control::fuzzing::agent;
pub use crate::jwt::fuzzing::jwt;
pub use crate::proxy::fuzzing::{blocks, strict, tunnel};
pub use crate::snapshot::fuzzing::path;
pub use crate::tls::fuzzing::{certificate, tls_wire};

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        fs::read_dir(corpus).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
    }

    /// The target of that name holds for each of its corpus.
    macro_rules! corpora {
        ($($target:ident,)*) => {$(
            #[test]
            fn $target() {
                let inputs = corpus(stringify!($target));
                assert!(inputs.len() > 3, "the corpus is there");
                inputs.iter().for_each(|input| super::$target(input));
            }
        )*};
    }

    corpora! { agent, blocks, certificate, jwt, log_format, strict, tls_wire, tunnel, }

    /// What is put together from parts of the corpus gets round no rule either.
    #[test]
    fn path() {
        let text = |input: Vec<u8>| String::from_utf8(input).unwrap();
        let targets: Vec<String> = corpus("path")
            .into_iter()
            .flat_map(|input| text(input).lines().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        assert!(targets.len() > 50);
        for target in &targets {
            super::path(target.as_bytes());
            for other in &targets {
                super::path(format!("{target}{other}").as_bytes());
                super::path(format!("{target}{}", other.trim_start_matches('/')).as_bytes());
            }
        }
    }
}
