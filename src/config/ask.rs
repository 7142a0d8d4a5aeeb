//! Options of the commands that ask daemons: of a cluster, or the one of this machine.

use super::args::NodeArgs;
use super::environment::Environment;
use super::settings::pods::KUBECONFIG;
use crate::cluster::{Cluster, Place};
use clap::Args;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Title of these options in the help.
const HEADING: &str = "Which daemons";

/// Where the daemons are that a command asks.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = HEADING)]
pub struct AskArgs {
    /// Ask the daemons of the cluster, also where no kubeconfig is found: in a pod, with the pod's account. With a
    /// kubeconfig this is the default.
    #[arg(long)]
    pub cluster: bool,
    /// The kubeconfig. Default: the one that kubectl would use.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig. Default: its current one.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of the daemons. Default: all namespaces.
    #[arg(long, short = 'n', value_name = "NAME")]
    pub namespace: Option<String>,
    /// Ask only the daemon of this node. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub node: Vec<String>,
    /// Ask the daemon of this machine or network namespace instead, at this address. The default, 127.0.0.1:15000, is
    /// used where there is no kubeconfig.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["cluster", "kubeconfig", "context", "namespace", "node"])]
    pub admin: Option<Admin>,
    /// Admin port of the daemons, where Istio's `proxyAdminPort` moves it.
    #[arg(long, value_name = "PORT")]
    pub admin_port: Option<u16>,
    /// How long a daemon, or the Kubernetes API, may take to answer.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
}

/// Address of an admin port: `127.0.0.1:15000`, `127.0.0.1`, or `15000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admin(SocketAddr);

impl std::str::FromStr for Admin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let host = text.strip_prefix("localhost").map(|port| format!("127.0.0.1{port}"));
        let text = host.as_deref().unwrap_or(text);
        let ip = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, crate::ports::ADMIN));
        let port =
            || text.trim_start_matches(':').parse::<u16>().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let address = text.parse::<SocketAddr>().ok().or_else(|| ip().ok()).or_else(|| port().ok());
        address.map(Self).ok_or_else(|| "use ADDRESS:PORT, such as 127.0.0.1:15000".to_owned())
    }
}

impl AskArgs {
    /// Where the daemons are: of a cluster, if an option or a kubeconfig says so, otherwise here. `port` is the admin
    /// port of this machine's daemon by the settings of this command's environment.
    pub fn place(&self, port: u16) -> Place {
        let asked = self.cluster
            || self.kubeconfig.is_some()
            || self.context.is_some()
            || self.namespace.is_some()
            || !self.node.is_empty();
        match self.admin {
            Some(Admin(address)) => Place::Here(address),
            None if asked || has_kubeconfig() => Place::Cluster(Cluster {
                kubeconfig: self.kubeconfig.clone(),
                context: self.context.clone(),
                namespace: self.namespace.clone(),
                nodes: self.node.clone(),
                admin_port: self.admin_port.unwrap_or(crate::ports::ADMIN),
            }),
            None => Place::Here(SocketAddr::from((Ipv4Addr::LOCALHOST, self.admin_port.unwrap_or(port)))),
        }
    }
}

/// Whether there is a kubeconfig that kubectl would use.
fn has_kubeconfig() -> bool {
    let environment = Environment::of_process();
    environment.get("KUBECONFIG").is_some()
        || environment.get("HOME").is_some_and(|home| PathBuf::from(home).join(".kube/config").is_file())
}

/// Whether colours are wanted on a terminal: <https://no-color.org>, and terminals that have none.
pub fn wants_colour() -> bool {
    let environment = Environment::of_process();
    environment.get("NO_COLOR").is_none() && environment.get("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// The settings in the environment of this process, for commands without options for them.
pub fn of_environment() -> NodeArgs {
    let pairs =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    NodeArgs::of(&pairs.collect())
}

/// Options of `culvert status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Wait until everything is green, at most for this time (5m if none is given).
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "5m",
          value_parser = humantime::parse_duration, conflicts_with = "plaintext")]
    pub wait: Option<Duration>,
    /// Instead: since when each pod has sent and received no plaintext.
    #[arg(long)]
    pub plaintext: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert connections`.
#[derive(Clone, Debug, Args)]
pub struct ConnectionsArgs {
    /// Only those of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub pod: Option<String>,
    /// Only those that a policy or a limit refused.
    #[arg(long)]
    pub refused: bool,
    /// Instead of the open ones: those that have ended or were refused in this time, such as 10m.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub since: Option<Duration>,
    /// At most so many.
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    pub limit: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert dashboard`.
#[derive(Clone, Debug, Args)]
pub struct DashboardArgs {
    /// Port of 127.0.0.1 that the page is on; 0 is any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 15100)]
    pub port: u16,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// What to sort by: rate, bytes, connections, connect or pod.
    #[arg(long, value_name = "WORD", default_value = "rate")]
    pub sort: Sort,
    /// Time between two looks, at least 100ms.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = interval)]
    pub interval: Duration,
    /// Print JSON once, after one interval.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// The shortest time between two looks. Each one asks every daemon for all its connections.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Reads the time between two looks.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if interval < INTERVAL_MIN { Err("use 100ms or more".to_owned()) } else { Ok(interval) }
}

