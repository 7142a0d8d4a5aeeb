//! The DNS server of one pod, in its namespace, for the pod alone.
//!
//! What the mesh can answer is answered at once, in turns of a bounded number of datagrams, so that no pod holds up another.
//! What has to wait for others becomes a task of the pod, of which each pod has a bounded number.

use super::answer::MeshAnswer;
use super::config::PORT;
use super::framing::{read_message, relay_transfer, write_message};
use super::listeners::{Listeners, is_the_pod, on_the_link_of};
use super::lookup::{self, Plan};
use super::message::{self, DanglingAlias, Question, Request};
use super::metrics::{self, OutcomeCounts, RequestLabels, RequestOutcome};
use super::resolver::{PodResolvers, Resolver};
use super::upstream::{Carrier, UpstreamAnswer, UpstreamError, with_buffer};
use crate::mesh::{Snapshot, Store, Workload};
use crate::sys::conntrack::Conntrack;
use crate::sys::datagram::{self, Client};
use crate::sys::original_dst::original_dst;
use crate::sys::socket::reset_on_close;
use crate::task::Group;
use crate::telemetry::limit::LogLimit;
use crate::telemetry::series::Held;
use parking_lot::Mutex;
use rand::seq::SliceRandom;
use std::cell::OnceCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

/// Datagrams of one pod that are served before other pods have their turn.
const PER_TURN: usize = 32;
/// How long that may take.
const TURN: Duration = Duration::from_micros(300);
/// Requests of one pod that may wait for others.
const WAITING_MAX: usize = 256;
/// Connections of one pod.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(10);
/// How long the transfer of a zone may take.
const TRANSFER: Duration = Duration::from_secs(120);
/// How long facts are waited for before DNS does without them.
const FACTS_WAIT: Duration = Duration::from_secs(1);
/// Questions of one pod that a control plane is asked at the same time, where it tells only when asked.
const ASKED_MAX: usize = 16;

/// The facts of now and who asks, if that is known.
pub type KnownClient = Option<(Arc<Snapshot>, Arc<Workload>)>;

/// Says who asks.
pub trait ClientFacts: Send + Sync + fmt::Debug {
    /// As far as it is known now.
    fn now(&self) -> KnownClient;
    /// Waits, for a bounded time, until it is known.
    fn soon(&self) -> Pin<Box<dyn Future<Output = KnownClient> + Send + '_>>;
}

/// The server of one pod.
#[derive(Debug)]
pub struct Server {
    /// `namespace/name` of the pod, for the log.
    pub label: String,
    /// The pod's resolvers.
    pub resolver: Arc<Resolver>,
    /// Who asks.
    pub client: Box<dyn ClientFacts>,
    /// Facts, for questions to whoever knows them.
    pub mesh: Arc<Store>,
    /// Requests by outcome.
    pub counts: OutcomeCounts,
    /// Whether each request is logged.
    pub logged: AtomicBool,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    asking: Semaphore,
    /// By record type and protocol.
    requests: Mutex<Vec<((&'static str, &'static str), TypeMetrics)>>,
    complaints: LogLimit,
}

/// Metrics of requests of one type.
type TypeMetrics = Arc<Held<RequestLabels, metrics::RequestMetrics>>;

impl Server {
    /// A server for the pod with this label.
    pub fn new(label: String, resolver: Arc<Resolver>, client: Box<dyn ClientFacts>, mesh: Arc<Store>) -> Self {
        Self {
            counts: resolver.metrics.counts(),
            label,
            resolver,
            client,
            mesh,
            logged: AtomicBool::new(false),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            asking: Semaphore::new(ASKED_MAX),
            requests: Mutex::default(),
            complaints: LogLimit::default(),
        }
    }

    /// Serves on `runtime` until the group is cut.
    pub fn serve(self: &Arc<Self>, listeners: Listeners, tasks: &Group, runtime: &Handle) {
        let conntrack = listeners.conntrack.map(Arc::new);
        for socket in listeners.datagrams {
            let (server, own, conntrack) = (self.clone(), tasks.clone(), conntrack.clone());
            tasks.spawn_on(async move { server.datagrams(socket, conntrack, &own).await }, runtime);
        }
        for listener in listeners.streams {
            let (server, own) = (self.clone(), tasks.clone());
            tasks.spawn_on(async move { server.streams(listener, &own).await }, runtime);
        }
    }

