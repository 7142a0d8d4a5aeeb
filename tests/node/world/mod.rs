//! Two nodes on one machine, pods in them, and the daemon on each. All of it goes when it is dropped, also when a test
//! fails, unless `KEEP=1` asks for the evidence of a failure.

pub mod agent;
pub mod apps;
pub mod certs;
pub mod cluster_api;
pub mod collector;
pub mod control_plane;
pub mod facts;
pub mod forward;
pub mod kube;
pub mod names;
pub mod process;
pub mod sniffer;
pub mod wire;

pub use agent::Agent;
pub use control_plane::ControlPlane;
pub use process::Process;

use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest that a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A pod: a network namespace with addresses on a node.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub node: u8,
    pub v4: IpAddr,
    pub v6: IpAddr,
    pub netns: String,
}

/// What a test has built.
pub struct World {
    pub prefix: String,
    pub dir: PathBuf,
    /// The folder of logs; `dir` if nothing else is said.
    pub logs: PathBuf,
    pub pods: Vec<Pod>,
    pub mesh: facts::Mesh,
    nodes: Vec<(u8, Process)>,
    others: Vec<Process>,
}

impl World {
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root: they make network namespaces");
        let prefix = format!("ct{}-{}-", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(prefix.trim_end_matches('-'));
        fs::create_dir_all(&dir).unwrap();
        let logs = dir.clone();
        let world =
            Self { prefix, dir, logs, pods: vec![], mesh: facts::Mesh::default(), nodes: vec![], others: vec![] };
        let (one, two) = (world.ns("n1"), world.ns("n2"));
        ip(&format!(
            "netns add {one}\nnetns add {two}\nlink add wire netns {one} type veth peer name wire netns {two}\n"
        ));
        for (node, other) in [(1, 2), (2, 1)] {
            let name = world.ns(&format!("n{node}"));
            // With a fixed MAC address. Otherwise the bridge takes that of one of its ports and changes it when the
            // port goes, and pods cannot reach it for a while.
            ip_in(
                &name,
                &format!(
                    "link set lo up\nlink set wire up\naddr add 172.30.0.{node}/24 dev wire\n\
                     addr add fd30::{node}/64 dev wire nodad\nlink add pods address 02:00:00:00:00:0{node} type bridge\nlink set pods up\n\
                     addr add 10.{node}.0.1/24 dev pods\naddr add fd00:{node}::1/64 dev pods nodad\n\
                     route add 10.{other}.0.0/24 via 172.30.0.{other}\nroute add fd00:{other}::/64 via fd30::{other}\n"
                ),
            );
            inside(&name, || {
                fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
            });
        }
        let made = Command::new(subject()).args(["ca", "init"]).arg(world.ca()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        world
    }

    /// The full name of a namespace.
    pub fn ns(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca")
    }

    pub fn mesh_file(&self, node: u8) -> PathBuf {
        self.dir.join(format!("mesh{node}.json"))
    }

    pub fn pods_file(&self, node: u8) -> PathBuf {
        self.dir.join(format!("pods{node}.json"))
    }

    /// Makes a pod's namespace. The pod is neither known to the mesh nor captured yet.
    pub fn add_pod(&mut self, name: &str, node: u8) -> Pod {
        let index = self.pods.len() + 10;
        let pod = Pod {
            name: name.into(),
            node,
            v4: format!("10.{node}.0.{index}").parse().unwrap(),
            v6: format!("fd00:{node}::{index}").parse().unwrap(),
            netns: self.ns(name),
        };
        let (ns, host) = (&pod.netns, self.ns(&format!("n{node}")));
        ip(&format!("netns add {ns}\nlink add p{index} netns {host} type veth peer name eth0 netns {ns}\n"));
        ip_in(&host, &format!("link set p{index} master pods\nlink set p{index} up\n"));
        ip_in(
            ns,
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
                 route add default via 10.{node}.0.1\nroute add default via fd00:{node}::1\n",
                pod.v4, pod.v6
            ),
        );
        self.pods.push(pod.clone());
        pod
    }

    /// Adds a pod that the mesh knows as an HBONE workload. It is captured once its node starts.
    pub fn mesh_pod(&mut self, name: &str, node: u8) -> Pod {
        let pod = self.add_pod(name, node);
        self.mesh.workload(&pod, "HBONE");
        pod
    }

    /// Adds a pod that the mesh knows as a plain TCP workload and that is not captured.
    pub fn plain_pod(&mut self, name: &str, node: u8) -> Pod {
        let pod = self.add_pod(name, node);
        self.mesh.workload(&pod, "TCP");
        pod
    }

    /// Writes the mesh file for both nodes.
    pub fn write_mesh(&self) {
        for node in [1, 2] {
            replace(&self.mesh_file(node), &self.mesh.json());
        }
    }

