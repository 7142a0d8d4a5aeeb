//! Liveness of a tunnel: both ends send PINGs and expect timely answers, with ztunnel's intervals.

use super::config::{PING_INTERVAL, PING_TIMEOUT};
use super::cut::CutReason;
use h2::{Ping, PingPong};
use std::time::Duration;

/// How long the kernel retransmits what a tunnel's peer does not acknowledge: a little longer than until a PING is
/// overdue. It limits the kernel's retransmissions also when this process ends before.
pub const GONE_AFTER: Duration = PING_INTERVAL.saturating_add(PING_TIMEOUT).saturating_add(PING_TIMEOUT);

/// Sends PINGs until an answer is overdue. Never completes if the connection ends before, or if `pings` is `None`.
pub async fn watch(pings: Option<PingPong>) -> CutReason {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection has ended, and reports why itself.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return CutReason::PingTimeout,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hbone::{Account, Buffers, Config, Server, TunnelError, client};
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::time::Instant;

    const CONFIG: Config = Config {
        stream_window: 65_535,
        connection_window: 65_535,
        frame_size: 16_384,
        max_streams: 100,
        half_closed_silence: Duration::from_secs(1),
    };

    fn account(opened_by_peer: bool) -> Arc<Account> {
        Buffers::new(1 << 20).account("peer", opened_by_peer)
    }

    /// A far end that sends its SETTINGS (RFC 9113 section 6.5), and then reads for ever without answering.
    async fn silent(mut far: DuplexStream, opening: &[u8]) {
        far.write_all(opening).await.unwrap();
        far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        while far.read(&mut [0; 1024]).await.is_ok_and(|length| length > 0) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_no_ping_is_given_up() {
        let (near, far) = tokio::io::duplex(65_536);
        let (_tunnel, driver) = client::handshake(near, &CONFIG, &account(false)).await.unwrap();
        let start = Instant::now();
        let ended = tokio::select! { ended = driver.run() => ended, () = silent(far, b"") => Ok(()) };
        assert!(matches!(ended, Err(TunnelError::Cut(CutReason::PingTimeout))), "{ended:?}");
        assert_eq!(start.elapsed().as_secs(), (PING_INTERVAL + PING_TIMEOUT).as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_no_ping_is_given_up() {
        let (near, far) = tokio::io::duplex(65_536);
        let serve = async {
            let mut server = Server::handshake(near, &CONFIG, &account(true)).await.unwrap();
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
