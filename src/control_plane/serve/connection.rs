//! Connections: TLS and HTTP/2, how many, how long, and how they end.
//!
//! A connection whose caller has not shown who it is holds a slot, and is closed after a while. Every connection ends
//! after about half an hour, so that load spreads over replicas and tokens are checked again. At the end of the process
//! connections end one after the other within a few seconds, so that daemons do not all arrive elsewhere at once.

use super::calls::Calls;
use super::shared::Shared;
use crate::task::slots::{Slot, Slots};
use crate::task::{Drain, Group, Signal};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Connections without a known caller, in all and from one address.
const STRANGERS_MAX: usize = 2_048;
const STRANGERS_OF_ONE: usize = 512;
/// Connections in all, and from one address: behind a translated address there may be all nodes of a cluster.
const CONNECTIONS_MAX: usize = 16_384;
const CONNECTIONS_OF_ONE: usize = 8_192;
/// How long the TLS handshake may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a caller may take until it has shown who it is.
const KNOWN_DEADLINE: Duration = Duration::from_secs(30);
/// Calls at the same time on one connection.
const CALLS_MAX: u32 = 64;
/// Largest headers of a call. Tokens have a few KiB.
const HEAD_BYTES_MAX: u32 = 32 << 10;
/// Bytes that a call may send ahead.
const WINDOW_BYTES: u32 = 256 << 10;
/// Silence after which a client is pinged, and how long its answer may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_DEADLINE: Duration = Duration::from_secs(20);
/// The age at which a connection ends lies between this and a fifth more.
const AGE: Duration = Duration::from_secs(27 * 60);
/// How long calls may take to end after the connection has been asked to.
const LAST_CALLS: Duration = Duration::from_secs(10);
/// At the end of the process, connections are asked to end within this time.
const SPREAD: Duration = Duration::from_secs(3);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections until the gentle signal, then waits for them to end.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener, stop: Signal) {
    let connections = Group::default();
    let (strangers, slots) =
        (Slots::new(STRANGERS_MAX, STRANGERS_OF_ONE), Slots::new(CONNECTIONS_MAX, CONNECTIONS_OF_ONE));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.gentle() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection; trying again");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let taken = strangers.take(peer.ip()).and_then(|stranger| Ok((stranger, slots.take(peer.ip())?)));
        match taken {
            Ok((stranger, slot)) => {
                let (shared, stop) = (shared.clone(), stop.clone());
                connections.spawn(async move {
                    shared.metrics.connections.inc();
                    let _counted = Counted(shared.clone());
                    serve(shared, (stream, peer), stranger, stop).await;
                    drop(slot);
                });
            }
            Err(error) => {
                shared.metrics.not_served("full");
                if let Some(suppressed) = shared.metrics.log.allow() {
                    tracing::warn!(%peer, %error, suppressed, "a connection was closed: there are too many");
                }
            }
        }
    }
    // Nothing is accepted any more; whoever connects now is refused at once and goes elsewhere.
    drop(listener);
    tokio::select! {
        () = connections.finished() => {}
        () = stop.now() => connections.cut(),
    }
}

/// Counts a connection until it is dropped.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

/// Ends the tasks of a connection with it.
struct Tasks(Group);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.cut();
    }
}

async fn serve(shared: Arc<Shared>, (stream, peer): (TcpStream, SocketAddr), stranger: Slot, stop: Signal) {
    // It matters for small messages; without it they only come later.
    let _ = stream.set_nodelay(true);
    let Some(tls) = (shared.authority.tls)() else { return shared.metrics.not_served("handshake") };
    let Ok(Ok(stream)) = timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(tls).accept(stream)).await else {
        tracing::debug!(%peer, "the TLS handshake failed, or took too long");
        return shared.metrics.not_served("handshake");
    };
    let tasks = Tasks(Group::default());
    let (drain, known) = (Drain::default(), CancellationToken::new());
    let calls =
        Calls { shared: shared.clone(), peer, tasks: tasks.0.clone(), stop: drain.signal(), known: known.clone() };
    let mut builder = http2::Builder::new(tasks.0.clone());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(CALLS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES * 4)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_DEADLINE);
    let http = builder.serve_connection(TokioIo::new(stream), service_fn(move |request| calls.clone().call(request)));
    tokio::pin!(http);
    let now = Instant::now();
    let (known_by, ends_at) = (now + KNOWN_DEADLINE, now + AGE.mul_f64(rand::random_range(1.0..1.2)));
    let mut stranger = Some(stranger);
    let mut last = None;
    let ending = async {
        stop.gentle().await;
        sleep(SPREAD.mul_f64(rand::random_range(0.0..1.0))).await;
    };
    tokio::pin!(ending);
    loop {
        tokio::select! {
            ended = &mut http => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "a connection ended with an error");
                }
                return;
            }
            () = known.cancelled(), if stranger.is_some() => {
                stranger = None;
                continue;
            }
            () = sleep_until(known_by), if stranger.is_some() => {
                tracing::debug!(%peer, "nobody has shown who calls on this connection");
                return shared.metrics.not_served("silent");
            }
            () = sleep_until(last.unwrap_or(ends_at)) => if last.is_some() { return },
            () = &mut ending, if last.is_none() => {}
        }
        last = Some(Instant::now() + LAST_CALLS);
        drain.gently();
        http.as_mut().graceful_shutdown();
    }
}
