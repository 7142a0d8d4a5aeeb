//! Step 5: bytes both ways until both sides have closed, or one breaks, or the connection is to stop. What ends badly
//! on one side ends badly on the other: RST is carried as RST, never as an orderly close.

mod carry;
mod copy;
pub mod error;

pub use carry::{over_stream, over_tcp};
pub use error::{ForwardError, Stop};
