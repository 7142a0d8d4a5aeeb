//! What a daemon leaves on a node and what it removes: uninstalling and cleaning up.

use crate::kubernetes::{Cluster, Cni, cluster, has_rules};
use crate::world::kube::KubePod;
use crate::world::{ControlPlane, World, apps, ask, eventually, http, inside, output_in, subject};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

fn set() -> Option<Value> {
    Some(json!({
        "metadata": {"name": "ztunnel", "namespace": "istio-system", "uid": "s"},
        "spec": {"selector": {}, "template": {"spec": {"containers": [
            {"name": "c", "env": [{"name": "CULVERT_CNI_CONF_DIR", "value": "/host/etc/cni/net.d"}]},
        ]}}},
    }))
}

/// What is left of culvert on the first node.
fn remains(c: &Cluster, cni: &Cni) -> Vec<String> {
    let mut found = Vec::new();
    let mut see = |what: &str, there: bool| found.extend(there.then(|| what.to_owned()));
    see("rules", has_rules(&c.client));
    see("ip rules", output_in(&c.client.netns, "ip", &["rule", "list"]).contains("32764:"));
    see("host rules", output_in(&c.w.ns("n1"), "nft", &["list", "tables"]).contains("culvert"));
    see("configuration", cni.ours().is_some());
    see("plugin", cni.bin.join("culvert-cni").exists());
    let folder = std::fs::read_dir(cni.socket.parent().unwrap()).unwrap().flatten();
    let names: Vec<String> = folder.map(|entry| entry.file_name().into_string().unwrap()).collect();
    for start in ["cni.sock", ".cni.sock", "turn-", "mesh.state"] {
        see(start, names.iter().any(|name| name.starts_with(start)));
    }
    found
}

#[test]
fn a_daemon_whose_set_is_deleted_leaves_nothing_and_one_that_cannot_tell_leaves_its_rules() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let plane = ControlPlane::start(&c.w.ns("n1"), &c.w.dir);
    plane.set(&c.w.mesh);
    let state = c.w.dir.join("mesh.state").display().to_string();
    let facts = World::facts_from(&plane);
    let facts: Vec<(&str, &str)> = facts.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let more = [("CULVERT_STATE_FILE", state.as_str()), ("CONNECTION_TERMINATION_DEADLINE", "1s")];
    let settings = [&cni.settings()[..], &facts, &more].concat();
    apps::serve(&c.client.netns, 8080, apps::who);
    let silent = Duration::from_secs(20);
    for (what, deleted, code, slow) in [
        ("deleted", true, 0, Duration::ZERO),
        ("deleted with its account", true, 401, Duration::ZERO),
        ("deleted, and the API is silent", true, 0, silent),
        ("keys changed", false, 401, Duration::ZERO),
        ("the API is in trouble", false, 503, Duration::ZERO),
    ] {
        c.apis[0].daemonset("ztunnel", set());
        c.apis[0].change_state(|state| (state.refuse_sets, state.refuse_patches, state.slow) = (0, 0, Duration::ZERO));
        c.start_one(&settings);
        eventually("it is captured", || c.apis[0].said("client").as_deref() == Some("enabled") && has_rules(&c.client));
        eventually("everything is there", || remains(&c, &cni).len() >= 8);
        eventually("the state file is written", || std::path::Path::new(&state).exists());
        let asks = |c: &Cluster| {
            c.apis[0].state().requests.iter().any(|r| r.contains("daemonsets?") && r.contains("watch=true"))
        };
        eventually("it watches its DaemonSet", || asks(&c));
        c.apis[0].change_state(|state| (state.refuse_sets, state.refuse_patches) = (code, code));
        if deleted {
            let lines = |c: &Cluster| {
                c.w.log(1)
                    .iter()
                    .filter(|l| l["message"].as_str().is_some_and(|m| m.contains("DaemonSet is deleted")))
                    .count()
            };
            let before = lines(&c);
            c.apis[0].daemonset("ztunnel", None);
            eventually("the daemon has heard of it", || lines(&c) > before);
        }
        c.apis[0].change_state(|state| state.slow = slow);
        c.apis[0].state().requests.clear();
        let mut daemon = c.w.take_node(1);
        daemon.signal(Signal::SIGTERM);
        daemon.wait();
        let left = remains(&c, &cni);
        if deleted {
            assert_eq!(left, Vec::<String>::new(), "{what}");
            assert_eq!(c.apis[0].said("client").is_some(), code != 0 || slow == silent, "{what}");
            assert!(ask(&c.w.ns("n1"), (c.client.v4, 8080), "x").is_ok_and(|answer| !answer.is_empty()), "{what}");
        } else {
            assert!(left.contains(&"rules".to_owned()) && left.contains(&"mesh.state".to_owned()), "{what}: {left:?}");
            assert_eq!(left.contains(&"plugin".to_owned()), code != 401, "{what}: {left:?}");
        }
    }
}

