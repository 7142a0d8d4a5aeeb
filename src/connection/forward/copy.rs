//! Copying between two sockets. Only what the receiver does not take at once is ever held in memory.

use super::ForwardError;
use crate::hbone::Meter;
use crate::hbone::stream::app_broken;
use crate::sys::scratch::{pass_now, write_all};
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;
use tokio::net::TcpStream;

/// Copies both ways until both have ended. After one has, the other may be silent for `silence` at most.
pub async fn both_ways(
    app: &TcpStream,
    far: &TcpStream,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), ForwardError> {
    let up = async { one_way(app, far, |n| meter.up(n)).await.map_err(|e| e.of(ForwardError::App, ForwardError::Far)) };
    let down =
        async { one_way(far, app, |n| meter.down(n)).await.map_err(|e| e.of(ForwardError::Far, ForwardError::App)) };
    let (mut up, mut down) = (pin!(up), pin!(down));
    let up_ended = tokio::select! {
        result = &mut up => { result?; true }
        result = &mut down => { result?; false }
    };
    loop {
        let before = meter.total();
        let rest = async {
            if up_ended {
                tokio::select! {
                    result = down.as_mut() => result,
                    error = app_broken(app) => Err(ForwardError::App(error)),
                }
            } else {
                tokio::select! {
                    result = up.as_mut() => result,
                    error = app_broken(far) => Err(ForwardError::Far(error)),
                }
            }
        };
        match tokio::time::timeout(silence, rest).await {
            Ok(result) => return result,
            Err(_) if meter.total() == before => return Err(ForwardError::HalfClosedSilence(silence)),
            Err(_) => {}
        }
    }
}

/// Which end of a one-way copy failed. When reading and writing happen in one step, the kind tells them apart only
/// roughly: a broken pipe is always the receiver's.
enum CopyError {
    From(io::Error),
    To(io::Error),
}

impl CopyError {
    fn of(
        self,
        from: impl FnOnce(io::Error) -> ForwardError,
        to: impl FnOnce(io::Error) -> ForwardError,
    ) -> ForwardError {
        match self {
            Self::From(error) => from(error),
            Self::To(error) => to(error),
        }
    }
}

async fn one_way(from: &TcpStream, to: &TcpStream, count: impl Fn(usize)) -> Result<(), CopyError> {
    loop {
        // Readiness and reads that succeed at once take no turn of the runtime's; others must have theirs.
        tokio::task::consume_budget().await;
        tokio::select! {
            ready = from.readable() => ready.map_err(CopyError::From)?,
            error = app_broken(to) => return Err(CopyError::To(error)),
        }
        match pass_now(from, to) {
            Ok((0, _)) => break,
            Ok((length, rest)) => {
                if !rest.is_empty() {
                    write_all(to, &rest).await.map_err(CopyError::To)?;
                }
                count(length);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(CopyError::To(error)),
            Err(error) => return Err(CopyError::From(error)),
        }
    }
    match socket2::SockRef::from(to).shutdown(Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(CopyError::To(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[derive(Default)]
    struct Count(AtomicU64);

    impl Meter for Count {
        fn up(&self, bytes: usize) {
            self.0.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        fn down(&self, bytes: usize) {
            self.0.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        fn total(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn upload_then_read_and_every_byte_counted() {
        let ((mut client, app), (far, mut server)) = (pair().await, pair().await);
        let count = Count::default();
        let body = vec![7u8; 3_000_000];
        let proxy = both_ways(&app, &far, &count, Duration::from_secs(30));
        let client = async {
            client.write_all(&body).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let server = async {
            let mut all = Vec::new();
            server.read_to_end(&mut all).await.unwrap();
            server.write_all(b"got it").await.unwrap();
            server.shutdown().await.unwrap();
            all.len()
        };
        let (ended, answer, received) = tokio::join!(proxy, client, server);
        ended.unwrap();
        assert_eq!((answer.as_slice(), received), (b"got it".as_slice(), 3_000_000));
        assert_eq!(count.total(), 3_000_006);
    }

    #[tokio::test]
    async fn silence_after_half_close_ends_it() {
        let ((mut client, app), (far, _server)) = (pair().await, pair().await);
        client.shutdown().await.unwrap();
        let ended = both_ways(&app, &far, &Count::default(), Duration::from_millis(50)).await;
        assert!(matches!(ended, Err(ForwardError::HalfClosedSilence(_))), "{ended:?}");
    }
}
