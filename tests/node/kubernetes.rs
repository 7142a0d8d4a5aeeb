//! Enrolment by label, without an agent: a Kubernetes API, real processes in cgroups of pods, and the shipped binary.

use crate::world::facts::principal;
use crate::world::kube::{Api, KubePod, STATUS, Sandbox, Streaming};
use crate::world::sniffer::Sniffer;
use crate::world::wire::AUTHORIZATION;
use crate::world::{ControlPlane, Pod, World, apps, ask, connect, eventually, inside, ip_in, output_in};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

/// Two nodes with pods that are enrolled by label: a client on the first and a server on the second, each with its own
/// API.
pub struct Cluster {
    pub w: World,
    pub apis: [Api; 2],
    pub client: Pod,
    pub server: Pod,
    pub kube: Vec<KubePod>,
}

pub fn cluster() -> Cluster {
    let mut w = World::new();
    let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
    apps::serve(&server.netns, 8080, apps::who);
    apps::serve(&server.netns, 9000, apps::echo);
    let apis = [Api::start(&w, 1), Api::start(&w, 2)];
    let kube = vec![KubePod::new(&client), KubePod::new(&server)];
    for (api, pod) in apis.iter().zip(&kube) {
        api.namespace("ns", json!({"istio.io/dataplane-mode": "ambient"}));
        api.pod(pod);
    }
    w.write_mesh();
    Cluster { w, apis, client, server, kube }
}

impl Cluster {
    pub fn start(&mut self) {
        for node in [1, 2] {
            self.w.start_kube_node(node, &self.apis[usize::from(node) - 1], &[]);
        }
        for node in [1, 2] {
            self.w.wait_captured(node);
        }
    }

    /// Starts only the first node, and waits until it is ready.
    pub fn start_one(&mut self, settings: &[(&str, &str)]) {
        self.w.start_kube_node(1, &self.apis[0], settings);
        eventually("the first node is ready", || self.w.is_ready(1));
    }

    pub fn state(&self, pod: &str) -> String {
        self.w.state(1, pod).0
    }
}

pub fn has_rules(pod: &Pod) -> bool {
    output_in(&pod.netns, "nft", &["list", "tables"]).contains("inet culvert")
}

#[test]
fn a_labelled_namespace_is_captured_and_released_without_a_restart() {
    let mut c = cluster();
    c.apis[0].namespace("ns", json!({}));
    c.start_one(&[]);
    assert_eq!(c.state("client"), "", "it is not labelled");
    assert!(!has_rules(&c.client));
    assert_eq!(c.apis[0].said("client"), None);
    for round in 0..3 {
        c.apis[0].namespace("ns", json!({"istio.io/dataplane-mode": "ambient"}));
        eventually("it is captured", || c.state("client") == "captured");
        eventually("and says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
        assert!(has_rules(&c.client));
        if round == 0 {
            let first = c.apis[0].state().patches.first().cloned().unwrap();
            assert_eq!(first, ("ns/client".to_owned(), json!("pending")), "enabled is said when it is so, not before");
        }
        // The other way to exclude a pod.
        let by_pod = if round == 1 { json!({"istio.io/dataplane-mode": "none"}) } else { json!({}) };
        match round {
            1 => c.apis[0].change("client", |pod| pod["metadata"]["labels"] = by_pod),
            _ => c.apis[0].namespace("ns", json!({})),
        }
        eventually("it is released", || c.state("client").is_empty());
        eventually("and says nothing", || c.apis[0].said("client").is_none());
        assert!(!has_rules(&c.client), "nothing of ours is left");
        assert_eq!(output_in(&c.client.netns, "ip", &["rule", "list"]).matches("32764:").count(), 0);
        c.apis[0].change("client", |pod| pod["metadata"]["labels"] = json!({"app": "client"}));
    }
    assert_eq!(c.w.metric(1, "culvert_kubernetes_patch_failures_total", &[]), 0.0);
    let requests = c.apis[0].state().requests.clone();
    assert!(requests.iter().any(|r| r.contains("/api/v1/pods") && r.contains("spec.nodeName=n1")), "{requests:?}");
}

#[test]
fn captured_by_label_traffic_goes_by_tunnel() {
    let mut c = cluster();
    c.start();
    let answer = ask(&c.client.netns, (c.server.v4, 8080), "hello").unwrap();
    assert_eq!(answer, format!("{} hello", c.client.v4));
    assert_eq!(ask(&c.client.netns, (c.server.v6, 8080), "hello").unwrap(), format!("{} hello", c.client.v6));
    assert!(c.w.metric(2, "istio_tcp_connections_opened_total", &["connection_security_policy=\"mutual_tls\""]) >= 2.0);
}

#[test]
fn nothing_is_decided_before_each_kind_of_facts_has_been_told() {
    let mut c = cluster();
    let plane = ControlPlane::start(&c.w.ns("n1"), &c.w.dir);
    apps::serve(&c.client.netns, 8080, apps::who);
    let (stranger, client) = (c.w.ns("n2"), c.client.clone());
    c.w.mesh.policy("nobody", "Namespace", "Allow", principal("nobody"));
    plane.set(&c.w.mesh);
    let settings = World::facts_from(&plane);
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let workloads = |w: &World| w.metric(1, "culvert_mesh_objects", &["workload"]);
    let passes = |to: &Pod| ask(&stranger, (to.v4, 8080), "x").is_ok_and(|answer| !answer.is_empty());
    let waits = |w: &World, pod: &str, missing: &str| {
        eventually("it waits, and says for what", || {
            let (state, why) = w.state(1, pod);
            assert_ne!(state, "captured", "{pod} by facts that are not complete");
            state == "pending" && why.contains(&format!("has not sent {missing} yet"))
        });
    };
    for source in ["kubernetes", "file"] {
        plane.change(|state| state.silent = Some(AUTHORIZATION));
        match source {
            "kubernetes" => c.w.start_kube_node(1, &c.apis[0], &settings),
            _ => {
                c.w.write_pods(1, &[&client]);
                c.w.start_node(1, &[&settings[..], &[("NODE_NAME", "n1"), ("CLUSTER_ID", "c1")]].concat());
            }
        }
        eventually("workloads are known", || workloads(&c.w) == 2.0);
        waits(&c.w, "client", "policies");
        if source == "kubernetes" {
            // Inbound tunnels wait just as plaintext does, so peers may know that the pod accepts tunnels.
            eventually("it says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
        }
        // If an earlier daemon or the enrolment has redirected the pod, its traffic waits and is refused.
        assert!(!passes(&client), "plaintext from a stranger, by {source}");
        plane.change(|state| state.silent = None);
        eventually("it is captured", || c.state("client") == "captured");
        assert!(!passes(&client));
        // On a stream without versions, known pods are still carried, and new pods wait again.
        plane.change(|state| (state.versions, state.silent) = (false, Some(AUTHORIZATION)));
        plane.cut();
        let late = c.w.mesh_pod(&format!("late-{source}"), 1);
        apps::serve(&late.netns, 8080, apps::who);
        plane.set(&c.w.mesh);
        let kube = KubePod::new(&late);
        match source {
            "kubernetes" => c.apis[0].pod(&kube),
            _ => c.w.write_pods(1, &[&client, &late]),
        }
        waits(&c.w, &late.name, "policies");
        assert!(source == "file" || !passes(&late));
        assert_eq!(c.state("client"), "captured");
        assert!(!passes(&client));
        plane.change(|state| state.silent = None);
        eventually("it is captured", || c.state(&late.name) == "captured");
        assert!(!passes(&late));
        c.w.take_node(1).kill();
        c.w.mesh.workloads.retain(|workload| workload["name"] != late.name.as_str());
        plane.set(&c.w.mesh);
    }
}

#[test]
fn who_is_in_is_what_labels_and_exclusions_say() {
    let mut c = cluster();
    let names = ["hosted", "sidecar", "none", "own", "elsewhere", "ended", "static"];
    let mut pods = Vec::new();
    for name in names {
        let pod = c.w.mesh_pod(name, 1);
        let mut kube = KubePod::without_sandbox(&pod);
        match name {
            "hosted" => kube.host_network = true,
            "sidecar" => kube.annotations["sidecar.istio.io/status"] = json!(""),
            "none" => kube.labels["istio.io/dataplane-mode"] = json!("none"),
            "ended" => kube.phase = "Succeeded",
            "own" => kube.labels["app"] = json!("ztunnel"),
            _ => {}
        }
        match name {
            // The API shows a mirror pod. Its processes have the uid of the file on the node.
            "static" => {
                for (name, value) in [
                    ("hash", "0123456789abcdef0123456789abcdef"),
                    ("mirror", "0123456789abcdef0123456789abcdef"),
                    ("source", "file"),
                ] {
                    kube.annotations[format!("kubernetes.io/config.{name}")] = json!(value);
                }
                pods.push((Some(Sandbox::start(&pod.netns, "/kubepods/pod0123456789abcdef0123456789abcdef/x")), kube));
            }
            _ => {
                kube.run(&pod.netns);
                pods.push((None, kube));
            }
        }
        c.apis[0].pod(&pods.last().unwrap().1);
    }
    c.w.write_mesh();
    // The operator's own list of selectors replaces Istio's labels.
    let selectors = "[{namespaceSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}, \
                       podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [elsewhere]}]}}]";
    c.start_one(&[("AMBIENT_ENABLEMENT_SELECTOR", selectors), ("POD_NAMESPACE", "ns")]);
    let expected = ["client", "none", "static"];
    eventually("those are in", || expected.iter().all(|name| c.state(name) == "captured"));
    let mut there: Vec<String> = c.w.states(1).into_iter().map(|(name, _, _)| name).collect();
    there.sort();
    assert_eq!(there, expected);
    for name in names.iter().filter(|name| !expected.contains(name)) {
        let pod = c.w.pods.iter().find(|pod| pod.name == **name).unwrap();
        assert!(!has_rules(pod), "{name}");
        assert_eq!(c.apis[0].said(name), None, "{name}");
    }
    // Excluded later, by the name of the namespace.
    let mut first = c.w.take_node(1);
    first.signal(nix::sys::signal::Signal::SIGTERM);
    first.wait();
    assert!(has_rules(&c.client), "the rules stay when the daemon ends");
    c.start_one(&[("EXCLUDE_NAMESPACES", "kube-system,ns")]);
    eventually("what an earlier daemon left is cleaned", || !has_rules(&c.client));
    eventually("and said", || c.apis[0].said("client").is_none());
    assert_eq!(c.w.states(1), []);
}

#[test]
fn a_namespace_is_the_pods_own_whoever_has_entered_it_and_whatever_the_cgroups_form() {
    let mut c = cluster();
    // A process of the client has entered another pod's namespace, and is older than the client's own process.
    let other = c.w.mesh_pod("other", 1);
    c.kube[0].stop();
    let intruder = Sandbox::start(&other.netns, &c.kube[0].cgroup());
    let mut kube = KubePod::without_sandbox(&other);
    c.apis[0].pod(&kube);
    // If there is only such a process, the pod is refused, with the reason.
    let foreign = c.w.mesh_pod("foreign", 1);
    let lost = KubePod::without_sandbox(&foreign);
    let _debugger = Sandbox::start(&other.netns, &lost.cgroup());
    c.apis[0].pod(&lost);
    c.w.write_mesh();
    c.start_one(&[]);
    let reason = |c: &Cluster, name: &str| c.w.state(1, name);
    eventually("the foreign namespace is refused", || reason(&c, "foreign").0 == "failed");
    let (_, why) = reason(&c, "foreign");
    assert!(why.contains("holds its address") && why.contains(&other.v4.to_string()), "{why}");
    assert_eq!(reason(&c, "client").0, "failed", "for the same reason");
    assert_eq!(reason(&c, "other").0, "pending", "it has no process of its own yet");
    assert!(!has_rules(&other), "nobody is carried under another's identity");
    // The path formats of systemd and cri-o.
    let id = "4f2a0c9b8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a";
    let slice = format!("kubepods-burstable-pod{}.slice", c.kube[0].uid.replace('-', "_"));
    let form = format!("/kubepods.slice/kubepods-burstable.slice/{slice}/cri-containerd-{id}.scope");
    let _systemd = Sandbox::start(&c.client.netns, &form);
    eventually("the client is captured in its own", || c.state("client") == "captured");
    // By the id of the container, if the path has no uid.
    let id = id.replace('4', "5");
    let _crio = Sandbox::start(&other.netns, &format!("/system.slice/crio-{id}.scope"));
    c.apis[0].change("other", |pod| {
        pod["status"]["containerStatuses"] = json!([{"name": "app", "containerID": format!("cri-o://{id}"),
            "image": "a", "imageID": "b", "ready": true, "restartCount": 0}]);
    });
    eventually("the other is captured", || c.state("other") == "captured");
    kube.stop();
    let pods = c.w.json(1, "/pods");
    let netns = |name: &str| pods.as_array().unwrap().iter().find(|p| p["name"] == name).unwrap()["netns"].clone();
    assert_ne!(netns("client"), netns("other"));
    drop(intruder);
}

/// Gives a namespace the addresses of a pod without announcing them to the neighbours.
fn hold_too(ns: &str, pod: &Pod) {
    inside(ns, || std::fs::write("/proc/sys/net/ipv4/conf/all/arp_ignore", "1").unwrap());
    ip_in(ns, &format!("addr add {}/32 dev lo\naddr add {}/128 dev lo\n", pod.v4, pod.v6));
}

#[test]
fn no_pod_takes_anothers_identity_by_cgroups_addresses_or_annotations() {
    let mut c = cluster();
    c.kube[0].stop();
    // A process older than the victim's own, in the attacker's cgroup, under the victim's name and with the victim's
    // address.
    let evil = c.w.mesh_pod("evil", 1);
    let mut attacker = KubePod::new(&evil);
    hold_too(&evil.netns, &c.client);
    let _posing = Sandbox::start(&evil.netns, &format!("{}/pod{}/x", attacker.cgroup(), c.kube[0].uid));
    // Claims to be the mirror pod of the victim.
    for (name, value) in [("hash", c.kube[0].uid.as_str()), ("mirror", c.kube[0].uid.as_str()), ("source", "file")] {
        attacker.annotations[format!("kubernetes.io/config.{name}")] = json!(value);
    }
    c.apis[0].pod(&attacker);
    c.w.write_mesh();
    c.start_one(&[]);
    eventually("the attacker is who it is", || c.state("evil") == "captured");
    let netns = |c: &Cluster, name: &str| {
        let pods = c.w.json(1, "/pods");
        pods.as_array().unwrap().iter().find(|pod| pod["name"] == name).unwrap()["netns"].as_str().unwrap().to_owned()
    };
    assert_eq!((c.state("client").as_str(), netns(&c, "client").as_str()), ("pending", ""));
    c.kube[0].run(&c.client.netns.clone());
    eventually("the victim is captured", || c.state("client") == "captured");
    let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    assert_eq!(inode(&netns(&c, "client")), inode(&format!("/run/netns/{}", c.client.netns)), "in its own namespace");
    // Two namespaces of the pod hold its address. Which one is right is unknown, so the pod is refused and its rules
    // stay.
    let copy = c.w.add_pod("copy", 1);
    hold_too(&copy.netns, &c.client);
    let second = Sandbox::start(&copy.netns, &c.kube[0].cgroup());
    c.w.take_node(1).kill();
    c.start_one(&[]);
    eventually("both are refused, by name", || {
        let (state, why) = c.w.state(1, "client");
        state == "failed" && why.contains("two namespaces hold its address") && why.contains(&c.client.v4.to_string())
    });
    assert!(has_rules(&c.client), "its traffic is refused meanwhile");
    drop(second);
    eventually("and captured when there is one", || c.state("client") == "captured");
    assert_eq!(inode(&netns(&c, "client")), inode(&format!("/run/netns/{}", c.client.netns)));
}

#[test]
fn what_the_plugin_hands_over_no_scan_replaces_and_it_goes_with_its_address() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    c.kube[0].stop();
    c.apis[0].change("client", |pod| pod["status"] = json!({"phase": "Pending"}));
    c.start_one(&cni.settings());
    eventually("it is known", || c.state("client") == "pending");
    let ips = [c.client.v4.to_string(), c.client.v6.to_string()];
    assert!(cni.call("ADD", ("ns", "client"), &c.client.netns, &ips).0);
    assert_eq!(c.state("client"), "captured");
    let since = |c: &Cluster| c.w.json(1, "/pods")[0]["since"].clone();
    let before = since(&c);
    // A namespace that the pod has made itself, with the pod's address.
    let copy = c.w.add_pod("copy", 1);
    hold_too(&copy.netns, &c.client);
    let _second = Sandbox::start(&copy.netns, &c.kube[0].cgroup());
    c.apis[0].pod(&c.kube[0]);
    c.w.log_line(1, "it is named", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("handed over stays captured"))
    });
    assert_eq!((c.state("client").as_str(), since(&c)), ("captured", before));
    assert!(has_rules(&c.client) && !has_rules(&copy));
    // Its sandbox ends without any announcement: the pod is released, and found where it is now.
    ip_in(&c.client.netns, &format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", c.client.v4, c.client.v6));
    eventually("it is found where it is now", || has_rules(&copy) && c.state("client") == "captured");
}

