//! The manifests. They are rendered by helm and kustomize (`scripts/manifests` installs both) and read as the types of
//! Kubernetes, with no unknown field left over. Variables, ports and values must agree with the daemon.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    reason = "a test says what is wrong by panicking"
)]

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ResourceQuota, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let path = root().join("target/tools").join(name);
    assert!(path.exists(), "{} is not there: scripts/manifests installs it", path.display());
    let output = Command::new(path).args(arguments).current_dir(root()).output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// Renders the chart with values.
fn render(values: &Value) -> Result<String, String> {
    let file =
        std::env::temp_dir().join(format!("culvert-values-{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::write(&file, values.to_string()).unwrap();
    let file_name = file.to_str().unwrap();
    let rendered = tool(
        "helm",
        &["template", "culvert", "daemonset/chart", "-n", "istio-system", "--kube-version", "1.33.0", "-f", file_name],
    );
    fs::remove_file(&file).unwrap();
    rendered
}

fn documents(text: &str) -> Vec<Value> {
    let parts = text.split("\n---").map(|part| part.trim_start_matches("---"));
    let full =
        parts.filter(|part| part.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')));
    full.map(|part| serde_saphyr::from_str(part).unwrap_or_else(|error| panic!("{error}\n{part}"))).collect()
}

/// Finds fields of `given` that `understood` does not have.
fn lost(given: &Value, understood: &Value, path: &str, found: &mut Vec<String>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (key, value) in given {
                lost(value, understood.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"), found);
            }
        }
        (Value::Array(given), Value::Array(understood)) => {
            for (at, value) in given.iter().enumerate() {
                lost(value, understood.get(at).unwrap_or(&Value::Null), &format!("{path}[{at}]"), found);
            }
        }
        // An empty field may be left out.
        (Value::Object(map), Value::Null) if map.is_empty() => {}
        (given, understood) if given == understood => {}
        _ => found.push(format!("{path}: {given} became {understood}")),
    }
}

fn is_understood<T: DeserializeOwned + Serialize>(document: &Value) {
    let read: T = serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{error}: {document:#}"));
    let mut found = Vec::new();
    lost(document, &serde_json::to_value(read).unwrap(), "", &mut found);
    assert!(found.is_empty(), "{found:#?}");
}

/// Reads a document as the type that it says it is.
fn check(document: &Value) {
    match document["kind"].as_str().unwrap_or_default() {
        "DaemonSet" => is_understood::<DaemonSet>(document),
        "Deployment" => is_understood::<Deployment>(document),
        "Service" => is_understood::<Service>(document),
        "PodDisruptionBudget" => is_understood::<PodDisruptionBudget>(document),
        "Namespace" => is_understood::<Namespace>(document),
        "CustomResourceDefinition" => is_understood::<CustomResourceDefinition>(document),
        "Job" => is_understood::<Job>(document),
        "ServiceAccount" => is_understood::<ServiceAccount>(document),
        "ClusterRole" => is_understood::<ClusterRole>(document),
        "ClusterRoleBinding" => is_understood::<ClusterRoleBinding>(document),
        "Role" => is_understood::<Role>(document),
        "RoleBinding" => is_understood::<RoleBinding>(document),
        "NetworkPolicy" => is_understood::<NetworkPolicy>(document),
        "ResourceQuota" => is_understood::<ResourceQuota>(document),
        "ConfigMap" => is_understood::<ConfigMap>(document),
        // Types of the Prometheus operator.
        "PrometheusRule" => {
            let rules = document["spec"]["groups"][0]["rules"].as_array().unwrap();
            assert!(rules.len() > 15 && rules.iter().all(|rule| rule["expr"].is_string() && rule["alert"].is_string()));
        }
        "PodMonitor" => {
            let (app, port) = (
                &document["spec"]["selector"]["matchLabels"]["app"],
                &document["spec"]["podMetricsEndpoints"][0]["port"],
            );
            assert!(
                app == "ztunnel" && port == "ztunnel-stats" || app == "culvert-control" && port == "control-stats",
                "{document:#}"
            );
        }
        other => panic!("{other:?} is not expected: {document:#}"),
    }
}

fn of_kind<'a>(all: &'a [Value], kind: &str) -> Option<&'a Value> {
    all.iter().find(|document| document["kind"] == kind)
}

fn named<'a>(all: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = all.iter().find(|document| document["kind"] == kind && document["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn container(set: &Value) -> &Value {
    &set["spec"]["template"]["spec"]["containers"][0]
}

fn variables(set: &Value) -> Vec<(String, Value)> {
    let all = container(set)["env"].as_array().unwrap();
    all.iter().map(|entry| (entry["name"].as_str().unwrap().to_owned(), entry["value"].clone())).collect()
}

fn variable(set: &Value, name: &str) -> Value {
    variables(set).into_iter().find(|(other, _)| other == name).map(|(_, value)| value).unwrap_or(Value::Null)
}

/// Checks the rendered documents of one case.
type Expectation = fn(&[Value]);

