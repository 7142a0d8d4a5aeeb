//! A mesh by itself: `culvert control` serves facts and certificates from a Kubernetes API, to two nodes that know nothing
//! else.

use crate::world::certs::spiffe;
use crate::world::cluster_api::{AUTHENTICATION, AUTHORIZATION, ClusterApi};
use crate::world::sniffer::Sniffer;
use crate::world::{Agent, Pod, World, alive, apps, ask, connect, eventually, http, inside, subject};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;

const PODS: &str = "api/v1/pods";
const SERVICES: &str = "api/v1/services";
const SLICES: &str = "apis/discovery.k8s.io/v1/endpointslices";

/// Two nodes, a client on the first and a server on the second, and a place for each of two control planes.
pub struct Mesh {
    pub w: World,
    pub api: ClusterApi,
    agents: [Agent; 2],
    controls: [Pod; 2],
    /// The file of roots, as the kubelet mounts it.
    pub root_file: PathBuf,
}

/// A running pod.
fn pod(name: &str, account: &str, node: u8, ips: &[String], annotations: Value) -> Value {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {"uid": format!("uid-{name}"), "labels": {"app": name}, "annotations": annotations},
        "spec": {"nodeName": format!("n{node}"), "serviceAccountName": account, "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": ips.first().map(|ip| ip["ip"].clone()), "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn captured() -> Value {
    json!({"ambient.istio.io/redirection": "enabled"})
}

fn ips(pod: &Pod) -> Vec<String> {
    vec![pod.v4.to_string(), pod.v6.to_string()]
}

impl Mesh {
    pub fn new() -> Self {
        let mut w = World::new();
        let (client, server) = (w.mesh_pod("client", 1), w.mesh_pod("server", 2));
        apps::serve(&server.netns, 8080, apps::who);
        apps::serve(&server.netns, 9000, apps::echo);
        let controls = [w.add_pod("control-1", 1), w.add_pod("control-2", 2)];
        let agents = [1, 2].map(|node| Agent::start(&w.dir.join(format!("zds{node}.sock"))));
        let api = ClusterApi::start(&w);
        for (name, labels) in [("istio-system", json!({})), ("ns", json!({"istio.io/dataplane-mode": "ambient"}))] {
            api.put("api/v1/namespaces", name, Some(json!({"metadata": {"labels": labels}})));
        }
        for node in [1, 2] {
            let name = format!("ztunnel-{node}");
            let labels =
                json!({"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": format!("z{node}")});
            api.put("api/v1/nodes", &format!("n{node}"), Some(json!({"metadata": {"labels": labels}})));
            let own = pod(&name, "ztunnel", node, &[format!("172.30.0.{node}")], json!({}));
            api.put(PODS, &format!("istio-system/{name}"), Some(own));
            let token = ["istio-system", "ztunnel", &name, &format!("uid-{name}"), &format!("n{node}")];
            api.state().tokens.insert(format!("token-{node}"), token.map(ToOwned::to_owned));
            std::fs::write(w.dir.join(format!("token-{node}")), format!("token-{node}")).unwrap();
        }
        for of in [&client, &server] {
            api.put(PODS, &format!("ns/{}", of.name), Some(pod(&of.name, &of.name, of.node, &ips(of), captured())));
            agents[usize::from(of.node) - 1].know(of);
            Agent::redirect(of);
        }
        let root_file = w.dir.join("root-cert.pem");
        Self { w, api, agents, controls, root_file }
    }

    /// Starts a control plane and waits until it is ready.
    fn start_control(&mut self, number: usize) -> u32 {
        self.start_control_with(number, &[])
    }

    /// The same with further settings.
    pub fn start_control_with(&mut self, number: usize, settings: &[(&str, &str)]) -> u32 {
        let mut command = Command::new(subject());
        command.arg("control").env("KUBECONFIG", &self.api.kubeconfig).env("POD_NAMESPACE", "istio-system");
        command.env("CLUSTER_ID", "c1").env("LOG_FORMAT", "json").env("RUST_BACKTRACE", "0");
        command.envs(settings.iter().copied());
        let ns = self.controls[number].netns.clone();
        let pid = self.w.start_in(&ns, &mut command, &format!("control-{number}.log"));
        eventually("the control plane is ready", || {
            self.control(number, 15021, "/healthz/ready").is_some_and(|a| a.0 == 200)
        });
        eventually("its roots are in every namespace", || {
            let map = self.api.get("api/v1/configmaps", "istio-system/istio-ca-root-cert");
            let Some(root) = map.and_then(|map| map["data"]["root-cert.pem"].as_str().map(ToOwned::to_owned)) else {
                return false;
            };
            std::fs::write(&self.root_file, root).unwrap();
            self.api.get("api/v1/configmaps", "ns/istio-ca-root-cert").is_some()
        });
        pid
    }

    fn control(&self, number: usize, port: u16, path: &str) -> Option<(u16, String)> {
        inside(&self.controls[number].netns, move || http(port, "GET", path, "localhost"))
    }

    fn control_json(&self, number: usize, path: &str) -> Value {
        let (status, body) = self.control(number, 15000, path).expect("the debug port answers");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub fn control_log(&self, number: usize) -> Vec<Value> {
        let text = std::fs::read_to_string(self.w.logs.join(format!("control-{number}.log"))).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Starts a node's daemon with what its chart sets, by the token of `token`'s pod.
    pub fn start_node(&mut self, node: u8, control: usize, settings: &[(&str, &str)]) -> u32 {
        let address = format!("{}:15012", self.controls[control].v4);
        let host = "istiod.istio-system.svc";
        let mut command = Command::new(subject());
        command.args(["proxy", "ztunnel"]).env("XDS_ADDRESS", &address).env("CA_ADDRESS", &address);
        command.env("ALT_XDS_HOSTNAME", host).env("ALT_CA_HOSTNAME", host);
        command.env("XDS_ROOT_CA", &self.root_file).env("CA_ROOT_CA", &self.root_file);
        command.env("AUTH_TOKEN", self.w.dir.join(format!("token-{node}")));
        command.env("INPOD_UDS", &self.agents[usize::from(node) - 1].path).env("LOG_FORMAT", "json");
        command.env("NODE_NAME", format!("n{node}")).env("ISTIO_META_CLUSTER_ID", "c1").env("RUST_LOG", "info");
        command.env("POD_NAME", format!("ztunnel-{node}")).env("POD_NAMESPACE", "istio-system");
        command.env("SERVICE_ACCOUNT", "ztunnel").env("INSTANCE_IP", format!("172.30.0.{node}"));
        command.envs(settings.iter().copied());
        let ns = self.w.ns(&format!("n{node}"));
        self.w.start_in(&ns, &mut command, &format!("node{node}.log"))
    }

    fn start_nodes(&mut self, settings: &[(&str, &str)]) {
        for node in [1, 2] {
            self.start_node(node, 0, settings);
        }
        for node in [1, 2] {
            eventually("the node is ready", || self.w.is_ready(node));
            self.w.wait_captured(node);
        }
    }

    pub fn server(&self) -> IpAddr {
        self.w.pods.iter().find(|pod| pod.name == "server").unwrap().v4
    }

    pub fn request(&self) -> std::io::Result<String> {
        ask(&self.w.ns("client"), (self.server(), 8080), "x")
    }

    /// What a node knows: workloads, services and policies.
    fn known(&self, node: u8) -> [Value; 3] {
        let mut dump = self.w.json(node, "/config_dump");
        ["workloads", "services", "policies"].map(|what| dump[what].take())
    }

    /// What a control plane serves, in the same form.
    fn served(&self, number: usize) -> [Value; 3] {
        let mut dump = self.control_json(number, "/config_dump");
        ["workloads", "services", "policies"].map(|what| dump[what].take())
    }

    fn policy(&self, name: &str, spec: Option<Value>) {
        let object = spec.map(|spec| {
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"generation": 1}, "spec": spec})
        });
        self.api.put(AUTHORIZATION, &format!("ns/{name}"), object);
    }
}

