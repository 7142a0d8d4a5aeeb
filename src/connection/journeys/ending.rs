//! What makes a connection stop before both sides have closed, and how its sockets are closed then.

use crate::connection::accept::{TunnelPeer, TunnelStop};
use crate::connection::authorize::Registration;
use crate::connection::choose::{Evidence, InFlight};
use crate::connection::dial::DialError;
use crate::connection::dial::direct::{DialledLeg, OpenLeg};
use crate::connection::dial::pool::Lease;
use crate::connection::forward::{Ending, ForwardError, Stop};
use crate::connection::pod::Pod;
use crate::connection::report::{Failure, Record};
use crate::connection::worker::Counted;
use crate::hbone::Meter;
use crate::identity::Distrust;
use crate::sys::leg::reset_without_data;
use crate::sys::socket::reset_on_close;
use crate::task::Ticks;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;

/// Dials for a client. Gives up if the client resets meanwhile, unless it has sent something before: that still has to
/// be delivered. The client is watched from the next tick on: that costs system calls, and most dials are done before.
pub async fn unless_client_resets<T>(
    ticks: &Ticks,
    client: &TcpStream,
    dial: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    let mut dial = pin!(dial);
    tokio::select! {
        biased;
        dialled = &mut dial => return dialled,
        () = ticks.next() => {}
    }
    tokio::select! {
        biased;
        dialled = dial => dialled,
        () = reset_without_data(client) => Err(DialError::Abandoned),
    }
}

/// Resolves when a plain connection of the pod has to stop: its permit is revoked, or the deadline of a drain has passed.
pub async fn stop_signal(pod: &Pod, permit: Option<&Registration>) -> Stop {
    let drain = pod.signal();
    let revoked = async {
        let Some(permit) = permit else { return std::future::pending().await };
        permit.revoked().await;
        permit.reason().map_or(Stop::Drained, Stop::Revoked)
    };
    tokio::select! {
        why = revoked => why,
        () = drain.now() => Stop::Drained,
    }
}

/// What ends with a connection that is carried over a stream of a tunnel.
pub struct CarriedEnd {
    /// Its record.
    pub record: Record,
    /// The tunnel that carries it.
    pub tunnel: CarriedBy,
    /// What counts it.
    pub _counted: Counted,
}

/// The tunnel that carries a connection.
pub enum CarriedBy {
    /// A tunnel to a peer, with the connection's slot on it, and what counts the connection at the endpoint that was chosen
    /// for it.
    Outbound(Lease, Option<InFlight>),
    /// A tunnel from a peer, with the connection's permit, and the entry of the application's socket.
    Inbound(Arc<TunnelPeer>, Registration, Option<OpenLeg>),
}

impl Ending for CarriedEnd {
    fn meter(&self) -> &impl Meter {
        &self.record
    }

    fn stop(&self) -> Option<Stop> {
        let (tunnel, refused) = match &self.tunnel {
            CarriedBy::Outbound(lease, _) => (lease.stop(), None),
            CarriedBy::Inbound(peer, permit, _) => (peer.stop.get().copied(), permit.reason()),
        };
        refused.map(Stop::Revoked).or_else(|| {
            tunnel.map(|why| match why {
                TunnelStop::Distrusted(Distrust::Revoked) => Stop::CertificateRevoked,
                TunnelStop::Distrusted(Distrust::Expired) => Stop::CertificateExpired,
                TunnelStop::Drained => Stop::Drained,
            })
        })
    }

    fn finish(self, app: std::net::TcpStream, result: Result<(), ForwardError>) {
        let Self { record, mut tunnel, _counted } = self;
        match &mut tunnel {
            CarriedBy::Outbound(_, in_flight) => note_reset(in_flight.as_ref(), &record, &result),
            CarriedBy::Inbound(_, _, entry) => drop(entry.take()),
        }
        // After its entry: once the socket is closed, another connection may have the same ends.
        drop(app);
        record.finish(result.map_err(Failure::from));
    }
}

/// Notes against an endpoint that it has reset a connection before any byte was carried.
pub fn note_reset(in_flight: Option<&InFlight>, carried: &impl Meter, result: &Result<(), ForwardError>) {
    let by_endpoint = matches!(result, Err(ForwardError::Far(_) | ForwardError::Reset(_) | ForwardError::Tunnel(_)));
    if let Some(in_flight) = in_flight
        && by_endpoint
        && carried.total() == 0
    {
        in_flight.failed(Evidence::Reset);
    }
}

/// A socket that is closed with RST, unless its connection has ended in order: a client must be able to distinguish a
/// refusal from an empty answer.
pub struct ResetUnlessDone<S: AsFd = TcpStream> {
    /// Entry of a connection that the daemon opened. Declared before the socket so that it is dropped first.
    entry: Option<OpenLeg>,
    /// Shared only so that [`ResetUnlessDone::into_parts`] can take it out.
    socket: Arc<S>,
    done: bool,
}

impl ResetUnlessDone {
    /// A socket that the daemon accepted.
    pub fn accepted(socket: TcpStream) -> Self {
        Self { entry: None, socket: Arc::new(socket), done: false }
    }

    /// A socket that the daemon connected.
    pub fn dialled(DialledLeg { entry, socket }: DialledLeg) -> Self {
        Self { entry: Some(entry), socket: Arc::new(socket), done: false }
    }

    /// The daemon's port, if the daemon connected it; else 0.
    pub fn own_port(&self) -> u16 {
        self.entry.as_ref().map_or(0, OpenLeg::port)
    }

    /// The socket, to be carried by the engine, with its entry if the daemon connected it.
    pub fn into_parts(mut self) -> io::Result<(std::net::TcpStream, Option<OpenLeg>)> {
        self.done = true;
        let (socket, entry) = (self.socket.clone(), self.entry.take());
        drop(self);
        // There is no other reference, because only `self` made them.
        let socket = Arc::try_unwrap(socket).map_err(|_| io::ErrorKind::ResourceBusy)?;
        Ok((socket, entry))
    }

    /// The same, watched by the runtime of this thread, so that tasks can wait for it.
    pub fn watched(self) -> Result<ResetUnlessDone<tokio::net::TcpStream>, ForwardError> {
        let (socket, entry) = self.into_parts().map_err(ForwardError::App)?;
        let socket = tokio::net::TcpStream::from_std(socket).map_err(ForwardError::App)?;
        Ok(ResetUnlessDone { entry, socket: Arc::new(socket), done: false })
    }
}

impl<S: AsFd> ResetUnlessDone<S> {
    /// Closes the socket in order: its connection has ended well.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl<S: AsFd> std::ops::Deref for ResetUnlessDone<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.socket
    }
}

impl<S: AsFd> Drop for ResetUnlessDone<S> {
    fn drop(&mut self) {
        if !self.done {
            reset_on_close(&*self.socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_with_a_connection_is_small() {
        let (end, record) = (size_of::<CarriedEnd>(), size_of::<Record>());
        assert!(end <= 240 && record <= 80, "{end} bytes, of which the record has {record}");
    }
}
