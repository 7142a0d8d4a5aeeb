//! Liveness of a tunnel: both ends send PINGs and expect timely answers, with ztunnel's intervals.

use super::config::{PING_INTERVAL, PING_TIMEOUT};
use super::cut::CutReason;
use super::engine::{Engine, TunnelId};
use std::time::Duration;
use tokio::time::Instant;

/// Time between two looks whether a PING has been answered.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the kernel retransmits what a tunnel's peer does not acknowledge: a little longer than until a PING is
/// overdue. It limits the kernel's retransmissions also when this process ends before.
pub const GONE_AFTER: Duration = PING_INTERVAL.saturating_add(PING_TIMEOUT).saturating_add(PING_TIMEOUT);

/// Sends PINGs until an answer is overdue. Never completes if the tunnel ends before.
pub(super) async fn watch(engine: &Engine, id: TunnelId) -> CutReason {
    let pongs = || engine.with(id, |tunnel, _| tunnel.pongs);
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        let Some(before) = pongs() else { return std::future::pending().await };
        engine.with(id, |tunnel, work| {
            tunnel.session.ping();
            tunnel.mark(work);
        });
        let deadline = Instant::now() + PING_TIMEOUT;
        loop {
            // Looked at in steps: an answer that comes usually comes at once, and needs no task that waits for it.
            tokio::time::sleep_until(deadline.min(Instant::now() + LOOK_EVERY)).await;
            match pongs() {
                None => return std::future::pending().await,
                Some(after) if after != before => break,
                Some(_) if Instant::now() >= deadline => return CutReason::PingTimeout,
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hbone::buffers::Account;
    use crate::hbone::testing::{CONFIG, end_and_plain, engine};
    use crate::hbone::{Buffers, Server, TunnelError, client};
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    fn account() -> Arc<Account> {
        Buffers::new(1 << 20).account("peer")
    }

    /// A far end that sends its SETTINGS (RFC 9113 section 6.5), and then reads for ever without answering.
    async fn silent(mut far: DuplexStream, opening: &[u8]) {
        far.write_all(opening).await.unwrap();
        far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        while far.read(&mut [0; 1024]).await.is_ok_and(|length| length > 0) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_no_ping_is_given_up() {
        let (near, far) = end_and_plain().await;
        let (_tunnel, driver) = client::start(&engine(), near, &CONFIG, &account()).unwrap();
        let start = Instant::now();
        let ended = tokio::select! { ended = driver.run() => ended, () = silent(far, b"") => Ok(()) };
        assert!(matches!(ended, Err(TunnelError::Cut(CutReason::PingTimeout))), "{ended:?}");
        assert_eq!(start.elapsed().as_secs(), (PING_INTERVAL + PING_TIMEOUT).as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_no_ping_is_given_up() {
        let (near, far) = end_and_plain().await;
        let serve = async {
            let mut server = Server::start(&engine(), near, &CONFIG, &account()).unwrap();
            let start = Instant::now();
            (server.next().await, start.elapsed())
        };
        let (ended, after) = tokio::select! {
            ended = serve => ended,
            () = silent(far, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") => (None, Duration::ZERO),
        };
        assert!(matches!(ended, Some(Err(TunnelError::Cut(CutReason::PingTimeout)))), "{ended:?}");
        assert_eq!(after.as_secs(), (PING_INTERVAL + PING_TIMEOUT).as_secs());
    }
}
