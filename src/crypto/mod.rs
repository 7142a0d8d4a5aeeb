//! Cryptography that all parts of the daemon share: one provider, one way to read PEM, one explanation for failures
//! that come from a clock.
//!
//! Tunnels between nodes (`identity`) and connections to the control plane (`rpc`) build their TLS settings from here,
//! so both offer the same suites and key exchanges. This module makes no connections and knows no identities.

mod handshake;
mod pem;
mod provider;
mod signatures;

pub use handshake::{clock_reason, is_about_time, with_clock_reason};
pub use pem::{certificate_pem, certificates_from_pem};
pub use provider::{ALPN_H2, only_post_quantum, provider};
pub(crate) use signatures::delegate_signatures;
