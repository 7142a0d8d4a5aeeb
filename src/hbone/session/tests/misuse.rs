//! Peers that break the rules of HTTP/2, and peers that cause work.

use super::*;
use crate::hbone::codec::frame::Part;
use crate::hbone::session::limits::Allowance;

/// What becomes of the peer.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// Nothing.
    Fine,
    /// This stream is reset with this code.
    Stream(u32, ErrorCode),
    /// The connection ends with this code and this word for metrics.
    Connection(ErrorCode, &'static str),
    /// The connection is cut because of control frames.
    ControlFrames,
}

use Outcome::{Connection, ControlFrames, Fine, Stream};

const PROTOCOL: ErrorCode = ErrorCode::PROTOCOL_ERROR;
const FLOW: ErrorCode = ErrorCode::FLOW_CONTROL_ERROR;
const CLOSED: ErrorCode = ErrorCode::STREAM_CLOSED;
const CALM: ErrorCode = ErrorCode::ENHANCE_YOUR_CALM;
const BAD: Outcome = Connection(PROTOCOL, "bad_frame");

/// Gives `bytes` to a session in pieces of `step`, as an owner does that takes every stream away once it is over.
fn outcome(role: Role, bytes: &[u8], step: usize) -> Outcome {
    let mut session = session(role);
    let mut last = Fine;
    for piece in bytes.chunks(step) {
        match receive(&mut session, piece) {
            Err(SessionError::ControlFrames) => return ControlFrames,
            Err(SessionError::Rule { code, word, .. }) => return Connection(code, word),
            Ok(_) => {}
        }
        for part in written(&mut session) {
            if let Part::Reset { stream, code } = part {
                last = Stream(stream, code);
            }
        }
        for key in session.keys() {
            if session.get(key).is_some_and(|stream| stream.is_over()) {
                session.remove(key);
            }
        }
        assert!(session.len() <= CONFIG.max_streams as usize && session.by_id.len() == session.len());
        assert!(session.remembered.len() <= REMEMBERED_MAX);
    }
    last
}

fn check(role: Role, cases: &[(&str, Vec<u8>, Outcome)]) {
    for (name, bytes, expected) in cases {
        // If all comes at once, the owner has not taken a stream away that was over before.
        if !name.ends_with("that is over") {
            assert_eq!(outcome(role, bytes, 16_384), *expected, "{name}");
        }
        if bytes.len() < 100_000 {
            assert_eq!(outcome(role, bytes, 1), *expected, "{name}, byte by byte");
        }
    }
}

fn repeat(count: usize, one: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..u32::try_from(count).unwrap()).flat_map(one).collect()
}

/// Stream ids of a client, in order.
fn odd(index: u32) -> u32 {
    2 * index + 1
}

/// A header block with this many indexed fields `cookie: ...` behind a literal one that fills the dynamic table.
fn bomb(fields: usize) -> Vec<u8> {
    let mut block = request_block();
    // Literal with incremental indexing, name `cookie` (RFC 7541 section 6.2.1).
    block.extend([0x40 | 32, 0x7f, 0xf1, 0x1d]);
    block.extend(vec![b'a'; 127 + 0x71 + (0x1d << 7)]);
    block.extend(vec![0x80 | 62; fields]);
    block
}

