//! A request as it is written on a command line.

use anyhow::bail;
use clap::Args;

#[derive(Debug, Args)]
pub(super) struct RequestArgs {
    /// A header of the request. May be repeated.
    #[arg(long, short = 'H', value_name = "name: value")]
    header: Vec<String>,
    words: Vec<String>,
}

impl RequestArgs {
    /// Method and path; `None` where neither was written.
    ///
    /// # Errors
    /// When there is something else.
    pub(super) fn line(&self) -> anyhow::Result<Option<(String, String)>> {
        let is_path = |word: &String| word.starts_with('/') || word == "*";
        let is_method = |word: &String| word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        Ok(match self.words.as_slice() {
            [] if self.header.is_empty() => None,
            [] => Some(("GET".to_owned(), "/".to_owned())),
            [path] if is_path(path) => Some(("GET".to_owned(), path.clone())),
            [method] if is_method(method) => Some((method.clone(), "/".to_owned())),
            [method, path] if is_method(method) && is_path(path) => Some((method.clone(), path.clone())),
            words => bail!("{:?} is no request: write a method and a path, as in GET /x?y=1", words.join(" ")),
        })
    }

    /// One a line.
    pub(super) fn headers(&self) -> String {
        self.header.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_method_and_a_path() {
        let line = |words: &str, headers: &[&str]| {
            let words = words.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
            RequestArgs { header: headers.iter().map(ToString::to_string).collect(), words }.line()
        };
        let of = |method: &str, path: &str| Some((method.to_owned(), path.to_owned()));
        assert_eq!(line("", &[]).unwrap(), None);
        assert_eq!(line("", &["a: b"]).unwrap(), of("GET", "/"));
        assert_eq!(line("/x", &[]).unwrap(), of("GET", "/x"));
        assert_eq!(line("PUT", &[]).unwrap(), of("PUT", "/"));
        assert_eq!(line("M-SEARCH *", &[]).unwrap(), of("M-SEARCH", "*"));
        for bad in ["/x GET", "GET x", "GET /x y"] {
            assert!(line(bad, &[]).unwrap_err().to_string().contains("write a method and a path"));
        }
    }
}
