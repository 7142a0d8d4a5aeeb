//! One stream of a session: its flow control windows (RFC 9113 section 5.2) and which sides have ended it.

use crate::hbone::request::RequestError;

/// Largest window that HTTP/2 allows (RFC 9113 section 6.9.1).
pub const WINDOW_MAX: i64 = (1 << 31) - 1;

/// A stream.
#[derive(Debug)]
pub struct Stream<A> {
    /// What the owner keeps for the stream.
    pub app: A,
    /// The number of the stream.
    pub id: u32,
    /// Bytes that we may still send. A change of the peer's settings can make it negative.
    pub send_window: i64,
    /// Window for what the peer sends.
    pub receive: ReceiveWindow,
    /// Whether the final answer has been sent or received.
    pub answered: bool,
    /// Whether we have sent END_STREAM or a reset.
    pub local_ended: bool,
    /// Whether the peer has sent END_STREAM or a reset.
    pub remote_ended: bool,
    /// The peer has asked for something else than a tunnel, and its request is not complete. The owner does not know
    /// the stream yet.
    pub foreign: Option<Box<Foreign>>,
}

/// A request that is not CONNECT and not complete. Its content is discarded.
#[derive(Debug)]
pub struct Foreign {
    /// Why it is refused.
    pub error: RequestError,
    /// Bytes of content that its fields announce.
    pub announced: Option<u64>,
    /// Bytes that have arrived.
    pub received: u64,
}

/// The window of what a peer may send on a stream. `open` bytes may still arrive, and `held` have arrived and were not
/// passed on. Together they are at most `size`, unless `size` was reduced meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveWindow {
    open: u32,
    held: u32,
    size: u32,
}

impl ReceiveWindow {
    /// A window of this size.
    pub fn new(size: u32) -> Self {
        Self { open: size, held: 0, size }
    }

    /// Takes arriving bytes off the window. `false`: the peer has exceeded it.
    pub fn received(&mut self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Some(open) = self.open.checked_sub(bytes) else { return false };
        (self.open, self.held) = (open, self.held.saturating_add(bytes));
        true
    }

    /// Records that bytes were passed on. Returns the window to give back to the peer, if there is enough of it.
    ///
    /// If nothing is held, the application keeps up with the peer, so the window may grow, up to `limit`. Beyond
    /// `limit` it shrinks again.
    pub fn consumed(&mut self, bytes: usize, limit: u32) -> Option<u32> {
        self.held = self.held.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.size = self.size.min(limit);
        if self.credit() < self.size / 2 {
            return None;
        }
        if self.held == 0 {
            self.size = self.size.saturating_mul(2).min(limit);
        }
        let credit = self.credit();
        self.open = self.open.saturating_add(credit);
        Some(credit)
    }

    /// Bytes that may still arrive, those that are held, and the size.
    #[cfg(test)]
    pub fn parts(self) -> (u32, u32, u32) {
        (self.open, self.held, self.size)
    }

    fn credit(self) -> u32 {
        self.size.saturating_sub(self.open).saturating_sub(self.held)
    }
}

impl<A> Stream<A> {
    /// Whether both sides have ended it.
    pub fn is_over(&self) -> bool {
        self.local_ended && self.remote_ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_window_grows_only_while_the_application_keeps_up() {
        let mut window = ReceiveWindow::new(1000);
        assert!(window.received(600));
        assert_eq!(window.consumed(100, 4000), None);
        assert_eq!(window.consumed(500, 4000), Some(1600), "all was passed on");
        assert!(window.received(2000) && !window.received(1), "and not more than the window");
        assert_eq!(window.consumed(1500, 4000), Some(1500), "some is still held: the same size");
        assert_eq!(window.consumed(500, 1000), None, "it may shrink, and is not returned then");
    }

    proptest! {
        #[test]
        fn no_byte_of_window_is_lost_or_made(steps in prop::collection::vec((1usize..5000, 0u32..60_000), 1..200)) {
            let (mut window, mut held) = (ReceiveWindow::new(10_000), 0usize);
            let mut open = 10_000usize;
            for (bytes, limit) in steps {
                let limit = limit.max(1000);
                prop_assert_eq!(window.received(bytes), bytes <= open);
                if bytes <= open {
                    (open, held) = (open - bytes, held + bytes);
                }
                let passed = held.min(bytes / 2 + 1);
                held -= passed;
                open += window.consumed(passed, limit).unwrap_or(0) as usize;
                prop_assert!(open + held <= 60_000);
                prop_assert_eq!((window.open as usize, window.held as usize), (open, held));
            }
            if let Some(credit) = window.consumed(held, 10_000) {
                open += credit as usize;
            }
            prop_assert!(open >= 1000 / 2, "a window that is used again never stays closed");
        }
    }
}