#[test]
fn a_client_that_breaks_a_rule_is_told_so() {
    let both = |one: Vec<u8>, two: Vec<u8>| [one, two].concat();
    let opened = |bytes: Vec<u8>| both(request(1), bytes);
    let over = |bytes: Vec<u8>| both(both(request(1), reset(1)), bytes);
    let no_method = headers(1, &[0x01, 1, b'a'], false);
    let large = repeat(4, |_| data(1, 16_384, false));
    let padded = raw(frame::DATA, frame::PADDED, 1, &[5, 1, 2]);
    let on_itself = [&[0, 0, 0, 1, 16][..], &request_block()].concat();
    check(
        Role::Server,
        &[
            ("DATA on an idle stream", data(1, 1, false), BAD),
            ("WINDOW_UPDATE on an idle stream", window(1, 1), BAD),
            ("WINDOW_UPDATE of 0 on an idle stream", window(1, 0), BAD),
            ("RST_STREAM on an idle stream", reset(1), BAD),
            ("WINDOW_UPDATE of 0", opened(window(1, 0)), Stream(1, PROTOCOL)),
            ("WINDOW_UPDATE of 0 for the connection", window(0, 0), BAD),
            ("a stream's window too large", opened(window(1, (1 << 31) - 1)), Stream(1, FLOW)),
            ("the connection's window too large", window(0, (1 << 31) - 1), Connection(FLOW, "window_overflow")),
            (
                "SETTINGS that make a window too large",
                opened(both(window(1, 1), settings(&[(frame::INITIAL_WINDOW_SIZE, (1 << 31) - 1)]))),
                Connection(FLOW, "window_overflow"),
            ),
            (
                "SETTINGS with a window too large",
                settings(&[(frame::INITIAL_WINDOW_SIZE, 1 << 31)]),
                Connection(FLOW, "window_overflow"),
            ),
            ("more DATA than the stream's window", opened(large), Stream(1, FLOW)),
            ("DATA behind END_STREAM", opened(both(data(1, 1, true), data(1, 1, false))), Stream(1, CLOSED)),
            ("HEADERS behind END_STREAM", opened(both(data(1, 1, true), request(1))), Stream(1, CLOSED)),
            ("HEADERS on a stream that is over", over(request(1)), Connection(CLOSED, "bad_frame")),
            ("DATA on a stream that is over", over(data(1, 1, false)), Stream(1, CLOSED)),
            ("WINDOW_UPDATE on a stream that is over", over(window(1, 1)), Fine),
            ("RST_STREAM on a stream that is over", over(reset(1)), Fine),
            ("trailers without END_STREAM", opened(headers(1, &[0x00, 1, b'x', 1, b'y'], false)), Stream(1, PROTOCOL)),
            ("trailers with a pseudo-header", opened(headers(1, &request_block(), true)), Stream(1, PROTOCOL)),
            ("trailers", opened(headers(1, &[0x00, 1, b'x', 1, b'y'], true)), Fine),
            ("an even stream", request(2), BAD),
            (
                "a stream below an older one that was never opened",
                both(request(5), request(3)),
                Connection(CLOSED, "bad_frame"),
            ),
            ("PUSH_PROMISE", raw(frame::PUSH_PROMISE, frame::END_HEADERS, 1, &[0, 0, 0, 2]), BAD),
            ("a request without method", no_method, Stream(1, PROTOCOL)),
            (
                "a request that depends on itself",
                raw(frame::HEADERS, frame::END_HEADERS | frame::HAS_PRIORITY, 1, &on_itself),
                Stream(1, PROTOCOL),
            ),
            ("an idle stream that depends on itself", raw(frame::PRIORITY, 0, 1, &[0, 0, 0, 1, 0]), BAD),
            (
                "an open stream that depends on itself",
                opened(raw(frame::PRIORITY, 0, 1, &[0, 0, 0, 1, 0])),
                Stream(1, PROTOCOL),
            ),
            ("PRIORITY on an idle stream", raw(frame::PRIORITY, 0, 7, &[0, 0, 0, 1, 0]), Fine),
            ("padding longer than its frame", opened(padded), BAD),
            (
                "a header block that is no HPACK",
                headers(1, &[0x80], false),
                Connection(ErrorCode::COMPRESSION_ERROR, "bad_frame"),
            ),
            (
                "a frame larger than announced",
                raw(frame::DATA, 0, 1, &[0; 16_385]),
                Connection(ErrorCode::FRAME_SIZE_ERROR, "bad_frame"),
            ),
            (
                "RST_STREAM of a wrong size",
                opened(raw(frame::RST_STREAM, 0, 1, &[0; 3])),
                Connection(ErrorCode::FRAME_SIZE_ERROR, "bad_frame"),
            ),
            ("CONTINUATION without HEADERS", raw(frame::CONTINUATION, 0, 1, &[]), BAD),
            ("a frame of an unknown type", raw(77, 255, 9, &[1, 2, 3]), Fine),
            ("an unknown setting", settings(&[(999, 1)]), Fine),
        ],
    );
}

#[test]
fn a_client_may_not_open_more_streams_than_allowed() {
    let all: Vec<u8> = (0..101).flat_map(|index| request(odd(index))).collect();
    assert_eq!(outcome(Role::Server, &all, 50), Stream(201, ErrorCode::REFUSED_STREAM));
}

