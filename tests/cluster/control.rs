//! Without Istio: culvert's own control plane on a bare cluster, as a folder of manifests installs it.

use crate::world::{Cluster, IMAGE, Load, Mode, SHOP, SYSTEM, Sniffer, eventually, root};
use std::fs;
use std::process::Command;

const CONTROL: &str = "deployment/culvert-control";
const NODES: &str = "daemonset/ztunnel";

/// The cluster without culvert, whatever the previous scenario did.
fn bare() -> Cluster {
    let cluster = Cluster::of(Mode::Control);
    remove(&cluster);
    cluster
}

fn folder() -> String {
    root().join("daemonset/alone").to_str().unwrap().to_owned()
}

/// The commands of docs/standalone.md.
fn remove(cluster: &Cluster) {
    cluster.kubectl(&["-n", SYSTEM, "delete", NODES, "--cascade=foreground", "--ignore-not-found", "--timeout=200s"]);
    cluster.kubectl(&["delete", "-k", &folder(), "--ignore-not-found", "--timeout=200s"]);
    cluster.kubectl(&["delete", "configmaps", "-A", "--field-selector", "metadata.name=istio-ca-root-cert"]);
    for node in ["n1", "n2"] {
        eventually(&format!("nothing of culvert is left on {node}"), || {
            let traces = cluster.traces(node);
            (!traces.is_empty()).then(|| traces.join("; "))
        });
    }
    let pods = cluster.get(&["pods", "-n", SHOP]);
    let inside = |pod: &&serde_json::Value| !pod["metadata"]["annotations"]["ambient.istio.io/redirection"].is_null();
    assert_eq!(pods["items"].as_array().unwrap().iter().find(inside), None);
}

/// Applies the folder, and waits until everything that it holds is there.
fn apply(cluster: &Cluster) {
    apply_folder(cluster, &folder());
}

/// An overlay of the folder, in which these kinds of object, by name, have further settings.
fn overlay(cluster: &Cluster, settings: &[(&str, &str, &str)], value: &str) -> String {
    let overlay = cluster.folder().join("overlay");
    let _ = fs::create_dir(&overlay);
    let up = overlay.strip_prefix(root()).unwrap().components().map(|_| "../").collect::<String>();
    let mut text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [{up}daemonset/alone]\npatches:\n"
    );
    for (kind, name, setting) in settings {
        text += &format!(
            "- target: {{kind: {kind}, name: {name}}}\n  patch: '[{{\"op\": \"add\", \"path\": \"/spec/template/spec/containers/0/env/-\", \
             \"value\": {{\"name\": \"{setting}\", \"value\": \"{value}\"}}}}]'\n"
        );
    }
    fs::write(overlay.join("kustomization.yaml"), text).unwrap();
    overlay.to_str().unwrap().to_owned()
}

fn apply_folder(cluster: &Cluster, folder: &str) {
    // Objects of kinds that are being defined may have to be applied again.
    eventually("the folder is applied", || cluster.try_kubectl(&["apply", "-k", folder]).err());
    for what in [CONTROL, NODES] {
        cluster.rolled_out(SYSTEM, what);
    }
}

fn enrol(cluster: &Cluster) {
    cluster.kubectl(&["label", "namespace", SHOP, "istio.io/dataplane-mode=ambient", "--overwrite"]);
    eventually("all pods are captured", || {
        let pods = cluster.get(&["pods", "-n", SHOP, "-l", "app"]);
        let outside =
            |pod: &&serde_json::Value| pod["metadata"]["annotations"]["ambient.istio.io/redirection"] != "enabled";
        pods["items"].as_array().unwrap().iter().find(outside).map(|pod| pod["metadata"]["name"].to_string())
    });
    cluster.works();
}

/// A mesh of its own, new.
fn mesh() -> Cluster {
    let cluster = bare();
    apply(&cluster);
    enrol(&cluster);
    cluster
}

/// Why a policy's status does not have this reason.
fn has_not_said(cluster: &Cluster, namespace: &str, kind: &str, name: &str, reason: &str) -> Option<String> {
    let object = cluster.get(&[kind, "-n", namespace, name]);
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let said = conditions.iter().find(|condition| condition["type"] == "Accepted").cloned().unwrap_or_default();
    (said["reason"] != reason).then(|| said.to_string())
}

