//! `culvert connections`: the open connections of all nodes, or those that have ended.

use super::nodes::{self, Node};
use super::text::{ago, bytes, columns, printable, seconds, text};
use super::{Outcome, Style};
use crate::cluster::{ClusterError, Daemons};
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Which connections are shown.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only those of this pod, `NAMESPACE/NAME`.
    pub pod: Option<String>,
    /// Only those that were refused.
    pub refused: bool,
    /// Those that have ended in this time, instead of the open ones.
    pub since: Option<Duration>,
    /// At most so many of each node.
    pub limit: usize,
}

impl Filter {
    /// Whether ended connections are asked for. A refused one is never open.
    fn of_history(&self) -> bool {
        self.refused || self.since.is_some()
    }

    /// The page to ask for.
    fn path(&self) -> String {
        if !self.of_history() {
            return "/connections".to_owned();
        }
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("kind", "connection").append_pair("limit", &self.limit.to_string());
        if let Some(since) = self.since {
            query.append_pair("since", &format!("{}s", since.as_secs().max(1)));
        }
        if self.refused {
            query.append_pair("refused", "true");
        }
        if let Some(pod) = &self.pod {
            query.append_pair("pod", pod);
        }
        format!("/history?{}", query.finish())
    }
}

/// Asks all daemons. Returns what to print.
pub async fn run(
    daemons: &Daemons,
    timeout: Duration,
    filter: &Filter,
    (json, style): (bool, Style),
) -> Result<(String, Outcome), ClusterError> {
    let mut nodes = nodes::ask(daemons, &filter.path(), timeout).await?;
    if !filter.of_history() {
        for page in nodes.iter_mut().filter_map(|node| node.page.as_mut().ok()) {
            keep(page, filter);
        }
    }
    let shown = match (json, filter.of_history()) {
        (true, false) => nodes::as_json(&nodes, "connections"),
        (true, true) => nodes::as_json(&nodes, "history"),
        (false, false) => open(&nodes, filter, style),
        (false, true) => ended(&nodes, filter, style, SystemTime::now()),
    };
    Ok((shown, nodes::outcome(&nodes)))
}

/// Leaves only the connections of the pod that was asked for.
fn keep(page: &mut Value, filter: &Filter) {
    let (Some(pod), Value::Array(all)) = (&filter.pod, page) else { return };
    all.retain(|one| one["podName"] == **pod);
}

/// An identity without the part that all of them have.
pub fn identity(value: &Value) -> String {
    let name = value.as_str().unwrap_or("-");
    printable(name.strip_prefix("spiffe://").unwrap_or(name))
}

/// How a connection is protected: TLS version and key exchange, or that it is not.
pub fn protection(one: &Value) -> String {
    let tls = &one["tls"];
    match (tls["version"].as_str(), one["protocol"].as_str()) {
        (Some(_), _) => format!("{} {}", text(tls, "version"), text(tls, "keyExchange")),
        (None, Some("HBONE")) => "opening".to_owned(),
        _ => "PLAINTEXT".to_owned(),
    }
}

/// The open connections, those with the most bytes first.
fn open(nodes: &[Node], filter: &Filter, style: Style) -> String {
    let head = ["NODE", "POD", "", "FAR END", "ITS IDENTITY", "PROTECTION", "SENT", "RECEIVED", "OPEN FOR", "RULE"];
    let carried = |one: &Value| one["bytesSent"].as_u64().unwrap_or(0) + one["bytesReceived"].as_u64().unwrap_or(0);
    let row = |node: &Node, one: &Value| {
        let is_out = one["direction"] == "outbound";
        let (far, theirs) = if is_out { ("dst", "dstIdentity") } else { ("src", "srcIdentity") };
        let service = text(one, "service");
        let far = if service.is_empty() || !is_out {
            text(one, far)
        } else {
            format!("{service} ({})", text(one, "actualDst"))
        };
        let count = |key: &str| bytes(one[key].as_u64().unwrap_or(0));
        let cells = [
            node.name.clone(),
            text(one, "podName"),
            if is_out { "to" } else { "from" }.to_owned(),
            far,
            identity(&one[theirs]),
            protection(one),
            count("bytesSent"),
            count("bytesReceived"),
            seconds(one["ageMs"].as_u64().unwrap_or(0) / 1000),
            text(one, "rule"),
        ];
        (carried(one), cells.to_vec())
    };
    let all = nodes.iter().flat_map(|node| {
        let list = node.page.iter().flat_map(|page| page.as_array().into_iter().flatten());
        list.map(move |one| row(node, one))
    });
    let mut all: Vec<(u64, Vec<String>)> = all.collect();
    all.sort_by_key(|(carried, _)| std::cmp::Reverse(*carried));
    let rows = all.into_iter().map(|(_, cells)| cells).collect();
    table(nodes, &head, rows, (filter.limit, "no connection is open"), style)
}