#[test]
fn a_daemon_after_which_another_goes_on_leaves_everything_to_it() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let settings = [&cni.settings()[..], &[("CONNECTION_TERMINATION_DEADLINE", "1s")]].concat();
    let own = c.w.add_pod("beside", 1);
    c.apis[0].daemonset("ztunnel", set());
    c.start_one(&settings);
    eventually("it is captured", || c.apis[0].said("client").as_deref() == Some("enabled"));
    // The DaemonSet gets another name. The earlier one is deleted while the new one's daemon is already running.
    let renamed = [&settings[..], &[("CULVERT_DAEMONSET", "tunnel")]].concat();
    c.apis[0].daemonset("tunnel", set());
    c.w.start_kube_beside(&own, &subject(), &c.apis[0], &renamed);
    eventually("the new one is ready", || {
        inside(&own.netns, || http(15021, "GET", "/healthz/ready", "localhost")).is_some_and(|(code, _)| code == 200)
    });
    c.apis[0].daemonset("ztunnel", None);
    c.w.log_line(1, "it hears of it", |line| {
        line["message"].as_str().is_some_and(|m| m.contains("DaemonSet is deleted"))
    });
    let mut daemon = c.w.take_node(1);
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let left = remains(&c, &cni);
    for what in ["rules", "ip rules", "host rules", "configuration", "plugin", "cni.sock", "turn-"] {
        assert!(left.iter().any(|there| there == what), "{what}: {left:?}");
    }
    assert_eq!(c.apis[0].said("client").as_deref(), Some("enabled"));
}

#[test]
fn a_daemon_whose_set_gets_another_name_waits_for_the_one_that_takes_its_place() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    // Much longer than an idle node needs to end.
    let settings = [&cni.settings()[..], &[("CONNECTION_TERMINATION_DEADLINE", "20s")]].concat();
    let own = c.w.add_pod("beside", 1);
    for begins in [true, false] {
        c.apis[0].daemonset("ztunnel", set());
        c.start_one(&settings);
        eventually("it is captured", || c.apis[0].said("client").as_deref() == Some("enabled") && has_rules(&c.client));
        let ends = |c: &Cluster, word: &str| {
            c.w.log(1).iter().filter(|line| line["message"].as_str().is_some_and(|m| m.contains(word))).count()
        };
        let before = [ends(&c, "DaemonSet is deleted"), ends(&c, "ending")];
        c.apis[0].daemonset("ztunnel", None);
        eventually("it hears of it", || ends(&c, "DaemonSet is deleted") > before[0]);
        let mut daemon = c.w.take_node(1);
        daemon.signal(Signal::SIGTERM);
        eventually("it ends", || ends(&c, "ending") > before[1]);
        let mut beside = None;
        if begins {
            // The earlier daemon is told to end before the new one runs, as when a DaemonSet is replaced.
            c.apis[0].daemonset("tunnel", set());
            let renamed = [&settings[..], &[("CULVERT_DAEMONSET", "tunnel")]].concat();
            beside = Some(c.w.start_kube_beside(&own, &subject(), &c.apis[0], &renamed));
        }
        daemon.wait();
        let left = remains(&c, &cni);
        let Some(beside) = beside else {
            assert_eq!(left, Vec::<String>::new(), "nobody has come");
            continue;
        };
        assert_eq!(ends(&c, "no daemon replaces this one"), 0, "pods were let go in plaintext");
        for what in ["rules", "ip rules", "configuration", "plugin", "cni.sock", "turn-"] {
            assert!(left.iter().any(|there| there == what), "{what}: {left:?}");
        }
        let ips = [c.client.v4.to_string()];
        eventually("the new one answers the plugin", || cni.call("CHECK", ("ns", "client"), &c.client.netns, &ips).0);
        c.w.take(beside).kill();
    }
}

#[test]
fn cleaning_up_sees_a_daemon_in_a_pod_and_takes_nobody_else_for_one() {
    let mut c = cluster();
    let own = c.w.add_pod("beside", 1);
    // Without the CNI plugin, no daemon listens on its socket.
    let beside = c.w.start_kube_beside(&own, &subject(), &c.apis[0], &[]);
    eventually("it is captured", || c.apis[0].said("client").as_deref() == Some("enabled") && has_rules(&c.client));
    let cleanup = |c: &Cluster, what: &str| c.w.kube_run(1, what, &c.apis[0], &[]);
    let (fine, said) = cleanup(&c, "cleanup");
    assert!(!fine && said.contains("a daemon is running") && has_rules(&c.client), "{said}");
    // If it is unknown whether a daemon runs, nothing is removed either.
    let agent = [("CULVERT_PODS", "agent")];
    let (fine, said) = c.w.kube_run(1, "cleanup", &c.apis[0], &agent);
    assert!(!fine && said.contains("it is unknown whether"), "{said}");
    c.w.take(beside).kill();
    // Another program has the admin port on the node.
    apps::serve(&c.w.ns("n1"), 15000, apps::who);
    let (fine, said) = cleanup(&c, "cleanup");
    assert!(fine && !has_rules(&c.client), "{said}");
}

