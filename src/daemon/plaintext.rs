//! `/plaintext`: since when each pod has sent or received no plaintext.

use super::parts::Parts;
use crate::admin::Query;
use crate::connection::report::plaintext::{Action, Counts, Ledger};
use crate::connection::report::pods::KnownPod;
use crate::mesh::Text;
use serde_json::{Map, Value, json};
use std::time::SystemTime;

/// `/plaintext`.
pub(super) fn plaintext(parts: &Parts, query: &Query) -> Result<Value, String> {
    let mut wanted = None;
    for (name, value) in query {
        match name.as_str() {
            "pod" => wanted = Some(value),
            _ => return Err(format!("{name:?} is not understood: use pod=NAMESPACE/NAME")),
        }
    }
    let now = SystemTime::now();
    let mut pods: Vec<(String, Text, KnownPod)> = parts.reporter.pods.list().into_iter().map(named).collect();
    pods.retain(|(name, ..)| wanted.is_none_or(|wanted| name == wanted));
    pods.sort_by(|a, b| (&a.0, a.2.since).cmp(&(&b.0, b.2.since)));
    let since = pods.iter().map(|(_, _, pod)| pod.since).min();
    let one = |(name, uid, pod): (String, Text, KnownPod)| {
        let status = parts.board.get(&uid);
        let mut entry = counts(&pod.plaintext.total, now);
        entry.insert("pod".into(), name.into());
        entry.insert("since".into(), time(pod.since).into());
        entry.insert("state".into(), status.as_ref().map(|status| status.state.word()).into());
        entry.insert("uncaptured".into(), status.as_ref().map(|status| status.preexisting).into());
        entry.insert("peers".into(), peers(&pod.plaintext, now));
        Value::Object(entry)
    };
    Ok(json!({
        "node": parts.config.node_name,
        "now": time(now),
        "since": since.map(time),
        "pods": pods.into_iter().map(one).collect::<Vec<_>>(),
    }))
}

fn named((uid, pod): (Text, KnownPod)) -> (String, Text, KnownPod) {
    (format!("{}/{}", pod.namespace, pod.name), uid, pod)
}

/// The peers by name, and at the end those that are counted together.
fn peers(ledger: &Ledger, now: SystemTime) -> Value {
    let (peers, others) = ledger.peers();
    let mut peers: Vec<(String, Counts)> = peers.into_iter().map(|(peer, of)| (peer.to_string(), of)).collect();
    peers.sort_by(|a, b| a.0.cmp(&b.0));
    if others != Counts::default() {
        peers.push(("other".into(), others));
    }
    let one = |(peer, of): (String, Counts)| {
        let mut entry = counts(&of, now);
        entry.insert("peer".into(), peer.into());
        Value::Object(entry)
    };
    Value::Array(peers.into_iter().map(one).collect())
}

fn counts(counts: &Counts, now: SystemTime) -> Map<String, Value> {
    let mut entry = Map::new();
    let mut open = 0;
    for action in Action::ALL {
        let tally = counts.of(action);
        open += tally.open;
        entry.insert(action.word().into(), tally.count.into());
        entry.insert(format!("last_{}", action.word()), tally.last(now).map(time).into());
    }
    entry.insert("open".into(), open.into());
    entry
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}
