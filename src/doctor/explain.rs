//! `culvert explain`: what would happen to a connection now, as text or as JSON.

use super::daemon::get;
use serde_json::Value;

/// Asks the daemon's admin port about a connection `from` a pod `to` an address. With `json` the answer is returned
/// unchanged.
pub fn run(port: u16, (from, to): (&str, &str), json: bool) -> Result<String, String> {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("from", from).append_pair("to", to);
    let asked = get(port, &format!("/explain?{}", query.finish())).map_err(|error| {
        format!(
            "the daemon does not answer on port {port}: {error}; run this command in its container or network namespace"
        )
    })?;
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
    // Names in the mesh facts are what others have written.
    let shown = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    lines.join("\n").chars().map(shown).collect()
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
