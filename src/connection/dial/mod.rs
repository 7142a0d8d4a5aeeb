//! Step 4: opening the far side. `direct` opens a TCP connection in the pod's namespace. `hbone` opens a stream through
//! a tunnel, which `pool` shares between connections.

pub mod direct;
pub mod error;
pub mod gateway;
pub mod hbone;
pub mod pool;

pub use error::{DialError, TunnelDialError};
pub use pool::Pool;