    async fn datagrams(self: Arc<Self>, socket: std::net::UdpSocket, conntrack: Option<Arc<Conntrack>>, tasks: &Group) {
        let made = UdpSocket::from_std(socket).map(Arc::new);
        let Ok(socket) = made.inspect_err(|error| self.broken(error)) else { return };
        let whom = |client: Client| {
            let ours = SocketAddr::new(client.local, PORT);
            let asked = conntrack.as_ref()?.original_destination(client.address, ours).ok()??;
            Some(on_the_link_of(client.address, asked))
        };
        loop {
            if let Err(error) = socket.readable().await {
                return self.broken(&error);
            }
            let turn = Instant::now();
            for _ in 0..PER_TURN {
                match self.next_datagram(&socket, &whom, tasks) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // What the kernel has to say of an answer that nobody took is no reason to stop.
                    Err(_) => {}
                }
                if turn.elapsed() > TURN {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn broken(&self, error: &io::Error) {
        tracing::error!(pod = self.label, %error, "DNS of the pod cannot be served");
    }

    /// Receives one request and answers it, or has it answered.
    fn next_datagram(
        self: &Arc<Self>,
        socket: &Arc<UdpSocket>,
        whom: &impl Fn(Client) -> Option<SocketAddr>,
        tasks: &Group,
    ) -> io::Result<()> {
        with_buffer(|buffer| {
            let (length, client) = socket.try_io(Interest::READABLE, || datagram::receive(&**socket, buffer))?;
            if !is_the_pod(client.address.ip(), client.local) {
                self.counts.add(RequestOutcome::Ignored);
                return Ok(());
            }
            let request = buffer.get(..length).unwrap_or_default();
            let question = match message::read(request) {
                Request::Invalid => {
                    self.counts.add(RequestOutcome::Ignored);
                    return Ok(());
                }
                Request::NotForMesh => None,
                Request::Question(question) => Some(question),
            };
            // Only what the mesh does not answer needs to know whom the pod has asked.
            let asked = OnceCell::new();
            let asked = || *asked.get_or_init(|| whom(client));
            if let Some((reply, outcome)) = self.at_once(request, question.as_ref(), &asked) {
                self.finish(Carrier::Datagram, question.as_ref(), outcome);
                // An answer for which there is no room is lost like any other datagram; the client asks again.
                return try_send(socket, &reply, client);
            }
            let Ok(permit) = self.waiting.clone().try_acquire_owned() else {
                self.finish(Carrier::Datagram, question.as_ref(), RequestOutcome::Limited);
                let reply = message::server_failure(request, question.as_ref()).unwrap_or_default();
                return try_send(socket, &reply, client);
            };
            let (server, socket, asked) = (self.clone(), socket.clone(), asked());
            let request =
                PendingRequest { resolver: asked, question, bytes: request.to_vec(), carrier: Carrier::Datagram };
            tasks.spawn(async move { server.later(&socket, client, &request, permit).await });
            Ok(())
        })
    }

    async fn later(&self, socket: &UdpSocket, client: Client, request: &PendingRequest, _permit: OwnedSemaphorePermit) {
        let reply = Box::pin(self.answer(request)).await;
        if let Some(Reply { bytes, .. }) = reply
            && let Err(error) = timeout(IDLE, send(socket, &bytes, client)).await.unwrap_or(Ok(()))
            && let Some(suppressed) = self.complaints.allow()
        {
            tracing::debug!(pod = self.label, client = %client.address, %error, suppressed, "a DNS answer could not be sent");
        }
    }

    /// The answer to what can be answered without waiting.
    fn at_once(
        &self,
        request: &[u8],
        question: Option<&Question>,
        asked: &dyn Fn() -> Option<SocketAddr>,
    ) -> Option<(Vec<u8>, RequestOutcome)> {
        let used = self.resolver.current()?;
        if let Some(question) = question {
            let known = self.client.now()?;
            let context = self.context(&known, &used);
            if lookup::wanted(&context, &question.name).is_some() {
                return None;
            }
            match lookup::decide(&context, &question.name, question.kind) {
                Plan::Answer(answer) => return self.ours(question, answer, true),
                Plan::ForwardOr(_) => return None,
                Plan::Forward => {}
            }
        }
        Some((self.resolver.cached(asked(), request)?, RequestOutcome::Cached))
    }

    fn context<'a>(
        &'a self,
        known: &'a (Arc<Snapshot>, Arc<Workload>),
        used: &'a PodResolvers,
    ) -> lookup::LookupContext<'a> {
        let config = &self.resolver.config;
        lookup::LookupContext {
            snapshot: &known.0,
            workload: &known.1,
            search: &used.search,
            cluster_domain: &config.cluster_domain,
            preferred_namespace: &config.preferred_namespace,
            ipv6: config.ipv6,
        }
    }

    /// Our answer to a question. Its records come in another order each time, which spreads those who take the first.
    fn ours(&self, question: &Question, mut answer: MeshAnswer, datagram: bool) -> Option<(Vec<u8>, RequestOutcome)> {
        answer.records.shuffle(&mut rand::rng());
        let outcome = if answer.records.is_empty() { RequestOutcome::NoRecords } else { RequestOutcome::Mesh };
        Some((message::reply(question, &answer, self.ttl(), datagram)?, outcome))
    }

    fn ttl(&self) -> u32 {
        u32::try_from(self.resolver.config.ttl.as_secs()).unwrap_or(u32::MAX)
    }

    /// The answer to any request; `None` where none can be made of it.
    async fn answer(&self, asked: &PendingRequest) -> Option<Reply> {
        let (request, question, datagram) =
            (&*asked.bytes, asked.question.as_ref(), asked.carrier == Carrier::Datagram);
        let used = self.resolver.resolvers().await;
        let plan = match question {
            None => Some(Plan::Forward),
            Some(question) => self.plan(&used, question).await,
        };
        let outcome = if plan.is_some() { RequestOutcome::Forwarded } else { RequestOutcome::FailedOpen };
        let fallback = match plan.unwrap_or(Plan::Forward) {
            Plan::Answer(answer) => {
                if let Some((bytes, outcome)) = question.and_then(|question| self.ours(question, answer, datagram)) {
                    return Some(self.done(asked, outcome, bytes));
                }
                None
            }
            Plan::ForwardOr(answer) => Some(answer),
            Plan::Forward => None,
        };
        let forwarded = self.forward(asked, &used).await;
        let ours = fallback.filter(|ours| match &forwarded {
            Ok(answered) => match answered.kind {
                message::ResponseKind::NoSuchName => true,
                // That there is no such record is not known where nobody could say.
                message::ResponseKind::Failure => !ours.records.is_empty(),
                message::ResponseKind::Exists | message::ResponseKind::NoData => false,
            },
            Err(UpstreamError::NoResolver) => true,
            Err(_) => !ours.records.is_empty(),
        });
        let ours = question.zip(ours).and_then(|(question, ours)| self.ours(question, ours, datagram));
        if let Some((bytes, _)) = ours {
            return Some(self.done(asked, RequestOutcome::Completed, bytes));
        }
        match forwarded {
            Ok(UpstreamAnswer { bytes, stream, .. }) => {
                if let Some(bytes) = self.complete(asked, &used, &bytes) {
                    return Some(self.done(asked, RequestOutcome::Completed, bytes));
                }
                if datagram {
                    self.resolver.keep_answer(asked.resolver, request, &bytes);
                }
                let rest = stream.filter(|_| question.is_some_and(Question::is_transfer));
                Some(Reply { rest, ..self.done(asked, outcome, bytes) })
            }
            Err(error) => {
                if let Some(suppressed) = self.resolver.metrics.complaints.allow() {
                    let name = question.map(|question| &*question.name);
                    tracing::warn!(target: "dns", pod = self.label, query = name, %error, suppressed, "DNS request not answered");
                }
                message::server_failure(request, question).map(|bytes| self.done(asked, RequestOutcome::Failed, bytes))
            }
        }
    }

    fn done(&self, asked: &PendingRequest, outcome: RequestOutcome, bytes: Vec<u8>) -> Reply {
        self.finish(asked.carrier, asked.question.as_ref(), outcome);
        Reply { bytes, rest: None }
    }

    /// What is to be done with a question; `None` where the mesh cannot say.
    async fn plan(&self, used: &PodResolvers, question: &Question) -> Option<Plan> {
        let mut known = match self.client.now() {
            Some(known) => known,
            None => timeout(FACTS_WAIT, self.client.soon()).await.ok().flatten()?,
        };
        for _ in 0..lookup::WANTED_MAX {
            let Some(wanted) = lookup::wanted(&self.context(&known, used), &question.name) else { break };
            let _asking = timeout(FACTS_WAIT, self.asking.acquire()).await.ok()?.ok()?;
            timeout(FACTS_WAIT, self.mesh.ask(&known.1.uid, wanted)).await.ok()?.ok()?;
            known = self.client.now()?;
        }
        Some(lookup::decide(&self.context(&known, used), &question.name, question.kind))
    }

    async fn forward(&self, asked: &PendingRequest, used: &PodResolvers) -> Result<UpstreamAnswer, UpstreamError> {
        let (requests, begun) = (self.counted(asked.carrier, type_word(asked.question.as_ref())), Instant::now());
        let mut servers = used.in_order(asked.resolver);
        if asked.resolver.is_some() && asked.question.is_none() {
            // A change of a zone, say, is for the one that it was sent to.
            servers.list.truncate(1);
        }
        let answered = self.resolver.ask(asked.carrier, &servers, &asked.bytes).await;
        let seconds = answered.is_ok().then(|| begun.elapsed().as_secs_f64());
        requests.upstream(seconds);
        answered
    }

    /// An alias of the pod's resolvers may lead to a name that only the mesh knows.
    fn complete(&self, asked: &PendingRequest, used: &PodResolvers, answer: &[u8]) -> Option<Vec<u8>> {
        let DanglingAlias { end, kind } = message::dangling_alias(answer)?;
        let known = self.client.now()?;
        let plan = lookup::decide(&self.context(&known, used), &end, kind);
        let Plan::Answer(mut ours) = plan else { return None };
        ours.records.shuffle(&mut rand::rng());
        let limit = match (asked.carrier, &asked.question) {
            (Carrier::Datagram, Some(question)) => question.datagram_limit(),
            _ => u16::MAX,
        };
        message::with_alias_target(answer, &end, &ours, self.ttl(), limit)
    }

    async fn streams(self: Arc<Self>, listener: std::net::TcpListener, tasks: &Group) {
        let Ok(listener) = TcpListener::from_std(listener).inspect_err(|error| self.broken(error)) else { return };
        loop {
            // Further ones wait in the listener's queue until one has ended.
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, client)) => {
                    if !stream.local_addr().is_ok_and(|local| is_the_pod(client.ip(), local.ip())) {
                        reset_on_close(&stream);
                        continue;
                    }
                    let server = self.clone();
                    tasks.spawn(async move { server.stream(stream, client, permit).await });
                }
                Err(error) => {
                    if let Some(suppressed) = self.complaints.allow() {
                        tracing::warn!(pod = self.label, %error, suppressed, "cannot accept DNS connections; trying again");
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// One connection: requests one after the other, until the client ends it or is silent.
    async fn stream(&self, mut stream: TcpStream, client: SocketAddr, _permit: OwnedSemaphorePermit) {
        // Only speeds it up.
        let _ = stream.set_nodelay(true);
        let resolver = original_dst(&stream, client).ok();
        while let Ok(Ok(bytes)) = timeout(IDLE, read_message(&mut stream)).await {
            let question = match message::read(&bytes) {
                Request::Invalid => return self.counts.add(RequestOutcome::Ignored),
                Request::NotForMesh => None,
                Request::Question(question) => Some(question),
            };
            let asked = PendingRequest { resolver, question, bytes, carrier: Carrier::Stream };
            let Some(Reply { bytes, rest }) = Box::pin(self.answer(&asked)).await else { return };
            if !matches!(timeout(IDLE, write_message(&mut stream, &bytes)).await, Ok(Ok(()))) {
                return;
            }
            if let Some(rest) = rest
                && timeout(TRANSFER, relay_transfer(rest, &mut stream, IDLE)).await.is_err()
            {
                return;
            }
            // Other pods have their turn.
            tokio::task::yield_now().await;
        }
    }

    /// Counts a request and tells of it where that is wanted.
    fn finish(&self, carrier: Carrier, question: Option<&Question>, outcome: RequestOutcome) {
        self.counts.add(outcome);
        let query_type = type_word(question);
        self.counted(carrier, query_type).all.inc();
        let name = question.map_or("", |question| &*question.name);
        let (pod, outcome, protocol) = (&*self.label, outcome.word(), carrier.word());
        if self.logged.load(Ordering::Relaxed) {
            tracing::info!(target: "dns", pod, query = name, query_type, protocol, outcome, "DNS request");
        } else {
            tracing::debug!(target: "dns", pod, query = name, query_type, protocol, outcome, "DNS request");
        }
    }

    /// Metrics of requests of one type: kept from when it is known who asks.
    fn counted(&self, carrier: Carrier, query_type: &'static str) -> TypeMetrics {
        let key = (query_type, carrier.word());
        let mut requests = self.requests.lock();
        if let Some((_, kept)) = requests.iter().find(|(kept, _)| *kept == key) {
            return kept.clone();
        }
        let known = self.client.now();
        let labels = RequestLabels::new(key.0, key.1, known.as_ref().map(|(_, workload)| &**workload));
        let made = Arc::new(self.resolver.metrics.requests.of(&labels));
        if known.is_some() {
            requests.push((key, made.clone()));
        }
        made
    }
}

fn try_send(socket: &UdpSocket, bytes: &[u8], to: Client) -> io::Result<()> {
    socket.try_io(Interest::WRITABLE, || datagram::send(socket, bytes, to))
}

async fn send(socket: &UdpSocket, bytes: &[u8], to: Client) -> io::Result<()> {
    loop {
        socket.writable().await?;
        match try_send(socket, bytes, to) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return sent,
        }
    }
}

fn type_word(question: Option<&Question>) -> &'static str {
    question.map_or(message::UNKNOWN, |question| question.type_word)
}

/// A request that has to wait for others.
#[derive(Debug)]
struct PendingRequest {
    /// Whom the pod has asked, where that is known.
    resolver: Option<SocketAddr>,
    question: Option<Question>,
    bytes: Vec<u8>,
    carrier: Carrier,
}

/// A reply, and where more of it comes from.
#[derive(Debug)]
struct Reply {
    bytes: Vec<u8>,
    rest: Option<TcpStream>,
}
