//! Findings: the lines of doctor's report.

use crate::telemetry::printable::printable;
use std::fmt;
use std::time::Duration;

/// How long a single check may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(3);

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    /// Works, but the operator should know.
    Note,
    Fail,
}

/// One line of the report.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    pub(super) check: &'static str,
    pub(super) text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Note => "note",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{word}  {:<12}  {}", self.check, printable(&self.text))
    }
}

pub(super) fn ok(check: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Ok, check, text: text.into() }
}

pub(super) fn note(check: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Note, check, text: text.into() }
}

pub(super) fn fail(check: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Fail, check, text: text.into() }
}
