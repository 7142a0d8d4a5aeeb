//! Where daemons are, what they are asked, and what they answer.

use crate::ports;
use bytes::Bytes;
use http::Method;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// The longest answer, in bytes, where a question does not say otherwise. The dump of a large mesh has some megabytes.
const ANSWER_MAX: usize = 64 << 20;

/// Where the daemons are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The daemon of this machine or network namespace, by the address of its admin port.
    Here(SocketAddr),
    /// Those of a cluster.
    Cluster(Cluster),
}

/// Which daemons of which cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// The kubeconfig; `None`: the one that kubectl would use, or else the account of this pod.
    pub kubeconfig: Option<PathBuf>,
    /// Its context; `None`: the current one.
    pub context: Option<String>,
    /// Namespace of the daemons; `None`: all.
    pub namespace: Option<String>,
    /// Names of nodes; empty: all.
    pub nodes: Vec<String>,
    /// Admin port of the daemons.
    pub admin_port: u16,
}

impl Default for Place {
    fn default() -> Self {
        Self::Here(SocketAddr::from((Ipv4Addr::LOCALHOST, ports::ADMIN)))
    }
}

/// Why the daemons cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// There is no usable kubeconfig.
    #[error("{0}")]
    Credentials(String),
    /// The API does not answer, or refuses.
    #[error("the Kubernetes API: {0}")]
    Api(String),
    /// There is no such daemon.
    #[error("{0}")]
    NotFound(String),
}

/// Why a daemon has not answered.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Its pod does not run.
    #[error("{0}")]
    Down(String),
    /// It cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The deadline has passed.
    #[error("no answer within {}", crate::telemetry::log::brief(*.0))]
    Late(Duration),
    /// The answer is longer than allowed.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
}

/// One daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Daemon {
    /// Name of its node; empty for the daemon of this machine, which says it itself in `/status`.
    pub node: String,
    /// Its namespace; empty for the daemon of this machine.
    pub namespace: String,
    /// Name of its pod; empty for the daemon of this machine.
    pub pod: String,
    /// Why it cannot be asked, if that is known.
    pub down: Option<String>,
    /// What people should know about how it was found.
    pub note: Option<String>,
}

impl Daemon {
    /// The name to show: that of the node.
    pub fn name(&self) -> &str {
        if self.node.is_empty() { "this node" } else { &self.node }
    }
}

/// A question to a daemon's admin port.
#[derive(Clone, Debug)]
pub struct Question {
    /// GET or POST.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// What is sent with it.
    pub body: Bytes,
    /// How long the answer may take, with the way there.
    pub deadline: Duration,
    /// How long the answer may be, in bytes.
    pub max: usize,
}

impl Question {
    /// A question for a page.
    pub fn get(path: impl Into<String>, deadline: Duration) -> Self {
        Self { method: Method::GET, path: path.into(), body: Bytes::new(), deadline, max: ANSWER_MAX }
    }

    /// A question about a text.
    pub fn post(path: impl Into<String>, body: impl Into<Bytes>, deadline: Duration) -> Self {
        Self { method: Method::POST, body: body.into(), ..Self::get(path, deadline) }
    }
}

/// The answer of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The page.
    pub body: Bytes,
}

impl Answer {
    /// The page as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The page as JSON, or why it is none.
    pub fn json(&self) -> Result<serde_json::Value, String> {
        match self.status {
            200 => serde_json::from_slice(&self.body).map_err(|error| format!("the answer is not JSON: {error}")),
            404 => Err("the daemon does not have this page; is it of another version, or ztunnel?".to_owned()),
            status => Err(format!("status {status}: {}", self.text().trim())),
        }
    }
}