#[test]
fn a_pod_of_the_plugin_whose_address_goes_before_the_api_has_told_of_it_is_let_go() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    c.kube[0].stop();
    c.apis[0].change("client", |pod| pod["status"] = json!({"phase": "Pending"}));
    c.start_one(&cni.settings());
    eventually("it is known", || c.state("client") == "pending");
    assert!(cni.call("ADD", ("ns", "client"), &c.client.netns, &[c.client.v4.to_string()]).0);
    assert_eq!(c.state("client"), "captured");
    ip_in(&c.client.netns, &format!("addr del {}/24 dev eth0\n", c.client.v4));
    eventually("it is let go", || c.state("client") == "pending" && !has_rules(&c.client));
}

#[test]
fn what_a_pods_owner_writes_costs_little_and_is_complained_about_once() {
    let mut c = cluster();
    let annotate = |pod: &mut Value, bytes: usize| {
        let names: Vec<String> = (0..bytes / 8).map(|n| format!("if{n:05}")).collect();
        let odd: Vec<String> = (0..bytes / 8).map(|n| format!("!{n:06}")).collect();
        pod["metadata"]["annotations"]["istio.io/reroute-virtual-interfaces"] = json!([names, odd].concat().join(","));
        pod["metadata"]["annotations"]["ambient.istio.io/dns-capture"] = json!("y".repeat(bytes));
    };
    c.apis[0].change("client", |pod| annotate(pod, 60_000));
    c.start_one(&[]);
    eventually("it is captured", || c.state("client") == "captured");
    let rules = || output_in(&c.client.netns, "nft", &["list", "chain", "inet", "culvert", "pre_nat"]);
    let named = |rules: String| -> BTreeSet<String> {
        rules.split("iifname ").skip(1).filter_map(|rest| rest.split(' ').next().map(str::to_owned)).collect()
    };
    assert_eq!(named(rules()).len(), 64);
    // Each change makes the daemon read them again.
    for round in 0..50 {
        c.apis[0].change("client", |pod| pod["metadata"]["labels"]["round"] = json!(round.to_string()));
    }
    let mark = c.apis[0].mark(1);
    eventually("all has been heard", || !c.state(&mark).is_empty());
    let about =
        |line: &Value| line["message"].as_str().is_some_and(|text| text.contains("annotation has an invalid value"));
    let lines: Vec<Value> = c.w.log(1).into_iter().filter(about).collect();
    assert_eq!(lines.len(), 2, "one for each annotation: {lines:?}");
    assert!(lines.iter().all(|line| line.to_string().len() < 2000), "{lines:?}");
    assert!(
        lines.iter().any(|line| line["value"].as_str().is_some_and(|value| value.contains("at most 64 are taken")))
    );
}

