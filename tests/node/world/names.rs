//! The DNS of a test: a real resolver (unbound) on node 1, and containers that use it.

use super::{Pod, World, eventually, inside};
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Where the resolver listens: the address of node 1's bridge, like the DNS of a cluster.
pub const RESOLVER: &str = "10.1.0.1";
pub const RESOLVER_V6: &str = "fd00:1::1";

/// The zones that the resolver has beside the mesh, in unbound's syntax.
const ZONES: &str = r#"
  local-zone: "." static
  local-data: ". 86400 IN SOA a.root. host.root. 7 1800 900 604800 86400"
  local-zone: "example." static
  local-data: "example. 3600 IN SOA ns.example. host.example. 7 7200 3600 86400 60"
  local-data: "example. 3600 IN NS ns.example."
  local-data: "a.example. 300 IN A 203.0.113.1"
  local-data: "a.example. 300 IN A 203.0.113.2"
  local-data: "a.example. 300 IN AAAA 2001:db8:1::1"
  local-data: "a.example. 300 IN TXT 'v=spf1 -all' 'and more'"
  local-data: "a.example. 300 IN MX 10 mail.example."
  local-data: "a.example. 300 IN CAA 0 issue 'ca.example'"
  local-data: "a.example. 300 IN HTTPS 1 . alpn=h2,h3 ipv4hint=203.0.113.1"
  local-data: "four.example. 300 IN A 203.0.113.4"
  local-data: "six.example. 300 IN AAAA 2001:db8:1::6"
  local-data: "zero.example. 0 IN A 203.0.113.5"
  local-data: "_sip._tcp.example. 300 IN SRV 10 20 5060 a.example."
  local-data: "odd.example. 300 IN TYPE65280 \# 4 0a000001"
  local-data: "shop.example. 300 IN MX 10 mail.example."
  local-data: "shop.example. 300 IN A 203.0.113.99"
  local-data: "shop.example. 300 IN TXT 'owned elsewhere'"
  local-zone: "113.0.203.in-addr.arpa." static
  local-data-ptr: "203.0.113.1 300 a.example"
  local-zone: "cluster.local." static
  local-data: "cluster.local. 30 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 30"
  local-data: "external.ns.svc.cluster.local. 30 IN CNAME a.example."
  local-data: "inward.ns.svc.cluster.local. 30 IN CNAME only-mesh.example."
  local-data: "not-in-mesh.ns.svc.cluster.local. 30 IN A 10.96.7.7"
  local-data: "_peer._tcp.db.ns.svc.cluster.local. 30 IN SRV 0 100 9999 db-0.db.ns.svc.cluster.local."
  local-data: "db-7.db.ns.svc.cluster.local. 30 IN A 10.9.9.9"
  local-data: "google.com. 300 IN A 203.0.113.80"
"#;

impl World {
    /// Starts the resolver with further lines of configuration.
    pub fn start_resolver(&mut self, more: &str) -> u32 {
        // A text of many records, whose answer is far larger than any datagram.
        let large: String = (0..40)
            .map(|n| format!("  local-data: \"large.example. 300 IN TXT '{n:03}{}'\"\n", "x".repeat(100)))
            .chain(
                (0..230).map(|n| format!("  local-data: \"huge.example. 300 IN TXT '{n:03}{}'\"\n", "y".repeat(240))),
            )
            .collect();
        let config = self.dir.join("unbound.conf");
        let text = format!(
            "server:\n  interface: {RESOLVER}\n  interface: {RESOLVER_V6}\n  access-control: 0.0.0.0/0 allow\n  access-control: ::/0 allow\n\
             \x20 username: \"\"\n  chroot: \"\"\n  pidfile: \"\"\n  use-syslog: no\n  do-daemonize: no\n  module-config: \"iterator\"\n\
             \x20 directory: \"{}\"\n  rrset-roundrobin: no\n  minimal-responses: no\n  log-queries: no\n  num-threads: 1\n{ZONES}{large}{more}\
             remote-control:\n  control-enable: no\n",
            self.dir.display()
        );
        fs::write(&config, text).unwrap();
        let ns = self.ns("n1");
        let pid = self.start_in(&ns, Command::new("/usr/sbin/unbound").arg("-d").arg("-c").arg(&config), "unbound.log");
        let question = question("a.example", 1);
        eventually("the resolver answers", || {
            inside(&ns, || ask(&question, RESOLVER.parse().unwrap(), false)).is_some_and(|answer| answer[3] & 15 == 0)
        });
        pid
    }

    /// Starts a container in a pod: a process with its own mount namespace and `/etc/resolv.conf`.
    pub fn start_container(&mut self, pod: &Pod, resolv_conf: &str) -> u32 {
        let file = self.dir.join(format!("{}-resolv.conf", pod.name));
        fs::write(&file, resolv_conf).unwrap();
        let pid = self.start_in(
            &pod.netns,
            container(&file.display().to_string()).args(["sleep", "infinity"]),
            "container.log",
        );
        eventually("the container sees its file", || {
            fs::read_to_string(format!("/proc/{pid}/root/etc/resolv.conf")).is_ok_and(|text| text == resolv_conf)
        });
        pid
    }

