//! The path of a connection through the daemon. Start reading here.
//!
//! Every connection of a captured pod arrives at one of the listeners inside the pod's network namespace, and each
//! listener begins one journey (`journeys`):
//!
//! - *outbound*, port 15001: the pod opened the connection. The daemon decides where it goes and carries it there,
//!   directly or through a tunnel.
//! - *inbound*, port 15008: a peer opened an HBONE tunnel to the pod. The tunnel is accepted once. Each of its streams
//!   then carries one connection to the pod's application.
//! - *plaintext*, port 15006: a client connected to the pod without a tunnel. The connection is handled like an
//!   inbound stream, but the client has no identity.
//! - *socks*, port 15080 on the pod's loopback address, if it is enabled: the pod asks for a connection by SOCKS5, which
//!   then goes the way of an outbound one.
//!
//! A journey is a sequence of six steps. Each step has a folder, and the folders' alphabetical order is the order in
//! time, but for one exception: a stream's destination in the pod is chosen before the stream is authorized.
//!
//! | step | question |
//! |---|---|
//! | `accept` | Who connects, and what did they dial? |
//! | `authorize` | Do the policies allow it? Not asked outbound: the destination's node decides. |
//! | `choose` | Where does the connection go, and how? |
//! | `dial` | Can the far side be reached? |
//! | `forward` | Bytes both ways, until both sides have closed or the connection must stop. |
//! | `report` | How did it end? One line in the access log, the metrics, and the list of live connections. |
//!
//! A step imports only from steps before it. `journeys` knows all of them. The remaining files hold what the steps
//! share: `pod` describes a captured pod, `capture_checks` the checks of its redirection, `budget` limits how many
//! connections a node carries, `worker` and `workers` are the threads, `headers` the HTTP headers that are passed on,
//! `config` the settings. A connection stays on the worker that it was first given to.

pub mod accept;
pub mod authorize;
pub mod budget;
pub mod capture_checks;
pub mod choose;
pub mod config;
pub mod dial;
pub mod forward;
pub mod headers;
pub mod journeys;
pub mod pod;
pub mod report;
pub mod worker;
pub mod workers;

pub use config::Config;
pub use pod::Pod;
pub use worker::Shared;
pub use workers::{Entrance, Workers};