#[test]
fn a_sandbox_that_is_made_anew_and_an_address_that_is_used_again() {
    let mut c = cluster();
    c.start_one(&[]);
    eventually("it is captured", || c.state("client") == "captured");
    // Its oldest process ends, as the only init container does. The pod stays captured where it is.
    let since = |c: &Cluster| c.w.json(1, "/pods")[0]["since"].clone();
    let before = since(&c);
    c.kube[0].stop();
    c.apis[0].change("client", |pod| pod["metadata"]["labels"]["x"] = json!("1"));
    eventually("it has been looked for", || {
        c.apis[0].change("client", |pod| pod["metadata"]["labels"]["x"] = json!("2"));
        c.w.json(1, "/pods")[0]["netns"].as_str().is_some()
    });
    assert!(has_rules(&c.client));
    c.kube[0].run(&c.client.netns.clone());
    assert_eq!((c.state("client").as_str(), since(&c)), ("captured", before));
    // The sandbox ends, and its addresses with it.
    c.kube[0].stop();
    ip_in(&c.client.netns, &format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", c.client.v4, c.client.v6));
    eventually("it waits for its sandbox", || c.state("client") == "pending");
    ip_in(
        &c.client.netns,
        &format!(
            "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nroute add default via 10.1.0.1\n",
            c.client.v4, c.client.v6
        ),
    );
    c.kube[0].run(&c.client.netns.clone());
    eventually("it is captured again", || c.state("client") == "captured");
    eventually("and still says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
    // The pod ends, and a pod with a new name gets its address while the old object still exists.
    c.kube[0].phase = "Succeeded";
    c.apis[0].pod(&c.kube[0]);
    c.kube[0].stop();
    eventually("an ended pod is let go", || c.state("client").is_empty());
    let next = Pod { name: "next".into(), ..c.client.clone() };
    c.w.pods.push(next.clone());
    c.w.mesh.workloads.retain(|workload| workload["name"] != "client");
    c.w.mesh.workload(&next, "HBONE");
    c.w.write_mesh();
    let kube = KubePod::new(&next);
    c.apis[0].pod(&kube);
    eventually("the next is captured", || c.state("next") == "captured");
    c.apis[0].delete("client");
    // The same name with another uid, as in a StatefulSet.
    let twin = KubePod::without_sandbox(&next);
    assert_ne!(twin.uid, kube.uid);
    c.apis[0].delete("next");
    eventually("the deleted one is let go", || c.state("next").is_empty());
    drop(kube);
    c.apis[0].pod(&twin);
    let _sandbox = Sandbox::start(&next.netns, &twin.cgroup());
    eventually("its successor is captured", || c.state("next") == "captured");
}

#[test]
fn an_api_that_forgets_refuses_to_stream_is_slow_or_away_changes_nothing_that_is_enrolled() {
    for streaming in [Streaming::Offered, Streaming::Refused, Streaming::NotKnown] {
        let mut c = cluster();
        c.apis[0].state().streaming = streaming;
        c.start_one(&[]);
        eventually("it is captured", || c.state("client") == "captured");
        let listed =
            c.apis[0].state().requests.iter().any(|r| r.starts_with("GET /api/v1/pods?") && !r.contains("watch="));
        assert_eq!(listed, streaming != Streaming::Offered, "lists are asked for where they are not streamed");
        if streaming == Streaming::NotKnown {
            continue;
        }
        eventually("bookmarks come", || c.apis[0].state().bookmarks > 2);
        // The history has expired, so everything is listed again. Pods that were deleted in the meantime are released.
        let second = c.w.mesh_pod("second", 1);
        let kube = KubePod::new(&second);
        c.w.write_mesh();
        c.apis[0].pod(&kube);
        eventually("the second is captured", || c.state("second") == "captured");
        c.apis[0].away(true);
        eventually("it is known to be away", || c.w.metric(1, "culvert_kubernetes_connected", &["pods"]) == 0.0);
        c.apis[0].delete("second");
        c.apis[0].forget();
        // The deletion is not received. Enrolled pods are kept and repaired.
        output_in(&second.netns, "nft", &["flush", "table", "inet", "culvert"]);
        eventually("the rules are back", || {
            output_in(&second.netns, "nft", &["list", "table", "inet", "culvert"]).contains("15001")
        });
        assert_eq!(c.state("second"), "captured");
        c.apis[0].state().slow = std::time::Duration::from_millis(700);
        c.apis[0].away(false);
        eventually("the second is let go", || c.state("second").is_empty());
        assert_eq!(c.state("client"), "captured");
        eventually("and it is there again", || c.w.metric(1, "culvert_kubernetes_connected", &["pods"]) == 1.0);
        assert!(!has_rules(&second));
        assert!(c.w.metric(1, "culvert_kubernetes_watch_failures_total", &["pods"]) >= 1.0);
    }
}

#[test]
fn a_daemon_that_starts_without_the_api_goes_on_with_what_was_captured_and_with_nothing_else() {
    let mut c = cluster();
    let file = c.w.dir.join("state");
    let settings = [("CULVERT_STATE_FILE", file.to_str().unwrap())];
    let file = c.w.dir.join("state.pods");
    apps::serve(&c.client.netns, 8080, apps::who);
    let others = ["moved", "bare", "out"].map(|name| c.w.mesh_pod(name, 1));
    let mut kube = others.each_ref().map(KubePod::new);
    kube.iter().for_each(|pod| c.apis[0].pod(pod));
    let [moved, bare, out] = &others;
    c.w.write_mesh();
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.start_one(&settings);
    let all = ["client", "moved", "bare", "out"];
    eventually("all are captured", || all.iter().all(|name| c.state(name) == "captured"));
    let uids = || kube.iter().map(|pod| pod.uid.clone()).chain([c.kube[0].uid.clone()]).collect::<Vec<_>>();
    let written = || std::fs::read_to_string(&file).unwrap_or_default();
    eventually("they are written down", || uids().iter().all(|uid| written().contains(uid)));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let kept = written();

    // While the daemon is down, one pod gets another sandbox, one loses its address, and one is no longer enrolled.
    c.apis[0].away(true);
    c.w.take_node(1).kill();
    let copy = c.w.add_pod("copy", 1);
    hold_too(&copy.netns, moved);
    kube[0].run(&copy.netns);
    ip_in(&bare.netns, &format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", bare.v4, bare.v6));
    c.apis[0].change("out", |pod| pod["metadata"]["labels"]["istio.io/dataplane-mode"] = json!("none"));
    c.w.start_kube_node(1, &c.apis[0], &settings);
    eventually("what is as it was goes on", || c.state("client") == "captured" && c.state("out") == "captured");
    let carried = |c: &Cluster| {
        ask(&c.client.netns, (c.server.v4, 8080), "x").is_ok_and(|answer| answer == format!("{} x", c.client.v4))
            && ask(&c.server.netns, (c.client.v4, 8080), "x").is_ok_and(|answer| answer == format!("{} x", c.server.v4))
    };
    assert!(carried(&c) && c.w.metric(1, "culvert_kubernetes_connected", &[]) == 0.0);
    assert!(c.w.metric(1, "istio_tcp_connections_opened_total", &["mutual_tls"]) >= 2.0);
    for name in ["moved", "bare"] {
        c.w.log_line(1, "it is named", |line| {
            line["name"] == name
                && line["message"].as_str().is_some_and(|text| text.contains("not captured again before"))
        });
        assert_eq!(c.state(name), "", "{name}");
    }
    assert!(!has_rules(&copy) && has_rules(moved) && has_rules(bare), "what was captured is refused");
    assert!(!c.w.is_ready(1), "of pods that are new nobody has told");
    assert_eq!(written(), kept, "what was true stays until there is news");
    // The API overrides the file.
    let since = |c: &Cluster| {
        let pods = c.w.json(1, "/pods");
        pods.as_array().unwrap().iter().find(|pod| pod["name"] == "client").unwrap()["since"].clone()
    };
    let before = since(&c);
    c.apis[0].away(false);
    eventually("it is ready", || c.w.is_ready(1));
    eventually("what is out is let go", || c.state("out").is_empty() && !has_rules(out));
    eventually("what has moved is captured where it is", || c.state("moved") == "captured" && has_rules(&copy));
    assert_eq!(since(&c), before, "the same capture goes on");
    assert!(carried(&c));
    eventually("and this is written down", || !written().contains(&kube[2].uid) && written() != kept);

    // A file that is damaged or belongs to another node is reported and ignored.
    for (bad, why) in [
        (String::new(), "it is not valid"),
        (kept[..kept.len() / 2].to_owned(), "it is not valid"),
        (kept.replace("\"format\":1", "\"format\":9"), "format 9"),
        (kept.replace("\"node\":\"n1\"", "\"node\":\"n2\""), "node"),
    ] {
        c.apis[0].away(true);
        c.w.take_node(1).kill();
        std::fs::write(&file, &bad).unwrap();
        c.w.start_kube_node(1, &c.apis[0], &settings);
        c.w.log_line(1, "it is named", |line| {
            line["message"].as_str().is_some_and(|text| text.contains("cannot use the file of enrolled pods"))
                && line["error"].as_str().is_some_and(|error| error.contains(why))
        });
        assert_eq!(c.w.states(1), []);
        assert!(has_rules(&c.client), "its traffic is refused");
        c.apis[0].away(false);
        eventually("the API tells of it", || c.state("client") == "captured");
        eventually("the file is whole again", || written().contains(&c.kube[0].uid));
    }
    c.w.take_node(1).kill();
    let (fine, said) = c.w.kube_run(1, "cleanup", &c.apis[0], &settings);
    assert!(fine && said.contains("state.pods") && !file.exists(), "{said}");
}

#[test]
fn while_the_api_is_away_the_log_says_so_once_and_in_words() {
    let mut c = cluster();
    c.start_one(&[]);
    eventually("it is captured", || c.state("client") == "captured");
    c.apis[0].away(true);
    for resource in ["pods", "namespaces"] {
        eventually("it is tried again and again", || {
            c.w.metric(1, "culvert_kubernetes_watch_failures_total", &[resource]) >= 5.0
        });
    }
    let lines = c.w.log(1);
    let of = |resource: &str| {
        let says = |l: &&Value| {
            l["resource"] == resource
                && l["message"].as_str().is_some_and(|m| m.contains("watch of the Kubernetes API is interrupted"))
        };
        lines.iter().filter(says).count()
    };
    assert_eq!((of("pods"), of("namespaces")), (1, 1), "{lines:?}");
    let raw: Vec<&Value> =
        lines.iter().filter(|l| l["scope"].as_str().is_some_and(|scope| scope.starts_with("kube"))).collect();
    assert!(raw.is_empty(), "what a library says: {raw:?}");
    c.apis[0].away(false);
    c.w.log_line(1, "it is back", |l| l["message"] == "connected to the Kubernetes API again" && l["away"].is_string());
}

#[test]
fn an_annotation_that_cannot_be_written_is_tried_again_and_stops_nobody() {
    let mut c = cluster();
    c.apis[0].state().refuse_patches = 500;
    c.start_one(&[]);
    eventually("it is captured all the same", || c.state("client") == "captured");
    eventually("it is counted", || c.w.metric(1, "culvert_kubernetes_patch_failures_total", &[]) >= 2.0);
    c.apis[0].state().refuse_patches = 0;
    eventually("at last it is said", || c.apis[0].said("client").as_deref() == Some("enabled"));
    // Another program changes the annotation, and the daemon restores it.
    c.apis[0].change("client", |pod| drop(pod["metadata"]["annotations"].as_object_mut().unwrap().remove(STATUS)));
    eventually("it is said again", || c.apis[0].said("client").as_deref() == Some("enabled"));
}

#[test]
fn what_somebody_changes_inside_is_noticed_and_repaired() {
    let mut c = cluster();
    c.start();
    let ns = c.client.netns.clone();
    let inbound = || output_in(&ns, "nft", &["-a", "list", "chain", "inet", "culvert", "pre_nat"]);
    let handle = inbound().lines().find(|l| l.contains("15006")).unwrap().rsplit(' ').next().unwrap().to_owned();
    let mut live = connect(&ns, (c.server.v4, 9000)).unwrap();
    let mut alive = || live.write_all(b"ping").is_ok() && live.read_exact(&mut [0; 4]).is_ok();
    assert!(alive());
    let rewrites = || c.w.metric(1, "culvert_redirection_rewrites_total", &[]);
    let repaired = |what: &str, broken: &dyn Fn() -> bool| {
        let before = rewrites();
        eventually(what, || rewrites() > before && !broken());
        eventually("it is captured", || c.w.state(1, "client").0 == "captured");
    };
    let table = || output_in(&ns, "nft", &["list", "table", "inet", "culvert"]);
    let rules = || output_in(&ns, "ip", &["rule", "list"]);
    let routes = || output_in(&ns, "ip", &["route", "list", "table", "100"]);
    output_in(&ns, "nft", &["delete", "rule", "inet", "culvert", "pre_nat", "handle", &handle]);
    repaired("one deleted rule is back", &|| !inbound().contains("15006"));
    output_in(&ns, "nft", &["flush", "table", "inet", "culvert"]);
    repaired("an emptied table is full again", &|| !table().contains("15001"));
    output_in(&ns, "nft", &["flush", "ruleset"]);
    repaired("a deleted table is back", &|| !table().contains("15001"));
    output_in(&ns, "ip", &["rule", "del", "pref", "32764"]);
    repaired("the rule is back", &|| !rules().contains("32764"));
    output_in(&ns, "ip", &["route", "flush", "table", "100"]);
    repaired("the route is back", &|| !routes().contains("local"));
    assert!(alive(), "what was open went on");
    // However many addresses the pod gives itself, only its own ones count.
    let many: String = (0..3000).map(|n| format!("addr add 10.77.{}.{}/32 dev lo\n", n / 250, n % 250 + 1)).collect();
    ip_in(&ns, &many);
    assert!(alive() && ask(&ns, (c.server.v4, 9000), "x").is_ok());
    inside(&ns, || std::fs::write("/proc/sys/net/ipv4/conf/lo/promote_secondaries", "1").unwrap());
    ip_in(&ns, "addr flush dev lo scope global\n");
    // Rules of other programs are not touched.
    let before = rewrites();
    output_in(&ns, "nft", &["add", "table", "ip", "mine"]);
    // A new address belongs to the pod at once: plaintext to it is captured.
    ip_in(&ns, "addr add 10.1.0.200/24 dev eth0\n");
    let host = c.w.ns("n1");
    apps::serve(&ns, 7000, apps::who);
    eventually("the new address is known", || ask(&host, (std::net::Ipv4Addr::new(10, 1, 0, 200), 7000), "x").is_ok());
    assert_eq!(rewrites(), before, "nothing of ours was touched");
}

/// A policy under which only tunnels are permitted.
fn strict(c: &mut Cluster) {
    c.w.mesh.policy("strict", "Namespace", "Allow", crate::world::facts::principal("client"));
    for pod in ["client", "server"] {
        c.w.mesh.of(pod)["authorizationPolicies"] = json!([]);
    }
    c.w.write_mesh();
}

#[test]
fn the_nodes_own_probes_come_through_a_strict_policy_and_nobody_elses() {
    let mut c = cluster();
    let outside = c.w.add_pod("outside", 1);
    strict(&mut c);
    apps::serve(&c.client.netns, 8080, apps::who);
    c.start();
    let (node, other) = (c.w.ns("n1"), c.w.ns("n2"));
    let probe = |ip| ask(&node, (ip, 8080), "probe");
    // Other CNIs translate addresses too, and check the source addresses of packets.
    let masquerade =
        "table inet cni { chain post { type nat hook postrouting priority 100; oifname pods masquerade; }; }";
    let file = c.w.dir.join("cni.nft");
    std::fs::write(&file, masquerade).unwrap();
    output_in(&node, "nft", &["-f", file.to_str().unwrap()]);
    inside(&node, || std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap());
    eventually("a probe of the node comes through", || probe(c.client.v4).is_ok_and(|a| a == "169.254.7.127 probe"));
    let v6 = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff probe";
    eventually("over IPv6 too", || probe(c.client.v6).is_ok_and(|a| a == v6));
    for ns in [&outside.netns, &other] {
        assert!(ask(ns, (c.client.v4, 8080), "x").is_err() || ask(ns, (c.client.v4, 8080), "x").unwrap().is_empty());
    }
    assert!(c.w.metric(1, "culvert_connection_failures_total", &["reason=\"not_allowed\""]) >= 1.0);
    // Another program empties the host's rules.
    output_in(&node, "nft", &["flush", "ruleset"]);
    eventually("they are back", || probe(c.client.v4).is_ok_and(|a| a.starts_with("169.254.7.127")));
    // A released pod is probed as before.
    c.apis[0].namespace("ns", json!({}));
    eventually("it is released", || c.state("client").is_empty());
    eventually("and no longer in the set", || probe(c.client.v4).is_ok_and(|a| a == "10.1.0.1 probe"));
    // After a restart, a pod whose address is not visible keeps its rules.
    c.apis[0].namespace("ns", json!({"istio.io/dataplane-mode": "ambient"}));
    eventually("captured again", || c.state("client") == "captured");
    let set = || output_in(&node, "nft", &["list", "table", "inet", "culvert-probes"]);
    eventually("in the set again", || set().contains(&c.client.v4.to_string()));
    c.w.take_node(1).kill();
    c.apis[0].change("client", |pod| pod["status"] = json!({"phase": "Running"}));
    c.start_one(&[]);
    eventually("it is known", || c.state("client") == "pending");
    c.apis[0].namespace("other", json!({}));
    eventually("the set has been seen to", || c.w.metric(1, "culvert_probe_rules_in_place", &[]) == 1.0);
    assert!(set().contains(&c.client.v4.to_string()), "{}", set());
}

/// Whether a namespace that has the address of kubelet probes gets an answer from a port of a pod.
fn poses_as_a_probe(ns: &str, source: &str, to: std::net::SocketAddr) -> bool {
    let source: std::net::SocketAddr = (source.parse::<std::net::IpAddr>().unwrap(), 0).into();
    inside(ns, move || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
        socket.bind(&source.into()).unwrap();
        socket.connect_timeout(&to.into(), std::time::Duration::from_secs(2)).is_ok_and(|()| {
            let mut stream = std::net::TcpStream::from(socket);
            stream.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
            stream.write_all(b"hi\n").is_ok() && stream.read(&mut [0; 64]).is_ok_and(|length| length > 0)
        })
    })
}

#[test]
fn nobody_but_the_node_itself_comes_from_the_address_of_its_probes() {
    let mut c = cluster();
    let outside = c.w.add_pod("outside", 1);
    strict(&mut c);
    apps::serve(&c.client.netns, 8080, apps::who);
    c.start();
    let (node, other) = (c.w.ns("n1"), c.w.ns("n2"));
    let pod = |c: &Cluster| c.w.json(1, "/pods")[0].clone();
    eventually("a probe of the node comes through", || {
        ask(&node, (c.client.v4, 8080), "probe").is_ok_and(|a| a == "169.254.7.127 probe")
    });
    let probes = || pod(&c)["probeConnections"].as_u64().unwrap_or(0);
    // On the pods' own bridge, by a pod that has made itself the victim's gateway, as ARP permits; and from another
    // node.
    let (v4, v6) = ("169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff");
    ip_in(&outside.netns, &format!("addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n"));
    let mac = output_in(&outside.netns, "cat", &["/sys/class/net/eth0/address"]);
    let gateway = |to: &str| format!("neigh replace {to} lladdr {} dev eth0\n", mac.trim());
    ip_in(&c.client.netns, &(gateway("10.1.0.1") + &gateway("fd00:1::1")));
    for (source, to) in [(v4, c.client.v4), (v6, c.client.v6)] {
        assert!(!poses_as_a_probe(&outside.netns, source, (to, 8080).into()), "from {source} on the bridge");
    }
    ip_in(&other, &format!("addr add {v4}/32 dev lo\n"));
    eventually("the node's own was counted", || probes() >= 1);
    let counted = probes();
    assert!(!poses_as_a_probe(&other, v4, (c.client.v4, 8080).into()), "from another node");
    eventually("both are counted", || c.w.metric(1, "culvert_probe_spoofs_dropped_total", &[]) >= 3.0);
    c.w.log_line(1, "and named", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("not from this host") && text.contains("dropped"))
    });
    assert_eq!(probes(), counted, "none of them reached the pod");
    // Behind two VLAN tags with id 0, which a bridge does not look behind but the pod's kernel does.
    let victim = output_in(&c.client.netns, "cat", &["/sys/class/net/eth0/address"]);
    let frame = format!(
        "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind((\"eth0\", 0)); \
         s.send(bytes.fromhex(\"{}\" + \"020000000001\" + \"81000000\" * 2 + \"0800\" + \"45000028000040004006 0000a9fe077f0a01000a\" + \"00\" * 20))",
        victim.trim().replace(':', "")
    );
    let dropped = || c.w.metric(1, "culvert_probe_spoofs_dropped_total", &[]);
    let before = dropped();
    output_in(&outside.netns, "python3", &["-c", &frame]);
    eventually("it is dropped", || dropped() > before);
    // The node's own probes still arrive, also after another program has emptied the host's rules.
    ip_in(&c.client.netns, "neigh del 10.1.0.1 dev eth0\nneigh del fd00:1::1 dev eth0\n");
    output_in(&node, "nft", &["flush", "ruleset"]);
    eventually("they are back", || {
        output_in(&node, "nft", &["list", "ruleset", "bridge"]).contains(v4)
            && ask(&node, (c.client.v4, 8080), "probe").is_ok_and(|a| a == "169.254.7.127 probe")
    });
}

