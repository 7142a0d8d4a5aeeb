//! Texts that others have written, the two ends of a connection, and flows from workload to workload.

use crate::telemetry::printable::is_unseen;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

/// The rows of a section by key.
pub type Rows = BTreeMap<String, Value>;

/// Most characters of a text.
const TEXT_MAX: usize = 300;

/// Most flows of a picture.
const FLOWS_MAX: usize = 2_000;

/// Above this number, addresses outside the mesh are one item in flows.
const OUTSIDE_MAX: usize = 40;

/// The name of all addresses outside the mesh.
const MANY: &str = "many addresses";

/// A text, bounded, without control characters and without those that reorder what follows them. Empty for other values
/// than texts and numbers.
pub fn text(value: &Value) -> String {
    let all = match value {
        Value::String(text) => text.as_str(),
        Value::Number(number) => return number.to_string(),
        _ => return String::new(),
    };
    let mut shown: String = all.chars().take(TEXT_MAX).map(|c| if is_unseen(c) { '\u{fffd}' } else { c }).collect();
    if all.chars().nth(TEXT_MAX).is_some() {
        shown.push('…');
    }
    shown
}

/// A time stamp in seconds since 1970.
pub fn seconds(value: &Value) -> Option<u64> {
    let at = humantime::parse_rfc3339(value.as_str()?).ok()?;
    at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
}

/// One end of a connection: a workload by namespace and name, or an address outside the mesh, whose namespace is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Party {
    namespace: String,
    name: String,
}

impl Party {
    /// Both ends of an entry of `/connections`.
    pub fn of_connection(one: &Value) -> (Self, Self) {
        let destination = if one["dst"].is_string() { &one["dst"] } else { &one["actualDst"] };
        (
            Self::of(&one["srcWorkload"], &one["srcIdentity"], &one["src"]),
            Self::of(&one["dstWorkload"], &one["dstIdentity"], destination),
        )
    }

    /// Both ends of an entry of `/history`: each an object, or an address.
    pub fn of_history(entry: &Value) -> (Self, Self) {
        let end = |end: &Value| match end.is_object() {
            true => Self::of(&end["workload"], &end["identity"], &end["address"]),
            false => Self::of(&Value::Null, &Value::Null, end),
        };
        (end(&entry["source"]), end(&entry["destination"]))
    }

    /// The best that is known: the workload, the account of the identity, or the address.
    fn of(workload: &Value, identity: &Value, address: &Value) -> Self {
        let pair = |namespace: &str, name: &str| {
            let clean = |part: &str| text(&Value::from(part));
            Self { namespace: clean(namespace), name: clean(name) }
        };
        if let Some((namespace, name)) = workload.as_str().and_then(|workload| workload.split_once('/')) {
            return pair(namespace, name);
        }
        let account = identity.as_str().and_then(|identity| identity.split_once("/ns/")?.1.split_once("/sa/"));
        if let Some((namespace, account)) = account {
            return pair(namespace, account);
        }
        let address = address.as_str().unwrap_or_default();
        match address.parse::<SocketAddr>() {
            Ok(address) => pair("", &address.ip().to_canonical().to_string()),
            Err(_) => pair("", address),
        }
    }

    /// The name for people, which is the key in flows too.
    pub fn name(&self) -> String {
        if self.namespace.is_empty() { self.name.clone() } else { format!("{}/{}", self.namespace, self.name) }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    connections: u64,
    sent: u64,
    received: u64,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.connections += other.connections;
        self.sent = self.sent.saturating_add(other.sent);
        self.received = self.received.saturating_add(other.received);
    }
}

/// What flows from one workload to another, in one way (`encrypted`, `plaintext`, `refused`).
#[derive(Debug, Default)]
pub struct Flows {
    all: BTreeMap<(Party, Party, &'static str), [Count; 2]>,
    reasons: BTreeMap<(Party, Party), BTreeSet<String>>,
}

impl Flows {
    /// Adds an open connection.
    pub fn add(&mut self, one: &Value) {
        let (from, to) = Party::of_connection(one);
        let kind = if one["protocol"] == "HBONE" { "encrypted" } else { "plaintext" };
        let (up, down) = (one["bytesSent"].as_u64().unwrap_or(0), one["bytesReceived"].as_u64().unwrap_or(0));
        let inbound = one["direction"] == "inbound";
        let (sent, received) = if inbound { (down, up) } else { (up, down) };
        self.count((from, to, kind), inbound, Count { connections: 1, sent, received });
    }

    /// Adds an entry of the history, if it is a refused connection.
    pub fn add_refused(&mut self, entry: &Value) {
        if entry["kind"] != "connection" || entry["outcome"] != "refused" {
            return;
        }
        let (from, to) = Party::of_history(entry);
        self.reasons.entry((from.clone(), to.clone())).or_default().insert(text(&entry["reason"]));
        self.count(
            (from, to, "refused"),
            entry["direction"] == "inbound",
            Count { connections: 1, ..Count::default() },
        );
    }

    fn count(&mut self, key: (Party, Party, &'static str), inbound: bool, count: Count) {
        let [out, into] = self.all.entry(key).or_default();
        if inbound { into.add(count) } else { out.add(count) }
    }

    /// The rows, those with the most connections if there are too many.
    pub fn rows(self) -> Rows {
        let outside: BTreeSet<&Party> =
            self.all.keys().flat_map(|(from, to, _)| [from, to]).filter(|party| party.namespace.is_empty()).collect();
        let merge = outside.len() > OUTSIDE_MAX;
        let party = |party: &Party| match merge && party.namespace.is_empty() {
            true => Party { namespace: String::new(), name: MANY.to_owned() },
            false => party.clone(),
        };
        let mut merged: BTreeMap<(Party, Party, &'static str), [Count; 2]> = BTreeMap::new();
        for ((from, to, kind), counts) in &self.all {
            let into = merged.entry((party(from), party(to), kind)).or_default();
            into.iter_mut().zip(counts).for_each(|(into, count)| into.add(*count));
        }
        let mut reasons: BTreeMap<(Party, Party), BTreeSet<&String>> = BTreeMap::new();
        for ((from, to), words) in &self.reasons {
            reasons.entry((party(from), party(to))).or_default().extend(words);
        }
        // Where both nodes of a connection are shown, both count it.
        let larger = |[out, into]: [Count; 2]| if into.connections > out.connections { into } else { out };
        let mut all: Vec<_> = merged.into_iter().map(|(key, counts)| (key, larger(counts))).collect();
        if all.len() > FLOWS_MAX {
            all.sort_by_key(|(_, count)| std::cmp::Reverse(count.connections));
            all.truncate(FLOWS_MAX);
        }
        let row = |((from, to, kind), count): ((Party, Party, &'static str), Count)| {
            let words = reasons.get(&(from.clone(), to.clone())).filter(|_| kind == "refused");
            let row = json!({
                "from": [from.namespace, from.name],
                "to": [to.namespace, to.name],
                "kind": kind,
                "connections": count.connections,
                "sent": count.sent,
                "received": count.received,
                "reasons": words.into_iter().flatten().take(8).collect::<Vec<_>>(),
            });
            (format!("{} > {} {kind}", from.name(), to.name()), row)
        };
        all.into_iter().map(row).collect()
    }
}
