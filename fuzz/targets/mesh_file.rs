//! Fuzz target. Run it with `cargo +nightly fuzz run mesh_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::fuzz::mesh_file(data));