#[test]
fn what_a_pod_fills_its_namespace_with_does_not_keep_our_rules_out() {
    let mut c = cluster();
    c.start();
    let ns = c.client.netns.clone();
    let load = |text: &str| {
        let file = c.w.dir.join("filling.nft");
        std::fs::write(&file, text).unwrap();
        output_in(&ns, "nft", &["-f", file.to_str().unwrap()]);
    };
    let addresses = |count: u32| {
        let all: Vec<String> = (0..count).map(|n| std::net::Ipv4Addr::from(0x1400_0000 + n).to_string()).collect();
        format!("set s {{ type ipv4_addr; elements = {{ {} }}\n }}\n", all.join(", "))
    };
    let table = || {
        Command::new("ip")
            .args(["netns", "exec", &ns, "nft", "-t", "list", "chain", "inet", "culvert", "out_nat"])
            .output()
    };
    let is_back = || table().is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("15001"));
    let captured = |c: &Cluster| c.state("client") == "captured" && ask(&ns, (c.server.v4, 8080), "x").is_ok();
    let unread = |c: &Cluster| c.w.json(1, "/pods")[0]["rulesUnread"].as_str().map(str::to_owned);
    assert_eq!(
        c.w.json(1, "/pods")[0]["otherRules"].as_array().map_or(0, Vec::len),
        0,
        "what is ours is not another's"
    );
    // A set with a million elements.
    load(&format!("table ip mine {{ {} }}\n", addresses(1_000_000)));
    output_in(&ns, "nft", &["delete", "table", "inet", "culvert"]);
    eventually("a deleted table is back", &is_back);
    eventually("it is captured", || captured(&c));
    assert_eq!(unread(&c), None, "sets need not be read");
    // In our own table.
    load(&format!("table inet culvert {{ {} }}\n", addresses(300_000)));
    output_in(&ns, "nft", &["flush", "chain", "inet", "culvert", "out_nat"]);
    eventually("a chain is full again", &is_back);
    eventually("and their set is gone", || {
        !output_in(&ns, "nft", &["-t", "list", "table", "inet", "culvert"]).contains("set s ")
    });
    // A rule on which the program that lists rules fails.
    let odd = c.w.dir.join("odd.nft");
    std::fs::write(&odd, b"table inet odd {\n chain c {\n meta iifname \"z\xff\"\n }\n}\n").unwrap();
    output_in(&ns, "nft", &["-f", odd.to_str().unwrap()]);
    output_in(&ns, "nft", &["delete", "table", "inet", "culvert"]);
    eventually("a deleted table is back", &is_back);
    output_in(&ns, "nft", &["delete", "table", "inet", "odd"]);
    // A table that looks like another agent's, which is reported by name. Our rules are written all the same.
    output_in(&ns, "nft", &["add", "table", "inet", "istio-ambient-x"]);
    output_in(&ns, "nft", &["delete", "table", "inet", "culvert"]);
    eventually("it is refused", || c.w.state(1, "client").1.contains("came back"));
    eventually("a deleted table is back", &is_back);
    output_in(&ns, "nft", &["delete", "table", "inet", "istio-ambient-x"]);
    eventually("it is captured", || captured(&c));
    // More rules than the daemon reads.
    output_in(&ns, "nft", &["delete", "table", "ip", "mine"]);
    let chains: String = (0..12_000).map(|n| format!("chain c{}{n} {{\n}}\n", "x".repeat(100))).collect();
    load(&format!("table ip mine {{\n{chains}}}\n"));
    output_in(&ns, "nft", &["delete", "table", "inet", "culvert"]);
    eventually("a deleted table is back", &is_back);
    eventually("it is captured", || captured(&c));
    eventually("what is not known is said", || unread(&c).is_some_and(|why| why.contains("longer than 2 MiB")));
    c.w.log_line(1, "and logged", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("cannot be read; ours are written"))
    });
    output_in(&ns, "nft", &["delete", "table", "ip", "mine"]);
    // Chains that precede ours are named.
    load("table ip theirs { chain early { type filter hook prerouting priority -300; tcp dport 8081 notrack; }\n }\n");
    eventually("they are named", || {
        let pod = c.w.json(1, "/pods")[0].clone();
        pod["rulesUnread"].is_null()
            && pod["otherRules"].to_string().contains("notrack in chain early of table ip theirs")
    });
}

#[test]
fn a_firewall_that_refuses_the_nodes_probes_keeps_no_pod_from_being_captured() {
    let mut c = cluster();
    let file = c.w.dir.join("firewall.nft");
    let rules = "type filter hook output priority 0; tcp dport 15091 reject with icmpx port-unreachable;";
    std::fs::write(&file, format!("table inet firewall {{ chain c {{ {rules} }}\n }}\n")).unwrap();
    output_in(&c.w.ns("n1"), "nft", &["-f", file.to_str().unwrap()]);
    c.start();
    let pod = c.w.json(1, "/pods")[0].clone();
    assert_eq!(pod["state"], "captured");
    assert!(pod["inboundUnverified"].as_str().is_some_and(|why| why.contains("did not arrive")), "{pod}");
}

#[test]
fn captured_means_that_what_comes_to_a_pod_comes_to_us_too() {
    let mut c = cluster();
    strict(&mut c);
    apps::serve(&c.client.netns, 8080, apps::who);
    c.start();
    let (ns, stranger) = (c.client.netns.clone(), c.w.ns("n2"));
    let file = c.w.dir.join("theirs.nft");
    let load = |rules: &str| {
        std::fs::write(&file, format!("table inet theirs {{ chain c {{ {rules} }}\n }}\n")).unwrap();
        output_in(&ns, "nft", &["-f", file.to_str().unwrap()]);
    };
    let client = c.client.v4;
    let passes = || ask(&stranger, (client, 8080), "x").is_ok_and(|answer| !answer.is_empty());
    let pod = |c: &Cluster| c.w.json(1, "/pods")[0].clone();
    assert!(!passes());
    assert!(pod(&c)["inboundUnverified"].is_null());
    assert!(pod(&c)["otherRules"].as_array().is_none_or(Vec::is_empty), "{}", pod(&c));
    for (what, rules, port, opens) in [
        (
            "what is not tracked is not translated",
            "type filter hook prerouting priority -400; tcp dport != 15008 notrack;",
            "15091",
            false,
        ),
        (
            "another translation",
            "type nat hook prerouting priority -150; tcp dport != 15008 redirect to :8080;",
            "15091",
            true,
        ),
        (
            "tunnels go elsewhere",
            "type nat hook prerouting priority -150; tcp dport 15008 redirect to :9;",
            "15008",
            false,
        ),
    ] {
        load(rules);
        eventually(what, || {
            let (state, why) = c.w.state(1, "client");
            state == "failed" && why.contains("was answered, and not by culvert") && why.contains(&format!(":{port}"))
        });
        assert_eq!(passes(), opens, "{what}");
        assert!(pod(&c)["otherRules"].to_string().contains("of table inet theirs at hook prerouting"), "{}", pod(&c));
        output_in(&ns, "nft", &["delete", "table", "inet", "theirs"]);
        eventually("captured when that has gone", || c.state("client") == "captured");
    }
    // There is no answer, which may be due to the network. It is reported, but the pod counts as captured.
    load("type filter hook input priority 0; tcp dport { 15006, 15008 } tcp flags & (syn | ack) == syn drop;");
    c.w.take_node(1).kill();
    c.w.start_kube_node(1, &c.apis[0], &[]);
    eventually("it is said", || {
        c.state("client") == "captured"
            && pod(&c)["inboundUnverified"].as_str().is_some_and(|why| why.contains("did not arrive"))
    });
    output_in(&ns, "nft", &["delete", "table", "inet", "theirs"]);
    let named =
        c.w.log(1).iter().any(|line| line["scope"] == "access" && line["dst.addr"].to_string().contains("1509"));
    assert!(!named, "our own probes are no connections of anybody");
}

#[test]
fn a_pod_that_istio_cni_had_captured_is_taken_over_or_refused_by_name() {
    let mut c = cluster();
    let (ns, server) = (c.client.netns.clone(), c.server.v4);
    let tables = || output_in(&ns, "nft", &["list", "ruleset"]);
    let dir = c.w.dir.clone();
    let load = |text: &str| {
        let file = dir.join("istio.nft");
        std::fs::write(&file, text).unwrap();
        output_in(&ns, "nft", &["-f", file.to_str().unwrap()]);
    };
    // The rules that istio-cni leaves, with nftables and with iptables on nftables, beside a table of another program.
    let left = "table inet istio-ambient-nat { chain out { type nat hook output priority -100; tcp dport 1-65535 redirect to :19001; }; }\n\
         table inet istio-ambient-mangle { }\n\
         table ip nat { chain ISTIO_OUTPUT { tcp dport 1-65535 redirect to :19002; }\n chain ISTIO_PRERT { jump ISTIO_OUTPUT; }\n\
         chain OUTPUT { type nat hook output priority -100; tcp dport 7 accept; jump ISTIO_OUTPUT; }; }\n\
         table ip mine { chain c { type filter hook output priority 0; }; }\n";
    load(left);
    c.start();
    assert!(!tables().to_lowercase().contains("istio") && tables().contains("table ip mine"), "{}", tables());
    assert!(tables().contains("tcp dport 7 accept"), "a rule of somebody else stays: {}", tables());
    assert!(ask(&ns, (server, 8080), "x").is_ok());
    c.w.log_line(1, "it says what it took over", |line| {
        line["removed"]
            .as_str()
            .is_some_and(|names| names.contains("istio-ambient-nat") && names.contains("ISTIO_OUTPUT"))
    });
    // If rules come back, they are not removed again but reported.
    load(
        "table inet istio-ambient-nat { chain out { type nat hook output priority -101; tcp dport 1-65535 redirect to :19001; }; }",
    );
    eventually("it is refused by name", || {
        let (state, why) = c.w.state(1, "client");
        state == "failed" && why.contains("istio-ambient-nat") && why.contains("another agent")
    });
    output_in(&ns, "nft", &["delete", "table", "inet", "istio-ambient-nat"]);
    eventually("and captured once it has gone", || c.state("client") == "captured");
    assert!(ask(&ns, (server, 8080), "x").is_ok());
}

