//! The three journeys of a connection, each as its steps in order.

mod ending;
mod inbound;
mod lookup;
mod outbound;
mod plaintext;

pub use inbound::tunnel;
pub use outbound::outbound;
pub use plaintext::plaintext;
