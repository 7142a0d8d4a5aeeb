//! The load generator: a server and a client, each a process of its own with one thread for connections.
//!
//! The first byte of a connection tells the server what to do with it. A client starts its load at once and obeys lines
//! on its standard input: `start` begins the measurement anew, `fill` sends 1 MB through each idle connection, `stop`
//! prints the result as JSON and ends the process. Both end when their standard input closes, so that none outlives the
//! bench.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The port of every server.
pub const PORT: u16 = 8080;

/// The longest latency that is recorded; longer ones count as this.
const LATENCY_MAX: Duration = Duration::from_secs(60);

/// One read or write of bulk data.
const CHUNK: usize = 256 * 1024;

/// The bytes of one step of `fill`, and the steps: 1 MB each way.
const FILL_CHUNK: usize = 64 * 1024;
const FILL_STEPS: usize = 16;

/// How many connections are filled, or opened for an idle load, at the same time.
const AT_ONCE: usize = 8;

/// How many connections of a storm may be open at the same time: fewer than a client has ports.
const STORM_MAX: usize = 20_000;

/// The longest that one connection of an idle load or of a visit may take. Beyond it, it counts as an error.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a slow reader takes, and the pause after it: 640 KiB/s.
const SLOW_CHUNK: usize = 64 * 1024;
const SLOW_PAUSE: Duration = Duration::from_millis(100);

/// The load of a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Load {
    /// Sends a message and waits until it has come back, again and again.
    Exchange { bytes: usize },
    /// The same at a fixed rate of all connections together. Latency counts from the time at which the message was due.
    Paced { bytes: usize, rate: u32 },
    /// Sends without end to a server that reads.
    Up,
    /// Reads without end from a server that sends.
    Down,
    /// Sends to a server that never reads.
    Stalled,
    /// Sends to a server that reads slowly.
    Slow,
    /// Connects, exchanges 64 B and closes, again and again.
    Connect,
    /// The same at a fixed rate. Latency counts from the time at which the connection was due.
    PacedConnect { rate: u32 },
    /// The same at a fixed rate, however many are not done.
    Storm { rate: u32 },
    /// The same once to each of `addresses` addresses beginning with the client's destination.
    Visit { addresses: u32 },
    /// Opens connections and leaves them idle.
    Idle,
}

/// What a client process does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Client {
    pub to: SocketAddr,
    pub connections: usize,
    pub load: Load,
}

/// What a client measured since `start`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub seconds: f64,
    pub operations: u64,
    pub bytes: u64,
    pub errors: u64,
    /// Latency of an operation at the median, 99 % and 99.9 %, in microseconds.
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
}

struct Counts {
    since: Instant,
    latency: Histogram<u64>,
    operations: u64,
    bytes: u64,
    errors: u64,
    /// When the operation that each connection waits for began.
    waiting: BTreeMap<usize, Instant>,
}

impl Counts {
    /// Counts from now on. Operations that have begun go on.
    fn begin_anew(&mut self) {
        *self = Self { waiting: std::mem::take(&mut self.waiting), ..Self::new() };
    }

    fn new() -> Self {
        let most = u64::try_from(LATENCY_MAX.as_nanos()).unwrap();
        let latency = Histogram::new_with_bounds(100, most, 3).unwrap();
        Self { since: Instant::now(), latency, operations: 0, bytes: 0, errors: 0, waiting: BTreeMap::new() }
    }

    /// The result until now. An operation that has waited longer than any that is complete counts as one of them in the
    /// latencies. Otherwise one that never completes would improve them.
    fn outcome(&mut self) -> Outcome {
        let longest = Duration::from_nanos(self.latency.max());
        for begun in self.waiting.values() {
            let waited = begun.max(&self.since).elapsed();
            if waited > longest {
                self.latency.saturating_record(nanoseconds(waited));
            }
        }
        let at = |quantile: f64| self.latency.value_at_quantile(quantile) as f64 / 1000.0;
        Outcome {
            seconds: self.since.elapsed().as_secs_f64(),
            operations: self.operations,
            bytes: self.bytes,
            errors: self.errors,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
        }
    }
}

/// Counters that all connections of a client share.
#[derive(Clone)]
struct Shared(Arc<Mutex<Counts>>);

impl Shared {
    /// An operation of a connection begins.
    fn begin(&self, connection: usize) -> Instant {
        let now = Instant::now();
        self.0.lock().unwrap().waiting.insert(connection, now);
        now
    }

