//! Passes the version of the compiler to the program, which shows it.

#![allow(clippy::disallowed_methods, reason = "the lint is for the daemon, not for its build")]

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC");
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(compiler).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    if let Some(version) = text.split_whitespace().nth(1) {
        println!("cargo:rustc-env=CULVERT_RUST_VERSION={version}");
    }
}
