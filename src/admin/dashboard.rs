//! A port that serves only the live page: on a laptop, about all nodes.

use super::page::{Live, Site, events, page_alone};
use super::{Asked, BindError, PortLimits, listen, local_only, parameters, pretty_text, serve};
use crate::task::Group;
use axum::Router;
use axum::extract::{RawQuery, State};
use axum::middleware;
use axum::response::Response;
use axum::routing::get;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;

/// The open port.
pub struct Dashboard {
    listener: TcpListener,
    router: Router,
    live: Arc<Live>,
}

impl fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dashboard")
    }
}

impl Dashboard {
    /// Opens a port of 127.0.0.1; 0 is any that is free. `explain` answers `/explain`.
    pub async fn bind(port: u16, site: Site, explain: Asked) -> Result<Self, BindError> {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        let live = site.live.clone();
        let router = Router::new()
            .route("/", get(page_alone).with_state(site.clone()))
            .route("/events", get(events).with_state(site))
            .route("/explain", get(answer).with_state(Arc::new(explain)))
            .layer(middleware::from_fn(local_only));
        Ok(Self { listener, router, live })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until dropped.
    pub async fn serve(self) {
        let serving = Group::default();
        serving.spawn(serve(self.listener, self.router, PortLimits::local(), |_, _| None));
        self.live.run().await;
    }
}

async fn answer(State(explain): State<Arc<Asked>>, RawQuery(query): RawQuery) -> Response {
    pretty_text(explain(parameters(query.as_deref())).await)
}