    /// Writes the pods file of a node: the given pods, or all its HBONE pods.
    pub fn write_pods(&self, node: u8, pods: &[&Pod]) {
        let list: Vec<Value> = pods.iter().map(|pod| pod_entry(pod)).collect();
        replace(&self.pods_file(node), &serde_json::json!({"pods": list}).to_string());
    }

    pub fn captured_pods(&self, node: u8) -> Vec<&Pod> {
        self.pods.iter().filter(|pod| pod.node == node && self.mesh.is_hbone(&pod.name)).collect()
    }

    /// Writes all files, starts both daemons and waits until all pods are captured.
    pub fn start(&mut self) {
        self.write_mesh();
        for node in [1, 2] {
            self.write_pods(node, &self.captured_pods(node));
            self.start_node(node, &[]);
        }
        for node in [1, 2] {
            self.wait_captured(node);
        }
    }

    /// Starts a node's daemon as Istio's chart does: facts and certificates from a control plane, pods from an agent.
    pub fn start_istio_node(&mut self, node: u8, plane: &ControlPlane, agent: &Agent, settings: &[(&str, &str)]) {
        self.start_istio_program(&subject(), node, plane, agent, settings);
    }

    /// The same with another program that takes ztunnel's environment.
    pub fn start_istio_program(
        &mut self,
        program: &Path,
        node: u8,
        plane: &ControlPlane,
        agent: &Agent,
        settings: &[(&str, &str)],
    ) {
        let mut command = self.istio_command(program, node, plane, agent);
        command.envs(settings.iter().copied());
        let log = self.logs.join(format!("node{node}.log"));
        let process = Process::start(&self.ns(&format!("n{node}")), &mut command, &log);
        self.nodes.push((node, process));
    }

    /// The same in a container: with its own PID namespace, in which the host's processes are not visible.
    pub fn start_istio_container(&mut self, node: u8, plane: &ControlPlane, agent: &Agent) {
        let own = self.istio_command(&subject(), node, plane, agent);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(own.get_program()).args(own.get_args());
        command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let log = self.logs.join(format!("node{node}.log"));
        let process = Process::start(&self.ns(&format!("n{node}")), &mut command, &log);
        self.nodes.push((node, process));
    }

    /// Starts a second daemon of a node, inside a pod of its own as in a cluster.
    pub fn start_istio_upgrade(&mut self, own: &Pod, plane: &ControlPlane, agent: &Agent) {
        let mut command = self.istio_command(&subject(), own.node, plane, agent);
        let log = self.logs.join(format!("node{}.log", own.node));
        let process = Process::start(&own.netns, &mut command, &log);
        self.nodes.push((own.node, process));
    }

