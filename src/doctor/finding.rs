//! One line of the report.

use std::fmt;
use std::time::Duration;

/// How long anything that is tried may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(3);

/// How well a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    /// Works, and somebody should know.
    Note,
    Fail,
}

/// One line.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    pub(super) what: &'static str,
    pub(super) text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Note => "note",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{word}  {:<12}  {}", self.what, self.text)
    }
}

pub(super) fn ok(what: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Ok, what, text: text.into() }
}

pub(super) fn note(what: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Note, what, text: text.into() }
}

pub(super) fn fail(what: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fail, what, text: text.into() }
}
