//! What the live page shows at one moment: rows by section and key, made from what the nodes say of themselves. Two
//! pictures give a difference. Every text in a picture is cleaned and bounded, because names, reasons and policies are
//! what others have written.

use super::notes::notes;
use super::parts::{Flows, Party, Rows, seconds, text};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

/// Most rows of a section. Further ones are counted.
const CONNECTIONS_MAX: usize = 10_000;
const PODS_MAX: usize = 5_000;
const HISTORY_MAX: usize = 500;
const CERTIFICATES_MAX: usize = 2_000;
const NODES_MAX: usize = 2_000;

/// An age is read anew in each picture. A start that has moved by less than this is the same start.
const START_TOLERANCE: u64 = 5;

/// The sections, in the order of the page.
pub const SECTIONS: [&str; 7] = ["nodes", "flows", "connections", "traffic", "history", "pods", "certificates"];

/// What the page shows at one moment.
#[derive(Debug, Default)]
pub struct Picture {
    /// When it was made.
    pub at: u64,
    sections: BTreeMap<&'static str, Rows>,
    /// How many rows there would be without limits, of the sections that have more.
    left_out: BTreeMap<&'static str, u64>,
}

impl Picture {
    /// Makes a picture of `{"nodes": […]}`. The one before keeps starts of connections steady.
    pub fn of(raw: &Value, before: &Self, now: SystemTime) -> Self {
        let at = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut picture = Self { at, ..Self::default() };
        let mut flows = Flows::default();
        for node in raw["nodes"].as_array().into_iter().flatten() {
            let name = text(&node["node"]);
            picture.add("nodes", NODES_MAX, name.clone(), node_row(node));
            for pod in list(node, "pods") {
                let key = format!("{name}/{}", text(&pod["uid"]));
                picture.add("pods", PODS_MAX, key, pod_row(&name, pod));
            }
            let names: Map<String, Value> = list(node, "pods")
                .map(|pod| (text(&pod["uid"]), format!("{}/{}", text(&pod["namespace"]), text(&pod["name"])).into()))
                .collect();
            for one in list(node, "certificates") {
                let key = format!("{name}/{}", text(&one["identity"]));
                picture.add("certificates", CERTIFICATES_MAX, key, certificate_row(&name, one));
            }
            picture.connections((&name, &names), node, before, &mut flows);
            picture.history(&name, node, &mut flows);
        }
        let history = picture.section("history");
        while history.len() > HISTORY_MAX {
            history.pop_first();
        }
        picture.sections.insert("flows", flows.rows());
        picture
    }

    fn section(&mut self, section: &'static str) -> &mut Rows {
        self.sections.entry(section).or_default()
    }

    fn add(&mut self, section: &'static str, max: usize, key: String, row: Value) {
        let rows = self.sections.entry(section).or_default();
        if rows.len() < max || rows.contains_key(&key) {
            rows.insert(key, row);
        } else {
            *self.left_out.entry(section).or_default() += 1;
        }
    }

    fn connections(
        &mut self,
        (name, pods): (&str, &Map<String, Value>),
        node: &Value,
        before: &Self,
        flows: &mut Flows,
    ) {
        let mut listed = 0;
        for one in list(node, "connections") {
            listed += 1;
            let key = format!("{name}/{}", text(&one["id"]));
            flows.add(one);
            let (sent, received) = bytes(one);
            self.add("traffic", CONNECTIONS_MAX, key.clone(), json!([sent, received]));
            let mut start = self.at.saturating_sub(one["ageMs"].as_u64().unwrap_or(0) / 1000);
            let earlier = before.rows("connections").and_then(|rows| rows.get(&key)?.get("start")?.as_u64());
            if let Some(earlier) = earlier.filter(|earlier| earlier.abs_diff(start) < START_TOLERANCE) {
                start = earlier;
            }
            let pod = pods.get(&text(&one["pod"])).and_then(Value::as_str).unwrap_or_default();
            self.add("connections", CONNECTIONS_MAX, key, connection_row((name, pod), one, start));
        }
        let total = node["connectionsTotal"].as_u64().unwrap_or(listed);
        if total > listed {
            *self.left_out.entry("connections").or_default() += total - listed;
        }
    }

    /// The key of an entry sorts by time. Entries of one moment and kind are numbered from the oldest, so that the keys
    /// of those that are known stay as they are when others come.
    fn history(&mut self, name: &str, node: &Value, flows: &mut Flows) {
        let newest_first: Vec<&Value> = list(node, "history").collect();
        let mut of_moment: HashMap<String, usize> = HashMap::new();
        for entry in newest_first.into_iter().rev() {
            flows.add_refused(entry);
            let row = history_row(name, entry);
            let kind = [&entry["kind"], &entry["outcome"]].map(text).join(" ");
            let moment = format!("{}/{name}/{kind}", text(&entry["time"]));
            let number = of_moment.entry(moment.clone()).or_default();
            *number += 1;
            self.section("history").insert(format!("{moment}/{number:05}"), row);
        }
    }

    /// The rows of a section.
    pub fn rows(&self, section: &str) -> Option<&Rows> {
        self.sections.get(section)
    }

