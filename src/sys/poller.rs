//! An epoll set of its own, which a runtime watches like one more socket.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Events that are taken at once.
pub const EVENTS_MAX: usize = 256;

/// What a socket reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// Bytes, an end or an error can be read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other side has ended, in order or not: reads go on until they return 0 or an error.
    pub hung_up: bool,
    /// The connection has broken.
    pub broken: bool,
}

/// An epoll set.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Adds a socket. Each change of its readiness is reported once, with `token`.
    pub fn add(&self, socket: &impl AsFd, token: u64) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(socket, EpollEvent::new(flags, token))?)
    }

    /// Removes a socket that is kept open. A socket that is closed leaves by itself.
    pub fn remove(&self, socket: &impl AsFd) {
        // Fails only if the socket is not in the set.
        let _ = self.epoll.delete(socket);
    }

    /// Takes the events that are there, without waiting.
    pub fn take(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        Ok(self.epoll.wait(events, EpollTimeout::ZERO)?)
    }
}

/// A set that the runtime of this thread watches.
#[derive(Debug)]
pub struct WatchedPoller(Arc<Poller>);

impl AsRawFd for WatchedPoller {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Registers a set with the runtime of this thread, so that a task can wait for events.
pub fn watch_poller(poller: &Arc<Poller>) -> io::Result<AsyncFd<WatchedPoller>> {
    let watched = WatchedPoller(poller.clone());
    // SAFETY: the set owns its descriptor, returns the same one for all its life and closes it only when dropped, which
    // cannot be while `watched` holds it.
    unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE) }.map_err(io::Error::from)
}

/// What an event says.
pub fn readiness(event: &EpollEvent) -> Readiness {
    let flags = event.events();
    let hung_up = flags.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
    Readiness {
        readable: flags.contains(EpollFlags::EPOLLIN) || hung_up,
        writable: flags.contains(EpollFlags::EPOLLOUT),
        hung_up,
        broken: flags.contains(EpollFlags::EPOLLERR),
    }
}
