//! A session in either role against the h2 crate, in memory.

use super::*;
use crate::hbone::testing::spawn;
use bytes::Bytes;
use http::{Method, Request, Response};
use proptest::prelude::*;
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// What happens on one stream.
#[derive(Clone, Debug)]
struct Plan {
    /// Bytes to h2, and from it.
    there: usize,
    back: usize,
    /// h2 gives window back in pieces of this size at least.
    release: usize,
    /// This side passes on what arrived in pieces of this size.
    consume: usize,
    /// Who resets the stream instead of ending it, if somebody does.
    reset: Option<bool>,
}

/// How the bytes arrive, and what h2 changes meanwhile.
#[derive(Clone, Debug)]
struct Weather {
    /// Sizes of the pieces that are read, again and again.
    pieces: Vec<usize>,
    /// Initial windows that h2 announces one after the other.
    windows: Vec<u32>,
    /// Window of the whole connection at h2.
    connection: u32,
}

fn plan() -> impl Strategy<Value = Plan> {
    let size = || prop_oneof![Just(0usize), 1usize..100, 1usize..200_000];
    let reset = prop_oneof![4 => Just(None), 1 => any::<bool>().prop_map(Some)];
    // Smaller steps only make more window updates than a peer may send.
    (size(), size(), 100usize..40_000, 200usize..40_000, reset)
        .prop_map(|(there, back, release, consume, reset)| Plan { there, back, release, consume, reset })
}

fn weather() -> impl Strategy<Value = Weather> {
    let pieces = prop::collection::vec(prop_oneof![1usize..20, 1usize..70_000], 1..8);
    let windows = prop::collection::vec(prop_oneof![Just(0u32), 1u32..100_000], 0..5);
    (pieces, windows, 65_535u32..1_000_000).prop_map(|(pieces, windows, connection)| Weather {
        pieces,
        windows,
        connection,
    })
}

fn pattern(stream: usize, at: usize) -> u8 {
    u8::try_from((at * 3 + at / 256 + stream * 17) % 251).unwrap()
}

fn bytes(stream: usize, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| pattern(stream, at)).collect()
}

/// The h2 side of one stream: sends and receives by plan at the same time.
async fn exchange(index: usize, plan: Plan, mut send: h2::SendStream<Bytes>, mut receive: h2::RecvStream) {
    let sending = async {
        let mut sent = 0;
        while sent < plan.back {
            send.reserve_capacity(plan.back - sent);
            let Some(capacity) = std::future::poll_fn(|context| send.poll_capacity(context)).await else { return };
            let Ok(capacity) = capacity else { return };
            let now = capacity.min(plan.back - sent);
            if send.send_data(bytes(index, sent, now).into(), false).is_err() {
                return;
            }
            sent += now;
        }
        if plan.reset == Some(true) {
            send.send_reset(h2::Reason::CONNECT_ERROR);
        } else {
            let _ = send.send_data(Bytes::new(), true);
        }
    };
    let receiving = async {
        let (mut received, mut unreleased) = (0, 0);
        while let Some(Ok(data)) = receive.data().await {
            assert_eq!(data, bytes(index, received, data.len()), "each byte once and in order");
            received += data.len();
            unreleased += data.len();
            if unreleased >= plan.release.clamp(100, 1000) {
                let _ = receive.flow_control().release_capacity(std::mem::take(&mut unreleased));
            }
        }
        if plan.reset.is_none() {
            assert_eq!(received, plan.there, "all of it");
        }
    };
    tokio::join!(sending, receiving);
}

/// What this side knows of a stream.
#[derive(Debug, Default)]
struct Ours {
    index: usize,
    sent: usize,
    received: usize,
    held: usize,
    ended: bool,
    reset: Option<ErrorCode>,
}

/// This side of the connection.
struct Side {
    session: Session<Ours>,
    io: DuplexStream,
    plans: Arc<Vec<Plan>>,
    weather: Weather,
    opened: usize,
    done: usize,
}

impl Side {
    fn new(role: Role, io: DuplexStream, plans: Arc<Vec<Plan>>, weather: Weather) -> Self {
        Self { session: Session::new(role, &CONFIG), io, plans, weather, opened: 0, done: 0 }
    }

