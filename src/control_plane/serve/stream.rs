//! One stream of mesh facts: reads requests, and sends what the session says, when an edition or a request makes it
//! say something.

use super::grpc::{Memory, Message, Messages, Sender};
use super::metrics::{of, word};
use super::node;
use super::nodes::{Connected, Entry, Place};
use super::session::{Received, Response, Session};
use super::shared::Shared;
use super::subscription::View;
use crate::control_plane::Caller;
use crate::control_plane::catalog::{Edition, Kind};
use crate::proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use crate::rpc::MESSAGE_BYTES_MAX;
use crate::task::Signal;
use crate::task::thread::run_blocking;
use crate::telemetry::limit::shortened;
use bytes::Bytes;
use prost::Message as _;
use prost::encoding::{DecodeContext, decode_key, skip_field};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Status;

/// How long the first request may take, with the wait for memory where it is large.
const FIRST_DEADLINE: Duration = Duration::from_secs(60);
/// How long the first answer waits for a client that has asked for addresses only.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a client may leave a response without an answer. It may have to read a whole mesh first.
const ACKNOWLEDGED: Duration = Duration::from_secs(120);
/// Requests from this size on are decoded off the runtime.
const LARGE: usize = 64 << 10;

/// Most names, versions and other parts of a request. Each needs far more memory than it has bytes.
const PARTS_MAX: usize = 300_000;

/// The fields for names that are asked for or taken back, and for versions.
const NAMES_AND_VERSIONS: [u32; 3] = [3, 4, 5];
/// Most bytes of all other fields. Their inner parts are not counted, and need even more memory.
const OTHERS_MAX: usize = 1 << 20;

/// A request, and the memory that was set aside for it.
struct Request {
    request: DeltaDiscoveryRequest,
    memory: Option<Memory>,
}

/// Reads requests until the end, or until nobody wants them.
async fn read(mut messages: Messages, out: mpsc::Sender<Result<Request, Status>>) {
    loop {
        let request = match messages.next().await {
            Ok(None) => return,
            Ok(Some(message)) => decode(message).await,
            Err(status) => Err(status),
        };
        let is_last = request.is_err();
        if out.send(request).await.is_err() || is_last {
            return;
        }
    }
}

async fn decode(message: Message) -> Result<Request, Status> {
    let is_large = message.bytes.len() >= LARGE;
    // The memory stays set aside for as long as the work takes, whatever becomes of the stream.
    let decode = move || {
        let Message { bytes, memory } = message;
        let (parts, others) = parts(bytes.clone());
        if others > OTHERS_MAX {
            return Err(Status::invalid_argument("the description of the node, or an error, is too long"));
        }
        if parts > PARTS_MAX {
            // In the words by which a client knows that it should ask without the versions of what it holds.
            let text = format!("grpc: received message larger than max ({parts} vs. {PARTS_MAX} names and versions)");
            return Err(Status::resource_exhausted(text));
        }
        let request = DeltaDiscoveryRequest::decode(bytes);
        let request = request.map_err(|_| Status::invalid_argument("the request cannot be decoded"))?;
        Ok(Request { request, memory })
    };
    match is_large {
        false => decode(),
        true => run_blocking(decode).await.unwrap_or_else(|| Err(Status::internal("the request cannot be decoded"))),
    }
}

/// How many fields a request has, and how many bytes all have that are neither names nor versions. What cannot be decoded
/// ends the count.
fn parts(mut bytes: Bytes) -> (usize, usize) {
    let (mut count, mut others) = (0, 0);
    while !bytes.is_empty() {
        let before = bytes.len();
        let Ok((tag, wire)) = decode_key(&mut bytes) else { break };
        if skip_field(wire, tag, &mut bytes, DecodeContext::default()).is_err() {
            break;
        }
        count += 1;
        if !NAMES_AND_VERSIONS.contains(&tag) {
            others += before - bytes.len();
        }
    }
    (count, others)
}