#[test]
fn a_server_that_breaks_a_rule_is_told_so() {
    let trailers = headers(1, &[0x00, 1, b'x', 1, b'y'], false);
    check(
        Role::Client,
        &[
            ("PUSH_PROMISE", raw(frame::PUSH_PROMISE, frame::END_HEADERS, 1, &[0, 0, 0, 2]), BAD),
            ("HEADERS on a stream of its own", headers(2, &answer_block(200), false), BAD),
            ("HEADERS on an idle stream", headers(3, &answer_block(200), false), BAD),
            ("DATA on an idle stream", data(3, 1, false), BAD),
            ("DATA on a stream of its own", data(2, 1, false), BAD),
            ("WINDOW_UPDATE on an idle stream", window(3, 1), BAD),
            ("trailers without END_STREAM", trailers, Stream(1, PROTOCOL)),
            ("a second answer", headers(1, &answer_block(200), true), Stream(1, PROTOCOL)),
            ("a window too large", window(1, (1 << 31) - 1), Stream(1, FLOW)),
            ("more DATA than the stream's window", repeat(4, |_| data(1, 16_384, false)), Stream(1, FLOW)),
            ("DATA behind END_STREAM", [data(1, 1, true), data(1, 1, false)].concat(), Stream(1, CLOSED)),
            ("SETTINGS that allow push", settings(&[(frame::ENABLE_PUSH, 1)]), BAD),
            (
                "GOAWAY of a wrong size",
                raw(frame::GOAWAY, 0, 0, &[0; 7]),
                Connection(ErrorCode::FRAME_SIZE_ERROR, "bad_frame"),
            ),
        ],
    );
}

#[test]
fn a_server_may_send_nothing_before_its_answer() {
    for (bytes, code) in [
        (data(1, 1, false), PROTOCOL),
        (headers(1, &[0x00, 1, b'x', 1, b'y'], true), PROTOCOL),
        (headers(1, &[0x00, 7, b':', b's', b't', b'a', b't', b'u', b's', 1, b'x'], true), PROTOCOL),
    ] {
        let mut session = Session::new(Role::Client, &CONFIG);
        let key = session.open(&connect(), ()).unwrap();
        let events = receive(&mut session, &[settings(&[]), bytes].concat()).unwrap();
        assert!(
            matches!(events[..], [.., Event::Reset { key: of, code: with }] if (of, with) == (key, code)),
            "{events:?}"
        );
    }
    let mut session = Session::new(Role::Client, &CONFIG);
    session.open(&connect(), ()).unwrap();
    let informational = headers(1, &answer_block(103), false);
    let events = receive(&mut session, &[settings(&[]), informational, headers(1, &answer_block(200), false)].concat());
    let events = events.unwrap();
    assert!(matches!(events[..], [Event::Settled, Event::Answer { status: 200, .. }]), "{events:?}");
}

#[test]
fn a_client_must_begin_with_the_preface_and_settings() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[&frame::PREFACE[..], &request(1)].concat()] {
        let error = receive(&mut Session::new(Role::Server, &CONFIG), bytes).unwrap_err();
        assert!(matches!(error, SessionError::Rule { code: PROTOCOL, word: "bad_frame", .. }), "{error:?}");
    }
}

