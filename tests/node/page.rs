//! The live page in a real browser: of a cluster's size by `culvert dashboard`, and of a node by its admin port.

use crate::world::forward::Forward;
use crate::world::kube::{Api, KubePod};
use crate::world::{World, apps, connect, eventually, inside, is_reset, peer_script, subject};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What an attacker who may name things would try.
const MARKUP: &str =
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'><b onclick=hacked>";

const NAMESPACES: [&str; 10] =
    ["shop", "payments", "search", "identity", "media", "billing", "ingress", "reports", "learning", "platform"];
/// When the connections of the fake began.
static BEGUN: OnceLock<Instant> = OnceLock::new();

const PODS: u64 = 200;
const CONNECTIONS: u64 = 5_000;

/// Where screenshots stay for whoever wants to look.
fn artefacts(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/artefacts").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The namespace, workload and pod of a number.
fn pod(number: u64) -> (&'static str, String, String) {
    let number = number % PODS;
    let namespace = NAMESPACES[(number / 20) as usize];
    let role = ["api", "web", "worker", "cache", "gateway"][(number % 5) as usize];
    let workload = format!("{role}-{}", number % 20);
    (namespace, workload.clone(), format!("{workload}-6d4cf56db6-{number}"))
}

/// A node's answer to `/snapshot`, with hostile names. `asked` is how often it was asked.
fn snapshot(asked: u64) -> Value {
    let time = "2026-11-28T05:00:00Z";
    let pods: Vec<Value> = (0..PODS)
        .map(|number| {
            let (namespace, workload, name) = pod(number);
            let (state, reason) = match number {
                3 => ("failed", json!(format!("attempt {asked}: {MARKUP}"))),
                4 => ("pending", json!("the mesh facts do not contain the pod")),
                _ => ("captured", Value::Null),
            };
            let name = if number == 7 { format!("{name}{MARKUP}") } else { name };
            json!({"name": name, "namespace": namespace, "uid": format!("u{number}"), "serviceAccount": workload,
                   "state": state, "reason": reason, "since": time, "otherRules": [MARKUP]})
        })
        .collect();
    let connections: Vec<Value> = (0..CONNECTIONS).map(|number| connection(number, asked)).collect();
    let certificates: Vec<Value> = (0..PODS)
        .map(|number| {
            let (namespace, workload, _) = pod(number);
            let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{workload}");
            json!({"identity": if number == 9 { format!("{identity}{MARKUP}") } else { identity }, "state": "Available",
                   "error": (number == 5).then(|| format!("not renewed: {MARKUP}")), "expirationTime": "2099-01-01T00:00:00Z"})
        })
        .collect();
    let history: Vec<Value> = (0..30)
        .map(|number| {
            let (from, to) = (pod(number), pod(number + 21));
            json!({"time": format!("2026-11-28T04:{:02}:00.000Z", number), "kind": "connection", "direction": "inbound",
                   "outcome": "refused", "reason": "denied", "error": null, "rule": format!("shop/deny{MARKUP}"),
                   "next_step": "A DENY policy matched", "pod": format!("{}/{}", to.0, to.2), "encrypted": true,
                   "source": {"address": "10.1.0.9:40000", "workload": format!("{}/{}", from.0, from.1)},
                   "destination": {"address": "10.2.0.9:8080", "workload": format!("{}/{}", to.0, to.1)}})
        })
        .collect();
    let status = json!({"version": MARKUP, "ready": true, "red": [MARKUP], "notes": [],
                        "facts": {"source": "control plane", "from": MARKUP, "current": true, "ageSeconds": 0},
                        "connections": {"open": CONNECTIONS}, "failures": {"total": 30, "windowSeconds": 300}});
    json!({"node": "n1", "reachable": true, "error": null, "status": status, "pods": pods, "connections": connections,
           "connectionsTotal": CONNECTIONS, "certificates": certificates, "history": history})
}

fn connection(number: u64, asked: u64) -> Value {
    let source = pod(number * 7);
    let near = number.is_multiple_of(3);
    let target = pod(number * 7 + if near { 1 } else { 20 + number % 40 });
    let encrypted = !number.is_multiple_of(17);
    let identity = |(namespace, workload, _): &(&str, String, String)| {
        let markup = if number == 11 { MARKUP } else { "" };
        encrypted.then(|| format!("spiffe://cluster.local/ns/{namespace}/sa/{workload}{markup}"))
    };
    let age = BEGUN.get_or_init(Instant::now).elapsed().as_millis() as u64;
    let tls = json!({"version": "TLSv1_3", "keyExchange": "X25519MLKEM768", "cipher": "TLS13_AES_128_GCM_SHA256"});
    json!({
        "id": number, "pod": format!("u{}", (number * 7) % PODS), "direction": "outbound",
        "protocol": if encrypted { "HBONE" } else { "TCP" },
        "src": format!("10.1.{}.{}:{}", number % 200, number % 250, 30_000 + number),
        "dst": format!("10.96.0.{}:8080", number % 250), "actualDst": "10.2.0.7:15008",
        "hboneAddr": encrypted.then_some("10.2.0.7:8080"),
        "srcWorkload": format!("{}/{}", source.0, source.1), "dstWorkload": format!("{}/{}", target.0, target.1),
        "srcIdentity": identity(&source), "dstIdentity": identity(&target),
        "bytesSent": number * 1000 + asked, "bytesReceived": number * 50_000, "ageMs": number * 1000 + age,
        "tls": encrypted.then_some(tls), "rule": format!("allowed by: {}/allow rule[{number}]", target.0),
    })
}

/// An admin port that answers as a node of that size does. Returns its address.
fn fake_admin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let asked = AtomicU64::new(0);
        for mut stream in listener.incoming().flatten() {
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let _ = reader.read_line(&mut line);
            let mut rest = String::from("x");
            while !rest.trim().is_empty() {
                rest.clear();
                if reader.read_line(&mut rest).unwrap_or(0) == 0 {
                    break;
                }
            }
            let body = match line.split(' ').nth(1).unwrap_or_default() {
                "/snapshot" => snapshot(asked.fetch_add(1, Ordering::Relaxed)),
                path => json!({"from": path, "to": MARKUP, "steps": [{"about": "address", "text": MARKUP, "details": [MARKUP]}],
                               "route": null, "reason": null, "result": MARKUP}),
            }
            .to_string();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
        }
    });
    address
}

