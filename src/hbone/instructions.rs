//! How many instructions hot functions without I/O need. Each count is made by callgrind, on this program: the test
//! starts itself below valgrind, which counts only what happens inside of [`measured`].
//!
//! The ciphers are left out: they use instructions that valgrind does not know on every processor. The counts are those
//! of the unoptimised program of the unit tests, so they show when more is done, not how long it takes.

use super::codec::frame::{self, DATA};
use super::codec::hpack::Decoder;
use super::codec::reader::Reader;
use super::config::Config;
use super::request::{Authority, ConnectRequest};
use super::session::{Event, Role, Session};
use super::testing;
use std::hint::black_box;
use std::process::Command;

/// Operations of one count.
const OPERATIONS: usize = 1000;

/// The names of the operations, and the instructions that each needed when it was last looked at.
const TABLE: [(&str, u64); 3] = [("read_data", 2095), ("decode_connect", 9139), ("receive_data", 5949)];

/// By how much a count may be above the table, in percent. Far below it, the table is to be updated.
const MARGIN: u64 = 10;

/// Callgrind counts while this runs.
#[inline(never)]
fn measured(mut operation: impl FnMut()) {
    for _ in 0..OPERATIONS {
        operation();
    }
    black_box(());
}

/// A DATA frame with a message of 1 KiB.
fn message(stream: u32) -> Vec<u8> {
    [&frame::head(1024, DATA, 0, stream)[..], &[7; 1024]].concat()
}

fn request() -> Vec<u8> {
    let authority = Authority::Address(([10, 0, 0, 1], 80).into());
    let baggage = "k8s.cluster.name=c,k8s.namespace.name=shop,k8s.deployment.name=front,service.name=front";
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut block = Vec::new();
    let (baggage, traceparent) = (Some(baggage.into()), Some(traceparent.into()));
    ConnectRequest { authority, baggage, forwarded: Some("for=10.0.0.2".into()), traceparent, network: None }
        .encode(&mut block);
    block
}

fn settings() -> Vec<u8> {
    let mut settings = Vec::new();
    frame::settings(&[], &mut settings);
    settings
}

#[test]
#[ignore = "the last test starts it below callgrind"]
fn read_data() {
    let mut reader = Reader::new(false, 16_384, 1 << 16);
    let mut read = |mut bytes: &[u8]| {
        while let (used, Some(part)) = reader.next(bytes).unwrap() {
            black_box(part);
            bytes = &bytes[used..];
        }
    };
    read(&settings());
    let frame = message(1);
    measured(|| read(&frame));
}

#[test]
#[ignore = "the last test starts it below callgrind"]
fn decode_connect() {
    let see = |value: &[u8]| {
        black_box(value);
    };
    let (mut decoder, block) = (Decoder::new(), request());
    measured(|| assert!(decoder.decode(&block, 1 << 16, &mut |_, value| see(value)).unwrap()));
}

#[test]
#[ignore = "the last test starts it below callgrind"]
fn receive_data() {
    let mut session = Session::<()>::new(Role::Server, &Config { stream_window: 1 << 20, ..testing::CONFIG });
    let mut events: Vec<Event> = Vec::new();
    let mut start = [&frame::PREFACE[..], &settings()].concat();
    frame::headers(1, &request(), false, 16_384, &mut start);
    session.receive(&start, 0, &mut events, || ()).unwrap();
    let frame = message(1);
    measured(|| {
        events.clear();
        session.control().clear();
        session.receive(&frame, 0, &mut events, || ()).unwrap();
        session.consumed(0, 1024, 1 << 20);
    });
}

#[test]
fn hot_functions_need_no_more_instructions_than_before() {
    let mut wrong = Vec::new();
    for (operation, expected) in TABLE {
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
        valgrind.arg("--toggle-collect=culvert::hbone::instructions::measured*");
        valgrind.arg(std::env::current_exe().unwrap());
        valgrind.args(["--exact", &format!("hbone::instructions::{operation}"), "--ignored", "--test-threads=1"]);
        let output = valgrind.output().expect("valgrind runs");
        let text = String::from_utf8_lossy(&output.stderr);
        let collected = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse::<u64>().ok());
        let Some(collected) = collected.filter(|_| output.status.success()) else {
            panic!("{operation}: {text}{}", String::from_utf8_lossy(&output.stdout));
        };
        let each = collected / OPERATIONS as u64;
        let allowed = expected * (100 - MARGIN) / 100..=expected * (100 + MARGIN) / 100;
        if !allowed.contains(&each) {
            wrong.push(format!("{operation}: {each} instructions, and {expected} in the table"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
