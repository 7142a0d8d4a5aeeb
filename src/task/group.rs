//! The owner of spawned tasks. The only place that spawns.

use std::future::Future;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A set of tasks with one owner; clones are handles on the same set.
#[derive(Clone, Debug, Default)]
pub struct Group {
    tracker: TaskTracker,
    cut: CancellationToken,
}

impl Group {
    /// Spawns onto the runtime of the calling thread. The task ends at its own end or at [`Group::cut`].
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let cut = self.cut.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Spawns onto a given runtime.
    pub fn spawn_on(&self, work: impl Future<Output = ()> + Send + 'static, runtime: &tokio::runtime::Handle) {
        let _inside = runtime.enter();
        self.spawn(work);
    }

    /// How many tasks are running.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Waits until every task has ended; spawn none meanwhile.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Ends every task at its next wait.
    pub fn cut(&self) {
        self.cut.cancel();
    }
}
