//! A subject of the measurement: two nodes with a client, a server and a plain server, and the proxies between them.

use crate::load;
use crate::peers::{self, Pair};
use crate::process::{self, Use};
use crate::world::{self, Agent, ControlPlane, World, certs, eventually, inside, output_in};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Addresses that only the server's pod has, for connections that each need a tunnel of their own.
const FURTHER: Ipv4Addr = Ipv4Addr::new(10, 2, 128, 1);
/// The most of them that a case needs.
pub const FURTHER_COUNT: u32 = 1000;

/// What stands between client and server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Direct,
    /// One culvert on each node, with pods and facts from files.
    Culvert,
    /// One program on each node that takes ztunnel's environment, and rules in the pods as istio-cni writes them.
    Ztunnel(PathBuf),
    Envoy,
    Haproxy,
    Nginx,
}

impl Kind {
    /// Whether connections to other pods than the server, and to its further addresses, work.
    pub fn takes_any_destination(&self) -> bool {
        !matches!(self, Self::Haproxy | Self::Nginx)
    }

    /// Whether it relays traffic to a pod outside of the mesh.
    pub fn relays_plaintext(&self) -> bool {
        matches!(self, Self::Direct | Self::Culvert | Self::Ztunnel(_))
    }
}

/// What a case needs of a subject beside client and server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layout {
    /// Further addresses of the server's pod.
    pub further: u32,
    /// A second client's pod on the node of the first one; and all proxies share one processor, with nothing else on it.
    pub single_core: bool,
}

/// A subject that runs. It ends when it is dropped.
pub struct Subject {
    pub kind: Kind,
    layout: Layout,
    proxies: Vec<u32>,
    // Dropped in this order: servers end with their input, agents wait until the daemons of the world have gone.
    servers: Vec<Process>,
    world: World,
    _plane: Option<ControlPlane>,
    _agents: Vec<Agent>,
}

impl Subject {
    /// Starts both nodes.
    pub fn start(kind: &Kind, layout: Layout) -> Self {
        let mut world = World::new();
        // Not beside the files that the nodes watch: each line would wake the watchers.
        world.logs = world.dir.join("logs");
        std::fs::create_dir(&world.logs).unwrap();
        let (client, server) = (world.mesh_pod("client", 1), world.mesh_pod("server", 2));
        let plain = world.plain_pod("plain", 2);
        if layout.single_core {
            tune(&world.mesh_pod("greedy", 1).netns);
        }
        let addresses: Vec<IpAddr> = (0..layout.further).map(|index| further(index).into()).collect();
        let listed = addresses.iter().map(|address| json!(address));
        world.mesh.of("server")["workloadIps"].as_array_mut().unwrap().extend(listed);
        world::ip_in(
            &server.netns,
            &addresses.iter().map(|a| format!("addr add {a}/32 dev eth0\n")).collect::<String>(),
        );
        world::ip_in(&world.ns("n1"), "route add 10.2.128.0/17 via 172.30.0.2\n");
        world::ip_in(&world.ns("n2"), &format!("route add 10.2.128.0/17 via {}\n", server.v4));
        for ns in ["n1", "n2", "client", "server", "plain"] {
            tune(&world.ns(ns));
        }
        let servers = [&server, &plain].map(|pod| Process::start(&pod.netns, layout, &["load-server"])).into();
        let mut subject =
            Self { kind: kind.clone(), layout, proxies: vec![], servers, world, _plane: None, _agents: vec![] };
        for server in &mut subject.servers {
            server.wait_for("ready");
        }
        match kind {
            Kind::Direct => {}
            Kind::Culvert => {
                subject.world.start();
                subject.proxies = [1, 2].map(|node| subject.world.pid(node)).into();
            }
            Kind::Ztunnel(program) => subject.start_ztunnel(program),
            Kind::Envoy | Kind::Haproxy | Kind::Nginx => subject.start_pair(),
        }
        let mut open = None;
        eventually("the client reaches the server", || {
            open = subject.probe().ok();
            open.is_some()
        });
        if *kind != Kind::Direct {
            let tunnels = output_in(&client.netns, "ss", &["-Htn", "state", "established", "dport", "=", ":15008"]);
            assert!(!tunnels.trim().is_empty(), "{kind:?} carries the client's connection past the tunnel");
        }
        if layout.single_core {
            subject.proxies.iter().for_each(|pid| process::pin(*pid, 0));
        }
        subject
    }

    fn start_ztunnel(&mut self, program: &Path) {
        let world = &mut self.world;
        let plane = ControlPlane::start(&world.ns("n1"), &world.dir);
        plane.set(&world.mesh);
        let agents = [1, 2].map(|node| Agent::start(&world.dir.join(format!("zds{node}.sock"))));
        for pod in world.pods.clone() {
            let agent = &agents[usize::from(pod.node) - 1];
            if world.mesh.is_hbone(&pod.name) {
                agent.know(&pod);
                Agent::redirect(&pod);
                Agent::redirect_by_iptables(&pod);
            }
        }
        for (node, agent) in [1, 2].into_iter().zip(&agents) {
            world.start_istio_program(program, node, &plane, agent, &[]);
        }
        for (node, agent) in [1, 2].into_iter().zip(&agents) {
            agent.wait_snapshot(0);
            eventually("the node is ready", || world.is_ready(node));
        }
        self.proxies = [1, 2].map(|node| world.pid(node)).into();
        (self._plane, self._agents) = (Some(plane), agents.into());
    }

