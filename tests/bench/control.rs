//! How fast a thousand nodes learn of changes from one control plane, and what that costs: `cargo bench --bench control`.
//!
//! Server and clients are in this process, on loopback with TLS, each side on threads of its own. A change is made with
//! its time in it, and each client notes how old the change is when it has read it. `NODES`, `WORKLOADS`, `CHANGES` (in a
//! second) and `SECONDS` change the sizes.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a measurement that cannot be made ends by panicking, and prints what it found"
)]

use bytes::{Buf, BufMut, Bytes, BytesMut};
use culvert::measured_control::Measured;
use culvert::proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, Node};
use h2::{RecvStream, SendStream};
use hdrhistogram::Histogram;
use prost::Message;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_rustls::TlsConnector;

const TYPES: [&str; 2] =
    ["type.googleapis.com/istio.workload.Address", "type.googleapis.com/istio.security.Authorization"];
const PATH: &str = "https://localhost/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// How often changes are made, as the watch does.
const BATCH: Duration = Duration::from_millis(20);

/// The last changes have reached all clients once no further one is read for this time. A workload that is changed again
/// before it is read is read once.
const QUIET: Duration = Duration::from_secs(2);
/// How long the clients may take to begin.
const BEGIN: Duration = Duration::from_secs(120);

/// The beginning of a response.
#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, tag = "5")]
    nonce: String,
}

/// The versions in a response.
#[derive(Clone, PartialEq, Message)]
struct Versions {
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Version>,
}

#[derive(Clone, PartialEq, Message)]
struct Version {
    #[prost(string, tag = "1")]
    version: String,
}

/// A size from the environment.
fn size(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// What all clients share.
struct Shared {
    begun: Instant,
    connector: TlsConnector,
    address: std::net::SocketAddr,
    /// Clients that know everything.
    ready: AtomicUsize,
    /// Age of changes in microseconds.
    ages: Mutex<Histogram<u64>>,
    responses: AtomicUsize,
}

fn request(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.into(), ..Default::default() }
}

fn send(stream: &mut SendStream<Bytes>, message: &DeltaDiscoveryRequest) {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.encoded_len()).expect("short"));
    message.encode(&mut framed).expect("there is room");
    stream.send_data(framed.freeze(), false).expect("the stream is open");
}

async fn message(body: &mut RecvStream, buffer: &mut BytesMut) -> BytesMut {
    loop {
        if buffer.len() >= 5 {
            let length = usize::try_from((&buffer[1..5]).get_u32()).expect("64 bits");
            if buffer.len() >= 5 + length {
                return buffer.split_to(5 + length).split_off(5);
            }
        }
        let data = body.data().await.expect("the stream goes on").expect("no error");
        body.flow_control().release_capacity(data.len()).expect("it was received");
        buffer.extend_from_slice(&data);
    }
}

async fn client(number: usize, shared: Arc<Shared>) {
    // As nodes have: the server limits what comes from one address.
    let [.., high, low] = u32::try_from(number).expect("not so many").to_be_bytes();
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind((std::net::Ipv4Addr::new(127, 1, high, low), 0).into()).expect("loopback has it");
    let tcp = socket.connect(shared.address).await.expect("it listens");
    tcp.set_nodelay(true).expect("a socket");
    let name = ServerName::try_from("localhost").expect("a name");
    let tls = shared.connector.connect(name, tcp).await.expect("TLS");
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(4 << 20).initial_connection_window_size(16 << 20);
    let (http, connection) = builder.handshake::<_, Bytes>(tls).await.expect("HTTP/2");
    tokio::task::spawn(connection);
    let head = http::Request::post(PATH)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {number}"))
        .body(())
        .expect("a request");
    let mut http = http.ready().await.expect("open");
    let (response, mut requests) = http.send_request(head, false).expect("open");
    for type_url in TYPES {
        let id = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local";
        let node = Some(Node { id: id.into(), ..Default::default() });
        send(&mut requests, &DeltaDiscoveryRequest { node, ..request(type_url) });
    }
    let mut body = response.await.expect("an answer").into_body();
    let (mut buffer, mut firsts) = (BytesMut::new(), 0);
    loop {
        let bytes = message(&mut body, &mut buffer).await.freeze();
        shared.responses.fetch_add(1, Ordering::Relaxed);
        let Head { type_url, nonce } = Head::decode(bytes.clone()).expect("a response");
        send(&mut requests, &DeltaDiscoveryRequest { response_nonce: nonce, ..request(&type_url) });
        if firsts < 2 {
            firsts += 1;
            if firsts == 2 {
                shared.ready.fetch_add(1, Ordering::Relaxed);
            }
            continue;
        }
        let now = u64::try_from(shared.begun.elapsed().as_micros()).expect("a short run");
        let versions = Versions::decode(bytes).expect("a response");
        let mut ages = shared.ages.lock().expect("no panic");
        for version in versions.resources {
            let made: u64 = version.version.parse().expect("a time");
            if made > 0 {
                ages.record(now.saturating_sub(made)).expect("within range");
            }
        }
    }
}

