//! The program: parses the command line, runs the command and exits with its code. Under the name of the CNI plugin it
//! is the CNI plugin.

use std::process::ExitCode;

/// jemalloc. Frames of more than 100 KiB are allocated and freed constantly; the C library's allocator would map and
/// unmap memory each time, and would not return memory to the system after a burst.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    culvert::run_as_plugin().unwrap_or_else(|| culvert::run(culvert::cli()))
}
