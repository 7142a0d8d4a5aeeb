//! A cluster in one mode, and operations on it.

mod load;
mod pods;
mod sniffer;

pub use self::load::Load;
pub use self::pods::Watched;
pub use self::sniffer::Sniffer;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The namespace of the application.
pub const SHOP: &str = "shop";
/// The namespace of Istio and of culvert.
pub const SYSTEM: &str = "istio-system";
/// The version that `up` installs.
pub const IMAGE: &str = "0.1.0";

/// The longest that any operation may take.
const PATIENCE: Duration = Duration::from_secs(240);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Istio,
    Agent,
    Alone,
    /// culvert's own control plane, which the scenarios install.
    Control,
}

/// A running cluster. Only one runs at a time.
pub struct Cluster {
    mode: Mode,
    _turn: MutexGuard<'static, Option<Mode>>,
}

/// The mode of the running cluster.
static RUNNING: Mutex<Option<Mode>> = Mutex::new(None);

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Istio => "test-istio",
            Self::Agent => "test-agent",
            Self::Alone => "test-alone",
            Self::Control => "test-control",
        }
    }

    fn switch(self) -> &'static [&'static str] {
        match self {
            Self::Istio => &[],
            Self::Agent => &["--agent"],
            Self::Alone => &["--alone"],
            Self::Control => &["--control", "--bare"],
        }
    }

    fn script(self, arguments: &[&str]) -> Output {
        let mut command = Command::new(root().join("scripts/cluster"));
        command.args(arguments).env("CULVERT_CLUSTER_NAME", self.name()).stdin(Stdio::null());
        command.output().unwrap()
    }
}

impl Cluster {
    /// A cluster as `up` leaves it, whatever the previous scenario did to it.
    pub fn of(mode: Mode) -> Self {
        let mut turn = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = turn.filter(|other| *other != mode) {
            said(&other.script(&["down"])).unwrap();
        }
        *turn = Some(mode);
        let cluster = Self { mode, _turn: turn };
        // First start what a scenario has stopped, because without it the leftovers could not be removed.
        if cluster.try_run(&["start", "etcd", "apiserver", "controllers", "scheduler", "n1", "n2"]).is_ok() {
            cluster.forget();
        }
        cluster.run(&[&["up"], mode.switch()].concat());
        cluster
    }

    /// Removes what failed scenarios leave.
    fn forget(&self) {
        self.kubectl(&["-n", SHOP, "delete", "pods,jobs,deployments", "-l", "made-by=scenario", "--wait=false"]);
        match self.mode {
            Mode::Alone => {}
            // They go with their definitions, when the control plane is removed.
            Mode::Control => drop(self.kubectl(&["label", "namespace", SHOP, "istio.io/dataplane-mode-"])),
            Mode::Istio | Mode::Agent => {
                self.kubectl(&["delete", "peerauthentications,authorizationpolicies", "-A", "--all"]);
            }
        }
    }

    /// Runs `scripts/cluster ARGUMENT...` and returns its output.
    pub fn run(&self, arguments: &[&str]) -> String {
        said(&self.mode.script(arguments))
            .unwrap_or_else(|why| panic!("scripts/cluster {}: {why}", arguments.join(" ")))
    }

