//! Telling everything below to end: first gently (finish what you have), then at once.

use tokio_util::sync::CancellationToken;

/// Gives the order to end. Kept by the owner; children get a [`Signal`].
#[derive(Debug, Clone, Default)]
pub struct Drain {
    gentle: CancellationToken,
    now: CancellationToken,
}

/// Hears the order to end.
#[derive(Debug, Clone)]
pub struct Signal {
    gentle: CancellationToken,
    now: CancellationToken,
}

impl Drain {
    /// A signal that hears this order.
    pub fn signal(&self) -> Signal {
        Signal { gentle: self.gentle.clone(), now: self.now.clone() }
    }

    /// A drain below this one: it ends when this one does, and can be ended alone.
    pub fn child(&self) -> Self {
        Self { gentle: self.gentle.child_token(), now: self.now.child_token() }
    }

    /// Asks all to accept nothing new and to finish what they have.
    pub fn gently(&self) {
        self.gentle.cancel();
    }

    /// Asks all to end at once.
    pub fn at_once(&self) {
        self.gentle.cancel();
        self.now.cancel();
    }
}

impl Signal {
    /// Completes when nothing new is to be started.
    pub async fn gentle(&self) {
        self.gentle.cancelled().await;
    }

    /// Completes when everything is to end.
    pub async fn now(&self) {
        self.now.cancelled().await;
    }
}
