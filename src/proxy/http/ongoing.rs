//! A request that is under way, as the connection sees it that it came on.
//!
//! A codec polls neither the answer's body nor anything else of ours while the client takes nothing. So whoever drives
//! the codec looks at this beside it, and ends what must end: what has taken too long, whichever side stands still,
//! and what is denied now.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use super::deadlines::{Deadlines, TimedOut};
use super::message::Head;
use crate::proxy::authorization::Judged;
use crate::proxy::codec::replay_body::BodyProgress;
use crate::proxy::codec::server::Watch;

/// One request with its answer. Clones are the same.
#[derive(Clone)]
pub(crate) struct Ongoing(Arc<Mutex<State>>);

struct State {
    upload: Option<BodyProgress>,
    /// Since there is an answer. Before, whoever waits for that has it.
    deadlines: Option<Deadlines>,
    /// The request, for a new decision when the intentions change.
    case: Option<Case>,
    over: Option<Over>,
    /// There is nothing left to end.
    done: bool,
    /// A denial can be sent to the client in trailers.
    grpc: bool,
    task: Option<Waker>,
}

/// The parts of a request that a new decision needs.
pub(crate) struct Case {
    pub head: Head,
    pub judged: Judged,
}

/// Why a request is ended before it has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    TimedOut(TimedOut),
    /// Its source may not have it any more.
    Denied,
}

impl Ongoing {
    #[must_use]
    pub(crate) fn new(upload: Option<BodyProgress>, grpc: bool) -> Self {
        let state = State { upload, deadlines: None, case: None, over: None, done: false, grpc, task: None };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The request's body, if there is anything in it.
    #[must_use]
    pub(crate) fn upload(&self) -> Option<BodyProgress> {
        self.state().upload.clone()
    }

    /// From here on it can be judged again.
    pub(crate) fn keep_case(&self, case: Case) {
        self.state().case = Some(case);
    }

    /// It is to be judged by another from here on.
    #[must_use]
    pub(crate) fn take_case(&self) -> Option<Case> {
        self.state().case.take()
    }

    /// There is an answer, whose body has these deadlines.
    pub(crate) fn answered(&self, deadlines: Option<Deadlines>) {
        self.state().deadlines = deadlines;
    }

    /// Something of the answer was taken.
    pub(crate) fn progress(&self) {
        if let Some(deadlines) = &mut self.state().deadlines {
            deadlines.progress();
        }
    }

    /// The answer is over.
    pub(crate) fn done(&self) {
        let mut state = self.state();
        state.done = true;
        let left = (state.deadlines.take(), state.case.take(), state.upload.take());
        drop(state);
        drop(left);
    }

    #[must_use]
    pub(crate) fn is_done(&self) -> bool {
        self.state().done
    }

    /// Whether it must end, and why.
    #[must_use]
    pub(crate) fn over(&self) -> Option<Over> {
        self.state().over
    }

    /// Whether that is to be sent in trailers of gRPC.
    #[must_use]
    pub(crate) fn ends_in_trailers(&self) -> bool {
        self.state().grpc
    }

    /// Waits for `act` unless the request must end first.
    ///
    /// # Errors
    /// Why it must.
    pub(crate) async fn unless_over<F: Future>(&self, act: F) -> Result<F::Output, Over> {
        let mut act = pin!(act);
        poll_fn(|cx| match self.over() {
            // What is ended fails in other ways too, for it has lost its upload.
            Some(over) => Poll::Ready(Err(over)),
            None => act.as_mut().poll(cx).map(Ok),
        })
        .await
    }

    /// Ends it, by whoever drives its codec.
    fn end(&self, over: Over) {
        let (upload, task) = {
            let mut state = self.state();
            if state.done || state.over.is_some() {
                return;
            }
            state.over = Some(over);
            (state.upload.clone(), state.task.take())
        };
        if let Some(upload) = upload {
            upload.cut();
        }
        if let Some(task) = task {
            task.wake();
        }
    }

    /// Ready once it must end. The polling task is woken when that changes.
    pub(crate) fn poll_over(&self, cx: &mut Context<'_>) -> Poll<()> {
        let expired = {
            let mut state = self.state();
            if state.done {
                return Poll::Pending;
            }
            if state.over.is_some() {
                return Poll::Ready(());
            }
            match &mut state.task {
                Some(task) => task.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            let Some(deadlines) = &mut state.deadlines else { return Poll::Pending };
            deadlines.poll_expired(cx)
        };
        expired.map(|expired| self.end(Over::TimedOut(expired)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests of one connection that are under way and can be judged again.
#[derive(Default)]
pub(crate) struct Open(Mutex<Vec<Weak<Mutex<State>>>>);

impl Open {
    pub(crate) fn add(&self, ongoing: &Ongoing) {
        let mut list = self.list();
        if list.len() == list.capacity() {
            list.retain(|open| open.strong_count() > 0);
        }
        list.push(Arc::downgrade(&ongoing.0));
    }

    /// Ends those that `is_denied` says it of.
    pub(crate) fn end_denied(&self, mut is_denied: impl FnMut(&mut Case) -> bool) {
        let open: Vec<Ongoing> = self.list().iter().filter_map(Weak::upgrade).map(Ongoing).collect();
        for ongoing in open {
            let denied = ongoing.state().case.as_mut().is_some_and(&mut is_denied);
            if denied {
                ongoing.end(Over::Denied);
            }
        }
    }

    fn list(&self) -> MutexGuard<'_, Vec<Weak<Mutex<State>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for Ongoing {
    fn poll_over(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_over(cx)
    }

    fn is_done(&self) -> bool {
        self.is_done()
    }
}
