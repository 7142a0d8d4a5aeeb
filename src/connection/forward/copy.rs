//! Copying between two TCP sockets. Memory is used only for what the receiver does not take at once. What large transfers
//! carry is moved by the kernel instead of copied.

use super::error::ForwardError;
use crate::hbone::Meter;
use crate::hbone::carry::{Silent, deliver_last_bytes, end_writing, unless_silent};
use crate::sys::leg::Leg;
use crate::sys::pipe::pass_through_pipe;
use crate::sys::scratch::{PassError, SCRATCH_BYTES, pass_now, write_all};
use bytes::Bytes;
use futures_util::future::OptionFuture;
use std::io;
use std::pin::pin;
use std::time::Duration;
use tokio::net::TcpStream;

/// Fewest bytes of one pass for which moving them costs less than copying them.
const BULK_BYTES: usize = 64 * 1024;

/// Copies both ways until both directions have ended. Once one has, the other may be silent for at most `silence`. If
/// one side breaks, this returns when what it had sent before has arrived at the other side, or after [`LAST_BYTES`].
///
/// [`LAST_BYTES`]: crate::sys::leg::LAST_BYTES
pub async fn both_ways(
    app: &TcpStream,
    far: &TcpStream,
    meter: &impl Meter,
    silence: Duration,
) -> Result<(), ForwardError> {
    let (app, far) = (&Leg::new(app), &Leg::new(far));
    let mut up = pin!(one_way(app, far, |n| meter.up(n)));
    let mut down = pin!(one_way(far, app, |n| meter.down(n)));
    let (mut up_ended, mut down_ended) = (false, false);
    while !app.is_broken() && !far.is_broken() {
        if up_ended && down_ended {
            return Ok(());
        }
        let is_half_closed = up_ended || down_ended;
        let step = async {
            tokio::select! {
                () = &mut up, if !up_ended => up_ended = true,
                () = &mut down, if !down_ended => down_ended = true,
                () = app.broken() => {}
                () = far.broken() => {}
            }
        };
        if is_half_closed {
            unless_silent(meter, silence, pin!(step))
                .await
                .map_err(|Silent| ForwardError::HalfClosedSilence(silence))?;
        } else {
            step.await;
        }
    }
    // Deliver what was received before the reset, before the reset is passed on.
    if app.is_broken() {
        deliver_last_bytes(far, OptionFuture::from((!up_ended).then_some(up))).await;
    } else {
        deliver_last_bytes(app, OptionFuture::from((!down_ended).then_some(down))).await;
    }
    Err(if app.is_broken() { ForwardError::App(app.error()) } else { ForwardError::Far(far.error()) })
}

