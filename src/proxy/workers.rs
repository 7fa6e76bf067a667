//! The threads of the data plane, each with a runtime of its own.
//!
//! A connection never leaves the thread that accepted it: no task is stolen, no wake-up crosses a core,
//! and the working memory of [`crate::tls::with_scratch`] is the thread's.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;

/// Running threads. Dropping them ends every task they have.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
    threads: Vec<thread::JoinHandle<()>>,
    stop: watch::Sender<()>,
}

impl Workers {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// When the system refuses a thread or its event queue.
    pub fn start(count: usize) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let mut workers = Self { handles: Vec::new(), threads: Vec::new(), stop };
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            workers.handles.push(runtime.handle().clone());
            let mut stopped = stopped.clone();
            let run = move || {
                NUMBER.set(number);
                runtime.block_on(async { while stopped.changed().await.is_ok() {} });
                // A name that is still being looked up in a thread of its own is not waited for.
                runtime.shutdown_background();
            };
            workers.threads.push(thread::Builder::new().name(format!("worker-{number}")).spawn(run)?);
        }
        Ok(workers)
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Runs `task` on a worker.
    pub fn spawn(&self, worker: usize, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(handle) = self.handles.get(worker % self.handles.len()) {
            handle.spawn(task);
        }
    }
}

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// The number of the worker that this thread is.
#[must_use]
pub(super) fn current() -> usize {
    NUMBER.get()
}

impl Drop for Workers {
    fn drop(&mut self) {
        // A new sender closes the old channel, which every thread waits for.
        self.stop = watch::channel(()).0;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
