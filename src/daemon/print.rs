//! What commands print.

use crate::telemetry::printable::printable_lines;
use std::io::Write;
use std::process::ExitCode;

/// Exit code for a configuration that is not valid. clap uses the same for the command line.
pub(super) const EXIT_CONFIG: u8 = 2;

/// Prints to standard output.
pub(super) fn say(text: &str) -> ExitCode {
    // This fails only if the reader has closed standard output.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}

/// Prints to standard error, and gives the exit code.
pub(super) fn fail(code: u8, text: &str) -> ExitCode {
    warn(text);
    ExitCode::from(code)
}

/// Prints to standard error. The text may have been written by others.
pub(super) fn warn(text: &str) {
    for line in printable_lines(text).lines() {
        let _ = writeln!(std::io::stderr(), "culvert: {line}");
    }
}
