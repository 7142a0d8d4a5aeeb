//! Step 4: open the far side: a socket in the pod's namespace, or a stream of a pooled tunnel.

pub mod direct;
pub mod error;
pub mod hbone;
pub mod pool;

pub use error::{DialError, TunnelDialError};
pub use pool::Pool;
