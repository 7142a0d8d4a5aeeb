//! The stream to the control plane: connecting, reading, answering, and when to try again.

use super::delta::{ADDRESS, AUTHORIZATION, Delta};
use super::{Config, Freshness, Metrics, ReasonLabel, UrlLabel, saved};
use crate::mesh::Store;
use crate::proto::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use crate::rpc::{self, MESSAGE_BYTES_MAX};
use crate::task::Signal;
use crate::task::backoff::Backoff;
use crate::task::ready::Pending;
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

/// Shortest wait before another attempt.
const RETRY_MIN: Duration = Duration::from_millis(20);
/// Longest wait before another attempt.
const RETRY_MAX: Duration = Duration::from_secs(15);
/// A stream that lived this long was healthy: the waits begin anew.
const HEALTHY: Duration = Duration::from_secs(10);
/// How long the first response of each type may take.
const FIRST_RESPONSE: Duration = Duration::from_secs(60);
/// How long the control plane may take to read a request.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Requests that may wait to be sent.
const QUEUE: usize = 16;
/// Shortest time between two writings of the state file.
const SAVE_EVERY: Duration = Duration::from_secs(5);
/// A reason that stays the same is logged again this often.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Why a stream ended, or never began.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Connect(#[from] rpc::ConnectError),
    #[error("the control plane refused the stream: {}: {}", .0.code(), .0.message())]
    Refused(Box<Status>),
    #[error("the stream has failed: {}: {}", .0.code(), .0.message())]
    Failed(Box<Status>),
    #[error("the control plane has ended the stream")]
    Complete,
    #[error("no first response within {} s", FIRST_RESPONSE.as_secs())]
    Silent,
    #[error("the control plane does not read what it is sent")]
    Stuck,
}

impl StreamError {
    /// The word in `istio_xds_connection_terminations_total{reason}` (source: the reference).
    fn word(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Refused(_) => "ConnectionError",
            Self::Complete => "Complete",
            Self::Failed(status) if is_recycled(status) => "Reconnect",
            Self::Failed(_) | Self::Silent | Self::Stuck => "Error",
        }
    }

    /// Whether the server found a message too large.
    fn is_too_large(&self) -> bool {
        matches!(self, Self::Refused(status) | Self::Failed(status) if status.code() == Code::ResourceExhausted)
    }
}

/// Whether a server that has had us long enough, or is going away in order, ends a stream like this.
fn is_recycled(status: &Status) -> bool {
    match status.code() {
        Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => true,
        Code::Unavailable => ["transport is closing", "goaway"].iter().any(|text| status.message().contains(text)),
        _ => false,
    }
}

/// Keeps the store in step with the control plane.
pub struct Client {
    config: Config,
    node: Node,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    freshness: Arc<Freshness>,
    delta: Delta,
    /// Given up when there are facts to serve by.
    ready: Option<Pending>,
    /// Whether something has changed since the state file was written.
    unsaved: bool,
    /// Whether the last request was too large with the versions of all that is held.
    too_large: bool,
    said: Option<(String, Instant)>,
}

impl Client {
    /// A client that has not connected yet. `ready` is given up when the first facts are there.
    pub fn new(
        config: Config,
        store: Arc<Store>,
        metrics: Arc<Metrics>,
        freshness: Arc<Freshness>,
        ready: Pending,
    ) -> Self {
        let node =
            Node { id: config.node_id.clone(), cluster: String::new(), metadata: Some(structure(&config.metadata)) };
        let delta = Delta::new(config.on_demand, config.state_file.is_some());
        let (ready, unsaved, too_large, said) = (Some(ready), false, false, None);
        Self { config, node, store, metrics, freshness, delta, ready, unsaved, too_large, said }
    }