#[test]
fn beside_legacy_iptables_of_istio_state_and_annotation_say_what_the_traffic_does() {
    let mut c = cluster();
    let (ns, server) = (c.client.netns.clone(), c.server.v4);
    let legacy = |args: &str| {
        let args: Vec<&str> = args.split_whitespace().collect();
        output_in(&ns, "iptables-legacy", &[&["-w"], &args[..]].concat());
    };
    // The rules of a pod that istio-cni has captured lead to the ports on which the daemon listens.
    c.apis[0].change("client", |pod| pod["metadata"]["annotations"][STATUS] = json!("enabled"));
    legacy("-t nat -N ISTIO_OUTPUT");
    legacy("-t nat -A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT");
    legacy("-t nat -A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001");
    legacy("-t nat -A OUTPUT -j ISTIO_OUTPUT");
    c.start();
    assert!(ask(&ns, (server, 8080), "x").is_ok());
    eventually("it goes by tunnel", || c.w.metric(2, "istio_tcp_connections_closed_total", &["mutual_tls"]) >= 1.0);
    let says = |c: &Cluster| (c.state("client"), c.apis[0].said("client").unwrap_or_default());
    assert_eq!(says(&c), ("captured".into(), "enabled".into()));
    let named = |c: &Cluster, word: &str| c.w.json(1, "/pods")[0]["otherRules"].to_string().contains(word);
    assert!(named(&c, "istio-cni's rules in the legacy iptables table ip nat"));
    // Without them, our rules capture the traffic.
    legacy("-t nat -D OUTPUT -j ISTIO_OUTPUT");
    legacy("-t nat -F ISTIO_OUTPUT");
    assert!(ask(&ns, (server, 8080), "x").is_ok());
    eventually("by tunnel", || c.w.metric(2, "istio_tcp_connections_closed_total", &["mutual_tls"]) >= 2.0);
    assert_eq!(says(&c), ("captured".into(), "enabled".into()));
    // They lead elsewhere, but as they existed before ours, they are evaluated after ours.
    legacy("-t nat -A ISTIO_OUTPUT -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 19001");
    legacy("-t nat -A OUTPUT -j ISTIO_OUTPUT");
    assert!(ask(&ns, (server, 8080), "x").is_ok());
    eventually("by tunnel", || c.w.metric(2, "istio_tcp_connections_closed_total", &["mutual_tls"]) >= 3.0);
    assert_eq!(says(&c), ("captured".into(), "enabled".into()));
}

#[test]
fn legacy_rules_that_come_before_ours_are_overtaken_and_named() {
    let mut c = cluster();
    let (ns, server) = (c.client.netns.clone(), c.server.v4);
    c.start();
    assert!(ask(&ns, (server, 8080), "x").is_ok());
    let mut open = connect(&ns, (server, 9000)).unwrap();
    assert!(crate::world::alive(&mut open));
    // The tables are created with their first rule, and are evaluated before ours.
    for args in [
        "-t nat -N ISTIO_OUTPUT",
        "-t nat -A ISTIO_OUTPUT -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 19001",
        "-t nat -A OUTPUT -j ISTIO_OUTPUT",
    ] {
        output_in(&ns, "iptables-legacy", &args.split_whitespace().collect::<Vec<_>>());
    }
    let before = c.w.metric(2, "istio_tcp_connections_closed_total", &["mutual_tls"]);
    eventually("what it sends comes to us", || ask(&ns, (server, 8080), "x").is_ok());
    eventually("and goes by tunnel", || c.w.metric(2, "istio_tcp_connections_closed_total", &["mutual_tls"]) > before);
    let named = || {
        c.w.json(1, "/pods")[0]["otherRules"]
            .to_string()
            .contains("istio-cni's rules in the legacy iptables table ip nat")
    };
    eventually("a reader is told of them", named);
    eventually("state and annotation say so", || {
        c.state("client") == "captured" && c.apis[0].said("client").as_deref() == Some("enabled")
    });
    let failed = c.w.log(1).iter().any(|l| l["message"].as_str().is_some_and(|m| m.contains("pod not captured")));
    assert!(!failed, "it was never said to be refused");
    assert!(crate::world::alive(&mut open), "what was open goes on");
}

/// The folders and the configuration of a node's CNI.
#[derive(Clone)]
pub struct Cni {
    pub bin: std::path::PathBuf,
    pub conf: std::path::PathBuf,
    pub socket: std::path::PathBuf,
}

impl Cni {
    pub fn new(w: &World) -> Self {
        let folder = |name: &str| {
            let path = w.dir.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let cni = Self { bin: folder("cni-bin"), conf: folder("cni-conf"), socket: w.dir.join("cni.sock") };
        let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]});
        std::fs::write(cni.conf.join("10-net.conflist"), list.to_string()).unwrap();
        cni
    }

    pub fn settings(&self) -> [(&str, &str); 3] {
        [
            ("CULVERT_CNI_BIN_DIR", self.bin.to_str().unwrap()),
            ("CULVERT_CNI_CONF_DIR", self.conf.to_str().unwrap()),
            ("CULVERT_CNI_SOCKET", self.socket.to_str().unwrap()),
        ]
    }

    pub fn ours(&self) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.conf.join("00-culvert.conflist")).ok()?).ok()
    }

    /// Runs the plugin as a container runtime does. Returns whether it succeeded, and its output.
    pub fn call(&self, command: &str, (namespace, pod): (&str, &str), netns: &str, ips: &[String]) -> (bool, Value) {
        let mut plugin = json!({"cniVersion": "1.0.0", "name": "net", "type": "culvert-cni", "socket": self.socket,
            "excludeNamespaces": ["kube-system"], "ownNamespace": "istio-system", "ownName": "ztunnel", "node": "n1"});
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"address": format!("{ip}/24")})).collect();
        plugin["prevResult"] = json!({"cniVersion": "1.0.0", "ips": ips, "dns": {"nameservers": ["10.96.0.10"]}});
        let installed = self.bin.join("culvert-cni");
        let mut run = if installed.exists() { Command::new(installed) } else { Command::new(crate::world::subject()) };
        if !self.bin.join("culvert-cni").exists() {
            run.arg("cni");
        }
        run.env("CNI_COMMAND", command).env("CNI_CONTAINERID", "abc").env("CNI_IFNAME", "eth0");
        run.env("CNI_NETNS", format!("/run/netns/{netns}")).env("CNI_PATH", &self.bin);
        run.env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod}"));
        run.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = run.spawn().unwrap();
        child.stdin.take().unwrap().write_all(plugin.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.success(), serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

#[test]
fn with_the_cni_plugin_no_pod_starts_before_it_is_captured() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let (ns, ips) = (c.client.netns.clone(), vec![c.client.v4.to_string(), c.client.v6.to_string()]);
    let netns = ns.as_str();
    let client = ("ns", "client");
    // A pod whose sandbox has just been made: it has no address in the API and no process.
    c.kube[0].stop();
    c.apis[0].change("client", |pod| pod["status"] = json!({"phase": "Pending"}));
    let (ok, error) = cni.call("ADD", client, netns, &ips);
    assert!(!ok, "it fails closed while the daemon is away");
    assert_eq!(error["code"], 11);
    for words in ["of node n1 does not answer at", "has not been seen since", "EXCLUDE_NAMESPACES of DaemonSet ztunnel"]
    {
        assert!(error["msg"].as_str().unwrap().contains(words), "{words}: {error}");
    }
    for free in [("kube-system", "dns-1"), ("istio-system", "ztunnel-x1")] {
        assert!(cni.call("ADD", free, netns, &ips).0, "{free:?} waits for nobody");
    }
    assert!(cni.call("DEL", client, netns, &ips).0, "a pod that goes waits for nobody");
    assert_eq!(cni.call("VERSION", client, netns, &ips).1["supportedVersions"][3], "1.0.0");
    assert!(
        cni.call("STATUS", client, netns, &ips).0,
        "or the daemon's own pod could not start on a node that has none"
    );

    c.start_one(&cni.settings());
    eventually("it is installed", || cni.bin.join("culvert-cni").exists() && cni.ours().is_some());
    let ours = cni.ours().unwrap();
    assert_eq!(
        (&ours["name"], &ours["plugins"][0]["type"], &ours["plugins"][1]["type"]),
        (&json!("net"), &json!("bridge"), &json!("culvert-cni"))
    );
    assert_eq!(c.w.metric(1, "culvert_cni_plugin_in_place", &[]), 1.0);
    assert_eq!(c.state("client"), "pending", "its namespace is not known");
    let (ok, result) = cni.call("ADD", client, netns, &ips);
    assert!(ok, "{result}");
    assert_eq!(result["dns"]["nameservers"][0], "10.96.0.10", "what earlier plugins said is passed on");
    assert!(has_rules(&c.client), "the answer comes when it is captured, not before");
    assert_eq!(c.state("client"), "captured");
    assert!(cni.call("CHECK", client, netns, &ips).0 && cni.call("STATUS", client, netns, &ips).0);
    // The kubelet publishes the address and the sandbox runs: nothing changes.
    c.kube[0].run(&ns);
    c.apis[0].pod(&c.kube[0]);
    let since = c.w.json(1, "/pods")[0]["since"].clone();
    eventually("it is found by its processes", || c.apis[0].said("client").as_deref() == Some("enabled"));
    assert_eq!(c.w.json(1, "/pods")[0]["since"], since, "it has been captured all the time");
    // The runtime cleans up after an earlier sandbox, whose namespace is gone. The present sandbox is another one.
    assert!(cni.call("DEL", client, "", &[]).0);
    assert_eq!((c.state("client").as_str(), has_rules(&c.client)), ("captured", true));
    // A later sandbox has another address. The API shows it only when the sandbox is ready, which waits for the daemon.
    let again = c.w.add_pod("again", 1);
    let (ok, result) = cni.call("ADD", client, &again.netns, &[again.v4.to_string()]);
    assert!(ok, "{result}");
    assert!(has_rules(&again), "the answer is about this namespace, not the one before");
    assert!(cni.call("DEL", client, &again.netns, &[]).0);
    eventually("the first one is found again by its processes", || {
        c.state("client") == "captured" && !has_rules(&again)
    });
    // A pod that the mesh does not know yet is held all the same: what it sends waits and is refused, never passed on.
    let unknown = c.w.add_pod("unknown", 1);
    let kube = KubePod::without_sandbox(&unknown);
    c.apis[0].pod(&kube);
    c.apis[0].change("unknown", |pod| pod["status"] = json!({"phase": "Pending"}));
    let (ok, result) = cni.call("ADD", ("ns", "unknown"), &unknown.netns, &[unknown.v4.to_string()]);
    assert!(ok, "{result}");
    assert!(has_rules(&unknown));
    assert_eq!(c.state("unknown"), "pending");
    // A pod that is not enrolled starts at once. A pod that the API does not know does not start.
    let plain = c.w.add_pod("plain", 1);
    let mut out = KubePod::without_sandbox(&plain);
    out.labels = json!({"istio.io/dataplane-mode": "none"});
    c.apis[0].pod(&out);
    let pod = ("ns", "plain");
    eventually("it starts", || cni.call("ADD", pod, &plain.netns, &[plain.v4.to_string()]).0);
    assert!(!has_rules(&plain));
    let (ok, error) = cni.call("ADD", ("ns", "nobody"), &plain.netns, &[]);
    assert!(!ok && error["msg"].as_str().unwrap().contains("has not sent pod ns/nobody"), "{error}");
    c.w.take_node(1).kill();
    let (_, error) = cni.call("ADD", client, netns, &ips);
    for words in ["it was last seen at 20", " ago. New pods of the node wait", "spec.nodeName=n1"] {
        assert!(error["msg"].as_str().unwrap().contains(words), "{words}: {error}");
    }
}

