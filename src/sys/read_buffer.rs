//! A read buffer that begins small and grows with what comes: a connection that says little must not own much.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What it begins with, at the first read.
const SMALL_BYTES: usize = 8 * 1024;

/// Is shown a byte stream before it is closed.
type AtEnd<IO> = Box<dyn Fn(&IO) + Send + Sync>;

/// A byte stream that is read through a buffer, and written to directly.
pub struct ReadBuffered<IO> {
    io: IO,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    max: usize,
    /// Bytes that may still come before [`ReadBuffered::trust`] is called.
    allowed: Option<usize>,
    at_end: Option<AtEnd<IO>>,
}

impl<IO: fmt::Debug> fmt::Debug for ReadBuffered<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadBuffered({:?})", self.io)
    }
}

impl<IO> Drop for ReadBuffered<IO> {
    fn drop(&mut self) {
        if let Some(at_end) = &self.at_end {
            at_end(&self.io);
        }
    }
}

/// What a peer may say before it is trusted (TLS handshakes with a post-quantum key exchange and a chain of certificates take less
/// than half of it).
const UNTRUSTED_BYTES: usize = 32 * 1024;

impl<IO> ReadBuffered<IO> {
    /// Reads of `io` through a small buffer, of 32 KiB in all: more than a handshake needs, and little to hold for a stranger.
    pub fn new(io: IO) -> Self {
        Self {
            io,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            max: SMALL_BYTES,
            allowed: Some(UNTRUSTED_BYTES),
            at_end: None,
        }
    }

    /// From now on as much is read as comes, up to `max` bytes at once.
    pub fn trust(&mut self, max: usize) {
        (self.max, self.allowed) = (max, None);
    }

    /// Shows the stream to `work` before it is closed.
    pub fn at_end(&mut self, work: impl Fn(&IO) + Send + Sync + 'static) {
        self.at_end = Some(Box::new(work));
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadBuffered<IO> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, buffer, start, end, max, allowed, .. } = self.get_mut();
        if start == end {
            if buffer.is_empty() {
                buffer.resize(SMALL_BYTES.min(*max), 0);
            } else if *end == buffer.len() && buffer.len() < *max {
                // The last read filled it: there is more than fits.
                *buffer = vec![0; (buffer.len() * 4).min(*max)];
            }
            let mut fresh = ReadBuf::new(buffer);
            let read = Pin::new(io).poll_read(context, &mut fresh);
            (*start, *end) = (0, fresh.filled().len());
            ready!(read)?;
            if let Some(left) = allowed {
                let Some(less) = left.checked_sub(*end) else {
                    *end = 0;
                    return Poll::Ready(Err(io::Error::other("it says too much before it has proven who it is")));
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
    async fn a_stranger_is_heard_for_so_long_only_and_through_little() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut reader = ReadBuffered::new(near);
        far.write_all(&vec![1; UNTRUSTED_BYTES + 1]).await.unwrap();
        let mut got = Vec::new();
        assert!(reader.read_to_end(&mut got).await.is_err());
        assert!(got.len() <= UNTRUSTED_BYTES && reader.buffer.len() == SMALL_BYTES);
    }

    #[tokio::test]
    async fn all_comes_in_order_and_the_buffer_follows_what_comes() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut reader = ReadBuffered::new(near);
        reader.trust(128 * 1024);
        assert_eq!(reader.buffer.len(), 0, "nothing has come");
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