    fn complete(&self, connection: usize, took: Duration) {
        let mut counts = self.0.lock().unwrap();
        counts.waiting.remove(&connection);
        counts.operations += 1;
        counts.latency.saturating_record(nanoseconds(took));
    }

    fn give_up(&self, connection: usize) {
        self.0.lock().unwrap().waiting.remove(&connection);
    }

    fn bytes(&self, more: usize) {
        self.0.lock().unwrap().bytes += more as u64;
    }

    fn error(&self) {
        self.0.lock().unwrap().errors += 1;
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How the server treats a connection: its first byte.
mod treat {
    pub const ECHO: u8 = b'e';
    pub const READ: u8 = b'r';
    pub const SEND: u8 = b's';
    pub const HOLD: u8 = b'h';
    pub const SLOW: u8 = b'l';
}

/// Serves until standard input closes. Bulk connections have a thread of their own, so that they delay no exchange.
pub fn serve() {
    let (bulk, mut queue) = tokio::sync::mpsc::unbounded_channel::<(std::net::TcpStream, u8)>();
    std::thread::spawn(move || {
        single_thread().block_on(async move {
            while let Some((stream, kind)) = queue.recv().await {
                tokio::spawn(async move {
                    let _ = serve_bulk(TcpStream::from_std(stream)?, kind).await;
                    std::io::Result::Ok(())
                });
            }
        });
    });
    std::thread::spawn(move || {
        single_thread().block_on(async move {
            let listener = listen().unwrap();
            println!("ready");
            loop {
                // Out of file descriptors, for example: the client sees it as an error of its own.
                let Ok((stream, _)) = listener.accept().await else { continue };
                let bulk = bulk.clone();
                tokio::spawn(async move {
                    let _ = serve_one(stream, &bulk).await;
                });
            }
        });
    });
    let _ = std::io::stdin().read(&mut [0]);
}

fn listen() -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, PORT)).into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket.into())
}

async fn serve_one(
    mut stream: TcpStream,
    bulk: &tokio::sync::mpsc::UnboundedSender<(std::net::TcpStream, u8)>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let kind = stream.read_u8().await?;
    if kind != treat::ECHO {
        let _ = bulk.send((stream.into_std()?, kind));
        return Ok(());
    }
    loop {
        stream.readable().await?;
        if let Some(rest) = echo(&stream)? {
            if rest.is_empty() {
                return Ok(());
            }
            stream.write_all(&rest).await?;
        }
    }
}

thread_local! {
    /// One buffer for all echoes of a thread: 10,000 idle connections own none.
    static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; FILL_CHUNK]);
}

/// Sends back what can be read now. Returns the bytes that the socket did not take; none if the client has closed.
fn echo(stream: &TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    BUFFER.with_borrow_mut(|buffer| {
        let length = match stream.try_read(buffer) {
            Ok(0) => return Ok(Some(Vec::new())),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        let sent = match stream.try_write(&buffer[..length]) {
            Ok(sent) => sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        Ok((sent < length).then(|| buffer[sent..length].to_vec()))
    })
}

async fn serve_bulk(mut stream: TcpStream, kind: u8) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    match kind {
        treat::READ => while stream.read(&mut chunk).await? > 0 {},
        treat::SEND => loop {
            stream.write_all(&chunk).await?;
        },
        treat::SLOW => {
            while stream.read(&mut chunk[..SLOW_CHUNK]).await? > 0 {
                tokio::time::sleep(SLOW_PAUSE).await;
            }
        }
        _ => {
            // Never reads. The socket reports an error once the client has gone.
            stream.ready(tokio::io::Interest::ERROR).await?;
        }
    }
    Ok(())
}

fn single_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a client until `stop`.
pub fn client(client: &Client) {
    let shared = Shared(Arc::new(Mutex::new(Counts::new())));
    let (fill, filled) = tokio::sync::mpsc::unbounded_channel();
    let counts = shared.clone();
    let commands = std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            match line.as_str() {
                "start" => counts.0.lock().unwrap().begin_anew(),
                "fill" => drop(fill.send(())),
                _ => break,
            }
        }
        let outcome = counts.0.lock().unwrap().outcome();
        let mut out = std::io::stdout();
        let _ = writeln!(out, "{}", serde_json::to_string(&outcome).unwrap());
        // Open connections end with the process, as those of a killed application do.
        std::process::exit(0);
    });
    match client.load {
        Load::Paced { bytes, rate } => paced(client, Request::Message(bytes), rate, &shared),
        Load::PacedConnect { rate } => paced(client, Request::Connection, rate, &shared),
        _ => single_thread().block_on(run(client, shared, filled)),
    }
    let _ = commands.join();
}

