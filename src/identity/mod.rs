//! Who we are and how we prove it: certificates by identity, kept fresh, and the TLS settings made of them.
//!
//! It knows names, not pods; who needs a certificate asks the [`Store`] for the identity's current [`Credentials`].

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

pub use authority::Authority;
pub use builtin::Builtin;
pub use credentials::{Credentials, READ_BUFFER_BYTES, TLS_BUFFER_BYTES, TlsFacts};
pub use revoked::{Chain, Distrust};
pub use store::Store;
