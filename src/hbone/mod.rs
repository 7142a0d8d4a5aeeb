//! HBONE: TCP connections as HTTP/2 CONNECT streams in mutual TLS.
//!
//! The interface is narrow on purpose: do the TLS handshake (`tls`), open or accept a tunnel (`client`, `server`), open or
//! accept a stream, and carry an application's socket over it (`stream`). From then on the worker's `engine` owns the
//! socket and tells its owner how it ended.
//!
//! What stands behind it does no I/O of its own, except the engine: `codec` reads and writes frames and headers,
//! `session` is the state of one HTTP/2 connection, `tls` seals and opens records. `buffers` accounts for what tunnels
//! hold in memory.
//!
//! This module knows neither identities nor policies: what a peer may be is decided by the TLS settings that the caller
//! passes, and who it is by the certificates that it gets back.

#[cfg(test)]
mod against_h2;
pub mod buffers;
pub mod carrier;
pub mod carry;
pub mod client;
mod codec;
pub mod config;
mod cut;
mod engine;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod instructions;
mod last_bytes;
pub mod ping;
pub mod request;
pub mod server;
mod session;
pub mod stream;
#[cfg(test)]
pub mod testing;
pub mod tls;

pub use buffers::Buffers;
pub use carry::Meter;
pub use client::Tunnel;
#[cfg(any(test, fuzzing))]
pub use codec::fields::RequestHead;
pub use config::Config;
#[cfg(any(test, fuzzing))]
pub use engine::fuzz::tunnel as fuzz_tunnel;
pub use engine::{CarryError, Ended, Engine, Owner};
pub use error::TunnelError;
pub use last_bytes::deliver_rest;
pub use request::{Authority, ConnectRequest};
pub use server::{Incoming, Server};
pub use stream::{Stopper, Stream};