/// Chart values of every kind, each with a check of the rendered documents.
fn cases() -> Vec<(Value, Expectation)> {
    fn set(all: &[Value]) -> &Value {
        of_kind(all, "DaemonSet").expect("a DaemonSet")
    }
    vec![
        (json!({}), |all| {
            let kinds: Vec<&str> = all.iter().map(|document| document["kind"].as_str().unwrap()).collect();
            for kind in ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "DaemonSet"] {
                assert!(kinds.contains(&kind), "{kinds:?}");
            }
            assert_eq!(kinds.len(), 6, "{kinds:?}");
            let context = &container(set(all))["securityContext"];
            assert_eq!(context["privileged"], false);
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
            let added = json!(["NET_ADMIN", "SYS_ADMIN", "NET_RAW", "SYS_PTRACE", "DAC_OVERRIDE"]);
            assert_eq!(context["capabilities"]["add"], added);
            assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
            let pod = &set(all)["spec"]["template"]["spec"];
            assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&Value::Null, &Value::Null));
            assert_eq!(pod["priorityClassName"], "system-node-critical");
            assert_eq!(
                set(all)["spec"]["updateStrategy"]["rollingUpdate"],
                json!({"maxSurge": 1, "maxUnavailable": 0})
            );
            // The rights that the daemon uses, and no more.
            let rules = &of_kind(all, "ClusterRole").unwrap()["rules"];
            assert_eq!(rules[0]["verbs"], json!(["get", "list", "watch"]));
            assert_eq!((&rules[1]["resources"], &rules[1]["verbs"]), (&json!(["pods/status"]), &json!(["patch"])));
            assert_eq!(rules.as_array().unwrap().len(), 2);
            let role = &of_kind(all, "Role").unwrap()["rules"];
            assert_eq!((&role[0]["resourceNames"], &role[0]["verbs"]), (&json!(["ztunnel"]), &json!(["get", "watch"])));
            assert_eq!(role.as_array().unwrap().len(), 1);
            // istiod trusts this account, and istioctl looks for this label.
            assert_eq!(of_kind(all, "ServiceAccount").unwrap()["metadata"]["name"], "ztunnel");
            assert_eq!(set(all)["spec"]["template"]["metadata"]["labels"]["app"], "ztunnel");
            assert_eq!(container(set(all))["args"], json!(["proxy", "ztunnel"]));
        }),
        (json!({"pods": "agent"}), |all| {
            assert_eq!(all.len(), 2, "no rights at the API");
            let context = &container(set(all))["securityContext"]["capabilities"]["add"];
            assert_eq!(context, &json!(["NET_ADMIN", "SYS_ADMIN", "NET_RAW"]));
            let mounts = container(set(all))["volumeMounts"].to_string();
            assert!(mounts.contains("/var/run/ztunnel") && !mounts.contains("/host/proc"), "{mounts}");
            assert_eq!(set(all)["spec"]["template"]["spec"]["automountServiceAccountToken"], false);
        }),
        (
            json!({"hub": "registry.example.com/mesh", "tag": "9", "variant": "debug", "resourceName": "tunnel"}),
            |all| {
                assert_eq!(container(set(all))["image"], "registry.example.com/mesh/culvert:9-debug");
                assert_eq!(set(all)["metadata"]["name"], "tunnel");
                assert_eq!(variable(set(all), "CULVERT_DAEMONSET"), "tunnel");
            },
        ),
        (
            json!({"image": "example.com/x/y:1@sha256:0", "imagePullPolicy": "Always", "imagePullSecrets": ["a"]}),
            |all| {
                assert_eq!(container(set(all))["image"], "example.com/x/y:1@sha256:0");
                assert_eq!(of_kind(all, "ServiceAccount").unwrap()["imagePullSecrets"][0]["name"], "a");
            },
        ),
        (
            json!({"revision": "canary", "network": "n1", "multiCluster": {"clusterName": "c9"}, "logAsJson": true,
                "logLevel": "debug", "istioNamespace": "mesh", "terminationGracePeriodSeconds": 90,
                "labels": {"l": "1"}, "annotations": {"a": "2"}, "podLabels": {"pl": "3"}, "podAnnotations": {"pa": "4"},
                "env": {"SECRET_TTL": "12h"}, "meshConfig": {"defaultConfig": {"proxyMetadata": {"DNS_CAPTURE": "false"}}}}),
            |all| {
                let set = set(all);
                assert_eq!(variable(set, "XDS_ADDRESS"), "istiod-canary.mesh.svc:15012");
                assert_eq!(variable(set, "CA_ADDRESS"), "istiod-canary.mesh.svc:15012");
                assert_eq!(
                    (variable(set, "NETWORK"), variable(set, "ISTIO_META_CLUSTER_ID")),
                    (json!("n1"), json!("c9"))
                );
                assert_eq!((variable(set, "LOG_FORMAT"), variable(set, "RUST_LOG")), (json!("json"), json!("debug")));
                assert_eq!((variable(set, "SECRET_TTL"), variable(set, "DNS_CAPTURE")), (json!("12h"), json!("false")));
                assert_eq!(variable(set, "TERMINATION_GRACE_PERIOD_SECONDS"), "90");
                assert_eq!(set["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 90);
                assert_eq!(set["metadata"]["annotations"], json!({"istio.io/rev": "canary", "a": "2"}));
                assert_eq!(
                    (&set["metadata"]["labels"]["l"], &set["spec"]["template"]["metadata"]["labels"]["pl"]),
                    (&json!("1"), &json!("3"))
                );
            },
        ),
        (
            json!({"caAddress": "ca:1", "xdsAddress": "xds:2", "peerCaCrl": {"enabled": true}, "trustBundleName": "root-cert",
                "resourceQuotas": {"enabled": true}, "global": {"networkPolicy": {"enabled": true}},
                "podMonitor": {"enabled": true}, "seLinuxOptions": {"type": "x_t"}, "dnsPolicy": "Default",
                "dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}, "tolerations": [], "nodeSelector": {"a": "b"},
                "affinity": {"nodeAffinity": {}}, "resources": {"limits": {"cpu": "2", "memory": "1Gi"}},
                "volumes": [{"name": "v", "emptyDir": {}}], "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                "updateStrategy": {"type": "OnDelete"}}),
            |all| {
                let set = set(all);
                assert_eq!(
                    (variable(set, "CA_ADDRESS"), variable(set, "XDS_ADDRESS")),
                    (json!("ca:1"), json!("xds:2"))
                );
                assert!(variable(set, "CRL_PATH").is_string() && variable(set, "ZTUNNEL_RESOURCE_CPU_LIMIT") == "2");
                assert!(set.to_string().contains("istio.io:istiod-ca:root-cert"));
                assert_eq!(container(set)["securityContext"]["seLinuxOptions"]["type"], "x_t");
                for kind in ["NetworkPolicy", "ResourceQuota", "PodMonitor"] {
                    assert!(of_kind(all, kind).is_some(), "{kind}");
                }
                let ports: BTreeSet<u64> = of_kind(all, "NetworkPolicy").unwrap()["spec"]["ingress"][0]["ports"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|port| port["port"].as_u64().unwrap())
                    .collect();
                assert_eq!(ports, [15000, 15001, 15006, 15008, 15020, 15021, 15053].into());
            },
        ),
        (
            json!({"enablementSelectors": [{"podSelector": {"matchLabels": {"a": "b"}}}], "excludeNamespaces": ["x", "y"],
                "dnsCapture": false, "ipv6": false, "endEarlierConnections": true, "stateFile": {"enabled": false},
                "cni": {"enabled": false}, "appArmorProfile": null}),
            |all| {
                let set = set(all);
                assert_eq!(
                    (variable(set, "EXCLUDE_NAMESPACES"), variable(set, "IPV6_ENABLED")),
                    (json!("x,y"), json!("false"))
                );
                assert_eq!(variable(set, "ISTIO_META_DNS_CAPTURE"), "false");
                let selectors = variable(set, "AMBIENT_ENABLEMENT_SELECTOR");
                let read: Value = serde_saphyr::from_str(selectors.as_str().unwrap()).unwrap();
                assert_eq!(read, json!([{"podSelector": {"matchLabels": {"a": "b"}}}]));
                assert!(
                    variable(set, "CULVERT_CNI_BIN_DIR").is_null() && variable(set, "CULVERT_STATE_FILE").is_null()
                );
                assert!(of_kind(all, "Role").is_some(), "the end of its DaemonSet concerns it all the same");
            },
        ),
        (
            json!({"resourceName": "tunnel", "podMonitor": {"enabled": true}, "dashboard": {"enabled": true, "labels": {"of": "mine"}},
                "prometheusRule": {"enabled": true, "labels": {"release": "prometheus"}, "runbook": "https://wiki.example.com/culvert"}}),
            |all| {
                let rule = of_kind(all, "PrometheusRule").unwrap();
                assert_eq!(rule["metadata"]["labels"]["release"], "prometheus");
                let text = rule.to_string();
                assert!(
                    text.contains("https://wiki.example.com/culvert#culvertdown") && !text.contains("example.org"),
                    "{text}"
                );
                assert!(text.contains("{{ $labels.instance }}"), "Prometheus fills in the labels, not helm");
                assert!(
                    text.contains(r#"daemonset=\"tunnel\""#) && !text.contains(r#"daemonset=\"ztunnel\""#),
                    "{text}"
                );
                let map = of_kind(all, "ConfigMap").unwrap();
                assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
                assert_eq!(map["metadata"]["labels"]["of"], "mine");
                let given = fs::read_to_string(root().join("daemonset/chart/monitoring/dashboard.json")).unwrap();
                let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
                assert_eq!(read(map["data"]["culvert.json"].as_str().unwrap()), read(&given));
            },
        ),
        (json!({"platform": "openshift"}), |all| {
            let bindings: Vec<&Value> = all.iter().filter(|document| document["kind"] == "RoleBinding").collect();
            assert!(bindings.iter().any(|binding| binding["roleRef"]["name"] == "system:openshift:scc:privileged"));
            assert_eq!(container(set(all))["securityContext"]["seLinuxOptions"]["type"], "spc_t");
            assert!(set(all).to_string().contains("/etc/cni/multus/net.d"));
        }),
        (json!({"platform": "k3s"}), |all| {
            assert!(set(all).to_string().contains("/var/lib/rancher/k3s/agent/etc/cni/net.d"))
        }),
        (json!({"platform": "gke"}), |all| assert!(set(all).to_string().contains("/home/kubernetes/bin"))),
        (json!({"facts": "file", "certificates": "builtin"}), |all| {
            let set = set(all);
            assert_eq!(variable(set, "LOCAL_XDS_PATH"), "/etc/culvert/mesh/mesh.yaml");
            assert_eq!(variable(set, "CULVERT_CA_DIR"), "/etc/culvert/ca");
            for name in ["XDS_ADDRESS", "CA_ADDRESS", "ISTIO_META_CLUSTER_ID"] {
                assert!(variables(set).iter().all(|(other, _)| other != name), "{name}");
            }
            let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
            let volume = |name: &str| volumes.iter().find(|volume| volume["name"] == name);
            assert!(
                volume("istio-token").is_none() && volume("istiod-ca-cert").is_none(),
                "nothing of Istio's is needed"
            );
            assert_eq!(volume("mesh").unwrap()["configMap"]["name"], "culvert-mesh");
            // Mode 0400: the daemon refuses a key that others can read.
            assert_eq!(volume("ca").unwrap()["secret"], json!({"secretName": "culvert-ca", "defaultMode": 256}));
            let mounts = container(set)["volumeMounts"].as_array().unwrap();
            // A file that is mounted by subPath is never updated.
            assert!(
                mounts
                    .iter()
                    .all(|mount| mount["subPath"].is_null() && volume(mount["name"].as_str().unwrap()).is_some())
            );
        }),
        (
            json!({"facts": "file", "standalone": {"configMap": "facts-of-mine"}, "multiCluster": {"clusterName": "c9"}}),
            |all| {
                let set = set(all);
                assert_eq!(
                    (variable(set, "XDS_ADDRESS"), variable(set, "ISTIO_META_CLUSTER_ID")),
                    (Value::Null, json!("c9"))
                );
                assert!(variable(set, "CA_ADDRESS").is_string() && set.to_string().contains("istio-ca-root-cert"));
                assert!(set.to_string().contains("facts-of-mine") && !set.to_string().contains("culvert-ca"));
            },
        ),
        (json!({"egress": {"configMap": "egress-of-mine"}}), |all| {
            let set = set(all);
            assert_eq!(variable(set, "CULVERT_EGRESS_FILE"), "/etc/culvert/egress/egress.yaml");
            let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
            let volume = volumes.iter().find(|volume| volume["name"] == "egress").unwrap();
            // Not optional: a daemon without the policies would allow everything.
            assert_eq!(volume["configMap"], json!({"name": "egress-of-mine"}));
            let mounts = container(set)["volumeMounts"].as_array().unwrap();
            let mount = mounts.iter().find(|mount| mount["name"] == "egress").unwrap();
            assert_eq!(*mount, json!({"name": "egress", "mountPath": "/etc/culvert/egress", "readOnly": true}));
        }),
        (json!({"certificates": "builtin", "standalone": {"secret": "ca-of-mine"}}), |all| {
            let set = set(all);
            assert_eq!((variable(set, "CA_ADDRESS"), variable(set, "LOCAL_XDS_PATH")), (Value::Null, Value::Null));
            assert!(variable(set, "XDS_ADDRESS").is_string() && set.to_string().contains("istio-ca-root-cert"));
            assert!(set.to_string().contains("ca-of-mine"));
        }),
        // istiod removes the taint of a node once a ready pod with this label is there.
        (json!({"podLabels": {"k8s-app": "istio-cni-node"}}), |all| {
            assert_eq!(set(all)["spec"]["template"]["metadata"]["labels"]["k8s-app"], "istio-cni-node");
            assert_eq!(set(all)["spec"]["selector"]["matchLabels"], json!({"app": "ztunnel"}));
        }),
        (json!({"cleanup": {"enabled": true}}), |all| {
            let set = set(all);
            assert_eq!(set["metadata"]["name"], "ztunnel-cleanup");
            let names: Vec<&str> = all.iter().map(|document| document["metadata"]["name"].as_str().unwrap()).collect();
            assert!(names.iter().all(|name| name.starts_with("ztunnel-cleanup")), "the daemon goes: {names:?}");
            let pod = &set["spec"]["template"]["spec"];
            assert_eq!(pod["hostNetwork"], true, "no pod of it waits for the daemon that is gone");
            assert_eq!(
                (&pod["initContainers"][0]["args"], &container(set)["args"]),
                (&json!(["cleanup", "--once"]), &json!(["cleanup", "--stay"]))
            );
            assert_eq!(pod["initContainers"][0]["env"], container(set)["env"]);
            // The same paths as the daemon's.
            let daemon = documents(&render(&json!({})).unwrap());
            let daemon = of_kind(&daemon, "DaemonSet").unwrap();
            for volume in pod["volumes"].as_array().unwrap() {
                // It does not create folders for CNI files: a path that does not exist is an error.
                let mut volume = volume.clone();
                if volume["name"].as_str().unwrap().starts_with("cni-") {
                    assert_eq!(volume["hostPath"]["type"], "Directory", "{volume}");
                    volume["hostPath"]["type"] = json!("DirectoryOrCreate");
                }
                assert!(
                    daemon["spec"]["template"]["spec"]["volumes"].as_array().unwrap().contains(&volume),
                    "{volume}"
                );
            }
            for name in
                ["CULVERT_PODS", "CULVERT_PROC", "CULVERT_CNI_BIN_DIR", "CULVERT_CNI_CONF_DIR", "CULVERT_STATE_FILE"]
            {
                assert_eq!(variable(set, name), variable(daemon, name), "{name}");
            }
            let rules = &of_kind(all, "ClusterRole").unwrap()["rules"];
            assert_eq!((&rules[0]["verbs"], &rules[1]["verbs"]), (&json!(["list"]), &json!(["patch"])));
        }),
        (
            json!({"cleanup": {"enabled": true}, "platform": "openshift", "resourceQuotas": {"enabled": true},
                "env": {"CULVERT_STATE_FILE": "/var/lib/culvert/other.state"}}),
            |all| {
                assert_eq!(
                    of_kind(all, "ResourceQuota").unwrap()["metadata"]["name"],
                    "ztunnel-cleanup-resource-quota"
                );
                let binding = of_kind(all, "RoleBinding").unwrap();
                assert_eq!(binding["metadata"]["name"], "ztunnel-cleanup-scc");
                assert_eq!(binding["subjects"][0]["name"], "ztunnel-cleanup");
                let other = json!({"name": "CULVERT_STATE_FILE", "value": "/var/lib/culvert/other.state"});
                assert!(container(set(all))["env"].as_array().unwrap().contains(&other));
            },
        ),
        (json!({"resourceName": "1e3", "facts": "file", "standalone": {"configMap": "0x1"}}), |all| {
            assert_eq!(set(all)["metadata"]["name"], "1e3");
        }),
        (
            json!({"control": {"enabled": true, "replicas": 3, "issuer": "ClusterIssuer/mesh", "env": {"CULVERT_CONTROL_PORT": "15012"}, "nodeSelector": {"a": "b"},
                "tolerations": [{"operator": "Exists"}], "podLabels": {"pl": "3"}}, "podMonitor": {"enabled": true},
                "global": {"networkPolicy": {"enabled": true}}, "multiCluster": {"clusterName": "c9"}, "resourceName": "tunnel"}),
            |all| {
                let of_control = named(all, "Deployment", "culvert-control");
                assert_eq!(of_control["spec"]["replicas"], 3);
                let pod = &of_control["spec"]["template"]["spec"];
                assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux", "a": "b"}));
                assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
                assert_eq!(
                    (variable(of_control, "CLUSTER_ID"), variable(of_control, "CULVERT_CONTROL_PORT")),
                    (json!("c9"), json!("15012"))
                );
                assert_eq!(variable(of_control, "CA_TRUSTED_NODE_ACCOUNTS"), "istio-system/tunnel");
                assert_eq!(variable(of_control, "CULVERT_CONTROL_CA_ISSUER"), "ClusterIssuer/mesh");
                let rights = rights(named(all, "Role", "culvert-control"));
                assert!(
                    rights.contains(&"cert-manager.io/certificaterequests[]: create get delete".to_owned()),
                    "{rights:?}"
                );
                let set = named(all, "DaemonSet", "tunnel");
                assert_eq!(variable(set, "ISTIO_META_CLUSTER_ID"), "c9", "both know the cluster by one name");
                named(all, "PodMonitor", "culvert-control");
                for kind in ["authorizationpolicies", "peerauthentications"] {
                    let kind = named(all, "CustomResourceDefinition", &format!("{kind}.security.istio.io"));
                    assert_eq!(
                        kind["metadata"]["annotations"]["helm.sh/resource-policy"], "keep",
                        "policies outlive it"
                    );
                }
                let ports = &named(all, "NetworkPolicy", "culvert-control")["spec"]["ingress"][0]["ports"];
                let ports: Vec<u64> =
                    ports.as_array().unwrap().iter().map(|port| port["port"].as_u64().unwrap()).collect();
                assert_eq!(ports, [15012, 15020, 15021], "the debug port is on loopback");
            },
        ),
        (json!({"control": {"enabled": true}, "resourceScope": "cluster"}), |all| {
            assert!(all.iter().all(|document| document["metadata"]["namespace"].is_null()));
            named(all, "ClusterRole", "culvert-control-istio-system");
        }),
        (json!({"control": {"enabled": true}, "cleanup": {"enabled": true}}), |all| {
            assert!(of_kind(all, "Deployment").is_none(), "the control plane goes with the daemon");
        }),
        (json!({"resourceScope": "cluster"}), |all| {
            assert!(all.iter().all(|document| document["metadata"]["namespace"].is_null()) && all.len() == 2);
        }),
        (json!({"resourceScope": "namespace"}), |all| {
            assert!(all.iter().all(|document| document["metadata"]["namespace"] == "istio-system") && all.len() == 4);
        }),
    ]
}

#[test]
fn the_chart_renders_what_kubernetes_understands_for_every_value() {
    tool("helm", &["lint", "--strict", "daemonset/chart"]).unwrap();
    let mut touched = BTreeSet::new();
    for (values, expect) in cases() {
        touched.extend(values.as_object().unwrap().keys().cloned());
        let all = documents(&render(&values).unwrap_or_else(|error| panic!("{values}: {error}")));
        all.iter().for_each(check);
        expect(&all);
    }
    let defaults: Value =
        serde_saphyr::from_str(&fs::read_to_string(root().join("daemonset/chart/values.yaml")).unwrap()).unwrap();
    let untouched: Vec<&String> = defaults.as_object().unwrap().keys().filter(|key| !touched.contains(*key)).collect();
    // The first case checks their defaults.
    assert_eq!(untouched, ["seccompProfile"], "a value that no case sets");
    for (bad, word) in [
        (json!({"pods": "labels"}), "is not kubernetes or agent"),
        (json!({"pods": "agent", "cleanup": {"enabled": true}}), "a daemon cannot be seen"),
        (json!({"resourceScope": "some"}), "is not all, namespace or cluster"),
        (json!({"platform": "mine"}), "is not known"),
        (json!({"facts": "files"}), "facts: \"files\" is not istiod or file"),
        (json!({"certificates": "self"}), "certificates: \"self\" is not istiod or builtin"),
        (json!({"facts": "file", "xdsAddress": "x:1"}), "xdsAddress: is set"),
        (json!({"certificates": "builtin", "caAddress": "x:1"}), "caAddress: is set"),
        (json!({"facts": "file", "standalone": {"configMap": ""}}), "standalone.configMap: is empty"),
        (json!({"certificates": "builtin", "standalone": {"secret": ""}}), "standalone.secret: is empty"),
        (json!({"facts": "file", "egress": {"configMap": "x"}}), "egress.configMap: is set"),
        (json!({"control": {"enabled": true}, "facts": "file"}), "leave facts and certificates"),
        (json!({"control": {"enabled": true}, "certificates": "builtin"}), "leave facts and certificates"),
        (json!({"control": {"enabled": true}, "xdsAddress": "x:1"}), "leave xdsAddress and caAddress"),
        (json!({"control": {"enabled": true}, "revision": "a"}), "leave revision"),
        (json!({"control": {"enabled": true, "replicas": 0}}), "control.replicas"),
    ] {
        let error = render(&bad).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_is_applied_by_hand_is_what_the_chart_gives() {
    let check_only = Command::new(root().join("scripts/manifests")).arg("--check").output().unwrap();
    assert!(check_only.status.success(), "{}", String::from_utf8_lossy(&check_only.stderr));
    let built = documents(&tool("kustomize", &["build", "daemonset"]).unwrap());
    built.iter().for_each(check);
    let rendered = documents(&render(&json!({})).unwrap());
    let kinds = |all: &[Value]| all.iter().map(|document| document["kind"].to_string()).collect::<BTreeSet<_>>();
    assert_eq!(kinds(&built), kinds(&rendered));
    assert_eq!(of_kind(&built, "DaemonSet"), of_kind(&rendered, "DaemonSet"));
    let built = documents(&tool("kustomize", &["build", "daemonset/cleanup"]).unwrap());
    built.iter().for_each(check);
    assert_eq!(of_kind(&built, "DaemonSet").unwrap()["metadata"]["name"], "ztunnel-cleanup");
    let built = documents(&tool("kustomize", &["build", "daemonset/monitoring"]).unwrap());
    built.iter().for_each(check);
    assert_eq!(kinds(&built), ["\"ConfigMap\"", "\"PodMonitor\"", "\"PrometheusRule\""].map(str::to_owned).into());
    let beside_an_agent = fs::read_to_string(root().join("daemonset/daemonset.yaml")).unwrap();
    documents(&beside_an_agent).iter().for_each(check);
}

/// The rules of a role as lines: group, resources, names and verbs.
fn rights(role: &Value) -> Vec<String> {
    let words = |list: &Value| {
        let words = list.as_array().into_iter().flatten().map(|word| word.as_str().unwrap());
        words.collect::<Vec<_>>().join(" ")
    };
    let line = |rule: &Value| {
        assert_eq!(rule["nonResourceURLs"], Value::Null);
        let [groups, resources, names, verbs] =
            ["apiGroups", "resources", "resourceNames", "verbs"].map(|key| words(&rule[key]));
        format!("{groups}/{resources}[{names}]: {verbs}")
    };
    role["rules"].as_array().unwrap().iter().map(line).collect()
}

#[test]
fn a_mesh_without_istio_is_one_folder() {
    let all = documents(&tool("kustomize", &["build", "daemonset/alone"]).unwrap());
    all.iter().for_each(check);
    // What the chart gives with one value, in a namespace that comes with it.
    let rendered = documents(&render(&json!({"control": {"enabled": true}})).unwrap());
    let names = |all: &[Value]| {
        let name = |document: &Value| format!("{} {}", document["kind"], document["metadata"]["name"]);
        all.iter().map(name).collect::<BTreeSet<_>>()
    };
    let namespace = BTreeSet::from(["\"Namespace\" \"istio-system\"".to_owned()]);
    assert_eq!(names(&all), names(&rendered).union(&namespace).cloned().collect());
    for (kind, name) in [("Deployment", "culvert-control"), ("DaemonSet", "ztunnel"), ("Service", "culvert-control")] {
        assert_eq!(named(&all, kind, name), named(&rendered, kind, name));
    }
    // The daemons use it, and nothing of Istio's.
    let set = named(&all, "DaemonSet", "ztunnel");
    for name in ["XDS_ADDRESS", "CA_ADDRESS"] {
        assert_eq!(variable(set, name), "culvert-control.istio-system.svc:15012");
    }
    let without = documents(&render(&json!({})).unwrap());
    let mut same = set.clone();
    for entry in same["spec"]["template"]["spec"]["containers"][0]["env"].as_array_mut().unwrap() {
        if entry["value"] == "culvert-control.istio-system.svc:15012" {
            entry["value"] = json!("istiod.istio-system.svc:15012");
        }
    }
    assert_eq!(same, *of_kind(&without, "DaemonSet").unwrap(), "the daemon differs in nothing else");
    let service = named(&all, "Service", "culvert-control");
    let of_control = named(&all, "Deployment", "culvert-control");
    let labels = of_control["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    for selector in [
        &service["spec"]["selector"],
        &of_control["spec"]["selector"]["matchLabels"],
        &named(&all, "PodDisruptionBudget", "culvert-control")["spec"]["selector"]["matchLabels"],
    ] {
        assert!(selector.as_object().unwrap().iter().all(|(key, value)| labels[key] == *value), "{selector}");
    }
    assert_eq!(labels["istio.io/dataplane-mode"], "none", "the daemons need it before they can capture anything");
    for port in service["spec"]["ports"].as_array().unwrap() {
        let ports = container(of_control)["ports"].as_array().unwrap();
        assert!(ports.iter().any(|other| other["containerPort"] == port["targetPort"]));
    }
}

#[test]
fn the_control_plane_may_do_what_it_does_and_no_more() {
    let all = documents(&tool("kustomize", &["build", "daemonset/alone"]).unwrap());
    assert_eq!(
        rights(named(&all, "ClusterRole", "culvert-control-istio-system")),
        [
            "/pods services nodes namespaces[]: list watch",
            "discovery.k8s.io/endpointslices[]: list watch",
            "security.istio.io/authorizationpolicies peerauthentications[]: get list watch",
            "gateway.networking.k8s.io/gateways[]: list watch",
            "security.istio.io/authorizationpolicies/status peerauthentications/status[]: patch",
            "authentication.k8s.io/tokenreviews[]: create",
            "/configmaps[]: create",
            "/configmaps[istio-ca-root-cert istio-ca-crl]: list watch patch",
        ]
    );
    assert_eq!(
        rights(named(&all, "Role", "culvert-control")),
        ["/secrets[]: create", "/secrets[culvert-ca cacerts istio-ca-secret]: get", "/secrets[culvert-ca]: patch",]
    );
    let of_control = named(&all, "Deployment", "culvert-control");
    let pod = &of_control["spec"]["template"]["spec"];
    assert_eq!(pod["serviceAccountName"], "culvert-control");
    assert_eq!(pod["enableServiceLinks"], false, "the variables of its Service have names of settings");
    assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&Value::Null, &Value::Null));
    let volumes = pod["volumes"].as_array().cloned().unwrap_or_default();
    assert!(volumes.iter().all(|volume| volume["hostPath"].is_null()), "{volumes:?}");
    let context = &pod["securityContext"];
    assert_eq!(
        (&context["runAsNonRoot"], &context["seccompProfile"]["type"]),
        (&json!(true), &json!("RuntimeDefault"))
    );
    assert_ne!(context["runAsUser"], 0);
    let context = &container(of_control)["securityContext"];
    assert_eq!(
        (&context["allowPrivilegeEscalation"], &context["readOnlyRootFilesystem"], &context["capabilities"]),
        (&json!(false), &json!(true), &json!({"drop": ["ALL"]}))
    );
    assert!(container(of_control)["resources"]["requests"]["memory"].is_string());
    // Two replicas, of which one is always there.
    assert_eq!(of_control["spec"]["replicas"], 2);
    assert_eq!(of_control["spec"]["strategy"]["rollingUpdate"], json!({"maxSurge": 1, "maxUnavailable": 0}));
    assert_eq!(named(&all, "PodDisruptionBudget", "culvert-control")["spec"]["maxUnavailable"], 1);
    let probe = &container(of_control)["readinessProbe"]["httpGet"];
    assert_eq!((&probe["port"], &probe["path"]), (&json!(15021), &json!("/healthz/ready")));
}

fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool").args(arguments).current_dir(root()).output();
    let output = output.expect("promtool is not there: scripts/test installs it");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&said));
}

