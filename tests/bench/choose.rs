//! What it costs to choose an endpoint among many, in time and in allocations: `cargo bench --bench choose`.

#![allow(clippy::expect_used, reason = "a measurement that cannot be made ends by panicking")]

use culvert::measured::Choice;
use divan::{AllocProfiler, Bencher};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

/// Choices that are measured together, so that the clock does not count.
const SAMPLE: u32 = 100;

/// Numbers of endpoints.
const ENDPOINTS: [u32; 3] = [2, 100, 10_000];

fn main() {
    divan::main();
}

/// Choices among the endpoints of a service, one after the other.
fn choices(bencher: Bencher<'_, '_>, aside: u32, count: u32, weighted: bool) {
    let choice = Choice::new(count, aside, weighted).expect("a service with endpoints");
    bencher.bench(|| choice.choose().expect("an endpoint"));
}

#[divan::bench(args = ENDPOINTS, sample_size = SAMPLE)]
fn of_one_weight(bencher: Bencher<'_, '_>, count: u32) {
    choices(bencher, 0, count, false);
}

#[divan::bench(args = ENDPOINTS, sample_size = SAMPLE)]
fn of_several_weights(bencher: Bencher<'_, '_>, count: u32) {
    choices(bencher, 0, count, true);
}

#[divan::bench(args = ENDPOINTS, sample_size = SAMPLE)]
fn of_which_half_are_set_aside(bencher: Bencher<'_, '_>, count: u32) {
    choices(bencher, 2, count, false);
}

/// The same from four threads at once, as workers do.
#[divan::bench(args = ENDPOINTS, sample_size = SAMPLE, threads = 4)]
fn by_four_workers(bencher: Bencher<'_, '_>, count: u32) {
    choices(bencher, 0, count, false);
}
