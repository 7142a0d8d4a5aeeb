//! Engines over real sockets: against each other, and against the h2 crate.

mod against_h2;
mod costs;
mod ends;
mod exchange;
mod inside;
mod many;

use super::*;
use crate::hbone::carry::Meter;
use crate::hbone::testing::{self, sockets, spawn};
use crate::hbone::{Authority, Buffers, ConnectRequest, Server, Stopper, Stream, Tunnel as Handle, client};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream as App;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

const CONFIG: Config = Config { max_streams: 1000, ..testing::CONFIG };

/// How long a half-closed connection may be silent in most tests: long.
const SILENCE: Duration = Duration::from_secs(1000);

fn connect() -> ConnectRequest {
    let authority = Authority::Address(([10, 0, 0, 1], 80).into());
    ConnectRequest { authority, baggage: None, forwarded: None, traceparent: None, network: None }
}

/// An owner that passes on how its connection ended.
struct Probe {
    bytes: AtomicU64,
    ended: oneshot::Sender<Ended>,
}

impl Meter for Probe {
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

impl Owner for Probe {
    fn ended(self: Box<Self>, ended: Ended) {
        let _ = self.ended.send(ended);
    }
}

/// A carried connection: its application, and how it ends.
struct Side {
    app: App,
    ended: oneshot::Receiver<Ended>,
    stopper: Stopper,
}

async fn carry(stream: Stream, silence: Duration) -> Side {
    let (inner, app) = sockets().await;
    // So that what was written is not in the application's own socket when it is reset.
    app.set_nodelay(true).unwrap();
    let (sender, ended) = oneshot::channel();
    let probe = Probe { bytes: AtomicU64::new(0), ended: sender };
    let stopper = stream.carry(inner.into_std().unwrap(), Box::new(probe), silence);
    Side { app, ended, stopper }
}

fn start_engine(config: &Config) -> Engine {
    let engine = Engine::new(config).unwrap();
    let run = engine.clone();
    spawn(async move { run.run().await.unwrap() });
    engine
}

/// Accepts every stream until the tunnel ends.
async fn accept_all(mut server: Server, streams: mpsc::UnboundedSender<Stream>) -> Result<(), TunnelError> {
    while let Some(next) = server.next().await {
        let _ = streams.send(next?.accept(None));
    }
    Ok(())
}

/// One end of a tunnel.
struct End {
    engine: Engine,
    buffers: Arc<Buffers>,
    account: Arc<Account>,
    /// The task that owns the tunnel.
    task: JoinHandle<Result<(), TunnelError>>,
}

impl End {
    /// Nothing is left of the tunnel.
    fn assert_empty(&self) {
        let inner = self.engine.shared.inner.lock();
        assert!(inner.tunnels.is_empty() && inner.work.deadlines.is_empty() && inner.work.finished.is_empty());
        assert_eq!((self.account.bytes(), self.buffers.held()), (0, 0));
    }
}

/// Two engines with a tunnel between them.
struct Pair {
    tunnel: Handle,
    near: End,
    far: End,
    streams: mpsc::UnboundedReceiver<Stream>,
}

async fn pair(limit: usize) -> Pair {
    let (one, two) = testing::ends().await;
    let (near, far) = (start_engine(&CONFIG), start_engine(&CONFIG));
    let (near_buffers, far_buffers) = (Buffers::new(1 << 30), Buffers::new(limit));
    let (near_account, far_account) = (near_buffers.account("near"), far_buffers.account("far"));
    let (tunnel, driver) = client::start(&near, one, &CONFIG, &near_account).unwrap();
    let server = Server::start(&far, two, &CONFIG, &far_account).unwrap();
    let (sender, streams) = mpsc::unbounded_channel();
    let near_task = spawn(async move { driver.run().await });
    let far_task = spawn(accept_all(server, sender));
    Pair {
        tunnel,
        near: End { engine: near, buffers: near_buffers, account: near_account, task: near_task },
        far: End { engine: far, buffers: far_buffers, account: far_account, task: far_task },
        streams,
    }
}

impl Pair {
    /// A connection through the tunnel.
    async fn connection(&mut self, silence: Duration) -> (Side, Side) {
        let request = connect();
        let (near, far) = tokio::join!(self.tunnel.open(&request), self.streams.recv());
        (carry(near.unwrap(), silence).await, carry(far.unwrap(), silence).await)
    }

    /// Lets the tunnel end because it is not used any more.
    async fn finish(self) {
        let Self { tunnel, mut near, mut far, .. } = self;
        drop(tunnel);
        let (near_ended, far_ended) = tokio::join!(&mut near.task, &mut far.task);
        assert!(near_ended.unwrap().is_ok() && far_ended.unwrap().is_ok());
        near.assert_empty();
        far.assert_empty();
    }
}

/// A byte of a connection.
fn pattern(seed: usize, at: usize) -> u8 {
    u8::try_from((at * 7 + at / 256 + seed * 31) % 251).unwrap()
}

fn bytes(seed: usize, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| pattern(seed, at)).collect()
}

/// Writes bytes in pieces, and ends.
async fn write(app: &mut (impl AsyncWriteExt + Unpin), seed: usize, length: usize, piece: usize) {
    for at in (0..length).step_by(piece) {
        app.write_all(&bytes(seed, at, piece.min(length - at))).await.unwrap();
        if at % 3 == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Reads until the end, in pieces, and checks each byte.
async fn read(app: &mut (impl AsyncReadExt + Unpin), seed: usize, length: usize, piece: usize) {
    let (mut buffer, mut at) = (vec![0; piece], 0);
    loop {
        let now = app.read(&mut buffer).await.unwrap();
        if now == 0 {
            return assert_eq!(at, length, "the end comes behind all bytes");
        }
        assert_eq!(buffer[..now], bytes(seed, at, now), "each byte once and in order");
        at += now;
        tokio::task::yield_now().await;
    }
}

/// Everything that arrived at an application before its connection broke, and what the owner still had to deliver.
async fn arrived(side: Side) -> (Vec<u8>, Ended) {
    let Side { mut app, ended, .. } = side;
    let mut all = Vec::new();
    let wait = async {
        let mut ended = ended.await.unwrap();
        let rest: Vec<u8> = ended.rest.take().flatten().collect();
        // So that the application comes to an end.
        let _ = ended.app.shutdown(std::net::Shutdown::Write);
        (ended, rest)
    };
    let (read, (ended, rest)) = tokio::join!(app.read_to_end(&mut all), wait);
    read.unwrap();
    all.extend(rest);
    (all, ended)
}

#[test]
fn what_is_kept_for_each_connection_is_small() {
    let stream = size_of::<crate::hbone::session::Stream<super::App>>();
    let carried = size_of::<Carried>();
    let tunnel = size_of::<Entry>();
    assert!(stream + carried <= 200, "a connection has {stream} and {carried} bytes");
    assert!(tunnel <= 1760, "a tunnel has {tunnel} bytes");
}