/// Where a stream comes from.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) caller: Caller,
    pub(super) peer: SocketAddr,
    /// Its place among the streams of its caller.
    pub(super) place: Place,
}

/// Serves a stream until its end. Returns the status that it ends with.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    origin: Origin,
    messages: Messages,
    sender: &Sender,
    stop: &Signal,
) -> Status {
    let (out, mut requests) = mpsc::channel(1);
    // The reader ends with this stream: its queue is closed then.
    let reading = read(messages, out);
    let working = async {
        let first = match timeout(FIRST_DEADLINE, requests.recv()).await {
            Ok(Some(Ok(first))) => first,
            Ok(Some(Err(status))) => return status,
            Ok(None) => return Status::ok(""),
            Err(_) => return Status::deadline_exceeded("no request came"),
        };
        match Stream::open(shared, origin, &first.request) {
            Ok(mut stream) => stream.run(first, &mut requests, sender, stop).await,
            Err(status) => status,
        }
    };
    tokio::pin!(reading, working);
    let mut is_read = false;
    loop {
        tokio::select! {
            status = &mut working => return status,
            () = &mut reading, if !is_read => is_read = true,
        }
    }
}

struct Stream {
    shared: Arc<Shared>,
    session: Session,
    entry: Entry,
    editions: watch::Receiver<Arc<Edition>>,
    /// The memory of requests that are not answered yet.
    memory: Vec<Memory>,
    /// Until when each type's last response has to be acknowledged.
    acknowledge_by: BTreeMap<Kind, Instant>,
    patience: Instant,
}

impl Stream {
    fn open(shared: &Arc<Shared>, origin: Origin, first: &DeltaDiscoveryRequest) -> Result<Self, Status> {
        let Origin { caller, peer, place } = origin;
        let client = node::client(first.node.as_ref(), &caller).map_err(|error| match error.is_denial() {
            true => Status::permission_denied(error.to_string()),
            false => Status::invalid_argument(error.to_string()),
        })?;
        let session = Session::new(client.node.clone());
        let since = SystemTime::now();
        let connected = Connected { client, caller, peer, since, on_demand: false, told: Default::default() };
        let entry = shared.nodes.add(place, connected);
        let (editions, now) = (shared.editions.follow(), Instant::now());
        let shared = shared.clone();
        Ok(Self {
            shared,
            session,
            entry,
            editions,
            memory: Vec::new(),
            acknowledge_by: BTreeMap::new(),
            patience: now + PATIENCE,
        })
    }

    async fn run(
        &mut self,
        first: Request,
        requests: &mut mpsc::Receiver<Result<Request, Status>>,
        sender: &Sender,
        stop: &Signal,
    ) -> Status {
        if let Err(status) = self.take(first) {
            return status;
        }
        loop {
            if let Err(status) = self.flush(sender).await {
                return status;
            }
            let late = self.acknowledge_by.values().min().copied();
            tokio::select! {
                request = requests.recv() => match request {
                    Some(Ok(request)) => if let Err(status) = self.take(request) {
                        return status;
                    },
                    Some(Err(status)) => return status,
                    None => return Status::ok(""),
                },
                changed = self.editions.changed() => if changed.is_err() {
                    return Status::unavailable("the control plane is ending");
                },
                () = sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() => {
                    return Status::unavailable("a response was not acknowledged in time");
                }
                () = sleep_until(self.patience), if self.session.waits_for_policies() => self.session.stop_waiting(),
                // In the words by which clients know that this is no failure.
                () = stop.gentle() => return Status::unavailable("transport is closing"),
                () = sender.gone() => return Status::cancelled("the client is gone"),
            }
        }
    }

