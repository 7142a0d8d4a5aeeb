//! The data path of a worker: it owns all tunnels of the worker and the sockets of the applications whose connections
//! they carry.
//!
//! One turn handles every socket that is ready: tunnels are read and their bytes go straight to the applications; then
//! each tunnel that has something to send is filled from the applications' sockets, sealed once and sent once. An idle
//! connection owns no buffer. Back-pressure comes from not reading.
//!
//! A turn is run by one task of the worker's runtime ([`Engine::run`]). Other tasks open and answer streams through
//! handles; they hold the lock only for that.

mod app;
mod backlog;
mod batch;
mod ended;
mod flush;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod rate;
mod streams;
mod tunnel;
mod work;

pub use app::Owner;
pub(super) use app::{App, State};
pub use ended::{CarryError, Ended, Rest};
pub(super) use tunnel::Tunnel;

use super::buffers::Account;
use super::config::Config;
use super::error::TunnelError;
use super::session::{Role, Session};
use super::tls::Handshaken;
use crate::sys::poller::{EVENTS_MAX, Poller, WatchedPoller, readiness, watch_poller};
use crate::sys::socket::reset_on_close;
use app::Carried;
use nix::sys::epoll::EpollEvent;
use parking_lot::Mutex;
use slab::Slab;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::TcpStream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;
use work::Work;

/// A handle to the data path of one worker. Clones share it.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engine")
    }
}

struct Shared {
    /// Only the worker's own thread takes it, so it is never waited for.
    inner: Mutex<Inner>,
    poller: Arc<Poller>,
    orders: Mutex<Orders>,
}

/// What tasks and other threads leave for the next turn.
#[derive(Default)]
struct Orders {
    waker: Option<Waker>,
    /// Connections that have to stop.
    stop: Vec<StreamId>,
}

/// A tunnel of an engine. The generation tells it apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TunnelId {
    index: usize,
    generation: u64,
}

/// A stream of a tunnel. The number of the stream tells it apart from a later one with the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamId {
    /// The tunnel.
    pub tunnel: TunnelId,
    /// The key in the tunnel's session.
    pub key: usize,
    /// The number of the stream.
    pub id: u32,
}

#[derive(Debug)]
struct Inner {
    tunnels: Slab<Entry>,
    work: Work,
    generation: u64,
}

#[derive(Debug)]
struct Entry {
    generation: u64,
    tunnel: Tunnel,
}

/// Tokens of the poller: the tunnel, and its stream plus one; 0 is the tunnel's own socket.
fn token(tunnel: usize, stream: Option<usize>) -> u64 {
    ((tunnel as u64) << 32) | stream.map_or(0, |key| key as u64 + 1)
}

/// The meaning of a token.
fn of_token(token: u64) -> (usize, Option<usize>) {
    let tunnel = usize::try_from(token >> 32).unwrap_or(usize::MAX);
    let stream = usize::try_from(token & 0xffff_ffff).unwrap_or(usize::MAX);
    (tunnel, stream.checked_sub(1))
}

/// Asks for another turn, once the runtime has looked at its other sockets and its timers. A task that wakes itself would
/// have dozens of turns before that.
fn again<T>(context: &mut Context<'_>) -> Poll<T> {
    let yielded = pin!(tokio::task::yield_now());
    // Its first poll hands the waker over.
    let _pending = yielded.poll(context);
    Poll::Pending
}

