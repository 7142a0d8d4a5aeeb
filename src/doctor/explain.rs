//! `culvert explain`: what would happen to a connection now, or what policies would change, as text or as JSON.

use super::daemon::{get, not_asked, request};
use serde_json::Value;
use std::path::Path;

/// Asks the daemon's admin port about a connection `from` a pod `to` an address. With `json` the answer is returned
/// unchanged.
pub fn connection(port: u16, (from, to): (&str, &str), json: bool) -> Result<String, String> {
    shown(port, get(port, &format!("/explain?{}", query(from, to))), json, text)
}

/// The query string of a question.
pub(crate) fn query(from: &str, to: &str) -> String {
    form_urlencoded::Serializer::new(String::new()).append_pair("from", from).append_pair("to", to).finish()
}

/// Asks what the policies in a file would change.
pub fn policies(port: u16, file: &Path, json: bool) -> Result<String, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    shown(port, request(port, "POST", "/explain/policies", &text), json, changes)
}

/// The daemon's answer, unchanged with `json`, otherwise as `text` makes it.
fn shown(
    port: u16,
    asked: Result<(u16, String), String>,
    json: bool,
    text: fn(&Value) -> String,
) -> Result<String, String> {
    let asked = asked.map_err(|error| not_asked(port, &error))?;
    match asked {
        (200, body) if json => Ok(body),
        (200, body) => {
            let answer: Value = serde_json::from_str(&body).map_err(|error| format!("/explain: {error}"))?;
            Ok(text(&answer))
        }
        (400, why) => Err(why.trim().to_owned()),
        (404, _) => Err("the daemon is of a version that cannot explain".to_owned()),
        (status, body) => Err(format!("/explain: {status}: {}", body.trim())),
    }
}

fn text(answer: &Value) -> String {
    let said = |key: &str| answer[key].as_str().unwrap_or_default();
    let mut lines = vec![format!("from  {}", said("from")), format!("to    {}", said("to")), String::new()];
    for (number, step) in answer["steps"].as_array().into_iter().flatten().enumerate() {
        let (about, text) = (step["about"].as_str().unwrap_or_default(), step["text"].as_str().unwrap_or_default());
        lines.push(format!("{}. {about}: {text}", number + 1));
        for detail in step["details"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            lines.push(format!("     {detail}"));
        }
    }
    lines.push(String::new());
    lines.push(format!("=> {}", said("result")));
    printable(&lines.join("\n"))
}

/// What policies would change: a line for each connection.
fn changes(answer: &Value) -> String {
    let mut lines = vec![format!(
        "of {} open connections {} would be cut; of the last {} that have ended {} would have been refused and {} allowed",
        answer["open"],
        answer["wouldBeCut"],
        answer["recent"],
        answer["wouldHaveBeenRefused"],
        answer["wouldHaveBeenAllowed"]
    )];
    lines.extend(
        answer["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).map(|note| format!("note: {note}")),
    );
    for change in answer["changes"].as_array().into_iter().flatten() {
        let said = |key: &str| change[key].as_str().unwrap_or_default();
        let from = if said("identity").is_empty() { "no identity" } else { said("identity") };
        lines.push(format!(
            "{:8} {} ({from}) to {} at {}: {}",
            said("connection"),
            said("source"),
            said("workload"),
            said("destination"),
            said("then")
        ));
    }
    printable(&lines.join("\n"))
}

fn printable(text: &str) -> String {
    // Names in the mesh facts are what others have written.
    let shown = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn steps_are_numbered_and_details_are_below_them() {
        let answer = json!({"from": "a/client", "to": "10.96.0.1:80", "result": "allowed", "steps": [
            {"about": "address", "text": "a service", "details": []},
            {"about": "endpoints", "text": "1 of 2", "details": ["x: \u{1b}chosen", "y: unhealthy"]},
        ]});
        let expected = "from  a/client\nto    10.96.0.1:80\n\n1. address: a service\n2. endpoints: 1 of 2\n     x: ?chosen\n     \
                        y: unhealthy\n\n=> allowed";
        assert_eq!(text(&answer), expected);
    }
}
