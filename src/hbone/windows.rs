//! The flow control windows that a tunnel gives its peer. They follow what is held in memory: stalled streams must not
//! use up the window of all streams, and while buffers are scarce each stream gets a small one.

use super::buffers::Account;
use super::config::Config;

/// Window of a stream while buffers are scarce, in bytes.
const SCARCE_STREAM_WINDOW: u32 = 256 * 1024;

/// The windows of an HTTP/2 connection, client or server.
pub(super) trait AdjustWindows {
    /// Sets the window of all streams together, including bytes that are still unread.
    fn connection_window(&mut self, bytes: u32);
    /// Sets the window of each stream. `false`: an earlier change has not been acknowledged yet, so this one was not
    /// made.
    fn stream_window(&mut self, bytes: u32) -> bool;
}

/// The windows that the peer has been given.
#[derive(Debug)]
pub(super) struct Windows {
    base: u32,
    connection: u32,
    stream: u32,
    scarce: bool,
}

impl Windows {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            base: config.connection_window,
            connection: config.connection_window,
            stream: config.stream_window,
            scarce: false,
        }
    }

    /// Adjusts the windows to what is held. Cheap, because it runs in every turn of the tunnel.
    pub(super) fn adjust(&mut self, account: &Account, tunnel: &mut impl AdjustWindows) {
        let wanted = account.connection_window(self.base);
        // Each change costs a frame, so small differences are ignored.
        if wanted.abs_diff(self.connection) >= self.base / 4 || (wanted == self.base && wanted != self.connection) {
            self.connection = wanted;
            tunnel.connection_window(wanted);
        }
        let scarce = if self.scarce { !account.plenty() } else { account.scarce() };
        if scarce != self.scarce && self.stream > SCARCE_STREAM_WINDOW {
            let window = if scarce { SCARCE_STREAM_WINDOW } else { self.stream };
            if tunnel.stream_window(window) {
                self.scarce = scarce;
            }
        }
    }
}
