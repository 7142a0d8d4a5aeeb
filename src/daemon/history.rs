//! `/history`: what has ended, was refused, or has changed on this node. Entries are filtered and made into JSON here,
//! beside enforcement, long after they were pushed.

use super::parts::Parts;
use crate::admin::Query;
use crate::config::parse_duration;
use crate::connection::report::Direction;
use crate::connection::report::history::{Ended, Ends};
use crate::mesh::{SpiffeName, Text};
use crate::telemetry::changes::{Change, What};
use crate::telemetry::ring::{Bounds, Ring};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Entries of an answer where the question does not say how many.
const LIMIT: usize = 1_000;

/// Bytes of an entry, on average: it decides how many bytes may be held.
const ENTRY_BYTES: usize = 840;

/// The parts of a history of so many entries: connections, and changes.
pub(super) fn bounds(entries: usize) -> (Bounds, Bounds) {
    let changes = entries.div_ceil(8);
    let of = |entries: usize| Bounds { entries, bytes: entries * ENTRY_BYTES };
    (of(entries - changes), of(changes))
}

/// What a question asks for.
#[derive(Debug, Default)]
struct Filter {
    since: Option<SystemTime>,
    kind: Option<String>,
    outcome: Option<String>,
    what: Option<String>,
    pod: Option<String>,
    peer: Option<String>,
    reason: Option<String>,
    limit: Option<usize>,
}

impl Filter {
    /// Reads a question. The error names the parameter.
    fn read(query: &Query, now: SystemTime) -> Result<Self, String> {
        let mut filter = Self::default();
        for (name, value) in query {
            let of = |words: &[&str]| {
                let known = words.contains(&value.as_str()).then(|| Some(value.clone()));
                known.ok_or_else(|| format!("{name}={value} is not understood: use one of {}", words.join(", ")))
            };
            match name.as_str() {
                "since" => filter.since = Some(since(value, now)?),
                "kind" => filter.kind = of(&["connection", "change"])?,
                "outcome" => filter.outcome = of(&["ok", "refused", "failed"])?,
                "refused" => {
                    if of(&["true", "false"])?.as_deref() == Some("true") {
                        filter.outcome = Some("refused".into());
                    }
                }
                "what" => filter.what = of(&What::ALL.map(What::word))?,
                "pod" if value.split('/').count() == 2 => filter.pod = Some(value.clone()),
                "pod" => return Err(format!("pod={value} is not understood: use pod=NAMESPACE/NAME")),
                "peer" => filter.peer = Some(value.clone()),
                "reason" => filter.reason = Some(value.clone()),
                "limit" => {
                    let limit = value.parse().map_err(|_| format!("limit={value} is not a number"))?;
                    filter.limit = Some(limit);
                }
                _ => {
                    return Err(format!(
                        "{name:?} is not understood: use since, kind, outcome, refused, what, pod, peer, reason or limit"
                    ));
                }
            }
        }
        Ok(filter)
    }

    /// Whether any entry of a kind can be asked for.
    fn wants(&self, kind: &str) -> bool {
        let of_connections = self.outcome.is_some() || self.peer.is_some() || self.reason.is_some();
        self.kind.as_deref().is_none_or(|wanted| wanted == kind)
            && !(kind == "change" && of_connections)
            && !(kind == "connection" && self.what.is_some())
    }

    fn wants_time(&self, at: SystemTime) -> bool {
        self.since.is_none_or(|since| at >= since)
    }

    fn wants_connection(&self, ended: &Ended, parts: &Parts) -> bool {
        let is = |wanted: &Option<String>, word: Option<&str>| wanted.is_none() || wanted.as_deref() == word;
        self.wants_time(ended.at)
            && is(&self.outcome, Some(outcome(ended)))
            && is(&self.reason, ended.failure.as_ref().map(|failure| failure.reason().word()))
            && self.peer.as_deref().is_none_or(|peer| is_peer(ended, peer))
            && self.pod.as_deref().is_none_or(|pod| pod_name(parts, &ended.pod) == pod)
    }

    fn wants_change(&self, change: &Change) -> bool {
        self.wants_time(change.at)
            && self.what.as_deref().is_none_or(|what| what == change.what.word())
            && self.pod.as_deref().is_none_or(|pod| change.what == What::Capture && change.subject == pod)
    }
}

