//! Tells the compiler's own version to the program, which shows it.

#![allow(clippy::disallowed_methods, reason = "the rule is about the daemon")]

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC");
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = Command::new(compiler).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    if let Some(version) = said.split_whitespace().nth(1) {
        println!("cargo:rustc-env=CULVERT_RUST_VERSION={version}");
    }
}
