//! `culvert explain`: what would happen to a connection now, or what policies would change, as text or as JSON.

use crate::telemetry::printable::printable_lines;
use serde_json::Value;

/// The query string of a question about a connection `from` a pod `to` an address.
pub(crate) fn query(from: &str, to: &str) -> String {
    form_urlencoded::Serializer::new(String::new()).append_pair("from", from).append_pair("to", to).finish()
}

/// The page that answers it.
pub fn path(from: &str, to: &str) -> String {
    format!("/explain?{}", query(from, to))
}

/// The steps in a daemon's answer. With `json` the answer is returned unchanged.
pub fn steps_of(status: u16, body: String, json: bool) -> Result<String, String> {
    shown(status, body, json, text)
}

/// What policies would change, by a daemon's answer.
pub fn changes_of(status: u16, body: String, json: bool) -> Result<String, String> {
    shown(status, body, json, changes)
}

/// The daemon's answer, unchanged with `json`, otherwise as `text` makes it.
fn shown(status: u16, body: String, json: bool, text: fn(&Value) -> String) -> Result<String, String> {
    match status {
        200 if json => Ok(body.trim_end().to_owned()),
        200 => {
            let answer: Value = serde_json::from_str(&body).map_err(|error| format!("/explain: {error}"))?;
            Ok(text(&answer))
        }
        400 => Err(body.trim().to_owned()),
        404 => Err("the daemon is of a version that cannot explain".to_owned()),
        status => Err(format!("/explain: {status}: {}", body.trim())),
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
    printable_lines(&lines.join("\n"))
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
    printable_lines(&lines.join("\n"))
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
