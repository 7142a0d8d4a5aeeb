//! Step 5: bytes both ways, until both sides have closed, one of them breaks, or the connection has to stop. An error
//! on one side becomes an error on the other: a reset is passed on as a reset, never as an orderly close.

mod carry;
mod copy;
pub mod error;

pub use carry::{Ending, over_stream, over_tcp};
pub use error::{ForwardError, Stop};
