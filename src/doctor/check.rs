//! Checks and their findings.

use std::fmt;

use crate::consul::{self, Answer};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok,
    Warn,
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    pub level: Level,
    /// The sidecar that it is about; `None` for the host and the agent.
    pub about: Option<String>,
    /// The thing that was checked.
    pub name: String,
    /// The finding: one clause.
    pub found: String,
    /// The next step for the operator; `None` where nothing is wrong.
    pub next: Option<String>,
}

impl Level {
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One line.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<4}  ", self.level.word())?;
        if let Some(about) = &self.about {
            write!(f, "{about}: ")?;
        }
        write!(f, "{}: {}", self.name, self.found)?;
        self.next.iter().try_for_each(|next| write!(f, " -> {next}"))
    }
}

/// Gathers checks.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) checks: Vec<Check>,
    /// The sidecar that those to come are about.
    pub(super) about: Option<String>,
}

impl Findings {
    pub(super) fn ok(&mut self, name: impl Into<String>, found: impl Into<String>) {
        self.add(Level::Ok, name, found, None);
    }

    pub(super) fn warn(&mut self, name: impl Into<String>, found: impl Into<String>, next: impl Into<String>) {
        self.add(Level::Warn, name, found, Some(next.into()));
    }

    pub(super) fn fail(&mut self, name: impl Into<String>, found: impl Into<String>, next: impl Into<String>) {
        self.add(Level::Fail, name, found, Some(next.into()));
    }

    /// Something whose error says itself what to do.
    pub(super) fn failed(&mut self, name: impl Into<String>, error: impl fmt::Display) {
        self.add(Level::Fail, name, error.to_string(), None);
    }

    fn add(&mut self, level: Level, name: impl Into<String>, found: impl Into<String>, next: Option<String>) {
        let (about, name, found) = (self.about.clone(), name.into(), found.into());
        self.checks.push(Check { level, about, name, found, next });
    }
}

/// The value of an answer, or a check that failed. `found` says what was answered.
pub(super) fn check_answer<T>(
    name: impl Into<String>,
    answer: Result<Answer<T>, consul::Error>,
    findings: &mut Findings,
    found: impl FnOnce(&T) -> String,
) -> Option<T> {
    match answer {
        Ok(answer) => {
            let found = found(&answer.value);
            findings.ok(name, found);
            Some(answer.value)
        }
        // Newer agents say themselves what is missing, in words that the older ones lack.
        Err(error) if error.is_forbidden() && !error.needs().is_empty() => {
            let next = format!("give the token {}", error.needs());
            findings.fail(name, error.to_string(), next);
            None
        }
        Err(error) => {
            findings.failed(name, error);
            None
        }
    }
}
