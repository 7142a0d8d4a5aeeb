//! Keeps the store in step with the mesh file, or with the egress file where a control plane announces the other facts:
//! reads it at the start and at every change. A version that cannot be used changes nothing, and the log says what is
//! wrong with it.

use super::noted;
use super::yaml::{self, DecodeError};
use crate::mesh::egress::EgressPolicy;
use crate::mesh::{Facts, Store, Update};
use crate::task::files::FileWatch;
use crate::task::thread::run_blocking;
use crate::telemetry::changes::{Changes, What};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All mesh facts.
    Mesh,
    /// Egress policies only.
    Egress,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mesh => "mesh file",
            Self::Egress => "egress file",
        })
    }
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{kind} {path}: {source}")]
    Read {
        /// What the file should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Its content is not valid.
    #[error("{kind} {path}: {source}")]
    Decode {
        /// What the file should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
}

/// Metrics of a file, and what is wrong with it.
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
    error: Mutex<Option<String>>,
}

impl Metrics {
    /// Metrics at zero, with a place where changes are noted.
    pub fn noting(noted: Arc<Changes>) -> Self {
        Self { noted, ..Self::default() }
    }

    /// Registers the metrics.
    pub fn register(&self, kind: Kind, registry: &mut Registry) {
        let (name, facts) = match kind {
            Kind::Mesh => ("mesh", "facts"),
            Kind::Egress => ("egress", "policies"),
        };
        let applied = format!("Versions of the {kind} that were applied");
        registry.register(format!("culvert_{name}_file_applied"), applied, self.applied.clone());
        let refused = format!("Versions of the {kind} that were refused; the previous {facts} stayed in force");
        registry.register(format!("culvert_{name}_file_refused"), refused, self.refused.clone());
        let stale = format!("1 while the {kind} on disk is refused and older {facts} are in force, else 0");
        registry.register(format!("culvert_{name}_file_stale"), stale, self.stale.clone());
    }

    /// Why the file on disk is refused; `None` if it is in force.
    pub fn error(&self) -> Option<String> {
        self.error.lock().clone()
    }

    fn note(&self, error: Option<String>) {
        if error.is_some() {
            self.refused.inc()
        } else {
            self.applied.inc()
        };
        self.stale.set(i64::from(error.is_some()));
        *self.error.lock() = error;
    }
}

/// Reads and checks a mesh file.
pub fn read(path: &Path) -> Result<Facts, FileError> {
    read_as(Kind::Mesh, path, yaml::facts)
}

/// Reads and checks an egress file.
pub fn read_egress(path: &Path) -> Result<Vec<EgressPolicy>, FileError> {
    read_as(Kind::Egress, path, yaml::egress)
}

fn read_as<T>(kind: Kind, path: &Path, parse: fn(&str) -> Result<T, DecodeError>) -> Result<T, FileError> {
    let read = std::fs::read_to_string(path);
    let text = read.map_err(|source| FileError::Read { kind, path: path.to_owned(), source })?;
    parse(&text).map_err(|source| FileError::Decode { kind, path: path.to_owned(), source })
}

/// Watches a mesh file and applies every new version, for as long as it is awaited.
pub async fn follow(path: PathBuf, store: Arc<Store>, metrics: Arc<Metrics>) {
    let apply = |facts: Facts| {
        let (workloads, services, policies) = (facts.workloads.len(), facts.services.len(), facts.policies.len());
        let before = store.load();
        let version = store.replace(facts);
        let after = store.load();
        let keys = before.policies().chain(after.policies()).map(|policy| policy.key.clone()).collect();
        noted::policies(&metrics.noted, &before, &after, keys);
        tracing::info!(version, workloads, services, policies, "mesh file applied");
    };
    let refuse = |error: &FileError| {
        let text = format!("The mesh file was refused, and the previous facts stay in force: {error}.");
        metrics.noted.note(What::ControlPlane, "mesh file", text);
        tracing::error!(%error, "mesh file refused; the previous mesh facts stay in force");
    };
    follow_as(&path, read, apply, refuse, &metrics).await;
}

/// Watches an egress file and applies every new version beside the other facts, for as long as it is awaited.
pub async fn follow_egress(path: PathBuf, store: Arc<Store>, metrics: Arc<Metrics>) {
    let apply = |egress: Vec<EgressPolicy>| {
        let policies = egress.len();
        let version = store.update(Update { egress: Some(egress), ..Update::default() });
        metrics.noted.note(
            What::Policy,
            "egress file",
            format!("The egress file was applied; egress policies: {policies}."),
        );
        tracing::info!(version, policies, "egress file applied");
    };
    let refuse = |error: &FileError| {
        let text = format!("The egress file was refused, and the previous egress policies stay in force: {error}.");
        metrics.noted.note(What::ControlPlane, "egress file", text);
        tracing::error!(%error, "egress file refused; the previous egress policies stay in force");
    };
    follow_as(&path, read_egress, apply, refuse, &metrics).await;
}

async fn follow_as<T: Send + 'static>(
    path: &Path,
    read: fn(&Path) -> Result<T, FileError>,
    apply: impl Fn(T),
    refuse: impl Fn(&FileError),
    metrics: &Metrics,
) {
    let mut watch = FileWatch::new(path);
    // The file is read once more at the start, in case it changed between the first reading and the watch.
    loop {
        // On another thread, because parsing a large file takes a while.
        let file = path.to_owned();
        match run_blocking(move || read(&file)).await {
            Some(Ok(facts)) => {
                apply(facts);
                metrics.note(None);
            }
            Some(Err(error)) => {
                metrics.note(Some(error.to_string()));
                refuse(&error);
            }
            None => {}
        }
        watch.changed().await;
    }
}
