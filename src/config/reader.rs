//! Flags and variables of the environment, read with their names for errors.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::{flags, values};

/// A value with the flag or variable that it came from.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) value: String,
    pub(super) from: String,
}

/// Brings flags and environment together.
pub(super) struct Reader<'a> {
    pub(super) environment: &'a dyn Fn(&str) -> Option<OsString>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(environment: &'a dyn Fn(&str) -> Option<OsString>, ignored: BTreeSet<&'static str>) -> Self {
        let warn = |name| format!("the flag -{name} has no meaning for lictor and is ignored");
        Self { environment, warnings: ignored.into_iter().map(warn).collect() }
    }

    pub(super) fn number(
        &self,
        flag: &str,
        value: Option<String>,
        allowed: std::ops::RangeInclusive<usize>,
    ) -> anyhow::Result<Option<usize>> {
        let Some(Given { value, from }) = self.given(flag, value)? else { return Ok(None) };
        let number = value.parse().ok().filter(|number| allowed.contains(number));
        let (least, most) = (allowed.start(), allowed.end());
        Ok(Some(number.with_context(|| format!("{from}: {value:?} is not a number from {least} to {most}"))?))
    }

    /// The flag's value, else its variable's. An empty one counts as not given, as it does in Consul.
    pub(super) fn given(&self, flag: &str, value: Option<String>) -> anyhow::Result<Option<Given>> {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            return Ok(Some(Given { value, from: format!("-{flag}") }));
        }
        let Some(name) = flags::variable_of(flag) else { return Ok(None) };
        Ok(self.variable(name)?.map(|value| Given { value, from: name.to_owned() }))
    }

    pub(super) fn variable(&self, name: &str) -> anyhow::Result<Option<String>> {
        let Some(value) = (self.environment)(name).filter(|value| !value.is_empty()) else { return Ok(None) };
        value.into_string().map(Some).map_err(|_| anyhow::anyhow!("the variable {name} is not UTF-8"))
    }

    /// Consul takes what it cannot read as false: without TLS, or without verification. We do not go on like that.
    pub(super) fn boolean(&self, name: &str) -> anyhow::Result<Option<bool>> {
        let Some(value) = self.variable(name)? else { return Ok(None) };
        let read = values::boolean(&value);
        Ok(Some(read.with_context(|| format!("could not parse {name}: {value:?} is neither true nor false"))?))
    }
}

/// Reads one byte, since a directory can be opened, but not read.
pub(super) fn readable(what: &str, given: &Given, remedy: &str) -> anyhow::Result<PathBuf> {
    let path = Path::new(&given.value);
    let read = fs::File::open(path).and_then(|mut file| file.read(&mut [0]));
    read.map_err(|error| unreadable(what, given, &error, remedy))?;
    Ok(path.to_owned())
}

pub(super) fn readable_directory(given: &Given) -> anyhow::Result<PathBuf> {
    let path = Path::new(&given.value);
    let remedy = "name a directory of PEM files that this user may read, or leave it out";
    fs::read_dir(path).map_err(|error| unreadable("CA directory", given, &error, remedy))?;
    Ok(path.to_owned())
}

pub(super) fn unreadable(what: &str, given: &Given, error: &io::Error, remedy: &str) -> anyhow::Error {
    let Given { value, from } = given;
    anyhow::anyhow!("cannot read the {what} {value} of {from} ({error}); {remedy}")
}