#[test]
fn without_istio_pods_talk_mutual_tls_under_policies_and_go_on_while_it_is_away() {
    let mut mesh = Mesh::new();
    let pid = mesh.start_control(0);
    mesh.start_nodes(&[]);
    let canary = "canary-of-the-control-plane";
    let sniffer = Sniffer::start(&mut mesh.w, "control", canary);
    let answer = ask(&mesh.w.ns("client"), (mesh.server(), 8080), canary).unwrap();
    assert!(answer.ends_with(canary), "{answer}");
    assert_eq!(sniffer.found(&mut mesh.w), 0, "nothing is on the wire in the clear");
    let by = |l: &Value| l["direction"] == "inbound" && l["message"] == "connection complete";
    let line = mesh.w.log_line(2, "inbound", by);
    assert_eq!(line["src.identity"], spiffe("client"), "{line}");

    // A policy refuses, and its object says that it is in force. The open connection ends.
    let mut open = connect(&mesh.w.ns("client"), (mesh.server(), 9000)).unwrap();
    assert!(alive(&mut open));
    let rules = json!([{"from": [{"source": {"principals": ["cluster.local/ns/ns/sa/client"]}}]}]);
    mesh.policy("no-client", Some(json!({"action": "DENY", "rules": rules})));
    eventually("it is refused", || mesh.request().is_err());
    eventually("the open connection has ended", || !alive(&mut open));
    eventually("the object says so", || {
        let object = mesh.api.get(AUTHORIZATION, "ns/no-client").unwrap();
        object["status"]["conditions"][0]["status"] == "True"
    });
    mesh.policy("no-client", None);
    eventually("it is allowed again", || mesh.request().is_ok());

    // Every peer has to show who it is.
    let strict = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"generation": 1},
        "spec": {"mtls": {"mode": "STRICT"}}});
    let node = mesh.w.ns("n1");
    assert!(ask(&node, (mesh.server(), 8080), "x").is_ok_and(|answer| !answer.is_empty()), "plaintext is allowed");
    mesh.api.put(AUTHENTICATION, "ns/default", Some(strict));
    eventually("plaintext from the node is refused", || {
        ask(&node, (mesh.server(), 8080), "x").map_or(true, |answer| answer.is_empty())
    });
    assert!(mesh.request().is_ok());

    // Killed: what is known stays in force. It comes back with the same root, and changes arrive again.
    let mut open = connect(&mesh.w.ns("client"), (mesh.server(), 9000)).unwrap();
    assert!(alive(&mut open));
    mesh.w.take(pid).kill();
    eventually("it is seen to be away", || mesh.w.json(2, "/config_dump")["meshState"]["stale"] == true);
    for _ in 0..10 {
        mesh.request().unwrap();
    }
    assert!(alive(&mut open), "an open connection goes on");
    let root = std::fs::read(&mesh.root_file).unwrap();
    mesh.policy("no-client", Some(json!({"action": "DENY", "rules": rules})));
    let pid = mesh.start_control(0);
    assert!(root == std::fs::read(&mesh.root_file).unwrap(), "it has the same root");
    eventually("the change is known", || mesh.request().is_err());
    mesh.policy("no-client", None);
    eventually("and the next", || mesh.request().is_ok());

    // The daemons are shown, and acknowledge what they are told.
    let nodes = mesh.control_json(0, "/nodes");
    let of: BTreeMap<&str, &Value> =
        nodes.as_array().unwrap().iter().map(|node| (node["node"].as_str().unwrap(), node)).collect();
    assert_eq!(of.keys().copied().collect::<Vec<_>>(), ["n1", "n2"], "{nodes:#}");
    for node in of.values() {
        assert_eq!((&node["account"], &node["addresses"]["refused"]), (&json!("istio-system/ztunnel"), &json!(0)));
        assert_eq!(node["addresses"]["sent"], node["addresses"]["acknowledged"], "{node}");
    }
    let dump = mesh.control(0, 15000, "/config_dump").unwrap().1;
    assert!(!dump.contains("PRIVATE KEY") && dump.contains("BEGIN CERTIFICATE"));

    // It ends in order, and daemons find that orderly.
    let mut control = mesh.w.take(pid);
    control.signal(Signal::SIGTERM);
    assert!(control.wait().success());
    assert!(mesh.control_log(0).iter().any(|line| line["message"] == "ended"));
    mesh.w.log_line(2, "orderly", |l| l["message"].as_str().is_some_and(|said| said.contains("in an orderly way")));
    mesh.request().unwrap();
}

