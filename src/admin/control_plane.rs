//! The HTTP ports of a control plane: dumps (loopback only), metrics, and readiness. They have the same limits and
//! checks as those of a node.

use super::{BindError, Logging, Page, PortLimits, Profile, READY_DEADLINE, Rendered, STATS_DEADLINE};
use super::{exposed, in_turn, json, listen, local_only, parameters, ready_or_not, serve, text_of};
use crate::ports;
use crate::task::thread::run_blocking;
use crate::task::{Group, Ready};
use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;

/// The functions behind the paths.
pub struct ControlPages {
    /// `/config_dump`.
    pub config_dump: Page,
    /// `/nodes`.
    pub nodes: Page,
    /// `/logging`.
    pub logging: Logging,
    /// `/debug/pprof/profile`.
    pub cpu_profile: Profile,
    /// `/metrics`.
    pub metrics: Rendered,
    /// `/healthz/ready`.
    pub ready: Ready,
}

impl fmt::Debug for ControlPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ControlPages")
    }
}

/// The open ports.
#[derive(Debug)]
pub struct ControlPorts(Vec<(TcpListener, Router, PortLimits)>);

impl ControlPorts {
    /// Opens the ports; with `ipv6` also on IPv6.
    pub async fn bind(pages: ControlPages, ipv6: bool) -> Result<Self, BindError> {
        let pages = Arc::new(pages);
        let admin = Router::new()
            .route("/", get(index))
            .route("/config_dump", get(config_dump))
            .route("/nodes", get(nodes))
            .route("/metrics", get(metrics))
            .route("/logging", post(logging))
            .route("/debug/pprof/profile", get(cpu_profile))
            .layer(middleware::from_fn(local_only))
            .with_state(pages.clone());
        let stats = Router::new()
            .route("/metrics", get(metrics))
            .layer(middleware::from_fn_with_state(Arc::default(), in_turn))
            .with_state(pages.clone());
        let ready = Router::new().route("/healthz/ready", get(readiness)).with_state(pages);
        let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let port = |ip: IpAddr, port: u16| listen(SocketAddr::new(ip, port));
        Ok(Self(vec![
            (port(Ipv4Addr::LOCALHOST.into(), ports::ADMIN).await?, admin, PortLimits::local()),
            (port(any, ports::STATS).await?, stats, PortLimits::open(STATS_DEADLINE)),
            (port(any, ports::READY).await?, ready, PortLimits::open(READY_DEADLINE)),
        ]))
    }

    /// Serves all ports until dropped.
    pub async fn serve(self) {
        let serving = Group::default();
        for (listener, router, limits) in self.0 {
            serving.spawn(serve(listener, router, limits, |_, _| None));
        }
        serving.finished().await;
    }
}

async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><title>culvert control</title><h1>culvert control</h1><ul>\
         <li><a href=/nodes>nodes</a>: the daemons that are connected, and what each has acknowledged\
         <li><a href=/config_dump>config_dump</a>: what is served, by name and version, and the settings\
         <li><a href=/metrics>metrics</a>\
         <li>POST /logging?level=debug or ?reset: change the log filter\
         <li><a href=/debug/pprof/profile>debug/pprof/profile</a>?seconds=10&frequency=100: a CPU profile, for pprof\
         </ul>\n",
    )
}

/// Makes a page off the runtime.
async fn pretty(pages: Arc<ControlPages>, pick: fn(&ControlPages) -> &Page) -> Response {
    match run_blocking(move || text_of(&pick(&pages)())).await {
        Some(text) => json(text),
        None => (StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; see standard error\n").into_response(),
    }
}

async fn config_dump(State(pages): State<Arc<ControlPages>>) -> Response {
    pretty(pages, |pages| &pages.config_dump).await
}

async fn nodes(State(pages): State<Arc<ControlPages>>) -> Response {
    pretty(pages, |pages| &pages.nodes).await
}

async fn logging(State(pages): State<Arc<ControlPages>>, RawQuery(query): RawQuery) -> Response {
    match (pages.logging)(&parameters(query.as_deref())) {
        Ok(text) => (StatusCode::OK, text).into_response(),
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn cpu_profile(State(pages): State<Arc<ControlPages>>, RawQuery(query): RawQuery) -> Response {
    let kind = HeaderValue::from_static("application/octet-stream");
    match (pages.cpu_profile)(parameters(query.as_deref())).await {
        Ok(profile) => ([(header::CONTENT_TYPE, kind)], profile).into_response(),
        Err(text) => (StatusCode::BAD_REQUEST, text).into_response(),
    }
}

async fn metrics(State(pages): State<Arc<ControlPages>>, headers: HeaderMap) -> Response {
    exposed(&pages.metrics, &headers).await
}

async fn readiness(State(pages): State<Arc<ControlPages>>) -> Response {
    ready_or_not(&pages.ready)
}
