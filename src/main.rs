//! Parse, run, exit.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    culvert::run(culvert::Cli::parse())
}
