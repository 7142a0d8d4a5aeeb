//! `culvert status --plaintext`: since when each pod has sent and received no plaintext.

use super::nodes::{self, Node};
use super::text::{ago, columns, text};
use super::{Outcome, Style};
use crate::cluster::{ClusterError, Daemons};
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Peers that are named below a pod.
const PEERS: usize = 5;

/// Asks all daemons. Returns what to print.
pub async fn run(
    daemons: &Daemons,
    timeout: Duration,
    (json, style): (bool, Style),
) -> Result<(String, Outcome), ClusterError> {
    let nodes = nodes::ask(daemons, "/plaintext", timeout).await?;
    let shown = if json { nodes::as_json(&nodes, "plaintext") } else { table(&nodes, style, SystemTime::now()) };
    Ok((shown, nodes::outcome(&nodes)))
}

fn table(nodes: &[Node], style: Style, now: SystemTime) -> String {
    let head = ["NODE", "POD", "NONE SENT FOR", "NONE RECEIVED FOR", "OPEN NOW", "REFUSED", "WITH"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut open = vec![false];
    for node in nodes {
        let pods = node.page.iter().flat_map(|page| page["pods"].as_array().into_iter().flatten());
        for pod in pods {
            rows.push(row(&node.name, pod, now));
            open.push(open_now(pod) > 0);
        }
    }
    let empty = rows.len() == 1;
    let painted = columns(&rows).into_iter().zip(open).enumerate().map(|(at, (line, open))| match (at, open) {
        (0, _) => style.bold(&line),
        (_, true) => style.yellow(&line),
        _ => line,
    });
    let mut lines: Vec<String> = painted.collect();
    if empty {
        lines.push("no pod is known yet".to_owned());
    }
    lines.extend(nodes.iter().filter_map(Node::silence));
    lines.join("\n")
}

/// Plaintext connections that are open now, with those that are older than the capture.
fn open_now(pod: &Value) -> u64 {
    pod["open"].as_u64().unwrap_or(0) + pod["uncaptured"].as_u64().unwrap_or(0)
}

fn row(node: &str, pod: &Value, now: SystemTime) -> Vec<String> {
    let none_for = |last: &str, count: &str| {
        let (since, ever) = (&pod["since"], pod[count].as_u64().unwrap_or(0) > 0);
        let for_how_long = ago(if ever { &pod[last] } else { since }, now).unwrap_or_else(|| "?".to_owned());
        if ever { for_how_long } else { format!("{for_how_long} (ever)") }
    };
    let peers: Vec<&Value> = pod["peers"].as_array().into_iter().flatten().collect();
    let mut named: Vec<String> = peers.iter().take(PEERS).map(|peer| text(peer, "peer")).collect();
    if peers.len() > PEERS {
        named.push(format!("and {} more", peers.len() - PEERS));
    }
    vec![
        node.to_owned(),
        text(pod, "pod"),
        none_for("last_opened", "opened"),
        none_for("last_accepted", "accepted"),
        open_now(pod).to_string(),
        pod["refused"].as_u64().unwrap_or(0).to_string(),
        named.join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_that_never_had_plaintext_says_for_how_long_it_was_watched() {
        let now = humantime::parse_rfc3339("2026-01-01T01:00:00Z").unwrap();
        let page = json!({"pods": [
            {"pod": "shop/web", "since": "2026-01-01T00:00:00.000Z", "accepted": 2, "last_accepted": "2026-01-01T00:59:50.000Z",
             "opened": 0, "last_opened": null, "refused": 3, "open": 0, "uncaptured": 1, "peers": [{"peer": "10.0.0.9"}]},
        ]});
        let silent = Node { name: "n2".into(), pod: None, note: None, page: Err("no answer within 5s".into()) };
        let nodes = [Node { name: "n1".into(), pod: None, note: None, page: Ok(page) }, silent];
        let expected = "\
NODE  POD       NONE SENT FOR  NONE RECEIVED FOR  OPEN NOW  REFUSED  WITH
n1    shop/web  1h (ever)      10s                1         3        10.0.0.9
n2: no answer: no answer within 5s";
        assert_eq!(table(&nodes, Style { colours: false }, now), expected);
    }
}
