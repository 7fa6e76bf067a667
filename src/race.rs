//! Attempts of which one is to succeed: the next begins when one has failed, or is slow.
//!
//! Our own, as no crate in use races attempts that begin with a delay; tokio's `JoinSet` would need a task for each.
//!
//! For the instances of a target, and for the addresses of a name (RFC 8305, section 5).

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::timeout;

/// An attempt.
pub(crate) type Attempt<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// What to do after the start, a failure, or some time in which nothing came of what is under way.
pub(crate) enum Next<T, E> {
    /// Begin another attempt, and ask again after so long.
    Begin(Attempt<T, E>, Duration),
    /// Wait for those that are under way. Asked again when one of them has failed.
    Wait,
    /// Give up all attempts.
    Stop,
}

/// Attempts that are under way, in the order in which they began.
pub(crate) struct Race<T, E> {
    running: Vec<Attempt<T, E>>,
}

impl<T: 'static, E: 'static> Race<T, E> {
    #[must_use]
    pub(crate) fn new() -> Self {
        Self { running: Vec::new() }
    }

    /// Gives the first success. `next` gets each failure, and says how to go on. `None`: it said that there is no
    /// more, or nothing is left to wait for.
    pub(crate) async fn run(&mut self, mut next: impl FnMut(Option<E>) -> Next<T, E>) -> Option<T> {
        let mut failed = None;
        loop {
            let stagger = match next(failed.take()) {
                Next::Begin(attempt, stagger) => {
                    self.running.push(attempt);
                    Some(stagger)
                }
                Next::Wait => None,
                Next::Stop => return None,
            };
            if !self.is_on() {
                return None;
            }
            let ended = match stagger {
                Some(stagger) => timeout(stagger, self.first()).await.ok(),
                None => Some(self.first().await),
            };
            match ended {
                Some(Ok(won)) => return Some(won),
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
        }
    }

    /// Whether an attempt is under way.
    #[must_use]
    pub(crate) fn is_on(&self) -> bool {
        !self.running.is_empty()
    }

    /// Lets what is still under way come to its end in a task of its own, and tells `late` of each. Without that, the
    /// attempts end with the race.
    pub(crate) fn finish(mut self, mut late: impl FnMut(Result<T, E>) + Send + 'static) {
        tokio::spawn(async move {
            while self.is_on() {
                late(self.first().await);
            }
        });
    }

    /// Of those that are under way, the one that ends first. There must be one.
    async fn first(&mut self) -> Result<T, E> {
        poll_fn(|cx| {
            for (index, attempt) in self.running.iter_mut().enumerate() {
                if let Poll::Ready(ended) = attempt.as_mut().poll(cx) {
                    drop(self.running.remove(index));
                    return Poll::Ready(ended);
                }
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tokio::time::{Instant, sleep};

    use super::*;

    const STAGGER: Duration = Duration::from_millis(250);

    /// After so many milliseconds, a success or a failure.
    fn after(millis: u64, result: Result<&'static str, &'static str>) -> Attempt<&'static str, &'static str> {
        Box::pin(async move {
            sleep(Duration::from_millis(millis)).await;
            result
        })
    }

    /// The winner, the failures, and the milliseconds that it took.
    async fn race(
        attempts: Vec<Attempt<&'static str, &'static str>>,
    ) -> (Option<&'static str>, Vec<&'static str>, u128) {
        let (began, failures) = (Instant::now(), RefCell::new(Vec::new()));
        let mut attempts = attempts.into_iter();
        let next = |failed: Option<&'static str>| {
            failures.borrow_mut().extend(failed);
            match attempts.next() {
                _ if failed == Some("final") => Next::Stop,
                Some(attempt) => Next::Begin(attempt, STAGGER),
                None => Next::Wait,
            }
        };
        let won = Race::new().run(next).await;
        (won, failures.into_inner(), began.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_begins_when_one_fails_or_is_slow() {
        assert_eq!(race(vec![]).await, (None, vec![], 0));
        assert_eq!(race(vec![after(10, Ok("a")), after(0, Ok("b"))]).await, (Some("a"), vec![], 10));
        assert_eq!(race(vec![after(10, Err("a")), after(10, Ok("b"))]).await, (Some("b"), vec!["a"], 20));
        assert_eq!(race(vec![after(9_999, Ok("a")), after(10, Ok("b"))]).await, (Some("b"), vec![], 260));
        assert_eq!(race(vec![after(300, Ok("a")), after(100, Ok("b"))]).await, (Some("a"), vec![], 300));
        assert_eq!(race(vec![after(9_999, Err("a")), after(10, Err("b"))]).await, (None, vec!["b", "a"], 9_999));
        assert_eq!(race(vec![after(10, Err("final")), after(10, Ok("b"))]).await, (None, vec!["final"], 10));
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_late_is_told() {
        let mut race = Race::new();
        let mut attempts = vec![after(500, Err("c")), after(400, Ok("b")), after(260, Ok("a"))];
        let next = |_| attempts.pop().map_or(Next::Wait, |attempt| Next::Begin(attempt, STAGGER / 10));
        assert_eq!(race.run(next).await, Some("a"));
        let (sender, mut late) = tokio::sync::mpsc::unbounded_channel();
        race.finish(move |ended| {
            let _ = sender.send(ended);
        });
        assert_eq!((late.recv().await, late.recv().await, late.recv().await), (Some(Ok("b")), Some(Err("c")), None));
    }
}
