//! The commands with which people look at daemons, of a cluster or of this machine. Each asks pages of the admin ports
//! and shows them as text or as JSON; what is wrong is decided by the daemons.

pub mod checkup;
pub mod connections;
mod control_plane;
pub mod dashboard;
pub mod logs;
pub mod nodes;
pub mod plaintext;
pub mod report;
pub mod status;
mod text;
pub mod top;

pub use self::text::Style;

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
