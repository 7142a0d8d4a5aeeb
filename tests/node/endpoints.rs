//! Endpoints of a service that fail while nothing tells the mesh: the mesh facts do not change in these scenarios.

use crate::istio::Istio;
use crate::world::facts::hostname;
use crate::world::{Agent, Pod, World, apps, ask, connect, eventually, inside, ip_in};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 8080;

/// An application that can be ended: afterwards its port refuses connections.
struct App {
    listener: TcpListener,
    thread: std::thread::JoinHandle<()>,
}

impl App {
    fn start(pod: &Pod) -> Self {
        let listener = inside(&pod.netns, || TcpListener::bind(("::", PORT))).unwrap();
        let accepting = listener.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                std::thread::spawn(move || apps::who(stream));
            }
        });
        Self { listener, thread }
    }

    fn end(self) {
        nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        self.thread.join().unwrap();
    }
}

/// A client on the first node, and a service with three endpoints on the second.
struct Service {
    w: World,
    client: Pod,
    backends: Vec<Pod>,
}

impl Service {
    fn start(protocol: &str) -> Self {
        let mut w = World::new();
        let client = w.mesh_pod("client", 1);
        let backends: Vec<Pod> = ["one", "two", "three"].map(|name| w.add_pod(name, 2)).into();
        backends.iter().for_each(|pod| w.mesh.workload(pod, protocol));
        w.mesh.service("web", &["10.96.0.1"], &json!({"80": PORT}), &backends.iter().collect::<Vec<_>>());
        w.start();
        Self { w, client, backends }
    }

    /// One request. The error says what the client has seen.
    fn request(&self) -> Result<(), String> {
        let vip: IpAddr = "10.96.0.1".parse().unwrap();
        let mut stream = connect(&self.client.netns, (vip, 80)).map_err(|error| error.to_string())?;
        let mut answer = String::new();
        stream
            .write_all(b"x\n")
            .and_then(|()| stream.read_to_string(&mut answer))
            .map_err(|error| error.to_string())?;
        if answer.ends_with(" x") { Ok(()) } else { Err(format!("{answer:?}")) }
    }

    /// Makes requests from four clients until `meanwhile` has returned. All must be answered; says how many there were.
    fn all_answered(&self, meanwhile: impl FnOnce(&Clients)) -> usize {
        let (clients, is_done) = (Clients::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !is_done.load(Ordering::Relaxed) {
                        let _under_way = clients.under_way.read().unwrap();
                        self.request().unwrap();
                        clients.answers.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| meanwhile(&clients)));
            is_done.store(true, Ordering::Relaxed);
            outcome.unwrap_or_else(|panic| resume_unwind(panic));
        });
        clients.answers.into_inner()
    }

    fn set_aside(&self) -> Vec<Value> {
        self.w.json(1, "/set_aside").as_array().unwrap().clone()
    }

    fn uid(&self, backend: usize) -> String {
        format!("c1//Pod/ns/{}", self.backends[backend].name)
    }

    /// Waits until a backend is set aside, and returns its entry.
    fn is_set_aside(&self, backend: usize) -> Value {
        let (mut found, uid) = (Value::Null, self.uid(backend));
        eventually(&format!("{uid} is set aside"), || {
            found = self.set_aside().into_iter().find(|one| one["workloadUid"] == *uid).unwrap_or_default();
            found != Value::Null
        });
        found
    }
}

/// The clients of a service.
#[derive(Default)]
struct Clients {
    /// Answers so far.
    answers: AtomicUsize,
    /// Held by each request.
    under_way: RwLock<()>,
}

impl Clients {
    /// Waits for a further number of answers.
    fn further(&self, number: usize) {
        let wanted = self.answers.load(Ordering::Relaxed) + number;
        eventually("further answers", || self.answers.load(Ordering::Relaxed) >= wanted);
    }

    /// Does something while no request is under way: a connection that has carried bytes to an endpoint that ends then
    /// is lost, whatever the daemon does.
    fn between_requests(&self, work: impl FnOnce()) {
        let _none = self.under_way.write().unwrap();
        work();
    }
}

