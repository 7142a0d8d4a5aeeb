//! Fuzz target. Run it with `cargo +nightly fuzz run tls_records`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::tls_records(data));
