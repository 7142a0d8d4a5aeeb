//! The accept loop of one listener. It hands every socket on and does not end because an accept failed.

use crate::sys::socket::{accept, watch};
use crate::task::Signal;
use crate::telemetry::limit::LogLimit;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Sockets of one listener that are accepted and whose journey has not begun. All others wait in the kernel's queue of
/// their own listener, so a pod that opens connections without end delays those of another pod by this many at most.
const WAITING_MAX: usize = 8;

/// The place that a socket has in the listener's share until its journey begins; none after the drain signal.
pub type Place = Option<OwnedSemaphorePermit>;

/// Accepts after the drain signal, enough for a full queue. Clients keep connecting, so there must be a limit.
const LAST_ACCEPTS: usize = 1024;

/// Pause after an accept failed for lack of file descriptors or memory. An immediate retry would only use CPU.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the drain signal fires. Connections that are queued by then are still accepted, because closing a
/// listener resets its queue.
pub async fn run(listener: TcpListener, drain: Signal, deliver: impl Fn(TcpStream, SocketAddr, Place)) {
    let listener = match watch(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot watch a listener; connections to it are refused");
            return;
        }
    };
    let failures = LogLimit::default();
    let places = Arc::new(Semaphore::new(WAITING_MAX));
    loop {
        let ready = async {
            let place = places.clone().acquire_owned().await.ok();
            (place, listener.readable().await)
        };
        let (mut place, mut ready) = tokio::select! {
            biased;
            () = drain.gentle() => break,
            (place, ready) = ready => match ready { Ok(ready) => (place, ready), Err(_) => return },
        };
        while let Some(own) = place.take() {
            match accept_one(listener.get_ref(), Some(own), &deliver) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if let Some(suppressed) = failures.allow() {
                        tracing::warn!(%error, suppressed, "cannot accept a connection; retrying");
                    }
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
            place = places.clone().try_acquire_owned().ok();
        }
        tokio::task::yield_now().await;
    }
    for _ in 0..LAST_ACCEPTS {
        match accept_one(listener.get_ref(), None, &deliver) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionAborted => break,
            Ok(()) | Err(_) => {}
        }
    }
}

fn accept_one(listener: &TcpListener, place: Place, deliver: &impl Fn(TcpStream, SocketAddr, Place)) -> io::Result<()> {
    let (socket, peer) = accept(listener)?;
    deliver(socket, peer, place);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Drain;
    use std::sync::mpsc;

    /// Connections that one pod has opened.
    const FLOOD: usize = 300;

    fn listener() -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(512).unwrap()).unwrap();
        listener
    }

    #[tokio::test]
    async fn a_pod_that_opens_connections_without_end_delays_one_of_another_pod_by_few() {
        let (flooded, other) = (listener(), listener());
        let open = |to: &TcpListener| TcpStream::connect(to.local_addr().unwrap()).unwrap();
        let _flood: Vec<TcpStream> = (0..FLOOD).map(|_| open(&flooded)).collect();
        let _one = open(&other);
        let drain = Drain::default();
        let (sender, accepted) = mpsc::channel();
        let accept = |listener, name: &'static str| {
            let sender = sender.clone();
            run(listener, drain.signal(), move |_, _, place| sender.send((name, place)).unwrap())
        };
        // As a worker does: one journey begins after the other, and each takes a turn.
        let begin = async {
            let mut begun = Vec::new();
            while begun.len() <= FLOOD {
                if let Ok((name, place)) = accepted.try_recv() {
                    drop(place);
                    begun.push(name);
                }
                tokio::task::yield_now().await;
            }
            begun
        };
        let begun = tokio::select! {
            begun = begin => begun,
            () = accept(flooded, "flood") => unreachable!("nothing ends the loop"),
            () = accept(other, "other") => unreachable!("nothing ends the loop"),
        };
        let before = begun.iter().position(|name| *name == "other").unwrap();
        assert!(before <= 16, "{before} of the flood came first");
    }
}