    /// Runs until told to stop; then writes the state file.
    pub async fn run(mut self, stop: Signal) {
        self.restore();
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        loop {
            let begun = Instant::now();
            let error = tokio::select! {
                ended = self.session() => ended,
                () = stop.gentle() => break,
            };
            self.metrics.terminations.get_or_create(&ReasonLabel { reason: error.word() }).inc();
            let was_live = self.freshness.report().live;
            self.freshness.change(|state| {
                if state.live {
                    state.confirmed = Some(SystemTime::now());
                }
                state.live = false;
                state.error = Some(error.to_string());
            });
            if begun.elapsed() >= HEALTHY {
                backoff.reset();
            }
            self.too_large = error.is_too_large() && !self.too_large;
            let wait = backoff.next();
            self.say(&error, was_live, wait);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.gentle() => break,
            }
        }
        self.save();
    }

    /// One line when a stream ends or a new reason appears; the same reason again once a minute.
    fn say(&mut self, error: &StreamError, was_live: bool, wait: Duration) {
        let text = error.to_string();
        let control_plane = self.config.rpc.address.to_string();
        if was_live && matches!(error.word(), "Complete" | "Reconnect") {
            tracing::info!(control_plane, reason = text, "the control plane has recycled the stream; connecting again");
            return;
        }
        let known = self.said.as_ref().is_some_and(|(said, at)| *said == text && at.elapsed() < SAY_AGAIN);
        if known {
            tracing::debug!(control_plane, %error, retry = ?wait, "no stream to the control plane");
            return;
        }
        self.said = Some((text, Instant::now()));
        let age = self.freshness.report().age;
        tracing::warn!(
            control_plane, %error, retry = ?wait, facts_age = ?age,
            "no stream to the control plane; what is known stays in force"
        );
    }

    async fn session(&mut self) -> StreamError {
        match self.try_session().await {
            Ok(()) => StreamError::Complete,
            Err(error) => error,
        }
    }

    async fn try_session(&mut self) -> Result<(), StreamError> {
        let connection = rpc::connect(&self.config.rpc).await?;
        let mut client = AggregatedDiscoveryServiceClient::with_origin(connection, self.config.rpc.address.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (send, requests) = mpsc::channel(QUEUE);
        let without_versions = std::mem::take(&mut self.too_large);
        for request in self.delta.open(&self.node, without_versions) {
            self::send(&send, request).await?;
        }
        let first = Instant::now() + FIRST_RESPONSE;
        let opened = timeout(FIRST_RESPONSE, client.delta_aggregated_resources(ReceiverStream::new(requests)));
        let opened = opened.await.map_err(|_| StreamError::Silent)?;
        let mut responses = opened.map_err(|status| StreamError::Refused(Box::new(status)))?.into_inner();
        let mut saves = tokio::time::interval(SAVE_EVERY);
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        let answer = self.take(response);
                        self::send(&send, answer).await?;
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(StreamError::Failed(Box::new(status))),
                },
                wanted = self.store.questions(), if self.config.on_demand => {
                    let (requests, update) = self.delta.ask(wanted);
                    if !update.is_empty() {
                        self.store.update(update);
                    }
                    for request in requests {
                        self::send(&send, request).await?;
                    }
                }
                _ = saves.tick() => self.save(),
                () = tokio::time::sleep_until(first), if !self.delta.answered() => return Err(StreamError::Silent),
            }
        }
    }

    /// Applies a response and gives the answer to it.
    fn take(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let url = match response.type_url.as_str() {
            ADDRESS => ADDRESS,
            AUTHORIZATION => AUTHORIZATION,
            _ => "unknown",
        };
        let label = UrlLabel { url };
        self.metrics.messages.get_or_create(&label).inc();
        let (resources, removed) = (response.resources.len(), response.removed_resources.len());
        let received = self.delta.receive(response);
        self.metrics.bytes.get_or_create(&label).inc_by(received.bytes as u64);
        if !received.faults.is_empty() {
            self.metrics.refused.get_or_create(&label).inc_by(received.faults.len() as u64);
            let faults = received.answer.error_detail.as_ref().map_or("", |detail| &detail.message);
            tracing::error!(
                url,
                refused = received.faults.len(),
                faults,
                "resources of the control plane were refused"
            );
        }
        if !received.update.is_empty() {
            let version = self.store.update(received.update);
            self.unsaved = true;
            tracing::debug!(version, url, resources, removed, "facts changed");
        }
        let (workloads, services, policies) = self.store.load().counts();
        for (url, count) in [("workload", workloads), ("service", services), ("policy", policies)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.metrics.resources.get_or_create(&UrlLabel { url }).set(count);
        }
        if self.delta.answered() && !self.freshness.report().live {
            self.freshness.change(|state| {
                (state.live, state.from_file, state.error) = (true, false, None);
                state.confirmed = Some(SystemTime::now());
            });
            self.said = None;
            let control_plane = self.config.rpc.address.to_string();
            tracing::info!(control_plane, workloads, services, policies, "in step with the control plane");
            self.ready = None;
        }
        received.answer
    }

    fn restore(&mut self) {
        let Some(path) = &self.config.state_file else { return };
        match saved::read(path) {
            Ok(None) => {}
            Ok(Some(state)) => {
                self.store.update(self.delta.restore(state.types));
                let (workloads, services, policies) = self.store.load().counts();
                self.freshness.change(|fresh| (fresh.confirmed, fresh.from_file) = (Some(state.at), true));
                let (path, age) = (path.display().to_string(), self.freshness.report().age);
                tracing::info!(
                    path,
                    ?age,
                    workloads,
                    services,
                    policies,
                    "serving by the state file until the control plane is there"
                );
                self.ready = None;
            }
            Err(error) => tracing::error!(%error, "starting without the last known state"),
        }
    }

    fn save(&mut self) {
        let Some(path) = &self.config.state_file else { return };
        // What was never complete would pass for the whole mesh at the next start.
        if !self.unsaved || !self.delta.synced() {
            return;
        }
        match saved::write(path, &self.config.rpc.address.to_string(), self.delta.saved()) {
            Ok(()) => {
                self.metrics.saved.inc();
                self.unsaved = false;
            }
            Err(error) => {
                self.metrics.save_failures.inc();
                tracing::error!(%error, "the last known state could not be kept");
            }
        }
    }
}

async fn send(queue: &mpsc::Sender<DeltaDiscoveryRequest>, request: DeltaDiscoveryRequest) -> Result<(), StreamError> {
    match timeout(SEND_DEADLINE, queue.send(request)).await {
        // A closed queue is the end of the stream, whose reason the next read gives.
        Ok(_) => Ok(()),
        Err(_) => Err(StreamError::Stuck),
    }
}

/// JSON in the form that xDS carries it.
fn structure(map: &serde_json::Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct { fields: map.iter().map(|(key, value)| (key.clone(), value_of(value))).collect() }
}

fn value_of(value: &Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(list) => Kind::ListValue(prost_types::ListValue { values: list.iter().map(value_of).collect() }),
        Value::Object(map) => Kind::StructValue(structure(map)),
    };
    prost_types::Value { kind: Some(kind) }
}