    /// Settings with which a daemon takes its facts from a control plane instead of the mesh file.
    pub fn facts_from(plane: &ControlPlane) -> Vec<(String, String)> {
        let address = format!("172.30.0.1:{}", control_plane::PORT);
        let path = |path: &Path| path.display().to_string();
        [
            ("LOCAL_XDS_PATH", String::new()),
            ("XDS_ADDRESS", address),
            ("ALT_XDS_HOSTNAME", control_plane::HOST.into()),
            ("XDS_ROOT_CA", path(&plane.root_file)),
            ("AUTH_TOKEN", path(&plane.token_file)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn istio_command(&self, program: &Path, node: u8, plane: &ControlPlane, agent: &Agent) -> Command {
        let mut command = Command::new(program);
        let address = format!("172.30.0.1:{}", control_plane::PORT);
        command.args(["proxy", "ztunnel"]).env("XDS_ADDRESS", &address).env("CA_ADDRESS", &address);
        command.env("ALT_XDS_HOSTNAME", control_plane::HOST).env("ALT_CA_HOSTNAME", control_plane::HOST);
        command.env("XDS_ROOT_CA", &plane.root_file).env("CA_ROOT_CA", &plane.root_file);
        command.env("AUTH_TOKEN", &plane.token_file).env("INPOD_UDS", &agent.path).env("LOG_FORMAT", "json");
        command.env("NODE_NAME", format!("n{node}")).env("ISTIO_META_CLUSTER_ID", "c1").env("RUST_LOG", "info");
        command.env("POD_NAME", format!("ztunnel-{node}")).env("POD_NAMESPACE", "istio-system");
        command.env("INSTANCE_IP", format!("172.30.0.{node}"));
        command
    }

    /// Takes the oldest daemon of a node out of the world. The test ends it.
    pub fn take_node(&mut self, node: u8) -> Process {
        let at = self.nodes.iter().position(|(n, _)| *n == node).unwrap();
        self.nodes.remove(at).1
    }

    pub fn is_ready(&self, node: u8) -> bool {
        self.try_get(node, 15021, "/healthz/ready").is_some_and(|(status, _)| status == 200)
    }

    /// Starts a node's daemon with further settings.
    pub fn start_node(&mut self, node: u8, settings: &[(&str, &str)]) {
        self.start_node_by(&[], node, settings);
    }

    /// The same, through a program that executes the daemon.
    pub fn start_node_by(&mut self, by: &[String], node: u8, settings: &[(&str, &str)]) {
        let mut command = match by {
            [] => Command::new(subject()),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(subject());
                command
            }
        };
        command.arg("node").env("LOCAL_XDS_PATH", self.mesh_file(node)).env("CULVERT_PODS_FILE", self.pods_file(node));
        command.env("CULVERT_CA_DIR", self.ca()).env("LOG_FORMAT", "json");
        command.envs(settings.iter().copied());
        self.start_command(node, &mut command);
    }

    /// Starts a daemon on a node and waits until its admin port answers.
    fn start_command(&mut self, node: u8, command: &mut Command) {
        let log = self.logs.join(format!("node{node}.log"));
        let process = Process::start(&self.ns(&format!("n{node}")), command, &log);
        self.nodes.push((node, process));
        eventually("the admin port answers", || self.try_get(node, 15000, "/pods").is_some());
    }

    pub fn node(&mut self, node: u8) -> &mut Process {
        &mut self.nodes.iter_mut().rev().find(|(n, _)| *n == node).expect("the node was started").1
    }

    pub fn pid(&self, node: u8) -> u32 {
        self.nodes.iter().rev().find(|(n, _)| *n == node).expect("the node was started").1.pid()
    }

    /// Runs a program in a namespace until the world is dropped.
    pub fn start_in(&mut self, ns: &str, command: &mut Command, log: &str) -> u32 {
        let process = Process::start(ns, command, &self.logs.join(log));
        let pid = process.pid();
        self.others.push(process);
        pid
    }

    /// Takes a started program out of the world. The test ends it.
    pub fn take(&mut self, pid: u32) -> Process {
        let at = self.others.iter().position(|process| process.pid() == pid).unwrap();
        self.others.remove(at)
    }

    pub fn wait_captured(&self, node: u8) {
        let wanted = self.captured_pods(node).len();
        eventually("all pods are captured", || {
            let states = self.states(node);
            states.len() == wanted && states.iter().all(|(_, state, _)| state == "captured")
        });
    }

    /// Name, state and reason of each pod of a node.
    pub fn states(&self, node: u8) -> Vec<(String, String, String)> {
        let text = |pod: &Value, key: &str| pod[key].as_str().unwrap_or_default().to_owned();
        let pods = self.json(node, "/pods");
        pods.as_array().unwrap().iter().map(|p| (text(p, "name"), text(p, "state"), text(p, "reason"))).collect()
    }

    /// State and reason of one pod; empty if it is not listed.
    pub fn state(&self, node: u8, pod: &str) -> (String, String) {
        let found = self.states(node).into_iter().find(|(name, _, _)| name == pod);
        found.map(|(_, state, reason)| (state, reason)).unwrap_or_default()
    }

    pub fn try_get(&self, node: u8, port: u16, path: &str) -> Option<(u16, String)> {
        inside(&self.ns(&format!("n{node}")), move || http(port, "GET", path, "localhost"))
    }

    pub fn json(&self, node: u8, path: &str) -> Value {
        let (status, body) = self.try_get(node, 15000, path).expect("the admin port answers");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The sum of a metric's samples whose lines contain all of `labels`.
    pub fn metric(&self, node: u8, name: &str, labels: &[&str]) -> f64 {
        let (_, text) = self.try_get(node, 15020, "/metrics").expect("the metrics port answers");
        let lines = text.lines().filter(|l| l.starts_with(name) && !l.starts_with('#'));
        let matching =
            lines.filter(|l| l[name.len()..].starts_with(['{', ' ']) && labels.iter().all(|x| l.contains(x)));
        matching.filter_map(|l| l.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// The log lines of a node so far.
    pub fn log(&self, node: u8) -> Vec<Value> {
        let text = fs::read_to_string(self.logs.join(format!("node{node}.log"))).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a log line of a node for which `test` holds, and returns it.
    pub fn log_line(&self, node: u8, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        eventually(&format!("log line: {what}"), || {
            found = self.log(node).into_iter().find(&test);
            found.is_some()
        });
        found.unwrap()
    }
}

impl World {
    /// The network namespaces that exist of this world.
    fn namespaces(&self) -> Vec<String> {
        let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = names.map(|name| name.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(&self.prefix)).collect();
        names.sort();
        names
    }

    /// Says what is left of a failed scenario, how to look at it, and how to remove it. The fakes (agent, control plane, applications)
    /// are threads of the test and end with it; the daemons go on.
    fn print_evidence(&self) {
        let dir = self.dir.display();
        let mut text = format!("\n--- kept, because KEEP=1 ---\nfiles, and each node's log: {dir}\n");
        for name in self.namespaces() {
            text += &format!("namespace: {name}\n");
        }
        for (node, process) in &self.nodes {
            text += &format!("daemon of node {node}: process {}, log {dir}/node{node}.log\n", process.pid());
        }
        let (node, prefix) = (self.ns("n1"), &self.prefix);
        text += &format!(
            "enter a pod:        nsenter --net=/run/netns/NAMESPACE nft list ruleset\n\
             ask node 1:         nsenter --net=/run/netns/{node} curl -s http://127.0.0.1:15000/pods\n\
             remove everything:  for n in $(ls /run/netns | grep ^{prefix}); do ip netns pids $n | xargs -r kill -9; \
             ip netns del $n; done; rm -r {dir}\n"
        );
        // Not by a macro: what those print is held back while the test runner captures output.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in [1, 2] {
                let log = fs::read_to_string(self.logs.join(format!("node{node}.log"))).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(30).collect();
                eprintln!("--- last lines of node {node} ---");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        if keeps_evidence() {
            self.print_evidence();
            return;
        }
        self.nodes.clear();
        self.others.clear();
        for name in self.namespaces() {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Whether a scenario has failed and `KEEP=1` asks to leave its namespaces, processes and files in place.
pub fn keeps_evidence() -> bool {
    std::thread::panicking() && std::env::var_os("KEEP").is_some_and(|keep| keep == "1")
}

pub fn pod_entry(pod: &Pod) -> Value {
    serde_json::json!({
        "name": pod.name, "namespace": "ns", "serviceAccount": pod.name, "uid": format!("uid-{}", pod.name),
        "netns": format!("/run/netns/{}", pod.netns),
    })
}

/// The binary under test.
#[allow(clippy::disallowed_methods, reason = "the rule is about the daemon")]
pub fn subject() -> PathBuf {
    std::env::var_os("SUBJECT").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_culvert")), PathBuf::from)
}

/// Replaces a file by renaming, as a careful operator's tools do.
pub fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// Runs `work` on a separate thread inside a namespace.
pub fn inside<T: Send>(ns: &str, work: impl FnOnce() -> T + Send) -> T {
    let path = Path::new("/run/netns").join(ns);
    let file = fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Waits until `test` holds. Fails with `what` if it does not in time.
#[track_caller]
pub fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !test() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        // The pause between two polls of the condition.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Connects from a namespace. The socket can be used outside of it.
pub fn connect(ns: &str, to: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
    let to = to.into();
    inside(ns, move || {
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

/// Whether a connection to an echo still carries bytes. One that is silent is neither alive nor ended.
pub fn alive(stream: &mut TcpStream) -> bool {
    let done = stream.write_all(b"ping").and_then(|()| stream.read_exact(&mut [0; 4]));
    if let Err(error) = &done {
        let is_silent = matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
        assert!(!is_silent, "an open connection carries nothing and does not end");
    }
    done.is_ok()
}

/// Sends a line and reads everything until the other end closes.
pub fn ask(ns: &str, to: impl Into<SocketAddr>, line: &str) -> std::io::Result<String> {
    let mut stream = connect(ns, to)?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether a connection is reset before any byte arrives, while it is opened or at the first read.
pub fn is_reset(ns: &str, to: impl Into<SocketAddr>) -> bool {
    let first = connect(ns, to).and_then(|mut stream| stream.read(&mut [0]));
    matches!(first, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

/// Sends one HTTP request to a local port of the thread's current namespace.
pub fn http(port: u16, method: &str, path: &str, host: &str) -> Option<(u16, String)> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

pub fn ip(batch: &str) {
    run_batch(&["-batch", "-"], batch);
}

pub fn ip_in(ns: &str, batch: &str) {
    run_batch(&["-n", ns, "-batch", "-"], batch);
}

fn run_batch(args: &[&str], batch: &str) {
    let mut child = Command::new("ip").args(args).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(batch.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a program in a namespace and returns its output. Fails if the program does.
pub fn output_in(ns: &str, program: &str, args: &[&str]) -> String {
    let output = Command::new("ip").args(["netns", "exec", ns, program]).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A program of the Python environment that `scripts/need-python` makes.
pub fn python_env(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-env/bin").join(program);
    assert!(path.exists(), "{} is not there: scripts/need-python installs it", path.display());
    path
}

/// A script that plays a peer.
pub fn peer_script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node/peers").join(name)
}
