//! Draining is a value you hold: a [`Trigger`] that starts it, and clones of a [`Watch`] held by whatever
//! must finish first. Drained means that every watch is dropped.
//!
//! The same pair stops one listener and the whole program.

use tokio::sync::{mpsc, watch};

/// Makes a connected trigger and watch.
#[must_use]
pub fn channel() -> (Trigger, Watch) {
    let (stage, watched) = watch::channel(Stage::Running);
    let (alive, dropped) = mpsc::channel(1);
    (Trigger { stage, dropped }, Watch { stage: watched, _alive: alive })
}

/// How far a drain has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Running,
    /// Accept nothing new and let what is open finish.
    Draining,
    /// Close what is still open.
    Closing,
}

/// Starts a drain and learns when it is over.
#[derive(Debug)]
pub struct Trigger {
    stage: watch::Sender<Stage>,
    dropped: mpsc::Receiver<()>,
}

/// Held by everything that a drain has to wait for.
#[derive(Debug, Clone)]
pub struct Watch {
    stage: watch::Receiver<Stage>,
    _alive: mpsc::Sender<()>,
}

impl Trigger {
    /// Tells every watch that the drain has reached `stage`; it never goes back.
    pub fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let forward = stage > *now;
            *now = (*now).max(stage);
            forward
        });
    }

    /// Ends when every watch is dropped.
    pub async fn drained(&mut self) {
        while self.dropped.recv().await.is_some() {}
    }
}

impl Watch {
    /// The stage of this moment.
    #[must_use]
    pub fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Ends when the drain has reached `stage` or gone past it. A trigger that was dropped counts as
    /// [`Stage::Closing`]: nobody is left who could wait for us.
    pub async fn reached(&mut self, stage: Stage) {
        let _ = self.stage.wait_for(|now| *now >= stage).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drained_waits_for_every_watch() {
        let (mut trigger, watch) = channel();
        let mut second = watch.clone();
        trigger.advance(Stage::Draining);
        second.reached(Stage::Draining).await;
        assert_eq!(watch.stage(), Stage::Draining);
        drop(watch);
        let holder = tokio::spawn(async move { second.reached(Stage::Closing).await });
        trigger.advance(Stage::Closing);
        trigger.advance(Stage::Draining);
        trigger.drained().await;
        holder.await.unwrap();
    }
}
