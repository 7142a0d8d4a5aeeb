//! Many connections in one tunnel, some of whose applications do not read.

use super::*;

/// Most memory for one connection whose application does not read: its window, and what pieces of it waste.
const EACH: usize = 65_535 * 2 + 66 * 1024;

/// Memory of a tunnel whose socket is full.
const TUNNEL: usize = 400 * 1024;

async fn run(slow: usize) {
    crate::sys::limits::raise_open_files();
    let mut pair = pair(1 << 30).await;
    let (mut idle, mut fast) = (Vec::new(), Vec::new());
    for index in 0..500 {
        let (near, far) = pair.connection(SILENCE).await;
        if index < slow {
            idle.push((near, far));
        } else {
            fast.push((near, far));
        }
    }
    let mut tasks = Vec::new();
    let mut far_apps = Vec::new();
    for (near, far) in idle {
        let mut app = near.app;
        far_apps.push((far.app, near.ended, far.ended));
        tasks.push(spawn(async move { while app.write_all(&[0; 60_000]).await.is_ok() {} }));
    }
    let mut work = Vec::new();
    for (index, (near, far)) in fast.into_iter().enumerate() {
        work.push(spawn(async move {
            let (mut one, mut two) = (near.app, far.app);
            let (mut one_in, mut one_out) = one.split();
            let (mut two_in, mut two_out) = two.split();
            tokio::join!(
                async {
                    write(&mut one_out, index, 20_000, 7000).await;
                    one_out.shutdown().await.unwrap();
                },
                async {
                    write(&mut two_out, index + 1, 20_000, 500).await;
                    two_out.shutdown().await.unwrap();
                },
                read(&mut one_in, index + 1, 20_000, 4000),
                read(&mut two_in, index, 20_000, 4000),
            );
            assert!(near.ended.await.unwrap().result.is_ok() && far.ended.await.unwrap().result.is_ok());
        }));
    }
    for task in work {
        task.await.unwrap();
        let held = pair.far.buffers.held();
        assert!(held <= slow * EACH + TUNNEL, "{held} bytes for {slow} connections");
        assert!(pair.near.buffers.held() <= TUNNEL);
    }
    for task in tasks {
        task.abort();
    }
    for (app, near, far) in far_apps {
        drop(app);
        drop((near.await.unwrap(), far.await.unwrap()));
    }
    pair.finish().await;
}

#[tokio::test]
async fn one_slow_reader_among_500_connections_harms_nobody() {
    run(1).await;
}

#[tokio::test]
async fn a_hundred_slow_readers_among_500_connections_harm_nobody() {
    run(100).await;
}
