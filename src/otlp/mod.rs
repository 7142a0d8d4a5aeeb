//! OpenTelemetry: sends a span and a log record for each leg of a connection to a collector, by OTLP.
//!
//! It has a thread of its own. What it takes from the outbox (`connection/report/export.rs`) is encoded here
//! (`encode.rs`) and sent here (`transport.rs`), so that a collector that is slow, stalled or gone costs connections
//! nothing: the outbox is bounded, and what it cannot hold is counted.

pub mod encode;
pub mod transport;

use crate::connection::report::export::{Dropped, Export, Outbox, Signal};
use crate::task::backoff::Backoff;
use crate::task::{Drain, thread};
use crate::telemetry::limit::{LogLimit, shortened};
use crate::telemetry::queue::{Limits, Queue};
use encode::Payload;
use opentelemetry_sdk::trace::Sampler;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::time::Instant;
use transport::{Client, Endpoint, SendError};

/// Waits between attempts to send a batch: the first, and the longest.
const BACKOFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(5)];

/// How long a batch is sent again. Then it is dropped, so that a collector that returns gets what is recent.
const GIVE_UP: Duration = Duration::from_secs(60);

/// How long the last batches may take when the process ends.
const LAST: Duration = Duration::from_secs(1);

/// What is exported, and to where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Spans; `None` if there are to be none.
    pub traces: Option<SignalConfig>,
    /// Log records; `None` if there are to be none.
    pub logs: Option<SignalConfig>,
    /// Decides which traces are sampled.
    pub sampler: Sampler,
    /// What describes this daemon.
    pub resource: Vec<(String, String)>,
}

/// What is set for one signal.
#[derive(Clone, Debug)]
pub struct SignalConfig {
    /// The collector.
    pub endpoint: Endpoint,
    /// The queue's bounds.
    pub limits: Limits,
}

/// The running exporter. Dropping it sends what waits, within a second, and ends it.
#[derive(Debug)]
pub struct Exporter {
    stop: Drain,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts the exporter's thread.
    pub fn start(config: Config, outbox: Arc<Outbox>) -> io::Result<Self> {
        let uri = |signal: &Option<SignalConfig>| signal.as_ref().map(|signal| signal.endpoint.uri.to_string());
        tracing::info!(traces = uri(&config.traces), logs = uri(&config.logs), "exporting to OpenTelemetry");
        let stop = Drain::default();
        let signal = stop.signal();
        let run = move || async move {
            let all = async {
                let (traces, logs) = (config.traces.clone(), config.logs.clone());
                tokio::join!(
                    follow(Signal::Traces, traces, outbox.spans.as_ref(), &config, &outbox, &signal),
                    follow(Signal::Logs, logs, outbox.logs.as_ref(), &config, &outbox, &signal),
                );
            };
            let late = async {
                signal.gentle().await;
                tokio::time::sleep(LAST).await;
            };
            tokio::select! { () = all => {}, () = late => {} }
        };
        let (_, thread) = thread::start("culvert-otlp".into(), run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.stop.at_once();
        // A thread that panicked has nothing left to do.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sends one signal until the process ends, and then what is left.
async fn follow(
    signal: Signal,
    config: Option<SignalConfig>,
    queue: Option<&Queue<Arc<Export>>>,
    all: &Config,
    outbox: &Outbox,
    stop: &crate::task::Signal,
) {
    let (Some(config), Some(queue)) = (config, queue) else { return };
    let mut sender = Sender {
        signal,
        client: Client::new(config.endpoint),
        outbox,
        is_failing: false,
        refusals: LogLimit::default(),
    };
    loop {
        let batch = tokio::select! {
            batch = queue.batch() => batch,
            () = stop.gentle() => break,
        };
        sender.deliver(&batch, &all.resource, stop).await;
    }
    while !queue.is_empty() {
        sender.deliver(&queue.take(), &all.resource, stop).await;
    }
}

/// Sends batches of one signal.
struct Sender<'a> {
    signal: Signal,
    client: Client,
    outbox: &'a Outbox,
    is_failing: bool,
    /// Limits the lines about what the collector refused.
    refusals: LogLimit,
}

impl Sender<'_> {
    /// Sends a batch, again if it fails, and counts what became of it.
    async fn deliver(&mut self, batch: &[Arc<Export>], resource: &[(String, String)], stop: &crate::task::Signal) {
        if batch.is_empty() {
            return;
        }
        let (payload, count) = (Payload::of(self.signal, batch, resource), batch.len() as u64);
        let metrics = self.outbox.metrics.clone();
        let (mut backoff, begun) = (Backoff::new(BACKOFF[0], BACKOFF[1]), Instant::now());
        loop {
            let error = match self.client.send(&payload).await {
                Ok(accepted) => {
                    let rejected = accepted.rejected.min(count);
                    metrics.sent(self.signal, count - rejected);
                    self.note(&accepted.message, rejected);
                    if rejected > 0 {
                        metrics.dropped(self.signal, Dropped::Rejected, rejected);
                    }
                    return;
                }
                Err(error) => error,
            };
            metrics.failed(self.signal);
            self.note_failure(&error);
            let SendError { may_retry, after, .. } = error;
            let wait = backoff.next().max(after.unwrap_or_default());
            if !may_retry || begun.elapsed() + wait > GIVE_UP {
                let why = if may_retry { Dropped::Unsent } else { Dropped::Rejected };
                return metrics.dropped(self.signal, why, count);
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.gentle() => return metrics.dropped(self.signal, Dropped::Unsent, count),
            }
        }
    }

    /// Logs that the collector accepts batches again, and what it refused of this one.
    fn note(&mut self, message: &str, rejected: u64) {
        let (signal, endpoint) = (self.signal.word(), self.client.endpoint());
        if std::mem::take(&mut self.is_failing) {
            tracing::info!(signal, %endpoint, "the OpenTelemetry collector accepts data again");
        }
        if rejected > 0
            && let Some(suppressed) = self.refusals.allow()
        {
            let message = shortened(message.to_owned());
            tracing::warn!(signal, %endpoint, rejected, message, suppressed, "the OpenTelemetry collector refused a part of the data");
        }
    }

    /// Logs the first failure after a success.
    fn note_failure(&mut self, error: &SendError) {
        let (signal, endpoint) = (self.signal.word(), self.client.endpoint());
        if std::mem::replace(&mut self.is_failing, true) {
            tracing::debug!(signal, %endpoint, %error, "the OpenTelemetry collector still does not accept data");
        } else {
            tracing::warn!(signal, %endpoint, %error, "the OpenTelemetry collector does not accept data; what the queue cannot hold is dropped");
        }
    }
}
