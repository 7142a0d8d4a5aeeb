//! What `tests/bench/history.rs` measures: what the end of a connection costs because it is remembered, and its stages.

use super::details::Details;
use super::direction::Direction;
use super::failure::Failure;
use super::history::{Ended, Ends, History};
use super::stage_times::StageTimes;
use super::stages::{Stage, Stages};
use crate::connection::authorize::Refusal;
use crate::connection::choose::measured::workload;
use crate::hbone::Authority;
use crate::mesh::{SpiffeName, Text};
use crate::telemetry::ring::Bounds;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// A full history, and connections that end.
#[derive(Debug)]
pub struct Endings {
    history: History,
    times: StageTimes,
    pod: Text,
    identity: SpiffeName,
    ends: [Arc<crate::mesh::Workload>; 2],
    address: SocketAddr,
}

/// A connection that is about to end, with what its record holds in any case.
#[derive(Debug)]
pub struct Ending {
    details: Details,
    failure: Option<Failure>,
}

impl Endings {
    /// A history of the default size that is full.
    pub fn new() -> Option<Self> {
        let endings = Self {
            history: History::new(Bounds { entries: 8_750, bytes: 8_750 * 840 }),
            times: StageTimes::default(),
            pod: "1b4e28ba-2fa1-11d2-883f-0016d3cca427".into(),
            identity: SpiffeName::new("cluster.local", "shop", "web").ok()?,
            ends: [Arc::new(workload(1)), Arc::new(workload(2))],
            address: ([10, 0, 0, 1], 8080).into(),
        };
        for refused in [false, true] {
            (0..10_000).for_each(|_| endings.push(endings.ending(refused)));
        }
        Some(endings)
    }

    /// A connection that is about to end.
    pub fn ending(&self, refused: bool) -> Ending {
        let [source, destination] = self.ends.clone();
        let details = Details {
            source_workload: Some(source),
            source_identity: Some(self.identity.clone()),
            destination_workload: Some(destination),
            destination_identity: Some(self.identity.clone()),
            service: None,
            actual: self.address,
            authority: Some(Authority::Address(self.address)),
            gateway: None,
            rule: Some("shop/allow-web rule 1".into()),
        };
        let failure = refused.then(|| Failure::Refused(Refusal::NotAllowed("shop/allow-web, shop/allow-all".into())));
        Ending { details, failure }
    }

    /// Ends it, as its record does.
    pub fn push(&self, ending: Ending) {
        self.history.push(Arc::new(Ended {
            at: SystemTime::now(),
            pod: self.pod.clone(),
            direction: Direction::Inbound,
            source: self.address,
            destination: Some(self.address),
            ends: Some(Ends::of(&ending.details, ending.details.destination_identity.as_ref())),
            failure: ending.failure,
            tried: None,
            bytes: (1, 1),
            duration: Duration::from_millis(1),
            stages: Stages::default(),
        }));
    }

    /// The stages of a connection: six laps of the clock, and counting them.
    pub fn stages(&self) {
        let (start, mut stages) = (Instant::now(), Stages::default());
        for stage in [Stage::Queue, Stage::Facts, Stage::Certificate, Stage::Policy, Stage::Dial, Stage::Connect] {
            stages.lap(stage, start.elapsed());
        }
        self.times.count(Direction::Outbound, &stages);
    }
}
