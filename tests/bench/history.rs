//! What it costs that connections are remembered and their stages timed: `cargo bench --bench history`.

#![allow(clippy::expect_used, reason = "a measurement that cannot be made ends by panicking")]

use culvert::measured_history::Endings;
use divan::{AllocProfiler, Bencher};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

/// Connections that are measured together, so that the clock does not count.
const SAMPLE: u32 = 100;

fn main() {
    divan::main();
}

/// One entry into a full history, which pushes out another one.
#[divan::bench(args = [false, true], sample_size = SAMPLE, threads = [1, 4])]
fn push(bencher: Bencher<'_, '_>, refused: bool) {
    let endings = Endings::new().expect("a history");
    bencher.with_inputs(|| endings.ending(refused)).bench_values(|ending| endings.push(ending));
}

/// What would happen to the same record without a history.
#[divan::bench(args = [false, true], sample_size = SAMPLE)]
fn without(bencher: Bencher<'_, '_>, refused: bool) {
    let endings = Endings::new().expect("a history");
    bencher.with_inputs(|| endings.ending(refused)).bench_values(drop);
}

/// The laps of one connection and their metric.
#[divan::bench(sample_size = SAMPLE, threads = [1, 4])]
fn stages(bencher: Bencher<'_, '_>) {
    let endings = Endings::new().expect("a history");
    bencher.bench(|| endings.stages());
}
