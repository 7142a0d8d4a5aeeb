//! Two sessions against each other and against a model of what each stream carries.

use super::*;
use crate::hbone::codec::frame::HEAD_LEN;
use proptest::prelude::*;

/// What a side knows of a stream.
#[derive(Debug, Default)]
struct Model {
    sent: usize,
    received: usize,
    /// Received and not passed on.
    held: usize,
    /// The peer has ended the stream in order.
    ended: bool,
    /// The stream was reset by either side.
    reset: bool,
}

/// One end and what it has written that the other end has not read.
struct End {
    role: Role,
    session: Session<Model>,
    wire: Vec<u8>,
}

/// A byte of a stream.
fn pattern(role: Role, id: u32, at: usize) -> u8 {
    u8::try_from((at * 7 + at / 256 + id as usize * 31 + usize::from(role == Role::Server) * 101) % 251).unwrap()
}

impl End {
    fn new(role: Role) -> Self {
        Self { role, session: Session::new(role, &CONFIG), wire: Vec::new() }
    }

    fn write_control(&mut self) {
        self.wire.append(self.session.control());
    }

    /// Sends as much as there is room for, in frames of at most 16,384 bytes.
    fn send(&mut self, key: usize, mut bytes: usize, end: bool) {
        self.write_control();
        if !self.session.get(key).is_some_and(|stream| stream.answered && !stream.local_ended) {
            return;
        }
        loop {
            let now = self.session.room(key).min(bytes).min(16_384);
            bytes -= now;
            let last = now == 0 || bytes == 0;
            if now == 0 && !end {
                return;
            }
            let head = self.session.data_head(key, now, end && last);
            self.wire.extend(head);
            let stream = self.session.get_mut(key).unwrap();
            for at in stream.app.sent..stream.app.sent + now {
                self.wire.push(pattern(self.role, stream.id, at));
            }
            stream.app.sent += now;
            if last {
                return;
            }
        }
    }

    fn consume(&mut self, key: usize, bytes: usize, limit: u32) {
        let Some(stream) = self.session.get_mut(key) else { return };
        let bytes = bytes.min(stream.app.held);
        stream.app.held -= bytes;
        self.session.consumed(key, bytes, limit);
    }

    /// Reads up to `bytes` of what `other` has written.
    fn read(&mut self, other: &mut End, bytes: usize) {
        other.write_control();
        let bytes = bytes.min(other.wire.len());
        let input: Vec<u8> = other.wire.drain(..bytes).collect();
        let mut events = Vec::new();
        // As if it was in the middle of a larger buffer.
        let base = bytes % 17;
        self.session.receive(&input, base, &mut events, Model::default).unwrap();
        for event in events {
            match event {
                Event::Data { key, range } => {
                    let stream = self.session.get_mut(key).unwrap();
                    assert!(!stream.app.ended && !stream.app.reset);
                    for byte in &input[range.start - base..range.end - base] {
                        assert_eq!(
                            *byte,
                            pattern(other.role, stream.id, stream.app.received),
                            "each byte once, in order"
                        );
                        stream.app.received += 1;
                        stream.app.held += 1;
                    }
                }
                Event::End { key } => {
                    let stream = self.session.get_mut(key).unwrap();
                    assert!(!std::mem::replace(&mut stream.app.ended, true), "one end");
                    let id = stream.id;
                    let sent = other.session.by_id.get(&id).map(|key| other.session.get(*key).unwrap().app.sent);
                    assert!(sent.is_none_or(|sent| sent == stream.app.received), "the end comes last");
                }
                Event::Reset { key, .. } => {
                    assert!(!std::mem::replace(&mut self.session.get_mut(key).unwrap().app.reset, true), "one reset");
                }
                Event::Request { key, request } => {
                    assert!(request.is_ok() && !self.session.get(key).unwrap().answered);
                }
                Event::Answer { status, .. } => assert_eq!(status, 200),
                Event::Unprocessed { .. } => panic!("nobody says so"),
                Event::Room { .. } | Event::RoomForAll | Event::Settled | Event::Pong | Event::GoAway => {}
            }
        }
    }

    /// Removes streams that are over.
    fn sweep(&mut self) {
        for key in self.session.keys() {
            if self.session.get(key).is_some_and(Stream::is_over) {
                self.session.remove(key).unwrap();
            }
        }
    }
}

