//! The pods of this node and their capture: which pods there are (pods file, agent, Kubernetes API), entering a pod's
//! network namespace, listening in it, redirecting its traffic, checking the result, and releasing the pod again.

pub mod active_daemon;
pub mod capture;
pub mod capture_check;
pub mod cleanup;
pub mod cni;
pub mod config;
pub mod error;
pub mod kubelet_probes;
pub mod kubernetes;
pub mod legs;
mod listeners;
pub mod nft;
pub mod own_pod;
pub mod own_rules;
pub mod own_workload;
pub mod pod;
pub mod pods;
pub mod pods_file;
pub mod preexisting;
pub mod redirect;
pub mod routes;
pub mod selectors;
pub mod spec;
pub mod status;
pub mod table_owner;
pub mod takeover;
pub mod upkeep;
pub mod zds;

pub use config::{Config, OwnWorkload, PodSource};
pub use own_rules::OwnRules;
pub use pods::Pods;
