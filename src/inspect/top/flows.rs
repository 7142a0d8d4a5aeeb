//! Flows: open connections that have the same pod, direction and far end, taken together, and how fast they were opened.
//! Pure: it takes what daemons have answered.

use crate::inspect::connections::{identity, protection};
use crate::inspect::nodes::Node;
use crate::inspect::text::text;
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// What makes connections one flow: node, pod, whether the pod opened them, and the far end.
type Key = (String, String, bool, String);

/// A flow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Flow {
    /// Node of the pod.
    pub node: String,
    /// The pod, `namespace/name`.
    pub pod: String,
    /// Whether the pod opened the connections.
    pub is_outbound: bool,
    /// The far end: service, identity, or address.
    pub far: String,
    /// Identity of the pod.
    pub own_identity: String,
    /// Identity of the far end.
    pub far_identity: String,
    /// TLS version and key exchange, or that there is none.
    pub protection: String,
    /// Open connections.
    pub connections: u64,
    /// Bytes that the pod sent on them.
    pub sent: u64,
    /// Bytes that it received.
    pub received: u64,
    /// The same for each second since the last look.
    pub sent_rate: f64,
    /// The same.
    pub received_rate: f64,
    /// Median of the time until a connection was open, in milliseconds, of those that have ended lately.
    pub p50: Option<f64>,
    /// 99th percentile of the same.
    pub p99: Option<f64>,
}

impl Flow {
    /// Bytes for each second, both ways.
    pub fn rate(&self) -> f64 {
        self.sent_rate + self.received_rate
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "node": self.node,
            "pod": self.pod,
            "direction": if self.is_outbound { "outbound" } else { "inbound" },
            "farEnd": self.far,
            "identity": self.own_identity,
            "farIdentity": self.far_identity,
            "protection": self.protection,
            "connections": self.connections,
            "bytesSent": self.sent,
            "bytesReceived": self.received,
            "bytesSentPerSecond": self.sent_rate,
            "bytesReceivedPerSecond": self.received_rate,
            "connectMsP50": self.p50,
            "connectMsP99": self.p99,
        })
    }
}

/// What the list is sorted by, the largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Bytes for each second.
    #[default]
    Rate,
    /// Bytes in all.
    Bytes,
    /// Open connections.
    Connections,
    /// 99th percentile of the time until a connection was open.
    Connect,
    /// The name of the pod.
    Pod,
}

/// What the connections of each node had carried when it last answered.
pub type Carried = HashMap<String, Answered>;

/// The last answer of a node.
#[derive(Debug, Default)]
pub struct Answered {
    /// When it was asked.
    asked: Duration,
    /// Bytes that were sent and received, by the number of the connection.
    bytes: HashMap<u64, (u64, u64)>,
}

/// The time since a node's last answer, and what its connections had carried then.
struct Since<'a> {
    /// From question to question.
    time: Duration,
    /// The age that a connection has at most that was opened after the last answer was made.
    age: Duration,
    bytes: &'a HashMap<u64, (u64, u64)>,
}

/// Takes connections together. `before` is what they had carried at the last answer of each node; what they have carried
/// now is put there. `asked` and `answered` are the times of this look, counted from any point in time.
pub fn flows(
    connections: &[Node],
    history: &[Node],
    before: &mut Carried,
    (asked, answered): (Duration, Duration),
) -> Vec<Flow> {
    let times = connect_times(history);
    let mut all: BTreeMap<Key, Flow> = BTreeMap::new();
    before.retain(|name, _| connections.iter().any(|node| node.name == *name));
    for node in connections {
        // What is known of a node that does not answer now is kept for its next answer.
        let Some(list) = node.page.as_ref().ok().and_then(Value::as_array) else { continue };
        let last = before.remove(&node.name);
        let since = last.as_ref().map(|last| Since {
            time: asked.saturating_sub(last.asked),
            age: answered.saturating_sub(last.asked),
            bytes: &last.bytes,
        });
        let mut now = Answered { asked, bytes: HashMap::with_capacity(list.len()) };
        for one in list {
            let key = key_of_open(&node.name, one);
            let flow = all.entry(key).or_insert_with_key(|key| begun(key, one, &times));
            add(flow, one, since.as_ref(), &mut now);
        }
        before.insert(node.name.clone(), now);
    }
    all.into_values().collect()
}

