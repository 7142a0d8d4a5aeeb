//! In an Istio mesh: facts and certificates from a control plane, pods from an agent, and everything that goes wrong
//! with them.

use crate::world::agent::uid;
use crate::world::wire::ADDRESS;
use crate::world::{Agent, ControlPlane, Pod, World, alive, apps, ask, connect, eventually};
use serde_json::{Value, json};
use std::net::TcpStream;

/// Two nodes in an Istio mesh.
pub struct Istio {
    pub w: World,
    pub plane: ControlPlane,
    pub agents: [Agent; 2],
}

impl Istio {
    /// A client on the first node and a server on the second, known to control plane and agents. No daemon runs yet.
    pub fn new() -> Self {
        let mut w = World::new();
        w.mesh_pod("client", 1);
        w.mesh_pod("server", 2);
        apps::serve(&w.ns("server"), 8080, apps::who);
        apps::serve(&w.ns("server"), 9000, apps::echo);
        let plane = ControlPlane::start(&w.ns("n1"), &w.dir);
        let agents = [1, 2].map(|node| Agent::start(&w.dir.join(format!("zds{node}.sock"))));
        let istio = Self { w, plane, agents };
        istio.plane.set(&istio.w.mesh);
        for pod in istio.w.pods.clone() {
            istio.agent(pod.node).know(&pod);
            Agent::redirect(&pod);
        }
        istio
    }

    pub fn agent(&self, node: u8) -> &Agent {
        &self.agents[usize::from(node) - 1]
    }

    /// Starts both daemons and waits until everything is captured.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    pub fn start_with(&mut self, settings: &[(&str, &str)]) {
        for node in [1, 2] {
            self.start_node(node, settings);
        }
        for node in [1, 2] {
            eventually("the node is ready", || self.w.is_ready(node));
            self.w.wait_captured(node);
        }
    }

    /// Starts both daemons and waits until client and server are captured, whatever the state of other pods.
    pub fn start_nodes_only(&mut self) {
        for (node, pod) in [(1, "client"), (2, "server")] {
            self.start_node(node, &[]);
            eventually("captured", || {
                self.w.try_get(node, 15000, "/pods").is_some() && self.w.state(node, pod).0 == "captured"
            });
        }
    }

    pub fn start_node(&mut self, node: u8, settings: &[(&str, &str)]) {
        self.w.start_istio_node(node, &self.plane, &self.agents[usize::from(node) - 1], settings);
    }

    /// Announces the current mesh through the control plane.
    pub fn tell(&self) {
        self.plane.set(&self.w.mesh);
    }

    pub fn pod(&self, name: &str) -> Pod {
        self.w.pods.iter().find(|pod| pod.name == name).unwrap().clone()
    }

    pub fn server(&self) -> std::net::IpAddr {
        self.pod("server").v4
    }

    /// One request from the client to the server.
    pub fn request(&self) -> std::io::Result<String> {
        ask(&self.w.ns("client"), (self.server(), 8080), "x")
    }

    /// An open connection that has carried data.
    pub fn open(&self) -> TcpStream {
        let mut stream = connect(&self.w.ns("client"), (self.server(), 9000)).unwrap();
        assert!(alive(&mut stream));
        stream
    }

    fn dump(&self, node: u8) -> Value {
        self.w.json(node, "/config_dump")
    }
}

