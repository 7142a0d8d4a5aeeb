//! The DNS server of one pod. It listens in the pod's namespace and answers that pod only.
//!
//! Requests that the mesh facts or the cache can answer are answered at once, in turns of a bounded number of
//! datagrams, so that no pod delays another. Each request that must wait becomes a task; the number of tasks per pod is
//! bounded.

use super::answer::MeshAnswer;
use super::client::ClientFacts;
use super::framing::{read_message, relay_transfer, write_message};
use super::listeners::{Listeners, is_the_pod, on_the_link_of};
use super::lookup::{self, Plan};
use super::message::{self, DanglingAlias, Question, Request};
use super::metrics::{self, OutcomeCounts, RequestLabels, RequestOutcome};
use super::resolver::{PodResolvers, Resolver};
use super::upstream::{Carrier, UpstreamAnswer, UpstreamError, with_buffer};
use crate::mesh::{Snapshot, Store, Workload};
use crate::ports;
use crate::sys::conntrack::Conntrack;
use crate::sys::datagram::{self, Client};
use crate::sys::original_dst::original_dst;
use crate::sys::socket::reset_on_close;
use crate::task::Group;
use crate::telemetry::limit::LogLimit;
use crate::telemetry::series::SeriesHandle;
use parking_lot::Mutex;
use rand::seq::SliceRandom;
use std::cell::OnceCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

/// How many datagrams of one pod are served in one turn; then other pods are served.
const DATAGRAMS_PER_TURN: usize = 32;
/// How long a turn may take.
const TURN_TIME: Duration = Duration::from_micros(300);
/// How many requests of one pod may wait for resolvers or facts.
const WAITING_MAX: usize = 256;
/// How many TCP connections of one pod are served at the same time.
const CONNECTIONS_MAX: usize = 64;
/// How long a TCP connection may be silent.
const IDLE: Duration = Duration::from_secs(10);
/// How long a zone transfer may take.
const TRANSFER: Duration = Duration::from_secs(120);
/// How long a request waits for mesh facts before it is answered without them.
const FACTS_WAIT: Duration = Duration::from_secs(1);
/// How many requests to an on-demand control plane one pod may cause at the same time.
const ON_DEMAND_MAX: usize = 16;

/// The server of one pod.
#[derive(Debug)]
pub struct Server {
    /// `namespace/name` of the pod, for the log.
    pub label: String,
    /// The pod's resolvers.
    pub resolver: Arc<Resolver>,
    /// The pod's workload.
    pub client: Box<dyn ClientFacts>,
    /// The mesh facts, for requests to an on-demand control plane.
    pub mesh: Arc<Store>,
    /// Requests by outcome.
    pub counts: OutcomeCounts,
    /// Whether each request is logged.
    pub logged: AtomicBool,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    on_demand: Semaphore,
    /// Metrics by record type and protocol.
    requests: Mutex<Vec<((&'static str, &'static str), TypeMetrics)>>,
    complaints: LogLimit,
}

/// Metrics of the requests of one record type and protocol.
type TypeMetrics = Arc<SeriesHandle<RequestLabels, metrics::RequestMetrics>>;

