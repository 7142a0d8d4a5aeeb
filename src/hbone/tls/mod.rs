//! TLS 1.3 for tunnels: rustls does the handshake and derives the keys, and an own record layer protects the data.
//!
//! rustls copies every byte twice on its way through. Here, records are sealed and opened in the buffers that the
//! socket is written from and read into. Duties that become ours with that (RFC 8446): the nonce and the limits of each
//! key (section 5.5), padding (5.4), KeyUpdate in both directions (4.6.3), tickets (4.6.1) and alerts (6).
//!
//! - `record`: one record, in place.
//! - `messages`: the handshake messages that may follow the handshake.
//! - `connection`: what follows the handshake. It does no I/O.
//! - `handshake`: a handshake over a TCP socket, which yields such a connection.

mod connection;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handshake;
mod messages;
mod record;

#[cfg(test)]
pub use connection::CONTROL_MAX;
pub use connection::{Next, Tls};
pub use error::TlsError;
pub use handshake::{Handshaken, accept, connect};
#[cfg(test)]
pub use record::TAIL;
pub use record::{HEAD, PLAIN_MAX, SLOT};
#[cfg(any(test, fuzzing))]
pub use record::{Secrets, Suite};

#[cfg(test)]
mod tests;