/// One line for each published attack on implementations of HTTP/2 that concerns a peer of a tunnel.
#[tokio::test(start_paused = true)]
async fn published_attacks_end_the_connection_and_cost_little() {
    let continuations = |count: usize, bytes: usize| {
        let mut all = raw(frame::HEADERS, 0, 1, &request_block());
        all.extend(repeat(count, |_| raw(frame::CONTINUATION, 0, 1, &vec![0; bytes])));
        all
    };
    let opened = |bytes: Vec<u8>| [request(1), bytes].concat();
    let calm = |word| Connection(CALM, word);
    let made_you_reset = |index: u32| [request(odd(index)), window(odd(index), 0)].concat();
    let half_closed = |index: u32| [headers(odd(index), &request_block(), true), data(odd(index), 1, false)].concat();
    let overflow = |index: u32| [request(odd(index)), window(odd(index), (1 << 31) - 1)].concat();
    let malformed = |index: u32| headers(odd(index), &[], true);
    let late = |_| [request(1), reset(1), repeat(2000, |_| data(1, 1, false))].concat();
    let ping = |_| raw(frame::PING, 0, 0, &[0; 8]);
    check(
        Role::Server,
        &[
            (
                "CVE-2023-44487, RUSTSEC-2023-0034: rapid reset",
                repeat(1100, |index| [request(odd(index)), reset(odd(index))].concat()),
                calm("rapid_reset"),
            ),
            ("CVE-2025-8671: MadeYouReset by an increment of 0", repeat(1100, made_you_reset), calm("rapid_reset")),
            ("CVE-2025-8671: MadeYouReset by a window that is too large", repeat(1100, overflow), calm("rapid_reset")),
            ("CVE-2025-8671: MadeYouReset by DATA behind the end", repeat(1100, half_closed), calm("rapid_reset")),
            (
                "RUSTSEC-2024-0003: invalid requests whose resets are not read",
                repeat(1100, malformed),
                calm("rapid_reset"),
            ),
            ("RUSTSEC-2024-0003: DATA for a stream that is over", late(0), calm("rapid_reset")),
            ("RUSTSEC-2024-0332: empty CONTINUATION", continuations(100, 0), calm("continuation_flood")),
            ("RUSTSEC-2024-0332: large CONTINUATION", continuations(8, 16_000), calm("continuation_flood")),
            ("RUSTSEC-2026-0258: empty DATA", opened(repeat(1100, |_| data(1, 0, false))), calm("empty_frames")),
            (
                "CVE-2019-9518: empty DATA with padding only",
                opened(repeat(1100, |_| raw(frame::DATA, frame::PADDED, 1, &[0]))),
                calm("empty_frames"),
            ),
            ("CVE-2019-9512: PING", repeat(20_100, ping), ControlFrames),
            ("CVE-2019-9515: SETTINGS", repeat(20_100, |_| settings(&[])), ControlFrames),
            (
                "CVE-2019-9515: SETTINGS with many values",
                settings(&vec![(frame::INITIAL_WINDOW_SIZE, 0); 65]),
                calm("flood"),
            ),
            (
                "CVE-2019-9513: PRIORITY",
                repeat(20_100, |_| raw(frame::PRIORITY, 0, 1, &[0, 0, 0, 3, 0])),
                ControlFrames,
            ),
            ("frames of unknown types", repeat(20_100, |_| raw(99, 0, 0, &[])), ControlFrames),
            ("WINDOW_UPDATE", opened(repeat(20_100, |_| window(1, 1))), ControlFrames),
            (
                "answers to PINGs that were not sent",
                repeat(20_100, |_| raw(frame::PING, frame::ACK, 0, &[0; 8])),
                ControlFrames,
            ),
            ("refused streams", repeat(21_000, |index| request(odd(index))), ControlFrames),
        ],
    );
}

#[test]
fn control_frames_that_the_peer_does_not_read_are_limited() {
    let mut session = session(Role::Server);
    let pings = repeat(10_000, |_| raw(frame::PING, 0, 0, &[0; 8]));
    let mut ended = None;
    for _ in 0..10 {
        session.frames = Allowance::control();
        ended = receive(&mut session, &pings).err();
        if ended.is_some() {
            break;
        }
    }
    assert_eq!(ended, Some(SessionError::ControlFrames));
    assert!(session.control().len() < 600_000, "{}", session.control().len());
}

#[tokio::test(start_paused = true)]
async fn a_header_bomb_is_refused_and_leaves_nothing_behind() {
    // CVE-2026-47774: 4 KB that mean 80 KB.
    let mut session = session(Role::Server);
    for index in 0..200 {
        let events = receive(&mut session, &headers(odd(index), &bomb(20), false)).unwrap();
        assert!(events.is_empty(), "nobody but the session knows of it: {events:?}");
        let parts = written(&mut session);
        assert!(
            matches!(
                parts[..],
                [Part::Headers { end_stream: true, .. }, Part::Reset { code: ErrorCode::NO_ERROR, .. }]
            ),
            "{parts:?}"
        );
        assert_eq!((session.len(), session.by_id.len()), (0, 0));
    }
    assert_eq!(
        outcome(Role::Server, &repeat(1100, |index| headers(odd(index), &bomb(20), false)), 16_384),
        Connection(CALM, "rapid_reset")
    );
}

#[test]
fn a_header_bomb_of_many_fields_ends_the_connection() {
    let expected = Connection(ErrorCode::COMPRESSION_ERROR, "bad_frame");
    assert_eq!(outcome(Role::Server, &headers(1, &bomb(4000), false), 16_384), expected);
}

#[test]
fn streams_that_are_over_do_not_count_against_the_limit() {
    let mut session = session(Role::Server);
    let all: Vec<u8> = (0..100).flat_map(|index| request(odd(index))).collect();
    receive(&mut session, &all).unwrap();
    // At once: the owner has no time to take the old one away.
    let events = receive(&mut session, &[reset(1), request(201), request(203)].concat()).unwrap();
    assert!(matches!(events[..], [Event::Reset { .. }, Event::Request { .. }]), "{events:?}");
    assert!(matches!(written(&mut session)[..], [Part::Reset { stream: 203, code: ErrorCode::REFUSED_STREAM }]));
    // But nobody collects streams that are over.
    for index in 0..900 {
        let id = 205 + 2 * index;
        receive(&mut session, &[reset(id - 4), request(id)].concat()).unwrap();
    }
    assert!(session.len() <= 2 * 100, "{}", session.len());
}

