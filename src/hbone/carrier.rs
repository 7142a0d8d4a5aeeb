//! A tunnel inside a stream of another tunnel. The stream carries one end of a pair of connected sockets, as it would
//! carry an application's socket, and the other end is what the inner tunnel is made on.
//!
//! Both tunnels end with each other: the end of the stream closes the pair, and so does the end of the inner tunnel.

use super::carry::Meter;
use super::engine::{CarryError, Ended, Owner};
use super::error::EndReason;
use super::last_bytes::deliver_rest;
use super::stream::{Stopper, Stream};
use crate::sys::socket::connected_pair;
use crate::task::Group;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;

/// The stream that carries a tunnel. Clones are of the same one.
#[derive(Clone, Debug)]
pub struct Carrier {
    pub(super) reason: EndReason,
    stopper: Stopper,
}

impl Carrier {
    /// Why the stream broke; `None` while it is open, or if it ended in order.
    pub fn reason(&self) -> Option<Arc<str>> {
        self.reason.get().cloned()
    }

    /// Resets the stream.
    pub fn stop(&self) {
        self.stopper.stop();
    }
}

/// Begins to carry a tunnel over `stream`. Returns the socket on which the tunnel is to be made. `held` is dropped when
/// the stream has ended. Once one direction has ended, the other may be silent for at most `silence`. What is left to do
/// after the stream broke is done by a task of `tasks`.
pub fn carry_tunnel(
    stream: Stream,
    held: impl Send + Sync + 'static,
    tasks: &Group,
    silence: Duration,
) -> io::Result<(TcpStream, Carrier)> {
    let (carried, socket) = connected_pair()?;
    let socket = TcpStream::from_std(socket)?;
    let reason = EndReason::default();
    let owner = CarriedTunnel { reason: reason.clone(), tasks: tasks.clone(), bytes: AtomicU64::new(0), _held: held };
    let stopper = stream.carry(carried, Box::new(owner), silence);
    Ok((socket, Carrier { reason, stopper }))
}

/// The owner of a tunnel's socket that is carried over a stream. The connections inside the tunnel are counted, and not
/// the tunnel itself.
struct CarriedTunnel<H> {
    reason: EndReason,
    tasks: Group,
    /// For [`Meter::total`], which tells silence.
    bytes: AtomicU64,
    _held: H,
}

impl<H: Sync> Meter for CarriedTunnel<H> {
    fn up(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn down(&self, bytes: usize) {
        self.up(bytes);
    }

    fn total(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl<H: Send + Sync> Owner for CarriedTunnel<H> {
    fn ended(self: Box<Self>, ended: Ended) {
        let Ended { result, app, rest } = ended;
        let Err(error) = result else { return };
        // Before the socket is closed: then the inner tunnel asks why.
        let _ = self.reason.set(error.to_string().into());
        if matches!(error, CarryError::Reset(_) | CarryError::Tunnel(_)) && !rest.is_empty() {
            self.tasks.spawn(async move { drop(deliver_rest(app, rest).await) });
        }
    }
}
