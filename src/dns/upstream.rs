//! Asking a pod's resolvers: from the pod's namespace, marked, byte for byte.
//!
//! A datagram goes to the first resolver; when that one is silent for a while, fails or refuses, to the next as well, and
//! the first good answer counts. Each question has a socket of its own, hence a port that nobody can guess, and an id of
//! our own; what does not come from the resolver that was asked, or answers another question, is not looked at further.

use super::message::{self, Outcome};
use crate::sys::netns::Netns;
use crate::sys::socket::{LegOptions, outgoing, outgoing_datagram, start_connect};
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

/// How long a question may take. Clients ask again after 5 s.
pub const DEADLINE: Duration = Duration::from_millis(4800);
/// Silence after which the next resolver is asked as well.
const PATIENCE: Duration = Duration::from_millis(1200);
/// For how long a resolver that was silent or broken is asked after the others.
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

/// How a pod's sockets towards its resolvers are made, and which of the resolvers are slow.
#[derive(Debug)]
pub struct Upstream {
    /// The pod's namespace.
    pub netns: Netns,
    /// `SO_MARK` of the sockets.
    pub mark: u32,
    slow: Mutex<HashMap<SocketAddr, Instant>>,
}

impl Upstream {
    /// Asks from `netns`, with sockets of this mark.
    pub fn new(netns: Netns, mark: u32) -> Self {
        Self { netns, mark, slow: Mutex::default() }
    }

    /// The resolvers in the order in which they are asked: those that were silent a moment ago come last.
    fn in_order(&self, servers: &[SocketAddr]) -> Vec<SocketAddr> {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.retain(|_, since| since.elapsed() < SLOW_FOR);
        let (last, first): (Vec<_>, Vec<_>) = servers.iter().partition(|server| slow.contains_key(server));
        first.into_iter().chain(last).collect()
    }

    fn is_fine(&self, server: SocketAddr) {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner).remove(&server);
    }

    fn is_slow(&self, server: SocketAddr) {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner).insert(server, Instant::now());
    }

    /// Asks by datagrams.
    pub async fn datagram(&self, servers: &[SocketAddr], request: &[u8]) -> Result<Vec<u8>, UpstreamError> {
        let client = message::id(request);
        let request = message::with_id(request.to_vec(), rand::random());
        let deadline = Instant::now() + DEADLINE;
        let mut asked = Asked { request: &request, sockets: Vec::new(), refusal: None, forged: 0 };
        let mut error = UpstreamError::None;
        let mut waiting = self.in_order(servers).into_iter();
        loop {
            let next = waiting.next();
            if let Some(server) = next {
                match self.send(server, &request) {
                    Ok(socket) => asked.sockets.push((server, socket)),
                    Err(failed) => {
                        self.is_slow(server);
                        error = UpstreamError::Io(server, failed);
                        continue;
                    }
                }
            }
            if asked.sockets.is_empty() {
                // A refusal is an answer, where nobody has a better one.
                return asked.refusal.map(|bytes| message::with_id(bytes, client)).ok_or(error);
            }
            let until = if next.is_some() && waiting.len() > 0 { Instant::now() + PATIENCE } else { deadline };
            match timeout_at(until.min(deadline), asked.answer()).await {
                Ok(Ok((server, answer))) => {
                    self.is_fine(server);
                    return Ok(message::with_id(answer, client));
                }
                Ok(Err((server, None))) => self.is_fine(server),
                Ok(Err((server, Some(failed)))) => {
                    self.is_slow(server);
                    error = failed;
                }
                Err(_) if Instant::now() >= deadline => {
                    let names: Vec<String> = asked.sockets.iter().map(|(server, _)| server.to_string()).collect();
                    asked.sockets.iter().for_each(|(server, _)| self.is_slow(*server));
                    let refusal = asked.refusal.map(|bytes| message::with_id(bytes, client));
                    return refusal.ok_or_else(|| UpstreamError::Silent(names.join(", ")));
                }
                Err(_) => asked.sockets.iter().for_each(|(server, _)| self.is_slow(*server)),
            }
        }
    }

    fn send(&self, server: SocketAddr, request: &[u8]) -> io::Result<UdpSocket> {
        let made = self.netns.enter(|| outgoing_datagram(server, self.mark)).map_err(io::Error::other)?;
        let socket = made?;
        // A new socket has room for a datagram.
        socket.send(request)?;
        UdpSocket::from_std(socket)
    }

    /// Asks over a connection, and gives it with the answer: more may follow on it.
    pub async fn stream(&self, servers: &[SocketAddr], request: &[u8]) -> Result<(TcpStream, Vec<u8>), UpstreamError> {
        let deadline = Instant::now() + DEADLINE;
        let mut error = UpstreamError::None;
        let mut refusal = None;
        let mut waiting = self.in_order(servers).into_iter();
        while let Some(server) = waiting.next() {
            let until = if waiting.len() > 0 { Instant::now() + PATIENCE } else { deadline };
            match timeout_at(until.min(deadline), self.exchange(server, request)).await {
                Ok(Ok(answered)) => match message::outcome(request, &answered.1) {
                    None => error = UpstreamError::Forged(server),
                    Some(Outcome::Refused) => refusal = Some(answered),
                    Some(_) => return Ok(answered),
                },
                Ok(Err(failed)) => {
                    self.is_slow(server);
                    error = UpstreamError::Io(server, failed);
                }
                Err(_) => {
                    self.is_slow(server);
                    error = UpstreamError::Silent(server.to_string());
                }
            }
        }
        refusal.ok_or(error)
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

/// The resolvers that a question has been sent to.
struct Asked<'a> {
    request: &'a [u8],
    sockets: Vec<(SocketAddr, UdpSocket)>,
    refusal: Option<Vec<u8>>,
    forged: usize,
}

impl Asked<'_> {
    /// The first good answer. A resolver that breaks or refuses is taken out, and named.
    async fn answer(&mut self) -> Result<(SocketAddr, Vec<u8>), (SocketAddr, Option<UpstreamError>)> {
        poll_fn(|context| {
            let mut at = 0;
            while let Some((server, socket)) = self.sockets.get(at) {
                let server = *server;
                let received = match socket.poll_recv_ready(context) {
                    Poll::Pending => {
                        at += 1;
                        continue;
                    }
                    Poll::Ready(ready) => ready.and_then(|()| receive(|buffer| socket.try_recv(buffer))),
                };
                let answer = match received {
                    Ok(answer) => answer,
                    // Not ready after all; the next look says when it is.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => {
                        self.sockets.remove(at);
                        return Poll::Ready(Err((server, Some(UpstreamError::Io(server, error)))));
                    }
                };
                match message::outcome(self.request, &answer) {
                    Some(Outcome::Refused) => {
                        self.refusal = Some(answer);
                        self.sockets.remove(at);
                        return Poll::Ready(Err((server, None)));
                    }
                    Some(_) => return Poll::Ready(Ok((server, answer))),
                    None => {
                        self.forged += 1;
                        if self.forged > FORGED_MAX {
                            self.sockets.remove(at);
                            return Poll::Ready(Err((server, Some(UpstreamError::Forged(server)))));
                        }
                    }
                }
            }
            Poll::Pending
        })
        .await
    }
}

thread_local! {
    /// Room for the longest message, lent for a moment: what waits owns none.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MESSAGE_MAX]);
}

/// Receives one datagram, of which only as much is kept as came.
fn receive(read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    BUFFER.with_borrow_mut(|buffer| {
        let length = read(buffer)?;
        Ok(buffer.get(..length).unwrap_or_default().to_vec())
    })
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
