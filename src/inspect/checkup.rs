//! `culvert doctor` for the nodes of a cluster: what each daemon says about itself. What only a look from inside the
//! node can tell, such as the rights of the container, is left to `culvert doctor` there.

use super::control_plane;
use super::nodes::{self, Node};
use super::text::{printable, text};
use super::{Outcome, Style};
use crate::admin::page::notes::notes;
use crate::cluster::{ClusterError, Daemons, Question};
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// Difference of clocks from which on it is worth a note. Certificates are valid by the clocks of all nodes.
const CLOCKS_DIFFER: Duration = Duration::from_secs(30);

/// Asks all daemons. Returns what to print.
pub async fn run(daemons: &Daemons, timeout: Duration, style: Style) -> Result<(String, Outcome), ClusterError> {
    // Found once, so that both answers are of the same daemons.
    let all = daemons.find(timeout).await?;
    let status = nodes::ask_these(daemons, &all, &Question::get("/status", timeout)).await;
    let pods = nodes::ask_these(daemons, &all, &Question::get("/pods", timeout)).await;
    let mut lines = Vec::new();
    let mut is_well = true;
    for (node, pods) in status.iter().zip(&pods) {
        lines.push(style.bold(&node.name));
        let mut found = match &node.page {
            Err(error) => vec![("FAIL", "daemon", format!("no answer: {}", printable(error)))],
            Ok(page) => about(page, pods, SystemTime::now()),
        };
        found.extend(node.note.iter().map(|note| ("note", "daemon", printable(note))));
        for (verdict, check, said) in found {
            is_well &= verdict != "FAIL";
            let line = line(verdict, check, &said);
            lines.push(match verdict {
                "FAIL" => style.red(&line),
                "note" => style.yellow(&line),
                _ => line,
            });
        }
        lines.push(String::new());
    }
    if let Some(control) = control_plane::look(daemons, &status, timeout).await {
        let (red, notes) = (control.red(), control.notes());
        is_well &= red.is_empty();
        lines.push(style.bold("control plane"));
        if red.is_empty() {
            lines.push(line("ok", "replicas", &control.summary()));
        }
        lines.extend(red.iter().map(|said| style.red(&line("FAIL", "replicas", said))));
        lines.extend(notes.iter().map(|said| style.yellow(&line("note", "control", said))));
        lines.push(String::new());
    }
    lines.push(
        "rights, kernel, sysctls and probes are checked on the node: kubectl exec DAEMON -- culvert doctor".to_owned(),
    );
    let outcome = match (nodes::outcome(&status), is_well) {
        (Outcome::Green, false) => Outcome::Red,
        (outcome, _) => outcome,
    };
    Ok((lines.join("\n"), outcome))
}

fn line(verdict: &str, check: &str, said: &str) -> String {
    format!("{verdict:<4}  {check:<12}  {said}")
}

/// The lines about one node: verdict, check, text.
fn about(page: &Value, pods: &Node, now: SystemTime) -> Vec<(&'static str, &'static str, String)> {
    let mut found = Vec::new();
    let list = |key: &str| page[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(printable);
    found.extend(list("red").map(|said| ("FAIL", "status", said)));
    found.extend(list("notes").map(|said| ("note", "status", said)));
    if page["ready"] == true {
        found.push(("ok", "daemon", format!("version {} runs and is ready", text(page, "version"))));
    }
    let captured = &page["pods"];
    if captured["captured"] == captured["total"] {
        found.push(("ok", "pods", format!("{} of {} are captured", captured["captured"], captured["total"])));
    }
    let skew = humantime::parse_rfc3339(page["now"].as_str().unwrap_or_default()).ok().map(|theirs| {
        let differs = theirs.duration_since(now).or_else(|_| now.duration_since(theirs));
        differs.unwrap_or_default()
    });
    match skew {
        Some(skew) if skew > CLOCKS_DIFFER => found.push((
            "note",
            "clock",
            format!("its clock and this one differ by {} s: synchronise the clocks", skew.as_secs()),
        )),
        Some(_) => found.push(("ok", "clock", "its clock agrees with the one here".to_owned())),
        None => {}
    }
    match &pods.page {
        Err(error) => found.push(("FAIL", "pods", format!("/pods: {}", printable(error)))),
        Ok(pods) => {
            for pod in pods.as_array().into_iter().flatten() {
                found.extend(pod_notes(pod).into_iter().map(|said| ("note", "pod", said)));
                if is_not_captured(pod) {
                    let said = format!("{} is {}: {}", name(pod), text(pod, "state"), text(pod, "reason"));
                    found.push(("FAIL", "pod", said));
                }
            }
        }
    }
    found
}

fn name(pod: &Value) -> String {
    format!("{}/{}", text(pod, "namespace"), text(pod, "name"))
}

/// What people should know about a pod. Why it is not captured is said where that is.
fn pod_notes(pod: &Value) -> Vec<String> {
    let reason = pod["reason"].as_str().filter(|_| is_not_captured(pod));
    let others = notes(pod).into_iter().filter(|note| reason != Some(note.as_str()));
    others.map(|note| format!("{}: {}", name(pod), printable(&note))).collect()
}

fn is_not_captured(pod: &Value) -> bool {
    matches!(pod["state"].as_str(), Some("pending" | "failed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::{daemon_pod, with_api};
    use serde_json::json;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn what_a_daemon_says_about_itself_becomes_lines() {
        let now = humantime::parse_rfc3339("2026-01-01T00:10:00Z").unwrap();
        let page = json!({"ready": true, "version": "1", "now": "2026-01-01T00:00:00Z", "red": ["1 of 2 pods are not captured"],
            "notes": [], "pods": {"captured": 1, "total": 2}});
        let pods = json!([{"namespace": "a", "name": "b", "state": "failed", "reason": "no way", "otherRules": ["x"], "mayBypass": []}]);
        let pods = Node { name: "n1".into(), pod: None, note: None, page: Ok(pods) };
        let found = about(&page, &pods, now);
        let lines: Vec<String> =
            found.into_iter().map(|(verdict, check, said)| format!("{verdict} {check} {said}")).collect();
        assert_eq!(
            lines,
            [
                "FAIL status 1 of 2 pods are not captured",
                "ok daemon version 1 runs and is ready",
                "note clock its clock and this one differ by 600 s: synchronise the clocks",
                "note pod a/b: other rules: x",
                "FAIL pod a/b is failed: no way",
            ]
        );
    }

    #[tokio::test]
    async fn the_daemons_are_found_once() {
        let lists = Arc::new(AtomicUsize::new(0));
        let counted = lists.clone();
        let daemons = with_api(move |path| {
            counted.fetch_add(usize::from(path == "/api/v1/pods"), Ordering::Relaxed);
            Some(vec![daemon_pod("ztunnel-1")])
        });
        let (text, outcome) = run(&daemons, Duration::from_secs(5), Style { colours: false }).await.unwrap();
        assert_eq!(outcome, Outcome::Unknown, "{text}");
        assert_eq!(lists.load(Ordering::Relaxed), 1);
    }
}
