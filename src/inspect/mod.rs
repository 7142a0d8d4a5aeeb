//! The commands with which people look at daemons, of a cluster or of this machine. Each asks pages of the admin ports
//! and shows them as text or as JSON; what is wrong is decided by the daemons.

pub mod status;
mod text;

pub use self::text::Style;
use crate::cluster::{Answer, AskError};
use serde_json::Value;

/// How a command has ended. The number is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything is well.
    Green = 0,
    /// Something is wrong, or a node has not answered.
    Red = 1,
    /// No daemon could be asked.
    Unknown = 3,
}

/// The page of a daemon, or why there is none.
fn page(answer: Result<Answer, AskError>) -> Result<Value, String> {
    answer.map_err(|error| error.to_string())?.json()
}
