//! What has changed on this node, for the history that the admin port shows: one plain sentence for each change. The
//! modules that notice a change say so here. Nothing secret is ever part of a sentence: no key, no token, no header.

use super::limit::shortened;
use super::ring::{Bounds, Ring};
use std::time::SystemTime;

/// Allocator's and ring's share of an entry, in bytes.
const OVERHEAD: usize = 48;

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A policy was added, changed or removed.
    Policy,
    /// A certificate was renewed, could not be renewed, or was revoked.
    Certificate,
    /// The capture state of a pod.
    Capture,
    /// The connection to the control plane, or what it sent.
    ControlPlane,
}

impl What {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Policy, Self::Certificate, Self::Capture, Self::ControlPlane];

    /// The word in the history.
    pub fn word(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Certificate => "certificate",
            Self::Capture => "capture",
            Self::ControlPlane => "control_plane",
        }
    }
}

/// One change.
#[derive(Debug)]
pub struct Change {
    /// When it was noticed.
    pub at: SystemTime,
    /// What has changed.
    pub what: What,
    /// Its name: `namespace/name` of a pod or policy, an identity, or an address.
    pub subject: String,
    /// What happened, in one sentence.
    pub text: String,
}

/// The latest changes.
#[derive(Debug)]
pub struct Changes(Ring<Change>);

impl Default for Changes {
    /// Keeps nothing.
    fn default() -> Self {
        Self::new(Bounds { entries: 0, bytes: 0 })
    }
}

impl Changes {
    /// No changes yet.
    pub fn new(bounds: Bounds) -> Self {
        Self(Ring::new(bounds))
    }

    /// Notes a change.
    pub fn note(&self, what: What, subject: impl Into<String>, text: impl Into<String>) {
        if !self.0.is_on() {
            return;
        }
        let text = shortened(text.into());
        let change = Change { at: SystemTime::now(), what, subject: subject.into(), text };
        let bytes = OVERHEAD + size_of::<Change>() + change.subject.capacity() + change.text.capacity();
        self.0.push(change, bytes);
    }

    /// The changes that are kept.
    pub fn ring(&self) -> &Ring<Change> {
        &self.0
    }
}
