//! DNS of captured pods. Names of the mesh are answered from the mesh facts. All other questions are forwarded, byte
//! for byte, to the resolver that the pod asked, and to the other resolvers of its `resolv.conf` if that one does not
//! answer. If the mesh facts are not available, DNS fails open: the pod's resolvers are asked.
//!
//! [`lookup`] decides what a name means, [`message`] reads and writes the wire format, [`resolver`] asks a pod's
//! resolvers, [`server`] listens in the pod. All servers share one thread ([`pods`]) and take short turns on it.

pub mod answer;
pub mod answered;
mod cache;
pub mod client;
pub mod config;
pub mod framing;
pub mod listeners;
pub mod lookup;
pub mod message;
pub mod metrics;
pub mod pods;
pub mod resolv_conf;
pub mod resolver;
pub mod server;
pub mod upstream;

pub use client::{ClientFacts, KnownClient};
pub use config::Config;
pub use listeners::Listeners;
pub use metrics::Metrics;
pub use pods::{Dns, Serving};
pub use resolver::{ResolveError, Resolver};
