//! Pods that carry their own connections, as `daemonset/sidecar/job.yaml` shows: no daemon of a node captures them.

use super::cluster;
use crate::world::{Cluster, SHOP, Sniffer, eventually, root};
use serde_json::{Value, json};

/// The objects of the example, with the tests' images: a service account and a Job.
fn example(cluster: &Cluster) -> (Value, Value) {
    let text = std::fs::read_to_string(root().join("daemonset/sidecar/job.yaml")).unwrap();
    let file = cluster.folder().join("sidecar.yaml");
    std::fs::write(&file, text.replace("example.org/report:1", "example.org/app:1")).unwrap();
    let read = cluster.kubectl(&["create", "--dry-run=client", "-o", "json", "-f", file.to_str().unwrap()]);
    let mut objects = Vec::new();
    for object in serde_json::Deserializer::from_str(&read).into_iter::<Value>() {
        match object.unwrap() {
            mut list if list["kind"] == "List" => objects.append(list["items"].as_array_mut().unwrap()),
            object => objects.push(object),
        }
    }
    let of_kind = |kind: &str| objects.iter().find(|object| object["kind"] == kind).unwrap().clone();
    (of_kind("ServiceAccount"), of_kind("Job"))
}

/// Lets only the account of the example reach the web service, and waits until the policy is in force.
fn only_report_may_ask(cluster: &Cluster) {
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: only-report, namespace: shop}\nspec:\n  \
         selector: {matchLabels: {app: web}}\n  action: ALLOW\n  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/report]}}]}]\n",
    );
    eventually("the policy is in force everywhere", || {
        (0..8).find_map(|_| cluster.ask("shop/front", "n1", "http://web.shop/").ok())
    });
}

fn remove(cluster: &Cluster, what: &str) {
    cluster.kubectl(&["-n", SHOP, "delete", what, "report", "--wait=true"]);
    cluster.kubectl(&["-n", SHOP, "delete", "serviceaccount", "report"]);
}

#[test]
fn a_job_carries_its_own_connections_and_ends_with_its_application() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    only_report_may_ask(&cluster);
    let wires = ["n1", "n2"].map(|node| Sniffer::start(&cluster, node));
    let (account, mut job) = example(&cluster);
    job["metadata"]["labels"] = json!({"made-by": "scenario"});
    // The application asks as the first thing that it does, and once: it fails if the sidecar is not ready by then.
    job["spec"]["backoffLimit"] = json!(0);
    job["spec"]["completions"] = json!(6);
    job["spec"]["parallelism"] = json!(3);
    let pod = &mut job["spec"]["template"];
    pod["metadata"]["labels"]["made-by"] = json!("scenario");
    pod["spec"]["containers"][0]["args"] = json!(["get", "http://web.shop/"]);
    cluster.apply(&format!("{account}\n---\n{job}\n"));
    let logs = |container: &str| {
        let pods = ["logs", "-l", "job-name=report", "-c", container, "--tail=-1"];
        cluster.kubectl(&[&["-n", SHOP], &pods[..]].concat())
    };
    eventually("the job ends", || {
        let status = cluster.get(&["job", "-n", SHOP, "report"])["status"].clone();
        assert_eq!(status["failed"].as_u64().unwrap_or(0), 0, "{}\n{}", logs("report"), logs("culvert"));
        (status["succeeded"] != 6).then(|| status.to_string())
    });
    let answers = logs("report");
    assert_eq!(answers.matches("CANARY-IN-CLEAR").count(), 6, "{answers}");
    // No daemon of a node has captured the pods.
    let pods = cluster.get(&["pods", "-n", SHOP, "-l", "job-name=report"]);
    let pods: Vec<_> = pods["items"].as_array().unwrap().iter().map(crate::world::name_of).collect();
    for node in ["n1", "n2"] {
        let captured = cluster.kubectl(&["-n", "istio-system", "logs", &cluster.daemon(node), "--tail=-1"]);
        assert!(!pods.iter().any(|pod| captured.contains(&format!("pod=shop/{pod} "))), "{captured}");
    }
    for wire in wires {
        assert_eq!(wire.found(), 0);
    }
    remove(&cluster, "job");
}

#[test]
fn a_service_of_pods_that_carry_themselves_is_in_the_mesh() {
    let cluster = cluster();
    cluster.mutual_tls("STRICT");
    let wires = ["n1", "n2"].map(|node| Sniffer::start(&cluster, node));
    let (account, mut job) = example(&cluster);
    let mut pod = job["spec"]["template"].take();
    pod["metadata"]["labels"]["made-by"] = json!("scenario");
    pod["spec"]["restartPolicy"] = json!("Always");
    let application = &mut pod["spec"]["containers"][0];
    application["args"] = json!(["serve", ":8080"]);
    // Probes of the kubelet are plaintext from the node: only those that stay inside the pod pass.
    application["readinessProbe"] =
        json!({"exec": {"command": ["/app", "get", "http://127.0.0.1:8080/ready"]}, "periodSeconds": 1});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "report", "namespace": SHOP, "labels": {"made-by": "scenario"}},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "report"}}, "template": pod},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "report", "namespace": SHOP},
        "spec": {"selector": {"app": "report"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    });
    cluster.apply(&format!("{account}\n---\n{deployment}\n---\n{service}\n"));
    cluster.rolled_out(SHOP, "deployment/report");
    for node in ["n1", "n2"] {
        // Peers may not know the pods at once.
        eventually("pods that are captured by a node are served", || {
            cluster.ask("shop/front", node, "http://report.shop/").err()
        });
    }
    // And they are clients of pods that a node captures, and of each other.
    for pod in cluster.pods(SHOP, "app=report", None) {
        for url in ["http://web.shop/", "http://report.shop/"] {
            cluster.kubectl(&["-n", SHOP, "exec", &pod, "-c", "report", "--", "/app", "get", url]);
        }
    }
    for wire in wires {
        assert_eq!(wire.found(), 0);
    }
    for node in ["n1", "n2"] {
        let refused = cluster.ask("plain/outsider", node, "http://report.shop/").unwrap_err();
        assert!(refused.contains("reset") || refused.contains("refused") || refused.contains("EOF"), "{refused}");
    }
    cluster.kubectl(&["-n", SHOP, "delete", "service", "report"]);
    remove(&cluster, "deployment");
}
