//! One look at all daemons after another, and how a flow is shown.

use super::flows::{Carried, Flow, flows};
use crate::cluster::{ClusterError, Daemons, Question, Recent};
use crate::inspect::Outcome;
use crate::inspect::nodes::{self, Node};
use crate::inspect::text::{bytes, printable};
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
    timeout: Duration,
    before: Carried,
    begun: Instant,
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
        daemons.find(timeout).await?;
        Ok(Self { daemons, timeout, before: Carried::new(), begun: Instant::now() })
    }

    /// Asks them all.
    pub(super) async fn next(&mut self) -> Look {
        let Recent { all, error } = self.daemons.recent(self.timeout).await;
        let ask = async |path| nodes::ask_these(self.daemons, &all, &Question::get(path, self.timeout)).await;
        let asked = self.begun.elapsed();
        let connections = ask("/connections").await;
        let answered = self.begun.elapsed();
        let history = ask(HISTORY).await;
        let flows = flows(&connections, &history, &mut self.before, (asked, answered));
        let mut silent: Vec<String> = connections.iter().filter_map(Node::silence).collect();
        silent.extend(error.iter().map(|error| format!("the list of nodes is older: {}", printable(error))));
        let outcome = match nodes::outcome(&connections) {
            Outcome::Green if error.is_some() => Outcome::Red,
            outcome => outcome,
        };
        Look { flows, silent, outcome }
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