    /// The same, if it may fail.
    pub fn try_run(&self, arguments: &[&str]) -> Result<String, String> {
        said(&self.mode.script(arguments))
    }

    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.run(&[&["kubectl"], arguments].concat())
    }

    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.try_run(&[&["kubectl"], arguments].concat())
    }

    /// Objects as JSON.
    pub fn get(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[&["get", "-o", "json"], arguments].concat())).unwrap()
    }

    /// Creates objects.
    pub fn apply(&self, yaml: &str) {
        let file = self.folder().join("objects.yaml");
        std::fs::write(&file, yaml).unwrap();
        // After a restart, istiod's webhook may not be reachable yet.
        eventually("objects are accepted", || {
            self.try_kubectl(&["apply", "--server-side", "--force-conflicts", "-f", file.to_str().unwrap()]).err()
        });
    }

    /// The folder of this cluster.
    pub fn folder(&self) -> PathBuf {
        root().join("target/cluster/clusters").join(self.mode.name())
    }

    /// Waits until the rollout of a Deployment or DaemonSet is complete.
    pub fn rolled_out(&self, namespace: &str, what: &str) {
        self.kubectl(&["-n", namespace, "rollout", "status", what, "--timeout=180s"]);
    }

    /// Starts a new generation of the pods of a Deployment or DaemonSet.
    pub fn restart(&self, namespace: &str, what: &str) {
        self.kubectl(&["-n", namespace, "rollout", "restart", what]);
    }

    /// The names of the running pods with a label, on one node if it is given.
    pub fn pods(&self, namespace: &str, label: &str, node: Option<&str>) -> Vec<String> {
        let node = node.map(|node| format!(",spec.nodeName={node}")).unwrap_or_default();
        let fields = format!("--field-selector=status.phase=Running{node}");
        let found = self.get(&["pods", "-n", namespace, "-l", label, &fields]);
        let going = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        found["items"].as_array().unwrap().iter().filter(going).map(name_of).collect()
    }

    /// The daemon of a node.
    pub fn daemon(&self, node: &str) -> String {
        let pods = self.pods(SYSTEM, "app=ztunnel", Some(node));
        pods.first().unwrap_or_else(|| panic!("no daemon runs on {node}")).clone()
    }

    /// Makes one request from a client; `from` is `shop/front` or `plain/outsider`.
    pub fn ask(&self, from: &str, node: &str, url: &str) -> Result<String, String> {
        let (namespace, app) = from.split_once('/').unwrap();
        let client = self.pods(namespace, &format!("app={app}"), Some(node)).remove(0);
        self.try_kubectl(&["-n", namespace, "exec", &client, "--", "/app", "get", url])
    }

    /// Sets the mode of mutual TLS for all workloads.
    pub fn mutual_tls(&self, mode: &str) {
        self.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {SYSTEM}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        ));
        // All daemons have received it once outsiders are treated accordingly, whichever pod they connect to.
        eventually(&format!("{mode} is in force"), || {
            let asked: Vec<_> = (0..8).map(|_| self.ask("plain/outsider", "n1", "http://web.shop/")).collect();
            asked.iter().any(|answer| answer.is_err() != (mode == "STRICT")).then(|| format!("{asked:?}"))
        });
    }

    /// Checks that clients of each node are served by pods of both nodes.
    pub fn works(&self) {
        for (node, servers) in [("n1", "n1"), ("n1", "n2"), ("n2", "n1"), ("n2", "n2")] {
            eventually(&format!("clients on {node} are served by pods on {servers}"), || {
                let servers = self.pods(SHOP, "app=web", Some(servers));
                let answers: Vec<_> = (0..4).map(|_| self.ask("shop/front", node, "http://web.shop/")).collect();
                let by_them = |answer: &Result<String, String>| {
                    answer.as_ref().is_ok_and(|answer| servers.iter().any(|server| answer.starts_with(server.as_str())))
                };
                (!answers.iter().any(by_them)).then(|| format!("{answers:?}"))
            });
        }
    }

    /// What culvert has left on a node: tables in the namespaces of pods and of the node, and files.
    pub fn traces(&self, node: &str) -> Vec<String> {
        let script = "for n in /run/netns/cni-*; do [ -e $n ] || continue; nsenter --net=$n nft list tables | sed \"s|^|$n: |\"; done; nft list tables; ls /etc/cni/net.d /opt/cni/bin /run/culvert /var/lib/culvert 2>/dev/null || true";
        let listed = self.run(&["node", node, "bash", "-c", script]);
        let ours = |line: &&str| line.contains("culvert") && !line.ends_with(':');
        listed.lines().filter(ours).map(str::to_owned).collect()
    }
}

/// The checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The name of an object.
pub fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap().to_owned()
}

fn said(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("{}: {}{}", output.status, text(&output.stdout), text(&output.stderr))),
    }
}

/// Waits until `why_not` returns no reason any more.
pub fn eventually(what: &str, mut why_not: impl FnMut() -> Option<String>) {
    let start = Instant::now();
    while let Some(why) = why_not() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {why}");
        sleep(Duration::from_millis(200));
    }
}
