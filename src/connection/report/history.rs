//! The latest connections that have ended or were refused, which the admin port shows. Nothing is formatted when a
//! connection ends: what its record knows is moved here, and made into text when somebody asks.

use super::details::Details;
use super::direction::Direction;
use super::failure::Failure;
use super::stages::Stages;
use crate::mesh::{SpiffeName, Text, Workload};
use crate::telemetry::ring::{Bounds, Ring};
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Allocator's and ring's share of an entry, in bytes.
const OVERHEAD: usize = 48;

/// Connections that have ended or were refused. Those that ended well have a ring of their own, so that they do not push
/// out the others.
#[derive(Debug)]
pub struct History {
    well: Ring<Ended>,
    badly: Ring<Ended>,
}

/// A connection that has ended.
#[derive(Debug)]
pub struct Ended {
    /// When it ended.
    pub at: SystemTime,
    /// Uid of its pod.
    pub pod: Text,
    /// Its direction.
    pub direction: Direction,
    /// Address that opened it.
    pub source: SocketAddr,
    /// The destination, if it became known.
    pub destination: Option<SocketAddr>,
    /// Its ends, if its route was known.
    pub ends: Option<Ends>,
    /// Why it failed or was refused; `None` if it ended well.
    pub failure: Option<Failure>,
    /// The endpoints that were tried before, and why each was left.
    pub tried: Option<Box<str>>,
    /// What it carried, from the pod and to the pod.
    pub bytes: (u64, u64),
    /// How long it was open.
    pub duration: Duration,
    /// How long each of its stages took.
    pub stages: Stages,
}

/// What is known of both ends once the route is known.
#[derive(Debug)]
pub struct Ends {
    /// Namespace and name of the source's workload.
    pub source_workload: Option<(Text, Text)>,
    /// Identity of the source, if the connection used mutual TLS.
    pub source_identity: Option<SpiffeName>,
    /// Namespace and name of the destination's workload.
    pub destination_workload: Option<(Text, Text)>,
    /// Identity of the destination, if it was proven.
    pub destination_identity: Option<SpiffeName>,
    /// Host name of the service.
    pub service: Option<Text>,
    /// Outbound: the address that the daemon connected to. Inbound: the application's address.
    pub actual: SocketAddr,
    /// Whether it went through a tunnel.
    pub is_encrypted: bool,
    /// The rule that allowed it.
    pub rule: Option<Text>,
}

impl Ends {
    /// The ends of a connection. Without its workloads and its service: the facts of long ago would stay in memory.
    pub fn of(details: &Details, destination_identity: Option<&SpiffeName>) -> Self {
        let name =
            |workload: &Option<Arc<Workload>>| workload.as_ref().map(|w| (w.namespace.clone(), w.shown_name().clone()));
        Self {
            source_workload: name(&details.source_workload),
            source_identity: details.source_identity.clone(),
            destination_workload: name(&details.destination_workload),
            destination_identity: destination_identity.cloned(),
            service: details.service.as_ref().map(|service| service.key.hostname.clone()),
            actual: details.actual,
            is_encrypted: details.authority.is_some(),
            rule: details.rule.clone(),
        }
    }
}

impl Default for History {
    /// Keeps nothing.
    fn default() -> Self {
        Self::new(Bounds { entries: 0, bytes: 0 })
    }
}

impl History {
    /// Four parts of seven, which is half of the whole history, are for connections that ended well.
    pub fn new(bounds: Bounds) -> Self {
        let well = Bounds { entries: bounds.entries * 4 / 7, bytes: bounds.bytes * 4 / 7 };
        let badly = Bounds { entries: bounds.entries - well.entries, bytes: bounds.bytes - well.bytes };
        Self { well: Ring::new(well), badly: Ring::new(badly) }
    }

    /// Whether connections are kept at all.
    pub fn is_on(&self) -> bool {
        self.well.is_on() || self.badly.is_on()
    }

    /// Keeps a connection that has ended.
    pub fn push(&self, ended: Arc<Ended>) {
        let bytes = ended.bytes_held();
        let ring = if ended.failure.is_none() { &self.well } else { &self.badly };
        ring.push(ended, bytes);
    }

    /// The rings, each with a word for it: `ok` for connections that ended well, `failed` for all others.
    pub fn rings(&self) -> [(&'static str, &Ring<Ended>); 2] {
        [("ok", &self.well), ("failed", &self.badly)]
    }
}

impl Ended {
    /// The bytes that this holds, about.
    fn bytes_held(&self) -> usize {
        let name =
            |name: &Option<(Text, Text)>| name.as_ref().map_or(0, |(namespace, name)| namespace.len() + name.len());
        let identity = |name: &Option<SpiffeName>| {
            name.as_ref().map_or(0, |n| n.trust_domain.len() + n.namespace.len() + n.service_account.len())
        };
        let ends = self.ends.as_ref().map_or(0, |ends| {
            name(&ends.source_workload)
                + name(&ends.destination_workload)
                + identity(&ends.source_identity)
                + identity(&ends.destination_identity)
                + ends.service.as_ref().map_or(0, |service| service.len())
                + ends.rule.as_ref().map_or(0, |rule| rule.len())
        });
        // Nothing else says how much memory an error holds; its text says about that.
        let mut length = Length(0);
        if let Some(failure) = &self.failure {
            let _never_fails = write!(length, "{failure}");
        }
        OVERHEAD
            + size_of::<Self>()
            + ends
            + length.0
            + self.pod.len()
            + self.tried.as_ref().map_or(0, |tried| tried.len())
    }
}

/// Counts what is written.
struct Length(usize);

impl Write for Length {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}