impl Engine {
    /// An engine without tunnels. `config` limits the windows of its streams.
    pub fn new(config: &Config) -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        let inner =
            Inner { tunnels: Slab::new(), work: Work::new(poller.clone(), config.stream_window), generation: 0 };
        let shared = Shared { inner: Mutex::new(inner), poller, orders: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Moves the bytes of all tunnels, for as long as it is awaited. Fails if the sockets cannot be watched.
    pub async fn run(&self) -> io::Result<()> {
        let watched = watch_poller(&self.shared.poller)?;
        let mut events = vec![EpollEvent::empty(); EVENTS_MAX];
        let mut timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        poll_fn(|context| self.poll_turn(context, &watched, &mut events, &mut timer)).await
    }

    fn poll_turn(
        &self,
        context: &mut Context<'_>,
        watched: &AsyncFd<WatchedPoller>,
        events: &mut [EpollEvent],
        timer: &mut Pin<Box<Sleep>>,
    ) -> Poll<io::Result<()>> {
        let mut done = false;
        loop {
            let ready = match watched.poll_read_ready(context) {
                Poll::Ready(ready) => Some(ready?),
                // The turn is done, and the waker is registered for the next one.
                Poll::Pending if done => return Poll::Pending,
                Poll::Pending => None,
            };
            let count = if ready.is_some() { self.shared.poller.take(events)? } else { 0 };
            let stop = {
                let mut orders = self.shared.orders.lock();
                if orders.waker.as_ref().is_none_or(|waker| !waker.will_wake(context.waker())) {
                    orders.waker = Some(context.waker().clone());
                }
                std::mem::take(&mut orders.stop)
            };
            let (finished, pending, deadline) = {
                let mut inner = self.shared.inner.lock();
                inner.turn(events.get(..count).unwrap_or_default(), stop);
                let pending = inner.work.is_pending();
                let deadline = inner.work.deadlines.first().map(|(at, _, _)| *at);
                (std::mem::take(&mut inner.work.finished), pending, deadline)
            };
            // Without the lock: owners close tunnels and begin tasks.
            for (owner, ended) in finished {
                owner.ended(ended);
            }
            if pending || count == events.len() {
                return again(context);
            }
            if let Some(at) = deadline {
                if timer.deadline() != at {
                    timer.as_mut().reset(at);
                }
                if timer.as_mut().poll(context).is_ready() {
                    return again(context);
                }
            }
            match ready {
                // All events were taken; a later one is reported again.
                Some(mut ready) => ready.clear_ready(),
                None => return Poll::Pending,
            }
            done = true;
        }
    }

    /// Wakes the task that runs the turns.
    fn wake(&self) {
        if let Some(waker) = &self.shared.orders.lock().waker {
            waker.wake_by_ref();
        }
    }

    /// Does something with a tunnel between two turns; `None` if it is gone. Owners of connections that end by it are
    /// told in the next turn.
    pub(super) fn with<T>(&self, id: TunnelId, act: impl FnOnce(&mut Tunnel, &mut Work) -> T) -> Option<T> {
        let mut inner = self.shared.inner.lock();
        let Inner { tunnels, work, .. } = &mut *inner;
        let entry = tunnels.get_mut(id.index).filter(|entry| entry.generation == id.generation)?;
        let result = act(&mut entry.tunnel, work);
        let is_pending = work.is_pending() || !work.finished.is_empty();
        drop(inner);
        if is_pending {
            self.wake();
        }
        Some(result)
    }

    /// Takes over a tunnel whose handshake is done.
    pub(super) fn add(
        &self,
        role: Role,
        handshaken: Handshaken,
        config: &Config,
        account: &Arc<Account>,
    ) -> io::Result<TunnelId> {
        let Handshaken { socket, tls, early, .. } = handshaken;
        let socket = socket.into_std()?;
        let mut inner = self.shared.inner.lock();
        inner.generation += 1;
        let Inner { tunnels, work, generation } = &mut *inner;
        let slot = tunnels.vacant_entry();
        let index = slot.key();
        self.shared.poller.add(&socket, token(index, None))?;
        let session = Session::new(role, config);
        let mut tunnel = Tunnel::new(index, socket, tls, session, account.clone(), early);
        tunnel.mark(work);
        tunnel.read_again(work);
        slot.insert(Entry { generation: *generation, tunnel });
        let id = TunnelId { index, generation: *generation };
        drop(inner);
        self.wake();
        Ok(id)
    }

    /// Removes a tunnel. Its connections end with `error` if it has not ended before.
    pub(super) fn remove(&self, id: TunnelId, error: TunnelError) {
        let removed = {
            let mut inner = self.shared.inner.lock();
            let Inner { tunnels, work, .. } = &mut *inner;
            let found = tunnels.get(id.index).is_some_and(|entry| entry.generation == id.generation);
            let mut removed = found.then(|| tunnels.try_remove(id.index)).flatten();
            if let Some(entry) = &mut removed {
                entry.tunnel.end_with(error, work);
            }
            removed
        };
        drop(removed);
        self.wake();
    }

    /// Ends everything at once, and drops the owners of all connections without telling them how it ended.
    pub fn cut(&self) {
        let (tunnels, finished) = {
            let mut inner = self.shared.inner.lock();
            inner.work.deadlines.clear();
            (std::mem::take(&mut inner.tunnels), std::mem::take(&mut inner.work.finished))
        };
        // Not an orderly end: an application must not take what it has for everything.
        for (_, Entry { tunnel, .. }) in &tunnels {
            tunnel.carried_sockets().for_each(reset_on_close);
        }
        finished.iter().filter(|(_, ended)| ended.result.is_err()).for_each(|(_, ended)| reset_on_close(&ended.app));
        drop((tunnels, finished));
    }

    /// Begins to carry an application's connection over a stream that has been accepted.
    pub(super) fn carry(&self, stream: StreamId, app: TcpStream, owner: Box<dyn Owner>, silence: Duration) {
        let mut carried = Some(Box::new(Carried::new(app, owner, silence)));
        let token = token(stream.tunnel.index, Some(stream.key));
        self.with(stream.tunnel, |tunnel, work| {
            if let Some(carried) = carried.take() {
                tunnel.carry(stream.key, carried, token, work);
            }
        });
        if let Some(carried) = carried {
            let Carried { socket, owner, .. } = *carried;
            let result = Err(CarryError::Tunnel(Arc::new(TunnelError::Closed)));
            self.shared.inner.lock().work.finished.push((owner, Ended { result, app: socket, rest: Rest::default() }));
            self.wake();
        }
    }

    /// Tells a connection to stop. It stops in the next turn.
    pub(super) fn stop(&self, stream: StreamId) {
        let mut orders = self.shared.orders.lock();
        // Bounded by the number of connections: each is told once.
        orders.stop.push(stream);
        if let Some(waker) = &orders.waker {
            waker.wake_by_ref();
        }
    }
}

impl Inner {
    fn turn(&mut self, events: &[EpollEvent], stop: Vec<StreamId>) {
        let Self { tunnels, work, .. } = self;
        work.begin();
        for event in events {
            let (index, stream) = of_token(event.data());
            let Some(Entry { tunnel, .. }) = tunnels.get_mut(index) else { continue };
            match stream {
                None => tunnel.note(readiness(event), work),
                Some(key) => tunnel.app_ready(key, readiness(event), work),
            }
        }
        for StreamId { tunnel, key, id } in stop {
            let entry = tunnels.get_mut(tunnel.index).filter(|entry| entry.generation == tunnel.generation);
            let Some(Entry { tunnel, .. }) = entry else { continue };
            if tunnel.session.get(key).is_some_and(|stream| stream.id == id) {
                tunnel.stop(key, work);
            }
        }
        if !work.deadlines.is_empty() {
            while let Some((index, key)) = work.passed(work.now) {
                if let Some(Entry { tunnel, .. }) = tunnels.get_mut(index) {
                    tunnel.overdue(key, work);
                }
            }
        }
        for _ in 0..work.again.len() {
            let Some(index) = work.again.pop_front() else { break };
            let Some(Entry { tunnel, .. }) = tunnels.get_mut(index) else { continue };
            tunnel.again = false;
            if let Err(error) = tunnel.read(work) {
                tunnel.end_with(error, work);
            }
            tunnel.book();
        }
        for _ in 0..work.marked.len() {
            let Some(index) = work.marked.pop_front() else { break };
            let Some(Entry { tunnel, .. }) = tunnels.get_mut(index) else { continue };
            tunnel.marked = false;
            if let Err(error) = tunnel.flush(work) {
                tunnel.end_after_reading(error, work);
            } else if tunnel.closing && tunnel.is_flushed() {
                tunnel.end_with(TunnelError::Closed, work);
            }
        }
    }
}

#[cfg(test)]
mod tests;
