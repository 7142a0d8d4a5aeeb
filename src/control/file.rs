//! Keeps the store in step with the mesh file: reads it at the start and at every change. A version that cannot be used
//! changes nothing, and the log says what is wrong with it.

use super::noted;
use super::yaml::{self, DecodeError};
use crate::mesh::{Facts, Store};
use crate::task::files::FileWatch;
use crate::task::thread::run_blocking;
use crate::telemetry::changes::{Changes, What};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a mesh file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("mesh file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Its content is not valid.
    #[error("mesh file {path}: {source}")]
    Decode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
}

/// Metrics of the mesh file.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Versions of the file that were applied.
    pub applied: Counter,
    /// Versions of the file that were refused.
    pub refused: Counter,
    /// 1 while the file on disk is refused and older facts are in force.
    pub stale: Gauge,
    /// Where changes are noted.
    noted: Arc<Changes>,
}

impl Metrics {
    /// Metrics at zero, with a place where changes are noted.
    pub fn noting(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        let applied = "Versions of the mesh file that were applied";
        registry.register("culvert_mesh_file_applied", applied, self.applied.clone());
        let refused = "Versions of the mesh file that were refused; the previous facts stayed in force";
        registry.register("culvert_mesh_file_refused", refused, self.refused.clone());
        let stale = "1 while the mesh file on disk is refused and older facts are in force, else 0";
        registry.register("culvert_mesh_file_stale", stale, self.stale.clone());
    }
}

/// Reads and checks a mesh file.
pub fn read(path: &Path) -> Result<Facts, FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    yaml::facts(&text).map_err(|source| FileError::Decode { path: path.to_owned(), source })
}

/// Watches the file and applies every new version, for as long as it is awaited.
pub async fn follow(path: PathBuf, store: Arc<Store>, metrics: Arc<Metrics>) {
    let mut watch = FileWatch::new(&path);
    // The file is read once more at the start, in case it changed between the first reading and the watch.
    loop {
        // On another thread, because parsing a large file takes a while.
        let file = path.clone();
        if let Some(facts) = run_blocking(move || read(&file)).await {
            apply(facts, &store, &metrics);
        }
        watch.changed().await;
    }
}

fn apply(facts: Result<Facts, FileError>, store: &Store, metrics: &Metrics) {
    match facts {
        Ok(facts) => {
            let (workloads, services, policies) = (facts.workloads.len(), facts.services.len(), facts.policies.len());
            let before = store.load();
            let version = store.replace(facts);
            let after = store.load();
            let keys = before.policies().chain(after.policies()).map(|policy| policy.key.clone()).collect();
            noted::policies(&metrics.noted, &before, &after, keys);
            metrics.applied.inc();
            metrics.stale.set(0);
            tracing::info!(version, workloads, services, policies, "mesh file applied");
        }
        Err(error) => {
            metrics.refused.inc();
            metrics.stale.set(1);
            let text = format!("The mesh file was refused, and the previous facts stay in force: {error}.");
            metrics.noted.note(What::ControlPlane, "mesh file", text);
            tracing::error!(%error, "mesh file refused; the previous mesh facts stay in force");
        }
    }
}
