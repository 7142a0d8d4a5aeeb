//! Asking a pod's resolvers: from the pod's namespace, marked, byte for byte.
//!
//! A question goes to the first resolver; when that one is silent for a while, fails or refuses, to the next as well, and
//! the first good answer counts. Each question has a socket of its own, hence a port that nobody can guess, and as a
//! datagram an id of our own; what does not come from the resolver that was asked, or answers another question, is not looked at further.

use super::message::{self, Outcome};
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, outgoing, outgoing_datagram, start_connect};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

/// How long a question may take. Clients ask again after 5 s.
pub const DEADLINE: Duration = Duration::from_millis(4800);
/// Silence after which the next resolver is asked as well.
const PATIENCE: Duration = Duration::from_millis(1200);
/// How often a resolver may be silent for that long before it counts as slow: one answer that took its time is no reason to
/// ask others first, who may not know the same names.
const STRIKES: u32 = 3;
/// For how long a resolver that is slow or broken is asked after the others.
const SLOW_FOR: Duration = Duration::from_secs(10);
/// Datagrams that are no answers which one question may meet before it is given up.
const FORGED_MAX: usize = 64;
/// Longest message.
const MESSAGE_MAX: usize = u16::MAX as usize;

/// Why no resolver has answered.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The pod has no resolver that could be asked.
    #[error("the pod has no name server that could be asked")]
    None,
    /// Nobody has answered in time.
    #[error("no answer from {0} within 4.8 s")]
    Silent(String),
    /// They cannot be reached.
    #[error("{0}: {1}")]
    Io(SocketAddr, io::Error),
    /// Too much that was no answer came instead of one.
    #[error("{0}: forged answers")]
    Forged(SocketAddr),
}

/// How a request is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// By datagrams.
    Datagram,
    /// Over a connection.
    Stream,
}

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Servers {
    /// In this order.
    pub list: Vec<SocketAddr>,
    /// Whether the first is none of those that the pod uses: what it says counts, the others only stand in where it is
    /// silent.
    pub stranger: bool,
}

/// An answer, and the connection on which more may follow.
#[derive(Debug)]
pub struct Answered {
    /// The answer.
    pub bytes: Vec<u8>,
    /// What it says.
    pub outcome: Outcome,
    /// Where it came from, if that was a connection.
    pub stream: Option<TcpStream>,
}

/// How a pod's sockets towards its resolvers are made, and which of the resolvers are slow.
#[derive(Debug)]
pub struct Upstream {
    /// The pod's namespace.
    pub netns: Netns,
    /// `SO_MARK` of the sockets.
    pub mark: u32,
    /// How often each has been silent since it last answered, and when.
    strikes: Mutex<HashMap<SocketAddr, (u32, Instant)>>,
}

impl Upstream {
    /// Asks from `netns`, with sockets of this mark.
    pub fn new(netns: Netns, mark: u32) -> Self {
        Self { netns, mark, strikes: Mutex::default() }
    }

    /// The resolvers in the order in which they are asked: those that did not answer a moment ago come last, but whom the pod
    /// has asked although it uses others comes first.
    fn in_order(&self, servers: &Servers) -> Vec<SocketAddr> {
        let mut strikes = self.strikes.lock();
        strikes.retain(|_, (_, last)| last.elapsed() < SLOW_FOR);
        let is_slow = |server: &SocketAddr| strikes.get(server).is_some_and(|(count, _)| *count >= STRIKES);
        let (first, others) = servers.list.split_at(usize::from(servers.stranger).min(servers.list.len()));
        let (last, next): (Vec<_>, Vec<_>) = others.iter().partition(|server| is_slow(server));
        first.iter().copied().chain(next).chain(last).collect()
    }

    fn has_answered(&self, server: SocketAddr) {
        self.strikes.lock().remove(&server);
    }

    fn strike(&self, server: SocketAddr, by: u32) {
        let mut strikes = self.strikes.lock();
        let (count, last) = strikes.entry(server).or_insert((0, Instant::now()));
        (*count, *last) = (count.saturating_add(by), Instant::now());
    }

    /// Asks one after the other, without giving up those that were asked before. What a name has counts at once; that it does
    /// not exist only when nobody who comes earlier in the list may still say otherwise.
    pub async fn ask(&self, carrier: Carrier, servers: &Servers, request: &[u8]) -> Result<Answered, UpstreamError> {
        let client = message::id(request);
        // Over a connection nobody can guess anything, and further messages come with the id of the request.
        let request = match carrier {
            Carrier::Datagram => message::with_id(request.to_vec(), rand::random()),
            Carrier::Stream => request.to_vec(),
        };
        let deadline = Instant::now() + DEADLINE;
        let mut waiting = self.in_order(servers).into_iter().enumerate();
        let (mut running, mut kept, mut error) = (Running::default(), Kept::default(), UpstreamError::None);
        let restored = |answered: Answered| Answered { bytes: message::with_id(answered.bytes, client), ..answered };
        loop {
            let started = waiting.next();
            if let Some((at, server)) = started {
                running.0.push((at, server, self.attempt(carrier, server, &request)));
            }
            if let Some(denial) = kept.denial.take_if(|(at, _)| running.0.iter().all(|(other, ..)| *other > *at)) {
                return Ok(restored(denial.1));
            }
            if running.0.is_empty() {
                return kept.best().map(restored).ok_or(error);
            }
            let until = if waiting.len() > 0 { Instant::now() + PATIENCE } else { deadline };
            let Ok((at, server, result)) = timeout_at(until.min(deadline), running.first()).await else {
                if Instant::now() < deadline {
                    running.0.iter().for_each(|(_, server, _)| self.strike(*server, 1));
                    continue;
                }
                running.0.iter().for_each(|(_, server, _)| self.strike(*server, STRIKES));
                let names: Vec<String> = running.0.iter().map(|(_, server, _)| server.to_string()).collect();
                return kept.best().map(restored).ok_or_else(|| UpstreamError::Silent(names.join(", ")));
            };
            match result {
                Ok(answered) => {
                    self.has_answered(server);
                    match answered.outcome {
                        Outcome::Exists => return Ok(restored(answered)),
                        // Who was asked although the pod uses others has said it.
                        _ if servers.stranger && at == 0 => return Ok(restored(answered)),
                        Outcome::Denied | Outcome::Empty => kept.denies(at, answered),
                        Outcome::Refused => kept.refusal = Some(answered),
                    }
                }
                Err(failed) => {
                    self.strike(server, STRIKES);
                    error = failed;
                }
            }
        }
    }

