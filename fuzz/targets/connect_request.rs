//! Fuzz target. Run it with `cargo +nightly fuzz run connect_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::connect_request(data));