/// What one step of the test does. Numbers choose among what is there.
#[derive(Clone, Debug)]
enum Step {
    Open,
    Answer(usize),
    Send(bool, usize, usize, bool),
    Consume(bool, usize, usize, u32),
    Reset(bool, usize),
    Ping(bool),
    Read(bool, usize),
    Sweep(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![0usize..30, 0usize..70_000, 16_300usize..16_500];
    prop_oneof![
        2 => Just(Step::Open),
        3 => (0usize..50).prop_map(Step::Answer),
        6 => (any::<bool>(), 0usize..50, size(), prop::bool::weighted(0.1)).prop_map(|(a, b, c, d)| Step::Send(a, b, c, d)),
        6 => (any::<bool>(), 0usize..50, size(), 1000u32..300_000).prop_map(|(a, b, c, d)| Step::Consume(a, b, c, d)),
        1 => (any::<bool>(), 0usize..50).prop_map(|(a, b)| Step::Reset(a, b)),
        1 => any::<bool>().prop_map(Step::Ping),
        12 => (any::<bool>(), size()).prop_map(|(a, b)| Step::Read(a, b)),
        1 => any::<bool>().prop_map(Step::Sweep),
    ]
}

fn run(steps: Vec<Step>) {
    let (mut client, mut server) = (End::new(Role::Client), End::new(Role::Server));
    let pick = |end: &End, number: usize| {
        let keys = end.session.keys();
        keys.get(number % keys.len().max(1)).copied()
    };
    for step in steps {
        match step {
            Step::Open if client.session.len() < 100 => {
                client.session.open(&connect(), Model::default()).unwrap();
            }
            Step::Open => {}
            Step::Answer(number) => {
                if let Some(key) = pick(&server, number) {
                    server.session.answer(key, 200, Some("k8s.namespace.name=a"), false);
                }
            }
            Step::Send(at_client, number, bytes, end) => {
                let side = if at_client { &mut client } else { &mut server };
                if let Some(key) = pick(side, number) {
                    side.send(key, bytes, end);
                }
            }
            Step::Consume(at_client, number, bytes, limit) => {
                let side = if at_client { &mut client } else { &mut server };
                if let Some(key) = pick(side, number) {
                    side.consume(key, bytes, limit);
                }
            }
            Step::Reset(at_client, number) => {
                let side = if at_client { &mut client } else { &mut server };
                if let Some(key) = pick(side, number) {
                    side.session.reset(key, ErrorCode::CANCEL);
                    if let Some(stream) = side.session.get_mut(key) {
                        stream.app.reset = true;
                    }
                }
            }
            Step::Ping(at_client) => if at_client { &mut client } else { &mut server }.session.ping(),
            Step::Read(true, bytes) => client.read(&mut server, bytes),
            Step::Read(false, bytes) => server.read(&mut client, bytes),
            Step::Sweep(at_client) => if at_client { &mut client } else { &mut server }.sweep(),
        }
        for session in [&client.session, &server.session] {
            assert!(session.by_id.len() == session.len() && session.remembered.len() <= REMEMBERED_MAX);
        }
    }
    finish(&mut client, &mut server);
}

/// Lets both sides end every stream, and checks that nothing is left.
fn finish(client: &mut End, server: &mut End) {
    for _ in 0..10 {
        client.read(server, usize::MAX);
        server.read(client, usize::MAX);
        for end in [&mut *client, &mut *server] {
            for key in end.session.keys() {
                end.session.answer(key, 200, None, false);
                end.consume(key, usize::MAX, 65_535);
                end.send(key, 0, true);
            }
        }
    }
    for end in [client, server] {
        for (_, stream) in &end.session.streams {
            assert!(stream.is_over(), "{stream:?}");
            assert!(stream.app.reset || stream.app.ended || end.session.remembered.contains(&stream.id));
        }
        end.sweep();
        assert_eq!((end.session.len(), end.session.by_id.len(), end.wire.len()), (0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_interleaving_delivers_each_byte_once_and_in_order(steps in prop::collection::vec(step(), 1..150)) {
        run(steps);
    }
}

/// What a side may still send, and what the other one lets arrive.
fn windows(sender: &End, receiver: &End) -> (i64, i64) {
    (sender.session.send_window, receiver.session.receive.parts().0.into())
}

#[test]
fn a_million_streams_leave_nothing_behind() {
    let (mut client, mut server) = (End::new(Role::Client), End::new(Role::Server));
    client.read(&mut server, usize::MAX);
    server.read(&mut client, usize::MAX);
    client.read(&mut server, usize::MAX);
    let mut capacity = 0;
    // What the engine does for a stream, without checking each byte, because there are many.
    for count in 0..1_000_000 {
        let id = 2 * count + 1;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let key = client.session.open(&connect(), Model::default()).unwrap();
        up.append(client.session.control());
        up.extend(client.session.data_head(key, 10, true));
        up.extend([0; 10]);
        let mut events = Vec::new();
        server.session.receive(&up, 0, &mut events, Model::default).unwrap();
        assert!(matches!(events[..], [Event::Request { .. }, Event::Data { .. }, Event::End { .. }]), "{events:?}");
        let far = server.session.by_id[&id];
        server.session.answer(far, 200, None, false);
        down.append(server.session.control());
        down.extend(server.session.data_head(far, 5, true));
        down.extend([0; 5]);
        server.session.consumed(far, 10, 65_535);
        server.session.remove(far).unwrap();
        events.clear();
        client.session.receive(&down, 0, &mut events, Model::default).unwrap();
        assert!(matches!(events[..], [Event::Answer { .. }, Event::Data { .. }, Event::End { .. }]), "{events:?}");
        client.session.consumed(key, 5, 65_535);
        client.session.remove(key).unwrap();
        if count == 1000 {
            capacity = server.session.by_id.capacity();
        }
    }
    client.read(&mut server, usize::MAX);
    server.read(&mut client, usize::MAX);
    for (one, two) in [(&client, &server), (&server, &client)] {
        let (sends, takes) = windows(one, two);
        assert_eq!(sends, takes, "no byte of the connection's window is lost");
        let (open, held, size) = two.session.receive.parts();
        assert!(held == 0 && open >= size / 2 && size >= 65_535, "{open} {held} {size}");
        assert_eq!((one.session.len(), one.session.by_id.len(), one.session.remembered.len()), (0, 0, 0));
        assert!(one.session.control.len() < HEAD_LEN && one.session.reader.held() <= 1024);
    }
    assert_eq!(server.session.by_id.capacity(), capacity);
}
