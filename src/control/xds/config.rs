//! Settings of the connection to the control plane.

use crate::rpc;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of the connection to the control plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// The control plane.
    pub rpc: rpc::Config,
    /// `role~ip~pod.namespace~domain` (source: istiod's node id).
    pub node_id: String,
    /// Facts about this node for the control plane.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Whether the control plane announces addresses only when they are asked for.
    pub on_demand: bool,
    /// Where the last known state is kept.
    pub state_file: Option<PathBuf>,
    /// A state file older than this is not used.
    pub state_max_age: Duration,
}
