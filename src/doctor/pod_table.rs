//! `culvert pods`: the pods of this node as the daemon lists them, as a table or as JSON.

use crate::admin::page::notes::notes;
use crate::telemetry::printable::printable;
use serde_json::Value;
use std::time::{Duration, SystemTime};

const HEAD: [&str; 4] = ["POD", "STATE", "SINCE", "NOTE"];

/// The list in a daemon's answer. With `json` it is returned unchanged, otherwise as a table.
pub fn shown(status: u16, body: String, json: bool) -> Result<String, String> {
    match status {
        200 if json => Ok(body),
        200 => {
            let pods: Value = serde_json::from_str(&body).map_err(|error| format!("/pods: {error}"))?;
            Ok(table(pods.as_array().map(Vec::as_slice).unwrap_or_default(), SystemTime::now()))
        }
        status => Err(format!("/pods: {status}: {}", body.trim())),
    }
}

fn table(pods: &[Value], now: SystemTime) -> String {
    if pods.is_empty() {
        return "no pod of this node is enrolled".to_owned();
    }
    let mut rows = vec![HEAD.map(str::to_owned)];
    let mut all: Vec<[String; 4]> = pods.iter().map(|pod| row(pod, now)).collect();
    all.sort();
    rows.extend(all);
    let widths = [0, 1, 2]
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0));
    let line = |[pod, state, since, note]: &[String; 4]| {
        let [first, second, third] = widths;
        format!("{pod:<first$}  {state:<second$}  {since:<third$}  {note}").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// How long a pod has been in its state, if that is known.
pub(super) fn since(pod: &Value, now: SystemTime) -> Option<Duration> {
    let since = humantime::parse_rfc3339(pod["since"].as_str()?).ok()?;
    now.duration_since(since).ok()
}

fn row(pod: &Value, now: SystemTime) -> [String; 4] {
    let text = |key: &str| pod[key].as_str().unwrap_or_default();
    let since = since(pod, now).map(|since| crate::telemetry::log::brief(since).to_string()).unwrap_or_default();
    let cells =
        [format!("{}/{}", text("namespace"), text("name")), text("state").to_owned(), since, notes(pod).join("; ")];
    // A pod chooses the names of its own rules.
    cells.map(|cell| printable(&cell))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_of_no_pod_and_of_several_pods() {
        let now = humantime::parse_rfc3339("2026-01-01T00:02:00Z").unwrap();
        assert_eq!(table(&[], now), "no pod of this node is enrolled");
        let pods = [
            json!({"namespace": "shop", "name": "web-0", "state": "captured", "since": "2026-01-01T00:00:30Z", "reason": null,
                "uncapturedConnections": 2, "mayBypass": ["NET_RAW"], "untunnelledUdp": 7, "untunnelledOther": 0}),
            json!({"namespace": "a", "name": "b", "state": "failed", "since": "?", "reason": "no \u{1b}[31mway"}),
        ];
        let expected = "POD         STATE     SINCE   NOTE\n\
                        a/b         failed            no ?[31mway\n\
                        shop/web-0  captured  1m 30s  2 pre-existing connections continue in plaintext; can bypass its capture, by: NET_RAW; 7 UDP datagrams have left it outside of tunnels";
        assert_eq!(table(&pods, now), expected);
    }
}
