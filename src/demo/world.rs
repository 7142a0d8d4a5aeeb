//! Two nodes and their pods as network namespaces, and the processes in them. Dropping the world removes everything.

use crate::sys::netns::Netns;
use anyhow::{Context, bail};
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The link between the nodes, as node 1 sees it.
pub const WIRE: &str = "wire";

/// A pod of the demonstration.
#[derive(Clone, Copy, Debug)]
pub struct DemoPod {
    /// Name of the pod and its service account, and the last part of its network namespace's name.
    pub name: &'static str,
    /// Its node: 1 or 2.
    pub node: u8,
    /// Its IPv4 address.
    pub v4: &'static str,
    /// Its IPv6 address.
    pub v6: Option<&'static str>,
    /// Whether it is enrolled in the mesh.
    pub in_mesh: bool,
}

/// The five pods.
pub const PODS: [DemoPod; 5] = [
    DemoPod { name: "client", node: 1, v4: "10.1.0.10", v6: None, in_mesh: true },
    DemoPod { name: "forbidden", node: 1, v4: "10.1.0.11", v6: None, in_mesh: true },
    DemoPod { name: "dual", node: 1, v4: "10.1.0.12", v6: Some("fd00:1::12"), in_mesh: true },
    DemoPod { name: "server", node: 2, v4: "10.2.0.20", v6: Some("fd00:2::20"), in_mesh: true },
    DemoPod { name: "outside", node: 2, v4: "10.2.0.21", v6: None, in_mesh: false },
];

/// The network namespaces of one demonstration and the processes in them.
#[derive(Debug)]
pub struct World {
    prefix: String,
    /// Folder for its files.
    pub folder: PathBuf,
    children: Vec<Child>,
}

impl World {
    /// Makes the namespaces and links. First it removes what earlier demonstrations left because they were killed.
    pub fn build() -> anyhow::Result<Self> {
        sweep();
        let prefix = format!("culvert-{}-", std::process::id());
        // Below /run, where only root can create files, because the folder will contain the CA's key.
        let folder = folder_of(&std::process::id().to_string());
        let made = std::fs::DirBuilder::new().mode(0o700).create(&folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
        let world = Self { prefix, folder, children: Vec::new() };
        world.nodes()?;
        for (index, pod) in PODS.iter().enumerate() {
            world.pod(index, pod)?;
        }
        Ok(world)
    }

    /// Full name of a namespace.
    pub fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    /// Path of a namespace.
    pub fn path(&self, short: &str) -> PathBuf {
        Path::new("/run/netns").join(self.name(short))
    }

    /// A handle on a namespace.
    pub fn netns(&self, short: &str) -> anyhow::Result<Netns> {
        Ok(Netns::open(&self.path(short))?)
    }

    fn nodes(&self) -> anyhow::Result<()> {
        let (one, two) = (self.name("node1"), self.name("node2"));
        ip(&format!(
            "netns add {one}\nnetns add {two}\nlink add {WIRE} netns {one} type veth peer name {WIRE} netns {two}\n"
        ))?;
        for (node, other) in [(1, 2), (2, 1)] {
            let name = self.name(&format!("node{node}"));
            ip_in(
                &name,
                &format!(
                    "link set lo up\nlink set {WIRE} up\naddr add 172.30.0.{node}/24 dev {WIRE}\n\
                     addr add fd30::{node}/64 dev {WIRE} nodad\n\
                     link add pods type bridge\nlink set pods up\naddr add 10.{node}.0.1/24 dev pods\n\
                     addr add fd00:{node}::1/64 dev pods nodad\n\
                     route add 10.{other}.0.0/24 via 172.30.0.{other}\nroute add fd00:{other}::/64 via fd30::{other}\n"
                ),
            )?;
            let inside = Netns::open(&Path::new("/run/netns").join(&name))?;
            inside.enter(|| -> std::io::Result<()> {
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
                std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
            })??;
        }
        Ok(())
    }

    fn pod(&self, index: usize, pod: &DemoPod) -> anyhow::Result<()> {
        let (name, node) = (self.name(pod.name), self.name(&format!("node{}", pod.node)));
        ip(&format!("netns add {name}\nlink add pod{index} netns {node} type veth peer name eth0 netns {name}\n"))?;
        ip_in(&node, &format!("link set pod{index} master pods\nlink set pod{index} up\n"))?;
        let mut inside = format!(
            "link set lo up\nlink set eth0 up\naddr add {}/24 dev eth0\nroute add default via 10.{}.0.1\n",
            pod.v4, pod.node
        );
        if let Some(v6) = pod.v6 {
            writeln!(inside, "addr add {v6}/64 dev eth0 nodad\nroute add default via fd00:{}::1", pod.node)?;
        }
        ip_in(&name, &inside)
    }

    /// Starts a program in a namespace and returns its process id. The program is killed when the world is dropped.
    pub fn start(&mut self, short: &str, command: &mut Command) -> anyhow::Result<u32> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = self.netns(short)?.enter(|| command.spawn())?.with_context(|| format!("cannot start {program}"))?;
        let pid = child.id();
        self.children.push(child);
        Ok(pid)
    }

    /// Runs a program in a namespace to its end. Returns its standard output, or its exit status if it failed.
    pub fn run(&self, short: &str, command: &mut Command) -> anyhow::Result<Result<String, i32>> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = self.netns(short)?.enter(|| command.spawn())?.with_context(|| format!("cannot start {program}"))?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(if output.status.success() { Ok(text) } else { Err(output.status.code().unwrap_or(-1)) })
    }

    /// The process id of a child that has ended by itself, which none should.
    pub fn ended(&mut self) -> Option<u32> {
        self.children.iter_mut().find_map(|child| child.try_wait().ok().flatten().map(|_| child.id()))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            // An error means that the child has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
        remove(&self.prefix);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn folder_of(pid: &str) -> PathBuf {
    Path::new("/run").join(format!("culvert-{pid}"))
}

/// Removes what demonstrations left whose process does not exist any more, because it was killed.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((pid, _)) = name.strip_prefix("culvert-").and_then(|rest| rest.split_once('-')) else { continue };
        let is_number = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
        if is_number && !Path::new("/proc").join(pid).exists() {
            remove(&format!("culvert-{pid}-"));
            let _ = std::fs::remove_dir_all(folder_of(pid));
        }
    }
}

fn remove(prefix: &str) {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    for name in names.filter(|name| name.starts_with(prefix)) {
        if let Ok(output) = Command::new("ip").args(["netns", "pids", &name]).output() {
            for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                if let Ok(pid) = pid.parse() {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                }
            }
        }
        let _ = Command::new("ip").args(["netns", "del", &name]).stderr(Stdio::null()).status();
    }
}

fn ip(batch: &str) -> anyhow::Result<()> {
    batched(&["-batch", "-"], batch)
}

fn ip_in(netns: &str, batch: &str) -> anyhow::Result<()> {
    batched(&["-n", netns, "-batch", "-"], batch)
}

fn batched(args: &[&str], batch: &str) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run ip; install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(batch.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