    /// Runs a program in a container of the pod and returns its output.
    pub fn run_in(&self, pod: &Pod, program: &[&str]) -> String {
        let file = self.dir.join(format!("{}-resolv.conf", pod.name));
        let mut command = container(&file.display().to_string());
        command.args(program);
        let output = inside(&pod.netns, || command.output()).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

/// The `resolv.conf` that Kubernetes gives a pod of namespace `ns`.
pub fn kubernetes_conf() -> String {
    format!("search ns.svc.cluster.local svc.cluster.local cluster.local\nnameserver {RESOLVER}\noptions ndots:5\n")
}

pub fn container(file: &str) -> Command {
    let mut command = Command::new("unshare");
    let script = format!("mount --bind {file} /etc/resolv.conf && exec \"$@\"");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "container"]);
    command
}

/// A question for a type (by number), with the recursion bit.
pub fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x5a, 0xa5, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

/// The question with an OPT record: payload size, DNSSEC-OK, options.
pub fn with_edns(mut question: Vec<u8>, payload: u16, dnssec: bool, options: &[u8]) -> Vec<u8> {
    question[11] += 1;
    question.extend([0, 0, 41]);
    question.extend(payload.to_be_bytes());
    question.extend([0, 0, if dnssec { 0x80 } else { 0 }, 0]);
    question.extend((options.len() as u16).to_be_bytes());
    question.extend(options);
    question
}

/// Sends a message from the thread's current namespace. Returns the answer if it arrives within 6 s.
pub fn ask(message: &[u8], server: IpAddr, tcp: bool) -> Option<Vec<u8>> {
    let server = SocketAddr::new(server, 53);
    let patience = Some(Duration::from_secs(6));
    if tcp {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(6)).ok()?;
        stream.set_read_timeout(patience).unwrap();
        stream.write_all(&[&(message.len() as u16).to_be_bytes(), message].concat()).ok()?;
        let mut length = [0; 2];
        stream.read_exact(&mut length).ok()?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).ok()?;
        return Some(answer);
    }
    let socket = UdpSocket::bind((if server.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
    socket.set_read_timeout(patience).unwrap();
    socket.connect(server).ok()?;
    socket.send(message).ok()?;
    let mut answer = vec![0; 65535];
    let length = socket.recv(&mut answer).ok()?;
    answer.truncate(length);
    Some(answer)
}

/// A resolver whose answers a test scripts. It has its own address on node 1's bridge and answers datagrams.
pub struct Scripted {
    pub ip: IpAddr,
    pub asked: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl World {
    /// Starts a scripted resolver at `10.1.0.<last>`. `script` returns the datagrams that answer a question.
    pub fn start_scripted(&self, last: u8, script: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Scripted {
        self.start_scripted_at(&format!("10.1.0.{last}"), script)
    }

    pub fn start_scripted_at(&self, ip: &str, script: impl Fn(&[u8]) -> Vec<Vec<u8>> + Send + 'static) -> Scripted {
        let ns = self.ns("n1");
        let ip: IpAddr = ip.parse().unwrap();
        let (length, more) = if ip.is_ipv4() { (32, "") } else { (128, "nodad") };
        super::ip_in(&ns, &format!("addr add {ip}/{length} dev pods {more}\n"));
        let socket = inside(&ns, || UdpSocket::bind((ip, 53))).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut scripted = Scripted { ip, asked: Arc::default(), stop: Arc::default(), thread: None };
        let (asked, stop) = (scripted.asked.clone(), scripted.stop.clone());
        scripted.thread = Some(std::thread::spawn(move || {
            let mut question = [0; 65535];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, client)) = socket.recv_from(&mut question) else { continue };
                asked.fetch_add(1, Ordering::Relaxed);
                for answer in script(&question[..length]) {
                    let _ = socket.send_to(&answer, client);
                }
            }
        }));
        scripted
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// An answer with one address: the bytes of the question with the flags of an answer.
pub fn answer(question: &[u8], ip: [u8; 4]) -> Vec<u8> {
    let mut bytes = question.to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80;
    bytes[7] = 1;
    // The name is a pointer to that of the question.
    bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    bytes.extend(ip);
    bytes
}

/// An answer without records, with this response code.
pub fn refusal(question: &[u8], code: u8) -> Vec<u8> {
    let mut bytes = question.to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80 | code;
    bytes
}

/// The last address in an answer that has nothing after it.
pub fn address(answer: &[u8]) -> Option<[u8; 4]> {
    (answer[7] > 0).then(|| answer[answer.len() - 4..].try_into().unwrap())
}
