//! What commands print.

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
    for line in text.lines() {
        let _ = writeln!(std::io::stderr(), "culvert: {line}");
    }
    ExitCode::from(code)
}