#[test]
fn a_bare_cluster_becomes_a_mesh_and_is_bare_again() {
    let cluster = bare();
    cluster.works();
    apply(&cluster);
    let istio = cluster.get(&["pods", "-n", SYSTEM]);
    for pod in istio["items"].as_array().unwrap() {
        let image = pod["spec"]["containers"][0]["image"].as_str().unwrap();
        assert!(image.starts_with("example.org/culvert:"), "nothing of Istio runs: {image}");
    }
    enrol(&cluster);
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    cluster.works();
    assert_eq!(wire.found(), 0);
    for node in ["n1", "n2"] {
        let said = cluster.try_kubectl(&["-n", SYSTEM, "exec", &cluster.daemon(node), "--", "culvert", "doctor"]);
        let said = said.unwrap_or_else(|why| panic!("{why}"));
        assert!(!said.contains("FAIL"), "{said}");
    }
    let status = cluster.run(&["culvert", "status", "--wait=1m"]);
    assert!(status.contains("control plane istio-system/culvert-control: 2 of 2 replicas are ready"), "{status}");
    let replicas = cluster.get(&["pods", "-n", SYSTEM, "-l", "app=culvert-control"]);
    let nodes: Vec<_> =
        replicas["items"].as_array().unwrap().iter().map(|pod| pod["spec"]["nodeName"].clone()).collect();
    assert!(nodes.len() == 2 && nodes[0] != nodes[1], "a replica on each node: {nodes:?}");
    remove(&cluster);
    let left = cluster.kubectl(&[
        "get",
        "clusterroles,clusterrolebindings,customresourcedefinitions,namespaces",
        "-o",
        "name",
    ]);
    let ours = |line: &&str| line.contains("culvert") || line.contains("istio") || line.contains("ztunnel");
    assert_eq!(left.lines().filter(ours).collect::<Vec<_>>(), Vec::<&str>::new());
    cluster.works();
}

#[test]
fn policies_are_in_force_for_as_long_as_they_are_there_and_say_what_they_mean() {
    let cluster = mesh();
    cluster.mutual_tls("STRICT");
    // From here on no outsider asks for anything.
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    for (action, principal) in [("DENY", "front"), ("ALLOW", "nobody")] {
        cluster.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: scenario, namespace: shop}}\nspec:\n  \
             selector: {{matchLabels: {{app: web}}}}\n  action: {action}\n  rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/{principal}]}}}}]}}]\n",
        ));
        for node in ["n1", "n2"] {
            eventually(&format!("{action} is in force everywhere"), || {
                (0..8).find_map(|_| cluster.ask("shop/front", node, "http://web.shop/").ok())
            });
        }
        eventually("its status says so", || {
            has_not_said(&cluster, SHOP, "authorizationpolicy", "scenario", "Accepted")
        });
        cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicy", "scenario"]);
        cluster.works();
    }
    // What a node does not see is refused as far as it goes, and visibly.
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: http, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: web}}\n  rules: [{to: [{operation: {methods: [GET]}}]}]\n",
    );
    eventually("its status says what does not hold", || {
        has_not_said(&cluster, SHOP, "authorizationpolicy", "http", "PartlyEnforced")
    });
    eventually("it is in force", || cluster.ask("shop/front", "n1", "http://web.shop/").ok());
    let status = cluster.run(&["culvert", "status"]);
    assert!(status.contains("AuthorizationPolicy shop/http is not enforced as it is written"), "{status}");
    cluster.kubectl(&["-n", SHOP, "delete", "authorizationpolicy", "http"]);
    cluster.works();
    assert_eq!(wire.found(), 0);
    cluster.mutual_tls("PERMISSIVE");
    eventually("its status says so", || has_not_said(&cluster, SYSTEM, "peerauthentication", "default", "Accepted"));
}

/// A token as the kubelet gives it to a pod.
fn token(cluster: &Cluster, namespace: &str, account: &str, pod: Option<&str>, audience: &str) -> String {
    let audience = format!("--audience={audience}");
    let mut arguments = vec!["-n", namespace, "create", "token", account, "--duration=10m"];
    if !audience.ends_with('=') {
        arguments.push(&audience);
    }
    let bound = pod.map(|pod| ["--bound-object-kind=Pod".to_owned(), format!("--bound-object-name={pod}")]);
    arguments.extend(bound.iter().flatten().map(String::as_str));
    cluster.kubectl(&arguments).trim().to_owned()
}

