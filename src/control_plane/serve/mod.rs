//! Serves mesh facts and certificates to daemons: gRPC over TLS.
//!
//! ```text
//!   connection ──► calls ──┬─► authority: certificates
//!   (TLS, HTTP/2)  (who)   └─► stream ──► session ──► subscription ──► difference
//!                                                  (the protocol, pure)  (shared bytes)
//! ```
//! The catalog makes an edition with each batch of changes. Streams are brought to the newest edition in a common
//! rhythm (`editions.rs`), so what one stream has to be told is what most have to be told: it is found and encoded
//! once.

mod calls;
mod connection;
mod difference;
mod editions;
mod grpc;
mod index;
#[doc(hidden)]
pub mod measured;
pub mod metrics;
mod node;
pub mod nodes;
mod session;
mod shared;
mod stream;
mod subscription;
#[cfg(test)]
mod tests;

pub use metrics::Metrics;
pub use shared::{Authority, Config, Denied};

use self::nodes::Nodes;
use self::shared::Shared;
use crate::control_plane::Catalog;
use crate::task::Signal;
use std::sync::Arc;
use tokio::net::TcpListener;

/// The server of mesh facts and certificates.
#[derive(Clone, Debug)]
pub struct Server(Arc<Shared>);

impl Server {
    /// A server that does not listen yet.
    pub fn new(config: Config, authority: Authority, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Shared::new(config, authority, metrics)))
    }

    /// The daemons that are connected.
    pub fn nodes(&self) -> Arc<Nodes> {
        self.0.nodes.clone()
    }

    /// Serves what is in the catalog until the gentle signal, then ends connections in order.
    pub async fn serve(self, listener: TcpListener, catalog: Arc<Catalog>, stop: Signal) {
        tokio::select! {
            () = self.0.editions.pace(&catalog, &self.0.metrics) => {}
            () = connection::accept(self.0.clone(), listener, stop) => {}
        }
    }
}
