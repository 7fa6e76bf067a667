//! How what the parts of the proxy report becomes an outcome.

use std::fmt::Display;

pub(crate) use crate::observe::{Fault, Outcome};

use super::codec::pool::{Failed, NoConnection};
use super::limits::Overflow;

/// For a request to `whom` that brought no response.
pub(crate) fn no_response(whom: impl Display, failed: &Failed) -> Fault {
    let cause = failed.describe();
    if failed.is_malformed() {
        return Fault::new(Outcome::BadResponse, format!("{whom} answered what is not to be passed on: {cause}"));
    }
    Fault::new(Outcome::Reset, format!("{whom} broke off: {cause}"))
}

impl From<Overflow> for Fault {
    fn from(overflow: Overflow) -> Self {
        Self::new(Outcome::Overflow, overflow.to_string())
    }
}

impl From<NoConnection> for Fault {
    fn from(why: NoConnection) -> Self {
        match why {
            NoConnection::Overflow(overflow) => overflow.into(),
            NoConnection::Unreachable(error) => Self::new(Outcome::Unreachable, error.to_string()),
        }
    }
}
