//! Enrolment by the Kubernetes API, without an agent. Labels say which pods are enrolled, the node's processes lead to
//! their network namespaces, and each pod's status annotation tells the mesh that it is captured.
//!
//! Everything is level-triggered: the loop in `reconcile.rs` compares the present state with the desired one and makes
//! up the difference. While the API is away, enrolled pods stay captured and verified.

pub mod annotate;
pub mod cgroup;
mod client;
pub mod daemonset;
pub mod facts;
mod lingering;
mod plugin;
mod pod_netns;
mod ready_before_enabled;
mod reconcile;
mod resume;
mod saved;
pub mod scan;
mod search;
mod select;
mod state;
pub mod uninstall;
pub mod watch;

pub use super::config::KubernetesConfig as Config;
pub use client::{client, client_with};
pub use state::Enrolment;