#[test]
fn daemons_get_certificates_for_their_own_pods_and_strangers_get_nothing() {
    let mut mesh = Mesh::new();
    mesh.start_control(0);
    // A token that the API does not know, and one of an application.
    mesh.api
        .state()
        .tokens
        .insert("token-app".into(), ["ns", "client", "client", "uid-client", "n1"].map(ToOwned::to_owned));
    for (token, says) in [("nobody", "the token is not known"), ("token-app", "ns/client may not have mesh facts")] {
        std::fs::write(mesh.w.dir.join("token-1"), token).unwrap();
        let pid = mesh.start_node(1, 0, &[]);
        mesh.w.log_line(1, says, |l| l["error"].as_str().is_some_and(|error| error.contains(says)));
        assert!(!mesh.w.is_ready(1));
        mesh.w.take(pid).kill();
    }
    let refused = |status: &str| {
        let (_, text) = mesh.control(0, 15020, "/metrics").unwrap();
        let line = format!("culvert_control_calls_total{{call=\"facts\",status=\"{status}\"}}");
        text.lines().any(|l| l.starts_with(&line) && !l.ends_with(" 0"))
    };
    assert!(refused("Unauthenticated") && refused("PermissionDenied"));
    // A daemon that asks for a pod of the other node, as a compromised one would: the first node's token on the second.
    std::fs::write(mesh.w.dir.join("token-2"), "token-1").unwrap();
    mesh.start_node(2, 0, &[]);
    eventually("the second node is served its facts", || {
        mesh.w.try_get(2, 15000, "/config_dump").is_some_and(|(_, dump)| dump.contains("c1//Pod/ns/server"))
    });
    eventually("no certificate for the server", || {
        mesh.control(0, 15020, "/metrics").unwrap().1.lines().any(|l| {
            l.starts_with("culvert_control_certificates_refused_total{reason=\"not_on_node\"}") && !l.ends_with(" 0")
        })
    });
    assert!(mesh.control_log(0).iter().any(|l| l["identity"] == spiffe("server")), "it is logged");
}

