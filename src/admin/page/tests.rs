//! Tests of the live page without a browser.

use super::html::{Asked, escaped, page, span};
use super::live::{LISTENERS_MAX, Live, Told};
use super::parts::text;
use super::picture::Picture;
use crate::telemetry::units::bytes;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

const MARKUP: &str = "</script><script>x</script><b a=\"'>";

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn connection(id: u64, direction: &str, protocol: &str, sent: u64, age: u64) -> Value {
    json!({"id": id, "pod": "u1", "direction": direction, "protocol": protocol, "src": "10.0.0.1:4000", "dst": "10.0.0.2:80",
           "actualDst": "10.0.0.2:15008", "srcWorkload": "shop/front", "dstWorkload": "shop/web", "bytesSent": sent,
           "bytesReceived": 7, "ageMs": age * 1000})
}

fn raw(connections: &[Value]) -> Value {
    json!({"nodes": [
        {"node": "n1", "reachable": true, "status": {"ready": true, "red": [MARKUP]}, "connections": connections,
         "pods": [{"uid": "u1", "namespace": "shop", "name": "front-0", "state": "captured", "since": "1970-01-01T00:00:10Z"}]},
        {"node": "n2", "reachable": false, "error": "no answer"},
    ]})
}

fn picture(connections: &[Value], before: &Picture, now: u64) -> Picture {
    Picture::of(&raw(connections), before, at(now))
}

#[test]
fn a_difference_has_what_has_changed_and_nothing_else() {
    let first = picture(
        &[connection(1, "outbound", "HBONE", 5, 9), connection(2, "outbound", "TCP", 0, 3)],
        &Picture::default(),
        100,
    );
    // A second later: the first has carried more, the second has ended, and a third has come.
    let later = [connection(1, "outbound", "HBONE", 6, 11), connection(3, "outbound", "HBONE", 0, 0)];
    let second = picture(&later, &first, 101);
    let change = second.since(&first);
    let set = change["set"].as_object().unwrap();
    assert_eq!(set.keys().collect::<Vec<_>>(), ["connections", "flows", "traffic"], "{change:#}");
    assert_eq!(set["traffic"], json!({"n1/1": [6, 7], "n1/3": [0, 7]}));
    assert_eq!(set["connections"].as_object().unwrap().keys().collect::<Vec<_>>(), ["n1/3"], "its start is the same");
    assert_eq!(change["gone"]["connections"], json!(["n1/2"]));
    assert_eq!(change["gone"]["flows"], json!(["shop/front > shop/web plaintext"]));
    assert_eq!(second.since(&second)["set"], json!({}));
}

#[test]
fn of_the_history_only_new_entries_are_sent() {
    let refused =
        |time: &str, text: &str| json!({"time": time, "kind": "connection", "outcome": "refused", "error": text});
    let change = |time: &str, text: &str| json!({"time": time, "kind": "change", "text": text});
    // As a node tells it: of each kind, the newest first.
    let of = |refused: &[Value], changes: &[Value]| {
        let newest = refused.iter().rev().chain(changes.iter().rev()).cloned().collect::<Vec<_>>();
        let raw = json!({"nodes": [{"node": "n1", "reachable": true, "history": newest}]});
        Picture::of(&raw, &Picture::default(), at(100))
    };
    let [first, second] = ["2026-01-01T00:00:01.000Z", "2026-01-01T00:00:02.000Z"];
    let mut entries = vec![refused(first, "a"), refused(second, "b"), refused(second, "c")];
    let mut changes = vec![change(second, "d")];
    let before = of(&entries, &changes);
    assert_eq!(before.rows("history").unwrap().len(), 4, "entries of one moment stay several");
    entries.push(refused(second, "e"));
    changes.push(change(second, "f"));
    let after = of(&entries, &changes);
    let news = after.since(&before);
    let set: Vec<String> = news["set"]["history"]
        .as_object()
        .unwrap()
        .values()
        .map(|row| text(&row["error"]) + &text(&row["text"]))
        .collect();
    assert_eq!(set, ["f", "e"], "{news:#}");
    assert_eq!(news["gone"], json!({}));
    // The oldest falls out.
    let (later, gone) = (of(&entries[1..], &changes), after.rows("history").unwrap().keys().next().unwrap().clone());
    assert_eq!(later.since(&after)["set"]["history"], Value::Null);
    assert_eq!(later.since(&after)["gone"], json!({"history": [gone]}));
    let errors: Vec<&Value> = after.rows("history").unwrap().values().map(|row| &row["error"]).collect();
    assert_eq!(errors, ["a", "", "", "b", "c", "e"], "sorted by time");
}

