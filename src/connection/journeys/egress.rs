//! Connections to destinations outside the mesh, as egress policies see them: when they are opened, and whenever the
//! policies change.

use crate::connection::authorize::Refusal;
use crate::connection::authorize::egress::{self, EgressDecision};
use crate::connection::forward::Stop;
use crate::connection::pod::Pod;
use crate::connection::worker::Shared;
use crate::dns::answered::ConnectionNames;
use crate::mesh::{Text, Workload};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// A connection to a destination outside the mesh.
pub struct Outside {
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    source: Arc<Workload>,
    to: SocketAddr,
    names: ConnectionNames,
    changes: watch::Receiver<()>,
}

impl Outside {
    /// The connection of `source` to `to`. Make it before the decision, so that no change is missed in between.
    pub fn new(shared: &Arc<Shared>, pod: &Arc<Pod>, source: &Arc<Workload>, to: SocketAddr) -> Self {
        let changes = shared.mesh.subscribe_egress();
        let names = ConnectionNames::at_opening(&pod.resolver.answered, to.ip().to_canonical());
        Self { shared: shared.clone(), pod: pod.clone(), source: source.clone(), to, names, changes }
    }

    /// The same, if `name` led the pod to the address too.
    pub fn led_by(mut self, name: Option<&Text>) -> Self {
        if let Some(name) = name {
            self.names.add(name);
        }
        self
    }

    /// The decision by the current policies; `None` if none applies.
    pub fn authorize(&self) -> Result<Option<EgressDecision>, Refusal> {
        let policies = self.shared.mesh.load().egress.clone();
        let decided = egress::authorize(&policies, &self.source, self.to, || self.names()).map_err(Refusal::Egress);
        self.shared.reporter.metrics.egress(&decided);
        decided
    }

    /// The decision by the current policies, without counting or logging it.
    pub fn decide(&self) -> Option<EgressDecision> {
        let policies = self.shared.mesh.load().egress.clone();
        egress::decide(&policies, &self.source.namespace, self.to, &self.names())
    }

    fn names(&self) -> Vec<Text> {
        self.names.now(&self.pod.resolver.answered)
    }

    /// Resolves when the policies have changed and no longer allow the connection.
    pub async fn revoked(mut self) -> Stop {
        loop {
            if self.changes.changed().await.is_err() {
                // The store is gone, which happens only when the daemon ends.
                std::future::pending::<()>().await;
            }
            if let Err(refusal) = self.authorize() {
                return Stop::Revoked(refusal);
            }
        }
    }
}