    /// Takes a request.
    fn take(&mut self, Request { request, memory }: Request) -> Result<(), Status> {
        self.memory.extend(memory);
        let received = self.session.receive(request).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        let mut state = self.entry.state.lock();
        match received {
            Received::Subscription => state.on_demand = self.session.is_on_demand(),
            Received::Acknowledged(kind) => {
                self.acknowledge_by.remove(&kind);
                let told = state.told(kind);
                told.acknowledged = told.sent;
            }
            Received::Refused(kind, text) => {
                self.acknowledge_by.remove(&kind);
                let text = shortened(text);
                let told = state.told(kind);
                (told.acknowledged, told.refused) = (told.sent, told.refused + 1);
                told.last_refusal = Some(text.clone());
                self.shared.metrics.refused.get_or_create(&of(kind)).inc();
                if let Some(suppressed) = self.shared.metrics.log.allow() {
                    let (node, kind) = (&*state.client.id, word(kind));
                    tracing::warn!(
                        node,
                        kind,
                        suppressed,
                        error = text,
                        "a daemon refused resources; it is not told them again until they change"
                    );
                }
            }
            Received::Stale | Received::UnknownType => {}
        }
        Ok(())
    }

    /// Sends everything that may be sent now.
    async fn flush(&mut self, sender: &Sender) -> Result<(), Status> {
        loop {
            let current = self.editions.borrow_and_update().clone();
            let Some((response, bytes)) = self.next(current).await? else { break };
            self.acknowledge_by.insert(response.kind, Instant::now() + ACKNOWLEDGED);
            // The client's names are answered. How fast it reads the answer is no reason to keep the memory.
            if !self.session.waits_for_policies() {
                self.memory.clear();
            }
            let size = bytes.iter().map(Bytes::len).sum();
            if size > MESSAGE_BYTES_MAX {
                let text = format!("the answer has {size} bytes, and daemons accept {MESSAGE_BYTES_MAX}");
                return Err(Status::out_of_range(text));
            }
            self.note(&response, size);
            let sending = timeout(ACKNOWLEDGED, sender.send(bytes)).await;
            sending
                .map_err(|_| Status::unavailable("the client does not read"))?
                .map_err(|_| Status::cancelled("the client is gone"))?;
        }
        if !self.session.waits_for_policies() {
            self.memory.clear();
        }
        Ok(())
    }

    /// The next response, with its encoded form. One that takes a while is made off the runtime, few at a time.
    async fn next(&mut self, current: Arc<Edition>) -> Result<Option<(Response, Vec<Bytes>)>, Status> {
        if !self.session.is_heavy(&current) {
            return Ok(next(&mut self.session, &self.shared, &current));
        }
        let given_up = |_| Status::unavailable("the control plane is ending");
        let turn = self.shared.heavy.clone().acquire_owned().await.map_err(given_up)?;
        let mut session = std::mem::replace(&mut self.session, Session::new("".into()));
        let shared = self.shared.clone();
        let work = move || {
            // Also where the stream ends meanwhile.
            let _turn = turn;
            let response = next(&mut session, &shared, &current);
            (session, response)
        };
        let (session, response) =
            run_blocking(work).await.ok_or_else(|| Status::internal("no answer could be made"))?;
        self.session = session;
        Ok(response)
    }

    fn note(&self, response: &Response, bytes: usize) {
        let metrics = &self.shared.metrics;
        metrics.responses.get_or_create(&of(response.kind)).inc();
        metrics.bytes.get_or_create(&of(response.kind)).inc_by(bytes as u64);
        if let (false, Some(made)) = (response.is_first, response.edition.made) {
            metrics.push_seconds.observe(made.elapsed().as_secs_f64());
        }
        let mut state = self.entry.state.lock();
        let told = state.told(response.kind);
        (told.sent, told.sent_at) = (response.edition.number, Some(SystemTime::now()));
    }
}

/// The next response of a session, with its encoded form.
fn next(session: &mut Session, shared: &Shared, current: &Arc<Edition>) -> Option<(Response, Vec<Bytes>)> {
    if session.is_on_demand() && !shared.index.read().has(current) {
        shared.index.write().advance(current);
    }
    let checkpoint = shared.editions.checkpoint(current);
    let (differences, index) = (&shared.differences, &shared.index);
    let response = session.next(&View { current, checkpoint: &checkpoint, differences, index })?;
    let bytes = response.bytes();
    Some((response, bytes))
}
