//! Options of the commands that ask daemons: of a cluster, or the one of this machine.

use super::args::NodeArgs;
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
    if std::env::var_os("KUBECONFIG").is_some_and(|files| !files.is_empty()) {
        return true;
    }
    std::env::var_os("HOME").is_some_and(|home| PathBuf::from(home).join(".kube/config").is_file())
}

/// Whether colours are wanted on a terminal: <https://no-color.org>, and terminals that have none.
pub fn wants_colour() -> bool {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
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
          value_parser = humantime::parse_duration)]
    pub wait: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Which daemons.
    #[command(flatten)]
    pub ask: AskArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

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