/// CPU time of the threads whose names begin with `name`.
fn cpu(name: &str) -> Duration {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").expect("procfs").flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let Some((comm, rest)) = stat.rsplit_once(") ") else { continue };
        if comm.split_once('(').is_some_and(|(_, comm)| comm.starts_with(name)) {
            let fields: Vec<u64> = rest.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
            ticks += fields[11] + fields[12];
        }
    }
    // A tick is a hundredth of a second on every architecture that Linux has.
    Duration::from_millis(ticks * 10)
}

fn memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().expect("a number") / 1024.0
}

fn runtime(name: &str, threads: usize) -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name(name).enable_all().build().expect("a runtime")
}

/// Waits until all clients know everything.
fn wait(shared: &Shared, count: usize) {
    let begun = Instant::now();
    while shared.ready.load(Ordering::Relaxed) < count {
        let ready = shared.ready.load(Ordering::Relaxed);
        assert!(begun.elapsed() < BEGIN, "{ready} of {count} clients know everything");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn main() {
    let (nodes, workloads) = (size("NODES", 1000), u32::try_from(size("WORKLOADS", 5000)).expect("not so many"));
    let (changes, seconds) = (size("CHANGES", 500), size("SECONDS", 10));
    let (server_side, client_side) = (runtime("server", 2), runtime("client", 2));
    let server = server_side.block_on(Measured::start()).expect("a server");
    server.set(0..workloads, |_| 0);
    server.set_complete();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.root.as_bytes()).expect("PEM")).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let shared = Arc::new(Shared {
        begun: Instant::now(),
        connector: TlsConnector::from(Arc::new(tls)),
        address: server.address,
        ready: AtomicUsize::new(0),
        ages: Mutex::new(Histogram::new(3).expect("a histogram")),
        responses: AtomicUsize::new(0),
    });
    client_side.spawn(client(nodes, shared.clone()));
    wait(&shared, 1);
    println!("one node, {workloads} workloads: first answers after {:?}", shared.begun.elapsed());
    let (at, used) = (Instant::now(), cpu("server"));
    for number in 0..nodes {
        client_side.spawn(client(number, shared.clone()));
    }
    wait(&shared, nodes + 1);
    println!(
        "{nodes} nodes at once: all know everything after {:.1?}; the server used {:.1?} of CPU; memory of both sides at most {:.0} MiB",
        at.elapsed(),
        cpu("server") - used,
        memory()
    );
    let (at, used, used_by_clients) = (Instant::now(), cpu("server"), cpu("client"));
    let responses = shared.responses.load(Ordering::Relaxed);
    let each = u32::try_from(changes).expect("not so many") * u32::try_from(BATCH.as_millis()).expect("short") / 1000;
    let (mut next, mut due) = (0, Instant::now());
    while at.elapsed() < Duration::from_secs(seconds as u64) {
        let now = u64::try_from(shared.begun.elapsed().as_micros()).expect("a short run");
        server.set((0..each).map(|n| (next + n) % workloads), |_| now);
        next += each;
        due += BATCH;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let made = usize::try_from(next).expect("64 bits");
    let all = u64::try_from(made * (nodes + 1)).expect("64 bits");
    let reached = || shared.ages.lock().expect("no panic").len();
    let (mut seen, mut grew) = (reached(), Instant::now());
    while seen < all && grew.elapsed() < QUIET {
        std::thread::sleep(BATCH);
        let now = reached();
        if now > seen {
            (seen, grew) = (now, Instant::now());
        }
    }
    let (took, ages) = ((grew - at).as_secs_f64(), shared.ages.lock().expect("no panic"));
    let share = |now: Duration, before: Duration| (now - before).as_secs_f64() / took;
    println!(
        "{changes} changes a second for {seconds} s: {made} changes reached {} times of {} ({:.1} responses a second and node)",
        ages.len(),
        all,
        (shared.responses.load(Ordering::Relaxed) - responses) as f64 / took / (nodes + 1) as f64
    );
    println!(
        "  age of a change when a node has read it: p50 {} ms, p99 {} ms, most {} ms",
        ages.value_at_quantile(0.5) / 1000,
        ages.value_at_quantile(0.99) / 1000,
        ages.max() / 1000
    );
    println!(
        "  CPU: server {:.2} cores, clients {:.2} cores",
        share(cpu("server"), used),
        share(cpu("client"), used_by_clients)
    );
    assert_eq!(server.connected(), nodes + 1, "nobody was lost");
    server.end();
}