    /// Runs until all streams are over.
    async fn run(mut self) {
        for turn in 0.. {
            if self.session.role == Role::Client {
                while self.opened < self.plans.len() && self.session.len() < 3 && self.session.is_settled() {
                    self.session.open(&connect(), Ours { index: self.opened, ..Ours::default() }).unwrap();
                    self.opened += 1;
                }
            }
            // Not without end: nobody may be owed more answers than control frames are allowed at once.
            if turn % 5 == 4 && turn < 20_000 {
                self.session.ping();
            }
            let mut out = std::mem::take(self.session.control());
            let mut more = false;
            for key in self.session.keys() {
                more |= self.send(key, &mut out);
            }
            out.append(self.session.control());
            if self.done == self.plans.len() {
                self.session.go_away();
                out.append(self.session.control());
                let _ = self.io.write_all(&out).await;
                return self.leave().await;
            }
            // An h2 client that has everything leaves although this side has not read everything.
            let _ = self.io.write_all(&out).await;
            let mut input = vec![0; self.weather.pieces[turn % self.weather.pieces.len()]];
            let length = tokio::select! {
                biased;
                length = self.io.read(&mut input) => length.unwrap(),
                () = tokio::task::yield_now(), if more => continue,
            };
            assert!(length > 0, "h2 gave up");
            self.take(&input[..length]);
        }
    }

    /// Answers PINGs until h2 has closed the connection.
    async fn leave(mut self) {
        assert_eq!((self.session.len(), self.session.by_id.len()), (0, 0));
        let mut input = vec![0; 1000];
        while let Ok(length) = self.io.read(&mut input).await
            && length > 0
        {
            self.take(&input[..length]);
            if self.io.write_all(&std::mem::take(self.session.control())).await.is_err() {
                return;
            }
        }
    }

    /// Sends and passes on a little. Returns whether there was something.
    fn send(&mut self, key: usize, out: &mut Vec<u8>) -> bool {
        let room = self.session.room(key);
        let Some(stream) = self.session.get_mut(key) else { return false };
        let mut some = false;
        let plan = self.plans[stream.app.index].clone();
        if stream.answered && !stream.local_ended {
            let left = plan.there - stream.app.sent;
            let now = room.min(left).min(10_000);
            some = now > 0 || left == 0;
            if plan.reset == Some(false) && now == left {
                self.session.reset(key, ErrorCode::CONNECT_ERROR);
            } else if now > 0 || left == 0 {
                let (index, sent) = (stream.app.index, stream.app.sent);
                stream.app.sent += now;
                out.extend(self.session.data_head(key, now, now == left));
                out.extend(bytes(index, sent, now));
            }
        }
        let stream = self.session.get_mut(key).unwrap();
        let now = stream.app.held.min(plan.consume);
        stream.app.held -= now;
        if stream.is_over() {
            let app = self.session.remove(key).unwrap();
            match (plan.reset, app.reset) {
                (None, None) => assert_eq!((app.sent, app.received, app.ended), (plan.there, plan.back, true)),
                // h2 may drop what it has queued when it resets.
                (Some(true), Some(code)) => assert_eq!(code, ErrorCode::CONNECT_ERROR),
                (Some(_), None) => {}
                other => panic!("{other:?}"),
            }
            self.done += 1;
            some = true;
        } else if now > 0 {
            self.session.consumed(key, now, 100_000);
        }
        some || now > 0
    }

    fn take(&mut self, input: &[u8]) {
        let mut events = Vec::new();
        let opened = &mut self.opened;
        let app = || {
            *opened += 1;
            Ours { index: *opened - 1, ..Ours::default() }
        };
        self.session.receive(input, 0, &mut events, app).unwrap();
        for event in events {
            match event {
                Event::Request { key, request } => {
                    assert_eq!(request.unwrap(), connect());
                    self.session.answer(key, 200, None, false);
                }
                Event::Answer { status, .. } => assert_eq!(status, 200),
                Event::Data { key, range } => {
                    let app = &mut self.session.get_mut(key).unwrap().app;
                    assert_eq!(input[range.clone()], bytes(app.index, app.received, range.len()));
                    app.received += range.len();
                    app.held += range.len();
                }
                Event::End { key } => self.session.get_mut(key).unwrap().app.ended = true,
                Event::Reset { key, code } => self.session.get_mut(key).unwrap().app.reset = Some(code),
                Event::Unprocessed { key } => panic!("{key}"),
                Event::Room { .. } | Event::RoomForAll | Event::Settled | Event::Pong | Event::GoAway => {}
            }
        }
    }
}

