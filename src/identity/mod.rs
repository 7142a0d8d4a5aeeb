//! Certificates of this node's identities: requesting, renewing and revoking them, the TLS settings built from them,
//! and the verification of peers.
//!
//! This module knows identities, not pods. A caller that needs a certificate asks the [`CertificateStore`] for the current
//! [`Credentials`] of an identity.

pub mod authority;
pub mod builtin;
mod ca_queue;
mod certificates;
pub mod credentials;
pub mod istio_ca;
pub mod metrics;
mod renewal;
pub mod revoked;
mod roots;
mod signed;
pub mod store;
pub mod verify;

pub use authority::{CertificateAuthority, Signer};
pub use builtin::Builtin;
pub use credentials::{Credentials, Proven, TlsFacts};
pub use revoked::{Chain, Distrust};
pub use store::CertificateStore;