#[test]
fn cleaning_up_a_node_touches_no_other_nodes_pods_unless_told_to() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let settings = cni.settings();
    c.start();
    c.w.take_node(1).kill();
    let cleanup = |c: &Cluster, what: &str| c.w.kube_run(1, what, &c.apis[0], &settings);
    c.apis[0].away(true);
    let (fine, said) = cleanup(&c, "cleanup");
    assert!(fine && said.contains("except for the pods' annotation"), "{said}");
    assert!(said.contains("namespaces hold rules of another node"), "{said}");
    assert!(!has_rules(&c.client) && has_rules(&c.server), "{said}");
    c.apis[0].away(false);
    // A table that does not name its node, as an old version has left it.
    output_in(&c.client.netns, "nft", &["add", "table", "inet", "culvert"]);
    let (fine, said) = cleanup(&c, "cleanup");
    assert!(fine && has_rules(&c.client), "{said}");
    assert_eq!(c.apis[0].said("client"), None);
    c.w.take_node(2).kill();
    let proc = proc_of(&c, &[&c.client.netns, &c.server.netns]);
    let settings = [&settings[..], &[("CULVERT_PROC", proc.as_str())]].concat();
    let (fine, said) = c.w.kube_run(1, "cleanup --all", &c.apis[0], &settings);
    assert!(fine, "{said}");
    assert!(!has_rules(&c.client) && !has_rules(&c.server), "{said}");
}

/// A procfs that shows only these namespaces, because everything else on the machine belongs to others.
fn proc_of(c: &Cluster, namespaces: &[&str]) -> String {
    let proc = c.w.dir.join("proc");
    for folder in ["1/root/run/netns", "1/ns"] {
        std::fs::create_dir_all(proc.join(folder)).unwrap();
    }
    let netns = |name: &str| std::path::Path::new("/run/netns").join(name);
    for name in namespaces {
        std::os::unix::fs::symlink(netns(name), proc.join("1/root/run/netns").join(name)).unwrap();
    }
    std::os::unix::fs::symlink(netns(&c.w.ns("n1")), proc.join("1/ns/net")).unwrap();
    proc.display().to_string()
}

#[test]
fn a_pod_that_carries_its_own_traffic_keeps_its_rules_whatever_its_node_does() {
    let mut c = cluster();
    let [own, odd, left] = ["own", "odd", "left"].map(|name| c.w.mesh_pod(name, 1));
    c.w.write_mesh();
    for pod in [&own, &odd, &left] {
        let mut kube = KubePod::new(pod);
        kube.labels = json!({"istio.io/dataplane-mode": "none"});
        c.apis[0].pod(&kube);
        c.kube.push(kube);
    }
    for pod in [&own, &odd] {
        let mut redirect = Command::new("ip");
        let written = redirect.args(["netns", "exec", &pod.netns]).arg(subject()).arg("redirect").output().unwrap();
        assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    }
    // The rules of one cannot be listed.
    let file = c.w.dir.join("odd.nft");
    std::fs::write(&file, b"table inet culvert {\n chain c {\n meta iifname \"z\xff\"\n }\n}\n").unwrap();
    output_in(&odd.netns, "nft", &["-f", file.to_str().unwrap()]);
    let rules = || output_in(&own.netns, "nft", &["list", "ruleset"]);
    let whole = rules();
    // What an earlier daemon has left in another pod goes.
    output_in(&left.netns, "nft", &["add", "table", "inet", "culvert"]);
    c.start_one(&[]);
    eventually("what a daemon has left is removed", || !has_rules(&left));
    assert_eq!(rules(), whole);
    assert!(has_rules(&odd));
    // Its namespace's label would enrol it, too.
    c.apis[0].change("own", |pod| pod["metadata"]["labels"] = json!({}));
    eventually("it is refused by name", || {
        let (state, why) = c.w.state(1, "own");
        state == "failed" && why.contains("carries its own traffic already")
    });
    assert_eq!(rules(), whole);
    c.apis[0].change("own", |pod| pod["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"}));
    eventually("it is let go", || c.state("own").is_empty());
    output_in(&left.netns, "nft", &["add", "table", "inet", "culvert"]);
    c.w.take_node(1).kill();
    let cni = Cni::new(&c.w);
    let proc = proc_of(&c, &[&own.netns, &odd.netns, &left.netns]);
    let settings = [&cni.settings()[..], &[("CULVERT_PROC", proc.as_str())]].concat();
    let (fine, said) = c.w.kube_run(1, "cleanup --all", &c.apis[0], &settings);
    assert!(fine && said.contains("2 namespaces belong to workloads that carry their own traffic"), "{said}");
    assert!(!has_rules(&left) && has_rules(&odd), "{said}");
    assert_eq!(rules(), whole);
}
