//! What a message and a connection cost, in allocations. Both engines, the applications and the test run on one thread,
//! so these counts are for both ends of the tunnel together.

use super::*;
use crate::sys::allocations;

/// Messages of which none may allocate.
const MESSAGES: usize = 500;

/// Connections that are counted together.
const CONNECTIONS: u64 = 100;

/// Most allocations for one connection, with its end, at both ends of the tunnel. What the test itself needs for the
/// four sockets is in it. It was 30 when this was written.
const EACH: u64 = 39;

/// A message and its echo.
async fn exchange(near: &mut App, far: &mut App, message: &mut [u8]) {
    near.write_all(message).await.unwrap();
    far.read_exact(message).await.unwrap();
    far.write_all(message).await.unwrap();
    near.read_exact(message).await.unwrap();
}

#[tokio::test]
async fn a_message_allocates_nothing() {
    let mut pair = pair(1 << 30).await;
    let (mut near, mut far) = pair.connection(SILENCE).await;
    let mut message = vec![7; 1024];
    // Until buffers and lists have the size that they need.
    for _ in 0..MESSAGES {
        exchange(&mut near.app, &mut far.app, &mut message).await;
    }
    let before = allocations::count();
    for _ in 0..MESSAGES {
        exchange(&mut near.app, &mut far.app, &mut message).await;
    }
    assert_eq!(allocations::count() - before, 0, "allocations for {MESSAGES} messages and their echoes");
    drop((near, far));
}

#[tokio::test]
async fn a_connection_allocates_little() {
    let mut pair = pair(1 << 30).await;
    let mut message = vec![7; 1024];
    let mut before = 0;
    for index in 0..2 * CONNECTIONS {
        if index == CONNECTIONS {
            before = allocations::count();
        }
        let (mut near, mut far) = pair.connection(SILENCE).await;
        exchange(&mut near.app, &mut far.app, &mut message).await;
        drop((near.app, far.app));
        assert!(near.ended.await.unwrap().result.is_ok() && far.ended.await.unwrap().result.is_ok());
    }
    let each = (allocations::count() - before) / CONNECTIONS;
    assert!(each <= EACH, "{each} allocations for a connection");
    pair.finish().await;
}

#[tokio::test]
async fn an_open_connection_keeps_nothing_of_the_task_that_opened_it() {
    struct Opener;
    impl std::task::Wake for Opener {
        fn wake(self: Arc<Self>) {}
    }
    let mut pair = pair(1 << 30).await;
    let request = connect();
    let (near, far) = tokio::join!(pair.tunnel.open(&request), pair.streams.recv());
    let (near, far, opener) = (near.unwrap(), far.unwrap(), Arc::new(Opener));
    let waker = Waker::from(opener.clone());
    for stream in [&near, &far] {
        // As one that waits to learn whether its peer gives up.
        assert!(stream.poll_state(&mut Context::from_waker(&waker), |_| Poll::<()>::Pending).is_pending());
    }
    drop(waker);
    assert_eq!(Arc::strong_count(&opener), 3);
    let _open = (carry(near, SILENCE).await, carry(far, SILENCE).await);
    assert_eq!(Arc::strong_count(&opener), 1);
}