impl Server {
    /// A server for the pod with this label (`namespace/name`).
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
            on_demand: Semaphore::new(ON_DEMAND_MAX),
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
        let Ok(socket) = made.inspect_err(|error| self.report_broken(error)) else { return };
        let resolver_of = |client: Client| {
            let ours = SocketAddr::new(client.local, ports::DNS);
            let asked = conntrack.as_ref()?.original_destination(client.address, ours).ok()??;
            Some(on_the_link_of(client.address, asked))
        };
        loop {
            if let Err(error) = socket.readable().await {
                return self.report_broken(&error);
            }
            let turn = Instant::now();
            for _ in 0..DATAGRAMS_PER_TURN {
                match self.next_datagram(&socket, &resolver_of, tasks) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The kernel reports answers that could not be delivered here. That is no reason to stop.
                    Err(_) => {}
                }
                if turn.elapsed() > TURN_TIME {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn report_broken(&self, error: &io::Error) {
        tracing::error!(pod = self.label, %error, "cannot serve the pod's DNS");
    }

    /// Receives one request and answers it, or starts a task for it.
    fn next_datagram(
        self: &Arc<Self>,
        socket: &Arc<UdpSocket>,
        resolver_of: &impl Fn(Client) -> Option<SocketAddr>,
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
            // Which resolver the pod asked matters only if the mesh facts do not answer.
            let asked_resolver = OnceCell::new();
            let asked_resolver = || *asked_resolver.get_or_init(|| resolver_of(client));
            if let Some((reply, outcome)) = self.answer_at_once(request, question.as_ref(), &asked_resolver) {
                self.record(Carrier::Datagram, question.as_ref(), outcome);
                // If the socket has no room the answer is lost, like any other datagram; the client asks again.
                return try_send(socket, &reply, client);
            }
            let Ok(permit) = self.waiting.clone().try_acquire_owned() else {
                self.record(Carrier::Datagram, question.as_ref(), RequestOutcome::Limited);
                let reply = message::server_failure(request, question.as_ref()).unwrap_or_default();
                return try_send(socket, &reply, client);
            };
            let (server, socket, resolver) = (self.clone(), socket.clone(), asked_resolver());
            let request = PendingRequest { resolver, question, bytes: request.to_vec(), carrier: Carrier::Datagram };
            tasks.spawn(async move { server.answer_later(&socket, client, &request, permit).await });
            Ok(())
        })
    }

    async fn answer_later(
        &self,
        socket: &UdpSocket,
        client: Client,
        request: &PendingRequest,
        _permit: OwnedSemaphorePermit,
    ) {
        let reply = Box::pin(self.answer(request)).await;
        if let Some(Reply { bytes, .. }) = reply
            && let Err(error) = timeout(IDLE, send(socket, &bytes, client)).await.unwrap_or(Ok(()))
            && let Some(suppressed) = self.complaints.allow()
        {
            tracing::debug!(pod = self.label, client = %client.address, %error, suppressed, "a DNS answer could not be sent");
        }
    }

    /// The answer, if it can be given without waiting.
    fn answer_at_once(
        &self,
        request: &[u8],
        question: Option<&Question>,
        asked_resolver: &dyn Fn() -> Option<SocketAddr>,
    ) -> Option<(Vec<u8>, RequestOutcome)> {
        let resolvers = self.resolver.current()?;
        if let Some(question) = question {
            let known = self.client.now()?;
            let context = self.context(&known, &resolvers);
            if lookup::wanted(&context, &question.name).is_some() {
                return None;
            }
            match lookup::decide(&context, &question.name, question.kind) {
                Plan::Answer(answer) => return self.encode(question, answer, true),
                Plan::ForwardOr(_) => return None,
                Plan::Forward => {}
            }
        }
        Some((self.resolver.cached(asked_resolver(), request)?, RequestOutcome::Cached))
    }

