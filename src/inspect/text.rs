//! Text for people: tables, times, and colours where a terminal shows them.

use crate::telemetry::log::brief;
pub use crate::telemetry::printable::printable;
pub use crate::telemetry::units::bytes;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Whether colours are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Whether the output is a terminal that shows colours.
    pub colours: bool,
}

impl Style {
    /// Something that is wrong.
    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// Something that is well.
    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Something that people should know.
    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// A heading.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colours { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Columns of equal width, without spaces at the end of lines.
pub fn columns(rows: &[Vec<String>]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// The value at a path such as `/pods/total`, or null.
pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    value.pointer(path).unwrap_or(&Value::Null)
}

/// The text under a key, printable.
pub fn text(value: &Value, key: &str) -> String {
    printable(value[key].as_str().unwrap_or_default())
}

/// A number of seconds as people say it.
pub fn seconds(seconds: u64) -> String {
    // Beyond a day, seconds are noise.
    let kept = match seconds {
        86_400.. => seconds / 3600 * 3600,
        3600.. => seconds / 60 * 60,
        _ => seconds,
    };
    brief(Duration::from_secs(kept)).to_string()
}

/// How long ago a time stamp was.
pub fn ago(stamp: &Value, now: SystemTime) -> Option<String> {
    let at = humantime::parse_rfc3339(stamp.as_str()?).ok()?;
    Some(seconds(now.duration_since(at).unwrap_or_default().as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_as_people_say_them() {
        for (count, expected) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB"), (150 << 20, "150 MiB")]
        {
            assert_eq!(bytes(count), expected);
        }
        for (count, expected) in [(5, "5s"), (65, "1m 5s"), (3661, "1h 1m"), (90_061, "1day 1h")] {
            assert_eq!(seconds(count), expected);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        assert_eq!(columns(&[row(&["A", "B"]), row(&["long", ""]), row(&["x"])]), ["A     B", "long", "x"]);
        assert_eq!(columns(&[]), Vec::<String>::new());
    }
}
