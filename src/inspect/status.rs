//! `culvert status`: is everything captured, current and about to stay so? One screen for all nodes, and an exit code.

use super::control_plane::{self, ControlPlane};
use super::nodes::{self, Node};
use super::text::{ago, at, columns, printable, seconds, text};
use super::{Outcome, Style};
use crate::cluster::{ClusterError, Daemons};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Pause between two looks while waiting.
const AGAIN: Duration = Duration::from_secs(1);

/// Rows of nodes that are well. Further ones are only counted, so that the rest stays on the screen.
const GREEN_ROWS: usize = 24;

/// Lines below a heading.
const LINES: usize = 40;

/// Asks all daemons until everything is green or `wait` has passed, and once without `wait`. Returns what to print.
pub async fn run(
    daemons: &Daemons,
    timeout: Duration,
    wait: Option<Duration>,
    (json, style): (bool, Style),
) -> Result<(String, Outcome), ClusterError> {
    let end = Instant::now() + wait.unwrap_or_default();
    loop {
        let looked = nodes::ask(daemons, "/status", timeout).await;
        let mut control = match &looked {
            Ok(nodes) => control_plane::look(daemons, nodes, timeout).await,
            Err(_) => None,
        };
        let is_green = looked.as_ref().is_ok_and(|nodes| is_all_green(nodes, control.as_ref()));
        if is_green || Instant::now() + AGAIN > end {
            let nodes = looked?;
            let outcome = match (is_green, nodes.iter().any(|node| node.page.is_ok())) {
                (true, _) => Outcome::Green,
                (false, true) => Outcome::Red,
                (false, false) => Outcome::Unknown,
            };
            if let Some(control) = &mut control {
                control.read_policies(daemons, timeout).await;
            }
            let control = control.as_ref();
            let shown = if json { as_json(&nodes, control) } else { screen(&nodes, control, style, SystemTime::now()) };
            return Ok((shown, outcome));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Whether a daemon has answered that nothing is wrong.
fn is_green(node: &Node) -> bool {
    node.page.as_ref().is_ok_and(|status| status["green"] == true)
}

/// Whether everything is well.
fn is_all_green(nodes: &[Node], control: Option<&ControlPlane>) -> bool {
    nodes.iter().all(is_green) && control.is_none_or(|control| control.red().is_empty())
}

fn as_json(nodes: &[Node], control: Option<&ControlPlane>) -> String {
    let green = is_all_green(nodes, control);
    let nodes: Vec<Value> = nodes.iter().map(|node| node.json("status")).collect();
    let all = match control {
        Some(control) => json!({"green": green, "nodes": nodes, "controlPlane": control.json()}),
        None => json!({"green": green, "nodes": nodes}),
    };
    serde_json::to_string_pretty(&all).unwrap_or_default()
}

/// One screen: a table of the nodes, and below it what is wrong, what is worth knowing, and what failed lately.
fn screen(nodes: &[Node], control: Option<&ControlPlane>, style: Style, now: SystemTime) -> String {
    let mut lines = table(nodes, style);
    lines.extend(
        control.into_iter().flat_map(|control| [String::new(), format!("control plane {}", control.summary())]),
    );
    let mut wrong = control.map(ControlPlane::red).unwrap_or_default();
    let mut notes = Vec::new();
    for node in nodes {
        notes.extend(node.note.iter().map(|note| format!("{}: {}", node.name, printable(note))));
        match &node.page {
            Err(error) => wrong.push(format!("{}: no answer: {}", node.name, printable(error))),
            Ok(status) => {
                let of = |key: &str| strings(&status[key]).map(|said| format!("{}: {said}", node.name));
                wrong.extend(of("red"));
                wrong.extend(pods(&node.name, status, now));
                notes.extend(of("notes"));
            }
        }
    }
    notes.extend(control.into_iter().flat_map(ControlPlane::notes));
    let control_is_red = control.is_some_and(|control| !control.red().is_empty());
    section(&mut lines, &style.red("what is wrong"), wrong);
    section(&mut lines, &style.yellow("worth knowing"), notes);
    section(&mut lines, &style.bold("failed and refused connections of the last 5 minutes"), failures(nodes));
    let green = nodes.iter().filter(|node| is_green(node)).count();
    lines.push(String::new());
    lines.push(match (green == nodes.len(), control_is_red) {
        (true, false) => style.green(&format!("green: {}", count(green, "node"))),
        (true, true) => style.red("red: the control plane"),
        (false, _) => style.red(&format!("red: {} of {}", nodes.len() - green, count(nodes.len(), "node"))),
    });
    lines.join("\n")
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Adds lines below a heading, if there are any.
fn section(lines: &mut Vec<String>, heading: &str, below: Vec<String>) {
    if below.is_empty() {
        return;
    }
    lines.extend([String::new(), heading.to_owned()]);
    let more = below.len().saturating_sub(LINES);
    lines.extend(below.into_iter().take(LINES).map(|line| format!("  {line}")));
    if more > 0 {
        lines.push(format!("  and {more} more, which --json lists"));
    }
}

/// A row for each node: those with something wrong first to be seen, and not too many of the others.
fn table(nodes: &[Node], style: Style) -> Vec<String> {
    let head = ["NODE", "VERSION", "READY", "CAPTURED", "FACTS", "NEXT CERTIFICATE ENDS", "CONNECTIONS", "FAILED 5m"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut colours = vec![None];
    let (mut left, mut hidden) = (GREEN_ROWS, 0);
    for node in nodes {
        if is_green(node) && left == 0 {
            hidden += 1;
            continue;
        }
        left -= usize::from(is_green(node));
        rows.push(row(node));
        colours.push(Some(is_green(node)));
    }
    let mut lines: Vec<String> = columns(&rows)
        .into_iter()
        .zip(colours)
        .map(|(line, is_green)| match is_green {
            Some(false) => style.red(&line),
            Some(true) => line,
            None => style.bold(&line),
        })
        .collect();
    if hidden > 0 {
        lines.push(format!("and {} that are green", count(hidden, "node")));
    }
    lines
}

fn row(node: &Node) -> Vec<String> {
    let status = match &node.page {
        Ok(status) => status,
        Err(_) => return vec![node.name.clone(), "?".into(), "no answer".into()],
    };
    let pods = &status["pods"];
    let age = at(status, "/facts/ageSeconds").as_u64();
    let facts = match (at(status, "/facts/current").as_bool(), age) {
        (Some(true), _) => "current".to_owned(),
        (_, Some(age)) => format!("{} old", seconds(age)),
        (_, None) => "none".to_owned(),
    };
    let next = at(status, "/certificates/next");
    let next = next["secondsLeft"].as_u64().map_or("-".to_owned(), |left| format!("in {}", seconds(left)));
    vec![
        node.name.clone(),
        text(status, "version"),
        if status["ready"] == true { "yes" } else { "NO" }.to_owned(),
        format!("{}/{}", pods["captured"], pods["total"]),
        facts,
        next,
        at(status, "/connections/open").to_string(),
        at(status, "/failures/total").to_string(),
    ]
}

/// The pods that are not captured, and why.
fn pods(node: &str, status: &Value, now: SystemTime) -> Vec<String> {
    let one = |pod: &Value| {
        let since = ago(&pod["since"], now).map(|since| format!(" for {since}")).unwrap_or_default();
        let reason = text(pod, "reason");
        let reason = if reason.is_empty() { "no reason is known".to_owned() } else { reason };
        format!("{node}: {} is {}{since}: {reason}", text(pod, "pod"), text(pod, "state"))
    };
    at(status, "/pods/notCaptured").as_array().into_iter().flatten().map(one).collect()
}

/// Failures of all nodes by reason, the most frequent first, with what to do.
fn failures(nodes: &[Node]) -> Vec<String> {
    let mut by_reason: BTreeMap<(String, String), (u64, String, Vec<&str>)> = BTreeMap::new();
    for node in nodes {
        let Ok(status) = &node.page else { continue };
        for one in at(status, "/failures/byReason").as_array().into_iter().flatten() {
            let key = (text(one, "reason"), text(one, "direction"));
            let entry = by_reason.entry(key).or_insert_with(|| (0, text(one, "nextStep"), Vec::new()));
            entry.0 += one["count"].as_u64().unwrap_or(0);
            entry.2.push(&node.name);
        }
    }
    let mut all: Vec<_> = by_reason.into_iter().collect();
    all.sort_by_key(|(_, (count, _, _))| std::cmp::Reverse(*count));
    let one = |((reason, direction), (count, next, on)): ((String, String), (u64, String, Vec<&str>))| {
        let names = on.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let more = if on.len() > 3 { format!(" and {} more", on.len() - 3) } else { String::new() };
        format!("{count} {direction} {reason} on {names}{more}: {next}")
    };
    all.into_iter().map(one).collect()
}

/// The texts of a list.
fn strings(list: &Value) -> impl Iterator<Item = String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(printable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn green(name: &str) -> Node {
        let status = json!({"green": true, "ready": true, "version": "1", "red": [], "notes": [],
            "pods": {"captured": 2, "total": 2, "notCaptured": []}, "facts": {"current": true, "ageSeconds": 0},
            "certificates": {"next": {"secondsLeft": 7261}}, "connections": {"open": 5},
            "failures": {"total": 0, "byReason": []}});
        Node { name: name.into(), pod: None, note: None, page: Ok(status) }
    }

    fn red(name: &str) -> Node {
        let mut node = green(name);
        if let Ok(status) = &mut node.page {
            status["green"] = json!(false);
            status["red"] = json!(["1 of 2 pods are not captured"]);
            status["pods"]["captured"] = json!(1);
            status["pods"]["notCaptured"] = json!([{"pod": "shop/web", "state": "failed", "reason": "no \u{1b}[1mway", "since": "2026-01-01T00:00:00Z"}]);
            status["failures"] = json!({"total": 3, "byReason": [{"reason": "denied", "direction": "inbound", "count": 3,
                "nextStep": "A DENY policy matched"}]});
        }
        node
    }

    #[test]
    fn the_screen_names_what_is_wrong_and_a_node_that_does_not_answer() {
        let gone = Node { name: "n3".into(), pod: None, note: None, page: Err("no answer within 5s".into()) };
        let now = humantime::parse_rfc3339("2026-01-01T00:01:30Z").unwrap();
        let expected = "\
NODE  VERSION  READY      CAPTURED  FACTS    NEXT CERTIFICATE ENDS  CONNECTIONS  FAILED 5m
n1    1        yes        2/2       current  in 2h 1m               5            0
n2    1        yes        1/2       current  in 2h 1m               5            3
n3    ?        no answer

what is wrong
  n2: 1 of 2 pods are not captured
  n2: shop/web is failed for 1m 30s: no ?[1mway
  n3: no answer: no answer within 5s

failed and refused connections of the last 5 minutes
  3 inbound denied on n2: A DENY policy matched

red: 2 of 3 nodes";
        assert_eq!(screen(&[green("n1"), red("n2"), gone], None, Style { colours: false }, now), expected);
        let coloured = screen(&[green("n1"), red("n2")], None, Style { colours: true }, now);
        assert!(coloured.contains("\u{1b}[31mn2") && !coloured.contains("\u{1b}[1mway"));
    }

    #[test]
    fn the_control_plane_is_below_the_nodes_and_red_without_a_replica() {
        let plain = Style { colours: false };
        let (well, away) = (control_plane::tests::with(&[true, true]), control_plane::tests::with(&[false]));
        let shown = screen(&[green("n1")], Some(&well), plain, SystemTime::now());
        assert!(
            shown.contains("\n\ncontrol plane istio-system/culvert-control: 2 of 2 replicas are ready\n"),
            "{shown}"
        );
        assert!(
            shown.contains("worth knowing\n  AuthorizationPolicy shop/p") && shown.ends_with("green: 1 node"),
            "{shown}"
        );
        let shown = screen(&[green("n1")], Some(&away), plain, SystemTime::now());
        assert!(shown.contains("what is wrong\n  istio-system/culvert-control: 0 of 1"), "{shown}");
        assert!(shown.ends_with("red: the control plane"), "{shown}");
        assert!(screen(&[red("n1")], Some(&away), plain, SystemTime::now()).ends_with("red: 1 of 1 node"));
        let json: Value = serde_json::from_str(&as_json(&[green("n1")], Some(&away))).unwrap();
        assert_eq!((&json["green"], &json["controlPlane"]["replicas"][0]["ready"]), (&json!(false), &json!(false)));
        let json: Value = serde_json::from_str(&as_json(&[green("n1")], None)).unwrap();
        assert_eq!((&json["green"], json.get("controlPlane")), (&json!(true), None));
    }

    #[test]
    fn many_green_nodes_are_counted_and_red_ones_are_all_shown() {
        let mut nodes: Vec<Node> = (0..100).map(|number| green(&format!("n{number}"))).collect();
        nodes.push(red("last"));
        let shown = screen(&nodes, None, Style { colours: false }, SystemTime::now());
        assert!(shown.contains("and 76 nodes that are green") && shown.contains("\nlast "), "{shown}");
        assert!(shown.lines().count() < 45);
    }
}
