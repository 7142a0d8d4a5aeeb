//! Threads: blocking work off the runtime, and threads with their own runtime.

use std::future::Future;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// How long blocking work may continue after its runtime has ended.
const BLOCKING_GRACE: Duration = Duration::from_secs(1);

/// Runs blocking or long `work` on the runtime's pool of blocking threads. Returns `None` if it panics.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

/// Runs `work`, which may block, on its own thread. The owner of the handle owns the thread.
pub fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(work)
}

/// Runs `work`, which may block, on its own thread of this name. The owner of the handle owns the thread.
pub fn named(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(work)
}

/// A thread reserved for work that nothing else may delay. Dropping it ends the work.
#[derive(Debug)]
pub struct Dedicated {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Dedicated {
    /// Starts the thread. `work` is called on it and returns the future that it runs until this is dropped.
    pub fn start<F>(name: &str, work: impl FnOnce() -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()>,
    {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (_, thread) = start(name.into(), move || async move {
            tokio::select! { () = stopped.cancelled() => {}, () = work() => {} }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Dedicated {
    fn drop(&mut self) {
        self.stop.cancel();
        // If the thread has panicked, its work has ended already.
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
        // Blocking work that hangs must not keep the process from ending.
        runtime.shutdown_timeout(BLOCKING_GRACE);
    })?;
    Ok((handle, thread))
}
