//! Keeps the store in step with a mesh file. A bad new version changes nothing and says why.

use super::Metrics;
use super::yaml::{self, DecodeError};
use crate::mesh::{Facts, Store};
use crate::task::files::FileWatch;
use crate::task::thread::run_blocking;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a mesh file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("mesh file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It cannot be understood.
    #[error("mesh file {path}: {source}")]
    Decode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
}

/// Reads and checks a mesh file.
pub fn read(path: &Path) -> Result<Facts, FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    yaml::facts(&text).map_err(|source| FileError::Decode { path: path.to_owned(), source })
}

/// Watches the file and applies every new version, for as long as it is awaited.
pub async fn follow(path: PathBuf, store: Arc<Store>, metrics: Arc<Metrics>) {
    let mut watch = FileWatch::new(&path);
    // What changed between the first reading and the watch is seen here.
    loop {
        // Beside the runtime: a large file takes a while to understand.
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
            let version = store.replace(facts);
            metrics.applied.inc();
            metrics.stale.set(0);
            tracing::info!(version, workloads, services, policies, "mesh file applied");
        }
        Err(error) => {
            metrics.refused.inc();
            metrics.stale.set(1);
            tracing::error!(%error, "mesh file refused; the facts before stay in force");
        }
    }
}
