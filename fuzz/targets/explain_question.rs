//! Fuzz target. Run it with `cargo +nightly fuzz run explain_question`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::explain_question(data));