    fn start_pair(&mut self) {
        let (ca, dir) = (self.world.ca(), self.world.dir.clone());
        let (client, server) = (self.world.pods[0].clone(), self.world.pods[1].clone());
        let day = 86_400;
        let leaf = |name: &str| certs::leaf(&ca, &dir, name, &[&certs::spiffe(name)], -60, day);
        let (client_leaf, server_leaf) = (leaf("client"), leaf("server"));
        let root = ca.join("ca.pem");
        let pair = Pair { root: &root, client: &client_leaf, server: &server_leaf, to: server.v4, port: load::PORT };
        let rule = format!(
            "table ip bench {{ chain out {{ type nat hook output priority -100; \
             oifname != lo tcp dport {} redirect to :{}\n}}\n}}\n",
            load::PORT,
            peers::TAKE
        );
        output_in(&client.netns, "nft", &[&rule]);
        let (nginx_client, nginx_server) = (dir.join("nginx-client"), dir.join("nginx-server"));
        for (pod, text) in match self.kind {
            Kind::Envoy => [(&client, peers::envoy_client(&pair)), (&server, peers::envoy_server(&pair))],
            Kind::Haproxy => [(&client, peers::haproxy_client(&pair)), (&server, peers::haproxy_server(&pair))],
            _ => {
                for dir in [&nginx_client, &nginx_server] {
                    std::fs::create_dir_all(dir).unwrap();
                }
                [
                    (&client, peers::nginx_client(&pair, &nginx_client)),
                    (&server, peers::nginx_server(&pair, &nginx_server)),
                ]
            }
        } {
            let file = dir.join(format!("{}-proxy.json", pod.name));
            std::fs::write(&file, text).unwrap();
            let mut command = match self.kind {
                Kind::Envoy => {
                    let mut command = Command::new(world::python_env("envoy"));
                    command.args(["--disable-hot-restart", "--concurrency", "2", "-l", "warning", "-c"]).arg(&file);
                    command
                }
                Kind::Haproxy => {
                    let mut command = Command::new("haproxy");
                    command.args(["-db", "-f"]).arg(&file);
                    command
                }
                _ => {
                    let mut command = Command::new("nginx");
                    command.arg("-c").arg(&file);
                    command
                }
            };
            let log = format!("{}-proxy.log", pod.name);
            self.proxies.push(self.world.start_in(&pod.netns, &mut command, &log));
        }
    }

    /// A connection from the client to the server, after one exchange.
    fn probe(&self) -> std::io::Result<TcpStream> {
        let mut stream = world::connect(&self.world.ns("client"), self.server())?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"eprobe")?;
        stream.read_exact(&mut [0; 5])?;
        Ok(stream)
    }

    pub fn server(&self) -> SocketAddr {
        (self.world.pods[1].v4, load::PORT).into()
    }

    /// A server outside of the mesh, which is reached in plaintext.
    pub fn plain(&self) -> SocketAddr {
        (self.world.pods[2].v4, load::PORT).into()
    }

    /// The first of the server's further addresses.
    pub fn further() -> SocketAddr {
        (further(0), load::PORT).into()
    }

    pub fn client(&self, client: &load::Client) -> Process {
        self.client_in("client", client)
    }

    /// A client in the second client's pod.
    pub fn greedy_client(&self, client: &load::Client) -> Process {
        self.client_in("greedy", client)
    }

    fn client_in(&self, pod: &str, client: &load::Client) -> Process {
        let what = serde_json::to_string(client).unwrap();
        Process::start(&self.world.ns(pod), self.layout, &["load-client", &what])
    }

    /// What the proxies have used until now; nothing if there are none.
    pub fn used(&self) -> Use {
        process::of(&self.proxies)
    }

    pub fn has_proxies(&self) -> bool {
        !self.proxies.is_empty()
    }

    /// Fails if a proxy has ended.
    pub fn check(&self) {
        for pid in &self.proxies {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let ended = state.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'));
            assert!(!ended, "a proxy of {:?} has ended", self.kind);
        }
    }
}

impl Drop for Subject {
    /// Shows the end of the logs of a pair of proxies if something failed. The world shows those of the nodes.
    fn drop(&mut self) {
        for name in ["client-proxy.log", "server-proxy.log"] {
            if std::thread::panicking()
                && let Ok(log) = std::fs::read_to_string(self.world.logs.join(name))
            {
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("--- last lines of {name} ---\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            }
        }
    }
}

fn further(index: u32) -> Ipv4Addr {
    (u32::from(FURTHER) + index).into()
}

/// The same settings in every namespace: cubic, many ports, and ports that can be used again after a second.
fn tune(ns: &str) {
    inside(ns, || {
        for (name, value) in
            [("tcp_congestion_control", "cubic"), ("ip_local_port_range", "16384 65000"), ("tcp_tw_reuse", "1")]
        {
            let path = Path::new("/proc/sys/net/ipv4").join(name);
            std::fs::write(&path, value).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        // Only there once connections are tracked.
        let _ = std::fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", "2");
    });
}

/// A process of this program in a namespace, which ends with its input.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(ns: &str, layout: Layout, arguments: &[&str]) -> Self {
        let this = std::env::current_exe().unwrap();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = if layout.single_core && processors > 1 {
            let mut command = Command::new("taskset");
            command.args(["--cpu-list", &format!("1-{}", processors - 1)]).arg(this);
            command
        } else {
            Command::new(this)
        };
        // In a group of its own, so that Ctrl-C reaches only the bench, which then removes everything.
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = inside(ns, || command.spawn()).unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    pub fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "a load generator has ended");
        line
    }

    pub fn wait_for(&mut self, word: &str) {
        let line = self.line();
        assert_eq!(line.trim(), word);
    }

    pub fn stop(mut self) -> load::Outcome {
        self.send("stop");
        serde_json::from_str(&self.line()).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