/// `culvert dashboard`, until dropped.
struct Dashboard {
    child: Child,
    url: String,
}

impl Dashboard {
    fn start(arguments: &[&str]) -> Self {
        Self::of(Command::new(subject()).args(["dashboard", "--port", "0"]).args(arguments))
    }

    fn of(command: &mut Command) -> Self {
        command.stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_default().to_owned();
        assert!(url.ends_with('/'), "{line}");
        Self { child, url }
    }

    /// Asks without a browser. Returns the head and the body.
    fn ask(&self, path: &str, headers: &str) -> (String, String) {
        let address = self.url.trim_start_matches("http://").trim_end_matches('/');
        request(TcpStream::connect(address).unwrap(), path, headers)
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn request(mut stream: TcpStream, path: &str, headers: &str) -> (String, String) {
    write!(stream, "GET {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// What a browser sees of a page.
fn browse(command: &mut Command, url: &str, folder: &Path, words: &str) -> Value {
    command.arg(peer_script("browser.mjs")).arg(url).arg(folder).arg(words);
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    let seen: Value = serde_json::from_str(&text).unwrap();
    eprintln!("loaded in {} ms, with all rows after {} ms; {}", seen["loaded"], seen["live"], folder.display());
    seen
}

/// What holds for every page.
fn is_sound(seen: &Value) {
    for list in ["console", "external", "violations"] {
        assert_eq!(seen[list], json!([]), "{list}");
    }
    assert_eq!(seen["hacked"], "undefined");
    let policy = seen["headers"]["content-security-policy"].as_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(policy.contains("frame-ancestors 'none'") && policy.contains("script-src 'sha256-"), "{policy}");
    assert_eq!(seen["headers"]["x-content-type-options"], "nosniff");
    // Far above what it takes, because other tests run beside it.
    assert!(seen["loaded"].as_u64().unwrap() < 10_000, "{}", seen["loaded"]);
    assert_eq!((&seen["slash"], &seen["focusSeen"]), (&json!("q"), &json!("solid")));
    assert_eq!(seen["news"], true);
    assert!(seen["firstRow"].is_string() && seen["firstRow"] != seen["secondRow"], "{seen:#}");
    assert_eq!(seen["back"], seen["secondRow"], "the focus is where it was");
    assert_eq!(seen["lastIndex"], seen["rowCount"], "End leads to the last row");
    assert_eq!(seen["sorted"], "ascending");
    assert!(seen["chip"].is_string() && seen["center"] == seen["nextChip"], "{seen:#}");
    assert_eq!(seen["chipsAfter"], seen["chips"], "Escape leads back to all workloads");
    assert_eq!(seen["paused"], json!(["true", "paused at"]));
    assert_eq!((&seen["dark"], &seen["motion"]), (&json!("rgb(15, 21, 20)"), &json!("auto")));
    assert_eq!(lines(seen).len(), seen["lines"].as_object().unwrap().len(), "ways differ without colours");
}

fn lines(seen: &Value) -> std::collections::BTreeSet<String> {
    seen["lines"].as_object().unwrap().values().map(ToString::to_string).collect()
}

fn texts(value: &Value) -> String {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_page_of_two_hundred_pods_and_five_thousand_connections_is_usable_and_inert() {
    let admin = fake_admin().to_string();
    let dashboard = Dashboard::start(&["--admin", &admin]);
    let seen = browse(&mut Command::new("node"), &dashboard.url, &artefacts("page-cluster"), "plaintext shop/web");
    is_sound(&seen);
    assert_eq!(seen["found"], "5000 of 5000 connections");
    assert_eq!(seen["rowCount"], 5001);
    assert!(seen["rowsInDocument"].as_u64().unwrap() < 100, "only the rows in sight exist");
    assert_eq!(seen["chips"], PODS);
    assert_eq!(lines(&seen).len(), 3, "{}", seen["lines"]);
    let found = seen["filtered"].as_str().unwrap();
    assert!(!found.starts_with("0 ") && found.ends_with(" of 5000 connections"), "{found}");
    for row in seen["filteredRows"].as_array().unwrap() {
        let row = row.as_str().unwrap();
        assert!(row.contains("plaintext") && row.contains("shop/web"), "{row}");
    }
    assert_eq!(seen["mostSent"], "4.7 MiB");
    assert!(texts(&seen["pods"]).starts_with("shop/cache-3-6d4cf56db6-3✕ failed"), "those that fail come first");
    assert_eq!(texts(&seen["certificates"]).matches("not renewed: ").count(), 1);
    for shown in ["pods", "refusals", "attention", "nodes", "certificates"] {
        assert!(texts(&seen[shown]).contains("<script>"), "{shown} shows what was written, as text");
    }
    assert!(seen["explained"].as_str().unwrap().contains("<script>"));
    let plain = &seen["plain"];
    for (section, rows) in [("pods", 200), ("certificates", 200), ("connections", 200), ("refusals", 30), ("nodes", 1)]
    {
        assert_eq!(plain[section], rows, "{section}");
    }
    assert!(plain["flows"].as_u64().unwrap() > 100);
    assert!(plain["pager"].as_str().unwrap().starts_with("Rows 1 to 200 of 5000."), "{}", plain["pager"]);
    let count = found.split(' ').next().unwrap();
    assert!(plain["found"].as_str().unwrap().ends_with(&format!(" of {count}.")), "{} {found}", plain["found"]);
}

#[test]
fn the_page_is_for_few_local_readers_that_keep_up() {
    let admin = fake_admin().to_string();
    let dashboard = Dashboard::start(&["--admin", &admin]);
    let local = "host: localhost\r\n";
    for (path, headers) in [
        ("/", "host: attacker.example\r\n"),
        ("/events", "host: attacker.example\r\n"),
        ("/", "host: localhost\r\norigin: http://attacker.example\r\n"),
        ("/events", "host: localhost\r\nsec-fetch-site: cross-site\r\n"),
        // An image, or a link, in another site's page.
        ("/explain?from=shop/web-1&to=10.96.0.1:80", "host: localhost\r\nsec-fetch-site: cross-site\r\n"),
        ("/", "host: localhost\r\nsec-fetch-site: same-site\r\nsec-fetch-mode: navigate\r\n"),
    ] {
        let (head, _) = dashboard.ask(path, headers);
        assert!(head.starts_with("HTTP/1.1 403"), "{path} {headers}: {head}");
    }
    // They never read, so they are dropped and make room for others.
    let address: SocketAddr = dashboard.url.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    let silent: Vec<TcpStream> = (0..8)
        .map(|_| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            // The kernel must not read much for them.
            socket.set_recv_buffer_size(4096).unwrap();
            socket.connect(&address.into()).unwrap();
            let mut stream = TcpStream::from(socket);
            write!(stream, "GET /events HTTP/1.1\r\n{local}\r\n").unwrap();
            stream.read_exact(&mut [0; 15]).unwrap();
            stream
        })
        .collect();
    let (head, text) = dashboard.ask("/events", local);
    assert!(head.starts_with("HTTP/1.1 503") && text.contains("8 readers"), "{head}\n{text}");
    let mut reader = None;
    eventually("a silent reader is dropped", || {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET /events HTTP/1.1\r\n{local}\r\n").unwrap();
        let mut status = [0; 15];
        stream.read_exact(&mut status).unwrap();
        reader = Some(stream);
        status == *b"HTTP/1.1 200 OK"
    });
    drop(silent);
    // One that reads gets the whole and then only what has changed.
    let mut events = BufReader::new(reader.unwrap()).lines().map_while(Result::ok);
    let mut next = |name: &str| {
        let wanted = format!("event: {name}");
        events.find(|line| line.ends_with(&wanted)).unwrap();
        let data = events.find(|line| line.starts_with("data: ")).unwrap();
        serde_json::from_str::<Value>(data.trim_start_matches("data: ")).unwrap()
    };
    assert_eq!(next("whole")["set"]["connections"].as_object().unwrap().len(), 5000);
    let change = next("change");
    assert_eq!(change["set"]["traffic"].as_object().unwrap().len(), 5000, "every connection has carried a byte");
    assert_eq!(change["set"]["connections"], Value::Null, "nothing else of them has changed");
    assert_eq!(change["set"]["pods"].as_object().unwrap().len(), 1);
}

#[test]
fn a_node_shows_itself_and_a_program_still_gets_the_list_of_paths() {
    let mut w = World::new();
    let (client, other, server) = (w.mesh_pod("client", 1), w.mesh_pod("other", 1), w.mesh_pod("server", 2));
    let plain = w.plain_pod("plain", 2);
    for port in [8080, 8081] {
        apps::serve(&server.netns, port, apps::echo);
    }
    apps::serve(&plain.netns, 8080, apps::echo);
    w.mesh.service("web", &["10.96.0.1"], &json!({"80": 8080}), &[&server]);
    w.mesh.policy("shut<img src=x onerror=window.hacked=1>", "Namespace", "Deny", json!({"destinationPorts": [8081]}));
    w.start();
    let vip: std::net::IpAddr = "10.96.0.1".parse().unwrap();
    let mut open: Vec<TcpStream> = Vec::new();
    for (from, to, port) in
        [(&client, vip, 80), (&client, server.v4, 8080), (&other, vip, 80), (&client, plain.v4, 8080)]
    {
        let mut stream = connect(&from.netns, (to, port)).unwrap();
        stream.write_all(b"hello").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        open.push(stream);
    }
    assert!(is_reset(&client.netns, (server.v4, 8081)));
    let key = std::fs::read_to_string(w.ca().join("ca.key")).unwrap();
    for (node, title, ways) in [(1, "n1", 3), (2, "n2", 2)] {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &w.ns(&format!("n{node}")), "node"]);
        let seen = browse(&mut command, "http://127.0.0.1:15000/", &artefacts(&format!("page-{title}")), "client");
        is_sound(&seen);
        assert!(texts(&seen["pods"]).contains("captured"), "{seen:#}");
        assert!(seen["plain"]["text"].as_str().unwrap().contains("ns/server"), "{seen:#}");
        assert_eq!(lines(&seen).len(), ways, "{seen:#}");
        assert!(!seen.to_string().contains(key.lines().nth(1).unwrap()) && !seen.to_string().contains("PRIVATE KEY"));
    }
    let refused = w.json(2, "/snapshot");
    assert_eq!(refused["history"][0]["source"]["workload"], "ns/client", "{refused:#}");
    let ask = |headers: &str| {
        let headers = format!("host: localhost\r\n{headers}");
        inside(&w.ns("n1"), || request(TcpStream::connect("127.0.0.1:15000").unwrap(), "/", &headers))
    };
    let (_, list) = ask("accept: */*\r\n");
    assert!(list.contains("<li><a href=/pods>") && !list.contains("<script"), "{list}");
    let (_, page) = ask("accept: text/html\r\n");
    assert!(page.contains("<script>") && page.contains("<table"), "{page}");
}

#[test]
fn a_question_to_the_page_of_a_cluster_does_not_list_its_daemons_again() {
    let mut w = World::new();
    let client = w.mesh_pod("client", 1);
    w.start();
    let api = Api::start(&w, 1);
    api.daemon(1, json!({"phase": "Running"}), Forward::To(w.ns("n1")));
    api.pod(&KubePod::without_sandbox(&client));
    let mut command = Command::new(subject());
    command.args(["dashboard", "--port", "0"]).env_clear().env("KUBECONFIG", &api.kubeconfig);
    let begun = Instant::now();
    inside(&w.ns("n1"), || {
        let dashboard = Dashboard::of(&mut command);
        for _ in 0..5 {
            let (head, told) = dashboard.ask("/explain?from=ns/client&to=10.9.9.9:1", "host: localhost\r\n");
            assert!(head.starts_with("HTTP/1.1 200") && told.contains("ns/client"), "{head}\n{told}");
        }
    });
    let lists = api.state().requests.iter().filter(|request| request.contains("labelSelector=app")).count() as u64;
    let allowed = 1 + begun.elapsed().as_secs() / 20;
    assert!((1..=allowed).contains(&lists), "{lists} lists");
}
