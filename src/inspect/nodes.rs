//! The same page of several daemons: what each answered, or why it did not.

use super::Outcome;
use super::text::{printable, text};
use crate::cluster::{Answer, AskError, ClusterError, Daemon, Daemons, Question};
use serde_json::{Value, json};
use std::time::Duration;

/// What one daemon answered.
pub struct Node {
    /// Name of the node.
    pub name: String,
    /// Namespace and name of the daemon's pod, in a cluster.
    pub pod: Option<String>,
    /// What people should know about how the daemon was found.
    pub note: Option<String>,
    /// The page, or why there is none.
    pub page: Result<Value, String>,
}

/// The page of a daemon, or why there is none.
pub fn page(answer: Result<Answer, AskError>) -> Result<Value, String> {
    answer.map_err(|error| error.to_string())?.json()
}

impl Node {
    /// What a daemon answered.
    pub fn new(daemon: &Daemon, page: Result<Value, String>) -> Self {
        let said = page.as_ref().ok().map(|page| text(page, "node")).filter(|name| !name.is_empty());
        let name = match daemon.node.is_empty() {
            true => said.unwrap_or_else(|| daemon.name().to_owned()),
            false => daemon.node.clone(),
        };
        let pod = (!daemon.pod.is_empty()).then(|| format!("{}/{}", daemon.namespace, daemon.pod));
        Self { name, pod, note: daemon.note.clone(), page }
    }

    /// The line about a daemon that did not answer.
    pub fn silence(&self) -> Option<String> {
        self.page.as_ref().err().map(|error| format!("{}: no answer: {}", self.name, printable(error)))
    }

    /// For programs: the page under `key`, or the error.
    pub fn json(&self, key: &str) -> Value {
        let mut json = match &self.page {
            Ok(page) => json!({"node": self.name, "pod": self.pod, "reached": true, key: page}),
            Err(error) => json!({"node": self.name, "pod": self.pod, "reached": false, "error": error}),
        };
        if let (Some(note), Some(json)) = (&self.note, json.as_object_mut()) {
            json.insert("note".to_owned(), note.as_str().into());
        }
        json
    }
}

/// Asks all daemons for a page.
pub async fn ask(daemons: &Daemons, path: &str, timeout: Duration) -> Result<Vec<Node>, ClusterError> {
    let all = daemons.find(timeout).await?;
    Ok(ask_these(daemons, &all, &Question::get(path, timeout)).await)
}

/// Asks these daemons. The answers are in their order.
pub async fn ask_these(daemons: &Daemons, all: &[Daemon], question: &Question) -> Vec<Node> {
    let answers = daemons.ask_all(all, question).await;
    all.iter().zip(answers).map(|(daemon, answer)| Node::new(daemon, page(answer))).collect()
}

/// How a command that only shows pages has ended.
pub fn outcome(nodes: &[Node]) -> Outcome {
    match nodes.iter().filter(|node| node.page.is_ok()).count() {
        0 => Outcome::Unknown,
        count if count < nodes.len() => Outcome::Red,
        _ => Outcome::Green,
    }
}

/// All nodes, for programs.
pub fn as_json(nodes: &[Node], key: &str) -> String {
    let all = json!({"nodes": nodes.iter().map(|node| node.json(key)).collect::<Vec<_>>()});
    serde_json::to_string_pretty(&all).unwrap_or_default()
}

/// The name of a node as the name of a folder.
pub fn page_name(node: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
    let name: String = node.chars().take(120).map(plain).collect();
    if name.chars().all(|c| c == '.') { "node".to_owned() } else { name }
}
