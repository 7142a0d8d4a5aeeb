//! Forwarding over a stream of a tunnel or over plain TCP, until it ends or has to stop.

use super::copy;
use super::error::{ForwardError, Stop};
use crate::hbone::{CarryError, Ended, Meter, Owner, Stopper, Stream, deliver_rest};
use crate::sys::socket::reset_on_close;
use crate::task::Group;
use std::time::Duration;
use tokio::net::TcpStream;

/// What ends with a connection that is carried over a stream.
pub trait Ending: Send + Sync + 'static {
    /// Counts the connection's bytes.
    fn meter(&self) -> &impl Meter;
    /// Why the connection was told to stop; `None` if it was not.
    fn stop(&self) -> Option<Stop>;
    /// The connection has ended, and everything that could be delivered is. On an error, `app` is reset when it is
    /// closed.
    fn finish(self, app: std::net::TcpStream, result: Result<(), ForwardError>);
}

/// Carries the application's connection over a stream of a tunnel. `ending` is told when it has ended; until then
/// nothing runs for it. What is left to do after one side has broken is done by a task of `tasks`.
pub fn over_stream(
    app: std::net::TcpStream,
    stream: Stream,
    silence: Duration,
    tasks: &Group,
    ending: impl Ending,
) -> Stopper {
    stream.carry(app, Box::new(StreamOwner { ending, tasks: tasks.clone() }), silence)
}

/// The owner of a connection that is carried over a stream.
struct StreamOwner<E> {
    ending: E,
    tasks: Group,
}

impl<E: Ending> Meter for StreamOwner<E> {
    fn up(&self, bytes: usize) {
        self.ending.meter().up(bytes);
    }

    fn down(&self, bytes: usize) {
        self.ending.meter().down(bytes);
    }

    fn total(&self) -> u64 {
        self.ending.meter().total()
    }
}

impl<E: Ending> Owner for StreamOwner<E> {
    fn ended(self: Box<Self>, ended: Ended) {
        let Self { ending, tasks } = *self;
        let Ended { result, app, rest } = ended;
        let error = match result {
            Ok(()) => return ending.finish(app, Ok(())),
            Err(error) => error,
        };
        let (error, has_last_bytes) = match error {
            CarryError::App(error) => (ForwardError::App(error), false),
            CarryError::Reset(_) => (ForwardError::Reset(error), true),
            CarryError::Tunnel(_) => (ForwardError::Tunnel(error), true),
            // Ends at once and discards the rest: a tunnel is often cut because there is no memory for it.
            CarryError::Cut(_) => (ForwardError::Cut(error), false),
            CarryError::HalfClosedSilence(silence) => (ForwardError::HalfClosedSilence(silence), false),
            CarryError::Stopped => (ForwardError::Stopped(Stop::Drained), false),
        };
        let (error, has_last_bytes) = match (ending.stop(), &error) {
            (Some(why), ForwardError::Stopped(_) | ForwardError::Tunnel(_)) => (ForwardError::Stopped(why), false),
            _ => (error, has_last_bytes),
        };
        if has_last_bytes {
            tasks.spawn(async move {
                if let Some(app) = deliver_rest(app, rest).await {
                    reset_on_close(&app);
                    ending.finish(app, Err(error));
                }
            });
        } else {
            reset_on_close(&app);
            ending.finish(app, Err(error));
        }
    }
}

/// Carries the application's connection over a plain TCP connection. On an error, both are reset when they are closed.
pub async fn over_tcp(
    app: &TcpStream,
    far: &TcpStream,
    meter: &impl Meter,
    silence: Duration,
    stop: impl Future<Output = Stop>,
) -> Result<(), ForwardError> {
    let result = tokio::select! {
        biased;
        why = stop => Err(ForwardError::Stopped(why)),
        result = copy::both_ways(app, far, meter, silence) => result,
    };
    if result.is_err() {
        reset_on_close(app);
        reset_on_close(far);
    }
    result
}
