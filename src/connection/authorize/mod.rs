//! Step 2: may this peer reach this pod?
//!
//! `decide` answers from the facts alone, with `matcher` for single rules. `admit` asks once for each new connection or
//! stream, and `revoke` re-evaluates live ones when facts change. Nothing can dial a pod's application without the
//! [`Permit`] that this step returns.

mod admit;
pub mod decide;
pub mod egress;
pub mod matcher;
pub mod revoke;

pub use admit::authorize;
pub use decide::{Permit, Refusal};
pub use matcher::Subject;
pub use revoke::Registration;