    /// How many rows of a section are left out.
    pub fn left_out(&self, section: &str) -> u64 {
        self.left_out.get(section).copied().unwrap_or(0)
    }

    /// The whole picture for a page that has none yet.
    pub fn whole(&self) -> Value {
        json!({"at": self.at, "leftOut": self.left_out, "set": self.sections})
    }

    /// What has changed since the picture before.
    pub fn since(&self, before: &Self) -> Value {
        let (mut set, mut gone) = (Map::new(), Map::new());
        let none = Rows::new();
        for section in SECTIONS {
            let (old, new) = (before.rows(section).unwrap_or(&none), self.rows(section).unwrap_or(&none));
            let changed = new.iter().filter(|(key, row)| old.get(*key) != Some(row));
            let changed: Map<String, Value> = changed.map(|(key, row)| (key.clone(), row.clone())).collect();
            if !changed.is_empty() {
                set.insert(section.to_owned(), Value::Object(changed));
            }
            let missing = old.keys().filter(|key| !new.contains_key(*key));
            let missing: Vec<Value> = missing.map(|key| Value::from(key.as_str())).collect();
            if !missing.is_empty() {
                gone.insert(section.to_owned(), Value::Array(missing));
            }
        }
        json!({"at": self.at, "leftOut": self.left_out, "set": set, "gone": gone})
    }
}

fn list<'a>(node: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    node.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().take(100).map(text).collect()
}

fn node_row(node: &Value) -> Value {
    let status = &node["status"];
    let facts = &status["facts"];
    json!({
        "reachable": node["reachable"] == true,
        "error": text(&node["error"]),
        "version": text(&status["version"]),
        "ready": status["ready"] == true,
        "red": texts(&status["red"]),
        "notes": texts(&status["notes"]),
        "source": text(&facts["source"]),
        "from": text(&facts["from"]),
        "current": facts["current"].as_bool(),
        "age": facts["ageSeconds"].as_u64(),
        "open": status.pointer("/connections/open").and_then(Value::as_u64),
        "failures": status.pointer("/failures/total").and_then(Value::as_u64),
    })
}

fn pod_row(node: &str, pod: &Value) -> Value {
    let notes: Vec<String> = notes(pod).iter().map(|note| text(&Value::from(note.as_str()))).collect();
    json!({
        "node": node,
        "pod": format!("{}/{}", text(&pod["namespace"]), text(&pod["name"])),
        "state": text(&pod["state"]),
        "since": seconds(&pod["since"]),
        "notes": notes,
    })
}

/// The state of a certificate that is missing says why, but that of one that cannot be renewed does not.
fn certificate_row(node: &str, one: &Value) -> Value {
    let state = one["state"].as_str().unwrap_or_default();
    let is_told = one["error"].as_str().is_some_and(|error| state.contains(error));
    json!({
        "node": node,
        "identity": text(&one["identity"]),
        "state": text(&one["state"]),
        "until": seconds(&one["expirationTime"]),
        "error": if is_told { String::new() } else { text(&one["error"]) },
    })
}

/// Bytes from the client to the server, and back. The daemon counts from the application of its own pod.
fn bytes(one: &Value) -> (u64, u64) {
    let (up, down) = (one["bytesSent"].as_u64().unwrap_or(0), one["bytesReceived"].as_u64().unwrap_or(0));
    if one["direction"] == "inbound" { (down, up) } else { (up, down) }
}

fn connection_row((node, pod): (&str, &str), one: &Value, start: u64) -> Value {
    let (from, to) = Party::of_connection(one);
    let tls = &one["tls"];
    let tls = match tls["version"].as_str() {
        Some(_) => format!("{} {} {}", text(&tls["version"]), text(&tls["keyExchange"]), text(&tls["cipher"])),
        None => String::new(),
    };
    json!({
        "node": node,
        "pod": pod,
        "direction": text(&one["direction"]),
        "encrypted": one["protocol"] == "HBONE",
        "from": from.name(),
        "to": to.name(),
        "source": text(&one["src"]),
        "destination": text(&one["dst"]),
        "actual": text(&one["actualDst"]),
        "authority": text(&one["hboneAddr"]),
        "service": text(&one["service"]),
        "sourceIdentity": text(&one["srcIdentity"]),
        "destinationIdentity": text(&one["dstIdentity"]),
        "gateway": text(&one["gateway"]),
        "tls": tls,
        "rule": text(&one["rule"]),
        "start": start,
    })
}

fn history_row(node: &str, entry: &Value) -> Value {
    let (from, to) = Party::of_history(entry);
    json!({
        "node": node,
        "time": text(&entry["time"]),
        "kind": text(&entry["kind"]),
        "what": text(&entry["what"]),
        "subject": text(&entry["subject"]),
        "text": text(&entry["text"]),
        "direction": text(&entry["direction"]),
        "outcome": text(&entry["outcome"]),
        "reason": text(&entry["reason"]),
        "rule": text(&entry["rule"]),
        "next": text(&entry["next_step"]),
        "error": text(&entry["error"]),
        "pod": text(&entry["pod"]),
        "from": from.name(),
        "to": to.name(),
        "encrypted": entry["encrypted"] == true,
    })
}
