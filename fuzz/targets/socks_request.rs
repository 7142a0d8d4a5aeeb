//! Fuzz target. Run it with `cargo +nightly fuzz run socks_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::socks_request(data));
