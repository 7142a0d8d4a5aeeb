//! Draining: asks tasks to end, first gently (start nothing new, finish what is open), then at once.

use tokio_util::sync::CancellationToken;

/// The sending side, which the owner keeps. Tasks get a [`Signal`].
#[derive(Debug, Clone, Default)]
pub struct Drain {
    gentle: CancellationToken,
    now: CancellationToken,
}

/// The receiving side of a [`Drain`].
#[derive(Debug, Clone)]
pub struct Signal {
    gentle: CancellationToken,
    now: CancellationToken,
}

impl Drain {
    /// A signal that follows this drain.
    pub fn signal(&self) -> Signal {
        Signal { gentle: self.gentle.clone(), now: self.now.clone() }
    }

    /// A child: it follows this drain, and can also be drained alone.
    pub fn child(&self) -> Self {
        Self { gentle: self.gentle.child_token(), now: self.now.child_token() }
    }

    /// Asks tasks to start nothing new and to finish what is open.
    pub fn gently(&self) {
        self.gentle.cancel();
    }

    /// Asks tasks to end at once.
    pub fn at_once(&self) {
        self.gentle.cancel();
        self.now.cancel();
    }
}

impl Signal {
    /// Completes when nothing new may be started.
    pub async fn gentle(&self) {
        self.gentle.cancelled().await;
    }

    /// Completes when everything must end at once.
    pub async fn now(&self) {
        self.now.cancelled().await;
    }
}
