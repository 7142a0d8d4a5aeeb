//! House rules that no lint can check: layers, steps, circles between files, pure files, where `unsafe`, the environment
//! and spawning are allowed, and whether the documents are current.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what is wrong by panicking"
)]

mod circles;
mod documents;
mod monitoring;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, lowest first. A module imports only from layers below its own.
const LAYERS: [&[&str]; 8] = [
    &["crypto", "mesh", "ports", "proto", "sys", "task", "telemetry"],
    &["hbone", "rpc"],
    &["dns", "identity"],
    &["connection", "control", "admin", "cluster"],
    &["node", "otlp", "control_plane"],
    &["config"],
    &["demo", "doctor", "inspect"],
    &["daemon"],
];

/// Modules that some modules must not import, although they are in a lower layer.
const NEVER: [(&str, &[&str]); 8] = [
    ("control", &["hbone", "sys"]),
    ("admin", &["mesh", "hbone", "identity", "proto", "rpc", "sys"]),
    ("cluster", &["mesh", "hbone", "identity", "proto", "rpc", "sys", "dns"]),
    ("node", &["control", "admin", "hbone", "rpc"]),
    ("identity", &["hbone", "sys"]),
    ("control_plane", &["hbone", "sys", "connection", "dns"]),
    ("connection", &["proto", "rpc"]),
    ("hbone", &["proto", "telemetry"]),
];

/// The steps of a connection. Each may import only from steps before it.
const STEPS: [&str; 6] = ["accept", "authorize", "choose", "dial", "forward", "report"];

/// Files without I/O, clocks and randomness: they only decide.
const PURE: &[&str] = &[
    "node/selectors.rs",
    "node/takeover.rs",
    "node/kubernetes/cgroup.rs",
    "node/kubernetes/facts.rs",
    "node/kubernetes/select.rs",
    "dns/answer.rs",
    "dns/lookup.rs",
    "dns/message.rs",
    "dns/resolv_conf.rs",
    "node/zds/message.rs",
    "node/zds/session.rs",
    "mesh/address.rs",
    "mesh/fact_key.rs",
    "mesh/index.rs",
    "mesh/update.rs",
    "mesh/name.rs",
    "mesh/policy.rs",
    "mesh/service.rs",
    "mesh/snapshot.rs",
    "mesh/workload.rs",
    "hbone/request.rs",
    "control/yaml.rs",
    "control_plane/ca/authorize.rs",
    "control_plane/ca/csr.rs",
    "control/yaml_policies.rs",
    "control_plane/serve/difference.rs",
    "control_plane/serve/index.rs",
    "control_plane/serve/node.rs",
    "control_plane/serve/session.rs",
    "control_plane/serve/subscription.rs",
    "control/xds/decode.rs",
    "control/xds/policy.rs",
    "control/xds/delta.rs",
    "control/xds/encode.rs",
    "control/xds/resources.rs",
    "control_plane/facts/api.rs",
    "control_plane/facts/index.rs",
    "control_plane/facts/label_index.rs",
    "control_plane/facts/object.rs",
    "control_plane/facts/owner.rs",
    "control_plane/facts/read.rs",
    "control_plane/facts/resource.rs",
    "control_plane/facts/selector.rs",
    "control_plane/facts/service.rs",
    "control_plane/facts/space.rs",
    "control_plane/facts/waypoint.rs",
    "control_plane/facts/workload.rs",
    "control_plane/watch/fold.rs",
    "control_plane/watch/known.rs",
    "control_plane/watch/outbox.rs",
    "connection/authorize/decide.rs",
    "connection/authorize/matcher.rs",
    "connection/choose/destination.rs",
    "connection/choose/local.rs",
    "connection/choose/retry_budget.rs",
    "connection/choose/route.rs",
    "connection/choose/standing.rs",
    "connection/choose/waypoint.rs",
    "control_plane/policies/authentication.rs",
    "control_plane/policies/authorization.rs",
    "control_plane/policies/index.rs",
    "control_plane/policies/levels.rs",
    "control_plane/policies/notes.rs",
    "control_plane/policies/object.rs",
    "control_plane/policies/rules.rs",
    "control_plane/policies/selectors.rs",
    "control_plane/policies/status/mod.rs",
    "control_plane/policies/touched.rs",
    "control_plane/policies/values.rs",
];