#[test]
fn what_a_node_does_not_say_is_not_taken_for_good() {
    let shown = |nodes: Value| {
        let made = Picture::of(&json!({"nodes": nodes}), &Picture::default(), at(100));
        page(&made, &Asked::default(), ("", &[]), ("", ""))
    };
    for (node, state) in [
        (Value::Null, "✕ not reachable"),
        (json!({"node": "n1"}), "✕ not reachable"),
        (json!({"node": "n1", "reachable": "yes"}), "✕ not reachable"),
        (json!({"node": "n1", "reachable": true}), "△ not ready"),
        (json!({"node": "n1", "reachable": true, "status": {"ready": null}}), "△ not ready"),
    ] {
        let page = shown(json!([node]));
        assert!(page.contains(state) && page.contains("0 of 1") && !page.contains("● ready"), "{node}: {page}");
    }
    let well = json!([{"node": "n1", "reachable": true, "status": {"ready": true, "notes": ["worth knowing"]}}]);
    assert!(shown(well.clone()).contains("● ready") && shown(well.clone()).contains("1 of 1"));
    assert!(shown(well).contains("worth knowing"), "as with JavaScript");
}

#[test]
fn a_certificate_says_once_why_it_is_missing_or_not_renewed() {
    let row = |state: &str, error: Value| {
        let one = json!({"identity": "spiffe://td/ns/a/sa/b", "state": state, "error": error});
        let raw = json!({"nodes": [{"node": "n1", "reachable": true, "certificates": [one]}]});
        let made = Picture::of(&raw, &Picture::default(), at(100));
        page(&made, &Asked::default(), ("", &[]), ("", ""))
    };
    assert_eq!(row("Available", json!("the CA says no")).matches("the CA says no").count(), 1);
    assert_eq!(row("Unavailable: the CA says no", json!("the CA says no")).matches("the CA says no").count(), 1);
    assert!(row("Available", Value::Null).contains("Available"));
}

#[test]
fn the_id_of_a_connection_is_a_bounded_text() {
    let mut hostile = connection(1, "outbound", "HBONE", 5, 9);
    hostile["id"] = json!({"any": "x".repeat(10_000)});
    let mut long = connection(1, "outbound", "HBONE", 5, 9);
    long["id"] = format!("\n{}", "x".repeat(10_000)).into();
    let made = picture(&[hostile, long], &Picture::default(), 100);
    for key in made.rows("connections").unwrap().keys() {
        assert!(key.chars().count() < 310 && !key.contains('\n'), "{key}");
    }
}

#[test]
fn a_flow_that_both_nodes_see_counts_once() {
    let both = [
        connection(1, "outbound", "HBONE", 5, 0),
        connection(2, "inbound", "HBONE", 5, 0),
        connection(3, "inbound", "HBONE", 5, 0),
    ];
    let made = picture(&both, &Picture::default(), 100);
    let flow = &made.rows("flows").unwrap()["shop/front > shop/web encrypted"];
    assert_eq!((&flow["connections"], &flow["sent"], &flow["received"]), (&json!(2), &json!(14), &json!(10)));
}

