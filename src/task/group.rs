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
        // Boxed: what a block captures and then moves is in its state twice, and the state is copied at each move.
        let (cut, mut work) = (self.cut.clone(), Box::pin(work));
        self.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = &mut work => {}
            }
        });
    }

    /// Spawns a part of something that cannot go on without it: `whole` is cancelled once the part ends, also by a panic.
    pub fn spawn_part(&self, whole: &CancellationToken, part: impl Future<Output = ()> + Send + 'static) {
        let ends = whole.clone().drop_guard();
        self.spawn(async move {
            part.await;
            drop(ends);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_part_is_the_end_of_the_whole_however_it_comes() {
        let (tasks, stays) = (Group::default(), CancellationToken::new());
        tasks.spawn_part(&stays, std::future::pending());
        for part in
            [Box::pin(async {}) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>, Box::pin(async { panic!() })]
        {
            let whole = CancellationToken::new();
            tasks.spawn_part(&whole, part);
            whole.cancelled().await;
        }
        assert!(!stays.is_cancelled());
        tasks.cut();
        stays.cancelled().await;
    }
}