/// Whether a namespace has an open connection with `port` at one of its ends.
fn has_open(ns: &str, port: u16) -> bool {
    let end = format!(":{port}");
    output_in(ns, "ss", &["-Htn", "state", "synchronized"]).split_whitespace().any(|word| word.ends_with(&end))
}

/// The first node's facts come from a control plane that does not know the client yet, as istiod does not until the
/// kubelet has published its address.
fn control_plane_without_the_client(c: &mut Cluster) -> (ControlPlane, Vec<(String, String)>) {
    let plane = ControlPlane::start(&c.w.ns("n1"), &c.w.dir);
    let all = c.w.mesh.workloads.clone();
    c.w.mesh.workloads.retain(|workload| workload["name"] != "client");
    plane.set(&c.w.mesh);
    c.w.mesh.workloads = all;
    let settings = World::facts_from(&plane);
    (plane, settings)
}

/// The client is scheduled but not started, with the plugin installed and no facts about the client.
fn client_about_to_start() -> (Cluster, Cni, ControlPlane) {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let (plane, facts) = control_plane_without_the_client(&mut c);
    let facts = facts.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let settings: Vec<(&str, &str)> = cni.settings().into_iter().chain(facts).collect();
    apps::serve(&c.client.netns, 8080, apps::who);
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.w.wait_captured(2);
    c.kube[0].stop();
    c.apis[0].change("client", |pod| pod["status"] = json!({"phase": "Pending"}));
    c.start_one(&settings);
    eventually("it is known", || c.state("client") == "pending");
    (c, cni, plane)
}

#[test]
fn with_the_plugin_a_pods_peers_know_of_its_capture_before_it_starts_and_what_comes_early_waits() {
    let (mut c, cni, plane) = client_about_to_start();
    let (client, server) = (c.client.clone(), c.server.clone());
    let ips = [client.v4.to_string(), client.v6.to_string()];
    let add = || cni.call("ADD", ("ns", "client"), &client.netns, &ips);
    // The API refuses the annotation: the runtime receives the reason, and tries again.
    c.apis[0].state().refuse_patches = 500;
    let (ok, error) = add();
    let why = error["msg"].as_str().unwrap_or_default();
    assert!(!ok && why.contains("redirection is not written") && why.contains("patches are refused"), "{error}");
    c.apis[0].state().refuse_patches = 0;
    let (ok, result) = add();
    assert!(ok, "{result}");
    assert_eq!(c.apis[0].said("client").as_deref(), Some("enabled"), "said before the sandbox is ready");
    let patches = c.apis[0].state().patches.clone();
    let its: Vec<&Value> = patches.iter().filter(|(pod, _)| pod == "ns/client").map(|(_, value)| value).collect();
    assert_eq!(its, [&json!("enabled")], "nothing has gone before that it would have waited for");
    let (state, why) = c.w.state(1, "client");
    assert!(state == "pending" && why.contains("no workload ns/client"), "{why}");
    eventually("its certificate is there", || c.w.metric(1, "culvert_certificates_fetched_total", &[]) == 1.0);
    // A peer that received the facts before the pod's own node, and the pod's own first connection: both wait for the
    // facts.
    std::thread::scope(|scope| {
        let inbound = scope.spawn(|| ask(&server.netns, (client.v4, 8080), "in"));
        let outbound = scope.spawn(|| ask(&client.netns, (server.v4, 8080), "out"));
        eventually("the tunnel is there", || has_open(&client.netns, 15008));
        eventually("and the connection from inside", || has_open(&client.netns, 8080));
        plane.set(&c.w.mesh);
        assert_eq!(inbound.join().unwrap().unwrap(), format!("{} in", server.v4));
        assert_eq!(outbound.join().unwrap().unwrap(), format!("{} out", client.v4));
    });
    eventually("it is who it should be", || c.state("client") == "captured");
    let opened = |node: u8| c.w.metric(node, "istio_tcp_connections_opened_total", &["mutual_tls"]);
    assert_eq!((opened(1), opened(2)), (2.0, 2.0), "nothing in plaintext");
    // The pod is Ready after that, so it does not count as late.
    c.kube[0].run(&client.netns);
    c.apis[0].pod(&c.kube[0]);
    ready(&c.apis[0], "client");
    let mark = c.apis[0].mark(1);
    eventually("all has been heard", || !c.state(&mark).is_empty());
    assert_eq!(c.w.metric(1, "culvert_pods_ready_before_enabled_total", &[]), 0.0);
}

