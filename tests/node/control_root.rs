//! The root of a mesh is replaced while connections are made, with two control planes and two nodes.

use crate::control::Mesh;
use crate::world::certs::spiffe;
use crate::world::{eventually, output_in, replace, subject};
use crate::xds::Load;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Life of certificates. Each wait of a rotation takes about a minute with it.
const LIFE: &str = "16s";

/// What the command says.
fn rotate(mesh: &Mesh) -> String {
    let (config, subject) = (mesh.api.kubeconfig.display(), subject().display().to_string());
    let kubeconfig = format!("KUBECONFIG={config}");
    let life = format!("MAX_WORKLOAD_CERT_TTL={LIFE}");
    let default = format!("DEFAULT_WORKLOAD_CERT_TTL={LIFE}");
    let run = [&*kubeconfig, "POD_NAMESPACE=istio-system", &*life, &*default, &*subject, "control", "rotate-root"];
    output_in(&mesh.w.ns("n1"), "env", &run)
}

/// The roots in the ConfigMap. They are written where the daemons read them, as the kubelet does.
fn roots(mesh: &Mesh) -> Vec<String> {
    let map = mesh.api.get("api/v1/configmaps", "istio-system/istio-ca-root-cert").unwrap();
    let text = map["data"]["root-cert.pem"].as_str().unwrap();
    if std::fs::read_to_string(&mesh.root_file).unwrap() != text {
        replace(&mesh.root_file, text);
    }
    text.split_inclusive("-----END CERTIFICATE-----\n").map(ToOwned::to_owned).collect()
}

/// Waits longer than [`eventually`] does, for a step of the rotation.
fn wait_for(mesh: &Mesh, what: &str, holds: impl Fn(&[String], &str) -> bool) {
    let begun = Instant::now();
    let mut held = false;
    while !held {
        assert!(begun.elapsed() < Duration::from_secs(150), "{what}: {}", rotate(mesh));
        let next = Instant::now() + Duration::from_secs(2);
        eventually("a moment has passed", || Instant::now() >= next);
        held = holds(&roots(mesh), &rotate(mesh));
    }
}

#[test]
fn the_root_is_replaced_by_one_command_and_no_connection_fails() {
    let mut mesh = Mesh::new();
    let settings = [("MAX_WORKLOAD_CERT_TTL", LIFE), ("DEFAULT_WORKLOAD_CERT_TTL", LIFE)];
    for number in [0, 1] {
        mesh.start_control_with(number, &settings);
    }
    // Each node has another control plane.
    for node in [1, 2] {
        mesh.start_node(node, usize::from(node) - 1, &[("SECRET_TTL", LIFE)]);
        eventually("the node is ready", || mesh.w.is_ready(node));
        mesh.w.wait_captured(node);
    }
    let load = Load::between(mesh.w.ns("client"), mesh.server());
    let old = roots(&mesh);
    assert_eq!(old.len(), 1);
    assert!(rotate(&mesh).starts_with("The rotation has begun.\nStep 1 of 3"));
    assert!(rotate(&mesh).starts_with("Step 1 of 3"), "the command can be repeated");
    eventually("both roots are given out", || roots(&mesh).len() == 2);
    let both = roots(&mesh);
    wait_for(&mesh, "the new root signs", |roots, said| roots == both && said.starts_with("Step 2 of 3"));
    wait_for(&mesh, "the old root is gone", |roots, said| roots.len() == 1 && said.starts_with("Done"));
    assert!(both.contains(&old[0]) && both.contains(&roots(&mesh)[0]) && roots(&mesh) != old);
    // Certificates of the new root are in use, and are renewed by it.
    let expiry =
        |mesh: &Mesh| mesh.w.metric(1, "culvert_certificate_expiry_seconds", &[&format!("\"{}\"", spiffe("client"))]);
    for _ in 0..2 {
        let before = expiry(&mesh);
        eventually("a certificate is renewed", || expiry(&mesh) > before);
    }
    load.more(20);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    let took = |l: &&Value| l["message"] == "the rotation of the root has taken a step";
    let steps: usize = [0, 1].iter().map(|number| mesh.control_log(*number).iter().filter(took).count()).sum();
    assert_eq!(steps, 2, "each step is taken by one of them");
}