/// What `culvert top` sorts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Bytes a second.
    Rate,
    /// Bytes in all.
    Bytes,
    /// Open connections.
    Connections,
    /// How long it takes until connections are open.
    Connect,
    /// Names of pods.
    Pod,
}

/// Options of `culvert logs`.
#[derive(Clone, Debug, Args)]
pub struct LogsArgs {
    /// The pod.
    #[arg(value_name = "NAMESPACE/NAME")]
    pub pod: String,
    /// Wait for further lines.
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Only lines of this time, such as 10m.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub since: Option<Duration>,
    /// Only lines among the last ones of the daemon's log.
    #[arg(long, value_name = "COUNT")]
    pub tail: Option<u32>,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert pods`.
#[derive(Clone, Debug, Args)]
pub struct PodsArgs {
    /// Print the JSON of the admin port's page `/pods`.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// The pod that connects. The daemon of its node is asked.
    #[arg(long, value_name = "NAMESPACE/NAME", required_unless_present = "policy", requires = "to")]
    pub from: Option<String>,
    /// Where it connects to, as ADDRESS:PORT or NAME:PORT.
    #[arg(long, requires = "from")]
    pub to: Option<String>,
    /// Instead: a file with `policies:` as in the mesh file. Says which of the open and of the recent connections these
    /// policies would refuse or allow.
    #[arg(long, conflicts_with_all = ["from", "to"], value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Print the JSON of the admin port's page `/explain`.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert report`.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// The archive. Default: culvert-report-TIME.tar.gz in this directory; `-` is standard output.
    #[arg(long, short = 'o', value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Options of `culvert doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Instead of this node: what the daemons of a cluster say about themselves. `--kubeconfig` or the environment says
    /// which cluster.
    #[arg(long, help_heading = HEADING)]
    pub cluster: bool,
    /// The same, only the daemon of this node. May be repeated.
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    pub node: Vec<String>,
    /// The context of the kubeconfig.
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    pub context: Option<String>,
    /// Namespace of the daemons. Default: all namespaces.
    #[arg(long, short = 'n', value_name = "NAME", help_heading = HEADING)]
    pub namespace: Option<String>,
    /// How long a daemon, or the Kubernetes API, may take to answer.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration, help_heading = HEADING)]
    pub timeout: Duration,
    /// Settings.
    #[command(flatten)]
    pub settings: Box<NodeArgs>,
}

impl DoctorArgs {
    /// The cluster, if its daemons are asked and not this node.
    pub fn cluster(&self) -> Option<AskArgs> {
        let asked = self.cluster || !self.node.is_empty() || self.context.is_some() || self.namespace.is_some();
        asked.then(|| AskArgs {
            cluster: true,
            kubeconfig: self.settings.get(&KUBECONFIG.about).filter(|path| !path.is_empty()).map(PathBuf::from),
            context: self.context.clone(),
            namespace: self.namespace.clone(),
            node: self.node.clone(),
            admin: None,
            admin_port: None,
            timeout: self.timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_are_not_asked_without_a_pause() {
        assert_eq!(interval("100ms"), Ok(INTERVAL_MIN));
        for text in ["0s", "99ms"] {
            assert_eq!(interval(text), Err("use 100ms or more".to_owned()), "{text}");
        }
        assert!(interval("soon").is_err());
    }

    #[test]
    fn an_admin_port_is_an_address_or_only_its_host_or_port() {
        let cases = [
            ("127.0.0.1:15000", Some("127.0.0.1:15000")),
            ("127.0.0.2", Some("127.0.0.2:15000")),
            ("localhost", Some("127.0.0.1:15000")),
            ("localhost:1", Some("127.0.0.1:1")),
            ("[::1]:7", Some("[::1]:7")),
            ("15001", Some("127.0.0.1:15001")),
            (":15001", Some("127.0.0.1:15001")),
            ("example.org:1", None),
            ("", None),
        ];
        for (text, expected) in cases {
            let address = text.parse::<Admin>().ok().map(|Admin(address)| address.to_string());
            assert_eq!(address.as_deref(), expected, "{text}");
        }
    }
}
