//! Parse, run, exit.

use clap::Parser;
use std::process::ExitCode;

/// jemalloc: frames come and go by the hundred KiB, which the C library's allocator maps and unmaps each time; and it
/// gives memory back after a burst.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    culvert::run_as_plugin().unwrap_or_else(|| culvert::run(culvert::Cli::parse()))
}