/// The largest number of lines in a file, without its tests.
const LINES_MAX: usize = 500;

/// Every file below src by its path, without its tests.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                // Generated code has its own style.
                if !path.ends_with("src/proto") {
                    folders.push(path);
                }
            } else {
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                let text = fs::read_to_string(&path).unwrap();
                let production = text.split("#[cfg(test)]").next().unwrap().to_owned();
                found.insert(name, production);
            }
        }
    }
    assert!(found.len() > 50, "the sources were found");
    found
}

/// Log lines are for operators, so no value is logged in its debug form.
#[test]
fn nothing_is_logged_in_its_debug_form() {
    for (name, text) in sources() {
        for call in ["trace!(", "debug!(", "info!(", "warn!(", "error!(", "event!("] {
            for rest in code(&text).split(&format!("tracing::{call}")).skip(1) {
                let arguments = rest.split(");").next().unwrap();
                let mut pairs = arguments.char_indices().zip(arguments.chars().skip(1));
                let sigil = pairs.find(|((at, c), next)| {
                    let before = arguments[..*at].trim_end().chars().next_back();
                    *c == '?' && next.is_alphabetic() && before.is_none_or(|before| matches!(before, ',' | '=' | '('))
                });
                assert!(sigil.is_none(), "{name}: tracing::{call}{arguments}");
                assert!(!arguments.contains(":?}"), "{name}: tracing::{call}{arguments}");
            }
        }
    }
}

/// Code without comments, because comments may mention what code must not use.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The next part of every path that begins with `root` (`crate::`, or the path of a module), with braces expanded.
fn imports(text: &str, root: &str) -> Vec<String> {
    let mut all = Vec::new();
    for rest in code(text).split(root).skip(1) {
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => all.push(std::mem::take(&mut word)),
                    c if depth == 0 => word.push(c),
                    _ => {}
                }
            }
            all.push(word);
        } else {
            all.push(rest.to_owned());
        }
    }
    let head = |path: String| path.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    all.into_iter().map(head).filter(|name| !name.is_empty()).collect()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