    fn attempt<'a>(&'a self, carrier: Carrier, server: SocketAddr, request: &'a [u8]) -> Attempt<'a> {
        match carrier {
            Carrier::Datagram => Box::pin(self.datagram(server, request)),
            Carrier::Stream => Box::pin(self.stream(server, request)),
        }
    }

    async fn datagram(&self, server: SocketAddr, request: &[u8]) -> Result<Answered, UpstreamError> {
        let failed = |error| UpstreamError::Io(server, error);
        let made = self.netns.enter(|| outgoing_datagram(server, self.mark)).map_err(io::Error::other);
        let socket = made.and_then(|socket| socket).map_err(failed)?;
        // A new socket has room for a datagram.
        socket.send(request).map_err(failed)?;
        let socket = UdpSocket::from_std(socket).map_err(failed)?;
        for _ in 0..FORGED_MAX {
            let bytes = loop {
                socket.readable().await.map_err(failed)?;
                let received: io::Result<Vec<u8>> = with_buffer(|buffer| {
                    let length = socket.try_recv(buffer)?;
                    Ok(buffer.get(..length).unwrap_or_default().to_vec())
                });
                match received {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    received => break received.map_err(failed)?,
                }
            };
            if let Some(outcome) = message::outcome(request, &bytes) {
                return Ok(Answered { bytes, outcome, stream: None });
            }
        }
        Err(UpstreamError::Forged(server))
    }

    async fn stream(&self, server: SocketAddr, request: &[u8]) -> Result<Answered, UpstreamError> {
        let (stream, bytes) = self.exchange(server, request).await.map_err(|error| UpstreamError::Io(server, error))?;
        let outcome = message::outcome(request, &bytes).ok_or(UpstreamError::Forged(server))?;
        Ok(Answered { bytes, outcome, stream: Some(stream) })
    }

    async fn exchange(&self, server: SocketAddr, request: &[u8]) -> io::Result<(TcpStream, Vec<u8>)> {
        let legs = LegOptions { keepalive: None, notsent_lowat: None };
        let made = self.netns.enter(|| outgoing(server, None, self.mark, &legs)).map_err(io::Error::other)??;
        start_connect(&made, server)?;
        let mut stream = TcpStream::from_std(made.into())?;
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        write_message(&mut stream, request).await?;
        let answer = read_message(&mut stream).await?;
        Ok((stream, answer))
    }
}

type Attempt<'a> = Pin<Box<dyn Future<Output = Result<Answered, UpstreamError>> + Send + 'a>>;

/// The resolvers that are being asked, with their places in the list.
#[derive(Default)]
struct Running<'a>(Vec<(usize, SocketAddr, Attempt<'a>)>);

impl Running<'_> {
    /// The first that ends, taken out.
    async fn first(&mut self) -> (usize, SocketAddr, Result<Answered, UpstreamError>) {
        poll_fn(|context| {
            let ended = self.0.iter_mut().enumerate().find_map(|(index, (_, _, attempt))| {
                match attempt.as_mut().poll(context) {
                    Poll::Ready(result) => Some((index, result)),
                    Poll::Pending => None,
                }
            });
            match ended {
                Some((index, result)) => {
                    let (at, server, _) = self.0.remove(index);
                    Poll::Ready((at, server, result))
                }
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// Answers that count where nobody has a better one.
#[derive(Default)]
struct Kept {
    denial: Option<(usize, Answered)>,
    refusal: Option<Answered>,
}

impl Kept {
    /// The denial of the one that comes first in the list.
    fn denies(&mut self, at: usize, answered: Answered) {
        if self.denial.as_ref().is_none_or(|(other, _)| at < *other) {
            self.denial = Some((at, answered));
        }
    }

    fn best(self) -> Option<Answered> {
        self.denial.map(|(_, answered)| answered).or(self.refusal)
    }
}

/// Lends room for the longest message for a moment: what waits owns none. `work` must not ask for it again.
pub fn with_buffer<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MESSAGE_MAX]);
    }
    BUFFER.with_borrow_mut(|buffer| work(buffer))
}

/// Reads one message with its length in front (RFC 1035, 4.2.2).
pub async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes one message with its length in front, in one piece: some clients expect no less.
pub async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}