/// Drives `connection`, and lets it announce a window now and then.
async fn drive<C: Future + Unpin>(
    mut connection: C,
    windows: Vec<u32>,
    set: impl Fn(&mut C, u32) -> bool,
) -> C::Output {
    let mut windows = windows.into_iter().chain([65_535]).peekable();
    let mut polls = 0;
    std::future::poll_fn(|context| {
        polls += 1;
        // Refused while the last change is not acknowledged.
        if polls % 3 == 0 && windows.peek().is_some_and(|window| set(&mut connection, *window)) {
            windows.next();
        }
        let polled = Pin::new(&mut connection).poll(context);
        if windows.peek().is_some() && polled.is_pending() && polls < 10_000 {
            let waker = context.waker().clone();
            // A window of 0 must not be the last one.
            spawn(async move {
                tokio::task::yield_now().await;
                waker.wake();
            });
        }
        polled
    })
    .await
}

async fn h2_server(io: DuplexStream, plans: Arc<Vec<Plan>>, weather: Weather) {
    let mut builder = h2::server::Builder::new();
    builder.initial_connection_window_size(weather.connection);
    let mut connection = builder.handshake::<_, Bytes>(io).await.unwrap();
    let mut windows = weather.windows.into_iter().chain([65_535]).peekable();
    let (mut index, mut tasks) = (0, Vec::new());
    loop {
        if windows.peek().is_some_and(|window| connection.set_initial_window_size(*window).is_ok()) {
            windows.next();
        }
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = tokio::task::yield_now(), if windows.peek().is_some() => continue,
        };
        let Some(Ok((request, mut respond))) = accepted else { break };
        assert_eq!((request.method(), request.uri().to_string()), (&Method::CONNECT, "10.0.0.1:80".to_owned()));
        let send = respond.send_response(Response::new(()), false).unwrap();
        let plan = plans[index].clone();
        tasks.push(spawn(exchange(index, plan, send, request.into_body())));
        index += 1;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(index, plans.len());
}

async fn h2_client(io: DuplexStream, plans: Arc<Vec<Plan>>, weather: Weather) {
    let mut builder = h2::client::Builder::new();
    builder.initial_connection_window_size(weather.connection);
    let (client, connection) = builder.handshake::<_, Bytes>(io).await.unwrap();
    let driver = spawn(drive(connection, weather.windows, |connection, window| {
        connection.set_initial_window_size(window).is_ok()
    }));
    let mut tasks = Vec::new();
    for (index, plan) in plans.iter().cloned().enumerate() {
        let mut client = client.clone().ready().await.unwrap();
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let (answer, send) = client.send_request(request, false).unwrap();
        tasks.push(spawn(async move {
            let answer = answer.await.unwrap();
            exchange(index, plan, send, answer.into_body()).await;
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    drop(client);
    driver.await.unwrap().unwrap();
}

fn run(role: Role, plans: Vec<Plan>, weather: Weather) {
    let plans = Arc::new(plans);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let (ours, theirs) = duplex(1 << 20);
        let side = spawn(Side::new(role, ours, plans.clone(), weather.clone()).run());
        match role {
            Role::Client => h2_server(theirs, plans, weather).await,
            Role::Server => h2_client(theirs, plans, weather).await,
        }
        side.await.unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_client_and_h2_exchange_every_byte(plans in prop::collection::vec(plan(), 1..8), weather in weather()) {
        run(Role::Client, plans, weather);
    }

    #[test]
    fn a_server_and_h2_exchange_every_byte(plans in prop::collection::vec(plan(), 1..8), weather in weather()) {
        run(Role::Server, plans, weather);
    }
}
