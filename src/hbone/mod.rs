//! HBONE: TCP connections as HTTP/2 CONNECT streams over any byte stream.
//!
//! The interface is narrow on purpose: open or accept a tunnel (`client`, `server`), open or accept a stream, carry a
//! socket over it (`stream`). The implementation, now the h2 crate, is to be replaced by a faster data plane without
//! changing any caller. `carry` holds what carrying has in common with plain TCP and knows nothing of HTTP/2.
//!
//! `guard` sits between HTTP/2 and the byte stream and limits what a peer can do. `buffers` accounts for what tunnels
//! hold in memory, and `windows` adapts flow control to it.
//!
//! This module knows neither TLS nor identities nor policies. A byte stream must be authenticated before it is given to
//! it.

pub mod buffers;
pub mod carry;
pub mod client;
pub mod config;
mod cut;
mod error;
mod flow;
mod guard;
pub mod ping;
pub mod request;
pub mod server;
pub mod stream;
mod windows;

pub use buffers::{Account, Buffers};
pub use carry::Meter;
pub use client::Tunnel;
pub use config::Config;
pub use error::TunnelError;
pub use request::{Authority, ConnectRequest};
pub use server::{Incoming, Server};
pub use stream::{CarryError, Stream};