/// The connections that have ended, the latest first.
fn ended(nodes: &[Node], filter: &Filter, style: Style, now: SystemTime) -> String {
    let head = ["ENDED", "NODE", "POD", "", "FAR END", "ITS IDENTITY", "OUTCOME", "SENT", "RECEIVED", "TOOK", "WHY"];
    let row = |node: &Node, one: &Value| {
        let is_out = one["direction"] == "outbound";
        let far = if is_out { &one["destination"] } else { &one["source"] };
        let name = [text(far, "service"), text(far, "workload")].into_iter().find(|name| !name.is_empty());
        let name = name.map_or_else(|| text(far, "address"), |name| format!("{name} ({})", text(far, "address")));
        let count = |key: &str| bytes(one[key].as_u64().unwrap_or(0));
        let took = one["duration_ms"].as_f64().unwrap_or(0.0);
        let cells = [
            ago(&one["time"], now).map(|ago| format!("{ago} ago")).unwrap_or_default(),
            node.name.clone(),
            text(one, "pod"),
            if is_out { "to" } else { "from" }.to_owned(),
            name,
            identity(&far["identity"]),
            match one["reason"].as_str() {
                Some(reason) => format!("{}: {}", text(one, "outcome"), printable(reason)),
                None => text(one, "outcome"),
            },
            count("bytes_sent"),
            count("bytes_received"),
            if took < 10_000.0 { format!("{took:.1}ms") } else { format!("{:.0}s", took / 1000.0) },
            [text(one, "error"), text(one, "rule")].into_iter().find(|why| !why.is_empty()).unwrap_or_default(),
        ];
        (text(one, "time"), cells.to_vec())
    };
    let all = nodes.iter().flat_map(|node| {
        let list = node.page.iter().flat_map(|page| page["entries"].as_array().into_iter().flatten());
        list.map(move |one| row(node, one))
    });
    let mut all: Vec<(String, Vec<String>)> = all.collect();
    all.sort_by(|a, b| b.0.cmp(&a.0));
    let rows = all.into_iter().map(|(_, cells)| cells).collect();
    let mut shown = table(nodes, &head, rows, (filter.limit, "no such connection is remembered"), style);
    for hint in hints(nodes) {
        shown.push_str("\n\n");
        shown.push_str(&hint);
    }
    shown
}

/// What to look at next, once for each reason.
fn hints(nodes: &[Node]) -> Vec<String> {
    let mut hints: Vec<String> = Vec::new();
    let pages = nodes.iter().filter_map(|node| node.page.as_ref().ok());
    for one in pages.flat_map(|page| page["entries"].as_array().into_iter().flatten()) {
        let hint = format!("{}: {}", text(one, "reason"), text(one, "next_step"));
        if one["reason"].is_string() && !hints.contains(&hint) {
            hints.push(hint);
        }
    }
    hints
}

/// A table of connections, with what is missing from it.
fn table(nodes: &[Node], head: &[&str], rows: Vec<Vec<String>>, (limit, none): (usize, &str), style: Style) -> String {
    let (count, mut all) = (rows.len(), vec![head.iter().map(|cell| (*cell).to_owned()).collect()]);
    all.extend(rows.into_iter().take(limit));
    let mut lines = columns(&all);
    if let Some(first) = lines.first_mut() {
        *first = style.bold(first);
    }
    if count == 0 {
        // Of nodes that do not answer nothing is known.
        lines = nodes.iter().any(|node| node.page.is_ok()).then(|| none.to_owned()).into_iter().collect();
    }
    if count > limit {
        lines.push(format!("and {} more; use --limit, or --json for all", count - limit));
    }
    lines.extend(nodes.iter().filter_map(Node::silence));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn example() -> Value {
        json!([
            {"podName": "shop/front", "direction": "outbound", "protocol": "HBONE", "src": "10.0.0.1:4", "dst": "10.96.0.1:80",
             "actualDst": "10.1.0.2:8080", "service": "web.shop", "dstIdentity": "spiffe://td/ns/shop/sa/web", "bytesSent": 5, "bytesReceived": 2048,
             "ageMs": 65_000, "tls": {"version": "TLS 1.3", "keyExchange": "X25519MLKEM768"}, "rule": null},
            {"podName": "shop/web", "direction": "inbound", "protocol": "TCP", "src": "10.0.0.9:4", "dst": "10.1.0.2:8080",
             "srcIdentity": null, "bytesSent": 9000, "bytesReceived": 1, "ageMs": 1000, "tls": null, "rule": "shop/open[0]"},
        ])
    }

    #[test]
    fn open_connections_are_shown_with_both_ends_and_those_in_plaintext_are_said_to_be() {
        let node = Node { name: "n1".into(), pod: None, note: None, page: Ok(example()) };
        let filter = Filter { limit: 10, ..Filter::default() };
        let expected = "\
NODE  POD               FAR END                   ITS IDENTITY      PROTECTION              SENT     RECEIVED  OPEN FOR  RULE
n1    shop/web    from  10.0.0.9:4                -                 PLAINTEXT               8.7 KiB  1 B       1s        shop/open[0]
n1    shop/front  to    web.shop (10.1.0.2:8080)  td/ns/shop/sa/web  TLS 1.3 X25519MLKEM768  5 B      2.0 KiB   1m 5s";
        let shown = open(&[node], &filter, Style { colours: false });
        let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(squeeze(&shown), squeeze(expected));
        let mut page = example();
        keep(&mut page, &Filter { pod: Some("shop/web".into()), ..Filter::default() });
        assert_eq!(page.as_array().unwrap().len(), 1);
    }

    #[test]
    fn nothing_is_said_of_nodes_that_do_not_answer() {
        let silent = || Node { name: "n1".into(), pod: None, note: None, page: Err("late".into()) };
        let (filter, style) = (Filter { limit: 10, ..Filter::default() }, Style { colours: false });
        assert_eq!(open(&[silent()], &filter, style), "n1: no answer: late");
        let well = Node { name: "n2".into(), pod: None, note: None, page: Ok(json!([])) };
        assert_eq!(open(&[silent(), well], &filter, style), "no connection is open\nn1: no answer: late");
    }

    #[test]
    fn the_question_is_about_the_history_where_that_is_asked_for() {
        let path = |filter: Filter| filter.path();
        assert_eq!(path(Filter { pod: Some("a/b".into()), limit: 5, ..Filter::default() }), "/connections");
        let refused =
            Filter { refused: true, since: Some(Duration::from_secs(600)), pod: Some("a/b".into()), limit: 5 };
        assert_eq!(path(refused), "/history?kind=connection&limit=5&since=600s&refused=true&pod=a%2Fb");
    }
}