/// Sorts flows.
pub fn sort(flows: &mut [Flow], order: Order) {
    let most = |number: f64| Reverse(ordered(number));
    flows.sort_by(|a, b| (&a.pod, &a.far).cmp(&(&b.pod, &b.far)));
    match order {
        Order::Rate => flows.sort_by_key(|flow| (most(flow.rate()), Reverse(flow.sent + flow.received))),
        Order::Bytes => flows.sort_by_key(|flow| Reverse(flow.sent + flow.received)),
        Order::Connections => flows.sort_by_key(|flow| Reverse(flow.connections)),
        Order::Connect => flows.sort_by_key(|flow| most(flow.p99.unwrap_or(-1.0))),
        Order::Pod => {}
    }
}

/// A number by which one can sort.
fn ordered(number: f64) -> i64 {
    // Thousandths are exact enough, and the conversion saturates.
    #[allow(clippy::cast_possible_truncation, reason = "saturates, which keeps the order")]
    let thousandths = (number * 1000.0) as i64;
    thousandths
}

fn begun(key: &Key, one: &Value, times: &BTreeMap<Key, Vec<f64>>) -> Flow {
    let (node, pod, is_outbound, far) = key.clone();
    let (own, theirs) = if is_outbound { ("srcIdentity", "dstIdentity") } else { ("dstIdentity", "srcIdentity") };
    let times = times.get(key).map(Vec::as_slice).unwrap_or_default();
    let (own_identity, far_identity) = (identity(&one[own]), identity(&one[theirs]));
    let (p50, p99) = (percentile(times, 50), percentile(times, 99));
    let protection = protection(one);
    Flow { node, pod, is_outbound, far, own_identity, far_identity, protection, p50, p99, ..Flow::default() }
}

fn add(flow: &mut Flow, one: &Value, since: Option<&Since<'_>>, now: &mut Answered) {
    let count = |key: &str| one[key].as_u64().unwrap_or(0);
    let (sent, received, id) = (count("bytesSent"), count("bytesReceived"), count("id"));
    flow.connections += 1;
    flow.sent += sent;
    flow.received += received;
    // One plaintext connection is what people must see.
    let protection = protection(one);
    if protection == "PLAINTEXT" {
        flow.protection = protection;
    }
    if let Some(since) = since.filter(|since| !since.time.is_zero()) {
        let is_new = Duration::from_millis(count("ageMs")) <= since.age;
        // A connection that is new has carried all of it since then; of one that is not, nothing is known.
        let before = since.bytes.get(&id).copied().or(is_new.then_some((0, 0)));
        let (sent_before, received_before) = before.unwrap_or((sent, received));
        #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / since.time.as_secs_f64();
        flow.sent_rate += rate(sent, sent_before);
        flow.received_rate += rate(received, received_before);
    }
    now.bytes.insert(id, (sent, received));
}

fn key_of_open(node: &str, one: &Value) -> Key {
    let is_outbound = one["direction"] == "outbound";
    let far = match is_outbound {
        true => first([text(one, "service"), named(&one["dstIdentity"]), text(one, "dst")]),
        false => first([named(&one["srcIdentity"]), host(&text(one, "src"))]),
    };
    (node.to_owned(), text(one, "podName"), is_outbound, far)
}

fn key_of_ended(node: &str, one: &Value) -> Key {
    let is_outbound = one["direction"] == "outbound";
    let (source, destination) = (&one["source"], &one["destination"]);
    let far = match is_outbound {
        true => first([text(destination, "service"), named(&destination["identity"]), text(destination, "address")]),
        false => first([named(&source["identity"]), host(&text(source, "address"))]),
    };
    (node.to_owned(), text(one, "pod"), is_outbound, far)
}

/// An identity; empty where there is none.
fn named(value: &Value) -> String {
    if value.is_string() { identity(value) } else { String::new() }
}

fn first<const N: usize>(names: [String; N]) -> String {
    names.into_iter().find(|name| !name.is_empty()).unwrap_or_default()
}

/// An address without its port: the ports of clients differ.
fn host(address: &str) -> String {
    address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned()
}

/// How long it took until connections were open, in milliseconds, sorted.
fn connect_times(history: &[Node]) -> BTreeMap<Key, Vec<f64>> {
    let mut all: BTreeMap<Key, Vec<f64>> = BTreeMap::new();
    for node in history {
        let entries = node.page.as_ref().ok().and_then(|page| page["entries"].as_array());
        for one in entries.into_iter().flatten().filter(|one| one["outcome"] == "ok") {
            let stages = one["stages_ms"].as_object().into_iter().flatten();
            // The first byte depends on the application.
            let until_open = stages.filter(|(stage, _)| *stage != "first_byte").filter_map(|(_, took)| took.as_f64());
            all.entry(key_of_ended(&node.name, one)).or_default().push(until_open.sum());
        }
    }
    for times in all.values_mut() {
        times.sort_by(f64::total_cmp);
    }
    all
}

