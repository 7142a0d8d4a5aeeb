//! Connections that do not end in order, and tunnels that end.

use super::*;
use crate::hbone::codec::frame::ErrorCode;
use crate::hbone::cut::CutReason;
use std::os::fd::AsRawFd;

/// Closes a socket with a reset.
fn break_off(app: App) {
    socket2::SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
}

#[tokio::test]
async fn a_reset_arrives_behind_what_was_sent_before_it() {
    for (at_near, length) in [(true, 0), (true, 10), (true, 300_000), (false, 10), (false, 300_000)] {
        let mut pair = pair(1 << 30).await;
        let (near, far) = pair.connection(SILENCE).await;
        let (from, to) = if at_near { (near, far) } else { (far, near) };
        let (Side { mut app, ended, .. }, mut to) = (from, to);
        // What is still in the application's own socket is lost with a reset, so the reader must be near the end.
        let before = length - length.min(30_000);
        let mut first = vec![0; before];
        let writing = write(&mut app, 1, length, 10_000);
        let (_, read) = tokio::join!(writing, to.app.read_exact(&mut first));
        read.unwrap();
        break_off(app);
        let (from_ended, (rest, to_ended)) = tokio::join!(ended, arrived(to));
        let (from_ended, all) = (from_ended.unwrap(), [first, rest].concat());
        assert!(all == bytes(1, 0, length), "{} of {length}", all.len());
        assert!(matches!(from_ended.result, Err(CarryError::App(_))), "{from_ended:?}");
        assert!(matches!(to_ended.result, Err(CarryError::Reset(ErrorCode::CONNECT_ERROR))), "{to_ended:?}");
        drop((from_ended, to_ended));
        pair.finish().await;
    }
}

/// Keeps the stopped clock from advancing by itself while bytes are in the sockets.
fn hold_the_clock() {
    spawn(async {
        loop {
            tokio::task::yield_now().await;
        }
    });
}

/// Lets everything happen that can happen now.
async fn settle() {
    for _ in 0..3000 {
        tokio::task::yield_now().await;
    }
}

/// Whether something is true of the only stream of a tunnel.
fn is_so(end: &End, check: impl Fn(&Session<crate::hbone::engine::App>, usize) -> bool) -> bool {
    let inner = end.engine.shared.inner.lock();
    let (_, entry) = inner.tunnels.iter().next().unwrap();
    entry.tunnel.session.keys().into_iter().all(|key| check(&entry.tunnel.session, key))
}