#[test]
fn it_takes_ztunnels_place_with_the_environment_of_its_chart() {
    let mut istio = Istio::new();
    istio.start();
    let answer = istio.request().unwrap();
    assert_eq!(answer, format!("{} x", istio.pod("client").v4), "the original source is seen");
    let by = |l: &Value| l["direction"] == "inbound" && l["message"] == "connection complete";
    let line = istio.w.log_line(2, "inbound", by);
    assert_eq!(line["src.identity"], "spiffe://cluster.local/ns/ns/sa/client");
    let node = istio.plane.first_requests(ADDRESS)[0].node.clone().unwrap();
    assert!(node.id.starts_with("ztunnel~172.30.0."), "{}", node.id);
    assert!(node.id.ends_with("istio-system~istio-system.svc.cluster.local"), "{}", node.id);
    let metadata = node.metadata.unwrap();
    for (name, value) in [("NAMESPACE", "istio-system"), ("CLUSTER_ID", "c1")] {
        let kind = metadata.fields[name].kind.clone();
        assert_eq!(kind, Some(prost_types::value::Kind::StringValue(value.into())), "{name}");
    }
    let dump = istio.dump(2);
    assert_eq!(dump["meshState"]["stale"], json!(false));
    assert_eq!(dump["certificates"][0]["state"], "Available");
    assert_eq!(dump["workloadState"][uid(&istio.pod("server"))]["state"], "Up");
    assert!(istio.agent(2).state().violations.is_empty(), "{:?}", istio.agent(2).state().violations);
    // The agent does the redirection: none of culvert's rules in the pod redirect.
    let rules = crate::world::output_in(&istio.w.ns("server"), "nft", &["list", "ruleset"]);
    assert!(!rules.contains("table inet culvert {") && rules.contains("table inet culvert_legs {"), "{rules}");
    let ours = crate::world::output_in(&istio.w.ns("server"), "nft", &["list", "table", "inet", "culvert_legs"]);
    assert!(!ours.contains("hook output priority -100") && !ours.contains("redirect"), "{ours}");
}

#[test]
fn what_istioctl_reads_is_there() {
    let mut istio = Istio::new();
    let server = istio.pod("server");
    istio.w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    istio.w.mesh.policy("no-one", "WorkloadSelector", "Deny", crate::world::facts::principal("nobody"));
    istio.tell();
    istio.start();
    let _open = istio.open();
    let dump = istio.dump(2);
    let one = |list: &str, key: &str, value: &str| {
        let all = dump[list].as_array().unwrap_or_else(|| panic!("{list} in {dump}"));
        all.iter().find(|o| o[key] == value).unwrap_or_else(|| panic!("{value} in {list}")).clone()
    };
    let workload = one("workloads", "name", "server");
    for key in ["uid", "namespace", "serviceAccount", "trustDomain", "node", "canonicalName", "clusterId"] {
        assert!(workload[key].is_string(), "{key} in {workload}");
    }
    assert_eq!((&workload["protocol"], &workload["status"]), (&json!("HBONE"), &json!("Healthy")));
    let service = one("services", "name", "web");
    assert_eq!(service["vips"], json!(["/10.96.0.1"]));
    assert_eq!(service["endpoints"]["c1//Pod/ns/server"]["port"], json!({"80": 8080}));
    let policy = one("policies", "name", "no-one");
    assert_eq!((&policy["scope"], &policy["action"]), (&json!("WorkloadSelector"), &json!("Deny")));
    let certificate = one("certificates", "identity", "spiffe://cluster.local/ns/ns/sa/server");
    let leaf = &certificate["certChain"][0];
    for key in ["pem", "serialNumber", "validFrom", "expirationTime"] {
        assert!(leaf[key].is_string(), "{key} in {leaf}");
    }
    assert_eq!(certificate["rootCerts"].as_array().map(Vec::len), Some(1));
    let state = &dump["workloadState"][uid(&server)];
    assert_eq!(state["info"]["serviceAccount"], "server");
    let inbound = &state["connections"]["inbound"][0];
    assert_eq!((&inbound["protocol"], &inbound["actualDst"]), (&json!("HBONE"), &json!(format!("{}:9000", server.v4))));
    for key in ["version", "config", "staticConfig", "stagedServices"] {
        assert!(dump[key].is_object(), "{key}");
    }
    // Profiles, as `pprof` fetches them.
    let port = |path: &'static str| istio.w.try_get(2, 15000, path).unwrap();
    assert_eq!(port("/debug/pprof/heap").0, 500);
    assert_eq!(port("/debug/pprof/profile?seconds=0").0, 400);
    let fetched = crate::world::output_in(
        &istio.w.ns("n2"),
        "sh",
        &[
            "-c",
            "curl -s 'http://localhost:15000/debug/pprof/profile?seconds=1&frequency=1000' | od -An -v -tx1 | tr -d ' \\n'",
        ],
    );
    let bytes: Vec<u8> =
        (0..fetched.len() / 2).map(|at| u8::from_str_radix(&fetched[2 * at..2 * at + 2], 16).unwrap()).collect();
    let profile: culvert::proto::perftools::profiles::Profile = prost::Message::decode(&*bytes).unwrap();
    assert_eq!((profile.period, profile.string_table[0].as_str()), (1_000_000, ""));
}