#[test]
fn modules_import_only_from_below() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let Some((module, _)) = file.split_once('/') else { continue };
        let own = layer(module).unwrap_or_else(|| panic!("{file}: {module} has no layer"));
        for import in imports(&text, "crate::").into_iter().filter(|import| import != module) {
            let Some(other) = layer(&import) else { continue };
            let never = NEVER.iter().any(|(who, what)| *who == module && what.contains(&import.as_str()));
            if other >= own || never {
                wrong.push(format!("{file} imports {import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn steps_name_only_steps_before_them() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let Some(step) = STEPS.iter().position(|step| file.starts_with(&format!("connection/{step}/"))) else {
            continue;
        };
        let named = imports(&text, "connection::");
        for (index, other) in STEPS.iter().enumerate() {
            if index > step && named.iter().any(|name| name == other) {
                wrong.push(format!("{file} names {other}"));
            }
        }
        for knows_all in ["journeys", "worker", "workers"] {
            if named.iter().any(|name| name == knows_all) {
                wrong.push(format!("{file} names {knows_all}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn some_things_have_one_place() {
    let rules: [(&str, &[&str], &[&str], &str); 6] = [
        ("climbing out of a module", &["super::super"], &[], "name it from crate::, where the layer test sees it"),
        ("unsafe", &["unsafe "], &["sys/"], "put it into sys, with its safety argument"),
        ("the environment", &["env::var", "env::vars", "env::set_var"], &["config/"], "make it a setting in config"),
        (
            "spawning",
            &[
                "tokio::spawn",
                "thread::spawn",
                "spawn_local",
                "spawn_blocking",
                "thread::Builder",
                "JoinSet",
                "tracker.spawn",
            ],
            &["task/"],
            "use task::Group or task::thread",
        ),
        ("anyhow", &["anyhow"], &["daemon/", "demo/", "main.rs"], "make an error enum of the step"),
        (
            "the wire's types",
            &["tonic::", "prost::"],
            &[
                "control/xds/",
                "control_plane/ca/service.rs",
                "control_plane/serve/",
                "daemon/profile.rs",
                "fuzz.rs",
                "identity/istio_ca.rs",
                "node/zds/",
                "otlp/",
                "rpc/",
            ],
            "convert beside the wire",
        ),
    ];
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        for (what, words, places, instead) in rules {
            let here = places.iter().any(|place| file.starts_with(place));
            if !here && words.iter().any(|word| code(&text).contains(word)) {
                wrong.push(format!("{file}: {what} has no place here; {instead}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn pure_files_do_nothing() {
    let sources = sources();
    for file in PURE {
        let text = code(sources.get(*file).unwrap_or_else(|| panic!("{file} is not there")));
        for word in ["tokio", "Instant::now", "SystemTime", "std::fs", "rand::", "tracing::", "crate::sys"] {
            assert!(!text.contains(word), "{file} is pure and must not use {word}");
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_none_is_too_long_or_leaves_marks() {
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        if file.ends_with(".rs") && !text.starts_with("//!") {
            wrong.push(format!("{file}: does not open with //!"));
        }
        let lines = text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{file}: {lines} lines, {LINES_MAX} at most"));
        }
        for mark in ["TODO", "FIXME", "XXX"] {
            if text.contains(mark) {
                wrong.push(format!("{file}: {mark}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Compares a document with the one that the code generates. With `REGENERATE=1` it writes the document.
#[allow(clippy::disallowed_methods, reason = "the rule is about the daemon")]
fn is_current(file: &str, said: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("REGENERATE").is_some() {
        fs::write(&path, said).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(said.lines()).find(|(written, said)| written != said);
    assert!(written == said, "{file} is not current: REGENERATE=1 cargo test --test tidy writes it. {differs:#?}");
}

#[test]
fn the_documents_of_settings_and_metrics_are_what_the_code_says_and_name_every_one() {
    let (settings, metrics) = (culvert::docs::settings().unwrap(), culvert::docs::metrics().unwrap());
    is_current("docs/settings.md", &settings);
    is_current("docs/metrics.md", &metrics);
    let sources = sources();
    let mut names = Vec::new();
    for (_, text) in sources.iter().filter(|(file, _)| file.starts_with("config/settings/")) {
        for setting in text.split("Setting::new(").skip(1) {
            let words: Vec<&str> = setting.split('"').collect();
            names.push(format!("`--{}`", words[1]));
            names.push(format!("`{}`", words[3]));
        }
    }
    assert!(names.len() > 40, "the settings were found");
    let before = names.len();
    for text in sources.values() {
        for start in ["registry.register(", "encode_descriptor(", "put("] {
            for rest in text.split(start).skip(1) {
                let Some(name) = rest.trim_start().strip_prefix('"').and_then(|r| r.split('"').next()) else {
                    continue;
                };
                let metric =
                    ["istio_", "culvert_", "process_", "workload_manager_"].iter().any(|p| name.starts_with(p));
                if metric {
                    names.push(format!("`{name}"));
                }
            }
        }
    }
    assert!(names.len() > before + 15, "the metrics were found");
    let shown = settings + &metrics;
    let missing: Vec<&String> = names.iter().filter(|name| !shown.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "the documents do not name {missing:#?}");
    let bare: Vec<&str> = metrics.lines().filter(|line| line.starts_with("| `") && line.contains(" | . |")).collect();
    assert!(bare.is_empty(), "without meaning: {bare:#?}");
}

#[test]
fn the_manifest_sets_what_the_daemon_reads() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("daemonset/daemonset.yaml")).unwrap();
    let sources = sources();
    let set = manifest.lines().filter_map(|line| line.trim().strip_prefix("- name: "));
    let variables: Vec<&str> =
        set.filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit())).collect();
    assert!(variables.len() > 10, "the variables were found");
    // Variables that are not settings: the runtime's, one that only ztunnel reads, and one with a prefix.
    let others = ["RUST_BACKTRACE", "INPOD_ENABLED", "ISTIO_META_CLUSTER_ID"];
    let is_setting = |name: &str| {
        let quoted = format!("\"{name}\"");
        sources.iter().any(|(file, text)| file.starts_with("config/settings/") && text.contains(&quoted))
    };
    let unknown: Vec<&&str> = variables.iter().filter(|name| !others.contains(*name) && !is_setting(name)).collect();
    assert!(unknown.is_empty(), "nobody reads {unknown:?}");
    for (port, constant) in [("15020", "STATS: u16 = 15020"), ("15021", "READY: u16 = 15021")] {
        assert!(manifest.contains(port) && sources["ports.rs"].contains(constant), "{port}");
    }
}
