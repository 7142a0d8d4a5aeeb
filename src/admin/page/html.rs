//! The live page as HTML with all its tables, so that it says the same in a browser without JavaScript and in a text
//! browser.

use super::parts::Rows;
use super::picture::Picture;
use crate::telemetry::units::bytes;
use serde_json::Value;
use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

/// Rows of the connections table on one page without JavaScript.
const PAGE_ROWS: usize = 200;

const TEMPLATE: &str = include_str!("page.html");

/// What the reader asked for in the query string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Words that a connection's row must contain.
    pub words: String,
    /// The first row to show.
    pub first: usize,
}

impl Asked {
    /// Reads `q` and `first`; others are ignored.
    pub fn of(query: &[(String, String)]) -> Self {
        let value = |name: &str| query.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
        let words = value("q").unwrap_or_default().chars().take(200).collect();
        Self { words, first: value("first").and_then(|first| first.parse().ok()).unwrap_or(0) }
    }
}

/// The whole page. `style` and `script` go in as they are.
pub fn page(
    picture: &Picture,
    asked: &Asked,
    (title, links): (&str, &[&str]),
    (style, script): (&str, &str),
) -> String {
    let empty = Rows::new();
    let rows = |section: &str| picture.rows(section).unwrap_or(&empty);
    let (connections, pager) = connections(picture, asked);
    let fill = |name: &str| match name {
        "style" => style.to_owned(),
        "script" => script.to_owned(),
        "title" => escaped(title),
        "at" => time(picture.at),
        "links" => links.iter().map(|path| format!("<a href=\"{path}\">{path}</a>\n")).collect(),
        "words" => escaped(&asked.words),
        "summary" => summary(picture),
        "attention" => attention(rows("nodes"), rows("pods")),
        "nodes" => table_rows(rows("nodes"), node),
        "flows" => table_rows(rows("flows"), |_, row| flow(row)),
        "connections" => connections.clone(),
        "pager" => pager.clone(),
        "refusals" => refusals(rows("history")),
        "changes" => changes(rows("history")),
        "pods" => table_rows(rows("pods"), |_, row| pod(row, picture.at)),
        "certificates" => table_rows(rows("certificates"), |_, row| certificate(row, picture.at)),
        "podnames" => pod_names(rows("pods")),
        _ => String::new(),
    };
    let mut page = String::with_capacity(256 * 1024);
    for (number, part) in TEMPLATE.split("{{").enumerate() {
        match part.split_once("}}").filter(|_| number > 0) {
            Some((name, rest)) => {
                page.push_str(&fill(name));
                page.push_str(rest);
            }
            None => page.push_str(part),
        }
    }
    page
}

/// A text for HTML, in elements and in quoted attributes.
pub fn escaped(text: &str) -> String {
    let mut all = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => all.push_str("&amp;"),
            '<' => all.push_str("&lt;"),
            '>' => all.push_str("&gt;"),
            '"' => all.push_str("&quot;"),
            '\'' => all.push_str("&#39;"),
            c => all.push(c),
        }
    }
    all
}

fn said<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

fn number(row: &Value, key: &str) -> u64 {
    row[key].as_u64().unwrap_or(0)
}

fn time(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

/// A duration for people: its two largest units, as `feed.js` writes it too.
pub fn span(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let at = units.iter().position(|(length, _)| seconds >= *length).unwrap_or(units.len() - 1);
    let mut left = seconds;
    let mut words = Vec::new();
    for (length, unit) in units.iter().skip(at).take(2) {
        words.push(format!("{}{unit}", left / length));
        left %= length;
    }
    words.join(" ")
}

fn ago(since: u64, now: u64) -> String {
    span(now.saturating_sub(since))
}

/// One table row of cells, each with a class (which may be empty). The first is the row's heading.
fn cells(all: &[(&str, String)]) -> String {
    let mut row = String::from("<tr>");
    for (number, (class, text)) in all.iter().enumerate() {
        let tag = if number == 0 { "th scope=\"row\"" } else { "td" };
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let end = if number == 0 { "th" } else { "td" };
        let _ = write!(row, "<{tag}{class}>{}</{end}>", escaped(text));
    }
    row + "</tr>\n"
}

fn table_rows(rows: &Rows, one: impl Fn(&str, &Value) -> String) -> String {
    rows.iter().map(|(key, row)| one(key, row)).collect()
}

/// The words of a way, with a sign in front that differs in shape.
fn way(kind: &str) -> String {
    match kind {
        "encrypted" => "● encrypted".to_owned(),
        "plaintext" => "△ plaintext".to_owned(),
        _ => "✕ refused".to_owned(),
    }
}

fn kind(row: &Value) -> &'static str {
    if row["encrypted"] == true { "encrypted" } else { "plaintext" }
}

