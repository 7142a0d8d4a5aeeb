//! The two `culvert node` processes: writes their files, starts them, and reads their admin pages and logs.

use super::cancel::is_cancelled;
use super::world::{DemoPod, PODS, World};
use crate::identity::Builtin;
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The `PATH` of the daemons.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Virtual address of the server's service.
pub const SERVICE_VIP: &str = "10.96.0.20";
/// How long the nodes may take to capture their pods.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Writes the files of both nodes and starts them.
pub fn start(world: &mut World) -> anyhow::Result<()> {
    let (mesh, ca) = (world.folder.join("mesh.yaml"), world.folder.join("ca"));
    Builtin::init(&ca)?;
    // YAML is a superset of JSON.
    std::fs::write(&mesh, serde_json::to_string_pretty(&facts())?)?;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    for node in [1, 2] {
        let pods_file = world.folder.join(format!("pods{node}.yaml"));
        std::fs::write(&pods_file, serde_json::to_string_pretty(&pods(world, node))?)?;
        let log = File::create(log_path(world, node))?;
        let mut command = Command::new(&program);
        command.arg("node").args(["--log-format", "json", "--log", "info"]);
        command.arg("--mesh-file").arg(&mesh).arg("--pods-file").arg(&pods_file).arg("--ca-dir").arg(&ca);
        // The user's environment may contain settings for other daemons.
        command.env_clear().env("PATH", PATH);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        world.start(&format!("node{node}"), &mut command)?;
    }
    Ok(())
}

/// Path of a node's log.
pub fn log_path(world: &World, node: u8) -> PathBuf {
    world.folder.join(format!("node{node}.log"))
}

/// Waits until both nodes report all their pods as captured, and returns the pods' names.
pub fn wait_until_captured(world: &mut World) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        if let Some(pid) = world.ended() {
            let logs: Vec<String> =
                [1, 2].iter().filter_map(|n| std::fs::read_to_string(log_path(world, *n)).ok()).collect();
            bail!("process {pid} has ended unexpectedly; the logs of the nodes:\n{}", logs.concat());
        }
        let mut captured = Vec::new();
        let mut others = Vec::new();
        for node in [1, 2] {
            for pod in get(world, node, "/pods").ok().and_then(|v| v.as_array().cloned()).unwrap_or_default() {
                let text = |key: &str| pod.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                if text("state") == "captured" {
                    captured.push(text("name"));
                } else {
                    others.push(format!("{}: {} ({})", text("name"), text("state"), text("reason")));
                }
            }
        }
        if captured.len() == PODS.iter().filter(|pod| pod.in_mesh).count() {
            captured.sort();
            return Ok(captured);
        }
        if is_cancelled() {
            bail!("interrupted");
        }
        if Instant::now() > deadline {
            bail!("not all pods were captured within {} s: {}", START_DEADLINE.as_secs(), others.join("; "));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Reads a page from a node's admin port.
pub fn get(world: &World, node: u8, path: &str) -> anyhow::Result<Value> {
    let address: SocketAddr = ([127, 0, 0, 1], crate::ports::ADMIN).into();
    let patience = Duration::from_secs(2);
    let mut stream =
        world.netns(&format!("node{node}"))?.enter(|| TcpStream::connect_timeout(&address, patience))??;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{path}: {}", head.lines().next().unwrap_or_default());
    }
    Ok(serde_json::from_str(body)?)
}

/// The access log lines that a node has written so far.
pub fn access_log(world: &World, node: u8) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(log_path(world, node))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line.get("scope").and_then(Value::as_str) == Some("access")).collect())
}

fn pods(world: &World, node: u8) -> Value {
    let of_node = PODS.iter().filter(|pod| pod.node == node && pod.in_mesh);
    let one = |pod: &DemoPod| {
        json!({
            "name": pod.name,
            "namespace": "demo",
            "serviceAccount": pod.name,
            "uid": format!("uid-{}", pod.name),
            "netns": world.path(pod.name),
        })
    };
    json!({"pods": of_node.map(one).collect::<Vec<_>>()})
}

fn facts() -> Value {
    let hostname = "server.demo.svc.cluster.local";
    let ports = json!({"80": 8080, "9000": 9000, "9001": 9001});
    let workload = |pod: &DemoPod| {
        let ips: Vec<&str> = [Some(pod.v4), pod.v6].into_iter().flatten().collect();
        let services = if pod.name == "server" { json!({format!("demo/{hostname}"): ports}) } else { json!({}) };
        json!({
            "uid": format!("demo//Pod/demo/{}", pod.name),
            "name": pod.name,
            "namespace": "demo",
            "serviceAccount": pod.name,
            "trustDomain": "cluster.local",
            "workloadIps": ips,
            "protocol": if pod.in_mesh { "HBONE" } else { "TCP" },
            "workloadName": pod.name,
            "canonicalName": pod.name,
            "canonicalRevision": "v1",
            "clusterId": "demo",
            "node": format!("node{}", pod.node),
            "services": services,
        })
    };
    let deny = |name: &str, test: Value| json!({"name": name, "namespace": "demo", "scope": "Namespace", "action": "Deny", "dryRun": false, "rules": [[[test]]]});
    json!({
        "workloads": PODS.iter().map(workload).collect::<Vec<_>>(),
        "services": [{
            "name": "server",
            "namespace": "demo",
            "hostname": hostname,
            "vips": [format!("/{SERVICE_VIP}")],
            "ports": ports,
        }],
        "policies": [
            deny("no-forbidden", json!({"principals": [{"Exact": "cluster.local/ns/demo/sa/forbidden"}]})),
            deny("mesh-only", json!({"notPrincipals": ["Presence"]})),
        ],
    })
}
