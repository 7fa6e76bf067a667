//! The receiver of a query's answers.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::mpsc;

use super::super::endpoint::Response;
use super::super::{Answer, Error};

/// An answer or failure of a query.
#[derive(Debug)]
pub enum Event<T> {
    /// The first value, or one that differs from the last.
    Value(Answer<T>),
    /// The agent could not be asked, or refused, or answered rubbish. The query goes on, and reports each failure.
    /// The last value is as good as it was.
    Failed(Error),
}

/// The receiver of events is gone.
pub(in crate::consul) struct Gone;

pub(super) type Sent = Pin<Box<dyn Future<Output = Result<(), Gone>> + Send>>;

/// The receiver of a query's answers.
pub(super) trait Sink: Send {
    /// Makes a value of an answer; what sends it, and whether the query's table notices all changes of it.
    fn decode(&self, response: &Response) -> Result<(Sent, bool), String>;

    fn failed(&self, error: Error) -> Sent;
}

pub(super) struct Typed<T, U, F> {
    pub(super) decode: fn(&Response) -> Result<T, String>,
    pub(super) covered: fn(&T) -> bool,
    pub(super) events: mpsc::Sender<U>,
    pub(super) wrap: F,
}

impl<T, U: Send + 'static, F> Typed<T, U, F> {
    fn send(&self, event: U) -> Sent {
        let events = self.events.clone();
        Box::pin(async move { events.send(event).await.map_err(|_| Gone) })
    }
}

impl<T, U, F> Sink for Typed<T, U, F>
where
    T: Send + 'static,
    U: Send + 'static,
    F: Fn(Event<T>) -> U + Send + 'static,
{
    fn decode(&self, response: &Response) -> Result<(Sent, bool), String> {
        let value = (self.decode)(response)?;
        let covered = (self.covered)(&value);
        let event = (self.wrap)(Event::Value(Answer { value, filtered_by_acls: response.filtered_by_acls }));
        Ok((self.send(event), covered))
    }

    fn failed(&self, error: Error) -> Sent {
        self.send((self.wrap)(Event::Failed(error)))
    }
}