/// The kubelet reports a pod as Ready.
fn ready(api: &Api, name: &str) {
    api.change(name, |pod| pod["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]));
}

#[test]
fn a_pod_that_the_mesh_gives_another_service_account_than_the_api_carries_nothing() {
    let (mut c, cni, plane) = client_about_to_start();
    let (client, server) = (c.client.clone(), c.server.clone());
    let (ok, result) = cni.call("ADD", ("ns", "client"), &client.netns, &[client.v4.to_string()]);
    assert!(ok, "{result}");
    assert_eq!(c.apis[0].said("client").as_deref(), Some("enabled"));
    c.w.mesh.of("client")["serviceAccount"] = json!("other");
    plane.set(&c.w.mesh);
    eventually("they do not agree", || c.w.state(1, "client").1.contains("service account"));
    let passes = |ns: &str, to: &Pod| ask(ns, (to.v4, 8080), "x").is_ok_and(|answer| !answer.is_empty());
    let stranger = c.w.ns("n2");
    assert!(!passes(&client.netns, &server) && !passes(&server.netns, &client) && !passes(&stranger, &client));
    for node in [1, 2] {
        assert_eq!(c.w.metric(node, "istio_tcp_connections_opened_total", &["other"]), 0.0);
    }
    c.w.mesh.of("client")["serviceAccount"] = json!("client");
    plane.set(&c.w.mesh);
    eventually("they agree", || c.state("client") == "captured");
    eventually("and it says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
    assert!(passes(&client.netns, &server) && passes(&server.netns, &client));
}

#[test]
fn without_the_plugin_too_enabled_waits_for_no_facts_and_a_pod_that_is_ready_before_it_is_named_once() {
    let mut c = cluster();
    let (plane, facts) = control_plane_without_the_client(&mut c);
    let settings: Vec<(&str, &str)> = facts.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    // The control plane learns of it only when its peers may know that it accepts tunnels.
    c.start_one(&settings);
    eventually("it is said", || c.apis[0].said("client").as_deref() == Some("enabled"));
    assert!(has_rules(&c.client) && c.state("client") == "pending");
    plane.set(&c.w.mesh);
    eventually("it is captured", || c.state("client") == "captured");
    ready(&c.apis[0], "client");
    c.apis[0].state().refuse_patches = 500;
    let names = ["late", "later"];
    let pods: Vec<(Pod, KubePod)> = names
        .map(|name| {
            let pod = c.w.mesh_pod(name, 1);
            let kube = KubePod::new(&pod);
            c.apis[0].pod(&kube);
            (pod, kube)
        })
        .into();
    let late = || c.w.metric(1, "culvert_pods_ready_before_enabled_total", &[]);
    plane.set(&c.w.mesh);
    eventually("they are captured", || names.iter().all(|name| c.state(name) == "captured"));
    assert_eq!(late(), 0.0, "they are not Ready");
    names.iter().for_each(|name| ready(&c.apis[0], name));
    eventually("both are counted", || late() == 2.0);
    // Whatever happens to the pods later.
    for round in 0..3 {
        c.apis[0].change("late", |pod| pod["metadata"]["labels"]["round"] = json!(round.to_string()));
    }
    c.apis[0].state().refuse_patches = 0;
    eventually("they are enabled", || names.iter().all(|name| c.apis[0].said(name).as_deref() == Some("enabled")));
    let about = |line: &Value| line["message"].as_str().is_some_and(|text| text.contains("was Ready before"));
    let named: BTreeSet<String> = c.w.log(1).iter().filter(|l| about(l)).map(|line| line["name"].to_string()).collect();
    assert_eq!((named.len(), c.w.log(1).iter().filter(|line| about(line)).count(), late()), (2, 2, 2.0));
    drop(pods);
}

#[test]
fn the_cni_plugin_stays_for_the_next_daemon_and_goes_with_the_last() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let deadline = [("CONNECTION_TERMINATION_DEADLINE", "1s")];
    let settings: Vec<(&str, &str)> = cni.settings().into_iter().chain(deadline).collect();
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.w.wait_captured(2);
    c.start_one(&settings);
    eventually("it is installed", || cni.ours().is_some());
    // If another program removes it, it is installed again.
    std::fs::remove_file(cni.conf.join("00-culvert.conflist")).unwrap();
    eventually("it is back", || cni.ours().is_some());
    // It stays during an upgrade. It is removed with the DaemonSet, and by a DaemonSet that continues without the
    // plugin.
    let set = |variable: &str| {
        json!({
            "metadata": {"name": "ztunnel", "namespace": "istio-system"},
            "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "c", "env": [{"name": variable, "value": "/x"}]}]}}},
        })
    };
    let mut going = set("CULVERT_CNI_CONF_DIR");
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    for (set, stays) in [
        (Some(set("CULVERT_CNI_CONF_DIR")), true),
        (Some(set("CULVERT_PODS")), false),
        (Some(going), false),
        (None, false),
    ] {
        eventually("it is installed", || cni.ours().is_some());
        c.apis[0].daemonset("ztunnel", set);
        // An open connection delays the end. The plugin is not installed again in the meantime.
        eventually("the client is captured", || c.state("client") == "captured");
        let mut open = connect(&c.client.netns, (c.server.v4, 9000)).unwrap();
        open.write_all(b"ping").and_then(|()| open.read_exact(&mut [0; 4])).unwrap();
        let mut daemon = c.w.take_node(1);
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        daemon.wait();
        assert_eq!((cni.ours().is_some(), cni.bin.join("culvert-cni").exists()), (stays, stays));
        assert!(cni.conf.join("10-net.conflist").exists());
        c.start_one(&settings);
    }
}

#[test]
fn connections_from_before_the_capture_are_counted_or_ended_and_new_ones_captured() {
    for end in [false, true] {
        let mut c = cluster();
        let mut open: Vec<_> = (0..5).map(|_| connect(&c.client.netns, (c.server.v4, 9000)).unwrap()).collect();
        let mut alive = |i: usize| open[i].write_all(b"ping").is_ok() && open[i].read_exact(&mut [0; 4]).is_ok();
        assert!((0..5).all(&mut alive));
        c.w.start_kube_node(1, &c.apis[0], &[("CULVERT_END_EARLIER_CONNECTIONS", if end { "true" } else { "false" })]);
        c.w.wait_captured(1);
        let counted = |c: &Cluster| c.w.json(1, "/pods")[0]["uncapturedConnections"].as_u64().unwrap();
        assert_eq!((0..5).filter(|i| alive(*i)).count(), if end { 0 } else { 5 });
        assert_eq!(counted(&c), if end { 0 } else { 5 });
        assert_eq!(c.w.metric(1, "culvert_uncaptured_connections", &[]), if end { 0.0 } else { 5.0 });
        if end {
            continue;
        }
        // The next daemon knows them by the earlier daemon's rules.
        c.w.take_node(1).kill();
        c.w.start_kube_node(1, &c.apis[0], &[]);
        c.w.wait_captured(1);
        assert_eq!(((0..5).filter(|i| alive(*i)).count(), counted(&c)), (5, 5));
        drop(open);
        // Any change inside the namespace makes the daemon check.
        eventually("none is left", || {
            output_in(&c.client.netns, "nft", &["add", "table", "ip", "mine"]);
            output_in(&c.client.netns, "nft", &["flush", "table", "inet", "culvert"]);
            counted(&c) == 0
        });
        // Connections that the daemon carries are not pre-existing, also not for the next daemon.
        c.w.start_kube_node(2, &c.apis[1], &[]);
        c.w.wait_captured(2);
        let _carried = connect(&c.client.netns, (c.server.v4, 9000)).unwrap();
        c.w.take_node(1).kill();
        c.start_one(&[]);
        eventually("captured", || c.state("client") == "captured");
        assert_eq!(counted(&c), 0);
    }
}

#[test]
fn settings_of_a_pod_take_effect_while_it_lives_and_end_no_connection() {
    let mut c = cluster();
    apps::serve(&c.client.netns, 8080, apps::who);
    strict(&mut c);
    c.start();
    let (ns, node2) = (c.client.netns.clone(), c.w.ns("n2"));
    let mut live = connect(&ns, (c.server.v4, 9000)).unwrap();
    let mut alive = || live.write_all(b"ping").is_ok() && live.read_exact(&mut [0; 4]).is_ok();
    assert!(alive());
    let annotate = |name: &str, value: Option<&str>| {
        c.apis[0].change("client", |pod| {
            let annotations = pod["metadata"]["annotations"].as_object_mut().unwrap();
            match value {
                Some(value) => drop(annotations.insert(name.to_owned(), json!(value))),
                None => drop(annotations.remove(name)),
            }
        });
    };
    let plaintext = || ask(&node2, (c.client.v4, 8080), "x").unwrap_or_default();
    assert_eq!(plaintext(), "", "refused by policy");
    annotate("ambient.istio.io/bypass-inbound-capture", Some("true"));
    eventually("plaintext comes in", || plaintext() == "172.30.0.2 x");
    assert!(ask(&ns, (c.server.v4, 8080), "x").is_ok(), "outbound goes by tunnel as before");
    annotate("ambient.istio.io/bypass-inbound-capture", Some("nonsense"));
    eventually("what is not understood counts as absent", || plaintext().is_empty());
    c.w.log_line(1, "and is named", |line| {
        line["annotation"] == "ambient.istio.io/bypass-inbound-capture" && line["value"] == "nonsense"
    });
    let table = || output_in(&ns, "nft", &["list", "table", "inet", "culvert"]);
    assert!(table().contains("15053"));
    annotate("ambient.istio.io/dns-capture", Some("f"));
    eventually("its DNS is left alone", || !table().contains("15053"));
    annotate("ambient.istio.io/dns-capture", None);
    eventually("and taken", || table().contains("15053"));
    // A virtual machine behind an interface of the pod: what it sends is the pod's own outbound traffic.
    let vm = c.w.ns("vm");
    crate::world::ip(&format!("netns add {vm}\nlink add tap0 netns {ns} type veth peer name eth0 netns {vm}\n"));
    ip_in(&ns, "link set tap0 up\naddr add 192.168.77.1/24 dev tap0\n");
    ip_in(
        &vm,
        "link set lo up\nlink set eth0 up\naddr add 192.168.77.2/24 dev eth0\nroute add default via 192.168.77.1\n",
    );
    annotate("istio.io/reroute-virtual-interfaces", Some("tap0"));
    eventually("what comes through it goes by tunnel", || {
        ask(&vm, (c.server.v4, 8080), "vm").is_ok_and(|answer| answer == format!("{} vm", c.client.v4))
    });
    assert!(alive(), "what was open went on all the time");
}

#[test]
fn sixty_pods_at_once_of_which_some_cannot_be_captured() {
    let mut c = cluster();
    let (mut kube, mut taken) = (Vec::new(), None);
    for number in 0..60 {
        let pod = c.w.mesh_pod(&format!("p{number}"), 1);
        match number {
            3 => taken = Some(inside(&pod.netns, || std::net::TcpListener::bind("0.0.0.0:15001")).unwrap()),
            4 => inside(&pod.netns, || std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap()),
            5 => ip_in(&pod.netns, &format!("addr del {}/24 dev eth0\n", pod.v4)),
            _ => {}
        }
        let mut pod_of_kube = KubePod::new(&pod);
        match number {
            // Without IPv6 in the pod's kernel, or without IPv4 at all.
            4 => {
                pod_of_kube.ips.retain(|ip| !ip.contains(':'));
                c.w.mesh.of("p4")["workloadIps"] = json!([pod.v4]);
            }
            5 => {
                pod_of_kube.ips.retain(|ip| ip.contains(':'));
                c.w.mesh.of("p5")["workloadIps"] = json!([pod.v6]);
            }
            _ => {}
        }
        kube.push(pod_of_kube);
    }
    c.w.write_mesh();
    for pod in &kube {
        c.apis[0].pod(pod);
    }
    c.apis[0].delete("p6");
    c.start_one(&[]);
    let expected = 60 - 2 + 1;
    eventually("all that can be are captured", || {
        c.w.states(1).iter().filter(|(_, state, _)| state == "captured").count() == expected
    });
    let (state, why) = c.w.state(1, "p3");
    assert!(state == "failed" && why.contains("15001"), "{why}");
    assert!(c.w.is_ready(1));
    assert_eq!(c.state("p6"), "");
    eventually("all say so", || {
        (0..60).filter(|i| c.apis[0].said(&format!("p{i}")).as_deref() == Some("enabled")).count() == 58
    });
    assert_eq!(c.apis[0].said("p3").as_deref(), Some("pending"));
    drop(taken);
    eventually("the last is captured once it can be", || c.state("p3") == "captured");
    // Without IPv4 or IPv6, the other family is carried.
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.w.wait_captured(2);
    let from = |name: &str| c.w.pods.iter().find(|pod| pod.name == name).unwrap().netns.clone();
    assert!(ask(&from("p4"), (c.server.v4, 8080), "x").is_ok());
    assert!(ask(&from("p5"), (c.server.v6, 8080), "x").is_ok());
    assert!(c.w.metric(2, "istio_tcp_connections_opened_total", &["mutual_tls"]) >= 2.0);
}

/// Checks that a line of doctor's output has this verdict and all of these words.
fn doctor_says(said: &str, verdict: &str, words: &[&str]) {
    let found = said.lines().find(|line| line.starts_with(verdict) && words.iter().all(|word| line.contains(word)));
    assert!(found.is_some(), "{verdict} {words:?} in\n{said}");
}

#[test]
fn doctor_says_what_is_well_and_what_to_do_where_it_is_not_and_cleanup_leaves_no_trace() {
    let mut c = cluster();
    let second = c.w.mesh_pod("second", 1);
    let kube = KubePod::new(&second);
    c.apis[0].pod(&kube);
    c.w.write_mesh();
    let cni = Cni::new(&c.w);
    let settings = cni.settings();
    c.start_one(&settings);
    eventually("both are captured", || c.state("client") == "captured" && c.state("second") == "captured");
    eventually("the host's rules are there", || c.w.metric(1, "culvert_probe_rules_in_place", &[]) == 1.0);
    let doctor = |c: &Cluster| c.w.kube_run(1, "doctor", &c.apis[0], &settings);
    let line = doctor_says;
    let (fine, said) = doctor(&c);
    assert!(fine, "{said}");
    for words in [
        &["rights", "all"][..],
        &["kernel", "IPv4 and IPv6"],
        &["kubernetes", "v1.33.1"],
        &["host rules"],
        &["cni plugin", "first configuration is ours"],
        &["daemon", "ready"],
        &["open files"],
        &["settings", "of the daemon"],
        &["pod", "ns/client is captured"],
        &["port 15008", "ns/client accepts tunnels from ns/second"],
        &["probe path", "ns/second", "arrive"],
        &["probe spoof", "ns/second", "ns/client cannot pose"],
    ] {
        line(&said, "ok", words);
    }
    // Doctor's checks are not counted as attacks.
    let counters = output_in(&c.w.ns("n1"), "nft", &["list", "counters"]);
    assert!(
        counters.contains("spoofed")
            && !counters.lines().any(|line| line.contains("packets ") && !line.contains("packets 0 ")),
        "{counters}"
    );
    // Whether a time service synchronizes this machine's clock is not part of the test.
    assert!(said.lines().any(|line| !line.starts_with("FAIL") && line.contains("  clock ")), "{said}");
    assert!(said.lines().all(|line| ["ok  ", "note", "FAIL"].iter().any(|verdict| line.starts_with(verdict))));

    // A rule like that of a NetworkPolicy: only port 8080 of the client is reachable.
    let policy = format!(
        "table inet guard {{ chain in {{ type filter hook input priority 0; policy accept; ip daddr {} tcp dport != 8080 tcp flags & (syn | ack) == syn drop; }}; }}",
        c.client.v4
    );
    let file = c.w.dir.join("policy.nft");
    std::fs::write(&file, policy).unwrap();
    output_in(&c.client.netns, "nft", &["-f", file.to_str().unwrap()]);
    std::fs::write(cni.conf.join("00-a.conflist"), "{}").unwrap();
    let lost = c.w.mesh_pod("lost", 1);
    let without = KubePod::without_sandbox(&lost);
    c.apis[0].pod(&without);
    eventually("a pod is pending", || c.state("lost") == "pending");
    c.apis[0].away(true);
    let (fine, said) = doctor(&c);
    assert!(!fine);
    line(&said, "FAIL", &["port 15008", "ns/client does not answer ns/", "NetworkPolicy", "allow TCP 15008"]);
    line(&said, "FAIL", &["probe path", "ns/client"]);
    line(&said, "ok", &["port 15008", "ns/second accepts"]);
    line(&said, "FAIL", &["kubernetes"]);
    line(&said, "FAIL", &["cni plugin", "00-a.conflist comes before ours"]);
    line(&said, "FAIL", &["pod", "ns/lost is pending", "no process"]);
    c.apis[0].away(false);

    let cleanup = |c: &Cluster| c.w.kube_run(1, "cleanup", &c.apis[0], &settings);
    let (fine, said) = cleanup(&c);
    assert!(!fine && said.contains("a daemon is running"), "{said}");
    c.w.take_node(1).kill();
    let (fine, said) = doctor(&c);
    assert!(!fine);
    line(&said, "FAIL", &["daemon", "does not answer on port 15000"]);
    assert!(has_rules(&c.client), "a daemon that was killed leaves its rules");
    let (fine, said) = cleanup(&c);
    assert!(fine, "{said}");
    for pod in [&c.client, &second] {
        assert!(!has_rules(pod));
        assert_eq!(output_in(&pod.netns, "ip", &["rule", "list"]).matches("32764:").count(), 0);
    }
    assert!(!output_in(&c.w.ns("n1"), "nft", &["list", "tables"]).contains("culvert"));
    assert!(cni.ours().is_none() && !cni.bin.join("culvert-cni").exists() && !cni.socket.exists());
    assert!(said.contains("is left") && said.contains("; pods continue without the mesh"), "{said}");
    assert_eq!(c.apis[0].said("client"), None);
    assert!(ask(&second.netns, (c.server.v4, 8080), "x").is_ok(), "pods go on without the mesh");
}

#[test]
fn after_a_reboot_plaintext_ends_with_the_window_and_with_the_plugin_there_is_none() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    let (ns, server, canary) = (c.client.netns.clone(), c.server.v4, "canary-77d1e0b3aa");
    let reboot = |c: &mut Cluster| {
        c.w.take_node(1).kill();
        c.kube[0].stop();
        for command in [
            &["nft", "flush", "ruleset"][..],
            &["ip", "rule", "del", "pref", "32764"],
            &["ip", "route", "flush", "table", "100"],
        ] {
            output_in(&ns, command[0], &command[1..]);
        }
    };
    c.start();
    // Without the plugin, what the pod sends before the daemon runs goes out as plaintext, and the pod is listed.
    reboot(&mut c);
    let control = Sniffer::start(&mut c.w, "control", canary);
    c.kube[0].run(&ns);
    assert!(ask(&ns, (server, 8080), canary).is_ok());
    assert!(control.found(&mut c.w) > 0, "the watcher does see a canary");
    c.w.start_kube_node(1, &c.apis[0], &[]);
    eventually("it is listed, captured or not", || !c.state("client").is_empty());
    c.w.wait_captured(1);
    let after = Sniffer::start(&mut c.w, "after", canary);
    for _ in 0..50 {
        ask(&ns, (server, 8080), canary).unwrap();
    }
    assert_eq!(after.found(&mut c.w), 0, "none after the window");
    // With the plugin, the kubelet cannot make the sandbox before the daemon runs.
    c.w.take_node(1).kill();
    c.start_one(&cni.settings());
    eventually("the plugin is there", || cni.ours().is_some());
    reboot(&mut c);
    let whole = Sniffer::start(&mut c.w, "whole", canary);
    let ips = vec![c.client.v4.to_string(), c.client.v6.to_string()];
    let add = |c: &Cluster| {
        let (ok, _) = cni.call("ADD", ("ns", "client"), &ns, &ips);
        ok && {
            let _ = c;
            true
        }
    };
    assert!(!add(&c), "no daemon, no pod");
    c.w.start_kube_node(1, &c.apis[0], &cni.settings());
    eventually("the kubelet's next attempt succeeds", || add(&c));
    c.kube[0].run(&ns);
    let mut carried = 0;
    for _ in 0..50 {
        carried += u32::from(ask(&ns, (server, 8080), canary).is_ok());
    }
    assert_eq!((whole.found(&mut c.w), carried), (0, 50));
}

#[test]
fn a_namespace_that_is_labelled_again_and_again_resets_nothing() {
    let mut c = cluster();
    c.apis[0].namespace("ns", json!({}));
    c.start_one(&[("CONNECTION_TERMINATION_DEADLINE", "60s")]);
    let mut open: Vec<_> = (0..100).map(|_| connect(&c.client.netns, (c.server.v4, 9000)).unwrap()).collect();
    let mut alive = |when: &str| {
        for stream in &mut open {
            stream
                .write_all(b"ping")
                .and_then(|()| stream.read_exact(&mut [0; 4]))
                .unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    };
    alive("at first");
    for round in 0..20 {
        c.apis[0].namespace("ns", json!({"istio.io/dataplane-mode": "ambient"}));
        eventually("it is captured", || c.state("client") == "captured");
        alive(&format!("captured, round {round}"));
        c.apis[0].namespace("ns", json!({}));
        eventually("it is released", || c.state("client").is_empty());
        alive(&format!("released, round {round}"));
    }
}

#[test]
fn what_a_pod_opens_until_it_is_captured_again_counts_as_older_than_its_rules() {
    let mut c = cluster();
    let (ns, v4, server) = (c.client.netns.clone(), c.client.v4, c.server.clone());
    apps::serve(&ns, 9000, apps::echo);
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.w.wait_captured(2);
    c.start_one(&[("CONNECTION_TERMINATION_DEADLINE", "60s")]);
    eventually("it is captured", || c.state("client") == "captured");
    let label = |on: bool| {
        c.apis[0].namespace("ns", if on { json!({"istio.io/dataplane-mode": "ambient"}) } else { json!({}) });
    };
    let mut held = connect(&server.netns, (v4, 9000)).unwrap();
    label(false);
    eventually("it is being released", || c.state("client") == "releasing");
    // For a while the next capture cannot listen, and the existing rules capture nothing.
    let mut taken = None;
    eventually("the port is free", || {
        taken = inside(&ns, || std::net::TcpListener::bind("0.0.0.0:15001")).ok();
        taken.is_some()
    });
    label(true);
    eventually("it cannot be listened for", || c.w.state(1, "client").1.contains("15001"));
    let mut between = connect(&ns, (server.v4, 9000)).unwrap();
    drop(taken);
    eventually("it is captured again", || c.state("client") == "captured");
    for stream in [&mut held, &mut between] {
        stream.write_all(b"ping").unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
    }
    assert_eq!(c.w.metric(1, "culvert_uncaptured_connections", &[]), 1.0, "the one in between, and no other");
}

#[test]
fn a_pod_that_is_labelled_again_while_it_is_released_is_captured_at_once_and_cuts_nothing_that_still_has_time() {
    let mut c = cluster();
    let (ns, host) = (c.client.netns.clone(), c.w.ns("n2"));
    apps::serve(&ns, 9000, apps::echo);
    c.w.start_kube_node(2, &c.apis[1], &[]);
    c.w.wait_captured(2);
    c.start_one(&[("CONNECTION_TERMINATION_DEADLINE", "20s")]);
    eventually("it is captured", || c.state("client") == "captured");
    let label = |on: bool| {
        c.apis[0].namespace("ns", if on { json!({"istio.io/dataplane-mode": "ambient"}) } else { json!({}) });
    };
    let tunnels = || c.w.metric(1, "istio_tcp_connections_opened_total", &["mutual_tls"]);
    let alive =
        |stream: &mut std::net::TcpStream| stream.write_all(b"ping").is_ok() && stream.read_exact(&mut [0; 4]).is_ok();
    // Every way in and out, over both families.
    let (server, client) = (c.server.clone(), c.client.clone());
    let open = || {
        vec![
            ("outbound by tunnel", connect(&ns, (server.v4, 9000)).unwrap()),
            ("outbound by tunnel, IPv6", connect(&ns, (server.v6, 9000)).unwrap()),
            ("inbound by tunnel", connect(&server.netns, (client.v4, 9000)).unwrap()),
            ("inbound in plaintext", connect(&host, (client.v4, 9000)).unwrap()),
            ("inbound in plaintext, IPv6", connect(&host, (client.v6, 9000)).unwrap()),
        ]
    };
    let mut first = open();
    let all_alive = |when: &str, streams: &mut Vec<(&str, std::net::TcpStream)>| {
        for (what, stream) in streams.iter_mut() {
            assert!(alive(stream), "{what} {when}");
        }
    };
    all_alive("at first", &mut first);
    assert_eq!(tunnels(), 3.0);
    let mut later = Vec::new();
    for (number, round) in (0..).zip(["once", "again"]) {
        label(false);
        eventually("it is being released", || c.state("client") == "releasing");
        eventually("nothing new is captured", || {
            !output_in(&ns, "nft", &["list", "table", "inet", "culvert"]).contains("15001")
        });
        // What it opens in the meantime goes as on a plain network.
        let between = connect(&ns, (server.v4, 9000)).unwrap();
        later.push(("opened in between", between));
        all_alive("while it is released", &mut first);
        all_alive("while it is released", &mut later);
        label(true);
        eventually("it is captured at once", || c.state("client") == "captured");
        assert_eq!(c.w.metric(1, "culvert_uncaptured_connections", &[]), f64::from(number + 1), "they are counted");
        all_alive(&format!("captured {round}"), &mut first);
        all_alive(&format!("captured {round}"), &mut later);
        let before = tunnels();
        later.extend(open());
        all_alive("of the new capture", &mut later);
        assert_eq!(tunnels(), before + 3.0, "what is new is captured");
        assert_eq!(c.apis[0].said("client").as_deref(), Some("enabled"));
    }
    // They end at the deadline of their own release; later connections are not affected.
    eventually("the first ones end with their time", || first.iter_mut().all(|(_, stream)| !alive(stream)));
    assert!(has_rules(&client), "the rules are the later capture's");
    let mut last = open();
    all_alive("after that", &mut last);
    // Released for good: the rules stay as long as the last connection needs them.
    drop((first, later));
    label(false);
    eventually("it is being released", || c.state("client") == "releasing");
    all_alive("in the end", &mut last);
    drop(last);
    eventually("it is released", || c.state("client").is_empty());
    assert!(!has_rules(&client), "nothing of ours is left");
}

#[test]
fn a_pod_that_loses_its_label_takes_tunnels_until_its_peers_can_know_of_it() {
    let mut c = cluster();
    apps::serve(&c.client.netns, 8080, apps::who);
    c.start();
    let (source, to) = (c.server.netns.clone(), c.client.v4);
    let tunnels = |c: &Cluster| c.w.metric(1, "istio_tcp_connections_opened_total", &["mutual_tls"]);
    for by in ["the pod", "its namespace"] {
        eventually("peers know that it takes tunnels", || c.apis[0].said("client").as_deref() == Some("enabled"));
        let before = tunnels(&c);
        match by {
            "the pod" => {
                c.apis[0].change("client", |pod| pod["metadata"]["labels"]["istio.io/dataplane-mode"] = json!("none"))
            }
            _ => c.apis[0].namespace("ns", json!({})),
        }
        eventually("it says nothing any more", || c.apis[0].said("client").is_none());
        // The facts of the other node still say HBONE: the control plane tells it a moment later.
        let (unsaid, mut asked) = (Instant::now(), 0);
        while asked < 30 && unsaid.elapsed() < Duration::from_millis(500) {
            let answer = ask(&source, (to, 8080), "x");
            assert_eq!(answer.ok(), Some(format!("{} x", c.server.v4)), "request {asked} without the label of {by}");
            asked += 1;
        }
        assert_eq!(tunnels(&c), before + f64::from(asked), "all by tunnel");
        eventually("it is released", || c.state("client").is_empty());
        assert!(!has_rules(&c.client), "nothing of ours is left");
        assert_eq!(output_in(&c.client.netns, "ip", &["rule", "list"]).matches("32764:").count(), 0);
        c.apis[0].change("client", |pod| pod["metadata"]["labels"] = json!({"app": "client"}));
    }
}

#[test]
fn a_pod_that_loses_its_label_and_ends_is_let_go_at_once() {
    let mut c = cluster();
    let cni = Cni::new(&c.w);
    c.start_one(&cni.settings());
    // While its annotation cannot be removed, a pod without its label stays captured for five seconds.
    let failures = |c: &Cluster| c.w.metric(1, "culvert_kubernetes_patch_failures_total", &[]);
    for end in ["deleted", "ended", "its sandbox ends", "it has another sandbox", "the daemon ends"] {
        c.apis[0].state().refuse_patches = 0;
        c.apis[0].pod(&c.kube[0]);
        c.apis[0].namespace("ns", json!({"istio.io/dataplane-mode": "ambient"}));
        eventually("it is captured", || c.state("client") == "captured");
        eventually("and says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
        c.apis[0].state().refuse_patches = 500;
        let (failed, lost) = (failures(&c), Instant::now());
        c.apis[0].namespace("ns", json!({}));
        eventually("its annotation cannot be removed", || failures(&c) > failed);
        assert_eq!(c.state("client"), "captured", "{end}");
        let (netns, ips) = (c.client.netns.clone(), [c.client.v4.to_string()]);
        match end {
            "deleted" => c.apis[0].delete("client"),
            "ended" => c.apis[0].change("client", |pod| pod["status"]["phase"] = json!("Succeeded")),
            "its sandbox ends" => assert!(cni.call("DEL", ("ns", "client"), &netns, &ips).0),
            "it has another sandbox" => {
                let other = c.server.netns.clone();
                assert!(cni.call("ADD", ("ns", "client"), &other, &ips).0);
            }
            _ => {
                let mut node = c.w.take_node(1);
                node.signal(nix::sys::signal::Signal::SIGTERM);
                node.wait();
                assert!(has_rules(&c.client), "the rules stay for the next daemon");
            }
        }
        if end != "the daemon ends" {
            eventually("it is released", || c.state("client").is_empty());
            assert!(!has_rules(&c.client), "{end}");
        }
        assert!(lost.elapsed() < Duration::from_secs(4), "{end}: it took {:?}", lost.elapsed());
    }
}

#[test]
fn a_sidecar_that_nobody_redirects_is_refused_by_name() {
    let mut c = cluster();
    let lost = c.w.add_pod("lost", 1);
    let mut kube = KubePod::without_sandbox(&lost);
    kube.annotations = json!({"sidecar.istio.io/status": "{}"});
    c.apis[0].pod(&kube);
    let validation = |state: Value| json!([{"name": "istio-validation", "image": "i", "imageID": "i", "ready": false, "restartCount": 1, "state": state}]);
    let failed = validation(json!({"terminated": {"exitCode": 126}}));
    c.apis[0].change("lost", |pod| pod["status"]["initContainerStatuses"] = failed);
    c.start_one(&[]);
    eventually("it is named", || {
        let (state, why) = c.w.state(1, "lost");
        state == "failed" && why.contains("depends on istio-cni") && why.contains("istio-init")
    });
    eventually("others are captured", || c.state("client") == "captured");
    assert_eq!(c.apis[0].said("lost"), None);
    // The pod has been redirected after all.
    c.apis[0].change("lost", |pod| {
        pod["status"]["initContainerStatuses"] = validation(json!({"terminated": {"exitCode": 0}}))
    });
    eventually("nothing is said any more", || c.state("lost").is_empty());
}

#[test]
fn a_pod_with_a_user_namespace_of_its_own_is_captured() {
    let mut c = cluster();
    // Its network namespace belongs to a user namespace: it is made inside one, and an interface is moved in.
    let host = c.w.ns("n1");
    let held =
        Command::new("unshare").args(["--user", "--map-root-user", "--net", "sleep", "infinity"]).spawn().unwrap();
    let pid = held.id();
    struct End(std::process::Child);
    impl Drop for End {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let held = End(held);
    let own = std::fs::metadata("/proc/self/ns/net").unwrap();
    let inode = |path: String| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    eventually("it has its own", || inode(format!("/proc/{pid}/ns/net")) != std::os::unix::fs::MetadataExt::ino(&own));
    let ns = c.w.ns("userns");
    crate::world::ip(&format!(
        "netns attach {ns} {pid}\nlink add pu netns {host} type veth peer name eth0 netns {ns}\n"
    ));
    ip_in(&host, "link set pu master pods\nlink set pu up\n");
    ip_in(&ns, "link set lo up\nlink set eth0 up\naddr add 10.1.0.99/24 dev eth0\nroute add default via 10.1.0.1\n");
    let v6 = "fd00:1::99".parse().unwrap();
    let pod = Pod { name: "remapped".into(), node: 1, v4: "10.1.0.99".parse().unwrap(), v6, netns: ns.clone() };
    c.w.pods.push(pod.clone());
    c.w.mesh.workload(&pod, "HBONE");
    c.w.mesh.of("remapped")["workloadIps"] = json!([pod.v4]);
    c.w.write_mesh();
    let mut kube = KubePod::without_sandbox(&pod);
    kube.ips.truncate(1);
    kube.run(&ns);
    c.apis[0].pod(&kube);
    c.start();
    assert!(ask(&ns, (c.server.v4, 8080), "x").is_ok());
    assert!(c.w.metric(2, "istio_tcp_connections_opened_total", &["mutual_tls"]) >= 1.0);
    drop(held);
}