#[test]
fn a_backend_whose_application_ends_costs_no_connection_is_shown_and_comes_back() {
    for protocol in ["HBONE", "TCP"] {
        let s = Service::start(protocol);
        let mut apps: Vec<App> = s.backends.iter().map(App::start).collect();
        s.all_answered(|clients| {
            clients.further(50);
            assert_eq!(s.set_aside(), [Value::Null; 0]);
            let first = apps.remove(0);
            clients.between_requests(|| first.end());
            let entry = s.is_set_aside(0);
            assert_eq!(
                (&entry["reason"], &entry["service"]),
                (&json!("refused"), &json!("ns/web.ns.svc.cluster.local"))
            );
            assert!((1..=60_000).contains(&entry["leftMs"].as_u64().unwrap()), "{entry}");
            clients.further(200);
        });
        let line = s.w.log_line(1, "the attempt is named", |line| line["tried"].is_string());
        let tried = line["tried"].as_str().unwrap();
        assert!(tried.starts_with(&format!("one at {}:", s.backends[0].v4)), "{tried}");
        assert_eq!((line.get("error"), &line["message"]), (None, &json!("connection complete")), "{line}");
        assert_ne!(line["dst.workload"], "one", "{line}");
        let retries = s.w.metric(1, "culvert_connection_retries_total", &["reason=\"refused\""]);
        let times = s.w.metric(1, "culvert_endpoint_set_asides_total", &["reason=\"refused\""]);
        assert!(retries >= 1.0 && times >= 1.0, "{retries} {times}");
        assert_eq!(s.w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
        let again = App::start(&s.backends[0]);
        let to_it = || s.w.metric(1, "istio_tcp_connections_opened_total", &["destination_workload=\"one\""]);
        let before = to_it();
        s.all_answered(|_| eventually("it is used again", || to_it() > before));
        eventually("it is not shown any more", || s.set_aside().is_empty());
        assert_eq!(s.w.metric(1, "culvert_endpoints_set_aside", &[]), 0.0);
        again.end();
    }
}

#[test]
fn a_backend_that_disappears_silently_costs_no_connection() {
    let s = Service::start("HBONE");
    let apps: Vec<App> = s.backends.iter().map(App::start).collect();
    let begun = Instant::now();
    s.all_answered(|clients| {
        clients.further(50);
        clients.between_requests(|| ip_in(&s.backends[1].netns, "link set eth0 down\n"));
        s.is_set_aside(1);
        // Until the time is over that the control plane may be silent.
        eventually("the time passes", || begun.elapsed() > Duration::from_secs(12));
        clients.further(50);
    });
    let reason = s.is_set_aside(1)["reason"].clone();
    assert!(["timed_out", "unreachable", "reset"].contains(&reason.as_str().unwrap()), "{reason}");
    assert_eq!(s.w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
    apps.into_iter().for_each(App::end);
}

#[test]
fn a_backend_whose_node_lets_it_go_costs_no_connection() {
    let s = Service::start("HBONE");
    let apps: Vec<App> = s.backends.iter().map(App::start).collect();
    s.all_answered(|clients| {
        clients.further(50);
        // Its tunnels get GOAWAY, and its port 15008 refuses connections, while the mesh says that it listens there.
        s.w.write_pods(2, &[&s.backends[0], &s.backends[2]]);
        let reason = s.is_set_aside(1)["reason"].clone();
        assert!(["going_away", "refused"].contains(&reason.as_str().unwrap()), "{reason}");
        clients.further(200);
    });
    assert_eq!(s.w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
    apps.into_iter().for_each(App::end);
}

#[test]
fn a_backend_that_goes_away_is_set_aside_before_anybody_connects() {
    let s = Service::start("HBONE");
    s.backends.iter().for_each(|pod| apps::serve(&pod.netns, PORT, apps::echo));
    let vip: IpAddr = "10.96.0.1".parse().unwrap();
    // With a connection that stays open, and with a tunnel that carries none.
    for is_open in [true, false] {
        let mut stream = connect(&s.client.netns, (vip, 80)).unwrap();
        let mut echoes = || stream.write_all(b"x").is_ok() && stream.read_exact(&mut [0]).is_ok();
        assert!(echoes());
        let connections = s.w.json(1, "/connections");
        let at = connections[0]["actualDst"].as_str().unwrap().parse::<std::net::SocketAddr>().unwrap().ip();
        let backend = s.backends.iter().position(|pod| pod.v4 == at).unwrap();
        if !is_open {
            drop(stream);
            eventually("it has ended", || s.w.json(1, "/connections").as_array().unwrap().is_empty());
        }
        let others: Vec<&Pod> = s.backends.iter().filter(|pod| pod.v4 != at).collect();
        s.w.write_pods(2, &others);
        let entry = s.is_set_aside(backend);
        assert_eq!((&entry["reason"], &entry["for"]), (&json!("going_away"), &json!("one pod")), "{entry}");
        s.w.write_pods(2, &s.backends.iter().collect::<Vec<_>>());
        s.w.wait_captured(2);
        eventually("the pause is over", || s.set_aside().is_empty());
    }
}

#[test]
fn a_backend_that_resets_connections_before_any_byte_is_set_aside() {
    let s = Service::start("HBONE");
    let reset = |stream: TcpStream| socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    apps::serve(&s.backends[0].netns, PORT, reset);
    s.backends[1..].iter().for_each(|pod| apps::serve(&pod.netns, PORT, apps::greet));
    let vip: IpAddr = "10.96.0.1".parse().unwrap();
    // A client that waits for the server to speak first.
    let listen = || connect(&s.client.netns, (vip, 80)).and_then(|mut stream| stream.read(&mut [0; 21]));
    eventually("it is set aside", || {
        let _ = listen();
        s.set_aside().iter().any(|one| one["workloadUid"] == *s.uid(0) && one["reason"] == "reset")
    });
    eventually("others are used", || listen().is_ok_and(|length| length > 0));
}

#[test]
fn a_rolling_restart_costs_no_request() {
    let s = Service::start("HBONE");
    let mut apps: Vec<App> = s.backends.iter().map(App::start).collect();
    let requests = s.all_answered(|clients| {
        for backend in 0..3 {
            clients.further(50);
            let old = apps.remove(0);
            clients.between_requests(|| old.end());
            s.is_set_aside(backend);
            clients.further(50);
            apps.push(App::start(&s.backends[backend]));
            let uid = s.uid(backend);
            eventually("it is back", || s.set_aside().iter().all(|one| one["workloadUid"] != *uid));
        }
    });
    assert!(requests >= 300);
    assert_eq!(s.w.metric(1, "culvert_connection_failures_total", &[]), 0.0);
}

#[test]
fn retries_do_not_become_a_storm_when_all_endpoints_are_dead() {
    let s = Service::start("HBONE");
    let connections = 300;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..connections / 4).for_each(|_| assert!(s.request().is_err())));
        }
    });
    let failed = || s.w.metric(1, "culvert_connection_failures_total", &["direction=\"outbound\""]);
    eventually("all have failed", || failed() >= f64::from(connections));
    assert_eq!(failed(), f64::from(connections), "each once, however often it was tried");
    let attempts = s.w.metric(2, "culvert_connection_failures_total", &["direction=\"inbound\"", "reason=\"connect\""]);
    let retries = s.w.metric(1, "culvert_connection_retries_total", &[]);
    assert_eq!(attempts, f64::from(connections) + retries);
    assert!(
        (10.0..=1.2f64.mul_add(f64::from(connections), 30.0) - f64::from(connections)).contains(&retries),
        "{retries}"
    );
    assert!(s.w.metric(1, "culvert_connection_retries_over_budget_total", &[]) > 0.0);
    let aside = s.w.metric(1, "culvert_endpoints_set_aside", &[]);
    assert!(aside <= 1.0, "at most half of three: {aside}");
    let line = s
        .w
        .log_line(1, "the attempts are named", |line| line["tried"].as_str().is_some_and(|tried| tried.contains("; ")));
    assert_eq!(line["reason"], "peer_refused", "{line}");
}

