//! The client of the control plane: connects, applies and answers responses, requests what is wanted on demand, and
//! connects again when the stream ends. It also reads and writes the state file.

use super::config::Config;
use super::delta::{ADDRESS, AUTHORIZATION, Delta, Restored};
use super::error::{FIRST_RESPONSE, StreamError};
use super::freshness::Freshness;
use super::metrics::{Metrics, ReasonLabel, UrlLabel};
use super::saved;
use crate::control::noted;
use crate::mesh::{FactKey, ServiceKey, Store};
use crate::proto::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use crate::rpc::{self, MESSAGE_BYTES_MAX};
use crate::task::Signal;
use crate::task::backoff::Backoff;
use crate::task::ready::Pending;
use crate::telemetry::changes::What;
use crate::telemetry::log::brief;
use serde_json::Value;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tracing::field::display;

/// Shortest wait before another attempt.
const RETRY_MIN: Duration = Duration::from_millis(20);
/// Longest wait before another attempt.
const RETRY_MAX: Duration = Duration::from_secs(15);
/// A stream that lasted this long was healthy: the next wait is the shortest again.
const HEALTHY: Duration = Duration::from_secs(10);
/// How long the control plane may leave a request unread.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// How many requests may wait to be sent.
const QUEUE: usize = 16;
/// Shortest time between two writes of the state file. Also half the time for which something that the control plane
/// said does not exist is not requested again.
const TICK: Duration = Duration::from_secs(5);
/// How often the state file is written if nothing changes, so that its date shows that the facts are still true.
const SAVE_AGAIN: Duration = Duration::from_secs(600);
/// How often an unchanged error is logged again.
const LOG_AGAIN: Duration = Duration::from_secs(60);

/// How many notes one log line shows; the others are only counted.
const NOTES_SHOWN: usize = 20;

/// An error that has been logged.
struct LoggedError {
    text: String,
    at: Instant,
}

/// Keeps the store in step with the control plane.
pub struct Client {
    config: Config,
    node: Node,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    freshness: Arc<Freshness>,
    delta: Delta,
    /// Dropped once there are mesh facts, which makes the daemon ready.
    ready: Option<Pending>,
    /// Whether facts have changed since the state file was written.
    unsaved: bool,
    saved_at: Option<Instant>,
    /// Whether the server found the last first request too large because of the versions in it.
    too_large: bool,
    /// Whether the first requests of the last stream contained the versions of held resources.
    sent_versions: bool,
    last_logged: Option<LoggedError>,
}

