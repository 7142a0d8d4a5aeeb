//! Asks a pod's resolvers: from the pod's namespace, with marked sockets, byte for byte.
//!
//! A question goes to the first resolver. If that one is silent for a while or fails, the next one is asked as well,
//! and the first usable answer wins. Each question has its own socket, and so a port that nobody can guess, and as a
//! datagram a random id. Whatever does not come from the resolver that was asked, or answers another question, is
//! ignored.

use super::framing::{read_message, write_message};
use super::message::{self, ResponseKind};
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, outgoing, outgoing_datagram, start_connect};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

/// How long a question may take in all. Clients ask again after 5 s.
pub const DEADLINE: Duration = Duration::from_millis(4800);
/// Silence after which the next resolver is asked as well.
const PATIENCE: Duration = Duration::from_millis(1200);
/// How often a resolver may be silent for [`PATIENCE`] before it counts as slow. One slow answer is no reason to prefer
/// other resolvers, which may not know the same names.
const STRIKES: u32 = 3;
/// For how long a slow or broken resolver is asked after the others.
const SLOW_FOR: Duration = Duration::from_secs(10);
/// Datagrams that are not the answer which one question may receive before it fails.
const FORGED_MAX: usize = 64;
/// Longest message.
const MESSAGE_MAX: usize = u16::MAX as usize;

/// Why no resolver has answered.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The pod has no usable resolver.
    #[error("the pod has no usable name server")]
    NoResolver,
    /// No resolver answered in time.
    #[error("no answer from {servers} within {} s", DEADLINE.as_secs_f64())]
    Silent {
        /// Their addresses, joined.
        servers: String,
    },
    /// The resolver cannot be reached.
    #[error("{0}: {1}")]
    Io(SocketAddr, io::Error),
    /// The resolver's address sent too many messages that do not answer the question.
    #[error("{0}: forged answers")]
    Forged(SocketAddr),
}

/// How a request is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// By UDP.
    Datagram,
    /// By TCP.
    Stream,
}

impl Carrier {
    /// The word in metrics and the log.
    pub fn word(self) -> &'static str {
        match self {
            Self::Datagram => "udp",
            Self::Stream => "tcp",
        }
    }
}

/// The resolvers for one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Servers {
    /// In the order in which they should be asked.
    pub list: Vec<SocketAddr>,
    /// Whether the pod asked the first one although its `resolv.conf` names others. Then the answer of that one is
    /// final, and the others only step in if it does not answer.
    pub first_is_unlisted: bool,
}

/// An answer of a resolver.
#[derive(Debug)]
pub struct UpstreamAnswer {
    /// The resolver.
    pub from: SocketAddr,
    /// The message, with the id of the request.
    pub bytes: Vec<u8>,
    /// What it says.
    pub kind: ResponseKind,
    /// The connection that it came over, if it was TCP: further messages may follow there.
    pub stream: Option<TcpStream>,
}

/// How often a resolver has been silent since its last answer.
#[derive(Debug)]
struct Strikes {
    count: u32,
    last: Instant,
}

/// Makes a pod's sockets towards its resolvers, and remembers which resolvers are slow.
#[derive(Debug)]
pub struct Upstream {
    /// The pod's namespace.
    pub netns: Netns,
    /// `SO_MARK` of the sockets.
    pub mark: u32,
    strikes: Mutex<HashMap<SocketAddr, Strikes>>,
}

impl Upstream {
    /// Asks from `netns`, with sockets of this mark.
    pub fn new(netns: Netns, mark: u32) -> Self {
        Self { netns, mark, strikes: Mutex::default() }
    }

    /// The resolvers in the order in which they are asked: slow ones come last, but one that `resolv.conf` does not
    /// name stays first.
    fn in_order(&self, servers: &Servers) -> Vec<SocketAddr> {
        let mut strikes = self.strikes.lock();
        strikes.retain(|_, strikes| strikes.last.elapsed() < SLOW_FOR);
        let is_slow = |server: &SocketAddr| strikes.get(server).is_some_and(|strikes| strikes.count >= STRIKES);
        let (first, others) = servers.list.split_at(usize::from(servers.first_is_unlisted).min(servers.list.len()));
        let (last, next): (Vec<_>, Vec<_>) = others.iter().partition(|server| is_slow(server));
        first.iter().copied().chain(next).chain(last).collect()
    }

    fn has_answered(&self, server: SocketAddr) {
        self.strikes.lock().remove(&server);
    }

    fn strike(&self, server: SocketAddr, by: u32) {
        let mut strikes = self.strikes.lock();
        let now = Instant::now();
        let strikes = strikes.entry(server).or_insert(Strikes { count: 0, last: now });
        (strikes.count, strikes.last) = (strikes.count.saturating_add(by), now);
    }