/// What each replica answers to a request for a certificate.
fn ask_ca(cluster: &Cluster, token: &str, identity: &str) -> Vec<String> {
    let roots = cluster.folder().join("roots.pem");
    let map = cluster.get(&["configmap", "-n", SHOP, "istio-ca-root-cert"]);
    fs::write(&roots, map["data"]["root-cert.pem"].as_str().unwrap()).unwrap();
    let machine = fs::read_to_string(cluster.folder().join("machine.pid")).unwrap();
    let replicas = cluster.get(&["pods", "-n", SYSTEM, "-l", "app=culvert-control"]);
    let replicas = replicas["items"].as_array().unwrap();
    let ask = |replica: &serde_json::Value| {
        let mut command = Command::new("nsenter");
        command.args(["-t", machine.trim(), "-n"]).arg(root().join("tests/cluster/machine/ask-ca"));
        command.arg(replica["status"]["podIP"].as_str().unwrap()).arg(&roots).args([token, identity]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(replicas.len(), 2);
    replicas.iter().map(ask).collect()
}

#[test]
fn a_node_that_is_taken_over_gets_the_identities_of_its_own_pods_and_nothing_more() {
    let cluster = mesh();
    cluster.apply(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: lonely, namespace: shop}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: lonely, namespace: shop, labels: {made-by: scenario}}\nspec:\n  nodeName: n2\n  \
         serviceAccountName: lonely\n  terminationGracePeriodSeconds: 1\n  containers: [{name: main, image: \"example.org/app:1\", args: [sleep]}]\n",
    );
    cluster.kubectl(&["-n", SHOP, "wait", "pod/lonely", "--for=condition=Ready", "--timeout=60s"]);
    let daemon = |node: &str| cluster.daemon(node);
    let of_daemon = |node: &str| token(&cluster, SYSTEM, "ztunnel", Some(&daemon(node)), "istio-ca");
    let front = cluster.pods(SHOP, "app=front", Some("n1")).remove(0);
    let of_front = token(&cluster, SHOP, "front", Some(&front), "istio-ca");
    let (n1, n2) = (of_daemon("n1"), of_daemon("n2"));
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    for (who, token, identity, issued) in [
        ("the daemon of n1, for a pod of its own", n1.clone(), id("front"), true),
        ("the daemon of n2, for its pod", n2.clone(), id("lonely"), true),
        ("the daemon of n1, for a pod that runs only on n2", n1.clone(), id("lonely"), false),
        ("the daemon of n1, for an account without pods", n1.clone(), id("default"), false),
        ("the daemon of n1, in another trust domain", n1.clone(), "spiffe://other/ns/shop/sa/front".into(), false),
        ("the daemon of n1, for something that is no identity", n1.clone(), "spiffe://cluster.local/x".into(), false),
        ("a pod, for itself", of_front.clone(), id("front"), true),
        ("a pod, for another pod of its node", of_front, id("web"), false),
        (
            "a token for another audience",
            token(&cluster, SYSTEM, "ztunnel", Some(&daemon("n1")), ""),
            id("front"),
            false,
        ),
        (
            "a daemon's token that is bound to no pod",
            token(&cluster, SYSTEM, "ztunnel", None, "istio-ca"),
            id("front"),
            false,
        ),
        ("a token that is none", "nonsense".into(), id("front"), false),
        ("no token", String::new(), id("front"), false),
    ] {
        for answer in ask_ca(&cluster, &token, &identity) {
            assert_eq!(answer.starts_with("issued"), issued, "{who}: {answer}");
            assert!(answer.starts_with("issued") || answer.starts_with("refused"), "{who}: {answer}");
        }
    }
    // The pod is gone, and so is the right, whatever the token says.
    let of_lonely = token(&cluster, SHOP, "lonely", Some("lonely"), "istio-ca");
    cluster.kubectl(&["-n", SHOP, "delete", "pod", "lonely"]);
    for (who, token) in [("the daemon of n2", &n2), ("the pod itself", &of_lonely)] {
        eventually(&format!("{who} does not get the identity of a pod that is gone"), || {
            ask_ca(&cluster, token, &id("lonely")).into_iter().find(|answer| answer.starts_with("issued"))
        });
    }
    for replica in cluster.pods(SYSTEM, "app=culvert-control", None) {
        let page = format!("/api/v1/namespaces/{SYSTEM}/pods/{replica}:15020/proxy/metrics");
        let metrics = cluster.kubectl(&["get", "--raw", &page]);
        for reason in ["not_on_node", "not_trusted", "trust_domain"] {
            let series = format!("culvert_control_certificates_refused_total{{reason=\"{reason}\"}}");
            assert!(metrics.contains(&series), "{replica} has counted {reason}:\n{metrics}");
        }
        let log = cluster.kubectl(&["-n", SYSTEM, "logs", &replica]);
        assert!(log.contains("shop/sa/lonely") && !log.contains("BEGIN"), "it names what was refused: {log}");
    }
}

#[test]
fn without_the_control_plane_traffic_goes_on_and_new_connections_too() {
    let cluster = mesh();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n1");
    let loads = Load::from_both_nodes(&cluster, 20, 60);
    let held = Load::held(&cluster, "held", "n2", "echo:9000", 10, 60);
    // One after the other at first: nobody notices.
    for replica in cluster.pods(SYSTEM, "app=culvert-control", None) {
        cluster.kubectl(&["-n", SYSTEM, "delete", "pod", &replica, "--force", "--grace-period=0"]);
        cluster.rolled_out(SYSTEM, CONTROL);
    }
    cluster.kubectl(&["-n", SYSTEM, "scale", CONTROL, "--replicas=0"]);
    eventually("no replica runs", || {
        let left = cluster.pods(SYSTEM, "app=culvert-control", None);
        (!left.is_empty()).then(|| left.join(", "))
    });
    // Connections that begin now, in both directions, under the same policies.
    cluster.works();
    assert_eq!(wire.found(), 0);
    // What an outsider sends is in plaintext, and is refused.
    cluster.ask("plain/outsider", "n1", "http://web.shop/").unwrap_err();
    eventually("it is seen that there is none", || {
        let said = cluster.try_run(&["culvert", "status"]).err().unwrap_or_default();
        (!said.contains("0 of 0 replicas are ready")).then_some(said)
    });
    for load in loads.into_iter().chain([held]) {
        load.all_well(&cluster);
    }
    cluster.kubectl(&["-n", SYSTEM, "scale", CONTROL, "--replicas=2"]);
    cluster.rolled_out(SYSTEM, CONTROL);
    // What is new is announced again.
    let wire = Sniffer::start(&cluster, "n1");
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    cluster.works();
    assert_eq!(wire.found(), 0);
}

#[test]
fn control_plane_and_daemons_are_rolled_out_and_upgraded_under_load() {
    let cluster = mesh();
    cluster.mutual_tls("STRICT");
    let wire = Sniffer::start(&cluster, "n2");
    let loads = Load::from_both_nodes(&cluster, 20, 90);
    cluster.restart(SYSTEM, CONTROL);
    cluster.rolled_out(SYSTEM, CONTROL);
    cluster.run(&["image", "0.1.1"]);
    let upgrade = |what: &str, container: &str, tag: &str| {
        let image = format!("{container}=example.org/culvert:{tag}");
        cluster.kubectl(&["-n", SYSTEM, "set", "image", what, &image]);
    };
    // The daemons are older than the control plane for a while, and then newer.
    upgrade(CONTROL, "control", "0.1.1");
    cluster.rolled_out(SYSTEM, CONTROL);
    cluster.works();
    upgrade(NODES, "istio-proxy", "0.1.1");
    cluster.rolled_out(SYSTEM, NODES);
    upgrade(CONTROL, "control", IMAGE);
    cluster.rolled_out(SYSTEM, CONTROL);
    cluster.restart(SHOP, "deployment/web");
    cluster.rolled_out(SHOP, "deployment/web");
    for load in loads {
        load.all_well(&cluster);
    }
    cluster.works();
    assert_eq!(wire.found(), 0);
}

#[test]
fn the_root_is_replaced_under_load() {
    let cluster = bare();
    // Certificates that live for seconds, because a rotation takes as long as they do, twice. The root must not have
    // signed longer ones.
    let settings = [
        ("DaemonSet", "ztunnel", "SECRET_TTL"),
        ("Deployment", "culvert-control", "DEFAULT_WORKLOAD_CERT_TTL"),
        // The time for clocks that differ is at most this too.
        ("Deployment", "culvert-control", "MAX_WORKLOAD_CERT_TTL"),
    ];
    apply_folder(&cluster, &overlay(&cluster, &settings, "40s"));
    enrol(&cluster);
    let root_of = |cluster: &Cluster| {
        let map = cluster.get(&["configmap", "-n", SHOP, "istio-ca-root-cert"]);
        map["data"]["root-cert.pem"].as_str().unwrap().to_owned()
    };
    let before = root_of(&cluster);
    let wire = Sniffer::start(&cluster, "n1");
    let loads = Load::from_both_nodes(&cluster, 10, 360);
    let rotate = || {
        let exec = ["-n", SYSTEM, "exec", CONTROL, "--", "culvert", "control", "rotate-root"];
        cluster.try_kubectl(&exec).unwrap_or_else(|why| why)
    };
    let begun = rotate();
    assert!(begun.contains("The rotation has begun"), "{begun}");
    eventually("both roots are given out", || (!root_of(&cluster).contains(&before)).then(|| root_of(&cluster)));
    for step in ["Step 2 of 3", "Done"] {
        eventually(step, || {
            let said = rotate();
            (!said.contains(step)).then_some(said)
        });
    }
    eventually("only the new root is given out", || root_of(&cluster).contains(&before).then(|| root_of(&cluster)));
    cluster.works();
    for load in loads {
        load.all_well(&cluster);
    }
    assert_eq!(wire.found(), 0);
}
