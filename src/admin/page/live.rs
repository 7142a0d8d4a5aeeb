//! Keeps the picture that all readers of the live page share, and sends its changes to those who listen. A picture is
//! made when somebody reads, once for all, and never on a thread that enforces.

use super::picture::Picture;
use crate::task::thread::run_blocking;
use axum::body::Bytes;
use parking_lot::Mutex;
use serde_json::Value;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Most readers that listen at the same time.
pub const LISTENERS_MAX: usize = 8;

/// Events that wait for one reader. A reader with more is dropped.
const WAITING_MAX: usize = 4;

/// Shortest time between two pictures.
const PERIOD: Duration = Duration::from_secs(2);

/// Making pictures takes at most one part in this many of the time.
const SHARE: u32 = 4;

/// Longest time between two pictures because of that.
const PERIOD_MAX: Duration = Duration::from_secs(30);

/// Shortest time from the end of one picture to the beginning of the next, where the nodes took long to answer.
const REST: Duration = Duration::from_secs(1);

/// Listeners hear at least this often that the next picture is still to come. `feed.js` waits three times as long.
const BEAT: Duration = Duration::from_secs(5);

/// What the nodes say of themselves.
#[derive(Debug)]
pub struct Told {
    /// `{"nodes": […]}`.
    pub said: Value,
    /// The work of this process that it took, without the time in which it waited for others.
    pub work: Duration,
}

/// Asks the nodes.
pub type Feed = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Told> + Send>> + Send + Sync>;

/// The picture and its readers.
pub struct Live {
    feed: Feed,
    last: tokio::sync::Mutex<Option<Made>>,
    /// The last picture, for those who do not wait until the next one is made.
    shown: Mutex<Option<Arc<Picture>>>,
    listeners: Mutex<Vec<Listener>>,
    came: Notify,
}

struct Made {
    picture: Arc<Picture>,
    /// When the next picture may be made.
    next: Instant,
}

struct Listener {
    events: mpsc::Sender<Bytes>,
    /// Ends the reader's connection.
    cut: CancellationToken,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live")
    }
}

/// As many readers listen as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{LISTENERS_MAX} readers listen already; close one of the other pages")]
pub struct Full;

impl Live {
    /// Pictures of what `feed` says.
    pub fn new(feed: Feed) -> Arc<Self> {
        Arc::new(Self {
            feed,
            last: Default::default(),
            shown: Mutex::default(),
            listeners: Mutex::default(),
            came: Notify::new(),
        })
    }

    /// The last picture if it is recent or the next one is being made, otherwise a new one.
    pub async fn picture(&self) -> Arc<Picture> {
        let mut last = match self.last.try_lock() {
            Ok(last) => last,
            Err(_) => {
                let shown = self.shown.lock().clone();
                match shown {
                    Some(picture) => return picture,
                    None => self.last.lock().await,
                }
            }
        };
        match last.as_ref() {
            Some(made) if Instant::now() < made.next => made.picture.clone(),
            _ => self.make(&mut last).await,
        }
    }

    /// Makes a picture, and sends what has changed to those who listen: they always know the last one.
    async fn make(&self, last: &mut Option<Made>) -> Arc<Picture> {
        let before = last.as_ref().map(|made| made.picture.clone()).unwrap_or_default();
        let (begun, heard) = (Instant::now(), !self.listeners.lock().is_empty());
        let told = (self.feed)().await;
        let kept = before.clone();
        let work = move || {
            let begun = std::time::Instant::now();
            let picture = Picture::of(&told.said, &before, SystemTime::now());
            let change = heard.then(|| event("change", &picture.since(&before)));
            (Arc::new(picture), change, told.work + begun.elapsed())
        };
        let (picture, change, work) = run_blocking(work).await.unwrap_or((kept, None, PERIOD_MAX));
        *self.shown.lock() = Some(picture.clone());
        let next = begun + work.saturating_mul(SHARE).clamp(PERIOD, PERIOD_MAX);
        *last = Some(Made { picture: picture.clone(), next: next.max(Instant::now() + REST) });
        if let Some(change) = change {
            self.send(&change);
        }
        picture
    }

    /// A new reader: gets the whole picture, then its changes. `cut` is cancelled if it does not keep up.
    pub async fn listen(&self, cut: CancellationToken) -> Result<mpsc::Receiver<Bytes>, Full> {
        self.listeners.lock().retain(|listener| !listener.events.is_closed());
        if self.listeners.lock().len() >= LISTENERS_MAX {
            return Err(Full);
        }
        // While this is locked no change is sent, so the reader misses none.
        let mut last = self.last.lock().await;
        let picture = match last.as_ref() {
            Some(made) if Instant::now() < made.next => made.picture.clone(),
            _ => self.make(&mut last).await,
        };
        let whole = run_blocking(move || event("whole", &picture.whole())).await.unwrap_or_default();
        let (events, received) = mpsc::channel(WAITING_MAX);
        // There is room for the first one.
        let _ = events.try_send(whole);
        let mut listeners = self.listeners.lock();
        if listeners.len() >= LISTENERS_MAX {
            return Err(Full);
        }
        listeners.push(Listener { events, cut });
        self.came.notify_one();
        Ok(received)
    }

    /// Sends changes for as long as it is awaited. Nothing is made while nobody listens.
    pub async fn run(&self) {
        loop {
            self.listeners.lock().retain(|listener| !listener.events.is_closed());
            if self.listeners.lock().is_empty() {
                self.came.notified().await;
            }
            let mut beats = tokio::time::interval_at(Instant::now() + BEAT, BEAT);
            let turn = self.turn();
            tokio::pin!(turn);
            loop {
                tokio::select! {
                    () = &mut turn => break,
                    _ = beats.tick() => self.beat(),
                }
            }
        }
    }

    /// Waits until the next picture may be made, and makes it.
    async fn turn(&self) {
        let next = self.last.lock().await.as_ref().map_or_else(Instant::now, |made| made.next);
        tokio::time::sleep_until(next).await;
        let mut last = self.last.lock().await;
        // A reader who opened the page may have had one made meanwhile.
        if last.as_ref().is_none_or(|made| made.next <= Instant::now()) {
            self.make(&mut last).await;
        }
    }

    /// Tells those who listen that the feed is alive. Where news wait, they say it too.
    fn beat(&self) {
        let beat = event("alive", &Value::Object(Default::default()));
        for Listener { events, .. } in self.listeners.lock().iter() {
            if events.capacity() == WAITING_MAX {
                let _ = events.try_send(beat.clone());
            }
        }
    }

    fn send(&self, event: &Bytes) {
        self.listeners.lock().retain(|listener| match listener.events.try_send(event.clone()) {
            Ok(()) => true,
            Err(_) => {
                listener.cut.cancel();
                false
            }
        });
    }
}

/// One server-sent event.
fn event(name: &str, data: &Value) -> Bytes {
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
