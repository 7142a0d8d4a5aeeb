//! The stream to the control plane: connecting, reading, answering, and when to try again.

use super::config::Config;
use super::delta::{ADDRESS, AUTHORIZATION, Delta, Restored};
use super::error::{FIRST_RESPONSE, StreamError};
use super::freshness::Freshness;
use super::metrics::{Metrics, ReasonLabel, UrlLabel};
use super::saved;
use crate::mesh::{ServiceKey, Store, Wanted};
use crate::proto::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use crate::rpc::{self, MESSAGE_BYTES_MAX};
use crate::task::Signal;
use crate::task::backoff::Backoff;
use crate::task::ready::Pending;
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
/// A stream that lived this long was healthy: the waits begin anew.
const HEALTHY: Duration = Duration::from_secs(10);
/// How long the control plane may take to read a request.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Requests that may wait to be sent.
const QUEUE: usize = 16;
/// Shortest time between two writings of the state file, and half the time for which something that was asked for is taken
/// not to exist.
const TICK: Duration = Duration::from_secs(5);
/// The state file is written so often where nothing changes, so that its date says that this is so.
const SAVE_AGAIN: Duration = Duration::from_secs(600);
/// A reason that stays the same is logged again this often.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Notes on policies in one line of the log; more are counted.
const NOTES_SHOWN: usize = 20;

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
    saved_at: Option<Instant>,
    /// Whether the last request was too large with the versions of all that is held.
    too_large: bool,
    /// Whether the first requests of the last stream said what is held.
    sent_versions: bool,
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
        let (ready, unsaved, too_large, sent_versions, said) = (Some(ready), false, false, false, None);
        Self {
            config,
            node,
            store,
            metrics,
            freshness,
            delta,
            ready,
            unsaved,
            saved_at: None,
            too_large,
            sent_versions,
            said,
        }
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
            self.save();
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
            self.too_large = error.is_too_large() && self.sent_versions;
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
        if was_live && error.is_orderly() {
            tracing::info!(control_plane, reason = text, "the control plane has recycled the stream; connecting again");
            return;
        }
        let known = self.said.as_ref().is_some_and(|(said, at)| *said == text && at.elapsed() < SAY_AGAIN);
        if known {
            tracing::debug!(control_plane, %error, retry = %brief(wait), "no stream to the control plane");
            return;
        }
        self.said = Some((text, Instant::now()));
        let (age, retry) = (self.freshness.report().age.map(brief).map(display), brief(wait));
        if was_live {
            tracing::warn!(
                control_plane, %error, %retry,
                "the connection to the control plane was lost; what is known stays in force, changes are not heard of"
            );
        } else {
            tracing::warn!(
                control_plane, %error, %retry, facts_age = age,
                "no stream to the control plane; what is known stays in force"
            );
        }
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
            // There is room, and nobody else sends.
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
                // While the server does not read, we go on reading: it may be waiting for just that.
                room = send.reserve(), if !outgoing.is_empty() => {
                    // A closed queue is the end of the stream, whose reason the next read gives.
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

    fn ask(&mut self, wanted: Vec<Wanted>) -> Vec<DeltaDiscoveryRequest> {
        let (requests, update) = self.delta.ask(wanted);
        if !update.is_empty() {
            self.store.update(update);
        }
        requests
    }

    /// Services that lose endpoints by these removals. On demand istiod tells of endpoints that go and not of those that come,
    /// so the service has to be asked for again.
    fn losing_endpoints(&self, removed: &[String]) -> Vec<Wanted> {
        if !self.config.on_demand {
            return Vec::new();
        }
        let snapshot = self.store.load();
        let gone = removed.iter().filter_map(|name| snapshot.workload(name));
        let keys: BTreeSet<&ServiceKey> = gone.flat_map(|workload| workload.services.keys()).collect();
        keys.into_iter().map(|key| Wanted::Service(key.clone())).filter(|wanted| snapshot.holds(wanted)).collect()
    }

    /// Applies a response and gives the answer to it, and what must be asked because of it.
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
                "resources of the control plane were refused"
            );
        }
        say_notes(&received.notes);
        say_unfound(&self.delta.unfound());
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
                    "the state file is too old to be used (CULVERT_STATE_FILE_MAX_AGE): nothing is known until the control plane is there"
                );
            }
            Ok(Some(state)) => {
                let Restored { update, faults, notes } = self.delta.restore(state.types);
                say_notes(&notes);
                say_unfound(&self.delta.unfound());
                self.store.update(update);
                if !faults.is_empty() {
                    let faults = faults.join("; ");
                    tracing::error!(faults, "resources of the state file are not understood by this version");
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
                    "serving by the state file until the control plane is there"
                );
                self.ready = None;
            }
            Err(error) => tracing::error!(%error, "starting without the last known state"),
        }
    }

    fn save(&mut self) {
        let Some(path) = &self.config.state_file else { return };
        let report = self.freshness.report();
        let confirmed = report.age.and_then(|age| SystemTime::now().checked_sub(age)).unwrap_or_else(SystemTime::now);
        let old = report.live && self.saved_at.is_some_and(|at| at.elapsed() >= SAVE_AGAIN);
        // What was never complete would pass for the whole mesh at the next start.
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
                tracing::error!(%error, "the last known state could not be kept");
            }
        }
    }
}

/// Says what in policies can never match, which is as if it were not there.
fn say_notes(notes: &[String]) {
    if notes.is_empty() {
        return;
    }
    let shown = notes.iter().take(NOTES_SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    tracing::warn!(notes = notes.len(), policies = shown, "parts of policies can never match: they do nothing");
}

/// Says which ranges are not found on demand.
fn say_unfound(ranges: &[String]) {
    if ranges.is_empty() {
        return;
    }
    let shown = ranges.iter().take(NOTES_SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
    tracing::warn!(
        ranges = shown,
        count = ranges.len(),
        "on demand, ranges of these lengths are not looked for: connections to addresses in them may go as if there were no service"
    );
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
