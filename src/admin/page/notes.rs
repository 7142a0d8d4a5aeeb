//! What an operator should know about a pod, from its entry in `/pods`.

use serde_json::Value;

/// The notes, the reason of its state first.
pub fn notes(pod: &Value) -> Vec<String> {
    let text = |key: &str| pod[key].as_str().map(str::to_owned);
    let mut notes: Vec<String> = text("reason").into_iter().collect();
    if let Some(older) = pod["uncapturedConnections"].as_u64().filter(|older| *older > 0) {
        notes.push(format!("{older} pre-existing connections continue in plaintext"));
    }
    if pod["bypassInboundCapture"] == true {
        notes.push("inbound plaintext is not captured".into());
    }
    notes.extend(text("inboundUnverified"));
    let list =
        |key: &str| pod[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    for (key, what) in [("otherRules", "other rules"), ("mayBypass", "can bypass its capture, by")] {
        let all = list(key);
        if !all.is_empty() {
            notes.push(format!("{what}: {all}"));
        }
    }
    for (key, what) in [("untunnelledUdp", "UDP datagrams"), ("untunnelledOther", "packets of other protocols")] {
        if let Some(count) = pod[key].as_u64().filter(|count| *count > 0) {
            notes.push(format!("{count} {what} have left it outside of tunnels"));
        }
    }
    notes.extend(text("rulesUnread").map(|why| format!("other rules cannot be read: {why}")));
    notes
}