async fn run(client: &Client, shared: Shared, filled: tokio::sync::mpsc::UnboundedReceiver<()>) {
    match client.load {
        Load::Idle => return idle(client, &shared, filled).await,
        Load::Visit { addresses } => return visit(client, addresses, &shared).await,
        Load::Storm { rate } => return storm(client.to, rate, &shared).await,
        _ => {}
    }
    for connection in 0..client.connections {
        let (to, load, shared) = (client.to, client.load.clone(), shared.clone());
        tokio::spawn(async move {
            while let Err(_error) = one(to, &load, connection, &shared).await {
                shared.error();
                // So that a peer that refuses everything is not measured by how fast it refuses.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    println!("ready");
    std::future::pending::<()>().await;
}

async fn open(to: SocketAddr, kind: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind]).await?;
    Ok(stream)
}

async fn one(to: SocketAddr, load: &Load, connection: usize, shared: &Shared) -> std::io::Result<()> {
    match load {
        Load::Exchange { bytes } => {
            let mut stream = open(to, treat::ECHO).await?;
            let (message, mut answer) = (vec![1; *bytes], vec![0; *bytes]);
            loop {
                let start = shared.begin(connection);
                stream.write_all(&message).await?;
                stream.read_exact(&mut answer).await?;
                shared.complete(connection, start.elapsed());
                shared.bytes(2 * bytes);
            }
        }
        Load::Connect => loop {
            connect_exchange_close(to, connection, shared).await?;
        },
        Load::Down => {
            let mut stream = open(to, treat::SEND).await?;
            let mut chunk = vec![0; CHUNK];
            loop {
                match stream.read(&mut chunk).await? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    length => shared.bytes(length),
                }
            }
        }
        Load::Up | Load::Stalled | Load::Slow => {
            let kind = match load {
                Load::Stalled => treat::HOLD,
                Load::Slow => treat::SLOW,
                _ => treat::READ,
            };
            let mut stream = open(to, kind).await?;
            let chunk = vec![1; CHUNK];
            loop {
                let length = stream.write(&chunk).await?;
                shared.bytes(length);
            }
        }
        Load::Paced { .. } | Load::PacedConnect { .. } | Load::Storm { .. } | Load::Idle | Load::Visit { .. } => {
            unreachable!("these have loops of their own")
        }
    }
}

async fn connect_exchange_close(to: SocketAddr, connection: usize, shared: &Shared) -> std::io::Result<()> {
    let start = shared.begin(connection);
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut message = [1; 65];
    message[0] = treat::ECHO;
    stream.write_all(&message).await?;
    stream.read_exact(&mut message[1..]).await?;
    stream.shutdown().await?;
    // The end of the other side is part of the connection.
    let _ = stream.read(&mut [0]).await;
    drop(stream);
    shared.complete(connection, start.elapsed());
    Ok(())
}

/// Opens connections at a fixed rate. One that takes too long counts as an error.
async fn storm(to: SocketAddr, rate: u32, shared: &Shared) {
    let open = Arc::new(tokio::sync::Semaphore::new(STORM_MAX));
    println!("ready");
    let (begun, mut count) = (Instant::now(), 0u64);
    loop {
        let due = (begun.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        while count < due {
            count += 1;
            let Ok(place) = open.clone().try_acquire_owned() else {
                shared.error();
                continue;
            };
            let (shared, connection) = (shared.clone(), usize::try_from(count).unwrap());
            tokio::spawn(async move {
                let done = tokio::time::timeout(PATIENCE, connect_exchange_close(to, connection, &shared)).await;
                if !matches!(done, Ok(Ok(()))) {
                    shared.error();
                    shared.give_up(connection);
                }
                drop(place);
            });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Visits the addresses in order, some at once, and says `done`.
async fn visit(client: &Client, addresses: u32, shared: &Shared) {
    let std::net::IpAddr::V4(first) = client.to.ip() else { panic!("addresses are counted in IPv4") };
    let next = Arc::new(Mutex::new(0..addresses));
    let tasks: Vec<_> = (0..client.connections)
        .map(|connection| {
            let (next, shared) = (next.clone(), shared.clone());
            tokio::spawn(async move {
                loop {
                    let Some(index) = next.lock().unwrap().next() else { break };
                    let address = std::net::Ipv4Addr::from(u32::from(first) + index);
                    let visited = connect_exchange_close((address, PORT).into(), connection, &shared);
                    if !matches!(tokio::time::timeout(PATIENCE, visited).await, Ok(Ok(()))) {
                        shared.error();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        let _ = task.await;
    }
    println!("done");
    std::future::pending::<()>().await;
}

/// Opens all connections and exchanges one byte on each, so that it is open to the end; fills them when told.
async fn idle(client: &Client, shared: &Shared, mut filled: tokio::sync::mpsc::UnboundedReceiver<()>) {
    let open_connections = Arc::new(Mutex::new(Vec::new()));
    let each = client.connections / AT_ONCE;
    let tasks: Vec<_> = (0..AT_ONCE)
        .map(|index| {
            let count = if index == 0 { client.connections - each * (AT_ONCE - 1) } else { each };
            let (to, list, shared) = (client.to, open_connections.clone(), shared.clone());
            tokio::spawn(async move {
                for _ in 0..count {
                    match tokio::time::timeout(PATIENCE, open_and_exchange(to)).await {
                        Ok(Ok(stream)) => list.lock().unwrap().push(stream),
                        _ => shared.error(),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        let _ = task.await;
    }
    println!("ready");
    while filled.recv().await.is_some() {
        let waiting = Arc::new(Mutex::new(std::mem::take(&mut *open_connections.lock().unwrap())));
        let tasks: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let (waiting, done, shared) = (waiting.clone(), open_connections.clone(), shared.clone());
                tokio::spawn(async move {
                    loop {
                        let Some(mut stream) = waiting.lock().unwrap().pop() else { break };
                        match tokio::time::timeout(PATIENCE, fill(&mut stream)).await {
                            Ok(Ok(())) => done.lock().unwrap().push(stream),
                            _ => shared.error(),
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            let _ = task.await;
        }
        println!("done");
    }
    std::future::pending::<()>().await;
}

async fn open_and_exchange(to: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = open(to, treat::ECHO).await?;
    stream.write_all(&[1]).await?;
    stream.read_exact(&mut [0]).await?;
    Ok(stream)
}

async fn fill(stream: &mut TcpStream) -> std::io::Result<()> {
    let (message, mut answer) = (vec![1; FILL_CHUNK], vec![0; FILL_CHUNK]);
    for _ in 0..FILL_STEPS {
        stream.write_all(&message).await?;
        stream.read_exact(&mut answer).await?;
    }
    Ok(())
}

/// What is paced.
#[derive(Clone, Copy)]
enum Request {
    /// A message of so many bytes and its echo, on a connection that stays open.
    Message(usize),
    /// A connection of its own, with 64 B and back.
    Connection,
}

/// One thread for each connection: a thread's sleep is finer than the timers of the runtime.
fn paced(client: &Client, request: Request, rate: u32, shared: &Shared) {
    let count = u32::try_from(client.connections).unwrap();
    let period = Duration::from_secs_f64(f64::from(count) / f64::from(rate));
    for index in 0..count {
        let (to, shared) = (client.to, shared.clone());
        std::thread::spawn(move || {
            let _ = nix::sys::prctl::set_timerslack(1000);
            while paced_one(to, request, period, index, &shared).is_err() {
                shared.error();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }
    println!("ready");
}

fn paced_one(to: SocketAddr, request: Request, period: Duration, index: u32, shared: &Shared) -> std::io::Result<()> {
    let bytes = if let Request::Message(bytes) = request { bytes } else { 64 };
    let open = || {
        let mut stream = std::net::TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.write_all(&[treat::ECHO])?;
        std::io::Result::Ok(stream)
    };
    let mut kept = if let Request::Message(_) = request { Some(open()?) } else { None };
    let (message, mut answer) = (vec![1; bytes], vec![0; bytes]);
    // The connections begin at different times within the first period: the fractions of multiples of 0.618 are spread.
    let mut due = Instant::now() + period.mul_f64((f64::from(index) * 0.618).fract());
    let connection = index as usize;
    loop {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        shared.begin(connection);
        let mut own = None;
        let stream = match &mut kept {
            Some(kept) => kept,
            None => own.insert(open()?),
        };
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
        shared.complete(connection, due.elapsed());
        shared.bytes(2 * bytes);
        due += period;
    }
}
