//! Compares the committed `src/proto` with the code generated from `proto/`. `REGENERATE=1 cargo test --test proto`
//! writes it.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test says what is wrong by panicking")]

use std::fs;
use std::path::Path;

const FILES: [&str; 7] = [
    "authorization.proto",
    "citadel.proto",
    "profile.proto",
    "state.proto",
    "workload.proto",
    "xds.proto",
    "zds.proto",
];

#[test]
fn generated_code_is_what_the_protos_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = std::env::temp_dir().join(format!("culvert-proto-{}", std::process::id()));
    fs::create_dir_all(&out).unwrap();
    let descriptors = protox::compile(FILES, [root.join("proto")]).unwrap();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .bytes(".")
        // Equal messages have equal bytes.
        .btree_map(".istio.workload")
        .out_dir(&out)
        .compile_fds(descriptors)
        .unwrap();
    let committed = root.join("src/proto");
    let names = |folder: &Path| {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "mod.rs")
            .collect();
        names.sort();
        names
    };
    if std::env::var_os("REGENERATE").is_some() {
        for name in names(&out) {
            fs::copy(out.join(&name), committed.join(&name)).unwrap();
        }
    }
    let same = names(&out) == names(&committed)
        && names(&out).iter().all(|name| fs::read(out.join(name)).unwrap() == fs::read(committed.join(name)).unwrap());
    fs::remove_dir_all(&out).unwrap();
    assert!(same, "src/proto is not what proto/ gives: REGENERATE=1 cargo test --test proto, then commit");
}
