//! Who we are and how we prove it: certificates by identity, kept fresh, and the TLS settings made of them.
//!
//! It knows names, not pods; who needs a certificate asks the [`Store`] for the identity's current [`Credentials`].

pub mod authority;
pub mod builtin;
pub mod credentials;
mod fresh;
pub mod istio_ca;
pub mod revoked;
mod roots;
pub mod store;
mod turns;
pub mod verify;

pub use authority::Authority;
pub use builtin::Builtin;
pub use credentials::{Credentials, READ_BUFFER_BYTES, TLS_BUFFER_BYTES, TlsFacts};
pub use revoked::{Chain, Distrust};
pub use store::Store;