impl Client {
    /// A client that has not connected yet. `ready` is dropped when the first mesh facts are there.
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
        Self {
            config,
            node,
            store,
            metrics,
            freshness,
            delta,
            ready: Some(ready),
            unsaved: false,
            saved_at: None,
            too_large: false,
            sent_versions: false,
            last_logged: None,
        }
    }

    /// Runs until `stop`, then writes the state file.
    pub async fn run(mut self, stop: Signal) {
        self.restore();
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        loop {
            let started = Instant::now();
            let error = tokio::select! {
                ended = self.session() => ended,
                () = stop.gentle() => break,
            };
            self.metrics.terminations.get_or_create(&ReasonLabel { reason: error.word() }).inc();
            self.save();
            let was_live = self.freshness.report().live;
            self.freshness.change(|state| {
                if state.live {
                    state.confirmed = Some(SystemTime::now());
                }
                state.live = false;
                state.error = Some(error.to_string());
            });
            if started.elapsed() >= HEALTHY {
                backoff.reset();
            }
            self.too_large = error.is_too_large() && self.sent_versions;
            let wait = backoff.next();
            self.log_end(&error, was_live, wait);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.gentle() => break,
            }
        }
        self.save();
    }

    /// Logs the end of a stream. An unchanged error is logged again only after [`LOG_AGAIN`].
    fn log_end(&mut self, error: &StreamError, was_live: bool, wait: Duration) {
        let text = error.to_string();
        let control_plane = self.config.rpc.address.to_string();
        if was_live {
            self.note(format!(
                "The stream of the control plane ended, and the known mesh facts stay in force: {text}."
            ));
        }
        if was_live && error.is_orderly() {
            tracing::info!(
                control_plane,
                reason = text,
                "the control plane closed the stream in an orderly way; connecting again"
            );
            return;
        }
        let is_logged = |logged: &LoggedError| logged.text == text && logged.at.elapsed() < LOG_AGAIN;
        if self.last_logged.as_ref().is_some_and(is_logged) {
            tracing::debug!(control_plane, %error, retry = %brief(wait), "no stream to the control plane");
            return;
        }
        self.last_logged = Some(LoggedError { text, at: Instant::now() });
        let (age, retry) = (self.freshness.report().age.map(brief).map(display), brief(wait));
        if was_live {
            tracing::warn!(
                control_plane, %error, %retry,
                "the connection to the control plane was lost; the known mesh facts stay in force, and changes do not arrive"
            );
        } else {
            tracing::warn!(
                control_plane, %error, %retry, facts_age = age,
                "no stream to the control plane; the known mesh facts stay in force"
            );
        }
    }

    /// Notes a change for the history.
    fn note(&self, text: String) {
        self.metrics.noted.note(What::ControlPlane, self.config.rpc.address.to_string(), text);
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
        let mut outgoing: VecDeque<DeltaDiscoveryRequest> = self.delta.open(&self.node, without_versions).into();
        self.sent_versions = outgoing.iter().any(|request| !request.initial_resource_versions.is_empty());
        while send.capacity() > 0
            && let Some(request) = outgoing.pop_front()
        {
            // There is room, and this is the only sender.
            let _ = send.try_send(request);
        }
        let first = Instant::now() + FIRST_RESPONSE;
        let opened = timeout(FIRST_RESPONSE, client.delta_aggregated_resources(ReceiverStream::new(requests)));
        let opened = opened.await.map_err(|_| StreamError::Silent)?;
        let mut responses = opened.map_err(|status| StreamError::Refused(Box::new(status)))?.into_inner();
        let mut ticks = tokio::time::interval(TICK);
        let mut stuck_at = Instant::now() + SEND_DEADLINE;
        loop {
            if outgoing.is_empty() {
                stuck_at = Instant::now() + SEND_DEADLINE;
            }
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => outgoing.extend(self.take(response)),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(StreamError::Failed(Box::new(status))),
                },
                // Responses are read even while the server does not read requests: it may be waiting for that.
                room = send.reserve(), if !outgoing.is_empty() => {
                    // If the queue is closed, the stream has ended, and the next read returns the reason.
                    if let (Ok(room), Some(request)) = (room, outgoing.pop_front()) {
                        room.send(request);
                        stuck_at = Instant::now() + SEND_DEADLINE;
                    }
                }
                () = tokio::time::sleep_until(stuck_at), if !outgoing.is_empty() => return Err(StreamError::Stuck),
                wanted = self.store.questions(), if self.config.on_demand && outgoing.is_empty() => {
                    outgoing.extend(self.ask(wanted));
                }
                _ = ticks.tick() => {
                    let expired = self.delta.expire();
                    if !expired.is_empty() {
                        self.store.update(expired);
                    }
                    self.save();
                }
                () = tokio::time::sleep_until(first), if !self.delta.answered() => return Err(StreamError::Silent),
            }
        }
    }

    fn ask(&mut self, wanted: Vec<FactKey>) -> Vec<DeltaDiscoveryRequest> {
        let (requests, update) = self.delta.ask(wanted);
        if !update.is_empty() {
            self.store.update(update);
        }
        requests
    }

    /// Services that lose endpoints by these removals. On demand, istiod announces endpoints that go but not those that
    /// come, so the services must be requested again.
    fn losing_endpoints(&self, removed: &[String]) -> Vec<FactKey> {
        if !self.config.on_demand {
            return Vec::new();
        }
        let snapshot = self.store.load();
        let gone = removed.iter().filter_map(|name| snapshot.workload(name));
        let keys: BTreeSet<&ServiceKey> = gone.flat_map(|workload| workload.services.keys()).collect();
        keys.into_iter().map(|key| FactKey::Service(key.clone())).filter(|wanted| snapshot.holds(wanted)).collect()
    }

    /// Applies a response. Returns the answer to it, and the requests that it makes necessary.
    fn take(&mut self, response: DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryRequest> {
        let url = match response.type_url.as_str() {
            ADDRESS => ADDRESS,
            AUTHORIZATION => AUTHORIZATION,
            _ => "unknown",
        };
        let label = UrlLabel { url };
        self.metrics.messages.get_or_create(&label).inc();
        let (resources, removed) = (response.resources.len(), response.removed_resources.len());
        let losing = self.losing_endpoints(&response.removed_resources);
        let received = self.delta.receive(response);
        self.metrics.bytes.get_or_create(&label).inc_by(received.bytes as u64);
        if !received.faults.is_empty() {
            self.metrics.refused.get_or_create(&label).inc_by(received.faults.len() as u64);
            let faults = received.answer.error_detail.as_ref().map_or("", |detail| &detail.message);
            tracing::error!(
                url,
                refused = received.faults.len(),
                faults,
                "resources of the control plane were refused, or understood only in part"
            );
            let count = received.faults.len();
            self.note(format!("Of its resources, {count} were refused or understood only in part: {faults}."));
        }
        log_notes(&received.notes);
        log_unsearched(&self.delta.unsearched_ranges());
        if !received.update.is_empty() {
            let (before, update) = (self.store.load(), received.update);
            let keys = update.policies.iter().map(|policy| &policy.key).chain(&update.gone_policies).cloned().collect();
            let version = self.store.update(update);
            noted::policies(&self.metrics.noted, &before, &self.store.load(), keys);
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
            self.last_logged = None;
            let control_plane = self.config.rpc.address.to_string();
            tracing::info!(control_plane, workloads, services, policies, "in step with the control plane");
            let known = format!("{workloads} workloads, {services} services, {policies} policies");
            self.note(format!("In step with the control plane: {known}."));
            self.ready = None;
        }
        let mut requests = vec![received.answer];
        if !losing.is_empty() {
            requests.extend(self.ask(losing));
        }
        requests
    }

    fn restore(&mut self) {
        let Some(path) = &self.config.state_file else { return };
        match saved::read(path) {
            Ok(None) => {}
            Ok(Some(state)) if state.age() > self.config.state_max_age => {
                let (path, age, max) = (path.display().to_string(), state.age(), self.config.state_max_age);
                let (age, max) = (humantime::format_duration(age), humantime::format_duration(max));
                tracing::error!(
                    path, %age, %max,
                    "the state file is too old to be used (CULVERT_STATE_FILE_MAX_AGE); there are no mesh facts until the control plane is reachable"
                );
            }
            Ok(Some(state)) => {
                let Restored { update, faults, notes } = self.delta.restore(state.types);
                log_notes(&notes);
                log_unsearched(&self.delta.unsearched_ranges());
                self.store.update(update);
                if !faults.is_empty() {
                    let faults = faults.join("; ");
                    tracing::error!(faults, "this version does not understand some resources of the state file");
                }
                let (workloads, services, policies) = self.store.load().counts();
                self.freshness.change(|fresh| (fresh.confirmed, fresh.from_file) = (Some(state.at), true));
                let (path, age) = (path.display().to_string(), self.freshness.report().age.map(brief).map(display));
                tracing::info!(
                    path,
                    age,
                    workloads,
                    services,
                    policies,
                    "using the mesh facts of the state file until the control plane is reachable"
                );
                self.ready = None;
            }
            Err(error) => tracing::error!(%error, "starting without the state file"),
        }
    }

    fn save(&mut self) {
        let Some(path) = &self.config.state_file else { return };
        let report = self.freshness.report();
        let confirmed = report.age.and_then(|age| SystemTime::now().checked_sub(age)).unwrap_or_else(SystemTime::now);
        let old = report.live && self.saved_at.is_some_and(|at| at.elapsed() >= SAVE_AGAIN);
        // An incomplete state would pass for the whole mesh at the next start.
        if !(self.unsaved || old) || !self.delta.synced() {
            return;
        }
        match saved::write(path, confirmed, &self.config.rpc.address.to_string(), self.delta.saved()) {
            Ok(()) => {
                self.metrics.saved.inc();
                self.unsaved = false;
                self.saved_at = Some(Instant::now());
            }
            Err(error) => {
                self.metrics.save_failures.inc();
                tracing::error!(%error, "the state file could not be written");
            }
        }
    }
}

/// Logs the parts of policies that can never match, and so have no effect.
fn log_notes(notes: &[String]) {
    if notes.is_empty() {
        return;
    }
    let shown = notes.iter().take(NOTES_SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    tracing::warn!(notes = notes.len(), policies = shown, "parts of policies can never match and have no effect");
}

/// Logs the address ranges that are not found on demand.
fn log_unsearched(ranges: &[String]) {
    if ranges.is_empty() {
        return;
    }
    let shown = ranges.iter().take(NOTES_SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    tracing::warn!(
        ranges = shown,
        count = ranges.len(),
        "on demand, address ranges of these lengths are not searched for: connections to addresses in them may be handled as if there were no service"
    );
}

/// A JSON object as a protobuf `Struct`.
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
