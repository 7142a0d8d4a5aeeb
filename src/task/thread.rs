//! Threads with a runtime of their own.

use std::future::Future;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// How long work beside a runtime may take after the runtime has ended.
const BESIDE_GRACE: Duration = Duration::from_secs(1);

/// Runs `work`, which takes a while, beside the runtime; `None` where it panics.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

/// Runs `work`, which may block, on a thread of its own; who keeps the handle owns it.
pub fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(work)
}

/// A thread of its own for work that nothing else may hold up; ends its work when dropped.
#[derive(Debug)]
pub struct Dedicated {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Dedicated {
    /// Starts the thread; `work` makes, on it, the future that it runs until dropped.
    pub fn start<F>(name: &str, work: impl FnOnce() -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()>,
    {
        let stop = CancellationToken::new();
        let told = stop.clone();
        let (_, thread) = start(name.into(), move || async move {
            tokio::select! { () = told.cancelled() => {}, () = work() => {} }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Dedicated {
    fn drop(&mut self) {
        self.stop.cancel();
        // A thread that panicked has nothing left to end.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Starts a thread named `name` with a single-threaded runtime that runs `main` to its end.
pub fn start<F>(name: String, main: impl FnOnce() -> F + Send + 'static) -> io::Result<(Handle, JoinHandle<()>)>
where
    F: Future<Output = ()>,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        runtime.block_on(async move { main().await });
        // What was begun beside it and hangs does not keep the process from ending.
        runtime.shutdown_timeout(BESIDE_GRACE);
    })?;
    Ok((handle, thread))
}
