//! The direction of a connection.

/// The direction of a connection, as seen from the pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Opened by the pod.
    Outbound,
    /// Arriving at the pod.
    Inbound,
}

impl Direction {
    /// The word in logs and in culvert's own metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }

    /// The value of the `reporter` label of Istio's traffic metrics.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}
