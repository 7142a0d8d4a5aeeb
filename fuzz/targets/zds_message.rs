//! Fuzz target. Run it with `cargo +nightly fuzz run zds_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::zds_message(data));
