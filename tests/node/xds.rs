//! The control plane dies, stalls, lies, forgets and comes back. The known facts stay in force, and traffic continues.

use crate::istio::Istio;
use crate::world::certs::spiffe;
use crate::world::facts::{hostname, principal};
use crate::world::wire::{self, ADDRESS, AUTHORIZATION};
use crate::world::{alive, apps, ask, eventually, is_reset, output_in};
use culvert::proto::culvert::state::SavedState;
use culvert::proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use culvert::proto::istio::{security as auth, workload as wl};
use prost::Message;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Requests that continue in the background. Every one must succeed.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<Vec<String>>>,
}

impl Load {
    /// New connections from client to server, one after the other.
    pub fn start(istio: &Istio) -> Self {
        Self::between(istio.w.ns("client"), istio.server())
    }

    /// New connections from a namespace to a server, one after the other.
    pub fn between(ns: String, server: IpAddr) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                if let Err(error) = ask(&ns, (server, 8080), "x") {
                    failures.push(error.to_string());
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
            failures
        });
        let load = Self { stop, done, thread: Some(thread) };
        load.more(5);
        load
    }

    /// Waits until `count` more requests have been made.
    pub fn more(&self, count: usize) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("requests go on", || self.done.load(Ordering::Relaxed) >= before + count);
    }

    /// Ends the load. Returns how many requests were made, and the errors of those that failed.
    pub fn finish(mut self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.thread.take().unwrap().join().unwrap();
        (self.done.load(Ordering::Relaxed), failures)
    }
}

fn resource(type_url: &str, name: &str, version: &str, value: Vec<u8>) -> Resource {
    let any = prost_types::Any { type_url: type_url.into(), value };
    Resource { name: name.into(), version: version.into(), resource: Some(any), ..Default::default() }
}

