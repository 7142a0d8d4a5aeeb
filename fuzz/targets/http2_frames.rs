//! Fuzz target. Run it with `cargo +nightly fuzz run http2_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::http2_frames(data));
