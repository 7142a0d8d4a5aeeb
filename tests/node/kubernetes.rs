//! Enrolment by label, with no agent: a Kubernetes API, real processes in cgroups of pods, and the shipped binary.

use crate::world::kube::{Api, KubePod, STATUS, Sandbox, Streaming};
use crate::world::{Pod, World, apps, ask, connect, eventually, inside, ip_in, output_in, peer_script};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::process::Command;

/// Two captured nodes by label: a client on the first and a server on the second, each with an API of its own.
struct Cluster {
    w: World,
    apis: [Api; 2],
    client: Pod,
    server: Pod,
    kube: Vec<KubePod>,
}

fn cluster() -> Cluster {
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
    fn start(&mut self) {
        for node in [1, 2] {
            self.w.start_kube_node(node, &self.apis[usize::from(node) - 1], &[]);
        }
        for node in [1, 2] {
            self.w.wait_captured(node);
        }
    }

    /// Starts the first node alone and waits until it is ready.
    fn start_one(&mut self, settings: &[(&str, &str)]) {
        self.w.start_kube_node(1, &self.apis[0], settings);
        eventually("the first node is ready", || self.w.is_ready(1));
    }

    fn state(&self, pod: &str) -> String {
        self.w.state(1, pod).0
    }
}

fn has_rules(pod: &Pod) -> bool {
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
        // The other way a pod can say it.
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
            // The API shows a mirror; its processes have the uid of the file on the node.
            "static" => {
                kube.annotations["kubernetes.io/config.hash"] = json!("0123456789abcdef0123456789abcdef");
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
    // A list of the operator's own takes the place of the labels of Istio.
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
    // Excluded after the fact: by name of the namespace.
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
    // A process of the client has entered the namespace of another pod, and is older than the client's own.
    let other = c.w.mesh_pod("other", 1);
    c.kube[0].stop();
    let intruder = Sandbox::start(&other.netns, &c.kube[0].cgroup());
    let mut kube = KubePod::without_sandbox(&other);
    c.apis[0].pod(&kube);
    // Only such a process: refused and named.
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
    // The forms of systemd and cri-o.
    let id = "4f2a0c9b8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a";
    let slice = format!("kubepods-burstable-pod{}.slice", c.kube[0].uid.replace('-', "_"));
    let form = format!("/kubepods.slice/kubepods-burstable.slice/{slice}/cri-containerd-{id}.scope");
    let _systemd = Sandbox::start(&c.client.netns, &form);
    eventually("the client is captured in its own", || c.state("client") == "captured");
    // By the id of its container, where no uid is in the path.
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

#[test]
fn a_sandbox_that_is_made_anew_and_an_address_that_is_used_again() {
    let mut c = cluster();
    c.start_one(&[]);
    eventually("it is captured", || c.state("client") == "captured");
    // The sandbox dies; the namespace goes with it once nobody holds it.
    c.kube[0].stop();
    eventually("it waits for its sandbox", || c.state("client") == "pending");
    c.kube[0].run(&c.client.netns.clone());
    eventually("it is captured again", || c.state("client") == "captured");
    eventually("and still says so", || c.apis[0].said("client").as_deref() == Some("enabled"));
    // The pod ends, and another one of a new name has its address while the old object is still there.
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
    // The same name again, another uid, as a StatefulSet does.
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
        let listed = c.apis[0].state().requests.iter().any(|r| r.starts_with("GET /api/v1/pods?") && !r.contains("watch="));
        assert_eq!(listed, streaming != Streaming::Offered, "lists are asked for where they are not streamed");
        if streaming == Streaming::NotKnown {
            continue;
        }
        eventually("bookmarks come", || c.apis[0].state().bookmarks > 2);
        // Its history has gone: all is listed anew. What has gone meanwhile is let go.
        let second = c.w.mesh_pod("second", 1);
        let kube = KubePod::new(&second);
        c.w.write_mesh();
        c.apis[0].pod(&kube);
        eventually("the second is captured", || c.state("second") == "captured");
        c.apis[0].away(true);
        eventually("it is known to be away", || c.w.metric(1, "culvert_kubernetes_connected", &["pods"]) == 0.0);
        c.apis[0].delete("second");
        c.apis[0].forget();
        // Nobody hears of it, and what is enrolled is held, and repaired.
        output_in(&second.netns, "nft", &["flush", "table", "inet", "culvert"]);
        eventually("the rules are back", || output_in(&second.netns, "nft", &["list", "table", "inet", "culvert"]).contains("15001"));
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
fn an_annotation_that_cannot_be_written_is_tried_again_and_stops_nobody() {
    let mut c = cluster();
    c.apis[0].state().refuse_patches = 500;
    c.start_one(&[]);
    eventually("it is captured all the same", || c.state("client") == "captured");
    eventually("it is counted", || c.w.metric(1, "culvert_kubernetes_patch_failures_total", &[]) >= 2.0);
    c.apis[0].state().refuse_patches = 0;
    eventually("at last it is said", || c.apis[0].said("client").as_deref() == Some("enabled"));
    // Somebody else writes it: it is what it should be again.
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
    // Rules of others are their affair.
    let before = rewrites();
    output_in(&ns, "nft", &["add", "table", "ip", "mine"]);
    // A new address is the pod's own at once: plaintext to it is taken.
    ip_in(&ns, "addr add 10.1.0.200/24 dev eth0\n");
    let host = c.w.ns("n1");
    apps::serve(&ns, 7000, apps::who);
    eventually("the new address is known", || ask(&host, (std::net::Ipv4Addr::new(10, 1, 0, 200), 7000), "x").is_ok());
    assert_eq!(rewrites(), before, "nothing of ours was touched");
}