    /// Asks one resolver after the other; earlier ones may still answer when later ones have been asked. A positive
    /// answer is used at once. A negative answer is used only once every resolver ahead of it has answered or failed,
    /// or at the deadline.
    pub async fn ask(
        &self,
        carrier: Carrier,
        servers: &Servers,
        request: &[u8],
    ) -> Result<UpstreamAnswer, UpstreamError> {
        let client_id = message::id(request);
        // Nobody can inject an answer into a connection, and further messages on it carry the id of the request.
        let request = match carrier {
            Carrier::Datagram => message::with_id(request.to_vec(), rand::random()),
            Carrier::Stream => request.to_vec(),
        };
        let deadline = Instant::now() + DEADLINE;
        let mut waiting = self.in_order(servers).into_iter().enumerate();
        let mut attempts = FuturesUnordered::new();
        // The resolvers that are being asked, by their position in the order.
        let mut running = BTreeMap::new();
        let (mut fallback, mut error) = (Fallback::default(), UpstreamError::NoResolver);
        let with_client_id =
            |answer: UpstreamAnswer| UpstreamAnswer { bytes: message::with_id(answer.bytes, client_id), ..answer };
        loop {
            if let Some((position, server)) = waiting.next() {
                running.insert(position, server);
                let attempt = self.attempt(carrier, server, &request);
                attempts.push(async move { (position, attempt.await) });
            }
            let first_running = running.keys().next().copied();
            if let Some(answer) = fallback.settled(first_running) {
                return Ok(with_client_id(answer));
            }
            if running.is_empty() {
                return fallback.best().map(with_client_id).ok_or(error);
            }
            let until = if waiting.len() > 0 { Instant::now() + PATIENCE } else { deadline };
            let Ok(ended) = timeout_at(until.min(deadline), attempts.next()).await else {
                if Instant::now() < deadline {
                    running.values().for_each(|server| self.strike(*server, 1));
                    continue;
                }
                running.values().for_each(|server| self.strike(*server, STRIKES));
                let names: Vec<String> = running.values().map(SocketAddr::to_string).collect();
                return fallback
                    .best()
                    .map(with_client_id)
                    .ok_or_else(|| UpstreamError::Silent { servers: names.join(", ") });
            };
            // There is one result for each running resolver.
            let Some((position, result)) = ended else { continue };
            let Some(server) = running.remove(&position) else { continue };
            match result {
                Ok(answer) => {
                    self.has_answered(server);
                    match answer.kind {
                        ResponseKind::Exists => return Ok(with_client_id(answer)),
                        // The answer of a resolver that `resolv.conf` does not name is final, whatever it says.
                        _ if servers.first_is_unlisted && position == 0 => return Ok(with_client_id(answer)),
                        ResponseKind::NoSuchName | ResponseKind::NoData => fallback.add_negative(position, answer),
                        ResponseKind::Failure => fallback.failure = Some(answer),
                    }
                }
                Err(failed) => {
                    self.strike(server, STRIKES);
                    error = failed;
                }
            }
        }
    }

    async fn attempt(
        &self,
        carrier: Carrier,
        server: SocketAddr,
        request: &[u8],
    ) -> Result<UpstreamAnswer, UpstreamError> {
        match carrier {
            Carrier::Datagram => self.ask_by_datagram(server, request).await,
            Carrier::Stream => self.ask_by_stream(server, request).await,
        }
    }

    async fn ask_by_datagram(&self, server: SocketAddr, request: &[u8]) -> Result<UpstreamAnswer, UpstreamError> {
        let failed = |error| UpstreamError::Io(server, error);
        let made = self.netns.enter(|| outgoing_datagram(server, self.mark)).map_err(io::Error::other);
        let socket = made.and_then(|socket| socket).map_err(failed)?;
        // A new socket always has room for one datagram.
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
            if let Some(kind) = message::response_kind(request, &bytes) {
                return Ok(UpstreamAnswer { from: server, bytes, kind, stream: None });
            }
        }
        Err(UpstreamError::Forged(server))
    }

    async fn ask_by_stream(&self, server: SocketAddr, request: &[u8]) -> Result<UpstreamAnswer, UpstreamError> {
        let (stream, bytes) = self.exchange(server, request).await.map_err(|error| UpstreamError::Io(server, error))?;
        let kind = message::response_kind(request, &bytes).ok_or(UpstreamError::Forged(server))?;
        Ok(UpstreamAnswer { from: server, bytes, kind, stream: Some(stream) })
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

/// Answers that are used only if no resolver has a better one.
#[derive(Default)]
struct Fallback {
    negative: Option<NegativeAnswer>,
    failure: Option<UpstreamAnswer>,
}

/// A negative answer, and the position of its resolver.
struct NegativeAnswer {
    position: usize,
    answer: UpstreamAnswer,
}

impl Fallback {
    /// Keeps the negative answer of the resolver that comes first in the order.
    fn add_negative(&mut self, position: usize, answer: UpstreamAnswer) {
        if self.negative.as_ref().is_none_or(|kept| position < kept.position) {
            self.negative = Some(NegativeAnswer { position, answer });
        }
    }

    /// The negative answer, if no resolver ahead of it is still being asked.
    fn settled(&mut self, first_running: Option<usize>) -> Option<UpstreamAnswer> {
        let is_settled = |kept: &mut NegativeAnswer| first_running.is_none_or(|first| first > kept.position);
        self.negative.take_if(is_settled).map(|kept| kept.answer)
    }

    fn best(self) -> Option<UpstreamAnswer> {
        self.negative.map(|kept| kept.answer).or(self.failure)
    }
}

/// Lends a buffer for the longest message. It is shared by all requests of the thread, so that one that waits owns no
/// memory. `work` must not call this function again.
pub fn with_buffer<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MESSAGE_MAX]);
    }
    BUFFER.with_borrow_mut(|buffer| work(buffer))
}
