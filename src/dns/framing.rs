//! DNS messages over TCP. Each has its length in front (RFC 1035, 4.2.2).

use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Reads one message.
pub async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes one message and its length in one piece, because some clients cannot take them apart.
pub async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

/// Passes on the further messages of a zone transfer from the resolver to the client. Ends when the client sends
/// another request, or when either side is silent for `idle`.
pub async fn relay_transfer(mut resolver: TcpStream, client: &mut TcpStream, idle: Duration) {
    loop {
        let mut next = [0];
        let message = tokio::select! {
            message = timeout(idle, read_message(&mut resolver)) => message,
            _ = client.peek(&mut next) => return,
        };
        let Ok(Ok(message)) = message else { return };
        if !matches!(timeout(idle, write_message(client, &message)).await, Ok(Ok(()))) {
            return;
        }
        tokio::task::yield_now().await;
    }
}
