//! How current the mesh facts are: live from the control plane, or as of some time ago.

use parking_lot::Mutex;
use std::time::{Duration, SystemTime};

/// How current the facts are; written by the client, read by the admin port.
#[derive(Debug, Default)]
pub struct Freshness {
    state: Mutex<FreshnessState>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct FreshnessState {
    /// Whether a stream is open and in step.
    pub(super) live: bool,
    /// When the facts were last known to be true.
    pub(super) confirmed: Option<SystemTime>,
    /// Whether they come from the state file.
    pub(super) from_file: bool,
    /// Why there is no stream.
    pub(super) error: Option<String>,
}

/// How current the facts are at one moment.
#[derive(Clone, Debug)]
pub struct FreshnessReport {
    /// Whether the control plane is announcing changes now.
    pub live: bool,
    /// How long ago the facts were last known to be true; `None` before there are any.
    pub age: Option<Duration>,
    /// Whether they come from the state file.
    pub from_file: bool,
    /// Why there is no stream.
    pub error: Option<String>,
}

impl Freshness {
    /// How current the facts are now.
    pub fn report(&self) -> FreshnessReport {
        let state = self.state.lock().clone();
        let since = |at: SystemTime| SystemTime::now().duration_since(at).unwrap_or_default();
        let age = if state.live { Some(Duration::ZERO) } else { state.confirmed.map(since) };
        FreshnessReport { live: state.live, age, from_file: state.from_file, error: state.error }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut FreshnessState)) {
        change(&mut self.state.lock());
    }
}
