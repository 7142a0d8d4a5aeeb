//! What makes a connection stop before both sides have closed, and how its sockets are closed then.

use crate::connection::authorize::Registration;
use crate::connection::dial::DialError;
use crate::connection::dial::direct::{DialledLeg, OpenLeg};
use crate::connection::forward::Stop;
use crate::connection::pod::Pod;
use crate::identity::{Chain, Distrust};
use crate::sys::leg::reset_without_data;
use crate::sys::socket::reset_on_close;
use tokio::net::TcpStream;

/// Dials for a client. Gives up if the client resets meanwhile, unless it has sent something before: that still has to
/// be delivered.
pub async fn unless_client_resets<T>(
    client: &TcpStream,
    dial: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    tokio::select! {
        biased;
        dialled = dial => dialled,
        () = reset_without_data(client) => Err(DialError::Abandoned),
    }
}

/// Resolves when a connection of the pod has to stop: its permit is revoked, the peer's certificate is revoked or
/// expires, or the deadline of a drain has passed.
pub async fn stop_signal(pod: &Pod, permit: Option<&Registration>, peer: Option<&Chain>) -> Stop {
    let drain = pod.signal();
    let revoked = async {
        let Some(permit) = permit else { return std::future::pending().await };
        permit.revoked().await;
        permit.reason().map_or(Stop::Drained, Stop::Revoked)
    };
    let distrusted = async {
        let Some(peer) = peer else { return std::future::pending().await };
        match peer.distrusted().await {
            Distrust::Revoked => Stop::CertificateRevoked,
            Distrust::Expired => Stop::CertificateExpired,
        }
    };
    tokio::select! {
        why = revoked => why,
        why = distrusted => why,
        () = drain.now() => Stop::Drained,
    }
}

/// A socket that is closed with RST, unless its connection has ended in order: a client must be able to distinguish a
/// refusal from an empty answer.
pub struct ResetUnlessDone {
    /// Entry of a connection that the daemon opened. Declared before the socket so that it is dropped first.
    _entry: Option<OpenLeg>,
    socket: TcpStream,
    done: bool,
}

impl ResetUnlessDone {
    /// A socket that the daemon accepted.
    pub fn accepted(socket: TcpStream) -> Self {
        Self { _entry: None, socket, done: false }
    }

    /// A socket that the daemon connected.
    pub fn dialled(DialledLeg { entry, socket }: DialledLeg) -> Self {
        Self { _entry: Some(entry), socket, done: false }
    }

    /// Closes the socket in order: its connection has ended well.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl std::ops::Deref for ResetUnlessDone {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.socket
    }
}

impl Drop for ResetUnlessDone {
    fn drop(&mut self) {
        if !self.done {
            reset_on_close(&self.socket);
        }
    }
}
