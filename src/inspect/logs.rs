//! `culvert logs`: the lines of a daemon's log that are about one pod.

use super::text::printable;
use crate::cluster::{ClusterError, Daemons, LogLines, PodPlace};
use serde_json::Value;
use std::time::Duration;

/// Fields of a line that name a pod of this node or the far end: for both ends, workload and namespace, then addresses.
const ENDS: [(&str, &str, &[&str]); 2] = [
    ("src.workload", "src.namespace", &["src.addr"]),
    ("dst.workload", "dst.namespace", &["dst.addr", "dst.hbone_addr"]),
];

/// Prints the lines about `pod`, `NAMESPACE/NAME`, as `say` gets them, until the log ends or `say` wants no more.
pub async fn run(
    daemons: &Daemons,
    pod: &str,
    lines: &LogLines,
    timeout: Duration,
    mut say: impl FnMut(Line<'_>) -> bool,
) -> Result<(), ClusterError> {
    let (daemon, place) = daemons.find_of_pod(pod, timeout).await?;
    // Without the API the daemon is known by its port only, and its log cannot be read.
    if !daemon.pod.is_empty() {
        let of = format!("{}/{} on node {}", daemon.namespace, daemon.pod, daemon.node);
        say(Line::About(&printable(&format!("lines about {pod} from the log of {of}"))));
    }
    let take = |line: &str| !is_about(line, &place) || say(Line::Log(&printable_line(line)));
    daemons.log(&daemon, lines, timeout, take).await
}

/// What is printed.
#[derive(Clone, Copy, Debug)]
pub enum Line<'a> {
    /// Where the lines come from.
    About(&'a str),
    /// A line of the log.
    Log(&'a str),
}

/// A line without characters that control a terminal. The tabs between its parts stay.
fn printable_line(line: &str) -> String {
    line.split('\t').map(printable).collect::<Vec<_>>().join("\t")
}

/// Whether a line of the log is about a pod: by name, or, where the route was not known yet, by address.
fn is_about(line: &str, pod: &PodPlace) -> bool {
    if line.starts_with('{') {
        let Ok(line) = serde_json::from_str::<Value>(line) else { return false };
        return is_about_fields(|name| line.get(name)?.as_str().map(str::to_owned), pod);
    }
    let Some(fields) = line.split('\t').nth(4) else { return false };
    is_about_fields(|name| field(fields, name), pod)
}

fn is_about_fields(field: impl Fn(&str) -> Option<String>, pod: &PodPlace) -> bool {
    let names = |of: &[&str]| of.iter().filter_map(|name| field(name)).collect::<Vec<_>>();
    ENDS.iter().any(|(workload, namespace, addresses)| {
        let named = field(workload);
        match named {
            Some(named) => named == pod.name && field(namespace).is_some_and(|namespace| namespace == pod.namespace),
            None => names(addresses).iter().any(|address| pod.ips.iter().any(|ip| is_of(address, ip))),
        }
    }) || field("pod").is_some_and(|named| named == format!("{}/{}", pod.namespace, pod.name))
}

/// Whether an address with a port has this IP address.
fn is_of(address: &str, ip: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']') == ip
}

/// The value of a field in a line of text: `name=bare` or `name="quoted"`.
fn field(fields: &str, name: &str) -> Option<String> {
    let mut rest = fields;
    while let Some((key, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            None => after.split_once(' ').map_or((after.to_owned(), ""), |(value, next)| (value.to_owned(), next)),
            Some(quoted) => {
                let mut escaped = false;
                let end = quoted.char_indices().find(|(_, c)| {
                    let ends = *c == '"' && !escaped;
                    escaped = *c == '\\' && !escaped;
                    ends
                });
                let (end, _) = end?;
                (quoted.get(..end)?.to_owned(), quoted.get(end + 1..)?)
            }
        };
        if key.trim() == name {
            return Some(value);
        }
        rest = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodPlace {
        PodPlace {
            namespace: "shop".into(),
            name: "web".into(),
            node: "n1".into(),
            ips: vec!["10.1.0.5".into(), "fd00::5".into()],
        }
    }

    #[test]
    fn lines_about_a_pod_are_found_in_both_formats_and_by_address_before_the_route_is_known() {
        let head = "2026-01-01T00:00:00Z\tinfo\taccess\tconnection complete\t";
        let ours = [
            format!(
                r#"{head}src.addr=10.1.0.9:1 src.workload="front" src.namespace="shop" dst.workload="web" dst.namespace="shop""#
            ),
            format!(r#"{head}error="said \"no\" = x" src.workload="web" src.namespace="shop""#),
            format!("{head}src.addr=10.1.0.5:1 direction=\"outbound\""),
            format!("{head}src.addr=[fd00::5]:1 dst.addr=10.9.9.9:5"),
            r#"{"scope":"access","src.addr":"10.1.0.5:1","reason":"loop"}"#.to_owned(),
            r#"{"scope":"access","dst.workload":"web","dst.namespace":"shop"}"#.to_owned(),
            r#"{"scope":"node::pod","message":"captured","pod":"shop/web"}"#.to_owned(),
        ];
        for line in &ours {
            assert!(is_about(line, &pod()), "{line}");
        }
        let others = [
            format!(r#"{head}src.workload="web" src.namespace="other""#),
            format!(r#"{head}src.workload="web-2" src.namespace="shop" src.addr=10.1.0.50:1"#),
            format!(r#"{head}error="src.workload=\"web\" src.namespace=\"shop\"""#),
            "2026-01-01T00:00:00Z\tinfo\tdaemon\tculvert 0.1.0 is running\tworkers=2".to_owned(),
            "panicked at".to_owned(),
            "{not json".to_owned(),
        ];
        for line in &others {
            assert!(!is_about(line, &pod()), "{line}");
        }
    }
}