/// Copies until `from` has ended, and then sends FIN to `to`; or until one of them breaks, which is recorded in its
/// [`Leg`].
async fn one_way(from: &Leg<'_>, to: &Leg<'_>, count: impl Fn(usize)) {
    let mut is_bulk = false;
    loop {
        // Reads that succeed at once never yield to the runtime by themselves; other tasks must get their turn.
        tokio::task::consume_budget().await;
        if let Err(error) = from.socket.readable().await {
            return from.record_error(error);
        }
        match pass(from.socket, to.socket, &mut is_bulk) {
            Ok((0, _)) => break,
            Ok((length, rest)) => {
                if !rest.is_empty()
                    && let Err(error) = write_all(to.socket, &rest).await
                {
                    return to.record_error(error);
                }
                count(length);
            }
            Err(PassError::From(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(PassError::From(error)) => return from.record_error(error),
            Err(PassError::To(error)) => return to.record_error(error),
        }
    }
    if from.is_broken() {
        return;
    }
    if let Err(error) = end_writing(to.socket) {
        to.record_error(error);
    }
}

/// Reads the waiting bytes and writes as many of them as fit, as [`pass_now`] does. A direction that had more bytes than
/// one read takes carries bulk, until a pass is small.
fn pass(from: &TcpStream, to: &TcpStream, is_bulk: &mut bool) -> Result<(usize, Bytes), PassError> {
    if *is_bulk && let Some((length, rest)) = pass_through_pipe(from, to)? {
        *is_bulk = length >= BULK_BYTES;
        return Ok((length, rest));
    }
    let (length, rest) = pass_now(from, to)?;
    *is_bulk = length == SCRATCH_BYTES;
    Ok((length, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::leg::LAST_BYTES;
    use crate::sys::pipe::testing;
    use socket2::SockRef;
    use std::net::Shutdown;
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

    /// A pair of which the second one has room for more than one read.
    async fn roomy_pair() -> (TcpStream, TcpStream) {
        let (near, far) = pair().await;
        SockRef::from(&far).set_recv_buffer_size(1 << 20).unwrap();
        far.set_nodelay(true).unwrap();
        (near, far)
    }

    /// Bytes that show where they belong.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect()
    }

    async fn send(mut client: TcpStream, bytes: &[u8]) -> TcpStream {
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        client
    }

    async fn receive(mut server: TcpStream) -> Vec<u8> {
        let mut all = Vec::new();
        server.read_to_end(&mut all).await.unwrap();
        all
    }

    #[tokio::test]
    async fn bulk_is_moved_where_there_is_a_pipe_and_copied_where_there_is_none() {
        let body = pattern(5_000_000);
        for has_pipe in [true, false] {
            if !has_pipe {
                testing::forbid();
            }
            let ((client, app), (far, server)) = (roomy_pair().await, roomy_pair().await);
            let count = Count::default();
            let proxy = both_ways(&app, &far, &count, Duration::from_secs(30));
            let (ended, _client, received) = tokio::join!(proxy, send(client, &body), receive(server));
            ended.unwrap();
            assert!(received == body, "{} bytes, {has_pipe}", received.len());
            assert_eq!(count.total(), 5_000_000);
            assert_eq!(testing::has_pipe(), has_pipe);
        }
    }

    #[tokio::test]
    async fn receivers_that_wait_take_the_pipe_from_nobody() {
        let body = pattern(8_000_000);
        let count = Count::default();
        let ((client, app), (far, waiting)) = (roomy_pair().await, pair().await);
        let stalled = both_ways(&app, &far, &count, Duration::from_secs(30));
        let other = async {
            // All that fits is on its way.
            while !testing::has_pipe() || far.try_io(tokio::io::Interest::WRITABLE, || Ok(())).is_ok() {
                tokio::task::yield_now().await;
            }
            let ((client, app), (far, server)) = (roomy_pair().await, roomy_pair().await);
            let count = Count::default();
            let proxy = both_ways(&app, &far, &count, Duration::from_secs(30));
            let (ended, _client, received) = tokio::join!(proxy, send(client, &body), receive(server));
            ended.unwrap();
            assert!(received == body, "{} bytes", received.len());
            receive(waiting).await
        };
        let (ended, _client, received) = tokio::join!(stalled, send(client, &body), other);
        ended.unwrap();
        assert!(received == body, "{} bytes", received.len());
        assert_eq!(count.total(), 8_000_000);
    }

    #[tokio::test]
    async fn small_messages_are_copied() {
        let ((mut client, app), (far, mut server)) = (pair().await, pair().await);
        let count = Count::default();
        let proxy = both_ways(&app, &far, &count, Duration::from_secs(30));
        let exchanges = async {
            let mut message = pattern(1024);
            for _ in 0..100 {
                client.write_all(&message).await.unwrap();
                server.read_exact(&mut message).await.unwrap();
                server.write_all(&message).await.unwrap();
                client.read_exact(&mut message).await.unwrap();
            }
            client.shutdown().await.unwrap();
            server.shutdown().await.unwrap();
        };
        tokio::join!(proxy, exchanges).0.unwrap();
        assert_eq!((count.total(), testing::has_pipe()), (204_800, false));
    }

    #[tokio::test]
    async fn urgent_data_behind_bulk_is_in_its_place() {
        for ends_first in [true, false] {
            let ((mut client, app), (far, server)) = (roomy_pair().await, roomy_pair().await);
            SockRef::from(&app).set_out_of_band_inline(true).unwrap();
            // The first read is full, so the next pass is one through the pipe, and finds the urgent byte.
            let bulk = pattern(SCRATCH_BYTES);
            client.write_all(&bulk).await.unwrap();
            SockRef::from(&client).send_out_of_band(b"!").unwrap();
            client.write_all(b"after").await.unwrap();
            if ends_first {
                client.shutdown().await.unwrap();
            }
            Leg::new(&client).drained().await;
            let count = Count::default();
            let proxy = both_ways(&app, &far, &count, Duration::from_secs(30));
            let read = async {
                let mut all = vec![0; SCRATCH_BYTES + 6];
                let mut server = server;
                server.read_exact(&mut all).await.unwrap();
                SockRef::from(&client).shutdown(Shutdown::Write).unwrap();
                server.shutdown().await.unwrap();
                all
            };
            let both = async { tokio::join!(proxy, read) };
            let (ended, all) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("nothing waits");
            ended.unwrap();
            assert!(all.starts_with(&bulk) && all.ends_with(b"!after"), "{ends_first}");
            assert!(testing::has_pipe());
        }
    }

    /// The server writes more than the client reads, and then resets.
    async fn reset_behind(bytes: usize, app: &TcpStream, far: &TcpStream, mut server: TcpStream) -> ForwardError {
        let count = Count::default();
        let writes = async {
            let written = tokio::time::timeout(Duration::from_secs(1), server.write_all(&vec![7; bytes])).await;
            crate::sys::socket::reset_on_close(&server);
            drop(server);
            written.is_ok()
        };
        tokio::join!(both_ways(app, far, &count, Duration::from_secs(30)), writes).0.unwrap_err()
    }

    #[tokio::test]
    async fn what_came_before_a_reset_is_passed_on_and_arrives() {
        let ((mut client, app), (far, server)) = (pair().await, pair().await);
        let read = async {
            let mut all = vec![0; 50_000];
            client.read_exact(&mut all).await.unwrap();
            client
        };
        let (ended, _client) = tokio::join!(reset_behind(50_000, &app, &far, server), read);
        assert!(matches!(ended, ForwardError::Far(_)), "{ended:?}");
        assert_eq!(crate::sys::socket::unacknowledged(&app).unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_does_not_read_keeps_a_reset_connection_for_a_bounded_time() {
        let ((_client, app), (far, server)) = (pair().await, pair().await);
        let begun = tokio::time::Instant::now();
        let ended = reset_behind(50_000_000, &app, &far, server).await;
        assert!(matches!(ended, ForwardError::Far(_)), "{ended:?}");
        assert!(begun.elapsed() <= LAST_BYTES + Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}
