//! Fuzz target. Run it with `cargo +nightly fuzz run dns_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::dns_request(data));
