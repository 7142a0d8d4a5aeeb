//! An engine against the h2 crate as client and as server.

use super::*;
use crate::hbone::codec::frame::ErrorCode;
use crate::hbone::testing::end_and_plain;
use ::bytes::Bytes;
use http::{Method, Request, Response};
use proptest::prelude::*;

/// Bytes in both directions, and the way to the end: in order, h2 resets, or the application breaks.
type Plan = (usize, usize, u8);

fn plan() -> impl Strategy<Value = Plan> {
    let size = || prop_oneof![Just(0usize), 1usize..100, 1usize..200_000];
    // What is still in the application's own socket is lost with a reset.
    let end = prop_oneof![3 => Just(0u8), 1 => Just(1u8), 1 => Just(2u8)];
    (size(), size(), end).prop_map(|(one, two, end)| (one, if end == 2 { two.min(30_000) } else { two }, end))
}

/// The h2 side of a stream.
async fn h2_side(seed: usize, plan: Plan, mut send: h2::SendStream<Bytes>, mut receive: h2::RecvStream) {
    let (from_h2, to_h2, end) = plan;
    let sending = async {
        let mut sent = 0;
        while sent < from_h2 {
            send.reserve_capacity(from_h2 - sent);
            let Some(Ok(room)) = std::future::poll_fn(|context| send.poll_capacity(context)).await else { return };
            let now = room.min(from_h2 - sent);
            if send.send_data(bytes(seed, sent, now).into(), false).is_err() {
                return;
            }
            sent += now;
        }
        match end {
            0 => drop(send.send_data(Bytes::new(), true)),
            1 => send.send_reset(h2::Reason::CANCEL),
            _ => {}
        }
    };
    let receiving = async {
        let mut received = 0;
        loop {
            match receive.data().await {
                Some(Ok(data)) => {
                    assert_eq!(data, bytes(seed + 1, received, data.len()), "each byte once and in order");
                    received += data.len();
                    let _ = receive.flow_control().release_capacity(data.len());
                }
                Some(Err(error)) if end == 2 => {
                    assert_eq!((error.reason(), received), (Some(h2::Reason::CONNECT_ERROR), to_h2));
                    return;
                }
                Some(Err(_)) if end == 1 => return,
                None if end == 1 => return,
                None => return assert_eq!((received, end), (to_h2, 0)),
                Some(Err(error)) => panic!("{error:?}"),
            }
        }
    };
    tokio::join!(sending, receiving);
}

/// The application's side of a stream.
async fn app_side(seed: usize, plan: Plan, side: Side) {
    let (from_h2, to_h2, end) = plan;
    let Side { mut app, ended, .. } = side;
    if end == 2 {
        write(&mut app, seed + 1, to_h2, 10_000).await;
        // Read before, or what h2 has sent makes the reset an ordinary one.
        let mut all = vec![0; from_h2];
        app.read_exact(&mut all).await.unwrap();
        socket2::SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
        drop(app);
        let ended = ended.await.unwrap();
        assert!(matches!(ended.result, Err(CarryError::App(_))), "{ended:?}");
        return;
    }
    let (mut reader, mut writer) = app.split();
    let sending = async {
        for at in (0..to_h2).step_by(10_000) {
            if writer.write_all(&bytes(seed + 1, at, 10_000.min(to_h2 - at))).await.is_err() {
                return;
            }
        }
        if end == 0 {
            writer.shutdown().await.unwrap();
        }
    };
    let ending = async {
        let mut ended = ended.await.unwrap();
        let rest: Vec<u8> = ended.rest.take().flatten().collect();
        match end {
            0 => assert!(ended.result.is_ok() && rest.is_empty(), "{ended:?}"),
            _ => assert!(matches!(ended.result, Err(CarryError::Reset(ErrorCode::CANCEL))), "{ended:?}"),
        }
        // The reading below ends with it.
        let _ = ended.app.shutdown(std::net::Shutdown::Both);
        rest
    };
    let reading = async {
        let mut all = Vec::new();
        let _ = reader.read_to_end(&mut all).await;
        all
    };
    let ((), rest, mut all) = tokio::join!(sending, ending, reading);
    all.extend(rest);
    // h2 drops what it has queued when it resets.
    assert!(all == bytes(seed, 0, all.len()) && (all.len() == from_h2 || end == 1));
}

async fn h2_client(plans: Vec<Plan>) {
    let (end, plain) = end_and_plain().await;
    let engine = start_engine(&CONFIG);
    let buffers = Buffers::new(1 << 30);
    let account = buffers.account("peer");
    let (sender, mut streams) = mpsc::unbounded_channel();
    let server = spawn(accept_all(Server::start(&engine, end, &CONFIG, &account).unwrap(), sender));
    let (client, connection) = h2::client::handshake(plain).await.unwrap();
    let driver = spawn(connection);
    let mut tasks = Vec::new();
    for (index, plan) in plans.into_iter().enumerate() {
        let mut client = client.clone().ready().await.unwrap();
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let (answer, send) = client.send_request(request, false).unwrap();
        let side = carry(streams.recv().await.unwrap(), SILENCE).await;
        tasks.push(spawn(app_side(2 * index, plan, side)));
        tasks.push(spawn(async move { h2_side(2 * index, plan, send, answer.await.unwrap().into_body()).await }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    drop(client);
    driver.await.unwrap().unwrap();
    // The plain end knows no `close_notify`.
    assert!(matches!(server.await.unwrap(), Ok(()) | Err(TunnelError::Io(_))));
    assert!(engine.shared.inner.lock().tunnels.is_empty());
    assert_eq!(account.bytes(), 0);
}

async fn h2_server(plans: Vec<Plan>) {
    let (end, plain) = end_and_plain().await;
    let engine = start_engine(&CONFIG);
    let buffers = Buffers::new(1 << 30);
    let account = buffers.account("peer");
    let (tunnel, driver) = client::start(&engine, end, &CONFIG, &account).unwrap();
    let driver = spawn(async move { driver.run().await });
    let far_plans = plans.clone();
    let far = spawn(async move {
        let mut connection = h2::server::handshake(plain).await.unwrap();
        let mut tasks = Vec::new();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let send = respond.send_response(Response::new(()), false).unwrap();
            let index = tasks.len();
            tasks.push(spawn(h2_side(2 * index, far_plans[index], send, request.into_body())));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
    let mut tasks = Vec::new();
    for (index, plan) in plans.into_iter().enumerate() {
        let side = carry(tunnel.open(&connect()).await.unwrap(), SILENCE).await;
        tasks.push(spawn(app_side(2 * index, plan, side)));
    }
    for task in tasks {
        task.await.unwrap();
    }
    drop(tunnel);
    driver.await.unwrap().unwrap();
    far.await.unwrap();
    assert!(engine.shared.inner.lock().tunnels.is_empty());
    assert_eq!(account.bytes(), 0);
}

fn run(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_server_carries_what_an_h2_client_sends(plans in prop::collection::vec(plan(), 1..6)) {
        run(h2_client(plans));
    }

    #[test]
    fn a_client_carries_what_an_h2_server_sends(plans in prop::collection::vec(plan(), 1..6)) {
        run(h2_server(plans));
    }
}
