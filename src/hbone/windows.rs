//! The windows that a tunnel gives its peer, as far as they follow what is held: stalled streams must not use up the
//! window of all, and while buffers are scarce each stream gets little.

use super::buffers::Account;
use super::config::Config;

/// Window of a stream while buffers are scarce.
const SCARCE_STREAM_WINDOW: u32 = 256 * 1024;

/// What can be adjusted on either end.
pub(super) trait AdjustWindows {
    /// The window of all streams together, unread bytes included.
    fn connection_window(&mut self, bytes: u32);
    /// The window of each stream; `false` where an earlier change is still on its way.
    fn stream_window(&mut self, bytes: u32) -> bool;
}

/// The windows in force.
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

    /// Looks at what is held and adjusts; cheap, and done in each turn.
    pub(super) fn adjust(&mut self, account: &Account, tunnel: &mut impl AdjustWindows) {
        let wanted = account.connection_window(self.base);
        // Each change is a frame: not for every few bytes.
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
