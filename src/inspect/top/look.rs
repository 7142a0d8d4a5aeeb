//! One look at all daemons after another, and how a flow is shown.

use super::flows::{Carried, Flow, flows};
use crate::cluster::{ClusterError, Daemon, Daemons, Question};
use crate::inspect::Outcome;
use crate::inspect::nodes::{self, Node};
use crate::inspect::text::bytes;
use std::time::Duration;
use tokio::time::Instant;

/// The ended connections that connect times are taken from.
const HISTORY: &str = "/history?kind=connection&outcome=ok&since=5m&limit=1000";

/// Titles of the columns.
pub(super) const HEAD: [&str; 11] = [
    "NODE",
    "POD",
    "",
    "FAR END",
    "IDENTITY",
    "ITS IDENTITY",
    "PROTECTION",
    "CONNS",
    "SENT/s",
    "RECEIVED/s",
    "CONNECT p50/p99",
];

/// Asks daemons again and again.
pub(super) struct Looks<'a> {
    daemons: &'a Daemons,
    all: Vec<Daemon>,
    timeout: Duration,
    before: Carried,
    last: Option<Instant>,
}

/// What one look has shown.
pub(super) struct Look {
    /// The flows.
    pub(super) flows: Vec<Flow>,
    /// Nodes that did not answer, and why.
    pub(super) silent: Vec<String>,
    pub(super) outcome: Outcome,
}

impl<'a> Looks<'a> {
    /// Finds the daemons.
    pub(super) async fn new(daemons: &'a Daemons, timeout: Duration) -> Result<Self, ClusterError> {
        let all = daemons.find(timeout).await?;
        Ok(Self { daemons, all, timeout, before: Carried::new(), last: None })
    }

    /// Asks them all.
    pub(super) async fn next(&mut self) -> Look {
        let ask = async |path: &str| {
            let answers = self.daemons.ask_all(&self.all, &Question::get(path, self.timeout)).await;
            let pairs = self.all.iter().zip(answers);
            pairs.map(|(daemon, answer)| Node::new(daemon, nodes::page(answer))).collect::<Vec<_>>()
        };
        let (connections, history) = (ask("/connections").await, ask(HISTORY).await);
        let now = Instant::now();
        let since = self.last.replace(now).map(|last| now - last);
        let flows = flows(&connections, &history, &mut self.before, since);
        let silent = connections.iter().filter_map(Node::silence).collect();
        Look { flows, silent, outcome: nodes::outcome(&connections) }
    }
}

/// The cells of a row.
pub(super) fn cells(flow: &Flow) -> [String; 11] {
    // Rates are far below the limit of the type.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let rate = |rate: f64| bytes(rate.max(0.0) as u64);
    let millis = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), |time| format!("{time:.1}"));
    [
        flow.node.clone(),
        flow.pod.clone(),
        if flow.is_outbound { "to" } else { "from" }.to_owned(),
        flow.far.clone(),
        flow.own_identity.clone(),
        flow.far_identity.clone(),
        flow.protection.clone(),
        flow.connections.to_string(),
        rate(flow.sent_rate),
        rate(flow.received_rate),
        match flow.p50 {
            None => "-".to_owned(),
            _ => format!("{}/{} ms", millis(flow.p50), millis(flow.p99)),
        },
    ]
}
