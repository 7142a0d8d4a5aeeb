//! A read buffer that starts small and grows with the traffic, so that a quiet connection holds little memory.
//!
//! Until the peer is authenticated, the buffer stays small and the number of bytes that the peer may send is limited.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the buffer at the first read.
const SMALL_BYTES: usize = 8 * 1024;

/// Called with a byte stream before it is closed.
type BeforeClose<IO> = Box<dyn Fn(&IO) + Send + Sync>;

/// A byte stream with a read buffer. Writes are not buffered.
pub struct ReadBuffered<IO> {
    io: IO,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    max: usize,
    /// Bytes that the peer may still send before [`ReadBuffered::trust`] is called; `None` afterwards.
    allowed: Option<usize>,
    before_close: Option<BeforeClose<IO>>,
}

impl<IO: fmt::Debug> fmt::Debug for ReadBuffered<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadBuffered({:?})", self.io)
    }
}

impl<IO> Drop for ReadBuffered<IO> {
    fn drop(&mut self) {
        if let Some(before_close) = &self.before_close {
            before_close(&self.io);
        }
    }
}

/// Bytes that a peer may send before it is authenticated. A TLS handshake with a post-quantum key exchange and a chain
/// of certificates takes less than half of that.
const UNTRUSTED_BYTES: usize = 32 * 1024;

impl<IO> ReadBuffered<IO> {
    /// Reads `io` through a small buffer, and at most [`UNTRUSTED_BYTES`] in all until [`ReadBuffered::trust`] is
    /// called.
    pub fn new(io: IO) -> Self {
        Self {
            io,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            max: SMALL_BYTES,
            allowed: Some(UNTRUSTED_BYTES),
            before_close: None,
        }
    }

    /// Removes the limit, once the peer is authenticated. From now on the buffer may grow to `max` bytes.
    pub fn trust(&mut self, max: usize) {
        (self.max, self.allowed) = (max, None);
    }

    /// Calls `work` with the stream before the stream is closed.
    pub fn before_close(&mut self, work: impl Fn(&IO) + Send + Sync + 'static) {
        self.before_close = Some(Box::new(work));
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadBuffered<IO> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, buffer, start, end, max, allowed, .. } = self.get_mut();
        if start == end {
            if buffer.is_empty() {
                buffer.resize(SMALL_BYTES.min(*max), 0);
            } else if *end == buffer.len() && buffer.len() < *max {
                // The last read filled the buffer, so more bytes are waiting than fit.
                *buffer = vec![0; (buffer.len() * 4).min(*max)];
            }
            let mut fresh = ReadBuf::new(buffer);
            let read = Pin::new(io).poll_read(context, &mut fresh);
            (*start, *end) = (0, fresh.filled().len());
            ready!(read)?;
            if let Some(left) = allowed {
                let Some(less) = left.checked_sub(*end) else {
                    *end = 0;
                    let error = format!("the peer sent more than {UNTRUSTED_BYTES} bytes before it was authenticated");
                    return Poll::Ready(Err(io::Error::other(error)));
                };
                *left = less;
            }
        }
        let waiting = buffer.get(*start..*end).unwrap_or_default();
        let passed = waiting.len().min(into.remaining());
        into.put_slice(waiting.get(..passed).unwrap_or_default());
        *start += passed;
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadBuffered<IO> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn an_unauthenticated_peer_may_send_little_and_has_a_small_buffer() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut reader = ReadBuffered::new(near);
        far.write_all(&vec![1; UNTRUSTED_BYTES + 1]).await.unwrap();
        let mut got = Vec::new();
        assert!(reader.read_to_end(&mut got).await.is_err());
        assert!(got.len() <= UNTRUSTED_BYTES && reader.buffer.len() == SMALL_BYTES);
    }

    #[tokio::test]
    async fn bytes_arrive_in_order_and_the_buffer_grows_with_the_traffic() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut reader = ReadBuffered::new(near);
        reader.trust(128 * 1024);
        assert_eq!(reader.buffer.len(), 0, "no buffer before the first read");
        let all: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
        far.write_all(&all[..100]).await.unwrap();
        let mut got = vec![0; 100];
        reader.read_exact(&mut got).await.unwrap();
        assert_eq!(reader.buffer.len(), SMALL_BYTES);
        far.write_all(&all[100..]).await.unwrap();
        drop(far);
        reader.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, all);
        assert_eq!(reader.buffer.len(), 128 * 1024);
    }
}