/// A time: a duration before now, or RFC 3339.
fn since(value: &str, now: SystemTime) -> Result<SystemTime, String> {
    let ago = parse_duration(value).and_then(|ago| now.checked_sub(ago));
    let at = ago.or_else(|| humantime::parse_rfc3339(value).ok());
    at.ok_or_else(|| {
        format!("since={value} is not understood: use a duration such as 10m, or a time such as 2026-01-31T08:30:00Z")
    })
}

/// `/history`.
pub(super) fn history(parts: &Parts, query: &Query) -> Result<Value, String> {
    let now = SystemTime::now();
    let filter = Filter::read(query, now)?;
    let limit = filter.limit.unwrap_or(LIMIT);
    let (connections, changes) = (&parts.reporter.history, parts.changes.ring());
    let mut found: Vec<(SystemTime, Entry)> = Vec::new();
    if filter.wants("connection") {
        for (_, ring) in connections.rings() {
            let ended = ring.newest(limit, |ended| filter.wants_connection(ended, parts));
            found.extend(ended.into_iter().map(|ended| (ended.at, Entry::Connection(ended))));
        }
    }
    if filter.wants("change") {
        let noted = changes.newest(limit, |change| filter.wants_change(change));
        found.extend(noted.into_iter().map(|change| (change.at, Entry::Change(change))));
    }
    // Stable: what ended at the same moment keeps its order.
    found.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    found.truncate(limit);
    let entries: Vec<Value> = found
        .into_iter()
        .map(|(_, entry)| match entry {
            Entry::Connection(ended) => connection(&ended, parts),
            Entry::Change(noted) => change(&noted),
        })
        .collect();
    let mut rings = Map::new();
    let mut totals = (0, None::<SystemTime>);
    let mut add = |word: &str, dropped: u64, oldest: Option<SystemTime>| {
        totals = (totals.0 + dropped, totals.1.into_iter().chain(oldest).min());
        rings.insert(word.to_owned(), json!({"dropped": dropped, "oldest": oldest.map(time)}));
    };
    for (word, ring) in connections.rings() {
        add(word, ring.dropped(), oldest(ring, |ended| ended.at));
    }
    add("change", changes.dropped(), oldest(changes, |change| change.at));
    Ok(json!({
        "node": parts.config.node_name,
        "now": time(now),
        "dropped": totals.0,
        "oldest": totals.1.map(time),
        "kept": rings,
        "entries": entries,
    }))
}

enum Entry {
    Connection(Arc<Ended>),
    Change(Arc<Change>),
}

fn oldest<T>(ring: &Ring<T>, at: impl Fn(&T) -> SystemTime) -> Option<SystemTime> {
    ring.oldest().map(|entry| at(&entry))
}

fn connection(ended: &Ended, parts: &Parts) -> Value {
    let ends = ended.ends.as_ref();
    let workload = |workload: Option<&(Text, Text)>| workload.map(|(namespace, name)| format!("{namespace}/{name}"));
    let identity = |identity: Option<&SpiffeName>| identity.map(ToString::to_string);
    let failure = ended.failure.as_ref();
    let stages: Map<String, Value> =
        ended.stages.all().map(|(stage, took)| (stage.word().to_owned(), millis(took))).collect();
    let destination = ended.destination.or(ends.map(|ends| ends.actual));
    json!({
        "time": time(ended.at),
        "kind": "connection",
        "direction": ended.direction.word(),
        "outcome": outcome(ended),
        "reason": failure.map(|failure| failure.reason().word()),
        "error": failure.map(ToString::to_string),
        "rule": failure.and_then(|failure| failure.rule()).or_else(|| ends.and_then(|ends| ends.rule.as_deref().map(str::to_owned))),
        "next_step": failure.map(|failure| failure.reason().advice()),
        "pod": pod_name(parts, &ended.pod),
        "source": {
            "address": ended.source.to_string(),
            "identity": identity(ends.and_then(|ends| ends.source_identity.as_ref())),
            "workload": workload(ends.and_then(|ends| ends.source_workload.as_ref())),
        },
        "destination": {
            "address": destination.map(|address| address.to_string()),
            "actual": ends.map(|ends| ends.actual.to_string()),
            "service": ends.and_then(|ends| ends.service.as_deref()),
            "identity": identity(ends.and_then(|ends| ends.destination_identity.as_ref())),
            "workload": workload(ends.and_then(|ends| ends.destination_workload.as_ref())),
        },
        "encrypted": ends.is_some_and(|ends| ends.is_encrypted),
        "tried": ended.tried,
        "bytes_sent": ended.bytes.0,
        "bytes_received": ended.bytes.1,
        "duration_ms": millis(ended.duration),
        "stages_ms": stages,
    })
}

