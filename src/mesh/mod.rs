//! The mesh facts: workloads, services and policies, the indexes over them, and the store that holds the current ones.
//!
//! `control` learns facts and applies them as an [`Update`]; `connection`, `dns` and `node` read the current
//! [`Snapshot`]. A snapshot never changes. No file here does I/O or knows a wire format, and only the store reads a
//! clock.

pub mod address;
pub mod egress;
pub mod fact_key;
pub mod index;
pub mod name;
pub mod policy;
pub mod service;
pub mod snapshot;
pub mod store;
pub mod update;
pub mod workload;

pub use address::{GatewayRef, GatewayTarget};
pub use fact_key::FactKey;
pub use name::{ServiceKey, SpiffeName, Text};
pub use policy::Policy;
pub use service::Service;
pub use snapshot::{Facts, Snapshot};
pub use store::Store;
pub use update::Update;
pub use workload::{Protocol, Workload};
