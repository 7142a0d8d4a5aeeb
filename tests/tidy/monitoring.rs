//! Checks the dashboard and the alerting rules: the metrics and labels that their queries name are in `docs/metrics.md`,
//! and the runbooks that alerts link to are headings of `docs/operate.md`.

use crate::documents::{anchors, root};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Metrics of others: of Prometheus itself, and of kube-state-metrics.
const OTHERS: [&str; 4] = [
    "up",
    "kube_daemonset_status_desired_number_scheduled",
    "kube_daemonset_status_number_ready",
    "kube_deployment_status_replicas_available",
];

/// Labels that come with the target of a scrape.
const OF_TARGETS: [&str; 2] = ["instance", "job"];

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The labels of every metric of `docs/metrics.md`. A histogram has its sample's names too.
fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let text = read("docs/metrics.md");
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<_>>();
    let shared = text.lines().find_map(|line| line.strip_prefix("The traffic labels are ")).map(names).unwrap();
    let mut all = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        let name = names(cells[0]).pop_first().unwrap();
        let labels = if cells[2].contains("below") { shared.clone() } else { names(cells[2]) };
        let suffixes: &[&str] = if cells[1] == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        for suffix in suffixes {
            let bound = (*suffix == "_bucket").then(|| "le".to_owned());
            all.insert(format!("{name}{suffix}"), labels.iter().cloned().chain(bound).collect());
        }
    }
    assert!(all.len() > 50, "the metrics were found");
    all
}

/// A word or a sign of a query. Strings and durations are left out.
fn tokens(query: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut rest = query;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '"' | '\'' => rest[1..].find(first).map_or(rest.len(), |end| end + 2),
            '[' => rest.find(']').map_or(rest.len(), |end| end + 1),
            c if c.is_alphanumeric() || c == '_' => {
                rest.find(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | ':')).unwrap_or(rest.len())
            }
            c => c.len_utf8(),
        };
        if !matches!(first, '"' | '\'' | '[') && !first.is_whitespace() {
            all.push(rest[..length].to_owned());
        }
        rest = &rest[length..];
    }
    all
}

/// The metrics that a query reads, and the labels that it selects of each.
fn selected(query: &str) -> Vec<(String, Vec<String>)> {
    let tokens = tokens(query);
    let at = |n: usize| tokens.get(n).map_or("", String::as_str);
    let mut all = Vec::new();
    let mut n = 0;
    while n < tokens.len() {
        let word = at(n).to_owned();
        let is_word = word.starts_with(|c: char| c.is_alphabetic() || c == '_');
        if matches!(&*word, "by" | "without" | "on" | "ignoring" | "group_left" | "group_right") && at(n + 1) == "(" {
            n += tokens[n..].iter().position(|token| token == ")").unwrap();
        } else if matches!(&*word, "or" | "and" | "unless" | "offset" | "bool") {
            // The duration after `offset` begins with a digit.
        } else if is_word && !matches!(at(n + 1), "(" | "by" | "without") && !matches!(&*word, "by" | "without") {
            let mut labels = Vec::new();
            if at(n + 1) == "{" {
                let end = n + tokens[n..].iter().position(|token| token == "}").unwrap();
                let words = tokens[n + 2..end].iter().filter(|token| token.starts_with(char::is_alphabetic));
                labels.extend(words.cloned());
                n = end;
            }
            all.push((word, labels));
        }
        n += 1;
    }
    all
}

/// What is wrong with a query.
fn wrong(query: &str, metrics: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut all = Vec::new();
    let read = selected(query);
    for (name, labels) in &read {
        if OTHERS.contains(&name.as_str()) {
            continue;
        }
        let Some(known) = metrics.get(name) else {
            all.push(format!("docs/metrics.md has no {name}: {query}"));
            continue;
        };
        let unknown = labels.iter().filter(|label| !known.contains(*label) && !OF_TARGETS.contains(&label.as_str()));
        all.extend(unknown.map(|label| format!("{name} has no label {label}: {query}")));
    }
    // Aggregations name labels that some metric of the query has.
    let kept = tokens(query);
    for (n, _) in kept.iter().enumerate().filter(|(_, token)| *token == "by") {
        for label in kept[n..].iter().skip(2).take_while(|token| *token != ")").filter(|token| *token != ",") {
            let known = read.iter().any(|(name, _)| metrics.get(name).is_some_and(|labels| labels.contains(label)));
            if !known && !OF_TARGETS.contains(&label.as_str()) {
                all.push(format!("no metric has the label {label}: {query}"));
            }
        }
    }
    if read.is_empty() {
        all.push(format!("it reads no metric: {query}"));
    }
    all
}

#[test]
fn queries_are_read_as_prometheus_reads_them() {
    let names = |query: &str| selected(query).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names("a > 0"), ["a"]);
    assert_eq!(
        names(r#"sum by (x, y) (rate(a_total{l=~"b|c",m!=""}[5m])) / on (x) group_left () b"#),
        ["a_total", "b"]
    );
    assert_eq!(names("a offset 15m unless max(b) by (c) or vector(0)"), ["a", "b"]);
    assert_eq!(selected(r#"a{b="c d",e!~"f"}"#), [("a".to_owned(), vec!["b".to_owned(), "e".to_owned()])]);
    let metrics = metrics();
    for bad in ["none", "culvert_pods{none=\"\"}", "sum by (none) (culvert_pods)", "vector(1)"] {
        assert!(!wrong(bad, &metrics).is_empty(), "{bad} is seen");
    }
}

#[test]
fn dashboard_and_alerts_read_metrics_that_exist() {
    let rules: Value = serde_saphyr::from_str(&read("daemonset/chart/monitoring/alerts.yaml")).unwrap();
    let dashboard: Value = serde_json::from_str(&read("daemonset/chart/monitoring/dashboard.json")).unwrap();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let of_rules = list(&rules["groups"]).into_iter().flat_map(|group| list(&group["rules"]));
    let of_panels = list(&dashboard["panels"]).into_iter().flat_map(|panel| list(&panel["targets"]));
    let queries: Vec<String> =
        of_rules.chain(of_panels).map(|holder| holder["expr"].as_str().unwrap().to_owned()).collect();
    assert!(queries.len() > 50, "the queries were found: {}", queries.len());
    let metrics = metrics();
    let wrong: Vec<String> = queries.iter().flat_map(|query| wrong(query, &metrics)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn runbooks_of_alerts_exist() {
    let rules: Value = serde_saphyr::from_str(&read("daemonset/chart/monitoring/alerts.yaml")).unwrap();
    let known = anchors(&read("docs/operate.md"));
    let mut alerts = BTreeSet::new();
    for rule in rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        let name = rule["alert"].as_str().unwrap();
        let anchor = name.to_lowercase();
        assert!(known.contains(&anchor), "docs/operate.md has no section {name}");
        let link = rule["annotations"]["runbook_url"].as_str().unwrap();
        assert_eq!(link.rsplit('#').next(), Some(anchor.as_str()), "{name}");
        alerts.insert(anchor);
    }
    let sections = known.iter().filter(|anchor| anchor.starts_with("culvert") && !anchor.contains('-'));
    let stale: Vec<_> = sections.filter(|anchor| !alerts.contains(*anchor)).collect();
    assert!(stale.is_empty(), "runbooks of no alert: {stale:?}");
}
