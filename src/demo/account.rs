//! The account of a demonstration, for people and for programs.

use super::traffic::Figures;
use super::wire;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// One exchange between pods.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Who asked.
    pub from: &'static str,
    /// Whom.
    pub to: &'static str,
    /// Whether the page came.
    pub answered: bool,
    /// Whether it should.
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

/// One refusal.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Who was refused.
    pub who: String,
    /// The reason that the node logged, which names the rule.
    pub by: String,
}

/// All that is told.
#[derive(Debug)]
pub struct Account {
    /// Names of the captured pods.
    pub captured: Vec<String>,
    /// What the wire showed without culvert: the proof that the capture would see plaintext.
    pub plain_wire: wire::WireStats,
    /// What it showed with culvert.
    pub wire: wire::WireStats,
    /// Exchanges.
    pub exchanges: Vec<Exchange>,
    /// Identities that the access logs name, each pair once for each node and direction.
    pub identities: Vec<IdentityPair>,
    /// Refusals.
    pub denied: Vec<Refusal>,
    /// Speed without culvert.
    pub direct: Figures,
    /// Speed through it.
    pub tunnelled: Figures,
    /// Namespaces of the nodes.
    pub node_names: [String; 2],
}

impl Account {
    /// Whether all is as it should be.
    pub fn is_good(&self) -> bool {
        let wire = self.wire.plaintext_bytes == 0 && self.wire.canaries == 0 && self.wire.dropped == 0;
        let tunnelled = self.wire.bytes_by_port.get(&15008).is_some_and(|bytes| *bytes > 0);
        let exchanges = self.exchanges.iter().all(|exchange| exchange.answered == exchange.expected);
        wire && tunnelled && exchanges && self.plain_wire.canaries > 0 && self.denied.len() >= 2
    }

    /// One JSON object.
    pub fn json(&self) -> String {
        let identity =
            |pair: &IdentityPair| json!({"at": pair.at, "source": pair.source, "destination": pair.destination});
        let exchange =
            |s: &Exchange| json!({"from": s.from, "to": s.to, "answered": s.answered, "expected": s.expected});
        let rules: Vec<&str> = self.denied.iter().map(|denied| rule(&denied.by)).collect();
        let value: Value = json!({
            "ok": self.is_good(),
            "captured": self.captured,
            "tunnelled": self.wire.bytes_by_port.get(&15008).copied().unwrap_or(0),
            "plaintext_bytes_on_wire": self.wire.plaintext_bytes,
            "canaries_on_wire": self.wire.canaries,
            "canaries_on_wire_without_culvert": self.plain_wire.canaries,
            "ports_on_wire": self.wire.bytes_by_port.keys().collect::<Vec<_>>(),
            "denied": self.denied.iter().map(|denied| denied.who.as_str()).collect::<Vec<_>>(),
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

    /// A short account for people.
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
            writeln!(t, "  {:<12}{}", denied.who, denied.by)?;
        }
        writeln!(t, "\nSpeed         1 KiB requests on 16 connections               1 bulk stream")?;
        for (name, f) in [("direct", &self.direct), ("culvert", &self.tunnelled)] {
            let (rps, p50, p99) = (f.rps, f.p50_us, f.p99_us);
            writeln!(t, "  {name:<12}{rps:>8.0}/s   p50 {p50:>6.0} us   p99 {p99:>6.0} us   {:>7.2} Gbit/s", f.gbps)?;
        }
        writeln!(t, "\nAdmin pages (with --keep)")?;
        for name in &self.node_names {
            writeln!(t, "  {}", admin(name))?;
        }
        let verdict = if self.is_good() { "All as it should be." } else { "NOT all as it should be: see above." };
        write!(t, "\n{verdict}")
    }
}

fn admin(namespace: &str) -> String {
    format!("ip netns exec {namespace} curl -s http://localhost:15000/")
}

/// The rule's name in the reason of a refusal.
fn rule(reason: &str) -> &str {
    reason.rsplit_once("denied by: ").map_or(reason, |(_, rule)| rule)
}