#[test]
fn answers_to_streams_that_this_node_gave_up_do_not_harm_the_others() {
    let mut session = session(Role::Client);
    let mut answers = Vec::new();
    for _ in 0..500 {
        let key = session.open(&connect(), ()).unwrap();
        let id = session.get(key).unwrap().id;
        session.remove(key);
        answers.extend(headers(id, &answer_block(200), false));
    }
    let events = receive(&mut session, &answers).unwrap();
    assert!(events.is_empty(), "{events:?}");
    let events = receive(&mut session, &data(1, 1, false)).unwrap();
    assert!(matches!(events[..], [Event::Data { .. }]), "the others continue: {events:?}");
}

#[test]
fn a_peer_that_goes_away_ends_the_streams_that_it_will_not_serve() {
    let mut session = session(Role::Client);
    let asked = session.open(&connect(), ()).unwrap();
    let mut bytes = Vec::new();
    frame::goaway(0, ErrorCode::from_code(2), b"why", &mut bytes);
    let events = receive(&mut session, &bytes).unwrap();
    let [Event::Reset { key: 0, code: ErrorCode::REFUSED_STREAM }, Event::Unprocessed { key }, Event::GoAway] =
        events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(key, asked, "only what was not answered may be tried again");
    assert_eq!(session.peer_error(), Some(&(ErrorCode::from_code(2), "why".to_owned())));
    assert!(!session.takes_streams() && session.open(&connect(), ()).is_none());
}

#[test]
fn going_away_in_order_takes_what_was_on_its_way() {
    let mut server = session(Role::Server);
    receive(&mut server, &request(1)).unwrap();
    server.go_away();
    let parts = written(&mut server);
    let [Part::GoAway { last: 0x7fff_ffff, .. }, Part::Ping(payload)] = parts[..] else { panic!("{parts:?}") };
    let events = receive(&mut server, &request(3)).unwrap();
    assert!(matches!(events[..], [Event::Request { .. }]), "the peer did not know yet: {events:?}");
    let mut pong = Vec::new();
    frame::ping(payload, true, &mut pong);
    receive(&mut server, &[pong, request(5)].concat()).unwrap();
    let parts = written(&mut server);
    let [Part::GoAway { last: 3, .. }, Part::Reset { stream: 5, code: ErrorCode::REFUSED_STREAM }] = parts[..] else {
        panic!("{parts:?}")
    };
    assert!(!server.is_finished());
    receive(&mut server, &[reset(1), reset(3)].concat()).unwrap();
    for key in server.keys() {
        server.remove(key);
    }
    assert!(server.is_finished());
}

#[test]
fn settings_may_make_a_window_negative() {
    let mut session = session(Role::Client);
    session.data_head(0, 60_000, false);
    receive(&mut session, &settings(&[(frame::INITIAL_WINDOW_SIZE, 10_000)])).unwrap();
    assert_eq!((session.get(0).unwrap().send_window, session.room(0)), (5_535 - 55_535, 0));
    let events = receive(&mut session, &window(1, 50_000)).unwrap();
    assert!(events.is_empty() && session.room(0) == 0, "still nothing: {events:?}");
    let events = receive(&mut session, &window(1, 1)).unwrap();
    assert!(matches!(events[..], [Event::Room { key: 0 }]), "{events:?}");
    let events =
        receive(&mut session, &settings(&[(frame::INITIAL_WINDOW_SIZE, 0), (frame::INITIAL_WINDOW_SIZE, 10_100)]))
            .unwrap();
    assert!(matches!(events[..], [Event::RoomForAll]), "once for a frame: {events:?}");
    assert_eq!(session.room(0), 101);
}

#[test]
fn the_window_of_the_connection_limits_all_streams() {
    let mut session = session(Role::Client);
    session.data_head(0, 65_535, false);
    receive(&mut session, &window(1, 1000)).unwrap();
    assert_eq!(session.room(0), 0);
    let events = receive(&mut session, &window(0, 10)).unwrap();
    assert!(matches!(events[..], [Event::RoomForAll]), "{events:?}");
    assert_eq!(session.room(0), 10);
}
