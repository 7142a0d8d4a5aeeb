//! Facts from istiod, or anything that speaks delta xDS: one stream at a time, for ever.
//!
//! ```text
//!   connect ──► stream ──► each response applied and answered ──► the stream ends ──► wait a little ──► connect
//! ```
//! What is known stays in force while there is no stream, however long that takes.

pub mod decode;
pub mod delta;
pub mod policy;
pub mod saved;
mod stream;

pub use stream::Client;

use crate::rpc;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Settings of the client.
#[derive(Clone, Debug)]
pub struct Config {
    /// The control plane.
    pub rpc: rpc::Config,
    /// `role~ip~pod.namespace~domain` (source: istiod's node id).
    pub node_id: String,
    /// Facts about this node for the control plane.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Whether addresses are asked for instead of all being told.
    pub on_demand: bool,
    /// Where the last known state is kept.
    pub state_file: Option<PathBuf>,
    /// Age beyond which it is not used.
    pub state_max_age: Duration,
}

/// How fresh the facts are.
#[derive(Debug, Default)]
pub struct Freshness {
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default)]
struct State {
    live: bool,
    /// When the facts were last known to be true.
    confirmed: Option<SystemTime>,
    /// Whether they are from a file.
    from_file: bool,
    error: Option<String>,
}

/// How fresh the facts are, for display.
#[derive(Clone, Debug)]
pub struct Report {
    /// Whether the control plane is telling us of changes now.
    pub live: bool,
    /// How long ago the facts were last known to be true; `None` before there are any.
    pub age: Option<Duration>,
    /// Whether they are those of the state file.
    pub from_file: bool,
    /// Why there is no stream.
    pub error: Option<String>,
}

impl Freshness {
    /// As of now.
    pub fn report(&self) -> Report {
        let state = self.state.lock().clone();
        let since = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default();
        let age = if state.live { Some(Duration::ZERO) } else { state.confirmed.map(since) };
        Report { live: state.live, age, from_file: state.from_file, error: state.error }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
    }
}

/// Metrics of the client.
#[derive(Debug, Default)]
pub struct Metrics {
    terminations: Family<ReasonLabel, Counter>,
    messages: Family<UrlLabel, Counter>,
    bytes: Family<UrlLabel, Counter>,
    refused: Family<UrlLabel, Counter>,
    resources: Family<UrlLabel, Gauge>,
    saved: Counter,
    save_failures: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UrlLabel {
    url: &'static str,
}

impl Metrics {
    /// Adds one series to each family, so that the document of all metrics can show its labels.
    pub fn fill_example(&self) {
        drop(self.terminations.get_or_create(&ReasonLabel { reason: "" }));
        for family in [&self.messages, &self.bytes, &self.refused] {
            drop(family.get_or_create(&UrlLabel { url: "" }));
        }
        drop(self.resources.get_or_create(&UrlLabel { url: "" }));
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Streams to the control plane that ended, by reason (unstable)";
        registry.register("istio_xds_connection_terminations", help, self.terminations.clone());
        let help = "Responses of the control plane, by resource type (unstable)";
        registry.register("istio_xds_message", help, self.messages.clone());
        let help = "Bytes of resources that the control plane sent, by resource type (unstable)";
        registry.register("istio_xds_message_bytes", help, self.bytes.clone());
        let help = "Resources of the control plane that were refused, or understood only in part. The log names them";
        registry.register("culvert_xds_resources_refused", help, self.refused.clone());
        registry.register(
            "culvert_mesh_objects",
            "Workloads, services and policies that are known",
            self.resources.clone(),
        );
        registry.register("culvert_state_file_written", "Times that the state file was written", self.saved.clone());
        let help = "Times that the state file could not be written";
        registry.register("culvert_state_file_failures", help, self.save_failures.clone());
    }
}