    fn context<'a>(
        &'a self,
        known: &'a (Arc<Snapshot>, Arc<Workload>),
        resolvers: &'a PodResolvers,
    ) -> lookup::LookupContext<'a> {
        self.resolver.context((&known.0, &known.1), resolvers)
    }

    /// Our answer to a question. Its records are shuffled each time, because many clients use the first one.
    fn encode(&self, question: &Question, mut answer: MeshAnswer, datagram: bool) -> Option<(Vec<u8>, RequestOutcome)> {
        answer.records.shuffle(&mut rand::rng());
        let outcome = if answer.records.is_empty() { RequestOutcome::NoRecords } else { RequestOutcome::Mesh };
        Some((message::reply(question, &answer, self.ttl(), datagram)?, outcome))
    }

    fn ttl(&self) -> u32 {
        u32::try_from(self.resolver.config.ttl.as_secs()).unwrap_or(u32::MAX)
    }

    /// The answer to any request, after waiting; `None` if the request is too malformed for a reply.
    async fn answer(&self, pending: &PendingRequest) -> Option<Reply> {
        let (request, question, datagram) =
            (&*pending.bytes, pending.question.as_ref(), pending.carrier == Carrier::Datagram);
        let resolvers = self.resolver.resolvers().await;
        let plan = match question {
            None => Some(Plan::Forward),
            Some(question) => self.plan(&resolvers, question).await,
        };
        let outcome = if plan.is_some() { RequestOutcome::Forwarded } else { RequestOutcome::FailedOpen };
        let fallback = match plan.unwrap_or(Plan::Forward) {
            Plan::Answer(answer) => {
                if let Some((bytes, outcome)) = question.and_then(|question| self.encode(question, answer, datagram)) {
                    return Some(self.finished(pending, outcome, bytes));
                }
                None
            }
            Plan::ForwardOr(answer) => Some(answer),
            Plan::Forward => None,
        };
        let forwarded = self.forward(pending, &resolvers).await;
        let ours = fallback.filter(|ours| match &forwarded {
            Ok(answered) => match answered.kind {
                message::ResponseKind::NoSuchName => true,
                // A negative answer of ours cannot stand in for a resolver that failed.
                message::ResponseKind::Failure => !ours.records.is_empty(),
                message::ResponseKind::Exists | message::ResponseKind::NoData => false,
            },
            Err(UpstreamError::NoResolver) => true,
            Err(_) => !ours.records.is_empty(),
        });
        let ours = question.zip(ours).and_then(|(question, ours)| self.encode(question, ours, datagram));
        if let Some((bytes, _)) = ours {
            return Some(self.finished(pending, RequestOutcome::Completed, bytes));
        }
        match forwarded {
            Ok(UpstreamAnswer { from, bytes, stream, .. }) => {
                self.note_names(question, from, &resolvers, &bytes);
                if let Some(bytes) = self.complete(pending, &resolvers, &bytes) {
                    return Some(self.finished(pending, RequestOutcome::Completed, bytes));
                }
                if datagram {
                    self.resolver.keep_answer(pending.resolver, request, &bytes);
                }
                let rest = stream.filter(|_| question.is_some_and(Question::is_transfer));
                Some(Reply { rest, ..self.finished(pending, outcome, bytes) })
            }
            Err(error) => {
                if let Some(suppressed) = self.resolver.metrics.complaints.allow() {
                    let name = question.map(|question| &*question.name);
                    tracing::warn!(target: "dns", pod = self.label, query = name, %error, suppressed, "no resolver answered a DNS request");
                }
                message::server_failure(request, question)
                    .map(|bytes| self.finished(pending, RequestOutcome::Failed, bytes))
            }
        }
    }

    /// Notes which name led to which addresses, if an egress policy asks for names.
    fn note_names(&self, question: Option<&Question>, from: SocketAddr, resolvers: &PodResolvers, answer: &[u8]) {
        let Some(question) = question.filter(|_| resolvers.trusted.contains(&from)) else { return };
        if !self.mesh.load().egress.has_hosts() {
            return;
        }
        self.resolver.answered.note(&question.name, &message::addresses(answer), message::time_to_live(answer));
    }

    fn finished(&self, pending: &PendingRequest, outcome: RequestOutcome, bytes: Vec<u8>) -> Reply {
        self.record(pending.carrier, pending.question.as_ref(), outcome);
        Reply { bytes, rest: None }
    }

    /// What to do with a question; `None` if the mesh facts are not available.
    async fn plan(&self, resolvers: &PodResolvers, question: &Question) -> Option<Plan> {
        let mut known = match self.client.now() {
            Some(known) => known,
            None => timeout(FACTS_WAIT, self.client.soon()).await.ok().flatten()?,
        };
        for _ in 0..lookup::WANTED_MAX {
            let Some(wanted) = lookup::wanted(&self.context(&known, resolvers), &question.name) else { break };
            let _permit = timeout(FACTS_WAIT, self.on_demand.acquire()).await.ok()?.ok()?;
            timeout(FACTS_WAIT, self.mesh.ask(&known.1.uid, wanted)).await.ok()?.ok()?;
            known = self.client.now()?;
        }
        Some(lookup::decide(&self.context(&known, resolvers), &question.name, question.kind))
    }

    async fn forward(
        &self,
        pending: &PendingRequest,
        resolvers: &PodResolvers,
    ) -> Result<UpstreamAnswer, UpstreamError> {
        let (requests, started) =
            (self.type_metrics(pending.carrier, type_word(pending.question.as_ref())), Instant::now());
        let mut servers = resolvers.in_order(pending.resolver);
        if pending.resolver.is_some() && pending.question.is_none() {
            // Requests that are not plain questions, such as zone updates, go only to the resolver that they were sent
            // to.
            servers.list.truncate(1);
        }
        let answered = self.resolver.ask(pending.carrier, &servers, &pending.bytes).await;
        let seconds = answered.is_ok().then(|| started.elapsed().as_secs_f64());
        requests.upstream(seconds);
        answered
    }

    /// Completes an answer of the resolvers whose alias leads to a name that only the mesh knows.
    fn complete(&self, pending: &PendingRequest, resolvers: &PodResolvers, answer: &[u8]) -> Option<Vec<u8>> {
        let DanglingAlias { end, kind } = message::dangling_alias(answer)?;
        let known = self.client.now()?;
        let plan = lookup::decide(&self.context(&known, resolvers), &end, kind);
        let Plan::Answer(mut ours) = plan else { return None };
        ours.records.shuffle(&mut rand::rng());
        let limit = match (pending.carrier, &pending.question) {
            (Carrier::Datagram, Some(question)) => question.datagram_limit(),
            _ => u16::MAX,
        };
        message::with_alias_target(answer, &end, &ours, self.ttl(), limit)
    }

    async fn streams(self: Arc<Self>, listener: std::net::TcpListener, tasks: &Group) {
        let Ok(listener) = TcpListener::from_std(listener).inspect_err(|error| self.report_broken(error)) else {
            return;
        };
        loop {
            // Further connections wait in the listener's queue.
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

    /// Serves one connection: its requests one after the other, until the client closes it or is silent.
    async fn stream(&self, mut stream: TcpStream, client: SocketAddr, _permit: OwnedSemaphorePermit) {
        // A failure only costs speed.
        let _ = stream.set_nodelay(true);
        let resolver = original_dst(&stream, client).ok();
        while let Ok(Ok(bytes)) = timeout(IDLE, read_message(&mut stream)).await {
            let question = match message::read(&bytes) {
                Request::Invalid => return self.counts.add(RequestOutcome::Ignored),
                Request::NotForMesh => None,
                Request::Question(question) => Some(question),
            };
            let pending = PendingRequest { resolver, question, bytes, carrier: Carrier::Stream };
            let Some(Reply { bytes, rest }) = Box::pin(self.answer(&pending)).await else { return };
            if !matches!(timeout(IDLE, write_message(&mut stream, &bytes)).await, Ok(Ok(()))) {
                return;
            }
            if let Some(rest) = rest
                && timeout(TRANSFER, relay_transfer(rest, &mut stream, IDLE)).await.is_err()
            {
                return;
            }
            // Lets other pods be served.
            tokio::task::yield_now().await;
        }
    }

    /// Counts a request, and logs it if the pod's requests are logged.
    fn record(&self, carrier: Carrier, question: Option<&Question>, outcome: RequestOutcome) {
        self.counts.add(outcome);
        let query_type = type_word(question);
        self.type_metrics(carrier, query_type).all.inc();
        let name = question.map_or("", |question| &*question.name);
        let (pod, outcome, protocol) = (&*self.label, outcome.word(), carrier.word());
        if self.logged.load(Ordering::Relaxed) {
            tracing::info!(target: "dns", pod, query = name, query_type, protocol, outcome, "DNS request");
        } else {
            tracing::debug!(target: "dns", pod, query = name, query_type, protocol, outcome, "DNS request");
        }
    }

    /// The metrics of one record type and protocol. They are kept once the pod's workload, and so its labels, are
    /// known.
    fn type_metrics(&self, carrier: Carrier, query_type: &'static str) -> TypeMetrics {
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

/// A request that cannot be answered at once.
#[derive(Debug)]
struct PendingRequest {
    /// The resolver that the pod asked, if it is known.
    resolver: Option<SocketAddr>,
    question: Option<Question>,
    bytes: Vec<u8>,
    carrier: Carrier,
}

/// A reply.
#[derive(Debug)]
struct Reply {
    bytes: Vec<u8>,
    /// The resolver's connection, if more messages follow (zone transfer).
    rest: Option<TcpStream>,
}
