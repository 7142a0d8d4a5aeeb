//! HBONE: TCP streams as HTTP/2 CONNECT over any byte stream. A narrow interface, because what stands behind it (the
//! h2 crate now) is to be replaced by a faster path: open or accept a tunnel, open or accept a stream, carry a socket.
//!
//! It knows neither TLS nor identities nor policies. Every byte stream given to it must already be authenticated.

pub mod buffers;
pub mod carry;
pub mod client;
mod config;
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
