//! A limit for log lines that a peer can cause. Lines beyond it are counted, and the next line that is written states
//! the number. And a limit for texts that repeat what another program has said.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// Longest text that is repeated, in bytes.
const TEXT_MAX: usize = 1_000;

/// The beginning of a text, with a mark if it was longer.
pub fn shortened(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        let end = (0..=TEXT_MAX).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or_default());
        text.push('…');
    }
    text
}

/// Allows at most [`LogLimit::PER_SECOND`] lines in each second.
#[derive(Debug, Default)]
pub struct LogLimit {
    window: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Lines that may be written in each second.
    pub const PER_SECOND: u32 = 20;

    /// Whether to write a line. `Some(n)`: write it; `n` lines before it were suppressed. `None`: suppress it.
    pub fn allow(&self) -> Option<u64> {
        let now = Instant::now();
        let mut window = self.window.lock();
        let current = window.get_or_insert(Window { since: now, lines: 0, suppressed: 0 });
        if now.duration_since(current.since) >= Duration::from_secs(1) {
            current.since = now;
            current.lines = 0;
        }
        if current.lines >= Self::PER_SECOND {
            current.suppressed += 1;
            return None;
        }
        current.lines += 1;
        Some(std::mem::take(&mut current.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let long = "ä".repeat(40_000);
        assert_eq!(shortened(format!("a{long}")), format!("a{}…", "ä".repeat(499)));
        assert_eq!(shortened("a".repeat(TEXT_MAX)), "a".repeat(TEXT_MAX));
    }

    #[test]
    fn lines_beyond_the_limit_are_counted() {
        let limit = LogLimit::default();
        let written = (0..100).filter(|_| limit.allow().is_some()).count();
        // The loop may cross into a second window by chance, but not into a third.
        assert!((20..=40).contains(&written), "{written}");
    }
}
