//! State of the queries to the agent.

/// All that the agent is asked, at one instant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AgentNow {
    /// The address of the agent.
    pub address: String,
    /// Requests that may be under way at one time.
    pub connections: usize,
    /// Whether this host's connections to the agent have been enough of late: `enough`, `crowded`, `scarce`.
    pub room: &'static str,
    pub queries: Vec<AgentQuery>,
    /// Requests that are over, by kind and result.
    pub requests: Vec<(&'static str, &'static str, u64)>,
    /// Requests under way, most of which block.
    pub requests_active: u64,
}

/// One query that is kept up to date. Times are seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AgentQuery {
    /// In words, as in `discovery chain of db`.
    pub what: String,
    /// Method and path.
    pub request: String,
    /// One of a few.
    pub kind: &'static str,
    /// How a change is noticed: `blocks`, `table`, `periodic`.
    pub how: &'static str,
    /// The table whose watch notices a change, as in `instances`.
    pub table: Option<String>,
    /// State of the query: `blocked`, `asking`, `waiting`.
    pub state: &'static str,
    /// Since the request under way was sent.
    pub under_way: Option<f64>,
    /// How long the request under way may block.
    pub blocks_for: Option<f64>,
    /// It blocks for a moment only, as others have a turn.
    pub rotates: bool,
    /// Until it is asked again.
    pub next: Option<f64>,
    /// Since the last answer that could be used.
    pub age: Option<f64>,
    /// Of that answer.
    pub index: Option<u64>,
    /// The origin of the answer: `agent`, `agent_cache`, `servers`.
    pub answered_by: Option<&'static str>,
    pub is_failing: bool,
    /// The last failure, and how long ago it was.
    pub error: Option<(String, f64)>,
    pub requests: u64,
    pub errors: u64,
}

impl AgentNow {
    /// The oldest last answer of each kind, of those that were answered.
    #[must_use]
    pub fn ages(&self) -> Vec<(&'static str, f64)> {
        let mut ages: Vec<(&'static str, f64)> = Vec::new();
        for query in &self.queries {
            let Some(age) = query.age else { continue };
            match ages.iter_mut().find(|(kind, _)| *kind == query.kind) {
                Some((_, oldest)) => *oldest = oldest.max(age),
                None => ages.push((query.kind, age)),
            }
        }
        ages
    }

    /// How many queries of each kind there are, and how many of them fail.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, u64, u64)> {
        let mut counts: Vec<(&'static str, u64, u64)> = Vec::new();
        for query in &self.queries {
            let failing = u64::from(query.is_failing);
            match counts.iter_mut().find(|(kind, ..)| *kind == query.kind) {
                Some((_, all, bad)) => (*all, *bad) = (*all + 1, *bad + failing),
                None => counts.push((query.kind, 1, failing)),
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_oldest_answer_of_their_queries() {
        let query = |kind, age, is_failing| AgentQuery { kind, age, is_failing, ..AgentQuery::default() };
        let queries = vec![
            query("chain", Some(3.0), false),
            query("chain", Some(7.0), true),
            query("chain", None, false),
            query("leaf", None, true),
        ];
        let now = AgentNow { queries, ..AgentNow::default() };
        assert_eq!(now.ages(), [("chain", 7.0)]);
        assert_eq!(now.counts(), [("chain", 3, 1), ("leaf", 1, 1)]);
    }
}
