//! Liveness of a tunnel: a PING every 10 s, the answer within 20 s (the reference's values), on both ends.

use super::TunnelError;
use h2::{Ping, PingPong};
use std::time::Duration;

/// Time between an answer and the next PING.
const INTERVAL: Duration = Duration::from_secs(10);
/// How long an answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Pings until an answer is overdue or the connection ends.
pub async fn watch(pings: Option<PingPong>) -> TunnelError {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(INTERVAL).await;
        match tokio::time::timeout(TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection itself reports why it ended; until then there is nothing more to watch.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return TunnelError::PingTimeout,
        }
    }
}
