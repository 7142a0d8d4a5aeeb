//! Fuzz target. Run it with `cargo +nightly fuzz run policy_objects`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::policy_objects(data));