#[test]
fn each_alert_fires_when_it_should_and_only_then() {
    let (rules, cases) = ("daemonset/chart/monitoring/alerts.yaml", "daemonset/alerts.test.yaml");
    promtool(&["check", "rules", "--lint-fatal", rules]);
    promtool(&["test", "rules", cases]);
    let read = |file: &str| serde_saphyr::from_str::<Value>(&fs::read_to_string(root().join(file)).unwrap()).unwrap();
    let (rules, cases) = (read(rules), read(cases));
    let alerts: Vec<&Value> =
        rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    assert!(alerts.len() > 15);
    for alert in alerts {
        let name = alert["alert"].as_str().unwrap();
        let case = cases["tests"].as_array().unwrap().iter().find(|case| case["name"] == name);
        let case = case.unwrap_or_else(|| panic!("{name} has no case"));
        let fired = case["alert_rule_test"][0]["exp_alerts"].as_array().unwrap();
        assert_eq!((&case["alert_rule_test"][0]["alertname"], fired.len()), (&json!(name), 1), "{name} fires once");
        // Of what one process does, and not of what others do. Two rules are about what runs them.
        let series = |of: &str| {
            case["input_series"].as_array().unwrap().iter().any(|one| one["series"].to_string().contains(of))
        };
        let labels = &fired[0]["exp_labels"];
        let [bad, good] = match (labels["daemonset"].is_string(), labels["deployment"].is_string()) {
            (true, _) => [r#"daemonset=\"ztunnel\""#, r#"daemonset=\"other\""#],
            (_, true) => [r#"deployment=\"culvert-control\""#, r#"deployment=\"other\""#],
            _ => [r#"instance=\"n1\""#, r#"instance=\"n2\""#],
        };
        assert!(series(bad) && series(good), "{name}: one series fires it and one does not");
    }
}

/// Variables that are not settings: the runtime's, one that only ztunnel reads, and those with a prefix.
const OTHERS: [&str; 4] = ["RUST_BACKTRACE", "INPOD_ENABLED", "ISTIO_META_CLUSTER_ID", "DNS_CAPTURE"];

#[test]
fn manifests_set_what_the_daemon_reads_and_name_the_ports_it_has() {
    let source = |file: &str| fs::read_to_string(root().join("src").join(file)).unwrap();
    let files = fs::read_dir(root().join("src/config/settings")).unwrap();
    let settings: String = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    let document = fs::read_to_string(root().join("docs/settings.md")).unwrap();
    for (values, _) in cases() {
        let all = documents(&render(&values).unwrap());
        let Some(set) = of_kind(&all, "DaemonSet") else { continue };
        let controls = all.iter().filter(|document| document["kind"] == "Deployment").flat_map(variables);
        for (name, _) in controls.filter(|(name, _)| !OTHERS.contains(&name.as_str())) {
            assert!(settings.contains(&format!("\"{name}\"")), "nobody reads {name}");
            assert!(document.contains(&format!("`{name}`")), "docs/settings.md does not name {name}");
        }
        for (name, _) in variables(set).iter().filter(|(name, _)| !OTHERS.contains(&name.as_str())) {
            assert!(settings.contains(&format!("\"{name}\"")), "nobody reads {name}");
            assert!(document.contains(&format!("`{name}`")), "docs/settings.md does not name {name}");
        }
        let Some(ports) = container(set)["ports"].as_array() else {
            assert_eq!(set["metadata"]["name"], "ztunnel-cleanup", "only the daemon listens");
            continue;
        };
        assert_eq!(ports[0]["containerPort"], 15020);
    }
    let ports = source("ports.rs");
    for constant in ["ADMIN: u16 = 15000", "STATS: u16 = 15020", "READY: u16 = 15021"] {
        assert!(ports.contains(constant), "{constant}");
    }
    // Defaults that stand in the daemon and in the chart.
    let defaults = settings;
    for (file, text) in [("values.yaml", "resourceName: ztunnel"), ("values.yaml", "- kube-system")] {
        assert!(fs::read_to_string(Path::new(&root()).join("daemonset/chart").join(file)).unwrap().contains(text));
        assert!(defaults.contains(text.rsplit([' ', ':']).next().unwrap()));
    }
}

#[test]
fn what_captures_itself_has_the_rights_that_it_needs_and_settings_that_the_daemon_reads() {
    let document = fs::read_to_string(root().join("docs/settings.md")).unwrap();
    let is_setting = |name: &str| {
        let known = document.contains(&format!("`{name}`")) || OTHERS.contains(&name);
        assert!(known || name.starts_with("ISTIO_META_"), "docs/settings.md does not name {name}");
    };
    let all = documents(&fs::read_to_string(root().join("daemonset/sidecar/job.yaml")).unwrap());
    all.iter().for_each(check);
    let pod = &of_kind(&all, "Job").unwrap()["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"]["istio.io/dataplane-mode"], "none", "no node captures it");
    let [redirect, daemon] = [0, 1].map(|at| &pod["spec"]["initContainers"][at]);
    let value = |container: &Value, name: &str| {
        let all = container["env"].as_array().unwrap();
        all.iter().find(|entry| entry["name"] == name).map_or(Value::Null, |entry| entry["value"].clone())
    };
    for container in [redirect, daemon] {
        container["env"].as_array().unwrap().iter().for_each(|entry| is_setting(entry["name"].as_str().unwrap()));
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    }
    assert_eq!(redirect["securityContext"]["capabilities"]["add"], json!(["NET_ADMIN", "NET_RAW"]));
    assert_eq!(daemon["securityContext"]["capabilities"]["add"], Value::Null);
    for name in ["CULVERT_REDIRECT_UID", "IPV6_ENABLED", "ISTIO_META_DNS_CAPTURE"] {
        assert!(value(redirect, name).is_string() && value(redirect, name) == value(daemon, name), "{name}");
    }
    assert_eq!(value(daemon, "CULVERT_REDIRECT_UID"), daemon["securityContext"]["runAsUser"].to_string());
    // A native sidecar, which the application waits for and whose end ends it.
    assert_eq!((&redirect["restartPolicy"], &daemon["restartPolicy"]), (&Value::Null, &json!("Always")));
    assert_eq!(daemon["startupProbe"]["httpGet"], json!({"port": 15021, "path": "/healthz/ready"}));

    let unit = fs::read_to_string(root().join("daemonset/systemd/culvert.service")).unwrap();
    let given = |key: &str| unit.lines().filter_map(|line| line.strip_prefix(key)).collect::<Vec<_>>();
    for assignment in given("Environment=").into_iter().chain(given("#   ")) {
        if let Some((name, _)) = assignment.split_once('=').filter(|(name, _)| !name.contains(' ')) {
            is_setting(name);
        }
    }
    assert!(given("Environment=").contains(&format!("CULVERT_REDIRECT_UID={}", given("User=")[0]).as_str()));
    assert_eq!(given("ExecStartPre="), ["+/usr/local/bin/culvert redirect"]);
}

/// `helm install` and `helm upgrade` of the chart as the documents print them, line ends with a backslash joined.
fn helm_commands() -> Vec<String> {
    let folder = |path: &str| fs::read_dir(root().join(path)).unwrap().map(|entry| entry.unwrap().path());
    let files = folder("").chain(folder("docs")).filter(|path| path.extension().is_some_and(|end| end == "md"));
    let texts = files.map(|path| fs::read_to_string(path).unwrap().replace("\\\n", " "));
    let lines = texts.flat_map(|text| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>());
    lines.filter(|line| line.starts_with("helm ") && line.contains("daemonset/chart")).collect()
}

#[test]
fn helm_commands_in_the_documents_render() {
    let commands = helm_commands();
    assert!(commands.len() > 3, "the commands were found: {commands:?}");
    for command in commands {
        let mut words = command.split_whitespace().skip(2).peekable();
        let mut arguments = vec!["template".to_owned(), "--kube-version".into(), "1.33.0".into()];
        while let Some(word) = words.next() {
            match word {
                // Options for installed releases, and the reader's own values.
                "--reuse-values" | "--reset-then-reuse-values" | "--wait" => {}
                "-f" if words.peek().is_some_and(|file| file.chars().all(char::is_uppercase)) => drop(words.next()),
                "-f" => panic!("{command}: a file of the reader's is written in capitals"),
                word => arguments.push(word.replace("\"$IMAGE\"", "registry.example.com/culvert:1")),
            }
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let rendered = tool("helm", &arguments).unwrap_or_else(|error| panic!("{command}: {error}"));
        let all = documents(&rendered);
        all.iter().for_each(check);
        if command.contains("image=") {
            let image = &container(of_kind(&all, "DaemonSet").unwrap())["image"];
            assert_eq!(image, "registry.example.com/culvert:1", "{command}");
        }
    }
}
