//! What is known of the mesh: plain facts, their indexes, and the one place that holds the current ones.
//!
//! Nothing here does I/O, reads a clock or knows a wire format; who learns facts (`control`) applies an
//! [`Update`], who needs them (`connection`, `node`) reads the current [`Snapshot`]. A snapshot never changes.

pub mod address;
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