#[test]
fn many_addresses_outside_the_mesh_are_one() {
    let one = |number: u64| {
        let mut one = connection(number, "inbound", "TCP", 0, 0);
        one["srcWorkload"] = Value::Null;
        one["src"] = format!("192.0.2.{number}:1").into();
        one
    };
    let few = picture(&(0..3).map(one).collect::<Vec<_>>(), &Picture::default(), 1);
    assert_eq!(few.rows("flows").unwrap().len(), 3);
    let many = picture(&(0..200).map(one).collect::<Vec<_>>(), &Picture::default(), 1);
    assert_eq!(many.rows("flows").unwrap().keys().collect::<Vec<_>>(), ["many addresses > shop/web plaintext"]);
}

#[test]
fn what_others_have_written_is_text() {
    assert_eq!(text(&json!("a\u{202e}b\nc")), "a\u{fffd}b\u{fffd}c");
    assert_eq!(text(&json!("x".repeat(1000))).chars().count(), 301);
    assert_eq!(escaped("<&\"'>"), "&lt;&amp;&quot;&#39;&gt;");
    let mut hostile = connection(1, "outbound", "HBONE", 5, 9);
    for key in ["src", "dst", "srcWorkload", "dstWorkload", "rule", "service"] {
        hostile[key] = MARKUP.into();
    }
    let asked = Asked { words: MARKUP.to_lowercase().split(' ').next().unwrap().to_owned(), first: 0 };
    let page = page(&picture(&[hostile], &Picture::default(), 100), &asked, (MARKUP, &["/pods"]), ("STYLE", "SCRIPT"));
    assert_eq!(page.matches("<script").count(), 1, "{page}");
    assert_eq!(page.matches("</script").count(), 1);
    assert!(page.contains("&lt;script&gt;") && page.contains("Rows 1 to 1 of 1"), "{page}");
    for part in ["<script>SCRIPT</script>", "<style>STYLE</style>", "node n2 cannot be reached: no answer", "1 of 2"] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(!page.contains("{{"), "every place is filled");
}

#[test]
fn the_table_without_scripts_has_pages() {
    let all: Vec<Value> = (0..450).map(|id| connection(id, "outbound", "HBONE", 0, 0)).collect();
    let made = picture(&all, &Picture::default(), 100);
    let shown = |first: &str| {
        let query = [("q".to_owned(), "SHOP".to_owned()), ("first".to_owned(), first.to_owned())];
        page(&made, &Asked::of(&query), ("", &[]), ("", ""))
    };
    for (first, text, links) in [
        ("0", "Rows 1 to 200 of 450.", ["first=200"].as_slice()),
        ("400", "Rows 401 to 450 of 450.", &["first=200"]),
        ("200", "Rows 201 to 400 of 450.", &["first=0", "first=400"]),
        ("9999", "Rows 1 to 200 of 450.", &["first=200"]),
        ("x", "Rows 1 to 200 of 450.", &[]),
    ] {
        let page = shown(first);
        assert!(page.contains(text), "{first}");
        assert!(links.iter().all(|link| page.contains(link)), "{first}");
    }
}

#[test]
fn sizes_and_durations_are_short() {
    for (count, expected) in
        [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (u64::MAX, "16383 PiB")]
    {
        assert_eq!(bytes(count), expected);
    }
    for (seconds, expected) in [(0, "0s"), (59, "59s"), (61, "1m 1s"), (7_200, "2h 0m"), (90_061, "1d 1h")] {
        assert_eq!(span(seconds), expected);
    }
}

/// A feed that counts how often it was asked.
fn counted() -> (Arc<Live>, Arc<AtomicU64>) {
    let asked = Arc::new(AtomicU64::new(0));
    let counter = asked.clone();
    let live = Live::new(Box::new(move || {
        let count = counter.fetch_add(1, Ordering::Relaxed);
        Box::pin(
            async move { Told { said: raw(&[connection(1, "outbound", "HBONE", count, 0)]), work: Duration::ZERO } },
        )
    }));
    (live, asked)
}

