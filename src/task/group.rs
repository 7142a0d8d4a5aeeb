//! Groups of tasks: the owner of every spawned task.

use std::future::Future;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// A set of tasks with one owner. Clones are handles on the same set.
#[derive(Clone, Debug, Default)]
pub struct Group {
    tracker: TaskTracker,
    cut: CancellationToken,
}

impl Group {
    /// Spawns a task on the runtime of the calling thread. It runs to its end, or until [`Group::cut`].
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

    /// Spawns a task on a given runtime.
    pub fn spawn_on(&self, work: impl Future<Output = ()> + Send + 'static, runtime: &tokio::runtime::Handle) {
        let _inside = runtime.enter();
        self.spawn(work);
    }

    /// Counts something as a task until the token is dropped, e.g. a connection that needs no task of its own.
    pub fn token(&self) -> TaskTrackerToken {
        self.tracker.token()
    }

    /// The number of running tasks.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Waits until every task has ended. No task may be spawned in the meantime.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Ends every task at its next await point.
    pub fn cut(&self) {
        self.cut.cancel();
    }
}
/// A connection's group is also where hyper spawns its tasks.
impl<F: Future + Send + 'static> hyper::rt::Executor<F> for Group {
    fn execute(&self, work: F) {
        self.spawn(async move {
            work.await;
        });
    }
}
