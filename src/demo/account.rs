//! The report of a demonstration, as text for people and as JSON for programs.

use super::traffic::{CONNECTIONS, Figures, MESSAGE_BYTES};
use super::wire;
use crate::ports::{ADMIN, HBONE};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// One HTTP request between pods.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The pod that sent the request.
    pub from: &'static str,
    /// The destination, in words.
    pub to: &'static str,
    /// Whether the right page was returned.
    pub answered: bool,
    /// Whether it should have been.
    pub expected: bool,
}

/// The identities of both ends of a connection, as one node logged them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdentityPair {
    /// The node, and the direction of the connection as that node saw it.
    pub at: String,
    /// Identity of the source.
    pub source: String,
    /// Identity of the destination.
    pub destination: String,
}

/// One refused connection.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The pod whose connection was refused.
    pub pod: String,
    /// The reason that the node logged, which names the policy's rule.
    pub reason: String,
}

/// The whole report.
#[derive(Debug)]
pub struct Account {
    /// Names of the captured pods.
    pub captured: Vec<String>,
    /// The traffic between the nodes without culvert. It proves that the sniffer would see plaintext.
    pub plain_wire: wire::WireStats,
    /// The traffic between the nodes with culvert.
    pub wire: wire::WireStats,
    /// The requests that were made through culvert.
    pub exchanges: Vec<Exchange>,
    /// Identities that the access logs name, each pair once for each node and direction.
    pub identities: Vec<IdentityPair>,
    /// The refused connections, from the access logs.
    pub denied: Vec<Refusal>,
    /// Speed without culvert.
    pub direct: Figures,
    /// Speed with culvert.
    pub tunnelled: Figures,
    /// Names of the nodes' network namespaces.
    pub node_names: [String; 2],
}

impl Account {
    /// Whether everything is as it should be.
    pub fn is_good(&self) -> bool {
        let wire = self.wire.plaintext_bytes == 0 && self.wire.canaries == 0 && self.wire.dropped == 0;
        let tunnelled = self.wire.bytes_by_port.get(&HBONE).is_some_and(|bytes| *bytes > 0);
        let exchanges = self.exchanges.iter().all(|exchange| exchange.answered == exchange.expected);
        wire && tunnelled && exchanges && self.plain_wire.canaries > 0 && self.denied.len() >= 2
    }

    /// The report as one JSON object.
    pub fn json(&self) -> String {
        let identity =
            |pair: &IdentityPair| json!({"at": pair.at, "source": pair.source, "destination": pair.destination});
        let exchange =
            |s: &Exchange| json!({"from": s.from, "to": s.to, "answered": s.answered, "expected": s.expected});
        let rules: Vec<&str> = self.denied.iter().map(|denied| rule(&denied.reason)).collect();
        let value: Value = json!({
            "ok": self.is_good(),
            "captured": self.captured,
            "tunnelled": self.wire.bytes_by_port.get(&HBONE).copied().unwrap_or(0),
            "plaintext_bytes_on_wire": self.wire.plaintext_bytes,
            "canaries_on_wire": self.wire.canaries,
            "canaries_on_wire_without_culvert": self.plain_wire.canaries,
            "ports_on_wire": self.wire.bytes_by_port.keys().collect::<Vec<_>>(),
            "denied": self.denied.iter().map(|denied| denied.pod.as_str()).collect::<Vec<_>>(),
            "denied_by": rules,
            "identities": self.identities.iter().map(identity).collect::<Vec<_>>(),
            "exchanges": self.exchanges.iter().map(exchange).collect::<Vec<_>>(),
            "rps": self.tunnelled.rps.round(),
            "p50_us": self.tunnelled.p50_us.round(),
            "p99_us": self.tunnelled.p99_us.round(),
            "gbps": (self.tunnelled.gbps * 100.0).round() / 100.0,
            "direct": {
                "rps": self.direct.rps.round(),
                "p50_us": self.direct.p50_us.round(),
                "p99_us": self.direct.p99_us.round(),
                "gbps": (self.direct.gbps * 100.0).round() / 100.0,
            },
            "admin": self.node_names.iter().map(|name| admin(name)).collect::<Vec<_>>(),
        });
        value.to_string()
    }

    /// The report as text.
    pub fn text(&self) -> String {
        let mut t = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut t);
        t
    }

    fn write(&self, t: &mut String) -> std::fmt::Result {
        writeln!(t, "\nCaptured      {} (verified from inside each pod)", self.captured.join(", "))?;
        writeln!(t, "\nOn the wire between the nodes")?;
        let (plain, wire) = (&self.plain_wire, &self.wire);
        let ports = |stats: &wire::WireStats| {
            let all: Vec<String> =
                stats.bytes_by_port.iter().map(|(port, bytes)| format!("{port} ({bytes} B)")).collect();
            if all.is_empty() { "none".to_owned() } else { all.join(", ") }
        };
        writeln!(t, "  without     ports {}; the canary was readable in {} frames", ports(plain), plain.canaries)?;
        writeln!(t, "  with        ports {}; the canary was readable in {} frames", ports(wire), wire.canaries)?;
        writeln!(t, "\nWho reached whom")?;
        for exchange in &self.exchanges {
            let word = if exchange.answered { "answered" } else { "refused" };
            let remark = if exchange.answered == exchange.expected { "" } else { "   <-- NOT as expected" };
            writeln!(t, "  {:<12}-> {:<26}{word}{remark}", exchange.from, exchange.to)?;
        }
        writeln!(t, "\nIdentities in the access logs")?;
        for IdentityPair { at, source, destination } in &self.identities {
            writeln!(t, "  {at:<16}{source} -> {destination}")?;
        }
        writeln!(t, "\nDenied")?;
        for denied in &self.denied {
            writeln!(t, "  {:<12}{}", denied.pod, denied.reason)?;
        }
        let requests = format!("{} KiB requests on {CONNECTIONS} connections", MESSAGE_BYTES / 1024);
        writeln!(t, "\nSpeed         {requests:<47}1 bulk stream")?;
        for (name, f) in [("direct", &self.direct), ("culvert", &self.tunnelled)] {
            let (rps, p50, p99) = (f.rps, f.p50_us, f.p99_us);
            writeln!(t, "  {name:<12}{rps:>8.0}/s   p50 {p50:>6.0} us   p99 {p99:>6.0} us   {:>7.2} Gbit/s", f.gbps)?;
        }
        writeln!(t, "\nAdmin pages (with --keep)")?;
        for name in &self.node_names {
            writeln!(t, "  {}", admin(name))?;
        }
        let verdict =
            if self.is_good() { "Everything is as it should be." } else { "NOT everything is as it should be." };
        write!(t, "\n{verdict}")
    }
}

fn admin(namespace: &str) -> String {
    format!("ip netns exec {namespace} curl -s http://localhost:{ADMIN}/")
}

/// The name of the rule in the reason of a refusal.
fn rule(reason: &str) -> &str {
    reason.rsplit_once("denied by: ").map_or(reason, |(_, rule)| rule)
}
