//! One line of the report.

use std::fmt;
use std::time::Duration;

/// How long anything that is tried may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(3);

/// How well a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Well,
    /// Works, and somebody should know.
    Note,
    Bad,
}

/// One line.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) verdict: Verdict,
    pub(super) what: &'static str,
    pub(super) text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Well => "ok  ",
            Verdict::Note => "note",
            Verdict::Bad => "FAIL",
        };
        write!(f, "{word}  {:<12}  {}", self.what, self.text)
    }
}

pub(super) fn well(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Well, what, text: text.into() }
}

pub(super) fn note(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Note, what, text: text.into() }
}

pub(super) fn bad(what: &'static str, text: impl Into<String>) -> Line {
    Line { verdict: Verdict::Bad, what, text: text.into() }
}
