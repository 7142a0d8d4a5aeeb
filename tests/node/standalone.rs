//! Without Istio: the daemon with the settings of the chart for `facts: file` and `certificates: builtin`, and with
//! files as the kubelet mounts them.

use crate::kubernetes::cluster;
use crate::world::{World, ask, eventually, subject};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// The container's environment from the chart, without what belongs to this machine.
fn environment() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let helm = root.join("target/tools/helm");
    assert!(helm.exists(), "{} is not there: scripts/manifests installs it", helm.display());
    let mut command = Command::new(helm);
    command.args([
        "template",
        "culvert",
        "daemonset/chart",
        "-n",
        "istio-system",
        "--show-only",
        "templates/daemonset.yaml",
    ]);
    command.args(["--kube-version", "1.33.0", "--set", "facts=file,certificates=builtin"]).current_dir(root);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let set: Value =
        serde_saphyr::from_str(std::str::from_utf8(&output.stdout).unwrap().trim_start_matches("---")).unwrap();
    let all = set["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap().clone();
    let said = |entry: &Value| Some((entry["name"].as_str()?.to_owned(), entry["value"].as_str()?.to_owned()));
    all.iter().filter_map(said).collect()
}

/// Fills a folder, and changes it, as the kubelet does: the files are links into a folder that is a link, which is
/// replaced.
fn mount(folder: &Path, version: u32, files: &[(&str, &str)], mode: u32) {
    let real = folder.join(format!("..2026_11_27_{version}"));
    fs::create_dir_all(&real).unwrap();
    for (name, text) in files {
        fs::write(real.join(name), text).unwrap();
        fs::set_permissions(real.join(name), fs::Permissions::from_mode(mode)).unwrap();
        if !folder.join(name).exists() {
            symlink(Path::new("..data").join(name), folder.join(name)).unwrap();
        }
    }
    let before = fs::read_link(folder.join("..data")).ok();
    symlink(real.file_name().unwrap(), folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    if let Some(before) = before {
        fs::remove_dir_all(folder.join(before)).unwrap();
    }
}

/// The rendered settings, with folders of the world instead of the container's.
fn settings(w: &World, node: u8) -> Vec<(String, String)> {
    let own = |name: &str| w.dir.join(format!("{name}{node}")).display().to_string();
    let mut all = environment();
    for (name, value) in &mut all {
        *value = value.replace("/etc/culvert/", &format!("{}/etc-", w.dir.display()));
        match name.as_str() {
            "CULVERT_PROC" => *value = "/proc".into(),
            "CULVERT_CNI_BIN_DIR" | "CULVERT_CNI_CONF_DIR" | "CULVERT_STATE_FILE" => *value = own(name),
            _ => {}
        }
    }
    for folder in ["CULVERT_CNI_BIN_DIR", "CULVERT_CNI_CONF_DIR"] {
        fs::create_dir_all(own(folder)).unwrap();
    }
    // A setting that the helper of all scenarios makes and the chart does not.
    all.push(("CLUSTER_ID".into(), String::new()));
    all
}

#[test]
fn with_a_config_map_and_a_secret_alone_pods_talk_and_changes_arrive() {
    let mut c = cluster();
    let (mesh, ca) = (c.w.dir.join("etc-mesh"), c.w.dir.join("etc-ca"));
    let file = |c: &crate::kubernetes::Cluster, policies: Value| {
        let workload = |pod: &crate::world::Pod| {
            json!({"name": pod.name, "namespace": "ns", "serviceAccount": pod.name, "protocol": "HBONE", "node": format!("n{}", pod.node),
                "workloadIps": [pod.v4.to_string(), pod.v6.to_string()]})
        };
        json!({"workloads": [workload(&c.client), workload(&c.server)], "policies": policies}).to_string()
    };
    mount(&mesh, 1, &[("mesh.yaml", &file(&c, json!([])))], 0o644);
    let read = |name: &str| fs::read_to_string(c.w.ca().join(name)).unwrap();
    let (pem, key) = (read("ca.pem"), read("ca.key"));
    // The mode of a Secret's files in Kubernetes.
    mount(&ca, 1, &[("ca.pem", &pem), ("ca.key", &key)], 0o644);
    let of_first = settings(&c.w, 1);
    let checked = Command::new(subject()).arg("check").envs(of_first.clone()).env("NODE_NAME", "n1").output().unwrap();
    let said = String::from_utf8(checked.stderr).unwrap();
    assert!(!checked.status.success() && said.contains("ca.key") && said.contains("defaultMode: 0400"), "{said}");
    mount(&ca, 2, &[("ca.pem", &pem), ("ca.key", &key)], 0o400);

    for node in [1, 2] {
        let settings = settings(&c.w, node);
        let settings: Vec<(&str, &str)> =
            settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        c.w.start_kube_node(node, &c.apis[usize::from(node) - 1], &settings);
    }
    for node in [1, 2] {
        c.w.wait_captured(node);
        eventually("it is ready", || c.w.is_ready(node));
    }
    let asks = |c: &crate::kubernetes::Cluster| {
        ask(&c.client.netns, (c.server.v4, 8080), "x").is_ok_and(|answer| !answer.is_empty())
    };
    assert!(asks(&c));
    assert!(c.w.metric(2, "istio_tcp_connections_opened_total", &["mutual_tls"]) >= 1.0);
    // A change of the ConfigMap.
    let deny = json!([{"name": "deny", "namespace": "ns", "scope": "Namespace", "action": "Deny", "dryRun": false,
        "rules": [[[{"destinationPorts": [8080]}]]]}]);
    mount(&mesh, 2, &[("mesh.yaml", &file(&c, deny))], 0o644);
    eventually("the policy is in force", || !asks(&c));
    mount(&mesh, 3, &[("mesh.yaml", &file(&c, json!([])))], 0o644);
    eventually("and no more", || asks(&c));
    assert_eq!(c.w.metric(1, "culvert_mesh_file_refused_total", &[]), 0.0);
}

#[test]
fn the_example_of_the_documentation_is_understood() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/standalone.md")).unwrap();
    let blocks: Vec<&str> = text.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let w = World::new();
    let file = w.dir.join("mesh.yaml");
    let mut seen = 0;
    for block in blocks.iter().filter(|block| block.contains("workloads:") || block.starts_with("policies:")) {
        fs::write(&file, block).unwrap();
        let checked = Command::new(subject())
            .arg("check")
            .env("LOCAL_XDS_PATH", &file)
            .env("CULVERT_CA_DIR", w.ca())
            .output()
            .unwrap();
        assert!(checked.status.success(), "{}\n{block}", String::from_utf8_lossy(&checked.stderr));
        seen += 1;
    }
    assert_eq!(seen, 3);
}
