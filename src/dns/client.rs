//! What is known of the pod that a DNS server serves.

use crate::mesh::{Snapshot, Workload};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// The current mesh facts and the pod's workload in them; `None` while the workload is not known.
pub type KnownClient = Option<(Arc<Snapshot>, Arc<Workload>)>;

/// Finds the workload of the pod that asks.
pub trait ClientFacts: Send + Sync + fmt::Debug {
    /// What is known now.
    fn now(&self) -> KnownClient;
    /// Waits, for a bounded time, until the workload is known.
    fn soon(&self) -> Pin<Box<dyn Future<Output = KnownClient> + Send + '_>>;
}
