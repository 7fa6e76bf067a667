//! Draining is a value: a [`Trigger`] that starts it, and clones of a [`Watch`] held by every task that
//! must finish first. Drained means that every watch is dropped.
//!
//! The same pair stops one listener and the whole program. `tokio_util` counts what is open; its `CancellationToken` knows one stage and a
//! drain has two, so that the stage is a `watch`.

use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Makes a connected trigger and watch.
#[must_use]
pub fn channel() -> (Trigger, Watch) {
    let (stage, watched) = watch::channel(Stage::Running);
    let open = TaskTracker::new();
    let token = open.token();
    (Trigger { stage, open }, Watch { stage: watched, open: token })
}

/// How far a drain has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Running,
    /// Accept nothing new from the mesh, while the local app may go on connecting to it.
    DrainingInbound,
    /// Accept nothing new and let what is open finish.
    Draining,
    /// Close what is still open.
    Closing,
}

/// Starts a drain and learns when it is over.
#[derive(Debug)]
pub struct Trigger {
    stage: watch::Sender<Stage>,
    /// Counts the watches.
    open: TaskTracker,
}

/// Held by everything that a drain has to wait for.
#[derive(Debug, Clone)]
pub struct Watch {
    stage: watch::Receiver<Stage>,
    open: TaskTrackerToken,
}

/// Is waited for without learning of the stages.
#[derive(Debug)]
pub struct Open {
    _token: TaskTrackerToken,
}

/// Learns of the stages without being waited for.
#[derive(Debug, Clone)]
pub struct Observer(watch::Receiver<Stage>);

impl Trigger {
    /// Tells every watch that the drain has reached `stage`; it never goes back.
    pub fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let forward = stage > *now;
            *now = (*now).max(stage);
            forward
        });
    }

    /// How far the drain has come, now and later; it is not waited for.
    #[must_use]
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Ends when every watch is dropped.
    pub async fn drained(&self) {
        self.open.close();
        self.open.wait().await;
    }
}

impl Watch {
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer(self.stage.clone())
    }

    #[must_use]
    pub fn into_open(self) -> Open {
        Open { _token: self.open }
    }
}

impl Observer {
    /// Ends when the drain has reached `stage` or gone past it. A trigger that was dropped counts as
    /// [`Stage::Closing`]: no task is left that could wait for us.
    pub async fn reached(&mut self, stage: Stage) {
        let _ = self.0.wait_for(|now| *now >= stage).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drained_waits_for_every_watch_and_for_no_observer() {
        let (trigger, watch) = channel();
        let second = watch.clone();
        let (mut first_stage, mut second_stage) = (watch.observer(), watch.observer());
        trigger.advance(Stage::Draining);
        first_stage.reached(Stage::Draining).await;
        drop(watch);
        let holder = tokio::spawn(async move {
            second_stage.reached(Stage::Closing).await;
            drop(second);
        });
        trigger.advance(Stage::Closing);
        trigger.advance(Stage::Draining);
        trigger.drained().await;
        holder.await.unwrap();
    }
}
