//! Fuzz target. Run it with `cargo +nightly fuzz run csr`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::csr(data));