fn node(name: &str, row: &Value) -> String {
    let state = match (row["reachable"] == true, row["ready"] == true) {
        (false, _) => "✕ not reachable",
        (true, false) => "△ not ready",
        (true, true) => "● ready",
    };
    let class = if state.starts_with('●') { "good" } else { "bad" };
    let facts = match (row["current"].as_bool(), row["age"].as_u64()) {
        (Some(true), _) => "current".to_owned(),
        (_, Some(age)) => format!("{} old", span(age)),
        _ => "unknown".to_owned(),
    };
    let source = [said(row, "source"), said(row, "from")].join(" ");
    let open = row["open"].as_u64().map(|open| open.to_string()).unwrap_or_default();
    let remarks = [said(row, "error").to_owned(), texts(row, "red"), texts(row, "notes")];
    let remarks: Vec<String> = remarks.into_iter().filter(|text| !text.is_empty()).collect();
    cells(&[
        ("", name.to_owned()),
        (class, state.to_owned()),
        ("", said(row, "version").to_owned()),
        ("", facts),
        ("", source.trim().to_owned()),
        ("num", open),
        ("", remarks.join("; ")),
    ])
}

fn texts(row: &Value, key: &str) -> String {
    row[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("; ")
}

fn party(end: &Value) -> String {
    match (end[0].as_str().unwrap_or_default(), end[1].as_str().unwrap_or_default()) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}

fn flow(row: &Value) -> String {
    cells(&[
        ("", party(&row["from"])),
        ("", party(&row["to"])),
        (said(row, "kind"), way(said(row, "kind"))),
        ("num", number(row, "connections").to_string()),
        ("num", bytes(number(row, "sent"))),
        ("num", bytes(number(row, "received"))),
        ("", texts(row, "reasons")),
    ])
}

/// Whether a row contains all words.
fn matches(key: &str, row: &Value, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let mut all = key.to_lowercase();
    for value in row.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_str()) {
        all.push(' ');
        all.push_str(&value.to_lowercase());
    }
    all.push(' ');
    all.push_str(kind(row));
    words.iter().all(|word| all.contains(word))
}

/// The rows of the connections table, and what stands below it.
fn connections(picture: &Picture, asked: &Asked) -> (String, String) {
    let empty = Rows::new();
    let (rows, traffic) = (picture.rows("connections").unwrap_or(&empty), picture.rows("traffic").unwrap_or(&empty));
    let words: Vec<String> = asked.words.split_whitespace().map(str::to_lowercase).collect();
    let found: Vec<_> = rows.iter().filter(|(key, row)| matches(key, row, &words)).collect();
    let first = if asked.first < found.len() { asked.first } else { 0 };
    let mut text = String::new();
    for (key, row) in found.iter().skip(first).take(PAGE_ROWS) {
        let moved = traffic.get(*key).cloned().unwrap_or_default();
        let count = |at: usize| bytes(moved.get(at).and_then(Value::as_u64).unwrap_or(0));
        text.push_str(&cells(&[
            ("", said(row, "from").to_owned()),
            ("", said(row, "to").to_owned()),
            (kind(row), way(kind(row))),
            ("num", count(0)),
            ("num", count(1)),
            ("num", ago(number(row, "start"), picture.at)),
            ("", said(row, "destination").to_owned()),
            ("", said(row, "tls").to_owned()),
            ("", said(row, "rule").to_owned()),
            ("", format!("{} {}", said(row, "node"), said(row, "direction"))),
        ]));
    }
    let last = (first + PAGE_ROWS).min(found.len());
    let (total, words) = (found.len(), query(&asked.words));
    let shown = if total == 0 { 0 } else { first + 1 };
    let mut pager = format!("Rows {shown} to {last} of {total}.");
    if first > 0 {
        let before = first.saturating_sub(PAGE_ROWS);
        let _ = write!(pager, " <a href=\"/?q={words}&amp;first={before}#connections\">earlier rows</a>");
    }
    if last < total {
        let _ = write!(pager, " <a href=\"/?q={words}&amp;first={last}#connections\">later rows</a>");
    }
    (text, pager)
}

fn query(words: &str) -> String {
    escaped(&form_urlencoded::byte_serialize(words.as_bytes()).collect::<String>())
}

/// What has ended badly, the newest first.
fn refusals(rows: &Rows) -> String {
    let one = |row: &Value| {
        let why = if said(row, "rule").is_empty() { said(row, "error") } else { said(row, "rule") };
        cells(&[
            ("", said(row, "time").to_owned()),
            ("", said(row, "from").to_owned()),
            ("", said(row, "to").to_owned()),
            ("refused", format!("✕ {}", said(row, "reason"))),
            ("wrap", why.to_owned()),
            ("wrap", said(row, "next").to_owned()),
            ("", format!("{} {}", said(row, "node"), said(row, "direction"))),
        ])
    };
    let badly = rows.values().rev().filter(|row| row["kind"] == "connection" && row["outcome"] != "ok");
    badly.take(PAGE_ROWS).map(one).collect()
}

/// What has changed, the newest first.
fn changes(rows: &Rows) -> String {
    let one = |row: &Value| {
        let all = ["time", "what", "subject", "text", "node"].map(|key| ("", said(row, key).to_owned()));
        cells(&all)
    };
    rows.values().rev().filter(|row| row["kind"] == "change").take(PAGE_ROWS).map(one).collect()
}

