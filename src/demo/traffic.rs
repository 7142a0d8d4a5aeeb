//! Load between two pods: small requests on several connections, and one bulk stream.

use crate::sys::netns::Netns;
use crate::task::thread::blocking;
use anyhow::Context;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Port of the echo server.
const ECHO_PORT: u16 = 9000;
/// Port of the server that discards what it receives.
const SINK_PORT: u16 = 9001;
/// Size of a request and of its answer.
pub const MESSAGE_BYTES: usize = 1024;
/// Number of connections on which requests are sent.
pub const CONNECTIONS: usize = 16;
/// The longest that a read or write of a measurement may wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// The result of a measurement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Requests per second, on all connections together.
    pub rps: f64,
    /// Median of the round-trip time, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the round-trip time, in microseconds.
    pub p99_us: f64,
    /// Gigabits per second of the bulk stream.
    pub gbps: f64,
}

/// Starts the echo server and the discarding server in a pod. They run until the process ends.
pub fn serve(pod: &Netns) -> anyhow::Result<()> {
    for (port, answer) in [(ECHO_PORT, true), (SINK_PORT, false)] {
        let listener = pod.enter(|| TcpListener::bind(("::", port)))?.context("cannot listen in the server pod")?;
        blocking(move || {
            for stream in listener.incoming().flatten() {
                blocking(move || answer_one(stream, answer));
            }
        });
    }
    Ok(())
}

/// Serves one connection until the client ends it.
fn answer_one(mut stream: TcpStream, answer: bool) {
    let mut buffer = vec![0; 256 * 1024];
    // An error here means that the client has gone, and the client reports why.
    let _ = stream.set_nodelay(true);
    while let Ok(length) = stream.read(&mut buffer) {
        let received = buffer.get(..length).unwrap_or_default();
        if received.is_empty() || (answer && stream.write_all(received).is_err()) {
            break;
        }
    }
    if !answer {
        // Tells the client that everything has arrived.
        let _ = stream.write_all(b"k");
    }
}

/// Measures requests, then the bulk stream, from one pod to the servers in another, each for `duration`.
pub fn measure(from: &Netns, to: std::net::IpAddr, duration: Duration) -> anyhow::Result<Figures> {
    let mut threads = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = connect(from, SocketAddr::new(to, ECHO_PORT))?;
        threads.push(blocking(move || requests(stream, duration)));
    }
    let mut times = Vec::new();
    for thread in threads {
        times.extend(thread.join().map_err(|_| anyhow::anyhow!("a load thread panicked"))??);
    }
    times.sort_unstable();
    let at = |per_mille: usize| times.get(times.len() * per_mille / 1000).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    let rps = times.len() as f64 / duration.as_secs_f64();
    let gbps = bulk(connect(from, SocketAddr::new(to, SINK_PORT))?, duration)?;
    Ok(Figures { rps, p50_us: at(500), p99_us: at(990), gbps })
}

fn connect(from: &Netns, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream =
        from.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?.with_context(|| format!("cannot connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn requests(mut stream: TcpStream, duration: Duration) -> anyhow::Result<Vec<Duration>> {
    let (message, mut answer) = ([7; MESSAGE_BYTES], [0; MESSAGE_BYTES]);
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < duration {
        let sent = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
        times.push(sent.elapsed());
    }
    Ok(times)
}

fn bulk(mut stream: TcpStream, duration: Duration) -> anyhow::Result<f64> {
    let chunk = vec![7; 256 * 1024];
    let (start, mut bytes) = (Instant::now(), 0u64);
    while start.elapsed() < duration {
        stream.write_all(&chunk)?;
        bytes += chunk.len() as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9)
}
