//! Step 2: may this peer reach this pod? Decided by facts alone ([`decide`]), enforced once per connection or stream
//! ([`authorize`]), and decided again for live ones when facts change ([`revoke`]).

mod admit;
pub mod decide;
pub mod matcher;
pub mod revoke;

pub use admit::authorize;
pub use decide::{Permit, Refusal};
pub use matcher::Subject;
pub use revoke::Registration;