fn pod(row: &Value, now: u64) -> String {
    let state = said(row, "state");
    let (sign, class) = match state {
        "captured" => ("●", "good"),
        "pending" => ("△", "warn"),
        "releasing" => ("○", ""),
        _ => ("✕", "bad"),
    };
    let since = row["since"].as_u64().map(|since| ago(since, now)).unwrap_or_default();
    cells(&[
        ("", said(row, "pod").to_owned()),
        (class, format!("{sign} {state}")),
        ("num", since),
        ("", said(row, "node").to_owned()),
        ("", texts(row, "notes")),
    ])
}

fn certificate(row: &Value, now: u64) -> String {
    let left = match row["until"].as_u64() {
        Some(until) if until > now => span(until - now),
        Some(_) => "ended".to_owned(),
        None => "none".to_owned(),
    };
    let class = if said(row, "state") == "Available" { "good" } else { "bad" };
    cells(&[
        ("", said(row, "identity").to_owned()),
        (class, said(row, "state").to_owned()),
        ("num", left),
        ("", row["until"].as_u64().map(time).unwrap_or_default()),
        ("", said(row, "node").to_owned()),
        ("wrap", said(row, "error").to_owned()),
    ])
}

fn pod_names(pods: &Rows) -> String {
    let names: std::collections::BTreeSet<&str> = pods.values().map(|row| said(row, "pod")).collect();
    names.into_iter().map(|name| format!("<option value=\"{}\">\n", escaped(name))).collect()
}

/// The figures at the top.
fn summary(picture: &Picture) -> String {
    let empty = Rows::new();
    let rows = |section: &str| picture.rows(section).unwrap_or(&empty);
    let (nodes, pods, connections) = (rows("nodes"), rows("pods"), rows("connections"));
    let up = nodes.values().filter(|row| row["reachable"] == true && row["ready"] == true).count();
    let captured = pods.values().filter(|row| row["state"] == "captured").count();
    let wanted = pods.values().filter(|row| row["state"] != "releasing").count();
    let encrypted = connections.values().filter(|row| row["encrypted"] == true).count();
    let plain = connections.len() - encrypted;
    let refused: u64 = nodes.values().filter_map(|row| row["failures"].as_u64()).sum();
    let next = rows("certificates").values().filter_map(|row| row["until"].as_u64()).min();
    let next = next.map(|until| span(until.saturating_sub(picture.at)));
    let oldest = nodes.values().filter_map(|row| row["age"].as_u64()).max();
    let stale = nodes.values().any(|row| row["current"] == false);
    let facts = match (stale, oldest) {
        (false, _) => "current".to_owned(),
        (true, Some(age)) => format!("{} old", span(age)),
        (true, None) => "not current".to_owned(),
    };
    let count = |part: usize, all: usize| format!("{part} of {all}");
    let left_out = picture.left_out("connections");
    let open = if left_out > 0 {
        format!("{} (+{left_out} not listed)", connections.len())
    } else {
        connections.len().to_string()
    };
    let figures = [
        ("nodes", "Nodes ready", count(up, nodes.len()), up == nodes.len()),
        ("pods", "Pods captured", count(captured, wanted), captured == wanted),
        ("connections", "Open connections", open, true),
        ("flows", "In plaintext", plain.to_string(), plain == 0),
        ("refusals", "Failed, last 5 min", refused.to_string(), refused == 0),
        ("certificates", "Next certificate ends in", next.unwrap_or_else(|| "–".to_owned()), true),
        ("nodes", "Mesh facts", facts, !stale),
    ];
    let one = |(section, name, figure, good): &(&str, &str, String, bool)| {
        let class = if *good { "" } else { " class=\"warn\"" };
        format!("<div{class}><dt><a href=\"#{section}\">{name}</a></dt><dd>{}</dd></div>\n", escaped(figure))
    };
    figures.iter().map(one).collect()
}

/// What is wrong, one line each.
fn attention(nodes: &Rows, pods: &Rows) -> String {
    let mut lines = Vec::new();
    for (name, row) in nodes {
        if row["reachable"] != true {
            lines.push(format!("node {name} cannot be reached: {}", said(row, "error")));
        }
        let red = row["red"].as_array().into_iter().flatten().filter_map(Value::as_str);
        lines.extend(red.map(|text| format!("node {name}: {text}")));
    }
    for row in pods.values().filter(|row| !matches!(said(row, "state"), "captured" | "releasing")) {
        lines.push(format!("pod {} is {}: {}", said(row, "pod"), said(row, "state"), texts(row, "notes")));
    }
    let more = lines.len().saturating_sub(20);
    let mut shown: String = lines.iter().take(20).map(|line| format!("<li>{}</li>\n", escaped(line))).collect();
    if more > 0 {
        let _ = writeln!(shown, "<li>and {more} more</li>");
    }
    shown
}
