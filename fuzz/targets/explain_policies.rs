//! Fuzz target. Run it with `cargo +nightly fuzz run explain_policies`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::explain_policies(data));