/// The value that this many percent of the sorted ones do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(page: Value) -> Node {
        Node { name: "n1".into(), pod: None, note: None, page: Ok(page) }
    }

    fn open(id: u64, sent: u64, received: u64) -> Value {
        json!({"id": id, "podName": "shop/front", "direction": "outbound", "protocol": "HBONE", "src": "10.0.0.1:1",
            "dst": "10.96.0.1:80", "service": "web.shop", "srcIdentity": "spiffe://td/ns/shop/sa/front",
            "dstIdentity": "spiffe://td/ns/shop/sa/web", "bytesSent": sent, "bytesReceived": received,
            "tls": {"version": "TLS 1.3", "keyExchange": "X25519MLKEM768"}})
    }

    #[test]
    fn connections_of_one_pair_are_one_flow_with_rates_and_connect_times() {
        let ended = |took: f64| {
            json!({"pod": "shop/front", "direction": "outbound", "outcome": "ok", "source": {"address": "10.0.0.1:2"},
            "destination": {"address": "10.96.0.1:80", "service": "web.shop"}, "stages_ms": {"dial": took, "first_byte": 500.0}})
        };
        let history = [node(json!({"entries": (1..=100).map(|took| ended(f64::from(took))).collect::<Vec<_>>()}))];
        let mut before = Carried::new();
        let first = flows(&[node(json!([open(1, 100, 0)]))], &history, &mut before, at(0));
        assert_eq!((first[0].sent_rate, first[0].p50, first[0].p99), (0.0, Some(50.0), Some(99.0)));
        let mut plain = open(3, 1, 0);
        plain["tls"] = Value::Null;
        plain["protocol"] = json!("TCP");
        let again = flows(&[node(json!([open(1, 300, 10), open(2, 50, 0), plain]))], &history, &mut before, at(2));
        assert_eq!(again.len(), 1, "{again:?}");
        let flow = &again[0];
        assert_eq!((flow.connections, flow.sent, flow.received), (3, 351, 10));
        assert_eq!((flow.sent_rate, flow.received_rate), (125.5, 5.0));
        assert_eq!(flow.protection, "PLAINTEXT", "one in plaintext is what must be seen");
        assert_eq!((flow.own_identity.as_str(), flow.far.as_str()), ("td/ns/shop/sa/front", "web.shop"));
    }

    /// A look that begins and ends at this second.
    fn at(second: u64) -> (Duration, Duration) {
        (Duration::from_secs(second), Duration::from_secs(second))
    }

    #[test]
    fn a_node_that_did_not_answer_for_a_while_has_the_rate_since_its_last_answer() {
        let aged = |id, sent, age: u64| {
            let mut one = open(id, sent, 0);
            one["ageMs"] = json!(age);
            one
        };
        let silent = || Node { name: "n1".into(), pod: None, note: None, page: Err("no answer within 5s".into()) };
        let mut before = Carried::new();
        let mut rate = |page: Option<Value>, second| {
            let node = page.map_or_else(silent, node);
            let all = flows(&[node], &[], &mut before, at(second));
            all.first().map(|flow| flow.sent_rate)
        };
        let terabyte = 1 << 40;
        assert_eq!(rate(Some(json!([aged(1, terabyte, 60_000)])), 10), Some(0.0));
        assert_eq!(rate(None, 12), None);
        assert_eq!(rate(None, 14), None);
        // The second one is new, and the third one is older than the last answer.
        let page = json!([aged(1, terabyte + 600, 66_000), aged(2, 60, 3_000), aged(3, terabyte, 50_000)]);
        assert_eq!(rate(Some(page), 16), Some(110.0));
        assert_eq!(rate(Some(json!([aged(1, 3 * terabyte, 68_000)])), 18).map(|rate| rate > 1e12), Some(true));
    }

    #[test]
    fn flows_are_sorted_by_what_was_asked_for() {
        let flow = |pod: &str, connections, sent, sent_rate, p99| Flow {
            pod: pod.into(),
            connections,
            sent,
            sent_rate,
            p99,
            ..Flow::default()
        };
        let mut all =
            [flow("a", 1, 30, 1.0, None), flow("b", 3, 10, 2.0, Some(9.0)), flow("c", 2, 20, 3.0, Some(90.0))];
        for (order, expected) in [
            (Order::Rate, "cba"),
            (Order::Bytes, "acb"),
            (Order::Connections, "bca"),
            (Order::Connect, "cba"),
            (Order::Pod, "abc"),
        ] {
            sort(&mut all, order);
            assert_eq!(all.iter().map(|flow| flow.pod.as_str()).collect::<String>(), expected, "{order:?}");
        }
    }
}
