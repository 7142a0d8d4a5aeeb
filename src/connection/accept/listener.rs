//! The accept loop of one listener. It hands every socket on and does not end because an accept failed.

use crate::sys::socket::watch;
use crate::task::Signal;
use crate::telemetry::limit::LogLimit;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Accepts in one turn, before the loop yields to the worker's other tasks.
const ACCEPTS_PER_TURN: usize = 64;

/// Accepts after the drain signal, enough for a full queue. Clients keep connecting, so there must be a limit.
const LAST_ACCEPTS: usize = 1024;

/// Pause after an accept failed for lack of file descriptors or memory. An immediate retry would only use CPU.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the drain signal fires. Connections that are queued by then are still accepted, because closing a
/// listener resets its queue.
pub async fn run(listener: TcpListener, drain: Signal, deliver: impl Fn(TcpStream, SocketAddr)) {
    let listener = match watch(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot watch a listener; connections to it are refused");
            return;
        }
    };
    let failures = LogLimit::default();
    loop {
        let mut ready = tokio::select! {
            biased;
            () = drain.gentle() => break,
            ready = listener.readable() => match ready { Ok(ready) => ready, Err(_) => return },
        };
        let mut taken = 0;
        while taken < ACCEPTS_PER_TURN {
            match accept_one(listener.get_ref(), &deliver) {
                Ok(()) => taken += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => taken += 1,
                Err(error) => {
                    if let Some(suppressed) = failures.allow() {
                        tracing::warn!(%error, suppressed, "cannot accept a connection; retrying");
                    }
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
        }
        tokio::task::yield_now().await;
    }
    for _ in 0..LAST_ACCEPTS {
        match accept_one(listener.get_ref(), &deliver) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionAborted => break,
            Ok(()) | Err(_) => {}
        }
    }
}

fn accept_one(listener: &TcpListener, deliver: &impl Fn(TcpStream, SocketAddr)) -> io::Result<()> {
    let (socket, peer) = listener.accept()?;
    socket.set_nonblocking(true)?;
    deliver(socket, peer);
    Ok(())
}
