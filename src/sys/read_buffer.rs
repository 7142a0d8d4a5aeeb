//! A read buffer that begins small and grows with what comes: a connection that says little must not own much.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What it begins with, at the first read.
const SMALL_BYTES: usize = 8 * 1024;

/// A byte stream that is read through a buffer, and written to directly.
#[derive(Debug)]
pub struct ReadBuffered<IO> {
    io: IO,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    max: usize,
}

impl<IO> ReadBuffered<IO> {
    /// Reads of `io` take up to `max` bytes at once.
    pub fn new(io: IO, max: usize) -> Self {
        Self { io, buffer: Vec::new(), start: 0, end: 0, max }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadBuffered<IO> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, buffer, start, end, max } = self.get_mut();
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
    async fn all_comes_in_order_and_the_buffer_follows_what_comes() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let mut reader = ReadBuffered::new(near, 128 * 1024);
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