#[test]
fn endpoints_that_come_and_go_twenty_times_a_second_cost_no_request() {
    const CHANGES: usize = 200;
    let mut istio = Istio::new();
    let names = ["server", "one", "two", "three"];
    for name in &names[1..] {
        let pod = istio.w.mesh_pod(name, 2);
        istio.agent(2).know(&pod);
        Agent::redirect(&pod);
        apps::serve(&pod.netns, PORT, apps::who);
    }
    let pods = names.map(|name| istio.pod(name));
    istio.w.mesh.service("web", &["10.96.0.1"], &json!({"80": PORT}), &pods.iter().collect::<Vec<_>>());
    istio.tell();
    istio.start();
    let vip: IpAddr = "10.96.0.1".parse().unwrap();
    let client = istio.pod("client").netns;
    let (is_done, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut mesh = istio.w.mesh.clone();
    let key = format!("ns/{}", hostname("web"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    ask(&client, (vip, 80), "x").unwrap();
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begun = Instant::now();
        for change in 0..CHANGES {
            // Each of three is an endpoint half of the time, and for some changes none of them is.
            for (at, name) in names[1..].iter().enumerate() {
                let is_endpoint = change >> at & 1 == 0;
                mesh.of(name)["services"] = if is_endpoint { json!({ &*key: {"80": PORT} }) } else { json!({}) };
            }
            istio.plane.set(&mesh);
            // The rate is what is tested.
            let next = begun + Duration::from_millis(50) * (change as u32 + 1);
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        is_done.store(true, Ordering::Relaxed);
    });
    let answers = answers.into_inner();
    assert!(answers >= CHANGES, "{answers} answers");
    let messages = istio.w.metric(1, "istio_xds_message_total", &["Address"]);
    assert!(messages >= 0.8 * CHANGES as f64, "{messages} messages with changes");
    for name in names {
        let to_it = format!("destination_workload=\"{name}\"");
        assert!(istio.w.metric(1, "istio_tcp_connections_opened_total", &[&to_it]) > 0.0, "{name} has got some");
    }
    for node in [1, 2] {
        assert_eq!(istio.w.metric(node, "culvert_connection_failures_total", &[]), 0.0, "node {node}");
    }
}
