//! Connections that end in order.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Plan {
    up: usize,
    down: usize,
    /// Sizes of writes and reads of both applications.
    pieces: [usize; 4],
    /// Which side sends only after the other one has ended: none, near, far.
    waits: u8,
}

fn plan() -> impl Strategy<Value = Plan> {
    let size = || prop_oneof![Just(0usize), 1usize..100, 1usize..300_000];
    let piece = || prop_oneof![200usize..2000, 2000usize..100_000];
    (size(), size(), [piece(), piece(), piece(), piece()], 0u8..3).prop_map(|(up, down, pieces, waits)| Plan {
        up,
        down,
        pieces,
        waits,
    })
}

/// One application: writes and reads by plan.
async fn play(mut app: App, out: (usize, usize, usize), back: (usize, usize, usize), waits: bool) {
    let (mut reader, mut writer) = app.split();
    let (out, back) = ((out.0, out.1, out.2.max(1)), (back.0, back.1, back.2.max(1)));
    let sending = async |writer: &mut tokio::net::tcp::WriteHalf<'_>| {
        write(writer, out.0, out.1, out.2).await;
        writer.shutdown().await.unwrap();
    };
    if waits {
        read(&mut reader, back.0, back.1, back.2).await;
        sending(&mut writer).await;
    } else {
        tokio::join!(sending(&mut writer), read(&mut reader, back.0, back.1, back.2));
    }
}

async fn run(plans: Vec<Plan>) {
    let mut pair = pair(1 << 30).await;
    let mut tasks = Vec::new();
    for (index, plan) in plans.into_iter().enumerate() {
        let (near, far) = pair.connection(SILENCE).await;
        let [one, two, three, four] = plan.pieces;
        let (up, down) = ((2 * index, plan.up), (2 * index + 1, plan.down));
        tasks.push(spawn(async move {
            tokio::join!(
                play(near.app, (up.0, up.1, one), (down.0, down.1, two), plan.waits == 1),
                play(far.app, (down.0, down.1, three), (up.0, up.1, four), plan.waits == 2),
            );
            for ended in [near.ended, far.ended] {
                let ended = ended.await.unwrap();
                assert!(ended.result.is_ok(), "{ended:?}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    pair.finish().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_interleaving_delivers_each_byte_once_and_in_order(plans in prop::collection::vec(plan(), 1..8)) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run(plans));
    }
}
