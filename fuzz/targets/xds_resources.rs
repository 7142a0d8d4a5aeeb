//! Fuzz target. Run it with `cargo +nightly fuzz run xds_resources`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::xds_resources(data));