fn change(change: &Change) -> Value {
    json!({
        "time": time(change.at),
        "kind": "change",
        "what": change.what.word(),
        "subject": change.subject,
        "text": change.text,
    })
}

/// How a connection ended, in one word.
fn outcome(ended: &Ended) -> &'static str {
    match &ended.failure {
        None => "ok",
        Some(failure) if failure.is_refusal() => "refused",
        Some(_) => "failed",
    }
}

/// Whether the far end of a connection is meant by `peer`: an identity, a workload with or without its namespace, a
/// service, or an address with or without its port.
fn is_peer(ended: &Ended, peer: &str) -> bool {
    let is_outbound = ended.direction == Direction::Outbound;
    let of = |ends: &Ends| {
        let (workload, identity, service) = if is_outbound {
            (&ends.destination_workload, &ends.destination_identity, ends.service.as_deref())
        } else {
            (&ends.source_workload, &ends.source_identity, None)
        };
        let is_workload = workload.as_ref().is_some_and(|(namespace, name)| {
            **name == *peer || peer.split_once('/').is_some_and(|(n, of)| **namespace == *n && **name == *of)
        });
        is_workload || service == Some(peer) || identity.as_ref().is_some_and(|name| name.to_string() == peer)
    };
    let actual = ended.ends.as_ref().map(|ends| ends.actual);
    let addresses = if is_outbound { [ended.destination, actual] } else { [Some(ended.source), None] };
    let is_address = |address: std::net::SocketAddr| {
        peer.parse::<std::net::IpAddr>()
            .map_or_else(|_| peer.parse().is_ok_and(|peer| address == peer), |ip| address.ip() == ip)
    };
    addresses.into_iter().flatten().any(is_address) || ended.ends.as_ref().is_some_and(of)
}

/// The name of a pod, or its uid if nothing is known about it any more.
fn pod_name(parts: &Parts, uid: &Text) -> String {
    let known = parts.reporter.pods.name_of(uid).or_else(|| {
        let pod = parts.board.get(uid)?;
        Some((pod.spec.namespace.clone(), pod.spec.name.clone()))
    });
    known.map_or_else(|| uid.to_string(), |(namespace, name)| format!("{namespace}/{name}"))
}

/// Milliseconds with three decimals.
fn millis(duration: Duration) -> Value {
    let micros = u32::try_from(duration.as_micros()).map_or_else(|_| duration.as_secs_f64() * 1e6, f64::from);
    json!(micros / 1e3)
}

fn time(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> Result<Filter, String> {
        let query = form_urlencoded::parse(text.as_bytes()).into_owned().collect();
        Filter::read(&query, SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000))
    }

    #[test]
    fn questions_are_understood_or_refused_by_name() {
        let asked = filter("since=10m&outcome=failed&refused=true&pod=a/b&limit=3").unwrap();
        assert_eq!(asked.since, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(999_400)));
        assert_eq!((asked.outcome.as_deref(), asked.limit), (Some("refused"), Some(3)));
        let asked = filter("since=1970-01-01T00:00:05Z").unwrap();
        assert_eq!(asked.since, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(5)));
        for (text, name) in [
            ("since=soon", "since=soon"),
            ("kind=pod", "kind=pod"),
            ("outcome=bad", "outcome=bad"),
            ("refused=1", "refused=1"),
            ("what=weather", "what=weather"),
            ("pod=b", "pod=b"),
            ("limit=-1", "limit=-1"),
            ("form=x", "\"form\""),
        ] {
            assert!(filter(text).unwrap_err().starts_with(name), "{text}");
        }
    }

    #[test]
    fn a_filter_that_only_one_kind_has_leaves_out_the_other() {
        for (text, kinds) in [
            ("", [true, true]),
            ("kind=change", [false, true]),
            ("outcome=ok", [true, false]),
            ("reason=denied", [true, false]),
            ("peer=x", [true, false]),
            ("what=policy", [false, true]),
            ("pod=a/b", [true, true]),
        ] {
            let filter = filter(text).unwrap();
            assert_eq!(["connection", "change"].map(|kind| filter.wants(kind)), kinds, "{text}");
        }
    }

    #[test]
    fn the_parts_make_the_whole() {
        for entries in [0, 1, 7, 8, 10_000] {
            let (connections, changes) = bounds(entries);
            assert_eq!(connections.entries + changes.entries, entries);
        }
        assert!(bounds(10_000).0.bytes + bounds(10_000).1.bytes <= 8_400_000);
    }
}
