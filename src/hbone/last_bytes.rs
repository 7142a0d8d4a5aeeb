//! What a tunnel brought before it or a stream of it broke is still delivered.

use super::carry::deliver_last_bytes;
use super::engine::Rest;
use crate::sys::leg::Leg;
use crate::sys::scratch::write_all;
use tokio::net::TcpStream;

/// Delivers to `app` what it has not taken yet, waits until that has arrived, and returns the socket.
pub async fn deliver_rest(app: std::net::TcpStream, mut rest: Rest) -> Option<std::net::TcpStream> {
    // Fails only without a runtime or without memory; then the socket is closed with what it has.
    let app = TcpStream::from_std(app).ok()?;
    {
        let leg = Leg::new(&app);
        let deliver = async {
            for chunk in rest.take() {
                if let Err(error) = write_all(leg.socket, &chunk).await {
                    return leg.record_error(error);
                }
            }
        };
        deliver_last_bytes(&leg, deliver).await;
    }
    app.into_std().ok()
}