/// Writes until nothing more fits anywhere: the window is closed, and bytes wait at both ends.
async fn fill(app: &App, pair: &Pair) -> usize {
    let mut written = 0;
    loop {
        let closed = is_so(&pair.near, |session, key| session.room(key) == 0)
            && is_so(&pair.far, |session, key| session.get(key).is_some_and(|stream| !stream.app.backlog.is_empty()));
        match app.try_write(&bytes(1, written, 60_000)) {
            Ok(length) => written += length,
            Err(_) if closed => return written,
            Err(_) => settle().await,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_breaks_behind_a_closed_window_is_given_up() {
    let mut pair = pair(1 << 30).await;
    hold_the_clock();
    let (mut near, far) = pair.connection(SILENCE).await;
    let written = fill(&near.app, &pair).await;
    break_off(near.app);
    let is_noticed = |stream: &Carried| stream.giving_up;
    while !is_so(&pair.near, |session, key| {
        session.get(key).and_then(|stream| stream.app.carried.as_deref()).is_some_and(is_noticed)
    }) {
        tokio::task::yield_now().await;
    }
    tokio::time::advance(crate::sys::leg::LAST_BYTES - Duration::from_millis(10)).await;
    settle().await;
    assert!(near.ended.try_recv().is_err(), "the peer may still take the rest");
    tokio::time::advance(Duration::from_millis(20)).await;
    let ended = near.ended.await.unwrap();
    assert!(matches!(ended.result, Err(CarryError::App(_))), "{ended:?}");
    let (all, far_ended) = arrived(far).await;
    assert!(matches!(far_ended.result, Err(CarryError::Reset(ErrorCode::CONNECT_ERROR))), "{far_ended:?}");
    assert!(!all.is_empty() && all.len() < written && all == bytes(1, 0, all.len()));
    drop((ended, far_ended));
    pair.finish().await;
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_connection_may_be_silent_only_so_long() {
    let mut pair = pair(1 << 30).await;
    hold_the_clock();
    let (mut near, mut far) = pair.connection(Duration::from_secs(5)).await;
    near.app.shutdown().await.unwrap();
    assert_eq!(far.app.read(&mut [0; 10]).await.unwrap(), 0);
    tokio::time::advance(Duration::from_secs(3)).await;
    far.app.write_all(b"x").await.unwrap();
    assert_eq!(near.app.read(&mut [0; 10]).await.unwrap(), 1);
    for wait in [2100, 4800] {
        tokio::time::advance(Duration::from_millis(wait)).await;
        settle().await;
        assert!(near.ended.try_recv().is_err(), "something was carried meanwhile");
    }
    tokio::time::advance(Duration::from_millis(300)).await;
    let ended = near.ended.await.unwrap();
    assert!(matches!(ended.result, Err(CarryError::HalfClosedSilence(_))), "{ended:?}");
}

#[tokio::test]
async fn a_connection_that_is_told_to_stop_ends_at_both_sides() {
    for at_near in [true, false] {
        let mut pair = pair(1 << 30).await;
        let (near, far) = pair.connection(SILENCE).await;
        let (one, two) = if at_near { (near, far) } else { (far, near) };
        one.stopper.stop();
        one.stopper.stop();
        let (one, two) = (one.ended.await.unwrap(), two.ended.await.unwrap());
        assert!(matches!(one.result, Err(CarryError::Stopped)), "{one:?}");
        assert!(matches!(two.result, Err(CarryError::Reset(ErrorCode::CANCEL))), "{two:?}");
        pair.finish().await;
    }
}

#[tokio::test]
async fn a_stopper_does_not_stop_a_later_connection() {
    let mut pair = pair(1 << 30).await;
    let (near, far) = pair.connection(SILENCE).await;
    let old = near.stopper.clone();
    drop((near.app, far.app));
    near.ended.await.unwrap();
    far.ended.await.unwrap();
    let (mut near, mut far) = pair.connection(SILENCE).await;
    assert_eq!(old_key(&old), old_key(&near.stopper), "or the test shows nothing");
    old.stop();
    near.app.write_all(b"hello").await.unwrap();
    let mut got = [0; 5];
    far.app.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
}

/// The key of a stopper's stream, from its description.
fn old_key(stopper: &Stopper) -> String {
    let text = format!("{stopper:?}");
    let at = text.find("key: ").unwrap();
    text[at..].split(',').next().unwrap().to_owned()
}

#[tokio::test]
async fn connections_end_with_their_tunnel() {
    for at_near in [true, false] {
        let mut pair = pair(1 << 30).await;
        let (mut near, far) = pair.connection(SILENCE).await;
        near.app.write_all(b"last words").await.unwrap();
        let mut first = [0; 1];
        let mut far = far;
        far.app.read_exact(&mut first).await.unwrap();
        if at_near { &pair.near.task } else { &pair.far.task }.abort();
        let (near, (all, far)) = tokio::join!(near.ended, arrived(far));
        let near = near.unwrap();
        assert_eq!(all, b"ast words");
        let (own, other) = if at_near { (&near, &far) } else { (&far, &near) };
        assert!(matches!(&own.result, Err(CarryError::Tunnel(_))), "{own:?}");
        assert!(matches!(&other.result, Err(CarryError::Reset(ErrorCode::CANCEL))), "{other:?}");
        drop((near, far));
        let Pair { near, far, .. } = pair;
        let (near_ended, far_ended) = tokio::join!(near.task, far.task);
        let other = if at_near { far_ended } else { near_ended };
        assert!(other.unwrap().is_ok(), "closed in order");
        assert_eq!((near.account.bytes(), far.account.bytes()), (0, 0));
        assert!(
            near.engine.shared.inner.lock().tunnels.is_empty() && far.engine.shared.inner.lock().tunnels.is_empty()
        );
    }
}

#[tokio::test]
async fn a_tunnel_that_holds_too_much_is_cut() {
    let mut pair = pair(100_000).await;
    let mut sides = Vec::new();
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let (mut near, far) = pair.connection(SILENCE).await;
        sides.push((near.ended, far));
        // Nobody reads at the other end.
        tasks.push(spawn(async move { while near.app.write_all(&[0; 60_000]).await.is_ok() {} }));
    }
    let error = (&mut pair.far.task).await.unwrap().unwrap_err();
    assert!(matches!(error, TunnelError::Cut(CutReason::Memory)), "{error:?}");
    for (near, far) in sides {
        let far = far.ended.await.unwrap();
        assert!(matches!(far.result, Err(CarryError::Cut(_))), "{far:?}");
        let near = near.await.unwrap();
        assert!(matches!(near.result, Err(CarryError::Tunnel(_) | CarryError::App(_))), "{near:?}");
    }
    assert!((&mut pair.near.task).await.unwrap().is_err());
    pair.near.assert_empty();
    pair.far.assert_empty();
    tasks.into_iter().for_each(|task| task.abort());
}

/// The open sockets of this process, by inode.
fn open_inodes() -> Vec<String> {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.display().to_string())).collect()
}

fn inode(socket: &impl AsRawFd) -> String {
    std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap().display().to_string()
}

#[tokio::test]
async fn no_descriptor_stays_open() {
    let mut pair = pair(1 << 30).await;
    let mut inodes = Vec::new();
    for end in [&pair.near, &pair.far] {
        inodes.extend(end.engine.shared.inner.lock().tunnels.iter().map(|(_, entry)| inode(&entry.tunnel.socket)));
    }
    let mut sides = Vec::new();
    for _ in 0..10 {
        let (near, far) = pair.connection(SILENCE).await;
        sides.push((near, far));
    }
    for end in [&pair.near, &pair.far] {
        let inner = end.engine.shared.inner.lock();
        let (_, entry) = inner.tunnels.iter().next().unwrap();
        for key in entry.tunnel.session.keys() {
            let stream = entry.tunnel.session.get(key).unwrap();
            inodes.push(inode(&stream.app.carried.as_ref().unwrap().socket));
        }
    }
    assert_eq!(inodes.len(), 22);
    for (index, (near, far)) in sides.into_iter().enumerate() {
        match index % 3 {
            0 => drop((near.app, far.app)),
            1 => break_off(near.app),
            _ => near.stopper.stop(),
        }
        drop((near.ended.await.unwrap(), far.ended.await.unwrap()));
    }
    pair.finish().await;
    let open = open_inodes();
    let left: Vec<_> = inodes.iter().filter(|inode| open.contains(inode)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn what_is_cut_is_no_orderly_end_for_an_application() {
    let mut pair = pair(1 << 30).await;
    let (near, mut far) = pair.connection(SILENCE).await;
    pair.far.engine.cut();
    let error = far.app.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(far.ended.await.is_err(), "its owner is dropped without a word");
    drop(near);
}

/// Makes the buffers between two sockets small.
fn make_narrow(from: &impl std::os::fd::AsFd, to: &impl std::os::fd::AsFd) {
    socket2::SockRef::from(from).set_send_buffer_size(4096).unwrap();
    socket2::SockRef::from(to).set_recv_buffer_size(4096).unwrap();
}

#[tokio::test]
async fn a_peer_that_takes_no_more_half_closes_also_a_connection_whose_application_does_not_read() {
    use crate::hbone::codec::frame;
    let (end, mut peer) = testing::end_and_plain().await;
    let engine = start_engine(&CONFIG);
    let buffers = Buffers::new(1 << 30);
    let (sender, mut streams) = mpsc::unbounded_channel();
    let server = Server::start(&engine, end, &CONFIG, &buffers.account("peer")).unwrap();
    spawn(accept_all(server, sender));
    let (mut bytes, mut block) = (frame::PREFACE.to_vec(), Vec::new());
    frame::settings(&[], &mut bytes);
    connect().encode(&mut block);
    frame::headers(1, &block, false, 16_384, &mut bytes);
    peer.write_all(&bytes).await.unwrap();
    let stream = streams.recv().await.unwrap();
    let (inner, app) = sockets().await;
    make_narrow(&inner, &app);
    let (sender, mut ended) = oneshot::channel();
    let probe = Probe { bytes: AtomicU64::new(0), ended: sender };
    stream.carry(inner.into_std().unwrap(), Box::new(probe), SILENCE);
    // As much as the windows allow, the end, and NO_ERROR: it takes no more.
    let mut bytes = Vec::new();
    for part in 0..4 {
        bytes.extend(frame::head(16_000, frame::DATA, if part == 3 { frame::END_STREAM } else { 0 }, 1));
        bytes.resize(bytes.len() + 16_000, 7);
    }
    frame::rst_stream(1, ErrorCode::NO_ERROR, &mut bytes);
    peer.write_all(&bytes).await.unwrap();
    let mut state = (false, false, false);
    for _ in 0..100 {
        settle().await;
        let inner = engine.shared.inner.lock();
        let (_, entry) = inner.tunnels.iter().next().unwrap();
        let key = entry.tunnel.session.keys()[0];
        let stream = entry.tunnel.session.get(key).unwrap();
        let carried = stream.app.carried.as_deref().unwrap();
        state = (!stream.app.backlog.is_empty(), carried.app_ended, carried.deadline.is_some());
        if state.1 {
            break;
        }
    }
    assert_eq!(state, (true, true, true), "bytes wait, the peer takes no more, and that has a deadline");
    assert!(ended.try_recv().is_err(), "what waits may still be read");
    drop(app);
}

#[tokio::test]
async fn connections_that_end_while_their_tunnel_cannot_be_written_leave_nothing_in_its_lists() {
    let (one, two) = testing::ends().await;
    make_narrow(&one.socket, &two.socket);
    let (near, far) = (start_engine(&CONFIG), Engine::new(&CONFIG).unwrap());
    let run = far.clone();
    let far_turns = spawn(async move { run.run().await.unwrap() });
    let (near_buffers, far_buffers) = (Buffers::new(1 << 30), Buffers::new(1 << 30));
    let (tunnel, driver) = client::start(&near, one, &CONFIG, &near_buffers.account("near")).unwrap();
    let server = Server::start(&far, two, &CONFIG, &far_buffers.account("far")).unwrap();
    let (sender, mut streams) = mpsc::unbounded_channel();
    spawn(async move { driver.run().await });
    spawn(accept_all(server, sender));
    let mut sides = Vec::new();
    for _ in 0..3 {
        let request = connect();
        let (stream, other) = tokio::join!(tunnel.open(&request), streams.recv());
        sides.push((carry(stream.unwrap(), SILENCE).await, carry(other.unwrap(), SILENCE).await));
    }
    // The first one's peer ends. From here on the peer reads nothing.
    sides[0].1.app.shutdown().await.unwrap();
    assert_eq!(sides[0].0.app.read(&mut [0; 10]).await.unwrap(), 0);
    far_turns.abort();
    // Its own last bytes and its end are in the batch that the tunnel's socket does not take.
    let app = &sides[0].0.app;
    assert_eq!(app.try_write(&[7; 60_000]).unwrap(), 60_000);
    socket2::SockRef::from(app).shutdown(std::net::Shutdown::Write).unwrap();
    let lists = || {
        let inner = near.shared.inner.lock();
        let (_, Entry { tunnel, .. }) = inner.tunnels.iter().next().unwrap();
        (!tunnel.unsent.range.is_empty(), tunnel.ending.len(), tunnel.fresh.len() + tunnel.bulk.len())
    };
    settle().await;
    assert_eq!(lists(), (true, 1, 0), "the socket is full, and one connection waits for its last bytes");
    for (side, _) in &mut sides[1..] {
        side.app.write_all(b"x").await.unwrap();
    }
    settle().await;
    assert_eq!(lists(), (true, 1, 2), "two connections wait for their turn");
    sides.iter().for_each(|(side, _)| side.stopper.stop());
    settle().await;
    assert_eq!(lists(), (true, 0, 0), "nothing is left of connections that have ended");
}
