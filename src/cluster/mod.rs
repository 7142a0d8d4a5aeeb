//! The daemons of a cluster, found through the Kubernetes API and asked through port-forwards to their admin ports,
//! which listen on loopback only. Beside it the daemon of this machine, which is asked directly.
//!
//! Every question has a deadline and a limit for its answer. Many daemons are asked at the same time, and one that does
//! not answer is named with the reason while the others are shown.

mod find;
mod line;
mod logs;

use self::line::Line;
use crate::ports;
use crate::task::Group;
use crate::telemetry::log::with_causes;
use bytes::Bytes;
use futures_util::StreamExt;
use http::Method;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Daemons that are asked at the same time.
const AT_ONCE: usize = 32;

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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Daemon {
    /// Name of its node; empty for the daemon of this machine, which says it itself in `/status`.
    pub node: String,
    /// Its namespace; empty for the daemon of this machine.
    pub namespace: String,
    /// Name of its pod; empty for the daemon of this machine.
    pub pod: String,
    /// Why it cannot be asked, if that is known.
    pub down: Option<String>,
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

/// Asks daemons. Connections to them are kept for the next question.
pub struct Daemons {
    place: Place,
    client: Option<kube::Client>,
    lines: Mutex<HashMap<Daemon, Line>>,
    tasks: Group,
}

impl fmt::Debug for Daemons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemons").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.tasks.cut();
    }
}

impl Daemons {
    /// Reads the credentials. Nothing is asked yet.
    pub async fn open(place: Place) -> Result<Self, ClusterError> {
        let client = match &place {
            Place::Here(_) => None,
            Place::Cluster(cluster) => Some(find::client(cluster).await?),
        };
        Ok(Self { place, client, lines: Mutex::default(), tasks: Group::default() })
    }

    /// Whether they are those of a cluster.
    pub fn of_cluster(&self) -> bool {
        matches!(self.place, Place::Cluster(_))
    }

    /// The daemons, sorted by node. There is at least one, and one for each node that was asked for.
    pub async fn find(&self, deadline: Duration) -> Result<Vec<Daemon>, ClusterError> {
        match (&self.place, &self.client) {
            (Place::Cluster(cluster), Some(client)) => {
                let found = tokio::time::timeout(deadline, find::daemons(client, cluster)).await;
                found.unwrap_or_else(|_| Err(ClusterError::Api(AskError::Late(deadline).to_string())))
            }
            _ => Ok(vec![Daemon { node: String::new(), namespace: String::new(), pod: String::new(), down: None }]),
        }
    }

    /// The daemon on the node of a pod, `NAMESPACE/NAME`. On this machine it is the only one.
    pub async fn find_of_pod(&self, pod: &str, deadline: Duration) -> Result<Daemon, ClusterError> {
        let late = || ClusterError::Api(AskError::Late(deadline).to_string());
        let node = match &self.client {
            None => String::new(),
            Some(client) => tokio::time::timeout(deadline, find::node_of(client, pod)).await.map_err(|_| late())??,
        };
        let all = self.find(deadline).await?;
        all.into_iter().find(|daemon| daemon.node == node).ok_or_else(|| {
            ClusterError::NotFound(format!("{pod} runs on node {node}, which has no daemon, or was not asked for"))
        })
    }

    /// Asks one daemon.
    pub async fn ask(&self, daemon: &Daemon, question: &Question) -> Result<Answer, AskError> {
        let asked = tokio::time::timeout(question.deadline, self.ask_by_line(daemon, question)).await;
        asked.unwrap_or(Err(AskError::Late(question.deadline)))
    }

    /// Asks all of them, a limited number at the same time. The answers are in the order of the daemons.
    pub async fn ask_all(&self, daemons: &[Daemon], question: &Question) -> Vec<Result<Answer, AskError>> {
        let asking =
            daemons.iter().enumerate().map(|(at, daemon)| async move { (at, self.ask(daemon, question).await) });
        let mut answers: Vec<_> = futures_util::stream::iter(asking).buffer_unordered(AT_ONCE).collect().await;
        answers.sort_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// Asks by the connection of an earlier question, where it still works, or else by a new one.
    async fn ask_by_line(&self, daemon: &Daemon, question: &Question) -> Result<Answer, AskError> {
        let kept = self.lines.lock().remove(daemon);
        if let Some(mut line) = kept
            && line.is_open().await
            && let Ok(answer) = line.ask(question).await
        {
            self.lines.lock().insert(daemon.clone(), line);
            return Ok(answer);
        }
        let mut line = self.line(daemon).await?;
        let answer = line.ask(question).await?;
        self.lines.lock().insert(daemon.clone(), line);
        Ok(answer)
    }

    async fn line(&self, daemon: &Daemon) -> Result<Line, AskError> {
        if let Some(why) = &daemon.down {
            return Err(AskError::Down(why.clone()));
        }
        match (&self.place, &self.client) {
            (Place::Cluster(cluster), Some(client)) => {
                let pods: kube::Api<k8s_openapi::api::core::v1::Pod> =
                    kube::Api::namespaced(client.clone(), &daemon.namespace);
                let forwarder = pods.portforward(&daemon.pod, &[cluster.admin_port]).await;
                let forwarder = forwarder.map_err(|error| AskError::Unreachable(refused(&error)))?;
                Line::of_forwarder(forwarder, cluster.admin_port, &self.tasks).await
            }
            (Place::Here(address), _) => Line::connect(*address, &self.tasks).await,
            (Place::Cluster(_), None) => Err(AskError::Unreachable("there is no client".to_owned())),
        }
    }
}

/// Why the API does not forward a port.
fn refused(error: &kube::Error) -> String {
    let text = with_causes(error);
    match text.contains("403") {
        true => format!("port-forward: {text}; your account needs the right to create pods/portforward"),
        false => format!("port-forward: {text}"),
    }
}