/// The changes of one round, by a pseudo-random number.
fn change(mesh: &Mesh, random: &mut u64) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let mut draw = *random;
    let mut pick = |below: u64| {
        let picked = draw % below;
        draw /= below;
        picked
    };
    let (what, id, variant) = (pick(10), pick(200), pick(4));
    let (name, app) = (format!("p{id}"), format!("app{}", id % 20));
    match what {
        0..=4 => {
            let annotations = if variant == 0 { json!({}) } else { captured() };
            let ip = format!("10.9.{}.{}", id % 4, id);
            let mut object =
                pod(&name, &format!("sa{}", id % 7), u8::try_from(1 + variant % 2).unwrap(), &[ip], annotations);
            object["metadata"]["labels"]["app"] = json!(app);
            object["metadata"]["labels"]["version"] = json!(format!("v{variant}"));
            if variant == 3 {
                object["status"]["conditions"][0]["status"] = json!("False");
            }
            mesh.api.put(PODS, &format!("ns/{name}"), Some(object));
        }
        5 => mesh.api.put(PODS, &format!("ns/{name}"), None),
        6 => {
            let ports = json!([{"name": "http", "port": 80, "targetPort": 8080 + variant, "protocol": "TCP"}]);
            let spec = json!({"clusterIP": format!("10.96.0.{}", 1 + id % 20), "clusterIPs": [format!("10.96.0.{}", 1 + id % 20)],
                "selector": {"app": app}, "ports": ports, "type": "ClusterIP"});
            let gone = variant == 0;
            mesh.api.put(SERVICES, &format!("ns/{app}"), (!gone).then(|| json!({"metadata": {}, "spec": spec})));
        }
        7 => {
            let endpoint = |id: u64| {
                json!({"addresses": [format!("10.9.{}.{}", id % 4, id)], "nodeName": "n1",
                "conditions": {"ready": !id.is_multiple_of(3), "serving": true},
                "targetRef": {"kind": "Pod", "name": format!("p{id}"), "namespace": "ns", "uid": format!("uid-p{id}")}})
            };
            let endpoints: Vec<Value> = (0..=variant).map(|n| endpoint(id % 20 + n * 20)).collect();
            let object = json!({"metadata": {"labels": {"kubernetes.io/service-name": app}}, "addressType": "IPv4",
                "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]});
            mesh.api.put(SLICES, &format!("ns/{app}-x"), Some(object));
        }
        8 => {
            let rules = json!([{"from": [{"source": {"namespaces": [format!("n{variant}")]}}]}]);
            let spec = json!({"selector": {"matchLabels": {"app": app}}, "action": "DENY", "rules": rules});
            mesh.policy(&format!("a{}", id % 20), (variant != 0).then_some(spec));
        }
        _ => {
            let mode = ["STRICT", "PERMISSIVE", "STRICT", "PERMISSIVE"][usize::try_from(variant).unwrap()];
            let spec = json!({"selector": {"matchLabels": {"app": app}}, "mtls": {"mode": mode}});
            let object = json!({"metadata": {"generation": 1}, "spec": spec});
            mesh.api.put(AUTHENTICATION, &format!("ns/{app}"), (id % 5 != 0).then_some(object));
        }
    }
}

/// Ten thousand changes, with broken watches in between. Then a control
/// plane that lists everything anew serves what the first one does, by the same versions; and both nodes know it.
#[test]
fn after_ten_thousand_changes_a_node_knows_what_a_list_from_scratch_says() {
    let mut mesh = Mesh::new();
    mesh.start_control(0);
    mesh.start_nodes(&[]);
    let mut random = 0x5eed_5eed_5eed_5eed;
    for round in 0..10 {
        for _ in 0..1000 {
            change(&mesh, &mut random);
        }
        if round % 3 == 1 {
            mesh.api.cut();
        }
    }
    mesh.start_control(1);
    let versions = |number| mesh.control_json(number, "/config_dump")["versions"].clone();
    eventually("both control planes serve the same versions", || versions(0) == versions(1));
    let served = mesh.served(1);
    assert!(served.iter().all(|all| all.as_array().unwrap().len() > 5), "{served:?}");
    for node in [1, 2] {
        eventually("the node knows it", || mesh.known(node) == served);
    }
}
