//! The node's agent hands over pods, forgets them, dies and comes back. Each message is answered, and no pod is ever
//! carried as another one.

use crate::istio::Istio;
use crate::world::agent::uid;
use crate::world::{Agent, Pod, World, alive, ask, connect, eventually, http, inside};
use crate::xds::Load;
use culvert::proto::istio::workload::zds;
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::time::Duration;

fn captured(istio: &Istio, node: u8) -> Vec<String> {
    let mut all: Vec<String> =
        istio.w.states(node).into_iter().filter(|(_, state, _)| state == "captured").map(|(name, _, _)| name).collect();
    all.sort();
    all
}

fn listens(netns: &str, port: u16) -> bool {
    let any = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let listening = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(3) == Some(&"0A") && fields[1].ends_with(&format!(":{port:04X}"))
        };
        text.lines().any(listening)
    };
    inside(netns, || any("/proc/thread-self/net/tcp") || any("/proc/thread-self/net/tcp6"))
}

/// Checks that every message was answered in time and that no message came unasked.
fn kept_to_the_protocol(agent: &Agent) {
    let state = agent.state();
    assert!(state.violations.is_empty(), "{:?}", state.violations);
    assert!(state.answers.iter().all(|answer| answer.took < Duration::from_secs(5)));
}

#[test]
fn pods_come_and_go_by_the_agents_word() {
    let mut istio = Istio::new();
    istio.start();
    let late = istio.w.mesh_pod("late", 1);
    // Handed over before its facts are known, as while its sandbox is being made.
    Agent::redirect(&late);
    assert_eq!(istio.agent(1).add(&late), Ok(()));
    assert_eq!(istio.w.state(1, "late").0, "pending");
    assert!(listens(&late.netns, 15001));
    let (ns, server) = (late.netns.clone(), istio.server());
    let early = std::thread::spawn(move || ask(&ns, (server, 8080), "x"));
    eventually("its connection waits", || crate::world::output_in(&late.netns, "ss", &["-tn"]).contains(":8080"));
    istio.tell();
    assert!(early.join().unwrap().is_ok(), "what it opened before it was known");
    eventually("captured", || captured(&istio, 1) == ["client", "late"]);
    // The same message again changes nothing.
    let mut open = connect(&late.netns, (server, 9000)).unwrap();
    assert!(alive(&mut open));
    assert_eq!(istio.agent(1).add(&late), Ok(()));
    assert!(alive(&mut open), "no restart");
    // Deleting a pod twice has the same effect as once.
    Agent::stop_redirecting(&late);
    assert_eq!(istio.agent(1).del(&late), Ok(()));
    assert_eq!(istio.agent(1).del(&late), Ok(()));
    eventually("its listeners are gone", || !listens(&late.netns, 15001));
    assert!(alive(&mut open), "what is open may finish");
    drop(open);
    eventually("it is forgotten", || captured(&istio, 1) == ["client"]);
    eventually("nothing of ours is left", || {
        !crate::world::output_in(&late.netns, "nft", &["list", "ruleset"]).contains("culvert")
    });
    assert!(istio.request().is_ok());
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn a_pod_whose_namespace_changes_is_carried_in_the_new_one() {
    let mut istio = Istio::new();
    istio.start();
    // The sandbox has been made again: the same pod in another namespace, with the same addresses.
    let client = istio.pod("client");
    let old = connect(&client.netns, (istio.server(), 9000)).unwrap();
    let again = istio.w.add_pod("again", 1);
    let swap = |ns: &str, add: &Pod, del: &Pod| {
        crate::world::ip_in(ns, &format!("addr del {}/24 dev eth0\naddr add {}/24 dev eth0\n", del.v4, add.v4));
        crate::world::ip_in(ns, &format!("addr del {}/64 dev eth0\naddr add {}/64 dev eth0 nodad\n", del.v6, add.v6));
        crate::world::ip_in(ns, &format!("route replace default via 10.{}.0.1\n", add.node));
    };
    swap(&client.netns, &again, &client);
    swap(&again.netns, &client, &again);
    Agent::redirect(&again);
    istio.agent(1).know_in(&client, Some(&again.netns));
    assert_eq!(istio.agent(1).tell_add(&client), Ok(()));
    eventually("captured there", || captured(&istio, 1) == ["client"] && listens(&again.netns, 15001));
    assert!(!listens(&client.netns, 15001), "and no longer here");
    eventually("it is carried there", || ask(&again.netns, (istio.server(), 8080), "x").is_ok());
    drop(old);
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn one_pod_that_cannot_be_served_leaves_the_node_ready_and_is_named() {
    let mut istio = Istio::new();
    let blocked = istio.w.mesh_pod("blocked", 1);
    let foreign = istio.w.mesh_pod("foreign", 1);
    istio.tell();
    let taken = inside(&blocked.netns, || TcpListener::bind(("::", 15001))).unwrap();
    Agent::redirect(&blocked);
    istio.agent(1).know(&blocked);
    // The agent has paired the pod with another pod's namespace.
    let other = istio.w.add_pod("other", 1);
    istio.agent(1).know_in(&foreign, Some(&other.netns));
    for node in [1, 2] {
        istio.start_node(node, &[]);
        eventually("the node is ready", || istio.w.is_ready(node));
    }
    eventually("the others are captured", || captured(&istio, 1) == ["client"] && captured(&istio, 2) == ["server"]);
    assert!(istio.request().is_ok());
    let (state, reason) = istio.w.state(1, "blocked");
    assert_eq!(state, "failed");
    assert!(reason.contains("port 15001") && reason.contains("something else listens"), "{reason}");
    eventually("the foreign namespace is refused", || istio.w.state(1, "foreign").0 == "failed");
    let reason = istio.w.state(1, "foreign").1;
    assert!(reason.contains(&foreign.v4.to_string()) && reason.contains(&other.v4.to_string()), "{reason}");
    eventually("nobody is reached there under another's name", || !listens(&other.netns, 15008));
    assert!(istio.w.metric(1, "culvert_capture_failures_total", &["reason=\"not_the_pod\""]) >= 1.0);
    let error = istio.agent(1).tell_add(&blocked).unwrap_err();
    assert!(error.contains("port 15001") && error.len() < 900, "{error}");
    drop(taken);
    eventually("it is served once it can be", || captured(&istio, 1) == ["blocked", "client"]);
    assert_eq!(istio.agent(1).tell_add(&blocked), Ok(()));
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn a_protocol_error_is_answered_and_ends_the_connection_never_the_process() {
    let mut istio = Istio::new();
    let zds_packet = |payload| prost::Message::encode_to_vec(&zds::WorkloadRequest { payload: Some(payload) });
    use zds::workload_request::Payload;
    let without_info = Payload::Add(zds::AddWorkload { uid: "u".into(), workload_info: None });
    for packet in [vec![255, 255, 255], zds_packet(without_info), vec![], vec![0; 2000]] {
        if !packet.is_empty() {
            istio.agent(1).state().garbage.push(packet);
        }
    }
    istio.start();
    // One bad packet ends each connection. The rest was never read.
    eventually("answered", || !istio.agent(1).state().answers.is_empty());
    let garbage: Vec<String> = {
        let state = istio.agent(1).state();
        state.answers.iter().filter(|answer| answer.to == "garbage").map(|answer| answer.error.clone()).collect()
    };
    assert!(garbage.iter().all(|error| error.starts_with("failure to read message")), "{garbage:?}");
    istio.agent(1).state().violations.clear();
    let load = Load::start(&istio);
    for payload in [
        Payload::SnapshotSent(zds::SnapshotSent {}),
        Payload::Keep(zds::KeepWorkload { uid: "late".into() }),
        Payload::Add(zds::AddWorkload { uid: "u".into(), workload_info: None }),
    ] {
        let before = istio.agent(1).state().snapshots;
        let error = istio.agent(1).send(payload, None).unwrap_err();
        assert!(error.starts_with("failure to read message"), "{error}");
        istio.agent(1).wait_snapshot(before);
    }
    // A descriptor of something else, and a descriptor where none belongs.
    let file = File::open("/dev/null").unwrap();
    let info = zds::WorkloadInfo { name: "x".into(), namespace: "ns".into(), service_account: "x".into() };
    let add = Payload::Add(zds::AddWorkload { uid: "x".into(), workload_info: Some(info) });
    let error = istio.agent(1).send(add, Some(file)).unwrap_err();
    assert!(error.contains("not a network namespace"), "{error}");
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    assert!(istio.w.node(1).is_running());
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn an_agent_that_restarts_finds_the_pods_as_its_snapshot_says() {
    let mut istio = Istio::new();
    let (gone, kept) = (istio.w.mesh_pod("gone", 1), istio.w.mesh_pod("kept", 1));
    istio.tell();
    for pod in [&gone, &kept] {
        Agent::redirect(pod);
        istio.agent(1).know(pod);
    }
    istio.start();
    let (load, mut open) = (Load::start(&istio), connect(&kept.netns, (istio.server(), 9000)).unwrap());
    istio.agents[0].down();
    eventually("it is seen to be away", || istio.w.metric(1, "culvert_agent_connected", &[]) == 0.0);
    load.more(10);
    assert!(istio.w.is_ready(1), "what is captured is served");
    // In the meantime one pod is gone, the agent has lost the namespace of another one, and once it breaks the snapshot
    // off in the middle.
    istio.agent(1).forget(&gone);
    istio.agent(1).know_in(&kept, None);
    istio.agent(1).state().break_snapshot_after = Some(1);
    let before = istio.agent(1).state().snapshots;
    istio.agents[0].up();
    istio.agent(1).wait_snapshot(before);
    eventually("as the snapshot says", || captured(&istio, 1) == ["client", "kept"]);
    assert!(alive(&mut open));
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn an_upgrade_hands_the_pods_from_one_daemon_to_the_next() {
    let mut istio = Istio::new();
    istio.start_with(&[("TERMINATION_GRACE_PERIOD_SECONDS", "30")]);
    let load = Load::start(&istio);
    for round in 0..3 {
        let own = istio.w.add_pod(&format!("ztunnel-{round}"), 1);
        let before = istio.agent(1).state().snapshots;
        istio.w.start_istio_upgrade(&own, &istio.plane, &istio.agents[0]);
        istio.agent(1).wait_snapshot(before);
        assert_eq!(istio.agent(1).connections(), 2, "two daemons at once");
        eventually("the new one has captured", || {
            let (_, body) = inside(&own.netns, || http(15000, "GET", "/pods", "localhost")).unwrap_or_default();
            body.contains("\"captured\"") && !body.contains("\"pending\"")
        });
        load.more(20);
        let mut old = istio.w.take_node(1);
        old.signal(Signal::SIGTERM);
        eventually("the old one has left the agent", || istio.agent(1).connections() == 1);
        load.more(20);
        assert!(old.wait().success());
    }
    let (count, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {count} failed: {failures:?}", failures.len());
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn a_daemon_that_is_killed_twenty_times_while_the_agent_rolls_captures_all_again() {
    let mut istio = Istio::new();
    istio.start();
    for round in 0..20 {
        istio.w.node(1).kill();
        if round % 3 == 0 {
            istio.agents[0].down();
        }
        assert!(istio.request().is_err(), "refused, not passed in plaintext");
        istio.start_node(1, &[]);
        if round % 3 == 0 {
            istio.agents[0].up();
        }
        eventually("ready", || istio.w.is_ready(1));
        eventually("captured", || captured(&istio, 1) == ["client"]);
        assert!(istio.request().is_ok());
    }
    kept_to_the_protocol(istio.agent(1));
}

/// What the agent may do to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Add(usize),
    AddElsewhere(usize),
    Del(usize),
    Forget(usize),
    LoseNamespace(usize),
    Reconnect,
    BreakSnapshot(usize),
}

/// The model of what must be captured, and where: the pods that the agent has added and not deleted, of those that it
/// still names.
#[derive(Default)]
struct Model {
    held: BTreeMap<usize, bool>,
    named: BTreeMap<usize, Option<bool>>,
}

impl Model {
    fn take(&mut self, step: Step) {
        match step {
            Step::Add(pod) | Step::AddElsewhere(pod) => {
                let elsewhere = matches!(step, Step::AddElsewhere(_));
                self.named.insert(pod, Some(elsewhere));
                self.held.insert(pod, elsewhere);
            }
            Step::Del(pod) => {
                self.named.remove(&pod);
                self.held.remove(&pod);
            }
            Step::Forget(pod) => drop(self.named.remove(&pod)),
            Step::LoseNamespace(pod) => {
                if let Some(place) = self.named.get_mut(&pod) {
                    *place = None;
                }
            }
            Step::Reconnect | Step::BreakSnapshot(_) => {
                self.held.retain(|pod, _| self.named.contains_key(pod));
                for (pod, place) in &self.named {
                    if let Some(place) = place {
                        self.held.insert(*pod, *place);
                    }
                }
            }
        }
    }
}

#[test]
fn two_hundred_random_sequences_end_as_the_model_says() {
    let mut istio = Istio::new();
    // Three pods, each with a second namespace that also holds its addresses. It is connected to no network, so nothing
    // collides.
    let pods: Vec<Pod> = (0..3).map(|n| istio.w.mesh_pod(&format!("p{n}"), 1)).collect();
    let elsewhere: Vec<String> = pods.iter().map(|pod| twin(&istio.w, pod)).collect();
    for (pod, twin) in pods.iter().zip(&elsewhere) {
        Agent::redirect(pod);
        Agent::redirect(&Pod { netns: twin.clone(), ..pod.clone() });
    }
    istio.tell();
    istio.start_nodes_only();
    let mut random = StdRng::seed_from_u64(7);
    let mut model = Model::default();
    for sequence in 0..200 {
        let steps: Vec<Step> = (0..random.random_range(1..8)).map(|_| step(&mut random)).collect();
        for step in &steps {
            play(&istio, &pods, &elsewhere, *step);
            model.take(*step);
        }
        // Changes that only the agent knows are announced with the next snapshot.
        play(&istio, &pods, &elsewhere, Step::Reconnect);
        model.take(Step::Reconnect);
        let mut expected = vec!["client".to_owned()];
        expected.extend(model.held.keys().map(|pod| format!("p{pod}")));
        eventually(&format!("sequence {sequence}: {steps:?}, expected {expected:?}"), || {
            captured(&istio, 1) == expected
                && model.held.iter().all(|(pod, place)| {
                    let (here, there) = (&pods[*pod].netns, &elsewhere[*pod]);
                    let (held, left) = if *place { (there, here) } else { (here, there) };
                    listens(held, 15001) && !listens(left, 15001)
                })
        });
    }
    kept_to_the_protocol(istio.agent(1));
}

fn step(random: &mut StdRng) -> Step {
    let pod = random.random_range(0..3);
    match random.random_range(0..9) {
        0..3 => Step::Add(pod),
        3 => Step::AddElsewhere(pod),
        4..6 => Step::Del(pod),
        6 => Step::Forget(pod),
        7 => Step::LoseNamespace(pod),
        _ if pod == 0 => Step::Reconnect,
        _ => Step::BreakSnapshot(pod),
    }
}

fn play(istio: &Istio, pods: &[Pod], elsewhere: &[String], step: Step) {
    let agent = istio.agent(1);
    match step {
        Step::Add(pod) => assert_eq!(agent.add(&pods[pod]), Ok(()), "{step:?}"),
        Step::AddElsewhere(pod) => {
            agent.know_in(&pods[pod], Some(&elsewhere[pod]));
            assert_eq!(agent.tell_add(&pods[pod]), Ok(()), "{step:?}");
        }
        Step::Del(pod) => assert_eq!(agent.del(&pods[pod]), Ok(()), "{step:?}"),
        Step::Forget(pod) => agent.forget(&pods[pod]),
        Step::LoseNamespace(pod) => {
            if let Some(known) = agent.state().pods.get_mut(&uid(&pods[pod])) {
                known.netns = None;
            }
        }
        Step::Reconnect | Step::BreakSnapshot(_) => {
            let before = agent.state().snapshots;
            if let Step::BreakSnapshot(after) = step {
                agent.state().break_snapshot_after = Some(after);
            }
            agent.break_all();
            agent.wait_snapshot(before);
        }
    }
}

/// A namespace with the addresses of a pod and a default route, connected to nothing.
fn twin(w: &World, pod: &Pod) -> String {
    let name = format!("{}-t", pod.netns);
    crate::world::ip(&format!("netns add {name}\n"));
    crate::world::ip_in(
        &name,
        &format!(
            "link set lo up\nlink add eth0 type veth peer name eth1\nlink set eth0 up\nlink set eth1 up\n\
             addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nroute add default via 10.{}.0.1\n\
             route add default via fd00:{}::1\n",
            pod.v4, pod.v6, pod.node, pod.node
        ),
    );
    assert!(name.starts_with(&w.prefix), "removed with the world");
    name
}

#[test]
fn a_pod_that_is_not_redirected_is_reported_and_served_once_it_is() {
    let mut istio = Istio::new();
    let bare = istio.w.mesh_pod("bare", 1);
    istio.tell();
    istio.start_nodes_only();
    assert_eq!(istio.agent(1).add(&bare), Ok(()), "it is listened for");
    eventually("reported", || istio.w.state(1, "bare").0 == "failed");
    assert!(istio.w.state(1, "bare").1.contains("not captured"), "{:?}", istio.w.state(1, "bare"));
    assert!(istio.w.is_ready(1));
    Agent::redirect(&bare);
    eventually("seen", || istio.w.state(1, "bare").0 == "captured");
    assert!(ask(&bare.netns, (istio.server(), 8080), "x").is_ok());
}

#[test]
fn facts_of_a_pods_earlier_life_hold_up_nothing_but_its_traffic() {
    let mut istio = Istio::new();
    let again = istio.w.mesh_pod("again", 1);
    // A pod of a StatefulSet is made again, and the control plane still announces its earlier address.
    istio.w.mesh.of("again")["workloadIps"] = serde_json::json!(["10.1.0.250"]);
    istio.tell();
    istio.start_nodes_only();
    Agent::redirect(&again);
    assert_eq!(istio.agent(1).add(&again), Ok(()), "its sandbox must be made before its address can be told");
    eventually("named", || istio.w.state(1, "again").1.contains("10.1.0.250"));
    assert!(listens(&again.netns, 15001));
    istio.w.mesh.of("again")["workloadIps"] = serde_json::json!([again.v4, again.v6]);
    istio.tell();
    eventually("captured", || captured(&istio, 1) == ["again", "client"]);
    assert!(ask(&again.netns, (istio.server(), 8080), "x").is_ok());
    // The same pod under another service account: everything known about the earlier one is void.
    istio.w.mesh.of("again")["serviceAccount"] = serde_json::json!("other");
    istio.tell();
    istio.agent(1).state().pods.get_mut(&uid(&again)).unwrap().info.service_account = "other".into();
    assert_eq!(istio.agent(1).tell_add(&again), Ok(()));
    eventually("carried as who it is now", || ask(&again.netns, (istio.server(), 8080), "x").is_ok());
    istio.w.log_line(2, "its name", |l| l["src.identity"] == "spiffe://cluster.local/ns/ns/sa/other");
    kept_to_the_protocol(istio.agent(1));
}

#[test]
fn a_pod_that_is_kept_and_was_never_had_is_shown() {
    let mut istio = Istio::new();
    let lost = istio.w.mesh_pod("lost", 1);
    istio.agent(1).know_in(&lost, None);
    istio.start_nodes_only();
    let shown = |istio: &Istio| {
        let pods = istio.w.json(1, "/pods");
        pods.as_array().unwrap().iter().find(|pod| pod["uid"] == uid(&lost)).map(|pod| pod["state"].clone())
    };
    eventually("shown", || shown(&istio) == Some("failed".into()));
    istio.agent(1).know(&lost);
    istio.tell();
    Agent::redirect(&lost);
    assert_eq!(istio.agent(1).tell_add(&lost), Ok(()));
    eventually("served", || captured(&istio, 1) == ["client", "lost"]);
}