fn policies(istio: &Istio, node: u8) -> Vec<String> {
    let dump = istio.w.json(node, "/config_dump");
    dump["policies"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_is_bad_is_refused_by_name_and_never_holds_up_the_rest() {
    let mut istio = Istio::new();
    let bad =
        wl::Workload { uid: "c1//Pod/ns/bad".into(), addresses: vec![vec![1, 2, 3].into()], ..Default::default() };
    let newer = wl::Workload {
        uid: "c1//Pod/ns/newer".into(),
        name: "newer".into(),
        namespace: "ns".into(),
        tunnel_protocol: 77,
        ..Default::default()
    };
    let test =
        auth::Match { source_ips: vec![auth::Address { address: vec![10].into(), length: 8 }], ..Default::default() };
    let clauses = vec![auth::Clause { matches: vec![test] }];
    // Applied as ztunnel applies it: it matches no peer.
    istio.w.mesh.policy("schemed", "Namespace", "Deny", json!({"principals": [{"Exact": spiffe("client")}]}));
    istio.tell();
    let widened = auth::Authorization {
        name: "odd".into(),
        namespace: "ns".into(),
        scope: 1,
        rules: vec![auth::Rule { clauses }],
        ..Default::default()
    };
    istio.plane.change(|state| {
        let addresses = state.resources.get_mut(ADDRESS).unwrap();
        addresses.insert("c1//Pod/ns/bad".into(), ("1".into(), wire::address(wl::address::Type::Workload(bad))));
        addresses.insert("c1//Pod/ns/newer".into(), ("1".into(), wire::address(wl::address::Type::Workload(newer))));
        addresses.insert("c1//Pod/ns/broken".into(), ("1".into(), vec![255; 9]));
        let policies = state.resources.get_mut(AUTHORIZATION).unwrap();
        policies.insert("ns/odd".into(), ("1".into(), widened.encode_to_vec()));
    });
    istio.start();
    let refusals = istio.plane.refusals().join("\n");
    for name in ["c1//Pod/ns/bad: an address has 3 bytes", "c1//Pod/ns/broken: ", "ns/odd: an address has 1 bytes"] {
        assert!(refusals.contains(name), "{name} in {refusals}");
    }
    assert!(!refusals.contains("newer"), "a value that is newer than we are is no fault: {refusals}");
    assert!(istio.w.metric(2, "culvert_xds_resources_refused_total", &[]) >= 3.0);
    let noted = istio.w.json(2, "/history?what=control_plane").to_string();
    for text in
        ["were refused or understood only in part", "ns/odd: an address has 1 bytes", "In step with the control plane"]
    {
        assert!(noted.contains(text), "{text} in {noted}");
    }
    // The policy's only match cannot be understood. It permits no peer; ignoring the range would permit every peer.
    assert!(istio.request().is_err());
    istio.plane.change(|state| drop(state.resources.get_mut(AUTHORIZATION).unwrap().remove("ns/odd")));
    eventually("without the policy it is allowed", || istio.request().is_ok());
    let noted = istio.w.json(2, "/history?what=policy");
    assert_eq!(noted["entries"][0]["text"], "The policy was removed.", "{noted:#}");
    assert!(!refusals.contains("schemed"), "{refusals}");
    let line = istio.w.log_line(2, "what never matches", |l| l["policies"].as_str().is_some());
    assert!(line["policies"].as_str().unwrap().starts_with("ns/schemed: rule[0]: principal \"spiffe://"), "{line}");
}

#[test]
fn a_control_plane_that_dies_stalls_and_comes_back_costs_no_connection() {
    let mut istio = Istio::new();
    istio.w.mesh.policy("gone-meanwhile", "WorkloadSelector", "Deny", principal("nobody"));
    istio.tell();
    istio.start();
    let (load, mut open) = (Load::start(&istio), istio.open());

    // Streams are recycled, as every half hour, then cut, then the control plane is killed.
    istio.plane.recycle();
    eventually("both have come back", || istio.plane.first_requests(ADDRESS).len() >= 4);
    let said = |words: &str| {
        istio.w.log(2).iter().filter(|l| l["message"].as_str().is_some_and(|said| said.contains(words))).count()
    };
    eventually("that is in order", || (said("closed the stream in an orderly way"), said("was lost")) == (1, 0));
    istio.plane.cut();
    eventually("and again", || istio.plane.first_requests(ADDRESS).len() >= 6);
    eventually("that is not", || (said("closed the stream in an orderly way"), said("was lost")) == (1, 1));
    load.more(10);
    istio.plane.down();
    eventually("it is seen to be away", || {
        let state = istio.w.json(2, "/config_dump")["meshState"].clone();
        state["stale"] == true && state["ageSeconds"].as_u64().is_some_and(|age| age >= 1)
    });
    assert!(istio.w.metric(2, "culvert_mesh_age_seconds", &[]) >= 1.0);
    load.more(20);

    // Changes during the outage are received when it is back: one policy is gone, another one is new.
    istio.w.mesh.policies.clear();
    istio.w.mesh.policy("new-meanwhile", "WorkloadSelector", "Deny", principal("nobody"));
    istio.tell();
    istio.plane.up();
    eventually("the change is known", || policies(&istio, 2) == ["new-meanwhile"]);
    let again = istio.plane.first_requests(AUTHORIZATION).pop().unwrap();
    let held: Vec<&String> = again.initial_resource_versions.keys().collect();
    assert_eq!(held, ["ns/gone-meanwhile"], "what is held is said");

    // Stalled: connections are accepted, but nothing is answered.
    istio.plane.change(|state| state.stalled = true);
    istio.plane.cut();
    load.more(20);
    istio.plane.change(|state| state.stalled = false);
    istio.plane.cut();
    eventually("in step again", || istio.w.metric(2, "culvert_mesh_age_seconds", &[]) == 0.0);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    assert!(alive(&mut open));
    for reason in ["Reconnect", "ConnectionError"] {
        let label = format!("reason=\"{reason}\"");
        assert!(istio.w.metric(2, "istio_xds_connection_terminations_total", &[&label]) >= 1.0, "{reason}");
    }
}

#[test]
fn lies_do_no_harm() {
    let mut istio = Istio::new();
    istio.start();
    let mut open = istio.open();
    let client = istio.w.mesh.of("client").clone();
    let renamed = wire::address(wl::address::Type::Workload(wire::workload(&client)));
    let response = |type_url: &str, resources, removed: &[&str]| DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: "lie".into(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    istio.plane.inject(response(ADDRESS, vec![], &["c1//Pod/never/heard-of", "never/heard.of", "", "/", "*"]));
    istio.plane.inject(response(AUTHORIZATION, vec![], &["never/heard-of"]));
    istio.plane.inject(response("type.googleapis.com/envoy.config.cluster.v3.Cluster", vec![], &[]));
    istio.plane.inject(response(ADDRESS, vec![resource(ADDRESS, "c1//Pod/ns/other", "1", renamed)], &[]));
    istio.plane.inject(response(ADDRESS, vec![Resource { name: "empty".into(), ..Default::default() }], &[]));
    eventually("they are refused by name", || {
        let refusals = istio.plane.refusals().join("\n");
        ["was not asked for", "c1//Pod/ns/other: contains a resource of another name", "empty: is empty"]
            .iter()
            .all(|text| refusals.contains(text))
    });
    assert!(istio.request().is_ok() && alive(&mut open));
    let nonces = |state: &crate::world::control_plane::State| {
        state.requests.iter().filter(|r| r.response_nonce.starts_with('n')).count()
    };
    assert!(nonces(&istio.plane.state()) >= 10, "each response has its answer");
}

#[test]
fn a_server_that_finds_the_list_of_what_is_held_too_long_gets_none_and_deletions_are_still_learned() {
    let mut istio = Istio::new();
    istio.w.mesh.policy("to-go", "WorkloadSelector", "Deny", principal("nobody"));
    istio.tell();
    istio.start();
    let (addresses, policies_asked) = (istio.plane.first_requests(ADDRESS), istio.plane.first_requests(AUTHORIZATION));
    let held = addresses.len();
    // The first requests of all have no versions.
    let longest = addresses.iter().chain(&policies_asked).map(Message::encoded_len).max().unwrap();
    istio.plane.down();
    istio.plane.change(|state| state.request_bytes_max = longest);
    istio.w.mesh.policies.clear();
    istio.w.mesh.services.clear();
    istio.tell();
    istio.plane.up();
    eventually("the deletion is known", || policies(&istio, 1).is_empty() && policies(&istio, 2).is_empty());
    let later = istio.plane.first_requests(ADDRESS).split_off(held);
    assert!(later.iter().all(|request| request.initial_resource_versions.is_empty()), "{later:?}");
    assert!(istio.request().is_ok());
}

#[test]
fn token_and_roots_may_come_late_and_change() {
    let mut istio = Istio::new();
    let (root, token) = (istio.plane.root_file.clone(), istio.plane.token_file.clone());
    let first_root = std::fs::read(&root).unwrap();
    std::fs::remove_file(&root).unwrap();
    std::fs::remove_file(&token).unwrap();
    istio.plane.change(|state| state.tokens = ["token-1".to_owned()].into());
    for node in [1, 2] {
        istio.start_node(node, &[]);
    }
    let says = |istio: &Istio, text: &str| {
        let with = |line: &Value| line["error"].as_str().is_some_and(|error| error.contains(text));
        istio.w.log_line(2, text, with)
    };
    says(&istio, "istio-token cannot be read");
    assert!(!istio.w.is_ready(2));
    std::fs::write(&token, "").unwrap();
    says(&istio, "istio-token is empty");
    std::fs::write(&token, "token-0").unwrap();
    says(&istio, "root-cert.pem cannot be read");
    std::fs::write(&root, first_root).unwrap();
    says(&istio, "authentication failure");
    // The waits between attempts grow, so there are few attempts, whatever the reason.
    let attempts = istio.w.metric(2, "istio_xds_connection_terminations_total", &[]);
    assert!(attempts < 60.0, "{attempts} attempts");
    std::fs::write(&token, "token-1").unwrap();
    for node in [1, 2] {
        eventually("the node is ready", || istio.w.is_ready(node));
        istio.w.wait_captured(node);
    }
    assert!(istio.request().is_ok());
    // Both rotate: the old token and the old root are no longer valid.
    istio.plane.down();
    let new = crate::world::control_plane::Root::new("another root");
    istio.plane.change(|state| {
        state.tokens = ["token-2".to_owned()].into();
        state.signer = new.clone();
        state.bundle.insert(0, new.clone());
    });
    std::fs::write(&token, "token-2").unwrap();
    std::fs::write(&root, new.pem).unwrap();
    istio.plane.up();
    eventually("in step again", || istio.w.metric(2, "culvert_mesh_age_seconds", &[]) == 0.0);
    assert!(istio.request().is_ok());
}

#[test]
fn a_start_without_control_plane_serves_by_the_state_file() {
    let mut istio = Istio::new();
    istio.w.mesh.policy("kept", "WorkloadSelector", "Deny", principal("nobody"));
    istio.tell();
    let files = [1, 2].map(|node| istio.w.dir.join(format!("state{node}")));
    for node in [1, 2] {
        let file = files[node - 1].display().to_string();
        istio.start_node(node as u8, &[("CULVERT_STATE_FILE", &file)]);
    }
    for node in [1, 2] {
        eventually("the node is ready", || istio.w.is_ready(node));
        istio.w.wait_captured(node);
        eventually("the state is kept", || istio.w.metric(node, "culvert_state_file_written_total", &[]) >= 1.0);
        let mode = std::fs::metadata(&files[usize::from(node) - 1]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    for node in [1, 2] {
        istio.w.node(node).kill();
    }
    // istiod refuses streams. Its CA must still work, because without it no pod has an identity.
    istio.plane.change(|state| state.refuse = Some(14));
    for node in [1, 2] {
        let file = files[node - 1].display().to_string();
        istio.start_node(node as u8, &[("CULVERT_STATE_FILE", &file)]);
    }
    for node in [1, 2] {
        eventually("the node is ready", || istio.w.is_ready(node));
        istio.w.wait_captured(node);
    }
    assert!(istio.request().is_ok());
    assert_eq!(policies(&istio, 2), ["kept"]);
    let state = istio.w.json(2, "/config_dump")["meshState"].clone();
    assert_eq!((&state["stale"], &state["source"]), (&json!(true), &json!("state file")), "{state}");
    eventually("the reason is shown", || {
        let state = istio.w.json(2, "/config_dump")["meshState"].clone();
        state["error"].as_str().is_some_and(|error| error.contains("refused"))
    });
    // Deletions during the outage are recognized by the versions that the file contains.
    istio.w.mesh.policies.clear();
    istio.tell();
    istio.plane.change(|state| state.refuse = None);
    eventually("in step again", || policies(&istio, 2).is_empty());
    assert_eq!(istio.w.json(2, "/config_dump")["meshState"]["stale"], json!(false));
    // A file that is too old is ignored and reported, and so is one that is damaged.
    istio.w.node(1).kill();
    istio.plane.change(|state| state.refuse = Some(14));
    let mut old = SavedState::decode(std::fs::read(&files[0]).unwrap().as_slice()).unwrap();
    old.saved_at -= 25 * 3600;
    std::fs::write(&files[0], old.encode_to_vec()).unwrap();
    istio.start_node(1, &[("CULVERT_STATE_FILE", &files[0].display().to_string())]);
    istio.w.log_line(1, "its age", |l| l["message"].as_str().is_some_and(|m| m.contains("too old to be used")));
    eventually("nothing is known", || istio.w.json(1, "/config_dump")["workloads"] == json!([]));
    assert!(!istio.w.is_ready(1), "not ready by facts of then");
    istio.plane.change(|state| state.refuse = None);
    istio.w.node(1).kill();
    std::fs::write(&files[0], "x").unwrap();
    istio.start_node(1, &[("CULVERT_STATE_FILE", &files[0].display().to_string())]);
    istio.w.log_line(1, "the damage", |l| l["error"].as_str().is_some_and(|e| e.contains("not a state file")));
    eventually("the node is ready", || istio.w.is_ready(1));
}

#[test]
fn on_demand_each_thing_is_asked_for_once_and_what_does_not_exist_is_known_not_to() {
    let mut istio = Istio::new();
    let outside = istio.w.add_pod("outside", 2);
    apps::serve(&outside.netns, 8080, apps::who);
    let server = istio.pod("server");
    istio.w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    istio.tell();
    istio.start_with(&[("XDS_ON_DEMAND", "true")]);
    let client = istio.w.ns("client");
    let first = istio.plane.first_requests(ADDRESS).pop().unwrap();
    assert_eq!(
        (first.resource_names_subscribe, first.resource_names_unsubscribe),
        (vec!["*".into()], vec!["*".into()])
    );
    let asked = |name: &str| {
        let state = istio.plane.state();
        state.requests.iter().filter(|r| r.resource_names_subscribe.iter().any(|n| n == name)).count()
    };
    // Many at once: one answer serves all.
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..20).map(|_| scope.spawn(|| istio.request())).collect();
        assert!(all.into_iter().all(|one| one.join().unwrap().is_ok()));
    });
    assert_eq!(asked(&format!("/{}", server.v4)), 1);
    assert!(ask(&client, ("10.96.0.1".parse::<std::net::IpAddr>().unwrap(), 80), "x").is_ok(), "a service");
    let line = istio.w.log_line(1, "the service", |l| l["dst.service"] == hostname("web"));
    assert_eq!(line["dst.identity"], "spiffe://cluster.local/ns/ns/sa/server");
    for _ in 0..3 {
        assert!(ask(&client, (outside.v4, 8080), "x").is_ok(), "not in the mesh: plain TCP");
    }
    assert_eq!(asked(&format!("/{}", outside.v4)), 1);
    // A workload that is created later is announced by its uid, not by the address that was asked for. So the address
    // is asked for again after a while.
    istio.w.mesh.workload(&outside, "TCP");
    istio.tell();
    eventually("it is known", || {
        let dump = istio.w.json(1, "/config_dump");
        ask(&client, (outside.v4, 8080), "x").is_ok()
            && dump["workloads"].as_array().unwrap().iter().any(|w| w["name"] == "outside")
    });
    assert!(asked("c1//Pod/ns/client") >= 1, "the pod's own workload, by its uid");
    // A pod is deleted and comes back at its address: the service is asked for again when it loses an endpoint.
    let before = istio.w.mesh.clone();
    istio.w.mesh.workloads.retain(|w| w["name"] != "server");
    istio.tell();
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    eventually("the endpoint is gone", || ask(&client, (vip, 80), "x").is_err());
    istio.w.mesh = before;
    istio.tell();
    eventually("it is back", || ask(&client, (vip, 80), "x").is_ok());
    // No stream was sent a removal of everything.
    assert!(istio.request().is_ok());
    // Without an answer, connections are refused after the wait, and never passed on in plaintext.
    istio.plane.change(|state| state.stalled = true);
    let unknown = istio.w.add_pod("unknown", 2);
    apps::serve(&unknown.netns, 8080, apps::who);
    assert!(is_reset(&client, (unknown.v4, 8080)));
    istio.w.log_line(1, "no answer", |l| l["reason"] == "no_answer");
    // A new stream asks for everything again.
    istio.plane.change(|state| state.stalled = false);
    istio.plane.cut();
    eventually("asked again", || asked(&format!("/{}", outside.v4)) >= 2);
    assert!(ask(&client, (unknown.v4, 8080), "x").is_ok());
}

#[test]
fn on_demand_a_service_is_found_by_an_address_in_its_range() {
    let mut istio = Istio::new();
    let server = istio.pod("server");
    istio.w.mesh.service("wide", &[], &json!({"80": 8080}), &[&server]);
    istio.w.mesh.services[0]["cidrVips"] = json!(["/10.97.0.0/16", "/2001:db8:97::/48"]);
    istio.tell();
    istio.start_with(&[("XDS_ON_DEMAND", "true")]);
    assert!(istio.request().is_ok(), "a workload");
    // istiod finds a range only by its first address. That is asked for once it is known that no service or workload
    // has the address.
    for ip in ["10.97.3.4", "10.97.0.0", "2001:db8:97::5"] {
        let to: std::net::IpAddr = ip.parse().unwrap();
        assert!(ask(&istio.w.ns("client"), (to, 80), "x").is_ok(), "{ip}");
    }
    {
        let state = istio.plane.state();
        let with = |name: &str| {
            state.requests.iter().map(|r| &r.resource_names_subscribe).find(|s| s.iter().any(|n| n == name))
        };
        for alone in ["/10.97.3.4", "/2001:db8:97::5", &format!("/{}", server.v4)] {
            assert_eq!(with(alone).unwrap(), &[alone]);
        }
    }
    let line = istio.w.log_line(1, "the service", |l| l["dst.service"] == hostname("wide"));
    assert_eq!(line["dst.identity"], "spiffe://cluster.local/ns/ns/sa/server");
}

#[test]
fn fifty_thousand_workloads_come_in_one_response_and_change_while_traffic_goes_on() {
    let mut istio = Istio::new();
    let many = |state: &mut crate::world::control_plane::State| {
        let addresses = state.resources.get_mut(ADDRESS).unwrap();
        for s in 0..5_000u32 {
            let service = wl::Service {
                name: format!("s{s}"),
                namespace: format!("ns{}", s % 100),
                hostname: format!("s{s}.ns{}.svc.cluster.local", s % 100),
                addresses: vec![wl::NetworkAddress {
                    network: String::new(),
                    address: (0x0a80_0000 + s).to_be_bytes().to_vec().into(),
                    length: None,
                }],
                ports: vec![wl::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
                ..Default::default()
            };
            let name = format!("{}/{}", service.namespace, service.hostname);
            addresses.insert(name, ("1".into(), wire::address(wl::address::Type::Service(service))));
        }
        for w in 0..50_000u32 {
            let (name, bytes) = filler(w, 0);
            addresses.insert(name, ("1".into(), bytes));
        }
    };
    istio.plane.change(many);
    istio.start();
    let known = || istio.w.metric(2, "culvert_mesh_objects", &["url=\"workload\""]);
    assert!(known() >= 50_002.0, "{}", known());
    let (cpu, memory) = usage(istio.w.pid(2));
    eprintln!("55,000 resources in one response: {cpu:.2} s of CPU, {memory} MiB");
    assert!(memory <= 300, "{memory} MiB");
    let changes = |numbers: std::ops::Range<u32>| {
        let answered = || istio.plane.state().requests.iter().filter(|r| !r.response_nonce.is_empty()).count();
        let before = answered();
        for (sent, number) in numbers.enumerate() {
            let (name, bytes) = filler(number, number);
            istio.plane.inject(DeltaDiscoveryResponse {
                type_url: ADDRESS.into(),
                nonce: "many".into(),
                resources: vec![resource(ADDRESS, &name, "2", bytes)],
                ..Default::default()
            });
            if sent % 32 == 31 {
                // As fast as it is read, because the queue of the test is short. Both nodes answer.
                eventually("answered", || answered() >= before + 2 * (sent + 1));
            }
        }
    };
    let before = usage(istio.w.pid(2)).0;
    changes(1..1_025);
    eprintln!("1,024 single changes among them: {:.2} s of CPU", usage(istio.w.pid(2)).0 - before);
    let load = Load::start(&istio);
    changes(2_001..2_257);
    let messages = || istio.w.metric(2, "istio_xds_message_total", &["Address"]);
    eventually("the last change has come", || messages() >= 1_281.0);
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    // On a new stream only changes are sent, because the daemon sends the versions that it has.
    istio.plane.recycle();
    eventually("in step again", || {
        let request = istio.plane.first_requests(ADDRESS).pop().unwrap();
        request.initial_resource_versions.len() >= 55_000
    });
}

/// A workload of the crowd, in a version.
fn filler(number: u32, version: u32) -> (String, Vec<u8>) {
    let uid = format!("c1//Pod/ns{}/w{number}", number % 100);
    let service = format!("ns{}/s{}.ns{}.svc.cluster.local", number % 100, number % 5_000, number % 100);
    let ports = wl::PortList { ports: vec![wl::Port { service_port: 80, target_port: 8080, app_protocol: 0 }] };
    let workload = wl::Workload {
        uid: uid.clone(),
        name: format!("w{number}"),
        namespace: format!("ns{}", number % 100),
        addresses: vec![(0x0a40_0000 + number).to_be_bytes().to_vec().into()],
        tunnel_protocol: 1,
        service_account: format!("account-{}", number % 500),
        node: format!("node-{}", number % 1_000),
        canonical_name: format!("app-{}", number % 500),
        canonical_revision: format!("v{version}"),
        workload_name: format!("app-{}", number % 500),
        cluster_id: "c1".into(),
        services: [(service, ports)].into(),
        ..Default::default()
    };
    (uid, wire::address(wl::address::Type::Workload(workload)))
}

/// CPU seconds and resident MiB of a process.
fn usage(pid: u32) -> (f64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    (ticks / 100.0, resident.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 1024)
}

#[test]
fn secrets_of_the_connection_are_shown_nowhere() {
    let mut istio = Istio::new();
    istio.plane.change(|state| state.tokens = ["token-1".to_owned()].into());
    istio.start_with(&[
        ("XDS_HEADER_X-Api-Key", "hunter2-xds"),
        ("CA_HEADER_X-Api-Key", "hunter2-ca"),
        ("RUST_LOG", "trace"),
    ]);
    assert!(istio.request().is_ok());
    let dump = istio.w.json(2, "/config_dump").to_string();
    let log = std::fs::read_to_string(istio.w.dir.join("node2.log")).unwrap();
    for text in [dump, log] {
        for secret in ["hunter2", "token-1", "PRIVATE KEY"] {
            assert!(!text.contains(secret), "{secret}");
        }
    }
}

#[test]
fn metrics_of_the_daemon_can_be_read_through_the_mesh() {
    let mut istio = Istio::new();
    // The daemon's own pod on the second node, with the labels of its DaemonSet.
    istio.w.mesh.workloads.push(json!({
        "uid": "c1//Pod/istio-system/ztunnel-2", "name": "ztunnel-2", "namespace": "istio-system",
        "serviceAccount": "ztunnel", "workloadIps": ["172.30.0.2"], "protocol": "HBONE", "node": "n2",
        "canonicalName": "ztunnel", "clusterId": "c1", "services": {},
    }));
    istio.tell();
    istio.start_with(&[("SERVICE_ACCOUNT", "ztunnel")]);
    let ip: std::net::IpAddr = "172.30.0.2".parse().unwrap();
    let client = istio.w.ns("client");
    let scrape = || output_in(&client, "curl", &["-s", "--max-time", "10", &format!("http://{ip}:15020/metrics")]);
    assert!(scrape().contains("culvert_build"));
    let inbound = |l: &Value| l["direction"] == "inbound" && l["dst.workload"] == "ztunnel-2";
    let line = istio.w.log_line(2, "through the mesh", inbound);
    assert_eq!(line["src.identity"], "spiffe://cluster.local/ns/ns/sa/client");
    for port in [15000, 15008, 15001] {
        assert!(is_reset(&client, (ip, port)), "{port}");
    }
    // Both pods come from the daemon's own address here, and yet one cannot use up the turns of the other.
    let many = format!("http://{ip}:15020/metrics?[1-30]");
    let said = output_in(
        &client,
        "curl",
        &["-s", "--max-time", "20", "-o", "/dev/null", "-w", "%{http_code} %header{retry-after}\n", &many],
    );
    assert!(said.lines().any(|line| line == "429 1") && said.contains("200"), "{said}");
    let other = istio.w.ns("server");
    let said = output_in(
        &other,
        "curl",
        &["-s", "-o", "/dev/null", "-w", "%{http_code}", &format!("http://{ip}:15020/metrics")],
    );
    assert_eq!(said, "200");
}