#[tokio::test(start_paused = true)]
async fn a_picture_is_made_once_for_all_and_not_while_nobody_reads() {
    let (live, asked) = counted();
    let running = live.run();
    tokio::pin!(running);
    let idle = tokio::time::timeout(Duration::from_secs(60), &mut running).await;
    assert!(idle.is_err() && asked.load(Ordering::Relaxed) == 0, "nobody reads");
    for _ in 0..10 {
        live.picture().await;
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let mut readers = Vec::new();
    for _ in 0..LISTENERS_MAX {
        readers.push(live.listen(CancellationToken::new()).await.unwrap());
    }
    assert!(live.listen(CancellationToken::new()).await.is_err(), "there is no place for another one");
    for reader in &mut readers {
        assert!(reader.recv().await.unwrap().starts_with(b"event: whole\n"));
    }
    let listening = async {
        for reader in &mut readers {
            let change = reader.recv().await.unwrap();
            assert!(change.starts_with(b"event: change\n") && change.ends_with(b"\n\n"));
        }
    };
    tokio::select! { () = &mut running => {}, () = listening => {} }
    assert_eq!(asked.load(Ordering::Relaxed), 2, "eight readers cost no more than one");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_keep_up_is_dropped() {
    let (live, _) = counted();
    let (slow, quick) = (CancellationToken::new(), CancellationToken::new());
    let mut kept = live.listen(quick.clone()).await.unwrap();
    let unread = live.listen(slow.clone()).await.unwrap();
    let reading = async { while kept.recv().await.is_some() {} };
    tokio::select! {
        () = live.run() => {}
        () = reading => {}
        () = slow.cancelled() => {}
    }
    assert!(slow.is_cancelled() && !quick.is_cancelled());
    drop(unread);
}

/// Reads events until the next picture, and returns how long it took and the names of the other events.
async fn next_change(events: &mut tokio::sync::mpsc::Receiver<axum::body::Bytes>) -> (Duration, Vec<String>) {
    let (begun, mut names) = (tokio::time::Instant::now(), Vec::new());
    loop {
        let event = String::from_utf8(events.recv().await.unwrap().to_vec()).unwrap();
        match event.split_once('\n').unwrap().0.trim_start_matches("event: ") {
            "change" => return (begun.elapsed(), names),
            name => names.push(name.to_owned()),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_answer_delays_one_picture_and_the_reader_hears_that_more_will_come() {
    let asked = AtomicU64::new(0);
    let live = Live::new(Box::new(move || {
        let wait = Duration::from_secs(if asked.fetch_add(1, Ordering::Relaxed) == 1 { 16 } else { 0 });
        Box::pin(async move {
            tokio::time::sleep(wait).await;
            Told { said: raw(&[]), work: Duration::ZERO }
        })
    }));
    let mut events = live.listen(CancellationToken::new()).await.unwrap();
    let reading = async {
        assert!(events.recv().await.unwrap().starts_with(b"event: whole\n"));
        let slow = next_change(&mut events).await;
        (slow, next_change(&mut events).await)
    };
    let ((slow, beats), (quick, none)) = tokio::select! {
        () = live.run() => unreachable!(),
        read = reading => read,
    };
    assert!(slow >= Duration::from_secs(18) && slow < Duration::from_secs(19), "{slow:?}");
    assert_eq!(beats, ["alive"; 3], "one every five seconds");
    assert!(quick <= Duration::from_secs(2) && none.is_empty(), "{quick:?}: waiting is no work");
}

#[tokio::test(start_paused = true)]
async fn pictures_that_are_much_work_are_made_less_often() {
    let live = Live::new(Box::new(|| Box::pin(async { Told { said: raw(&[]), work: Duration::from_secs(3) } })));
    let mut events = live.listen(CancellationToken::new()).await.unwrap();
    let (took, beats) = tokio::select! {
        () = live.run() => unreachable!(),
        read = async { events.recv().await; next_change(&mut events).await } => read,
    };
    assert!(took >= Duration::from_secs(12) && took < Duration::from_secs(13), "{took:?}");
    assert_eq!(beats, ["alive"; 2]);
}
